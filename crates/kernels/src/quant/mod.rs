//! Weights in blocks: rounded codes with scales.
//!
//! Every type is the same thing in another packing: a value is `scale * (code - OFFSET) - min`, where
//! [`Quant::GROUP`] values in a row share the scale and the min. So a type says here how to unpack its
//! codes, thirty-two at a time, and its scales and mins; what is made of them (dot products, tiles,
//! plain values) is written once.
//!
//! A row is worked on in chunks of [`CHUNK`] values: one block, or up to eight small ones.

#![allow(clippy::needless_range_loop, reason = "loops over registers are unrolled by their counters")]

#[cfg(target_arch = "x86_64")]
mod amx;
mod blocks;
mod codebooks;
mod dots;
mod grids;
mod pack;
mod rounded;
mod super_blocks;
mod tiles;
#[cfg(target_arch = "x86_64")]
mod twin;

#[cfg(target_arch = "x86_64")]
pub(crate) use twin::TwinLevels;

pub(crate) use blocks::*;
pub(crate) use codebooks::*;
pub(crate) use dots::{Piece, rounded_dots};
pub(crate) use pack::packed_len;
pub(crate) use rounded::{Rounded, Rounding, round_row};
pub(crate) use super_blocks::*;
pub(crate) use tiles::multiply_rounded;

use crate::DType;
use crate::simd::{Codes, Simd, Turned, Upright};

/// Values in a chunk.
pub(crate) const CHUNK: usize = 256;

/// The most groups in a chunk.
pub(crate) const GROUPS: usize = 16;

/// Takes unpacked codes.
///
/// A trait, not a closure: a closure cannot be told to become part of the kernel.
pub(crate) trait Sink<C: Codes> {
    /// Values `32 i..32 i + 32` of the chunk.
    ///
    /// # Safety
    /// As for [`Codes`], and what the sink was made for.
    unsafe fn take(&mut self, i: usize, codes: C::B);
}

/// A type of weights in blocks.
pub(crate) trait Quant {
    const DTYPE: DType;
    /// Values that share a scale: 16 or 32.
    const GROUP: usize;
    /// Whether codes are signed bytes; else they are at most 127.
    const SIGNED: bool = false;
    /// The greatest code, if they are unsigned.
    const MOST: u8 = 127;
    /// What is taken from unsigned codes.
    const OFFSET: u8 = 0;
    /// Whether there are mins, to be taken from the scaled values. If so, `OFFSET` is 0.
    const MINS: bool = false;
    /// Whether [`Quant::levels`] says what the scales are made of.
    const LEVELS: bool = false;
    /// Whether [`Quant::turned`] can unpack several rows at once.
    const TURNS: bool = false;

    /// Writes the scales (and mins, if there are any) of the `n` blocks at `p`: one, or up to eight if
    /// a block has 32 values. What lies behind them in `s` and `m` becomes 0, up to eight values.
    ///
    /// # Safety
    /// The machine must have the set of `S`, and there be so many blocks.
    unsafe fn scales<S: Simd>(p: *const u8, n: usize, s: &mut [f32; GROUPS], m: &mut [f32; GROUPS]);

    /// Unpacks the codes of the `n` blocks at `p`.
    ///
    /// # Safety
    /// As for [`Quant::scales`].
    unsafe fn codes<S: Simd>(p: *const u8, n: usize, sink: &mut impl Sink<S>);

    /// The scales and mins of the block at `p` as whole numbers, if [`Quant::LEVELS`].
    ///
    /// # Safety
    /// There must be a block.
    unsafe fn levels(_: *const u8) -> Levels {
        unreachable!("only asked for where there are levels")
    }

    /// As [`Quant::levels`], of a block of each of two rows.
    ///
    /// # Safety
    /// As for [`Quant::levels`], in each row; the machine must have AVX2.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn twin_levels(p: [*const u8; 2]) -> TwinLevels
    where
        Self: Sized,
    {
        TwinLevels::of::<Self>(p)
    }

    /// As [`Quant::codes`], of a block of each of two rows, if [`Quant::LEVELS`].
    ///
    /// # Safety
    /// As for [`Quant::scales`], in each row.
    #[cfg(target_arch = "x86_64")]
    unsafe fn twins<C: Codes<From = [*const u8; 2]>>(_: [*const u8; 2], _: &mut impl Sink<C>) {
        unreachable!("only asked for where there are levels")
    }

    /// Which 32 values of a block the halves of each of the vectors of [`Quant::wide`] hold.
    #[cfg(target_arch = "x86_64")]
    const WIDE: [[usize; 2]; 4] = [[0, 1], [2, 3], [4, 5], [6, 7]];

    /// The codes of the block at `p`, 64 to a vector in the order of [`Quant::WIDE`], if there are [`Quant::LEVELS`] and codes
    /// are unsigned.
    ///
    /// # Safety
    /// There must be a block, and the machine have AVX-512, and GFNI if `G`.
    #[cfg(target_arch = "x86_64")]
    unsafe fn wide<const G: bool>(_: *const u8) -> [std::arch::x86_64::__m512i; 4] {
        unreachable!("only asked for where there are levels, with unsigned codes")
    }

    /// As [`Quant::codes`], of all rows of `from`, if [`Quant::TURNS`].
    ///
    /// # Safety
    /// As for [`Quant::scales`], in each row.
    unsafe fn turned<S: Simd>(_: Upright, _: usize, _: &mut impl Sink<Turned<S>>) {
        unreachable!("only asked for where rows turn")
    }
}

/// Scales and mins of a block of 256 values that are whole numbers times a half: a value is
/// `d * scale * (code - OFFSET) - dmin * min`.
#[derive(Clone, Copy)]
pub(crate) struct Levels {
    /// Signed bytes, by group.
    pub scales: [u64; 2],
    /// Bytes up to 127, by group.
    pub mins: [u64; 2],
    /// Halves.
    pub d: u16,
    pub dmin: u16,
}

impl Levels {
    /// As [`Quant::scales`] wants them.
    #[inline(always)]
    unsafe fn spread<S: Simd, Q: Quant>(&self, s: &mut [f32; GROUPS], m: &mut [f32; GROUPS]) {
        let splat = |half: u16| S::widen_f16([u64::from(half) * 0x1_0001_0001_0001; 2]);
        for half in 0..const { CHUNK / Q::GROUP / 8 } {
            S::store8(s.as_mut_ptr().add(8 * half), S::mul8(splat(self.d), S::widen_i8(self.scales[half])));
            if Q::MINS {
                S::store8(m.as_mut_ptr().add(8 * half), S::mul8(splat(self.dmin), S::widen_u8(self.mins[half])));
            }
        }
    }
}

/// Blocks in a chunk of `cols` values.
#[inline(always)]
pub(crate) const fn blocks_of<Q: Quant>(cols: usize) -> usize {
    cols / const { Q::DTYPE.block_len() }
}

/// Bytes of a whole chunk.
#[inline(always)]
pub(crate) const fn chunk_bytes<Q: Quant>() -> usize {
    const { CHUNK / Q::DTYPE.block_len() * Q::DTYPE.block_bytes() }
}

/// Evaluates an expression with `$Q` standing for the [`Quant`] of a [`DType`], or else another.
macro_rules! with_quant {
    ($dtype:expr, $Q:ident => $body:expr, else $other:expr) => {
        $crate::quant::with_quant!(@ $dtype, $Q, $body, $other,
            Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4
            IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ1_M)
    };
    (@ $dtype:expr, $Q:ident, $body:expr, $other:expr, $($name:ident)*) => {
        match $dtype {
            $($crate::DType::$name => {
                type $Q = $crate::quant::$name;
                $body
            })*
            _ => $other,
        }
    };
}
pub(crate) use with_quant;

/// How activations are to be rounded for weights of a type with blocks, from packed tiles or as they lie.
pub(crate) fn rounding(dtype: DType, packed: bool) -> Rounding {
    const GROUPS: Rounding = Rounding { chunk: false, crossed: false, rest: true };
    with_quant!(dtype, Q => if Q::LEVELS {
        let crossed = !packed && dots::sums_whole::<Q>();
        // Tiles hold codes less their offset.
        Rounding { chunk: true, crossed, rest: <Q as Quant>::SIGNED || packed && <Q as Quant>::OFFSET != 0 }
    } else {
        GROUPS
    }, else GROUPS)
}

/// Codes as bytes, in the order of their values.
struct Store([u8; CHUNK]);

impl<S: Simd> Sink<S> for Store {
    #[inline(always)]
    unsafe fn take(&mut self, i: usize, codes: S::B) {
        S::store32(self.0.as_mut_ptr().add(32 * i), codes);
    }
}

/// Values of the `n` blocks at `p`, exactly as their type defines them: what is rounded, and when, is
/// the same as in ggml.
///
/// # Safety
/// The machine must have the set of `S`, there be so many blocks, and `out` hold their values.
#[inline(always)]
pub(crate) unsafe fn widen_chunk<S: Simd, Q: Quant>(p: *const u8, n: usize, out: *mut f32) {
    let (mut s, mut m) = ([0.0; GROUPS], [0.0; GROUPS]);
    Q::scales::<S>(p, n, &mut s, &mut m);
    let mut codes = Store([0; CHUNK]);
    Q::codes::<S>(p, n, &mut codes);
    for code in &mut codes.0 {
        *code = code.wrapping_sub(Q::OFFSET);
    }
    for g in 0..n * Q::DTYPE.block_len() / Q::GROUP {
        let (scale, min) = (S::splat(s[g]), S::splat(m[g]));
        for c in (g * Q::GROUP..(g + 1) * Q::GROUP).step_by(S::LANES) {
            let value = S::mul(scale, S::load_i8(codes.0.as_ptr().add(c)));
            S::store(out.add(c), if Q::MINS { S::sub(value, min) } else { value });
        }
    }
}
