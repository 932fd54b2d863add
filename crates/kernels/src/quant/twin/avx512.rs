//! Two rows with AVX-512: 64 codes of one row in a vector.
//!
//! A sum of products keeps apart what is of the two rows by its lanes: of every four the first two are of the first row. So
//! products of both rows with the same 64 activations are packed into one vector of words, which meets one vector of levels.
//! Broadcasts and insertions of 256 bits are avoided: where vectors are carried out in halves (Zen 4) each costs a shuffle.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::{TwinLevels, TwoRows, of_groups};
use crate::quant::dots::sums_whole;
use crate::quant::{Quant, Rounded};
use crate::simd::{Avx2, Avx512, MAX_LANES, Simd};

/// Both rows, 64 codes at a time. `G`: with GFNI, whose one instruction shifts the bits of bytes and drops some.
pub(super) struct Twin<const G: bool>;

/// Parts of a product of each row.
#[derive(Clone, Copy)]
pub(super) struct Parts {
    /// What codes and levels come to; of every four lanes the first two are of the first row.
    sum: __m256,
    /// What mins take from it; the lower half is of the first row.
    less: __m256,
    /// Added when the next chunk has begun: so no instruction waits for long in the processor's queues, where there is room for few.
    last: Chunk,
}

/// What a chunk comes to, but for its factors.
#[derive(Clone, Copy)]
struct Chunk {
    /// Of every four lanes the first two are of the first row.
    whole: __m512i,
    /// The lower half is of the first row.
    mins: __m256i,
    /// Of codes and of mins of the first row, then of the second.
    factors: __m128,
}

impl<const G: bool> TwoRows for Twin<G> {
    type Parts = Parts;

    const HALF: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> Parts {
        let last = Chunk { whole: _mm512_setzero_si512(), mins: _mm256_setzero_si256(), factors: _mm_setzero_ps() };
        Parts { sum: _mm256_setzero_ps(), less: _mm256_setzero_ps(), last }
    }
    #[inline(always)]
    unsafe fn add<Q: Quant, const T: usize>(p: [*const u8; 2], x: [*const Rounded; T], parts: &mut [Parts; T]) {
        const { assert!(!sums_whole::<Q>() || 4 * Q::MOST as i32 * 127 <= i16::MAX as i32, "four products fit 16 bits") };
        for t in 0..T {
            parts[t] = with_last::<Q>(parts[t]);
        }
        let levels = Q::twin_levels(p);
        let of_vectors = OfVectors::<Q>::new(&levels);
        let codes = [Q::wide::<G>(p[0]), Q::wide::<G>(p[1])];
        let mut whole = [_mm512_setzero_si512(); T];
        for i in 0..4 {
            let level = of_vectors.level(i);
            for t in 0..T {
                let x = groups(x[t], Q::WIDE[i]);
                let fours = |codes: __m512i| _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x);
                let products = _mm512_packs_epi32(fours(codes[0][i]), fours(codes[1][i]));
                whole[t] = dot_words(whole[t], products, level);
            }
        }
        for t in 0..T {
            parts[t].last = chunk(&levels, &of_vectors, whole[t], x[t]);
        }
    }
    #[inline(always)]
    unsafe fn sum<Q: Quant>(parts: Parts) -> __m256 {
        let Parts { sum, less, .. } = with_last::<Q>(parts);
        _mm256_sub_ps(sum, _mm256_permutevar8x32_ps(less, _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7)))
    }
    #[inline(always)]
    unsafe fn store(v: &mut [__m256; MAX_LANES], rows: [usize; 2], out: [*mut f32; 2]) {
        join::<1>(v, 8);
        join::<4>(v, 4);
        let first = _mm256_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13);
        let second = _mm256_add_epi32(first, _mm256_set1_epi32(2));
        for (i, which) in [first, second].into_iter().enumerate() {
            let mask = (1_u32 << rows[i]) - 1;
            for half in 0..2 {
                let eight = _mm256_permutex2var_ps(v[2 * half], which, v[2 * half + 1]);
                _mm256_mask_storeu_ps(out[i].wrapping_add(8 * half), (mask >> (8 * half)) as u8, eight);
            }
        }
    }
    #[inline(always)]
    unsafe fn ask(line: *const u8, [near, middle, far]: [usize; 3]) {
        Avx512::prefetch(line.wrapping_add(near));
        Avx512::prefetch_far(line.wrapping_add(middle));
        Avx512::prefetch_far(line.wrapping_add(far));
    }
}

/// Adds lanes that are `L` apart, of two vectors in one: lanes without bit `L` become those of the first.
#[inline(always)]
unsafe fn join<const L: usize>(v: &mut [__m256; MAX_LANES], pairs: usize) {
    for i in 0..pairs {
        let (a, b) = Avx2::swap::<L>(v[2 * i], v[2 * i + 1]);
        v[i] = _mm256_add_ps(a, b);
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

/// What the levels of the vectors of [`Quant::WIDE`] are taken from.
struct OfVectors<Q> {
    /// With groups of 32, whose levels are unsigned, the eight bytes of the first row and then of the second, in every quarter. Else
    /// words: in every quarter those that it has in the four vectors, of the first row and then of the second.
    levels: __m512i,
    of: PhantomData<Q>,
}

impl<Q: Quant> OfVectors<Q> {
    #[inline(always)]
    unsafe fn new(levels: &TwinLevels) -> Self {
        let levels = if Q::GROUP == 32 {
            let rows = _mm512_castsi256_si512(levels.scales);
            _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 0, 2, 0, 2, 0, 2), rows)
        } else {
            let order = const { order::<Q>() };
            let order = _mm256_broadcastsi128_si256(_mm_loadu_si128(order.as_ptr().cast()));
            // Fours of the first row and of the second by turns.
            let turns = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let fours = _mm256_shuffle_epi8(levels.scales, order);
            _mm512_cvtepi8_epi16(_mm256_permutevar8x32_epi32(fours, turns))
        };
        Self { levels, of: PhantomData }
    }

    /// Words for vector `i`: of every quarter the first half is of the first row.
    #[inline(always)]
    unsafe fn level(&self, i: usize) -> __m512i {
        let which = const { which::<Q>() };
        shuffled(self.levels, _mm512_loadu_si512(which[i].as_ptr().cast()))
    }
}

/// The bytes of the quarters of [`OfVectors`] that become the words of each vector.
const fn which<Q: Quant>() -> [[u8; 64]; 4] {
    let order = order::<Q>();
    let mut all = [[0; 64]; 4];
    let mut at = 0;
    while at < 4 * 32 {
        let (vector, word) = (at / 32, at % 32);
        let (quarter, second) = (word / 8, word % 8 / 4);
        all[vector][2 * word] = if Q::GROUP == 32 {
            order[4 * quarter + vector] + 8 * second as u8
        } else {
            2 * (vector + 4 * second) as u8
        };
        // From where bit 7 is set a zero comes.
        all[vector][2 * word + 1] = if Q::GROUP == 32 { 0x80 } else { all[vector][2 * word] + 1 };
        at += 1;
    }
    all
}

/// What the sums of a chunk's codes with their levels come to, less the offset.
#[inline(always)]
unsafe fn chunk<Q: Quant>(
    levels: &TwinLevels,
    of_vectors: &OfVectors<Q>,
    mut whole: __m512i,
    x: *const Rounded,
) -> Chunk {
    if Q::OFFSET > 0 {
        const { assert!(Q::OFFSET == 0 || Q::GROUP == 16 || !sums_whole::<Q>(), "sums of 16 activations") };
        let which = const { sums_by_words(order::<Q>()) };
        let of_groups = _mm512_castsi256_si512(_mm256_loadu_si256(Rounded::sums(x, 16).cast()));
        let of_groups = _mm512_permutexvar_epi16(_mm512_loadu_si512(which.as_ptr().cast()), of_groups);
        let less = _mm512_madd_epi16(of_vectors.levels, of_groups);
        whole = _mm512_sub_epi32(whole, _mm512_mullo_epi32(less, _mm512_set1_epi32(i32::from(Q::OFFSET))));
    }
    let zero = _mm256_setzero_si256();
    let mins = if Q::MINS { of_groups::<Q>(levels.mins, zero, x) } else { zero };
    Chunk { whole, mins, factors: _mm_mul_ps(_mm_cvtph_ps(levels.factors), _mm_set1_ps(Rounded::scale(x))) }
}

/// Adds the last chunk, times its factors.
#[inline(always)]
unsafe fn with_last<Q: Quant>(Parts { mut sum, mut less, last }: Parts) -> Parts {
    let Chunk { whole, mins, factors } = last;
    let factors = _mm256_castps128_ps256(factors);
    let whole = _mm256_add_epi32(_mm512_castsi512_si256(whole), _mm512_extracti64x4_epi64::<1>(whole));
    let d = _mm256_permutevar8x32_ps(factors, _mm256_setr_epi32(0, 0, 2, 2, 0, 0, 2, 2));
    sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), d, sum);
    if Q::MINS {
        let dmin = _mm256_permutevar8x32_ps(factors, _mm256_setr_epi32(1, 1, 1, 1, 3, 3, 3, 3));
        less = _mm256_fmadd_ps(_mm256_cvtepi32_ps(mins), dmin, less);
    }
    Parts { sum, less, last }
}

/// The groups whose levels are the words of [`OfVectors`].
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
