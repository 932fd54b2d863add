//! Where a weight lies in a file when it is not a tensor of its own: a part of a fused tensor, a transposed one, or one in
//! a packed type.

use crate::packed::Int4;
use crate::{StoredDType, TensorLoc};

/// Which part of a tensor a weight is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fused {
    /// The tensor's name.
    pub tensor: String,
    /// The shape that the tensor must have.
    pub shape: Vec<usize>,
    /// The part.
    pub part: Part,
}

/// A part of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// `rows` rows from `first` on, all leading axes taken as one; of a tensor with one axis, elements.
    Rows {
        /// First row.
        first: usize,
        /// Rows.
        rows: usize,
    },
    /// Of matrix `index` of the leading axis (or the only matrix) `[in, out]`: the columns `first`, `first + step`, ..,
    /// `count` of them, as rows.
    Columns {
        /// Which matrix.
        index: usize,
        /// First column.
        first: usize,
        /// Step between columns.
        step: usize,
        /// Columns.
        count: usize,
    },
    /// Of a matrix, every second element of each row from `first` on.
    EverySecond {
        /// 0 or 1.
        first: usize,
    },
    /// Rows in another order.
    Reordered(RowOrder),
    /// Latent attention's up projection in two tensors (GGUF): this one `[H, rank, nope]`, the keys' rows as columns, and
    /// the values' `[H, values, rank]`, whose name has `attn_v_b` in place of `attn_k_b`.
    KeysValues {
        /// Width of a value.
        values: usize,
    },
    /// `ln(-x)` of each element: GGUF files hold `-exp(A_log)`.
    LogOfNegative,
}

/// Rows `first + i strides[0] + j strides[1] + k strides[2]` of a matrix, where `i`, `j` and `k` run below `counts`, the last
/// one fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowOrder {
    /// First row.
    pub first: usize,
    /// How often each index runs.
    pub counts: [usize; 3],
    /// Steps of each index, in stored rows.
    pub strides: [usize; 3],
}

impl RowOrder {
    /// The stored row of each row of the weight.
    pub fn rows(&self) -> impl Iterator<Item = usize> {
        let RowOrder { first, counts: [a, b, c], strides: [s, t, u] } = *self;
        (0..a * b * c).map(move |row| first + row / (b * c) * s + row / c % b * t + row % c * u)
    }
}

/// How the values of a weight come out of stored bytes that are not the weight as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recipe {
    /// Columns of a stored matrix `[rows, cols]`, as rows.
    Columns {
        /// The stored matrix.
        matrix: TensorLoc,
        /// First column.
        first: usize,
        /// Step between columns.
        step: usize,
        /// Columns.
        count: usize,
    },
    /// Every second element of each row.
    EverySecond {
        /// The stored matrix.
        matrix: TensorLoc,
        /// 0 or 1.
        first: usize,
    },
    /// Rows in another order.
    Reordered {
        /// The stored matrix; of a vector, each element is a row.
        matrix: TensorLoc,
        /// Which row comes when.
        order: RowOrder,
    },
    /// Keys' and values' projections of each head, laid behind each other: rows of the keys, which are stored as columns,
    /// then rows of the values.
    KeysValues {
        /// `[H, rank, nope]`.
        keys: TensorLoc,
        /// `[H, values, rank]`.
        values: TensorLoc,
    },
    /// `ln(-x)` of each element.
    LogOfNegative {
        /// The stored vector.
        vector: TensorLoc,
    },
    /// Bytes (8-bit floats, E4M3, or whole numbers) with one scale for each block.
    Scaled {
        /// The values `[rows, cols]`.
        values: TensorLoc,
        /// The scales `[ceil(rows / block[0]), ceil(cols / block[1])]`, which multiply.
        scales: TensorLoc,
        /// Rows and columns of a block.
        block: [usize; 2],
    },
    /// 4-bit whole numbers with scales and zero points.
    Int4(Int4),
    /// 4-bit floats in blocks of 32 with a shared exponent; the rows `first`, `first + step`, ..
    Mxfp4 {
        /// Nibbles of one expert `[rows, cols / 32, 16]`; byte `b` of a block holds elements `2b` (low) and `2b + 1`.
        blocks: TensorLoc,
        /// Exponents of one expert `[rows, cols / 32]`, biased by 127.
        scales: TensorLoc,
        /// First row.
        first: usize,
        /// Step between rows.
        step: usize,
    },
}

/// The matrix `index` of a stack `[n, rows, ..]`, as a tensor of its own.
pub(crate) fn stacked(loc: &TensorLoc, index: usize) -> TensorLoc {
    let len = loc.len / loc.shape[0].max(1) as u64;
    TensorLoc { shape: loc.shape[1..].to_vec(), offset: loc.offset + index as u64 * len, len, ..loc.clone() }
}

/// `rows` rows from `first` on of a tensor, leading axes taken as one; `shape` is the weight's.
pub(crate) fn rows(loc: &TensorLoc, first: usize, rows: usize, shape: &[usize]) -> TensorLoc {
    let all: usize = loc.shape[..loc.shape.len().saturating_sub(1).max(1)].iter().product();
    let row = loc.len / all.max(1) as u64;
    TensorLoc { shape: shape.to_vec(), offset: loc.offset + first as u64 * row, len: rows as u64 * row, ..loc.clone() }
}

impl Recipe {
    /// The stored tensors that it needs.
    pub fn stored(&self) -> Vec<&TensorLoc> {
        match self {
            Recipe::Columns { matrix, .. } | Recipe::EverySecond { matrix, .. } | Recipe::Reordered { matrix, .. } => {
                vec![matrix]
            }
            Recipe::KeysValues { keys, values } => vec![keys, values],
            Recipe::LogOfNegative { vector } => vec![vector],
            Recipe::Scaled { values, scales, .. } => vec![values, scales],
            Recipe::Int4(int4) => int4.stored(),
            Recipe::Mxfp4 { blocks, scales, .. } => vec![blocks, scales],
        }
    }

    /// The type in which the values are kept in memory: exact for all of them but [`Int4`]'s, see [`Int4::dtype`].
    pub fn dtype(&self) -> StoredDType {
        match self {
            Recipe::Columns { matrix, .. } | Recipe::EverySecond { matrix, .. } | Recipe::Reordered { matrix, .. } => {
                matrix.dtype
            }
            // Blocks lie along the keys' rows, which become columns: their values are widened.
            Recipe::KeysValues { keys, values } if keys.dtype == values.dtype && !keys.dtype.is_blocks() => keys.dtype,
            Recipe::KeysValues { .. } | Recipe::LogOfNegative { .. } | Recipe::Scaled { .. } => StoredDType::F32,
            Recipe::Int4(int4) => int4.dtype(),
            Recipe::Mxfp4 { .. } => StoredDType::Bf16,
        }
    }
}
