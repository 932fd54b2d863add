//! x86-64: codes in 256-bit registers for both sets; tiles in registers of full width.

use std::arch::x86_64::*;

use super::bytes::{Bytes, Codes, Upright, one_instruction, pair_of_halves};
use super::{Avx2, Avx512};

/// Unpacking, with the instructions of 256 bits that both sets have.
macro_rules! codes {
    () => {
        type B = __m256i;
        type From = *const u8;

        #[inline(always)]
        unsafe fn skip(from: *const u8, bytes: usize) -> *const u8 {
            from.add(bytes)
        }
        #[inline(always)]
        unsafe fn bits(from: *const u8) -> __m256i {
            Self::spread_bits(from.cast::<u32>().read_unaligned())
        }
        #[inline(always)]
        unsafe fn load32(p: *const u8) -> __m256i {
            _mm256_loadu_si256(p.cast())
        }
        #[inline(always)]
        unsafe fn nibbles(p: *const u8) -> __m256i {
            let twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast()));
            let shifted = _mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
            _mm256_and_si256(shifted, _mm256_set1_epi8(15))
        }
        #[inline(always)]
        unsafe fn splat_byte(x: u8) -> __m256i {
            _mm256_set1_epi8(x as i8)
        }
        #[inline(always)]
        unsafe fn and(a: __m256i, b: __m256i) -> __m256i {
            _mm256_and_si256(a, b)
        }
        #[inline(always)]
        unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
            _mm256_or_si256(a, b)
        }
        #[inline(always)]
        unsafe fn shr<const N: i32>(v: __m256i) -> __m256i {
            _mm256_and_si256(_mm256_srli_epi16::<N>(v), _mm256_set1_epi8((0xff_u8 >> N) as i8))
        }
        #[inline(always)]
        unsafe fn shl<const N: i32>(v: __m256i) -> __m256i {
            _mm256_and_si256(_mm256_slli_epi16::<N>(v), _mm256_set1_epi8((0xff_u8 << N) as i8))
        }
        #[inline(always)]
        unsafe fn lookup(table: &[i8; 16], i: __m256i) -> __m256i {
            _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())), i)
        }
    };
}

/// What both sets do with the same instructions.
macro_rules! shared {
    () => {
        type F = __m256;

        #[inline(always)]
        unsafe fn store32(p: *mut u8, v: __m256i) {
            _mm256_storeu_si256(p.cast(), v);
        }
        #[inline(always)]
        unsafe fn xor(a: __m256i, b: __m256i) -> __m256i {
            _mm256_xor_si256(a, b)
        }
        #[inline(always)]
        unsafe fn add_bytes(a: __m256i, b: __m256i) -> __m256i {
            _mm256_add_epi8(a, b)
        }
        #[inline(always)]
        unsafe fn sub_bytes(a: __m256i, b: __m256i) -> __m256i {
            _mm256_sub_epi8(a, b)
        }
        #[inline(always)]
        unsafe fn load8(p: *const f32) -> __m256 {
            _mm256_loadu_ps(p)
        }
        #[inline(always)]
        unsafe fn store8(p: *mut f32, v: __m256) {
            _mm256_storeu_ps(p, v);
        }
        #[inline(always)]
        unsafe fn splat8(x: f32) -> __m256 {
            _mm256_set1_ps(x)
        }
        #[inline(always)]
        unsafe fn splat_pair(p: *const f32) -> __m256 {
            let pair = _mm256_castpd_ps(_mm256_set1_pd(p.cast::<f64>().read_unaligned()));
            _mm256_permutevar_ps(pair, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1))
        }
        #[inline(always)]
        unsafe fn mul8(a: __m256, b: __m256) -> __m256 {
            _mm256_mul_ps(a, b)
        }
        #[inline(always)]
        unsafe fn add8(a: __m256, b: __m256) -> __m256 {
            _mm256_add_ps(a, b)
        }
        #[inline(always)]
        unsafe fn fma8(a: __m256, b: __m256, c: __m256) -> __m256 {
            _mm256_fmadd_ps(a, b, c)
        }
        #[inline(always)]
        unsafe fn sum8(v: __m256) -> f32 {
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
        #[inline(always)]
        unsafe fn widen_u8(bytes: u64) -> __m256 {
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes as i64)))
        }
        #[inline(always)]
        unsafe fn widen_i8(bytes: u64) -> __m256 {
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes as i64)))
        }
        #[inline(always)]
        unsafe fn widen_f16(halves: [u64; 2]) -> __m256 {
            _mm256_cvtph_ps(_mm_set_epi64x(halves[1] as i64, halves[0] as i64))
        }
    };
}

/// Shifts of all lanes by the same number of bits.
macro_rules! shifts {
    ($($name:ident = $instruction:ident)*) => {$(
        #[inline(always)]
        unsafe fn $name(v: Self::I, n: i32) -> Self::I {
            $instruction(v, Self::splat_i32(n))
        }
    )*};
}

/// Turns squares of four by four values: every 128 bits of vector `i` get value `i` of those of all four.
macro_rules! turn_fours {
    ($name:ident, $V:ty, $low32:ident, $high32:ident, $low64:ident, $high64:ident) => {
        #[inline(always)]
        unsafe fn $name([a, b, c, d]: [$V; 4]) -> [$V; 4] {
            let (ab, cd) = ([$low32(a, b), $high32(a, b)], [$low32(c, d), $high32(c, d)]);
            [$low64(ab[0], cd[0]), $high64(ab[0], cd[0]), $low64(ab[1], cd[1]), $high64(ab[1], cd[1])]
        }
    };
}
turn_fours!(
    fours_512,
    __m512i,
    _mm512_unpacklo_epi32,
    _mm512_unpackhi_epi32,
    _mm512_unpacklo_epi64,
    _mm512_unpackhi_epi64
);
turn_fours!(
    fours_256,
    __m256i,
    _mm256_unpacklo_epi32,
    _mm256_unpackhi_epi32,
    _mm256_unpacklo_epi64,
    _mm256_unpackhi_epi64
);

impl Codes for Avx512 {
    codes!();
}

impl Bytes for Avx512 {
    shared!();
    type P = __m512;
    type H = ();
    type W = ();
    type I = __m512i;
    const BIASED: bool = true;

    #[inline(always)]
    unsafe fn zero_pair() -> __m512 {
        _mm512_setzero_ps()
    }
    #[inline(always)]
    unsafe fn fma_pair<const SIGNED: bool, const SMALL: bool>(
        acc: __m512,
        a: __m256i,
        b: __m256i,
        x: *const u8,
        scales: *const f32,
    ) -> __m512 {
        let (mut codes, mut x) = (_mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b), _mm512_loadu_si512(x.cast()));
        if SIGNED {
            x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(codes), _mm512_setzero_si512(), x);
            codes = _mm512_abs_epi8(codes);
        }
        let products = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x));
        let scale = if SMALL {
            let four = _mm512_broadcast_f32x4(_mm_loadu_ps(scales));
            _mm512_permutevar_ps(four, _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3))
        } else {
            let two = _mm512_castpd_ps(_mm512_set1_pd(scales.cast::<f64>().read_unaligned()));
            _mm512_permutevar_ps(two, _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1))
        };
        _mm512_fmadd_ps(products, scale, acc)
    }
    #[inline(always)]
    unsafe fn sum_pair(acc: __m512) -> __m256 {
        _mm256_add_ps(_mm512_castps512_ps256(acc), _mm512_extractf32x8_ps::<1>(acc))
    }
    #[inline(always)]
    unsafe fn spread_bits(bits: u32) -> __m256i {
        _mm256_movm_epi8(bits)
    }
    #[inline(always)]
    unsafe fn dot_codes(w: __m256i, x: __m256i) -> __m256 {
        _mm256_cvtepi32_ps(_mm256_dpbusd_epi32(_mm256_setzero_si256(), w, x))
    }
    #[inline(always)]
    unsafe fn dot_signed(w: __m256i, x: __m256i) -> __m256 {
        Self::dot_codes(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
    }
    #[inline(always)]
    unsafe fn load_i32(p: *const u8) -> __m512i {
        _mm512_loadu_si512(p.cast())
    }
    #[inline(always)]
    unsafe fn store_i32(p: *mut u8, v: __m512i) {
        _mm512_storeu_si512(p.cast(), v);
    }
    one_instruction! {
        and_i32 = _mm512_and_si512
        or_i32 = _mm512_or_si512
        add_i32 = _mm512_add_epi32
        mul_i32 = _mm512_mullo_epi32
        max_i32 = _mm512_max_epi32
        min_i32 = _mm512_min_epi32
        sub_bytes_i32 = _mm512_sub_epi8
    }
    shifts! {
        shl_i32 = _mm512_sllv_epi32
        shr_i32 = _mm512_srlv_epi32
        sar_i32 = _mm512_srav_epi32
    }
    #[inline(always)]
    unsafe fn lookup_i32(table: &[i8; 16], i: __m512i) -> __m512i {
        _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())), i)
    }
    #[inline(always)]
    unsafe fn turn32(rows: &Upright) -> [__m512i; 8] {
        // Rows that end up in neighbouring lanes of 128 bits share a register.
        let pair = |low: usize| {
            let half = |r: usize| _mm256_loadu_si256(rows.row(r).cast());
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(half(low)), half(low + 4))
        };
        let o = fours_512([pair(0), pair(1), pair(2), pair(3)]);
        let p = fours_512([pair(8), pair(9), pair(10), pair(11)]);
        let low = |i: usize| _mm512_shuffle_i32x4::<0b10_00_10_00>(o[i], p[i]);
        let high = |i: usize| _mm512_shuffle_i32x4::<0b11_01_11_01>(o[i], p[i]);
        [low(0), low(1), low(2), low(3), high(0), high(1), high(2), high(3)]
    }
    #[inline(always)]
    unsafe fn turn16(rows: &Upright) -> [__m512i; 4] {
        let four = |i: usize| {
            let row = |r: usize| _mm_loadu_si128(rows.row(r).cast());
            let v = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(row(i)), row(i + 4));
            _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(v, row(i + 8)), row(i + 12))
        };
        fours_512([four(0), four(1), four(2), four(3)])
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> __m512i {
        _mm512_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn dot4<const SIGNED: bool>(acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        if SIGNED { _mm512_dpbusd_epi32(acc, x, w) } else { _mm512_dpbusd_epi32(acc, w, x) }
    }
    #[inline(always)]
    unsafe fn dot2(acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        _mm512_dpwssd_epi32(acc, a, b)
    }
}

/// Sums of four products; `w` unsigned. No sum of two exceeds 16 bits as long as `w` is at most 128
/// and `x` not -128.
#[inline(always)]
unsafe fn dot_256(w: __m256i, x: __m256i) -> __m256i {
    _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1))
}

impl Codes for Avx2 {
    codes!();
}

impl Bytes for Avx2 {
    shared!();
    pair_of_halves!();
    type H = ();
    type W = ();
    type I = __m256i;
    const BIASED: bool = false;

    #[inline(always)]
    unsafe fn spread_bits(bits: u32) -> __m256i {
        let byte = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
        let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
        let spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits as i32), byte);
        _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit)
    }
    #[inline(always)]
    unsafe fn dot_codes(w: __m256i, x: __m256i) -> __m256 {
        _mm256_cvtepi32_ps(dot_256(w, x))
    }
    #[inline(always)]
    unsafe fn dot_signed(w: __m256i, x: __m256i) -> __m256 {
        Self::dot_codes(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
    }
    #[inline(always)]
    unsafe fn load_i32(p: *const u8) -> __m256i {
        _mm256_loadu_si256(p.cast())
    }
    #[inline(always)]
    unsafe fn store_i32(p: *mut u8, v: __m256i) {
        _mm256_storeu_si256(p.cast(), v);
    }
    one_instruction! {
        and_i32 = _mm256_and_si256
        or_i32 = _mm256_or_si256
        add_i32 = _mm256_add_epi32
        mul_i32 = _mm256_mullo_epi32
        max_i32 = _mm256_max_epi32
        min_i32 = _mm256_min_epi32
        sub_bytes_i32 = _mm256_sub_epi8
    }
    shifts! {
        shl_i32 = _mm256_sllv_epi32
        shr_i32 = _mm256_srlv_epi32
        sar_i32 = _mm256_srav_epi32
    }
    #[inline(always)]
    unsafe fn lookup_i32(table: &[i8; 16], i: __m256i) -> __m256i {
        _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())), i)
    }
    #[inline(always)]
    unsafe fn turn32(rows: &Upright) -> [__m256i; 8] {
        let row = |r: usize| _mm256_loadu_si256(rows.row(r).cast());
        let (o, p) = (fours_256([row(0), row(1), row(2), row(3)]), fours_256([row(4), row(5), row(6), row(7)]));
        let low = |i: usize| _mm256_permute2x128_si256::<0x20>(o[i], p[i]);
        let high = |i: usize| _mm256_permute2x128_si256::<0x31>(o[i], p[i]);
        [low(0), low(1), low(2), low(3), high(0), high(1), high(2), high(3)]
    }
    #[inline(always)]
    unsafe fn turn16(rows: &Upright) -> [__m256i; 4] {
        let two = |i: usize| {
            let row = |r: usize| _mm_loadu_si128(rows.row(r).cast());
            _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(row(i)), row(i + 4))
        };
        fours_256([two(0), two(1), two(2), two(3)])
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> __m256i {
        _mm256_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn dot4<const SIGNED: bool>(acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
        let (w, x) = if SIGNED { (_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)) } else { (w, x) };
        _mm256_add_epi32(acc, dot_256(w, x))
    }
    #[inline(always)]
    unsafe fn dot_halves(acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
        _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, x))
    }
    #[inline(always)]
    unsafe fn dot2(acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi32(acc, _mm256_madd_epi16(a, b))
    }
}
