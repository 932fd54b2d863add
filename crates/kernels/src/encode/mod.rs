//! Writing weights in blocks: from values to rounded codes with scales.
//!
//! The scales are searched so that the squared error is least, each value weighted by its importance if that is known.
//! Without importance the small types round as ggml does, byte for byte.

mod search;
mod small;
mod super_blocks;

use crate::pool::{Pool, SendPtr};
use crate::simd::kernel;
use crate::{DType, KernelError};

/// Operations that a value costs, for cutting the work.
const COST: usize = 400;

impl DType {
    /// Whether [`encode`] writes the type.
    pub const fn is_writable(self) -> bool {
        use DType::*;
        matches!(
            self,
            F32 | F16 | BF16 | Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q2_K | Q3_K | Q4_K | Q5_K | Q6_K | IQ4_NL | MXFP4
        )
    }
}

/// Writes a matrix of `src.len() / cols` rows as `dtype`. `importance` says how much each column matters (mean squares of
/// what it is multiplied with, as in llama.cpp's importance matrices); `F32`, `F16`, `BF16`, `Q8_0` and `MXFP4` do not ask.
///
/// The result depends neither on the number of threads nor on the instruction set.
///
/// # Errors
/// A value that is not finite, or too large for the type.
///
/// # Panics
/// If a row is no whole number of blocks, `out` has not the bytes of the matrix, `importance` has not `cols` values, or the
/// type is only read (see [`DType::is_writable`]).
pub fn encode(
    pool: &Pool,
    dtype: DType,
    cols: usize,
    src: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> Result<(), KernelError> {
    let row_bytes = dtype.row_bytes(cols).unwrap_or_else(|| panic!("rows of {cols} as {}", dtype.name()));
    assert!(cols > 0 && src.len().is_multiple_of(cols), "whole rows");
    let rows = src.len() / cols;
    assert_eq!(rows.checked_mul(row_bytes), Some(out.len()), "bytes of the result");
    assert!(importance.is_none_or(|w| w.len() == cols), "an importance for each column");
    assert!(dtype.is_writable(), "{} is only read", dtype.name());
    check(dtype, cols, src)?;
    let start = SendPtr(out.as_mut_ptr());
    pool.run_parts(src.len().saturating_mul(COST), |part| {
        for row in part.split(rows, 1) {
            // SAFETY: different rows do not overlap, and `out` is borrowed throughout; the pool's set is the machine's.
            unsafe {
                let out = std::slice::from_raw_parts_mut(start.get().add(row * row_bytes), row_bytes);
                encode_row(pool.isa(), dtype, &src[row * cols..][..cols], importance, out);
            }
        }
    });
    Ok(())
}

/// Values must be finite, and scales fit a half.
fn check(dtype: DType, cols: usize, src: &[f32]) -> Result<(), KernelError> {
    const LARGEST: f32 = 65504.0;
    let most = match dtype {
        DType::F32 | DType::BF16 | DType::MXFP4 => f32::MAX,
        _ => LARGEST,
    };
    match src.iter().position(|v| v.is_nan() || v.abs() > most) {
        Some(at) => Err(KernelError::Unwritable { dtype, row: at / cols, value: src[at] }),
        None => Ok(()),
    }
}

kernel! {
    /// # Safety
    /// None but that of every kernel; slices are checked as everywhere.
    unsafe fn encode_row<S>(dtype: DType, x: &[f32], w: Option<&[f32]>, out: &mut [u8]) {
        match dtype {
            DType::Q4_0 => blocks(x, w, out, small::q4_0),
            DType::Q4_1 => blocks(x, w, out, small::q4_1),
            DType::Q5_0 => blocks(x, w, out, small::q5_0),
            DType::Q5_1 => blocks(x, w, out, small::q5_1),
            DType::IQ4_NL => blocks(x, w, out, small::iq4_nl),
            DType::MXFP4 => blocks(x, w, out, small::mxfp4),
            DType::Q2_K => blocks(x, w, out, super_blocks::q2_k),
            DType::Q3_K => blocks(x, w, out, super_blocks::q3_k),
            DType::Q4_K => blocks(x, w, out, super_blocks::q4_k),
            DType::Q5_K => blocks(x, w, out, super_blocks::q5_k),
            DType::Q6_K => blocks(x, w, out, super_blocks::q6_k),
            _ => crate::quantize(dtype, x, out),
        }
    }
}

/// Calls `f` on each block: its values, the importance of its columns, and the mean square of the row.
#[inline(always)]
fn blocks<const N: usize, const B: usize>(
    x: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
    f: impl Fn(&[f32; N], Option<Importance<'_, N>>) -> [u8; B],
) {
    let mean_square = importance.map(|_| x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32);
    let weights = importance.map(|w| w.as_chunks::<N>().0);
    for (i, (x, out)) in x.as_chunks::<N>().0.iter().zip(out.as_chunks_mut::<B>().0).enumerate() {
        let importance = weights.zip(mean_square).map(|(w, mean_square)| Importance { columns: &w[i], mean_square });
        *out = f(x, importance);
    }
}

/// How much the columns of a block matter.
#[derive(Clone, Copy)]
struct Importance<'a, const N: usize> {
    columns: &'a [f32; N],
    /// Of all values of the row.
    mean_square: f32,
}

#[inline(always)]
fn f16_bytes(v: f32) -> [u8; 2] {
    half::f16::from_f32(v).to_le_bytes()
}

/// As it will be read back.
#[inline(always)]
fn as_f16(v: f32) -> f32 {
    half::f16::from_f32(v).to_f32()
}
