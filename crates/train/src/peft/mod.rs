//! Adapters as the PEFT library keeps them: a folder with `adapter_config.json` and `adapter_model.safetensors`.
//!
//! [`read`] makes an [`Overlay`](quorate_model::Overlay) of an adapter, [`write`] an adapter of an overlay. Read are LoRA
//! factors of any matrix but the embedding, of fused experts (`target_parameters`, as transformers 5 has them) and modules
//! saved in full; everything else that would change numbers is refused by name, never passed over.

mod config;
mod names;
mod read;
mod write;

pub use config::AdapterConfig;
pub use read::read;
pub use write::{encode, write};

/// File name of the configuration.
pub const CONFIG: &str = "adapter_config.json";

/// File name of the tensors.
pub const WEIGHTS: &str = "adapter_model.safetensors";

/// What all keys begin with.
const PREFIX: &str = "base_model.model.";
