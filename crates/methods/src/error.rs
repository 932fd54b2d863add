//! What can go wrong when a method runs.

use quorate_eval::tasks::TaskError;
use quorate_lens::LensError;
use quorate_model::ModelError;
use quorate_train::TrainError;

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum MethodError {
    /// Recording, scoring, selecting or intervening.
    #[error(transparent)]
    Lens(#[from] LensError),
    /// The model refused.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Task files.
    #[error(transparent)]
    Task(#[from] TaskError),
    /// Training, or adapters.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// What the method needs and does not have, and how to get it.
    #[error("{what}; help: {help}")]
    Needs {
        /// What is missing or wrong.
        what: String,
        /// What to do.
        help: String,
    },
    /// The user stopped it.
    #[error("interrupted")]
    Interrupted,
    /// Something outside the method.
    #[error(transparent)]
    Outside(#[from] Box<dyn std::error::Error + Send + Sync>),
}

impl MethodError {
    /// A [`MethodError::Needs`].
    pub fn needs(what: impl Into<String>, help: impl Into<String>) -> MethodError {
        MethodError::Needs { what: what.into(), help: help.into() }
    }
}

impl From<candle_core::Error> for MethodError {
    fn from(error: candle_core::Error) -> MethodError {
        MethodError::Model(error.into())
    }
}

impl From<quorate_residency::ResidencyError> for MethodError {
    fn from(error: quorate_residency::ResidencyError) -> MethodError {
        MethodError::Model(error.into())
    }
}
