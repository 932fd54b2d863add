//! Activations rounded to signed bytes, so that their products with codes are whole numbers.
//!
//! Each 32 values of a row share a scale, their largest magnitude over 127; values round to the
//! nearest, ties to even. So an activation is off by at most 1/254 of the largest of its 32.

use super::CHUNK;
use crate::simd::{Simd, kernel};

/// Below this magnitude 32 values count as zeros: the inverse of their scale would overflow.
const LEAST: f32 = 1e-35;

/// A chunk of a row.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Rounded {
    codes: [i8; CHUNK],
    /// What a code is worth: for every 32 values, and for every 16 (the same twice).
    scale32: [f32; 8],
    scale16: [f32; 16],
    /// Minus the sum of the rounded values: of every 32, and of every 16.
    less32: [f32; 8],
    less16: [f32; 16],
    /// The sum of the codes.
    sums32: [i32; 8],
    sums16: [i32; 16],
}

impl Rounded {
    pub(crate) const ZERO: Self = Self {
        codes: [0; CHUNK],
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

    /// What the codes of each `group` values are worth, and minus their sums.
    #[inline(always)]
    pub(super) const unsafe fn scales(p: *const Self, group: usize) -> (*const f32, *const f32) {
        if group == 32 {
            ((&raw const (*p).scale32).cast(), (&raw const (*p).less32).cast())
        } else {
            ((&raw const (*p).scale16).cast(), (&raw const (*p).less16).cast())
        }
    }

    /// The sums of the codes of each `group` values.
    #[inline(always)]
    pub(super) const unsafe fn sums(p: *const Self, group: usize) -> *const i32 {
        if group == 32 { (&raw const (*p).sums32).cast() } else { (&raw const (*p).sums16).cast() }
    }
}

kernel! {
    /// Rounds a row of `cols` values, with zeros behind them to the end of the last chunk. A value
    /// that is infinite or none makes the scale of its 32 none, and so every product with them.
    ///
    /// # Safety
    /// `x` must hold `cols` values and `out` their chunks.
    pub(crate) unsafe fn round_row<S>(x: *const f32, cols: usize, out: *mut Rounded) {
        for (i, start) in (0..cols).step_by(CHUNK).enumerate() {
            let out = &mut *out.add(i);
            if cols - start >= CHUNK {
                round_chunk::<S>(x.add(start), out);
            } else {
                let mut part = [0.0; CHUNK];
                std::ptr::copy_nonoverlapping(x.add(start), part.as_mut_ptr(), cols - start);
                round_chunk::<S>(part.as_ptr(), out);
            }
        }
    }
}

#[inline(always)]
unsafe fn round_chunk<S: Simd>(x: *const f32, out: &mut Rounded) {
    for g in 0..8 {
        let x = x.add(32 * g);
        // Zero as long as all values are finite.
        let (mut most, mut probe) = (S::zero(), S::zero());
        for i in (0..32).step_by(S::LANES) {
            let v = S::load(x.add(i));
            most = S::max(most, S::max(v, S::sub(S::zero(), v)));
            probe = S::fma(v, S::zero(), probe);
        }
        let (most, probe) = (S::greatest(most), S::sum(probe));
        let (scale, inverse) = if most < LEAST { (0.0, 0.0) } else { (most / 127.0, 127.0 / most) };
        for i in (0..32).step_by(S::LANES) {
            let v = S::mul(S::load(x.add(i)), S::splat(inverse));
            S::store_i8(out.codes.as_mut_ptr().add(32 * g + i).cast(), v);
        }
        let scale = scale + probe;
        let sum = |from: usize| out.codes[from..from + 16].iter().map(|c| i32::from(*c)).sum::<i32>();
        let sums = [sum(32 * g), sum(32 * g + 16)];
        out.scale32[g] = scale;
        out.sums32[g] = sums[0] + sums[1];
        out.less32[g] = -scale * (sums[0] + sums[1]) as f32;
        for (half, sum) in sums.into_iter().enumerate() {
            out.scale16[2 * g + half] = scale;
            out.sums16[2 * g + half] = sum;
            out.less16[2 * g + half] = -scale * sum as f32;
        }
    }
}
