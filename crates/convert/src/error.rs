//! What can go wrong when a model is converted.

use std::path::PathBuf;

use quorate_formats::FormatError;
use quorate_kernels::KernelError;
use quorate_residency::ResidencyError;
use thiserror::Error;

/// Result of this crate.
pub type Result<T, E = ConvertError> = std::result::Result<T, E>;

/// Why a model cannot be converted.
#[derive(Debug, Error)]
pub enum ConvertError {
    /// A file cannot be read or written, or the model has no form in GGUF.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A weight cannot be read.
    #[error(transparent)]
    Residency(#[from] ResidencyError),
    /// A weight cannot be written as its type.
    #[error("tensor {tensor}: {source}")]
    Value {
        /// The tensor.
        tensor: String,
        /// What cannot be.
        source: KernelError,
    },
    /// An importance matrix of another model.
    #[error("the importance matrix does not fit: {problem}; help: make it with this model")]
    Importance {
        /// What does not fit.
        problem: String,
    },
    /// A tokenizer that cannot be said in GGUF.
    #[error("{}: {problem}; help: {help}", path.display())]
    Tokenizer {
        /// The tokenizer's file.
        path: PathBuf,
        /// What has no place there.
        problem: String,
        /// What to do.
        help: String,
    },
}
