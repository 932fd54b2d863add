//! Two rows with AVX2: 32 codes of each in a vector of its own.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::{TwinLevels, TwoRows, of_groups};
use crate::quant::{Quant, Rounded, Sink};
use crate::simd::{Avx2, Codes, MAX_LANES, Simd, fold_step};

/// A vector for each of two rows.
#[derive(Clone, Copy)]
pub(crate) struct Twin;

impl Codes for Twin {
    // Arrays by hand, since a closure given to a library function need not become part of the kernel.

    type B = [__m256i; 2];
    type From = [*const u8; 2];

    #[inline(always)]
    unsafe fn skip(from: [*const u8; 2], bytes: usize) -> [*const u8; 2] {
        [from[0].add(bytes), from[1].add(bytes)]
    }
    #[inline(always)]
    unsafe fn load32(from: [*const u8; 2]) -> Self::B {
        [Avx2::load32(from[0]), Avx2::load32(from[1])]
    }
    #[inline(always)]
    unsafe fn nibbles(from: [*const u8; 2]) -> Self::B {
        [Avx2::nibbles(from[0]), Avx2::nibbles(from[1])]
    }
    #[inline(always)]
    unsafe fn bits(from: [*const u8; 2]) -> Self::B {
        [Avx2::bits(from[0]), Avx2::bits(from[1])]
    }
    #[inline(always)]
    unsafe fn splat_byte(x: u8) -> Self::B {
        [Avx2::splat_byte(x); 2]
    }
    #[inline(always)]
    unsafe fn and(a: Self::B, b: Self::B) -> Self::B {
        [Avx2::and(a[0], b[0]), Avx2::and(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn or(a: Self::B, b: Self::B) -> Self::B {
        [Avx2::or(a[0], b[0]), Avx2::or(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn shr<const N: i32>(v: Self::B) -> Self::B {
        [Avx2::shr::<N>(v[0]), Avx2::shr::<N>(v[1])]
    }
    #[inline(always)]
    unsafe fn shl<const N: i32>(v: Self::B) -> Self::B {
        [Avx2::shl::<N>(v[0]), Avx2::shl::<N>(v[1])]
    }
    #[inline(always)]
    unsafe fn lookup(table: &[i8; 16], i: Self::B) -> Self::B {
        [Avx2::lookup(table, i[0]), Avx2::lookup(table, i[1])]
    }
}

/// Whole sums; each vector is of one row.
type Whole = [__m256i; 2];

/// Words of each row: the `i`-th of both halves belong to the `i`-th 32 codes. They are the same, or with groups of 16 the
/// even and the odd ones.
type Words = [__m256i; 2];

impl TwoRows for Twin {
    /// Each half is of one row.
    type Parts = __m256;

    const HALF: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        _mm256_setzero_ps()
    }
    #[inline(always)]
    unsafe fn add<Q: Quant, const T: usize>(p: [*const u8; 2], x: [*const Rounded; T], sums: &mut [__m256; T]) {
        let levels = Q::twin_levels(p);
        let mut dot = Dot::<Q, T> {
            x: std::array::from_fn(|t| Rounded::codes(x[t])),
            words: words::<Q>(&levels),
            even: Self::splat_byte(0),
            sums: [[_mm256_setzero_si256(); 2]; T],
            of: PhantomData,
        };
        Q::twins::<Twin>(p, &mut dot);
        for t in 0..T {
            sums[t] = close::<Q>(sums[t], &levels, dot.sums[t], x[t]);
        }
    }
    #[inline(always)]
    unsafe fn sum<Q: Quant>(parts: __m256) -> __m256 {
        parts
    }
    #[inline(always)]
    unsafe fn store(v: &mut [__m256; MAX_LANES], rows: [usize; 2], out: [*mut f32; 2]) {
        fold_step::<Avx2, 1>(v, 8, |a, b| Avx2::add(a, b));
        fold_step::<Avx2, 2>(v, 8, |a, b| Avx2::add(a, b));
        let (first, second) = Avx2::swap::<4>(v[0], v[1]);
        Avx2::store_part_or_all(out[0], first, rows[0]);
        Avx2::store_part_or_all(out[1], second, rows[1]);
    }
    #[inline(always)]
    unsafe fn ask(line: *const u8, [_, _, far]: [usize; 3]) {
        // From the second cache it comes by itself (measured on Zen 3, see docs/performance.md).
        Avx2::prefetch_far(line.wrapping_add(far));
    }
}

/// Multiplies codes of two rows with `T` tokens, and sums with the levels of their groups.
struct Dot<Q, const T: usize> {
    x: [*const u8; T],
    words: Words,
    /// The last codes of an even number.
    even: [__m256i; 2],
    sums: [Whole; T],
    of: PhantomData<Q>,
}

impl<Q: Quant, const T: usize> Sink<Twin> for Dot<Q, T> {
    #[inline(always)]
    unsafe fn take(&mut self, i: usize, codes: [__m256i; 2]) {
        const { assert!(Q::SIGNED || 4 * Q::MOST as i32 * 127 <= i16::MAX as i32, "four products fit 16 bits") };
        if i.is_multiple_of(2) {
            self.even = codes;
            return;
        }
        let levels = pair(self.words, i / 2);
        for t in 0..T {
            self.sums[t] = add_pair(self.sums[t], self.even, codes, self.x[t].add(64 * (i / 2)), levels);
        }
    }
}

/// Levels of all groups of a block of each row.
#[inline(always)]
unsafe fn words<Q: Quant>(levels: &TwinLevels) -> Words {
    let sort = if Q::GROUP == 32 {
        _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7)
    } else {
        _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)
    };
    let sorted = _mm256_shuffle_epi8(levels.scales, _mm256_broadcastsi128_si256(sort));
    let widened = |half: __m128i| _mm256_cvtepi8_epi16(half);
    [widened(_mm256_castsi256_si128(sorted)), widened(_mm256_extracti128_si256::<1>(sorted))]
}

/// The levels of pair `i` of 32 codes: of each row those of even codes, then of odd ones.
#[inline(always)]
unsafe fn pair(words: Words, i: usize) -> [[__m256i; 2]; 2] {
    let which =
        [_mm256_loadu_si256(WORDS[2 * i].as_ptr().cast()), _mm256_loadu_si256(WORDS[2 * i + 1].as_ptr().cast())];
    let of = |row: __m256i| [shuffled(row, which[0]), shuffled(row, which[1])];
    [of(words[0]), of(words[1])]
}

/// Adds the products of 64 codes of each row, `even` and then `odd`, with the 64 signed bytes at `x`, each times its level.
#[inline(always)]
unsafe fn add_pair(
    sum: Whole,
    even: [__m256i; 2],
    odd: [__m256i; 2],
    x: *const u8,
    levels: [[__m256i; 2]; 2],
) -> Whole {
    let x = [_mm256_loadu_si256(x.cast()), _mm256_loadu_si256(x.add(32).cast())];
    let with = |codes: __m256i, x: __m256i, level: __m256i| _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), level);
    let both = |sum: __m256i, even: __m256i, odd: __m256i, levels: [__m256i; 2]| {
        let sum = _mm256_add_epi32(sum, with(even, x[0], levels[0]));
        _mm256_add_epi32(sum, with(odd, x[1], levels[1]))
    };
    [both(sum[0], even[0], odd[0], levels[0]), both(sum[1], even[1], odd[1], levels[1])]
}

/// Adds what a chunk comes to: the sum of its codes with levels, less mins and offset, times its factors.
#[inline(always)]
unsafe fn close<Q: Quant>(sum: __m256, levels: &TwinLevels, whole: Whole, x: *const Rounded) -> __m256 {
    let zero = _mm256_setzero_si256();
    let mut all = _mm256_add_epi32(
        _mm256_permute2x128_si256::<0x20>(whole[0], whole[1]),
        _mm256_permute2x128_si256::<0x31>(whole[0], whole[1]),
    );
    if Q::OFFSET > 0 {
        let less = of_groups::<Q>(levels.scales, _mm256_cmpgt_epi8(zero, levels.scales), x);
        all = _mm256_sub_epi32(all, _mm256_mullo_epi32(less, _mm256_set1_epi32(i32::from(Q::OFFSET))));
    }
    let factors = _mm256_castps128_ps256(_mm_cvtph_ps(levels.factors));
    let factor = |i: i32| _mm256_permutevar8x32_ps(factors, _mm256_setr_epi32(i, i, i, i, i + 2, i + 2, i + 2, i + 2));
    let mut chunk = _mm256_mul_ps(_mm256_cvtepi32_ps(all), factor(0));
    if Q::MINS {
        let less = _mm256_cvtepi32_ps(of_groups::<Q>(levels.mins, zero, x));
        chunk = _mm256_fnmadd_ps(less, factor(1), chunk);
    }
    _mm256_fmadd_ps(chunk, _mm256_set1_ps(Rounded::scale(x)), sum)
}

/// The bytes of both halves that become the `i`-th word throughout.
static WORDS: [[[u8; 2]; 16]; 8] = {
    let mut all = [[[0; 2]; 16]; 8];
    let mut word = 0;
    while word < 8 {
        all[word] = [[2 * word as u8, 2 * word as u8 + 1]; 16];
        word += 1;
    }
    all
};

/// The bytes of each half that `which` names. The intrinsic will not do: the compiler knows `which` and takes two shuffles of
/// words instead, each of which costs as much as this one.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn shuffled(bytes: __m256i, which: __m256i) -> __m256i {
    let out;
    // SAFETY: the processor has it, and nothing but registers is touched.
    std::arch::asm!("vpshufb {}, {}, {}", out(ymm_reg) out, in(ymm_reg) bytes, in(ymm_reg) which,
        options(pure, nomem, nostack, preserves_flags));
    out
}
