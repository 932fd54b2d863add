//! Models as GGUF files: quantised, converted or pruned.
//!
//! [`write_model`] takes any checkpoint, from safetensors or GGUF, and writes one file: which tensors there are and of what
//! they are made is said by `formats`, how a tensor is rounded by `kernels`. Here is decided which type each tensor
//! gets ([`Mix`]), and the tokenizer is put into the file's words. One tensor's part at a time is in memory.

mod error;
mod mix;
mod sentence_piece;
mod vocabulary;
mod write;

pub use error::{ConvertError, Result};
pub use mix::{MIXES, Mix};
pub use write::{Importance, Options, Summary, write_model};
