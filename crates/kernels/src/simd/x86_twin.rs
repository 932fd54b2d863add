//! Codes of two rows at once, for AVX-512: 32 of each.

use std::arch::x86_64::*;

use super::bytes::Codes;

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
