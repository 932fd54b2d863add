//! Vectors as arrays, for machines without a path of their own.

use super::{Isa, Simd};

/// Four values.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

const N: usize = Isa::Portable.lanes();

#[inline(always)]
fn zip(a: [f32; N], b: [f32; N], f: impl Fn(f32, f32) -> f32) -> [f32; N] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// Exactly the value of a half, without branches: the bits in their places, the exponent mended by
/// a product (which is right for subnormals too), and the highest exponent kept the highest.
#[inline(always)]
pub(super) fn widen_half(h: u16) -> f32 {
    let size = f32::from_bits(u32::from(h & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let special = if size >= 65536.0 { 0x7f80_0000 } else { 0 };
    f32::from_bits(size.to_bits() | special | u32::from(h & 0x8000) << 16)
}

impl Simd for Portable {
    type V = [f32; N];
    const ISA: Isa = Isa::Portable;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        p.cast::<Self::V>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        p.cast::<Self::V>().write_unaligned(v);
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::V {
        p.cast::<[u16; N]>().read_unaligned().map(widen_half)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self::V {
        p.cast::<[u16; N]>().read_unaligned().map(|h| f32::from_bits(u32::from(h) << 16))
    }
    #[inline(always)]
    unsafe fn split_bf16(v: Self::V) -> (Self::V, Self::V) {
        let halves = v.map(f32::to_bits);
        (halves.map(|h| f32::from_bits(h << 16)), halves.map(|h| f32::from_bits(h & 0xffff_0000)))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self::V {
        p.cast::<[i8; N]>().read_unaligned().map(f32::from)
    }
    #[inline(always)]
    unsafe fn from_i32(v: Self::I) -> Self::V {
        v.map(|x| x as f32)
    }
    #[inline(always)]
    unsafe fn to_i32(v: Self::V) -> Self::I {
        v.map(|x| x.round_ties_even() as i32)
    }
    #[inline(always)]
    unsafe fn as_i32(v: Self::V) -> Self::I {
        v.map(|x| x.to_bits() as i32)
    }
    #[inline(always)]
    unsafe fn as_f32(v: Self::I) -> Self::V {
        v.map(|x| f32::from_bits(x as u32))
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut u8, v: Self::V) {
        // Adding and taking away 1.5 * 2^23 rounds to a whole number, ties to even.
        let rounded = v.map(|x| ((x + 12_582_912.0) - 12_582_912.0) as i8 as u8);
        p.cast::<[u8; N]>().write_unaligned(rounded);
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Not `mul_add`, which is a slow call where the machine cannot do it.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn zero_if_less(a: Self::V, b: Self::V, v: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] < b[i] { 0.0 } else { v[i] })
    }
    #[inline(always)]
    unsafe fn scale_pow2(v: Self::V, n: Self::V) -> Self::V {
        zip(v, n, |v, n| {
            let n = n as i32;
            let pow2 = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
            v * pow2(n >> 1) * pow2(n - (n >> 1))
        })
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
    #[inline(always)]
    unsafe fn prefetch_far(_: *const u8) {}
    #[inline(always)]
    unsafe fn prefetch_to_write(_: *const u8) {}
    #[inline(always)]
    unsafe fn swap<const L: usize>(a: Self::V, b: Self::V) -> (Self::V, Self::V) {
        (
            std::array::from_fn(|i| if i & L == 0 { a[i] } else { b[i - L] }),
            std::array::from_fn(|i| if i & L == 0 { a[i + L] } else { b[i] }),
        )
    }
}
