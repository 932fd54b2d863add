//! Activations rounded to signed bytes, so that their products with codes are whole numbers.
//!
//! Each 32 values of a row share a scale, or each 256 (see [`Extent`]): their largest magnitude over 127; values round to
//! the nearest, ties to even. So an activation is off by at most 1/254 of the largest of those.

use super::CHUNK;
use crate::simd::{Simd, kernel};

/// Below this magnitude 32 values count as zeros: the inverse of their scale would overflow.
const LEAST: f32 = 1e-35;

/// Which values share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Extent {
    /// Every 32.
    Group,
    /// Every [`CHUNK`]: for weights whose scales are whole numbers within a chunk, so that all sums of it are.
    Chunk,
}

/// A chunk of a row.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Rounded {
    codes: [i8; CHUNK],
    /// The codes with 128 added.
    biased: [u8; CHUNK],
    /// What a code is worth: for every 32 values, and for every 16 (the same twice).
    scale32: [f32; 8],
    scale16: [f32; 16],
    /// Minus the sum of the rounded values: of every 32, and of every 16.
    less32: [f32; 8],
    less16: [f32; 16],
    /// The sum of the codes.
    sums32: [i16; 8],
    sums16: [i16; 16],
}

impl Rounded {
    pub(crate) const ZERO: Self = Self {
        codes: [0; CHUNK],
        biased: [128; CHUNK],
        scale32: [0.0; 8],
        scale16: [0.0; 16],
        less32: [0.0; 8],
        less16: [0.0; 16],
        sums32: [0; 8],
        sums16: [0; 16],
    };

    /// The codes of the chunk at `p`.
    #[inline(always)]
    pub(super) const unsafe fn codes(p: *const Self) -> *const u8 {
        p.cast()
    }

    /// The same with 128 added.
    #[inline(always)]
    pub(super) const unsafe fn biased(p: *const Self) -> *const u8 {
        (&raw const (*p).biased).cast()
    }

    /// What all codes are worth, if they were rounded to [`Extent::Chunk`].
    #[inline(always)]
    pub(super) const unsafe fn scale(p: *const Self) -> f32 {
        (*p).scale32[0]
    }

    /// What the codes of each `group` values are worth, and minus their sums.
    #[inline(always)]
    pub(super) const unsafe fn scales(p: *const Self, group: usize) -> (*const f32, *const f32) {
        if group == 32 {
            ((&raw const (*p).scale32).cast(), (&raw const (*p).less32).cast())
        } else {
            ((&raw const (*p).scale16).cast(), (&raw const (*p).less16).cast())
        }
    }

    /// The sums of the codes of each `group` values, two in halves of each number.
    #[inline(always)]
    pub(super) const unsafe fn sum_pairs(p: *const Self, group: usize) -> *const i32 {
        if group == 32 { (&raw const (*p).sums32).cast() } else { (&raw const (*p).sums16).cast() }
    }
}

kernel! {
    /// Rounds a row of `cols` values, with zeros behind them to the end of the last chunk. A value
    /// that is infinite or none makes the scale of those that share it none, and so every product with them.
    ///
    /// # Safety
    /// `x` must hold `cols` values and `out` their chunks.
    pub(crate) unsafe fn round_row<S>(x: *const f32, cols: usize, extent: Extent, out: *mut Rounded) {
        for (i, start) in (0..cols).step_by(CHUNK).enumerate() {
            let out = &mut *out.add(i);
            if cols - start >= CHUNK {
                round_chunk::<S>(x.add(start), extent, out);
            } else {
                let mut part = [0.0; CHUNK];
                std::ptr::copy_nonoverlapping(x.add(start), part.as_mut_ptr(), cols - start);
                round_chunk::<S>(part.as_ptr(), extent, out);
            }
        }
    }
}

#[inline(always)]
unsafe fn round_chunk<S: Simd>(x: *const f32, extent: Extent, out: &mut Rounded) {
    match extent {
        Extent::Group => {
            for g in 0..8 {
                let (scale, inverse) = scale_of::<S>(x.add(32 * g), 32);
                round_group::<S>(x, g, scale, inverse, out);
            }
        }
        Extent::Chunk => {
            let (scale, inverse) = scale_of::<S>(x, CHUNK);
            for g in 0..8 {
                round_group::<S>(x, g, scale, inverse, out);
            }
        }
    }
}

/// What a code of `n` values is worth, and its inverse.
#[inline(always)]
unsafe fn scale_of<S: Simd>(x: *const f32, n: usize) -> (f32, f32) {
    // `probe` is zero as long as all values are finite.
    let (mut most, mut probe) = (S::zero(), S::zero());
    for i in (0..n).step_by(S::LANES) {
        let v = S::load(x.add(i));
        most = S::max(most, S::max(v, S::sub(S::zero(), v)));
        probe = S::fma(v, S::zero(), probe);
    }
    let (most, probe) = (S::greatest(most), S::sum(probe));
    let (scale, inverse) = if most < LEAST { (0.0, 0.0) } else { (most / 127.0, 127.0 / most) };
    (scale + probe, inverse)
}

/// Rounds values `32 g..32 g + 32` of the chunk at `x`.
#[inline(always)]
unsafe fn round_group<S: Simd>(x: *const f32, g: usize, scale: f32, inverse: f32, out: &mut Rounded) {
    let codes = out.codes.as_mut_ptr().add(32 * g).cast::<u8>();
    for i in (0..32).step_by(S::LANES) {
        let v = S::mul(S::load(x.add(32 * g + i)), S::splat(inverse));
        S::store_i8(codes.add(i), v);
    }
    S::store32(out.biased.as_mut_ptr().add(32 * g), S::xor(S::load32(codes), S::splat_byte(128)));
    let sum = |from: usize| out.codes[from..from + 16].iter().map(|c| i16::from(*c)).sum::<i16>();
    let sums = [sum(32 * g), sum(32 * g + 16)];
    out.scale32[g] = scale;
    out.sums32[g] = sums[0] + sums[1];
    out.less32[g] = -scale * f32::from(sums[0] + sums[1]);
    for (half, sum) in sums.into_iter().enumerate() {
        out.scale16[2 * g + half] = scale;
        out.sums16[2 * g + half] = sum;
        out.less16[2 * g + half] = -scale * f32::from(sum);
    }
}
