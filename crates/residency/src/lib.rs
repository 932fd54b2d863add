//! Which weights are in memory now, inside a byte budget.
//!
//! Knows byte ranges, matrices and experts; it does not know what a token is. [`Weights`] reads a checkpoint's skeleton
//! (all but routed experts) and any choice of experts, and never touches the bytes of the others.

mod buffer;
mod cache;
mod error;
mod finite;
mod load;
mod matrix;
mod plan;
mod unpack;
mod weights;

pub use cache::{
    CachePolicy, ExpertCache, Lease, READERS, StreamIo, StreamOptions, StreamStats, Visit, least_stream_bytes,
    most_stream_bytes,
};
pub use error::{ResidencyError, Result};
pub use load::read_stored;
pub use matrix::{Bytes, Expert, Matrix};
pub use plan::{Budget, LayerExperts, MemoryPlan, WeightSizes, memory_plan, skeleton_bytes};
pub use weights::{Progress, Weights};
