//! Activations rounded to signed bytes, so that their products with codes are whole numbers.
//!
//! Each 32 values of a row share a scale, or each 256 (see [`Rounding::chunk`]): their largest magnitude over 127; values round to
//! the nearest, ties to even. So an activation is off by at most 1/254 of the largest of those.

use super::CHUNK;
use crate::simd::{Isa, MAX_LANES, Simd, fold_lanes, kernel};

/// Below this magnitude 32 values count as zeros: the inverse of their scale would overflow.
const LEAST: f32 = 1e-35;

/// How a row is rounded, and what products of it read besides codes and their sums. What is not read is not written: it would
/// take up caches, and much of it have to come from another processor's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rounding {
    /// Whether all values of a [`CHUNK`] share a scale, not every 32: for weights whose scales are whole numbers within a
    /// chunk, so that only the chunk has a factor.
    pub chunk: bool,
    /// Whether the codes are read crossed.
    pub crossed: bool,
    /// Whether all else is read.
    pub rest: bool,
}

impl Rounding {
    /// What serves both.
    pub(crate) fn and(self, other: Rounding) -> Rounding {
        Rounding {
            chunk: self.chunk || other.chunk,
            crossed: self.crossed || other.crossed,
            rest: self.rest || other.rest,
        }
    }
}

/// A chunk of a row.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Rounded {
    codes: [i8; CHUNK],
    /// The sums of the codes of every 32 values, and of every 16; with one scale what all codes are worth. They fit one cache line.
    sums32: [i16; 8],
    sums16: [i16; 16],
    scale: f32,
    /// With AVX-512 the codes of every 32 values, in the order 0, 2, 1, 3, 4, 6, 5, 7.
    crossed: Aligned<i8>,
    /// The codes with 128 added.
    biased: Aligned<u8>,
    /// What a code is worth: for every 32 values, and for every 16 (the same twice).
    scale32: [f32; 8],
    scale16: [f32; 16],
    /// Minus the sum of the rounded values: of every 32, and of every 16.
    less32: [f32; 8],
    less16: [f32; 16],
    /// So that the same chunk of neighbouring tokens lies in different sets of a cache.
    _apart: [u8; 64],
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Aligned<T>([T; CHUNK]);

impl Rounded {
    pub(crate) const ZERO: Self = Self {
        codes: [0; CHUNK],
        sums32: [0; 8],
        sums16: [0; 16],
        scale: 0.0,
        crossed: Aligned([0; CHUNK]),
        biased: Aligned([128; CHUNK]),
        scale32: [0.0; 8],
        scale16: [0.0; 16],
        less32: [0.0; 8],
        less16: [0.0; 16],
        _apart: [0; 64],
    };

    /// The codes of the chunk at `p`.
    #[inline(always)]
    pub(super) const unsafe fn codes(p: *const Self) -> *const u8 {
        p.cast()
    }

    /// Two times 32 codes, one behind the other: those of groups `i` and `i + 2`, for `i` of 0, 1, 4, 5.
    #[inline(always)]
    #[cfg(target_arch = "x86_64")]
    pub(super) const unsafe fn crossed(p: *const Self, i: usize) -> *const u8 {
        (&raw const (*p).crossed).cast::<u8>().add(32 * (i + i % 4))
    }

    /// The same with 128 added.
    #[inline(always)]
    pub(super) const unsafe fn biased(p: *const Self) -> *const u8 {
        (&raw const (*p).biased).cast()
    }

    /// What all codes are worth, if they share a scale.
    #[inline(always)]
    pub(super) const unsafe fn scale(p: *const Self) -> f32 {
        (*p).scale
    }

    /// Cache lines that products of chunks with one scale read: the codes, and what lies behind them.
    pub(crate) const LINES: usize = CHUNK / 64 + 1;

    /// Asks for the `i`-th of [`Rounded::LINES`].
    #[inline(always)]
    pub(super) unsafe fn prefetch<S: Simd>(p: *const Self, biased: bool, i: usize) {
        let codes = if biased { Self::biased(p) } else { Self::codes(p) };
        S::prefetch(if i < CHUNK / 64 { codes.wrapping_add(64 * i) } else { p.wrapping_byte_add(CHUNK).cast() });
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
    pub(super) const unsafe fn sums(p: *const Self, group: usize) -> *const i16 {
        if group == 32 { (&raw const (*p).sums32).cast() } else { (&raw const (*p).sums16).cast() }
    }

    /// The same, two in halves of each number.
    #[inline(always)]
    pub(super) const unsafe fn sum_pairs(p: *const Self, group: usize) -> *const i32 {
        Self::sums(p, group).cast()
    }
}

kernel! {
    /// Rounds a row of `cols` values, with zeros behind them to the end of the last chunk. A value
    /// that is infinite or none makes the scale of those that share it none, and so every product with them.
    ///
    /// # Safety
    /// `x` must hold `cols` values and `out` their chunks.
    pub(crate) unsafe fn round_row<S>(x: *const f32, cols: usize, how: Rounding, out: *mut Rounded) {
        for (i, start) in (0..cols).step_by(CHUNK).enumerate() {
            let out = &mut *out.add(i);
            if cols - start >= CHUNK {
                round_chunk::<S>(x.add(start), how, out);
            } else {
                let mut part = [0.0; CHUNK];
                std::ptr::copy_nonoverlapping(x.add(start), part.as_mut_ptr(), cols - start);
                round_chunk::<S>(part.as_ptr(), how, out);
            }
        }
        // All codes are stored before any is read: a processor waits for a value that was stored in parts.
        for i in 0..cols.div_ceil(CHUNK) {
            sum_chunk::<S>(how, &mut *out.add(i));
        }
    }
}

/// The codes of a chunk, and what they are worth.
#[inline(always)]
unsafe fn round_chunk<S: Simd>(x: *const f32, how: Rounding, out: &mut Rounded) {
    let mut inverse = [0.0; 8];
    if how.chunk {
        let mut most = [magnitude::<S>(x, CHUNK); MAX_LANES];
        greatest::<S>(&mut most, 1);
        let (scale, inverse_of) = scales::<S>(most[0]);
        out.scale = S::first(scale);
        inverse = [S::first(inverse_of); 8];
        if how.rest {
            out.scale32 = [out.scale; 8];
        }
    } else {
        // As many groups at once as a vector has lanes for their greatest.
        let step = S::LANES.min(8);
        for first in (0..8).step_by(step) {
            let mut most = [S::zero(); MAX_LANES];
            for g in 0..step {
                most[g] = magnitude::<S>(x.add(32 * (first + g)), 32);
            }
            greatest::<S>(&mut most, step);
            let (scale, inverse_of) = scales::<S>(most[0]);
            S::store_part_or_all(out.scale32.as_mut_ptr().add(first), scale, step);
            S::store_part_or_all(inverse.as_mut_ptr().add(first), inverse_of, step);
        }
    }
    for g in 0..8 {
        let inverse = S::splat(inverse[g]);
        for i in (32 * g..32 * (g + 1)).step_by(S::LANES) {
            S::store_i8(out.codes.as_mut_ptr().add(i).cast(), S::mul(S::load(x.add(i)), inverse));
        }
    }
}

/// What is made of a chunk's codes.
#[inline(always)]
unsafe fn sum_chunk<S: Simd>(how: Rounding, out: &mut Rounded) {
    let sums = sums_of_sixteen::<S>(out.codes.as_ptr().cast());
    for g in 0..16 {
        out.sums16[g] = sums[g] as i16;
    }
    for g in 0..8 {
        out.sums32[g] = (sums[2 * g] + sums[2 * g + 1]) as i16;
    }
    if how.crossed && matches!(S::ISA, Isa::Avx512) {
        for (i, group) in [0, 2, 1, 3, 4, 6, 5, 7].into_iter().enumerate() {
            out.crossed.0[32 * i..][..32].copy_from_slice(&out.codes[32 * group..][..32]);
        }
    }
    if !how.rest {
        return;
    }
    for (biased, code) in out.biased.0.iter_mut().zip(&out.codes) {
        *biased = *code as u8 ^ 128;
    }
    for g in 0..16 {
        out.scale16[g] = out.scale32[g / 2];
        out.less16[g] = -out.scale32[g / 2] * sums[g] as f32;
    }
    for g in 0..8 {
        out.less32[g] = -out.scale32[g] * f32::from(out.sums32[g]);
    }
}

/// The sum of every sixteen codes.
#[inline(always)]
unsafe fn sums_of_sixteen<S: Simd>(codes: *const u8) -> [i32; 16] {
    let mut sums = [0; 16];
    let quads = const { S::LANES / 4 };
    for first in (0..16).step_by(4 * quads) {
        let mut v = [S::zero(); 4];
        for j in 0..4 {
            // Sums of four, with ones for weights.
            let four = S::load_i32(codes.add(16 * (first + j * quads)));
            v[j] = S::as_f32(S::dot4::<true>(S::splat_i32(0), four, S::splat_i32(0x0101_0101)));
        }
        let ab = add_swapped::<S, 1>(v[0], v[1]);
        let cd = add_swapped::<S, 1>(v[2], v[3]);
        let mut turned = [0_i32; MAX_LANES];
        S::store_i32(turned.as_mut_ptr().cast(), S::as_i32(add_swapped::<S, 2>(ab, cd)));
        // Quad `q` has a sum of each of the four vectors.
        for j in 0..4 {
            for q in 0..quads {
                sums[first + j * quads + q] = turned[4 * q + j];
            }
        }
    }
    sums
}

/// One step of adding up the lanes of two vectors of whole numbers.
#[inline(always)]
unsafe fn add_swapped<S: Simd, const L: usize>(a: S::V, b: S::V) -> S::V {
    let (a, b) = S::swap::<L>(a, b);
    S::as_f32(S::add_i32(S::as_i32(a), S::as_i32(b)))
}

/// The greatest magnitude of `n` values lane by lane; infinite if one is no number.
#[inline(always)]
unsafe fn magnitude<S: Simd>(x: *const f32, n: usize) -> S::V {
    // Without their signs floats are ordered as whole numbers are, infinity and then what is no number last.
    let mask = S::splat_i32(i32::MAX);
    let mut most = S::splat_i32(0);
    for i in (0..n).step_by(S::LANES) {
        most = S::max_i32(most, S::and_i32(S::as_i32(S::load(x.add(i))), mask));
    }
    S::as_f32(S::min_i32(most, S::splat_i32(f32::INFINITY.to_bits() as i32)))
}

/// The greatest lane of each of the first `n` vectors, a power of two up to `LANES`, in the first lanes of `v[0]`.
#[inline(always)]
unsafe fn greatest<S: Simd>(v: &mut [S::V; MAX_LANES], n: usize) {
    fold_lanes::<S>(v, n, |a, b| S::max(a, b));
}

/// What a code is worth where these are the greatest magnitudes (not a number if those are infinite), and its inverse.
#[inline(always)]
unsafe fn scales<S: Simd>(most: S::V) -> (S::V, S::V) {
    let (whole, least) = (S::splat(127.0), S::splat(LEAST));
    let scale = S::fma(most, S::zero(), S::div(most, whole));
    (S::zero_if_less(most, least, scale), S::zero_if_less(most, least, S::div(whole, most)))
}
