//! Errors of holding weights.

use std::io;
use std::path::PathBuf;

use quorate_formats::{FormatError, Role};
use thiserror::Error;

/// Result of this crate.
pub type Result<T, E = ResidencyError> = std::result::Result<T, E>;

/// Why weights cannot be held or given out.
#[derive(Debug, Error)]
pub enum ResidencyError {
    /// A file cannot be read, or the model has no such weight.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A weight is not a number.
    #[error(
        "{}: tensor {tensor} has a value that is infinite or not a number (element {element}); \
         help: the file is damaged, download or convert it again",
        path.display()
    )]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Index of the first such element.
        element: usize,
    },
    /// A weight was asked for that is not in memory in this form.
    #[error("{role} is not in memory as a {form}; help: load the skeleton first")]
    NotResident {
        /// The weight.
        role: Role,
        /// `matrix` or `vector`.
        form: &'static str,
    },
    /// A weight of another shape was to take a place.
    #[error("{role} is {} x {}, the weight to put there is {} x {}; help: give one of the same shape", old.0, old.1, new.0, new.1)]
    OtherShape {
        /// The weight.
        role: Role,
        /// Rows and columns of the place.
        old: (usize, usize),
        /// Rows and columns of what was given.
        new: (usize, usize),
    },
    /// Experts to keep that the model does not have.
    #[error("cannot load these experts: {problem}; help: {help}")]
    Kept {
        /// What is wrong.
        problem: String,
        /// What to do.
        help: &'static str,
    },
    /// Weights would exceed the budget.
    #[error(
        "cannot hold {} of weights in a budget of {}; help: keep fewer experts, or allow {} with --memory",
        human(*needed_bytes), human(*limit_bytes), human(*needed_bytes)
    )]
    OverBudget {
        /// Bytes that would be resident.
        needed_bytes: u64,
        /// Bytes allowed.
        limit_bytes: u64,
    },
    /// Not even the least that computes fits.
    #[error(
        "cannot hold this model in {}: {} needed ({} of weights that every token uses, {} for {experts} experts in \
         each MoE layer, {} for the context, {} for buffers); help: --memory {}",
        human(*budget_bytes), human(*needed_bytes), human(*skeleton_bytes), human(*expert_bytes), human(*kv_bytes),
        human(*overhead_bytes), flag(*needed_bytes)
    )]
    DoesNotFit {
        /// Bytes allowed.
        budget_bytes: u64,
        /// Bytes needed at least.
        needed_bytes: u64,
        /// Bytes of the skeleton.
        skeleton_bytes: u64,
        /// Bytes of the fewest experts.
        expert_bytes: u64,
        /// The fewest experts of a layer: as many as a token uses.
        experts: usize,
        /// Bytes of keys and values.
        kv_bytes: u64,
        /// Bytes of buffers.
        overhead_bytes: u64,
    },
    /// Not even the least that streams fits.
    #[error(
        "cannot stream experts in {}: {} needed at least; help: --memory {}",
        human(*budget_bytes), human(*needed_bytes), flag(*needed_bytes)
    )]
    NoRoomToStream {
        /// Bytes allowed.
        budget_bytes: u64,
        /// Bytes needed at least.
        needed_bytes: u64,
    },
    /// The system starts no thread to read with.
    #[error("cannot start a thread to read experts with")]
    NoThread(#[source] io::Error),
    /// The system gives no more memory.
    #[error("cannot get {} of memory from the system; help: keep fewer experts, or set --memory", human(*bytes))]
    NoMemory {
        /// Bytes asked for.
        bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The caller stopped the work.
    #[error("cancelled while loading weights")]
    Cancelled,
}

/// Bytes for people, rounded up, so that a budget of the number shown is enough.
fn human(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    while unit + 1 < units.len() && bytes >= 1024u64.pow(unit as u32 + 2) {
        unit += 1;
    }
    let tenths = (u128::from(bytes) * 10).div_ceil(1024u128.pow(unit as u32 + 1));
    format!("{}.{} {}", tenths / 10, tenths % 10, units[unit])
}

/// The same as a value of `--memory`.
fn flag(bytes: u64) -> String {
    human(bytes).replace(' ', "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_up() {
        assert_eq!(human(0), "0.0 KiB");
        assert_eq!(human(1), "0.1 KiB");
        assert_eq!(human(1024), "1.0 KiB");
        assert_eq!(human(1 << 20), "1.0 MiB");
        assert_eq!(human((1 << 20) + 1), "1.1 MiB");
        assert_eq!(human((3 << 30) - 1), "3.0 GiB");
        assert_eq!(flag(7 << 30), "7.0GiB");
        assert_eq!(human(u64::MAX), "16777216.0 TiB");
    }
}
