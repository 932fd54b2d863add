//! Reading and writing the element types.
//!
//! A new type without blocks is a case of [`DType`], a [`Weight`] here that widens one vector of it,
//! and a line in [`with_weight!`]; one with blocks is a [`Quant`] and a name in [`with_quant!`].

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::DType;
use crate::quant::{Quant, widen_chunk, with_quant};
use crate::simd::{Isa, MAX_LANES, Simd, kernel};

/// A type whose values stand for themselves, as the kernels read it.
pub(crate) trait Weight {
    const DTYPE: DType;

    /// Values `c..c + LANES` of a row, widened exactly.
    ///
    /// # Safety
    /// The machine must have the set of `S`, and the row these values.
    unsafe fn load<S: Simd>(row: *const u8, c: usize) -> S::V;

    /// Values `c..c + n`, with `n < LANES`, and zeros behind them.
    ///
    /// # Safety
    /// As for [`Weight::load`].
    #[inline(always)]
    unsafe fn load_part<S: Simd>(row: *const u8, c: usize, n: usize) -> S::V {
        let bytes = const { Self::DTYPE.block_bytes() };
        let mut buffer = [0_u8; 4 * MAX_LANES];
        std::ptr::copy_nonoverlapping(row.add(bytes * c), buffer.as_mut_ptr(), bytes * n);
        Self::load::<S>(buffer.as_ptr(), 0)
    }
}

pub(crate) struct F32;
impl Weight for F32 {
    const DTYPE: DType = DType::F32;
    #[inline(always)]
    unsafe fn load<S: Simd>(row: *const u8, c: usize) -> S::V {
        S::load(row.add(4 * c).cast())
    }
}

pub(crate) struct F16;
impl Weight for F16 {
    const DTYPE: DType = DType::F16;
    #[inline(always)]
    unsafe fn load<S: Simd>(row: *const u8, c: usize) -> S::V {
        S::load_f16(row.add(2 * c))
    }
}

pub(crate) struct Bf16;
impl Weight for Bf16 {
    const DTYPE: DType = DType::BF16;
    #[inline(always)]
    unsafe fn load<S: Simd>(row: *const u8, c: usize) -> S::V {
        S::load_bf16(row.add(2 * c))
    }
}

/// Evaluates an expression with `$W` standing for the [`Weight`] of a [`DType`] without blocks.
macro_rules! with_weight {
    ($dtype:expr, $W:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $W = $crate::weight::F32;
                $body
            }
            $crate::DType::F16 => {
                type $W = $crate::weight::F16;
                $body
            }
            $crate::DType::BF16 => {
                type $W = $crate::weight::Bf16;
                $body
            }
            dtype => unreachable!("{} has blocks", dtype.name()),
        }
    };
}
pub(crate) use with_weight;

/// Widens `out.len()` values, exactly.
///
/// # Panics
/// If `src` has not the bytes of so many values.
pub fn dequantize(dtype: DType, src: &[u8], out: &mut [f32]) {
    dequantize_with(Isa::best(), dtype, src, out);
}

pub(crate) fn dequantize_with(isa: Isa, dtype: DType, src: &[u8], out: &mut [f32]) {
    assert_eq!(dtype.row_bytes(out.len()), Some(src.len()), "bytes of the source");
    // SAFETY: the lengths were checked, and `Isa` is one that was detected.
    unsafe { widen(isa, dtype, src.as_ptr(), out) }
}

/// Widens `out.len()` values.
///
/// # Safety
/// The machine must have `isa`, and `src` hold `out.len()` values, in whole blocks.
pub(crate) unsafe fn widen(isa: Isa, dtype: DType, src: *const u8, out: &mut [f32]) {
    with_quant!(dtype, Q => widen_blocks::<Q>(isa, src, out), else widen_plain(isa, dtype, src, out));
}

kernel! {
    /// # Safety
    /// As for [`widen`].
    unsafe fn widen_plain<S>(dtype: DType, src: *const u8, out: &mut [f32]) {
        with_weight!(dtype, W => widen_all::<S, W>(src, out));
    }
}

#[inline(always)]
unsafe fn widen_all<S: Simd, W: Weight>(src: *const u8, out: &mut [f32]) {
    let whole = out.len() - out.len() % S::LANES;
    for c in (0..whole).step_by(S::LANES) {
        S::store(out.as_mut_ptr().add(c), W::load::<S>(src, c));
    }
    if whole < out.len() {
        let part = W::load_part::<S>(src, whole, out.len() - whole);
        S::store_part(out.as_mut_ptr().add(whole), part, out.len() - whole);
    }
}

kernel! {
    /// # Safety
    /// As for [`widen`].
    unsafe fn widen_blocks<S, Q: Quant>(src: *const u8, out: &mut [f32]) {
        let (len, bytes) = const { (Q::DTYPE.block_len(), Q::DTYPE.block_bytes()) };
        for (i, out) in out.chunks_exact_mut(len).enumerate() {
            widen_chunk::<S, Q>(src.add(i * bytes), 1, out.as_mut_ptr());
        }
    }
}

/// Narrows `src`: halves and bfloats round to the nearest, ties to even; `Q8_0` follows ggml: the
/// scale is the largest magnitude of a block over 127, kept as a half, and values round to the
/// nearest, ties away from zero. (So a block of `Q8_0` should not exceed 127 times 65504.)
///
/// # Panics
/// If `out` has not the bytes of so many values, or `dtype` is another: those are only read.
pub fn quantize(dtype: DType, src: &[f32], out: &mut [u8]) {
    assert_eq!(dtype.row_bytes(src.len()), Some(out.len()), "bytes of the result");
    match dtype {
        DType::F32 => narrow(src, out, |[x]: [f32; 1]| x.to_le_bytes()),
        // Many at a time, which takes an instruction for several of them.
        DType::F16 => {
            let mut halves = [f16::ZERO; 64];
            for (src, out) in src.chunks(64).zip(out.chunks_mut(128)) {
                let halves = &mut halves[..src.len()];
                halves.convert_from_f32_slice(src);
                for (out, half) in out.chunks_exact_mut(2).zip(halves) {
                    out.copy_from_slice(&half.to_le_bytes());
                }
            }
        }
        DType::BF16 => narrow(src, out, |[x]: [f32; 1]| bf16::from_f32(x).to_le_bytes()),
        DType::Q8_0 => narrow(src, out, |x: [f32; 32]| {
            let d = x.iter().fold(0.0_f32, |most, x| most.max(x.abs())) / 127.0;
            let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
            let mut block = [0; 34];
            block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
            for (q, x) in block[2..].iter_mut().zip(x) {
                *q = (x * inverse).round() as i8 as u8;
            }
            block
        }),
        _ => panic!("{} is only read, not written", dtype.name()),
    }
}

/// Writes each block of `N` values as `B` bytes.
fn narrow<const N: usize, const B: usize>(src: &[f32], out: &mut [u8], f: impl Fn([f32; N]) -> [u8; B]) {
    let (blocks, _) = src.as_chunks::<N>();
    let (out, _) = out.as_chunks_mut::<B>();
    for (x, out) in blocks.iter().zip(out) {
        *out = f(*x);
    }
}
