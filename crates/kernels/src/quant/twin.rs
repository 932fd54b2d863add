//! Products of rows of blocks with a few tokens, two rows at once, where vectors have 64 bytes: what has to be done
//! for every block besides its codes (levels, mins, factors) is done for two.

#![allow(clippy::needless_range_loop, reason = "loops over registers are unrolled by their counters")]

use std::arch::x86_64::*;

use super::dots::{AHEAD, prefetch};
use super::{CHUNK, Quant, Rounded, Sink, chunk_bytes};
use crate::simd::{Avx512, Twin};
use crate::tile::Rows;

/// Which of 32 levels, 16 of each row, each half of 32 codes' products is multiplied with; groups of 32, of 16.
static LEVELS: [[[i16; 32]; 8]; 2] = {
    let mut all = [[[0; 32]; 8]; 2];
    let mut i = 0;
    while i < 256 {
        let (codes, lane) = (i / 32, i % 32);
        let row = lane / 16 * 16;
        all[0][codes][lane] = (row + codes) as i16;
        all[1][codes][lane] = (row + 2 * codes + lane % 16 / 8) as i16;
        i += 1;
    }
    all
};

/// [`rounded_dots`](super::rounded_dots) for the first `T` tokens, of types whose codes are unsigned and whose scales are levels.
///
/// # Safety
/// The machine must have AVX-512; otherwise as for [`rounded_dots`](super::rounded_dots).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn dots<Q: Quant, const T: usize>(
    w: &Rows,
    first: usize,
    count: usize,
    x: [*const Rounded; 4],
    out: *mut f32,
    width: usize,
) {
    // What is asked for ahead is the same place of a later pair of rows.
    let pair = 2 * w.stride;
    let ahead = AHEAD.map(|bytes| bytes.div_ceil(pair) * pair);
    for r in (0..count).step_by(2) {
        let other = (r + 1).min(count - 1);
        let sums = two_rows::<Q, T>([w.row(first + r), w.row(first + other)], w.cols, ahead, x);
        for t in 0..T {
            let out = out.add(t * width);
            *out.add(r) = _mm512_reduce_add_ps(_mm512_maskz_mov_ps(0x00ff, sums[t]));
            *out.add(other) = _mm512_reduce_add_ps(_mm512_maskz_mov_ps(0xff00, sums[t]));
        }
    }
}

/// The products of two rows with `T` tokens, in eight parts each.
#[inline(always)]
unsafe fn two_rows<Q: Quant, const T: usize>(
    rows: [*const u8; 2],
    cols: usize,
    ahead: [usize; 2],
    x: [*const Rounded; 4],
) -> [__m512; T] {
    let mut sums = [_mm512_setzero_ps(); T];
    for c in 0..cols / CHUNK {
        let p = rows.map(|row| row.add(c * chunk_bytes::<Q>()));
        prefetch::<Avx512, Q>(p[0], ahead);
        prefetch::<Avx512, Q>(p[1], ahead);
        let (a, b) = (Q::levels(p[0]), Q::levels(p[1]));
        let levels = _mm512_cvtepi8_epi16(both(a.scales, b.scales));
        let mut dot = Dot::<Q, T> {
            x: std::array::from_fn(|t| Rounded::codes(x[t].add(c))),
            levels,
            sums: [[_mm512_setzero_si512(); 2]; T],
            of: std::marker::PhantomData,
        };
        Q::twins(p, &mut dot);
        // Factors of scales, and then of mins.
        let pair = |a: u16, b: u16| u64::from(a) | u64::from(b) << 16;
        let halves = pair(a.d, b.d) | pair(a.dmin, b.dmin) << 32;
        let factors = _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi64_si128(halves as i64)));
        let which = |i: i32| _mm512_mask_mov_epi32(_mm512_set1_epi32(i), 0xff00, _mm512_set1_epi32(i + 1));
        let d = _mm512_permutexvar_ps(which(0), factors);
        for t in 0..T {
            let x = x[t].add(c);
            let worth = _mm512_set1_ps(Rounded::scale(x));
            let of_groups = || {
                if Q::GROUP == 32 {
                    _mm512_broadcast_i32x4(_mm_loadu_si128(Rounded::sums(x, 32).cast()))
                } else {
                    _mm512_broadcast_i64x4(_mm256_loadu_si256(Rounded::sums(x, 16).cast()))
                }
            };
            let mut all = _mm512_add_epi32(dot.sums[t][0], dot.sums[t][1]);
            if Q::OFFSET > 0 {
                let less = _mm512_madd_epi16(levels, of_groups());
                all = _mm512_sub_epi32(all, _mm512_mullo_epi32(less, _mm512_set1_epi32(i32::from(Q::OFFSET))));
            }
            let mut sum = _mm512_mul_ps(_mm512_cvtepi32_ps(all), d);
            if Q::MINS {
                let mins = _mm512_cvtepu8_epi16(both(a.mins, b.mins));
                let less = _mm512_cvtepi32_ps(_mm512_madd_epi16(mins, of_groups()));
                sum = _mm512_fnmadd_ps(less, _mm512_permutexvar_ps(which(2), factors), sum);
            }
            sums[t] = _mm512_fmadd_ps(sum, worth, sums[t]);
        }
    }
    sums
}

/// Bytes of two rows, 16 of each.
#[inline(always)]
unsafe fn both(a: [u64; 2], b: [u64; 2]) -> __m256i {
    let row = |[low, high]: [u64; 2]| _mm_set_epi64x(high as i64, low as i64);
    _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(row(a)), row(b))
}

/// Multiplies codes of two rows with `T` tokens, and sums with the levels of their groups.
struct Dot<Q, const T: usize> {
    x: [*const u8; T],
    levels: __m512i,
    /// Of even and odd codes: two chains that do not wait for each other.
    sums: [[__m512i; 2]; T],
    of: std::marker::PhantomData<Q>,
}

impl<Q: Quant, const T: usize> Sink<Twin> for Dot<Q, T> {
    #[inline(always)]
    unsafe fn take(&mut self, i: usize, codes: __m512i) {
        let which = _mm512_loadu_si512((&raw const LEVELS[(Q::GROUP == 16) as usize][i]).cast());
        let level = _mm512_permutexvar_epi16(which, self.levels);
        for t in 0..T {
            let x = _mm512_broadcast_i64x4(_mm256_loadu_si256(self.x[t].add(32 * i).cast()));
            // Two products fit 16 bits: codes are at most 127.
            let sum = &mut self.sums[t][i % 2];
            *sum = _mm512_dpwssd_epi32(*sum, _mm512_maddubs_epi16(codes, x), level);
        }
    }
}
