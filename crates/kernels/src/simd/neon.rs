//! 64-bit ARM.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{Isa, Simd};

/// Four values in a 128-bit register.
#[derive(Clone, Copy)]
pub(crate) struct Neon;

/// Widens four halves: the instruction is part of every ARMv8, its intrinsic came late to Rust.
#[inline(always)]
unsafe fn widen_f16(h: uint16x4_t) -> float32x4_t {
    let f: float32x4_t;
    asm!("fcvtl {f:v}.4s, {h:v}.4h", f = lateout(vreg) f, h = in(vreg) h,
        options(pure, nomem, nostack, preserves_flags));
    f
}

impl Simd for Neon {
    type V = float32x4_t;
    const ISA: Isa = Isa::Neon;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        vdupq_n_f32(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        vreinterpretq_f32_u8(vld1q_u8(p.cast()))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        vst1q_u8(p.cast(), vreinterpretq_u8_f32(v));
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::V {
        widen_f16(vreinterpret_u16_u8(vld1_u8(p)))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self::V {
        vreinterpretq_f32_u32(vshll_n_u16::<16>(vreinterpret_u16_u8(vld1_u8(p))))
    }
    #[inline(always)]
    unsafe fn split_bf16(v: Self::V) -> (Self::V, Self::V) {
        let v = vreinterpretq_u32_f32(v);
        let upper = vandq_u32(v, vdupq_n_u32(0xffff_0000));
        (vreinterpretq_f32_u32(vshlq_n_u32::<16>(v)), vreinterpretq_f32_u32(upper))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self::V {
        let bytes = vcreate_s8(u64::from(p.cast::<u32>().read_unaligned()));
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))))
    }
    #[inline(always)]
    unsafe fn from_i32(v: Self::I) -> Self::V {
        vcvtq_f32_s32(v)
    }
    #[inline(always)]
    unsafe fn to_i32(v: Self::V) -> Self::I {
        vcvtnq_s32_f32(v)
    }
    #[inline(always)]
    unsafe fn as_i32(v: Self::V) -> Self::I {
        vreinterpretq_s32_f32(v)
    }
    #[inline(always)]
    unsafe fn as_f32(v: Self::I) -> Self::V {
        vreinterpretq_f32_s32(v)
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut u8, v: Self::V) {
        let words = vmovn_s32(vcvtnq_s32_f32(v));
        let bytes = vmovn_s16(vcombine_s16(words, words));
        let bytes = vget_lane_s32::<0>(vreinterpret_s32_s8(bytes));
        p.cast::<i32>().write_unaligned(bytes);
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        vaddq_f32(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        vsubq_f32(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        vmulq_f32(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        vdivq_f32(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        vfmaq_f32(c, a, b)
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        vmaxq_f32(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        vminq_f32(a, b)
    }
    #[inline(always)]
    unsafe fn zero_if_less(a: Self::V, b: Self::V, v: Self::V) -> Self::V {
        vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vcltq_f32(a, b)))
    }
    #[inline(always)]
    unsafe fn scale_pow2(v: Self::V, n: Self::V) -> Self::V {
        let n = vcvtq_s32_f32(n);
        let half = vshrq_n_s32::<1>(n);
        let bias = vdupq_n_s32(127);
        let a = vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(half, bias)));
        let b = vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vsubq_s32(n, half), bias)));
        vmulq_f32(vmulq_f32(v, a), b)
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(readonly, nostack, preserves_flags));
    }
    #[inline(always)]
    unsafe fn prefetch_far(p: *const u8) {
        asm!("prfm pldl2keep, [{p}]", p = in(reg) p, options(readonly, nostack, preserves_flags));
    }
    #[inline(always)]
    unsafe fn prefetch_to_write(p: *const u8) {
        asm!("prfm pstl1keep, [{p}]", p = in(reg) p, options(readonly, nostack, preserves_flags));
    }
    #[inline(always)]
    unsafe fn swap<const L: usize>(a: Self::V, b: Self::V) -> (Self::V, Self::V) {
        if L == 1 {
            (vtrn1q_f32(a, b), vtrn2q_f32(a, b))
        } else {
            let (a, b) = (vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b));
            (vreinterpretq_f32_f64(vtrn1q_f64(a, b)), vreinterpretq_f32_f64(vtrn2q_f64(a, b)))
        }
    }
}
