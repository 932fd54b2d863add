//! What can go wrong in training.

use std::path::PathBuf;

use quorate_formats::{FormatError, Role};
use quorate_model::ModelError;

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The model, or the forward pass.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A file.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A tensor operation.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// Options that make no sense.
    #[error("{0}")]
    Options(String),
    /// A weight that cannot be trained as asked.
    #[error("cannot train {role}: {problem}")]
    Parameter {
        /// The weight.
        role: Role,
        /// What is wrong.
        problem: String,
    },
    /// An example that cannot be learned.
    #[error("example {index} {problem}")]
    Example {
        /// Its number, from 0.
        index: usize,
        /// What is wrong.
        problem: String,
    },
    /// The loss is not a number.
    #[error("the loss of step {step} is {loss}; help: lower the learning rate, or clip gradients")]
    Diverged {
        /// The step, from 0.
        step: u64,
        /// The loss.
        loss: f64,
    },
    /// A checkpoint of other training.
    #[error("{} does not continue this training: {problem}", .path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What differs.
        problem: String,
    },
    /// An adapter that cannot be used.
    #[error("adapter {}: {problem}", .path.display())]
    Adapter {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}
