//! Model files: where each tensor's bytes lie, and what the configuration says.
//!
//! Knows safetensors, GGUF, Hugging Face folders and the families' names. It computes nothing with weights and keeps none
//! in memory: a [`Checkpoint`] is an index of checked byte ranges, `residency` reads them.

mod bind;
pub mod checkpoint;
pub mod config;
pub mod datafile;
mod error;
pub mod families;
mod fingerprint;
pub mod gguf;
pub mod hf_writer;
pub mod outline;
pub mod packed;
pub mod presets;
mod prune;
pub mod quantised;
pub mod role;
pub mod rope;
pub mod safetensors;
pub mod shape;
pub mod source;
pub mod spec;
pub mod writer;

pub use checkpoint::{Checkpoint, gguf_of};
pub use config::Config;
pub use datafile::{DataFile, UNCACHED_ALIGNMENT, uncached_len};
pub use error::{FormatError, Result};
pub use families::{FAMILIES, Family};
pub use gguf::{Arch, GGUF_NAMES, GgmlType, GgufArray, GgufFile, GgufTensor, GgufValue, gguf_bytes};
pub use hf_writer::{write_edited_hf, write_pruned_hf};
pub use outline::Outline;
pub use presets::{PRESETS, Preset};
pub use quantised::{QUANTISATIONS, Quantisation};
pub use role::Role;
pub use safetensors::{SafetensorsFile, StoredDType, TensorLoc};
pub use shape::ParameterCounts;
pub use source::Recipe;
pub use writer::{Sink, TensorOut, check_output, safetensors_bytes, write_file, write_safetensors};
