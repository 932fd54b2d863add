//! x86-64: AVX-512, and AVX2 with FMA and F16C.

use std::arch::x86_64::*;

use super::{Isa, Simd};

/// Sixteen values in a 512-bit register.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

/// Where the lanes of the two results of `swap::<L>` come from: 0 to 15 is `a`, from 16 on `b`.
const fn swap_index(l: usize) -> ([i32; 16], [i32; 16]) {
    let (mut first, mut second) = ([0; 16], [0; 16]);
    let mut i = 0;
    while i < 16 {
        let set = i & l != 0;
        first[i] = if set { 16 + i - l } else { i } as i32;
        second[i] = if set { 16 + i } else { i + l } as i32;
        i += 1;
    }
    (first, second)
}

impl Simd for Avx512 {
    type V = __m512;
    const ISA: Isa = Isa::Avx512;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        _mm512_storeu_ps(p, v);
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::V {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self::V {
        let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
    }
    #[inline(always)]
    unsafe fn split_bf16(v: Self::V) -> (Self::V, Self::V) {
        let v = _mm512_castps_si512(v);
        let upper = _mm512_and_si512(v, _mm512_set1_epi32(-0x1_0000));
        (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(v)), _mm512_castsi512_ps(upper))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self::V {
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn from_i32(v: Self::I) -> Self::V {
        _mm512_cvtepi32_ps(v)
    }
    #[inline(always)]
    unsafe fn to_i32(v: Self::V) -> Self::I {
        _mm512_cvtps_epi32(v)
    }
    #[inline(always)]
    unsafe fn as_i32(v: Self::V) -> Self::I {
        _mm512_castps_si512(v)
    }
    #[inline(always)]
    unsafe fn as_f32(v: Self::I) -> Self::V {
        _mm512_castsi512_ps(v)
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut u8, v: Self::V) {
        let bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v));
        _mm_storeu_si128(p.cast(), bytes);
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn zero_if_less(a: Self::V, b: Self::V, v: Self::V) -> Self::V {
        _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(a, b), v)
    }
    #[inline(always)]
    unsafe fn scale_pow2(v: Self::V, n: Self::V) -> Self::V {
        _mm512_scalef_ps(v, n)
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
    #[inline(always)]
    unsafe fn prefetch_far(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }
    #[inline(always)]
    unsafe fn prefetch_to_write(p: *const u8) {
        prefetch_to_write(p);
    }
    #[inline(always)]
    unsafe fn swap<const L: usize>(a: Self::V, b: Self::V) -> (Self::V, Self::V) {
        let (first, second) = const { swap_index(L) };
        let first = _mm512_loadu_si512(first.as_ptr().cast());
        let second = _mm512_loadu_si512(second.as_ptr().cast());
        (_mm512_permutex2var_ps(a, first, b), _mm512_permutex2var_ps(a, second, b))
    }
}

/// Eight values in a 256-bit register.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

impl Simd for Avx2 {
    type V = __m256;
    const ISA: Isa = Isa::Avx2;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        _mm256_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        _mm256_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        _mm256_storeu_ps(p, v);
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::V {
        _mm256_cvtph_ps(_mm_loadu_si128(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self::V {
        let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
    }
    #[inline(always)]
    unsafe fn split_bf16(v: Self::V) -> (Self::V, Self::V) {
        let v = _mm256_castps_si256(v);
        let upper = _mm256_and_si256(v, _mm256_set1_epi32(-0x1_0000));
        (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(v)), _mm256_castsi256_ps(upper))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self::V {
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(p)))
    }
    #[inline(always)]
    unsafe fn from_i32(v: Self::I) -> Self::V {
        _mm256_cvtepi32_ps(v)
    }
    #[inline(always)]
    unsafe fn to_i32(v: Self::V) -> Self::I {
        _mm256_cvtps_epi32(v)
    }
    #[inline(always)]
    unsafe fn as_i32(v: Self::V) -> Self::I {
        _mm256_castps_si256(v)
    }
    #[inline(always)]
    unsafe fn as_f32(v: Self::I) -> Self::V {
        _mm256_castsi256_ps(v)
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut u8, v: Self::V) {
        let v = _mm256_cvtps_epi32(v);
        let words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
        let bytes = _mm_packs_epi16(words, words);
        _mm_storel_epi64(p.cast(), bytes);
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        _mm256_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        _mm256_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        _mm256_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        _mm256_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        _mm256_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        _mm256_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        _mm256_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn zero_if_less(a: Self::V, b: Self::V, v: Self::V) -> Self::V {
        _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(a, b), v)
    }
    #[inline(always)]
    unsafe fn scale_pow2(v: Self::V, n: Self::V) -> Self::V {
        let n = _mm256_cvtps_epi32(n);
        let half = _mm256_srai_epi32::<1>(n);
        let bias = _mm256_set1_epi32(127);
        let a = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
        let b = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
        _mm256_mul_ps(_mm256_mul_ps(v, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b))
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
    #[inline(always)]
    unsafe fn prefetch_far(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }
    #[inline(always)]
    unsafe fn prefetch_to_write(p: *const u8) {
        prefetch_to_write(p);
    }
    #[inline(always)]
    unsafe fn swap<const L: usize>(a: Self::V, b: Self::V) -> (Self::V, Self::V) {
        match L {
            1 => (_mm256_blend_ps::<0xAA>(a, _mm256_moveldup_ps(b)), _mm256_blend_ps::<0xAA>(_mm256_movehdup_ps(a), b)),
            2 => (_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xEE>(a, b)),
            _ => (_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b)),
        }
    }
}

/// The intrinsic would become an instruction that asks to read, unless the compiler was told that the processor has this one; those
/// of 64 bits that have it not pass over it.
#[inline(always)]
unsafe fn prefetch_to_write(p: *const u8) {
    std::arch::asm!("prefetchw [{p}]", p = in(reg) p, options(readonly, nostack, preserves_flags));
}
