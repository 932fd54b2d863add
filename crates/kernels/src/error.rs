//! What can be wrong with data that came from a file. Wrong slice lengths are the caller's mistake
//! and panic instead.

use std::fmt;

use crate::{DType, Isa};

/// Why a kernel refuses its input.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum KernelError {
    /// A row of `cols` values is no whole number of blocks of `dtype` (or its bytes overflow).
    RowLength {
        /// Type of the matrix.
        dtype: DType,
        /// Values in a row.
        cols: usize,
    },
    /// The bytes of a matrix do not have the length that its shape asks for.
    DataLength {
        /// Type of the matrix.
        dtype: DType,
        /// Rows of the matrix.
        rows: usize,
        /// Values in a row.
        cols: usize,
        /// Bytes that the shape asks for.
        expected: usize,
        /// Bytes that were given.
        found: usize,
    },
    /// A slot names an expert that is not loaded, or none of this layer.
    MissingExpert {
        /// The expert asked for.
        expert: u32,
        /// The slot that asks for it: `token * k + choice`.
        slot: usize,
    },
    /// A set of vector instructions cannot be used.
    Instructions {
        /// The name that was given.
        name: String,
    },
    /// A value cannot be written as a type: it is not finite, or larger than its scales can be.
    Unwritable {
        /// The type.
        dtype: DType,
        /// Row of the matrix.
        row: usize,
        /// The value.
        value: f32,
    },
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RowLength { dtype, cols } => write!(
                f,
                "a row of {cols} values does not fit {}, whose blocks hold {} values",
                dtype.name(),
                dtype.block_len()
            ),
            Self::DataLength { dtype, rows, cols, expected, found } => {
                write!(f, "a {} matrix of {rows} x {cols} needs {expected} bytes, found {found}", dtype.name())
            }
            Self::MissingExpert { expert, slot } => {
                write!(f, "slot {slot} asks for expert {expert}, which is not loaded")
            }
            Self::Instructions { name } => {
                let names: Vec<_> = Isa::available().map(Isa::name).collect();
                write!(f, "no instructions `{name}`; help: this machine has {}", names.join(", "))
            }
            Self::Unwritable { dtype, row, value } => {
                let help = if value.is_finite() { "; help: BF16 and F32 hold it" } else { "" };
                write!(f, "row {row} has the value {value}, which {} cannot hold{help}", dtype.name())
            }
        }
    }
}

impl std::error::Error for KernelError {}
