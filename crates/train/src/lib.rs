//! Training parts of a model: which weights, an objective on the one forward pass, an optimizer, a loop that can be resumed
//! bit for bit; and adapters as the PEFT library keeps them.
//!
//! [`Parameters`] are laid over the model as an [`Overlay`](quorate_model::Overlay); the model's own weights are never
//! written to. [`Trainer`] does steps of [`AdamW`] on an [`Objective`], by default [`AnswerLoss`].
//!
//! This crate must never print or know a paper.

mod adamw;
mod error;
mod objective;
mod options;
mod parameters;
pub mod peft;
mod state;
mod trainer;

pub use adamw::{AdamW, AdamWOptions};
pub use error::TrainError;
pub use objective::{AnswerLoss, Example, Loss, Objective, cross_entropy};
pub use options::{Schedule, TrainOptions};
pub use parameters::{Form, Parameter, Parameters, select};
pub use trainer::{Best, Hooks, Outcome, StepReport, Trainer};
