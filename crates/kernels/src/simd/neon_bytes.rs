//! 64-bit ARM: codes in two 128-bit registers.

use std::arch::aarch64::*;

use super::Neon;
use super::bytes::{Bytes, Codes, Upright, one_instruction, pair_of_halves};

/// Products of 16 signed bytes, four to a lane. Two of them fit 16 bits, since none of `x` is -128.
#[inline(always)]
unsafe fn dot_128(w: int8x16_t, x: int8x16_t) -> int32x4_t {
    let low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
    let high = vpaddlq_s16(vmull_high_s8(w, x));
    vpaddq_s32(low, high)
}

#[inline(always)]
unsafe fn both(a: uint8x16x2_t, b: uint8x16x2_t, f: impl Fn(uint8x16_t, uint8x16_t) -> uint8x16_t) -> uint8x16x2_t {
    uint8x16x2_t(f(a.0, b.0), f(a.1, b.1))
}

impl Codes for Neon {
    type B = uint8x16x2_t;
    type From = *const u8;

    #[inline(always)]
    unsafe fn skip(from: *const u8, bytes: usize) -> *const u8 {
        from.add(bytes)
    }
    #[inline(always)]
    unsafe fn bits(from: *const u8) -> Self::B {
        Self::spread_bits(from.cast::<u32>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn load32(p: *const u8) -> Self::B {
        uint8x16x2_t(vld1q_u8(p), vld1q_u8(p.add(16)))
    }
    #[inline(always)]
    unsafe fn nibbles(p: *const u8) -> Self::B {
        let bytes = vld1q_u8(p);
        uint8x16x2_t(vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8::<4>(bytes))
    }
    #[inline(always)]
    unsafe fn splat_byte(x: u8) -> Self::B {
        uint8x16x2_t(vdupq_n_u8(x), vdupq_n_u8(x))
    }
    #[inline(always)]
    unsafe fn and(a: Self::B, b: Self::B) -> Self::B {
        both(a, b, |a, b| vandq_u8(a, b))
    }
    #[inline(always)]
    unsafe fn or(a: Self::B, b: Self::B) -> Self::B {
        both(a, b, |a, b| vorrq_u8(a, b))
    }
    #[inline(always)]
    unsafe fn shr<const N: i32>(v: Self::B) -> Self::B {
        uint8x16x2_t(vshrq_n_u8::<N>(v.0), vshrq_n_u8::<N>(v.1))
    }
    #[inline(always)]
    unsafe fn shl<const N: i32>(v: Self::B) -> Self::B {
        uint8x16x2_t(vshlq_n_u8::<N>(v.0), vshlq_n_u8::<N>(v.1))
    }
    #[inline(always)]
    unsafe fn lookup(table: &[i8; 16], i: Self::B) -> Self::B {
        let table = vld1q_u8(table.as_ptr().cast());
        uint8x16x2_t(vqtbl1q_u8(table, i.0), vqtbl1q_u8(table, i.1))
    }
}

/// Turns a square of four by four values.
#[inline(always)]
unsafe fn turn_fours([a, b, c, d]: [int32x4_t; 4]) -> [int32x4_t; 4] {
    let wide = |v| vreinterpretq_s64_s32(v);
    let (ab, cd) = ([vtrn1q_s32(a, b), vtrn2q_s32(a, b)], [vtrn1q_s32(c, d), vtrn2q_s32(c, d)]);
    let low = |i: usize| vreinterpretq_s32_s64(vtrn1q_s64(wide(ab[i]), wide(cd[i])));
    let high = |i: usize| vreinterpretq_s32_s64(vtrn2q_s64(wide(ab[i]), wide(cd[i])));
    [low(0), low(1), high(0), high(1)]
}

impl Bytes for Neon {
    type F = float32x4x2_t;
    type I = int32x4_t;
    const BIASED: bool = false;
    pair_of_halves!();
    type H = [i16; 16];
    type W = int32x4_t;

    #[inline(always)]
    unsafe fn widen_levels(bytes: [u64; 2]) -> [i16; 16] {
        super::bytes::widened(bytes)
    }
    #[inline(always)]
    unsafe fn dot_levels(levels: [i16; 16], x: *const i16, n: usize) -> Self::F {
        let product = |i: usize| {
            let (a, b) = (vld1q_s16(levels.as_ptr().add(8 * i)), vld1q_s16(x.add(8 * i)));
            vcvtq_f32_s32(vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)))
        };
        float32x4x2_t(product(0), if n == 8 { vdupq_n_f32(0.0) } else { product(1) })
    }
    #[inline(always)]
    unsafe fn zero_whole() -> int32x4_t {
        vdupq_n_s32(0)
    }
    #[inline(always)]
    unsafe fn add_pair<const SMALL: bool>(
        mut acc: int32x4_t,
        a: Self::B,
        b: Self::B,
        x: *const u8,
        levels: [i16; 16],
        pair: usize,
    ) -> int32x4_t {
        let quarters = [a.0, a.1, b.0, b.1];
        for i in 0..4 {
            let dot = dot_128(vreinterpretq_s8_u8(quarters[i]), vld1q_s8(x.add(16 * i).cast()));
            let level = levels[if SMALL { 4 * pair + i } else { 2 * pair + i / 2 }];
            acc = vmlaq_n_s32(acc, dot, i32::from(level));
        }
        acc
    }
    #[inline(always)]
    unsafe fn sum_whole(acc: int32x4_t) -> Self::F {
        float32x4x2_t(vcvtq_f32_s32(acc), vdupq_n_f32(0.0))
    }

    #[inline(always)]
    unsafe fn store32(p: *mut u8, v: Self::B) {
        vst1q_u8(p, v.0);
        vst1q_u8(p.add(16), v.1);
    }
    #[inline(always)]
    unsafe fn xor(a: Self::B, b: Self::B) -> Self::B {
        both(a, b, |a, b| veorq_u8(a, b))
    }
    #[inline(always)]
    unsafe fn add_bytes(a: Self::B, b: Self::B) -> Self::B {
        both(a, b, |a, b| vaddq_u8(a, b))
    }
    #[inline(always)]
    unsafe fn sub_bytes(a: Self::B, b: Self::B) -> Self::B {
        both(a, b, |a, b| vsubq_u8(a, b))
    }
    #[inline(always)]
    unsafe fn spread_bits(bits: u32) -> Self::B {
        const BIT: [u8; 16] = [1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128];
        let bit = vld1q_u8(BIT.as_ptr());
        let [a, b, c, d] = bits.to_le_bytes();
        let (low, high) = (vcombine_u8(vdup_n_u8(a), vdup_n_u8(b)), vcombine_u8(vdup_n_u8(c), vdup_n_u8(d)));
        uint8x16x2_t(vtstq_u8(low, bit), vtstq_u8(high, bit))
    }
    #[inline(always)]
    unsafe fn dot_codes(w: Self::B, x: Self::B) -> Self::F {
        Self::dot_signed(w, x)
    }
    #[inline(always)]
    unsafe fn dot_signed(w: Self::B, x: Self::B) -> Self::F {
        let dot = |w, x| vcvtq_f32_s32(dot_128(vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x)));
        float32x4x2_t(dot(w.0, x.0), dot(w.1, x.1))
    }
    #[inline(always)]
    unsafe fn load8(p: *const f32) -> Self::F {
        float32x4x2_t(vld1q_f32(p), vld1q_f32(p.add(4)))
    }
    #[inline(always)]
    unsafe fn store8(p: *mut f32, v: Self::F) {
        vst1q_f32(p, v.0);
        vst1q_f32(p.add(4), v.1);
    }
    #[inline(always)]
    unsafe fn splat8(x: f32) -> Self::F {
        float32x4x2_t(vdupq_n_f32(x), vdupq_n_f32(x))
    }
    #[inline(always)]
    unsafe fn splat_pair(p: *const f32) -> Self::F {
        float32x4x2_t(vld1q_dup_f32(p), vld1q_dup_f32(p.add(1)))
    }
    #[inline(always)]
    unsafe fn mul8(a: Self::F, b: Self::F) -> Self::F {
        float32x4x2_t(vmulq_f32(a.0, b.0), vmulq_f32(a.1, b.1))
    }
    #[inline(always)]
    unsafe fn add8(a: Self::F, b: Self::F) -> Self::F {
        float32x4x2_t(vaddq_f32(a.0, b.0), vaddq_f32(a.1, b.1))
    }
    #[inline(always)]
    unsafe fn fma8(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        float32x4x2_t(vfmaq_f32(c.0, a.0, b.0), vfmaq_f32(c.1, a.1, b.1))
    }
    #[inline(always)]
    unsafe fn sum8(v: Self::F) -> f32 {
        vaddvq_f32(vaddq_f32(v.0, v.1))
    }
    #[inline(always)]
    unsafe fn widen_u8(bytes: u64) -> Self::F {
        let wide = vmovl_u8(vcreate_u8(bytes));
        let (low, high) = (vmovl_u16(vget_low_u16(wide)), vmovl_high_u16(wide));
        float32x4x2_t(vcvtq_f32_u32(low), vcvtq_f32_u32(high))
    }
    #[inline(always)]
    unsafe fn widen_i8(bytes: u64) -> Self::F {
        let wide = vmovl_s8(vcreate_s8(bytes));
        let (low, high) = (vmovl_s16(vget_low_s16(wide)), vmovl_high_s16(wide));
        float32x4x2_t(vcvtq_f32_s32(low), vcvtq_f32_s32(high))
    }
    #[inline(always)]
    unsafe fn widen_f16(halves: [u64; 2]) -> Self::F {
        use super::Simd;
        let p = halves.as_ptr().cast::<u8>();
        float32x4x2_t(Self::load_f16(p), Self::load_f16(p.add(8)))
    }
    #[inline(always)]
    unsafe fn load_i32(p: *const u8) -> int32x4_t {
        vreinterpretq_s32_u8(vld1q_u8(p))
    }
    #[inline(always)]
    unsafe fn store_i32(p: *mut u8, v: int32x4_t) {
        vst1q_u8(p, vreinterpretq_u8_s32(v));
    }
    one_instruction! {
        and_i32 = vandq_s32
        or_i32 = vorrq_s32
        add_i32 = vaddq_s32
        mul_i32 = vmulq_s32
        max_i32 = vmaxq_s32
        min_i32 = vminq_s32
    }
    #[inline(always)]
    unsafe fn shl_i32(v: int32x4_t, n: i32) -> int32x4_t {
        vshlq_s32(v, vdupq_n_s32(n))
    }
    #[inline(always)]
    unsafe fn shr_i32(v: int32x4_t, n: i32) -> int32x4_t {
        vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(v), vdupq_n_s32(-n)))
    }
    #[inline(always)]
    unsafe fn sar_i32(v: int32x4_t, n: i32) -> int32x4_t {
        vshlq_s32(v, vdupq_n_s32(-n))
    }
    #[inline(always)]
    unsafe fn sub_bytes_i32(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vreinterpretq_s32_u8(vsubq_u8(vreinterpretq_u8_s32(a), vreinterpretq_u8_s32(b)))
    }
    #[inline(always)]
    unsafe fn lookup_i32(table: &[i8; 16], i: int32x4_t) -> int32x4_t {
        vreinterpretq_s32_u8(vqtbl1q_u8(vld1q_u8(table.as_ptr().cast()), vreinterpretq_u8_s32(i)))
    }
    #[inline(always)]
    unsafe fn turn32(rows: &Upright) -> [int32x4_t; 8] {
        let half = |at: usize| turn_fours([0, 1, 2, 3].map(|r| vreinterpretq_s32_u8(vld1q_u8(rows.row(r).add(at)))));
        let ([a, b, c, d], [e, f, g, h]) = (half(0), half(16));
        [a, b, c, d, e, f, g, h]
    }
    #[inline(always)]
    unsafe fn turn16(rows: &Upright) -> [int32x4_t; 4] {
        turn_fours([0, 1, 2, 3].map(|r| vreinterpretq_s32_u8(vld1q_u8(rows.row(r)))))
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> int32x4_t {
        vdupq_n_s32(x)
    }
    #[inline(always)]
    unsafe fn dot4<const SIGNED: bool>(acc: int32x4_t, w: int32x4_t, x: int32x4_t) -> int32x4_t {
        vaddq_s32(acc, dot_128(vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x)))
    }
    #[inline(always)]
    unsafe fn dot2(acc: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        let (a, b) = (vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b));
        let low = vmull_s16(vget_low_s16(a), vget_low_s16(b));
        vaddq_s32(acc, vpaddq_s32(low, vmull_high_s16(a, b)))
    }
}
