//! Two rows with AVX-512: 64 codes of one row in a vector.
//!
//! A sum of products keeps apart what is of the two rows by its lanes: of every four the first two are of the first row. So
//! products of both rows with the same 64 activations are packed into one vector of words, which meets one vector of levels.
//! Broadcasts and insertions of 256 bits are avoided: where vectors are carried out in halves (Zen 4) each costs a shuffle.

use std::arch::x86_64::*;

use super::{TwinLevels, TwoRows};
use crate::quant::dots::sums_whole;
use crate::quant::{Quant, Rounded};
use crate::simd::{Avx512, MAX_LANES, Simd};

/// Both rows, 64 codes at a time.
pub(super) struct Twin;

impl TwoRows for Twin {
    type Sum = __m512;

    const HALF: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        _mm512_setzero_ps()
    }
    #[inline(always)]
    unsafe fn add<Q: Quant, const T: usize>(p: [*const u8; 2], x: [*const Rounded; T], sums: &mut [__m512; T]) {
        const { assert!(!sums_whole::<Q>() || 4 * Q::MOST as i32 * 127 <= i16::MAX as i32, "four products fit 16 bits") };
        let levels = Q::twin_levels(p);
        let words = words::<Q>(&levels);
        let codes = [Q::wide(p[0]), Q::wide(p[1])];
        let mut whole = [_mm512_setzero_si512(); T];
        for i in 0..4 {
            let level = shuffled(words, _mm512_broadcast_i32x4(_mm_loadu_si128(WORDS[i].as_ptr().cast())));
            for t in 0..T {
                let x = groups(x[t], Q::WIDE[i]);
                let fours = |codes: __m512i| _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x);
                let products = _mm512_packs_epi32(fours(codes[0][i]), fours(codes[1][i]));
                whole[t] = dot_words(whole[t], products, level);
            }
        }
        for t in 0..T {
            sums[t] = close::<Q>(sums[t], &levels, words, whole[t], x[t]);
        }
    }
    #[inline(always)]
    unsafe fn store(v: &mut [__m512; MAX_LANES], rows: [usize; 2], out: [*mut f32; 2]) {
        join::<1>(v, 8);
        join::<4>(v, 4);
        join::<8>(v, 2);
        let first = _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29);
        let second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
        for (i, which) in [first, second].into_iter().enumerate() {
            let mask = ((1_u32 << rows[i]) - 1) as u16;
            _mm512_mask_storeu_ps(out[i], mask, _mm512_permutex2var_ps(v[0], which, v[1]));
        }
    }
    #[inline(always)]
    unsafe fn ask(line: *const u8, ahead: [usize; 2]) {
        Avx512::prefetch(line.wrapping_add(ahead[0]));
        Avx512::prefetch_far(line.wrapping_add(ahead[1]));
    }
}

/// Adds lanes that are `L` apart, of two vectors in one: lanes without bit `L` become those of the first.
#[inline(always)]
unsafe fn join<const L: usize>(v: &mut [__m512; MAX_LANES], pairs: usize) {
    for i in 0..pairs {
        let (a, b) = Avx512::swap::<L>(v[2 * i], v[2 * i + 1]);
        v[i] = _mm512_add_ps(a, b);
    }
}

/// The activations of these two groups of 32.
#[inline(always)]
unsafe fn groups(x: *const Rounded, [a, b]: [usize; 2]) -> __m512i {
    match b - a {
        1 => _mm512_loadu_si512(Rounded::codes(x).add(32 * a).cast()),
        2 => _mm512_loadu_si512(Rounded::crossed(x, a).cast()),
        _ => {
            let half = |group: usize| _mm256_loadu_si256(Rounded::codes(x).add(32 * group).cast());
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(half(a)), half(b))
        }
    }
}

/// For each quarter of each vector of [`Quant::WIDE`], quarters first, which scale it has.
const fn order<Q: Quant>() -> [u8; 16] {
    let mut order = [0; 16];
    let mut at = 0;
    while at < 16 {
        let (quarter, vector) = (at / 4, at % 4);
        let group = Q::WIDE[vector][quarter / 2];
        order[at] = if Q::GROUP == 32 { group } else { 2 * group + quarter % 2 } as u8;
        at += 1;
    }
    order
}

/// Fours of the first row and of the second by turns.
#[inline(always)]
unsafe fn alternating(fours: __m256i) -> __m256i {
    _mm256_permutevar8x32_epi32(fours, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}

/// Levels as words: in every quarter those that it has in the four vectors, of the first row and then of the second.
#[inline(always)]
unsafe fn words<Q: Quant>(levels: &TwinLevels) -> __m512i {
    let order = const { order::<Q>() };
    let order = _mm256_broadcastsi128_si256(_mm_loadu_si128(order.as_ptr().cast()));
    _mm512_cvtepi8_epi16(alternating(_mm256_shuffle_epi8(levels.scales, order)))
}

/// The words of a quarter that its halves become in vector `i`.
static WORDS: [[[u8; 2]; 8]; 4] = {
    let mut all = [[[0; 2]; 8]; 4];
    let mut i = 0;
    while i < 32 {
        let word = i / 8 + i % 8 / 4 * 4;
        all[i / 8][i % 8] = [2 * word as u8, 2 * word as u8 + 1];
        i += 1;
    }
    all
};

/// Adds what a chunk comes to: the sum of its codes with levels, less mins and offset, times its factors.
#[inline(always)]
unsafe fn close<Q: Quant>(
    sum: __m512,
    levels: &TwinLevels,
    words: __m512i,
    mut whole: __m512i,
    x: *const Rounded,
) -> __m512 {
    if Q::OFFSET > 0 {
        const { assert!(Q::OFFSET == 0 || Q::GROUP == 16 || !sums_whole::<Q>(), "sums of 16 activations") };
        let which = const { sums_by_words(order::<Q>()) };
        let of_groups = _mm512_castsi256_si512(_mm256_loadu_si256(Rounded::sums(x, 16).cast()));
        let of_groups = _mm512_permutexvar_epi16(_mm512_loadu_si512(which.as_ptr().cast()), of_groups);
        let less = _mm512_madd_epi16(words, of_groups);
        whole = _mm512_sub_epi32(whole, _mm512_mullo_epi32(less, _mm512_set1_epi32(i32::from(Q::OFFSET))));
    }
    let factors = _mm512_castps128_ps512(_mm_cvtph_ps(levels.factors));
    let d = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 2, 2, 0, 0, 2, 2, 0, 0, 2, 2, 0, 0, 2, 2), factors);
    let chunk = _mm512_cvtepi32_ps(whole);
    let chunk =
        if Q::MINS { _mm512_fmsub_ps(chunk, d, mins::<Q>(levels, factors, x)) } else { _mm512_mul_ps(chunk, d) };
    _mm512_fmadd_ps(chunk, _mm512_set1_ps(Rounded::scale(x)), sum)
}

/// What the mins take from a chunk.
#[inline(always)]
unsafe fn mins<Q: Quant>(levels: &TwinLevels, factors: __m512, x: *const Rounded) -> __m512 {
    let dmin = _mm512_setr_epi32(1, 1, 3, 3, 1, 1, 3, 3, 1, 1, 3, 3, 1, 1, 3, 3);
    let bytes = alternating(levels.mins);
    if Q::GROUP == 32 {
        // Eight of each row.
        let dmin = _mm256_permutevar8x32_ps(_mm512_castps512_ps256(factors), _mm512_castsi512_si256(dmin));
        let of_groups = _mm256_broadcastsi128_si256(_mm_loadu_si128(Rounded::sums(x, 32).cast()));
        let of_groups = _mm256_permute4x64_epi64::<0b01_01_00_00>(of_groups);
        let less = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(bytes)), of_groups);
        _mm512_zextps256_ps512(_mm256_mul_ps(_mm256_cvtepi32_ps(less), dmin))
    } else {
        let of_groups = _mm512_castsi256_si512(_mm256_loadu_si256(Rounded::sums(x, 16).cast()));
        let of_groups = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3), of_groups);
        let less = _mm512_madd_epi16(_mm512_cvtepu8_epi16(bytes), of_groups);
        _mm512_mul_ps(_mm512_cvtepi32_ps(less), _mm512_permutexvar_ps(dmin, factors))
    }
}

/// The groups whose levels are [`words`].
const fn sums_by_words(order: [u8; 16]) -> [u16; 32] {
    let mut which = [0; 32];
    let mut at = 0;
    while at < 32 {
        which[at] = order[at / 8 * 4 + at % 4] as u16;
        at += 1;
    }
    which
}

/// The bytes of every quarter that `which` names. The intrinsic will not do: the compiler knows `which` and takes two shuffles of
/// words instead, each of which costs as much as this one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn shuffled(bytes: __m512i, which: __m512i) -> __m512i {
    let out;
    // SAFETY: the processor has it, and nothing but registers is touched.
    std::arch::asm!("vpshufb {}, {}, {}", out(zmm_reg) out, in(zmm_reg) bytes, in(zmm_reg) which,
        options(pure, nomem, nostack, preserves_flags));
    out
}

/// Adds the products of pairs of words. The compiler makes two instructions of the intrinsic, a product and a sum.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn dot_words(mut sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: as above.
    std::arch::asm!("vpdpwssd {}, {}, {}", inout(zmm_reg) sum, in(zmm_reg) a, in(zmm_reg) b,
        options(pure, nomem, nostack, preserves_flags));
    sum
}
