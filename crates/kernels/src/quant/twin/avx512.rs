//! Two rows with AVX-512: 32 codes of each in a vector.

use std::arch::x86_64::*;

use super::{TwinLevels, TwoRows};
use crate::quant::{Quant, Rounded};
use crate::simd::{Avx512, Codes, MAX_LANES, Simd, fold_step};

/// Vectors of 64 bytes whose halves belong to two rows.
#[derive(Clone, Copy)]
pub(crate) struct Twin;

/// A vector of two halves.
#[inline(always)]
unsafe fn halves([low, high]: [__m256i; 2]) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
}

impl Codes for Twin {
    type B = __m512i;
    type From = [*const u8; 2];

    #[inline(always)]
    unsafe fn skip(from: [*const u8; 2], bytes: usize) -> [*const u8; 2] {
        [from[0].add(bytes), from[1].add(bytes)]
    }
    #[inline(always)]
    unsafe fn load32(from: [*const u8; 2]) -> __m512i {
        halves([_mm256_loadu_si256(from[0].cast()), _mm256_loadu_si256(from[1].cast())])
    }
    #[inline(always)]
    unsafe fn nibbles(from: [*const u8; 2]) -> __m512i {
        let twice = |p: *const u8| _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast()));
        let high = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 0, 0, 0, 0, 4, 4, 4, 4);
        let shifted = _mm512_srlv_epi32(halves([twice(from[0]), twice(from[1])]), high);
        _mm512_and_si512(shifted, _mm512_set1_epi8(15))
    }
    #[inline(always)]
    unsafe fn bits(from: [*const u8; 2]) -> __m512i {
        let word = |p: *const u8| u64::from(p.cast::<u32>().read_unaligned());
        _mm512_movm_epi8(word(from[0]) | word(from[1]) << 32)
    }
    #[inline(always)]
    unsafe fn splat_byte(x: u8) -> __m512i {
        _mm512_set1_epi8(x as i8)
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        _mm512_and_si512(a, b)
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        _mm512_or_si512(a, b)
    }
    #[inline(always)]
    unsafe fn shr<const N: i32>(v: __m512i) -> __m512i {
        _mm512_and_si512(_mm512_srlv_epi32(v, _mm512_set1_epi32(N)), _mm512_set1_epi8((0xff_u8 >> N) as i8))
    }
    #[inline(always)]
    unsafe fn shl<const N: i32>(v: __m512i) -> __m512i {
        _mm512_and_si512(_mm512_sllv_epi32(v, _mm512_set1_epi32(N)), _mm512_set1_epi8((0xff_u8 << N) as i8))
    }
    #[inline(always)]
    unsafe fn lookup(table: &[i8; 16], i: __m512i) -> __m512i {
        _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())), i)
    }
}

impl TwoRows for Twin {
    type Sum = __m512;
    type Whole = __m512i;
    /// Words: the `i`-th of every quarter belong to the `i`-th 32 codes. Those of a row are the same in both of its quarters,
    /// or with groups of 16 the even and the odd ones.
    type Levels = __m512i;
    type Pair = __m512i;

    const HALF: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        _mm512_setzero_ps()
    }
    #[inline(always)]
    unsafe fn zero_whole() -> __m512i {
        _mm512_setzero_si512()
    }
    #[inline(always)]
    unsafe fn levels<Q: Quant>(levels: &TwinLevels) -> __m512i {
        if Q::GROUP == 32 {
            let twice = _mm512_castsi256_si512(levels.scales);
            let twice = _mm512_shuffle_i32x4::<0b01_01_00_00>(twice, twice);
            let widen = _mm_setr_epi8(0, -1, 1, -1, 2, -1, 3, -1, 4, -1, 5, -1, 6, -1, 7, -1);
            _mm512_shuffle_epi8(twice, _mm512_broadcast_i32x4(widen))
        } else {
            let sort = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
            _mm512_cvtepi8_epi16(_mm256_shuffle_epi8(levels.scales, _mm256_broadcastsi128_si256(sort)))
        }
    }
    #[inline(always)]
    unsafe fn pair(levels: __m512i, i: usize) -> __m512i {
        shuffled(levels, _mm512_broadcast_i32x4(_mm_loadu_si128(WORDS[i].as_ptr().cast())))
    }
    #[inline(always)]
    unsafe fn add(sum: __m512i, even: __m512i, odd: __m512i, x: *const u8, levels: __m512i) -> __m512i {
        let fours = |codes: __m512i, x: *const u8| {
            let x = _mm512_broadcast_i64x4(_mm256_loadu_si256(x.cast()));
            _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x)
        };
        dot_words(sum, _mm512_packs_epi32(fours(even, x), fours(odd, x.add(32))), levels)
    }
    #[inline(always)]
    unsafe fn close<Q: Quant>(sum: __m512, levels: &TwinLevels, mut all: __m512i, x: *const Rounded) -> __m512 {
        let factors = _mm512_castps128_ps512(_mm_cvtph_ps(levels.factors));
        let factor = |i: i32| {
            let which = _mm512_mask_mov_epi32(_mm512_set1_epi32(i), 0xff00, _mm512_set1_epi32(i + 2));
            _mm512_permutexvar_ps(which, factors)
        };
        let of_groups = || {
            if Q::GROUP == 32 {
                _mm512_broadcast_i32x4(_mm_loadu_si128(Rounded::sums(x, 32).cast()))
            } else {
                _mm512_broadcast_i64x4(_mm256_loadu_si256(Rounded::sums(x, 16).cast()))
            }
        };
        if Q::OFFSET > 0 {
            let less = _mm512_madd_epi16(_mm512_cvtepi8_epi16(levels.scales), of_groups());
            all = _mm512_sub_epi32(all, _mm512_mullo_epi32(less, _mm512_set1_epi32(i32::from(Q::OFFSET))));
        }
        let mut chunk = _mm512_mul_ps(_mm512_cvtepi32_ps(all), factor(0));
        if Q::MINS {
            let less = _mm512_madd_epi16(_mm512_cvtepu8_epi16(levels.mins), of_groups());
            chunk = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(less), factor(1), chunk);
        }
        _mm512_fmadd_ps(chunk, _mm512_set1_ps(Rounded::scale(x)), sum)
    }
    #[inline(always)]
    unsafe fn store(v: &mut [__m512; MAX_LANES], half: usize, rest: usize, out: *mut f32) {
        fold_step::<Avx512, 1>(v, 16, |a, b| Avx512::add(a, b));
        fold_step::<Avx512, 2>(v, 16, |a, b| Avx512::add(a, b));
        fold_step::<Avx512, 4>(v, 16, |a, b| Avx512::add(a, b));
        let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(v[0], v[1]);
        let high = _mm512_shuffle_f32x4::<0b11_10_11_10>(v[0], v[1]);
        _mm512_mask_storeu_ps(out, ((1_u32 << half) - 1) as u16, low);
        _mm512_mask_storeu_ps(out.add(half), ((1_u32 << rest) - 1) as u16, high);
    }
    #[inline(always)]
    unsafe fn ask(line: *const u8, ahead: [usize; 2]) {
        Avx512::prefetch(line.wrapping_add(ahead[0]));
        Avx512::prefetch_far(line.wrapping_add(ahead[1]));
    }
}

/// The words that the halves of a quarter become, for the `i`-th pair of 32 codes.
static WORDS: [[[u8; 2]; 8]; 4] = {
    let mut all = [[[0; 2]; 8]; 4];
    let mut i = 0;
    while i < 32 {
        let word = 2 * (i / 8) + i % 8 / 4;
        all[i / 8][i % 8] = [2 * word as u8, 2 * word as u8 + 1];
        i += 1;
    }
    all
};

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
