//! Types with blocks of 32 values, of which each has its own scale.

#![allow(non_camel_case_types, reason = "the usual names")]

use super::{GROUPS, Quant, Sink};
use crate::DType;
use crate::simd::{Codes, Simd, Turned, Upright};

/// A type with small blocks.
pub(crate) trait Block {
    const DTYPE: DType;
    const SIGNED: bool = false;
    const OFFSET: u8 = 0;
    const MINS: bool = false;

    /// The codes of a block.
    ///
    /// # Safety
    /// As for [`Quant::codes`].
    unsafe fn block<C: Codes>(p: C::From) -> C::B;

    /// The scales and mins of up to eight blocks.
    ///
    /// # Safety
    /// As for [`Quant::scales`].
    #[inline(always)]
    unsafe fn block_scales<S: Simd>(p: *const u8, n: usize, s: *mut f32, m: *mut f32) {
        let stride = const { Self::DTYPE.block_bytes() };
        S::store8(s, S::widen_f16(halves(p, stride, n, 0)));
        if Self::MINS {
            // Files keep what is to be added.
            S::store8(m, S::widen_f16(halves(p.add(2), stride, n, 0x8000)));
        }
    }
}

/// The halves at the start of up to eight blocks, with the bits `flip` turned over, then zeros.
#[inline(always)]
unsafe fn halves(p: *const u8, stride: usize, n: usize, flip: u16) -> [u64; 2] {
    let mut all = [0; 2];
    for i in 0..n {
        let half = p.add(i * stride).cast::<u16>().read_unaligned() ^ flip;
        all[i / 4] |= u64::from(half) << (16 * (i % 4));
    }
    all
}

impl<T: Block> Quant for T {
    const DTYPE: DType = T::DTYPE;
    const GROUP: usize = 32;
    const SIGNED: bool = T::SIGNED;
    const OFFSET: u8 = T::OFFSET;
    const MINS: bool = T::MINS;
    const TURNS: bool = true;

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8, n: usize, s: &mut [f32; GROUPS], m: &mut [f32; GROUPS]) {
        T::block_scales::<S>(p, n, s.as_mut_ptr(), m.as_mut_ptr());
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(p: *const u8, n: usize, sink: &mut impl Sink<S>) {
        for i in 0..n {
            sink.take(i, T::block::<S>(p.add(i * const { T::DTYPE.block_bytes() })));
        }
    }

    #[inline(always)]
    unsafe fn turned<S: Simd>(from: Upright, n: usize, sink: &mut impl Sink<Turned<S>>) {
        for i in 0..n {
            let from = Turned::<S>::skip(from, i * const { T::DTYPE.block_bytes() });
            sink.take(i, T::block::<Turned<S>>(from));
        }
    }
}

/// Low nibbles are the first 16 values, high nibbles the others.
pub(crate) struct Q4_0;
impl Block for Q4_0 {
    const DTYPE: DType = DType::Q4_0;
    const OFFSET: u8 = 8;
    #[inline(always)]
    unsafe fn block<C: Codes>(p: C::From) -> C::B {
        C::nibbles(C::skip(p, 2))
    }
}

/// As `Q4_0`, behind a second half.
pub(crate) struct Q4_1;
impl Block for Q4_1 {
    const DTYPE: DType = DType::Q4_1;
    const MINS: bool = true;
    #[inline(always)]
    unsafe fn block<C: Codes>(p: C::From) -> C::B {
        C::nibbles(C::skip(p, 4))
    }
}

/// Four bytes with the fifth bits, then the nibbles.
#[inline(always)]
unsafe fn five_bits<C: Codes>(p: C::From) -> C::B {
    C::or(C::nibbles(C::skip(p, 4)), C::and(C::bits(p), C::splat_byte(16)))
}

pub(crate) struct Q5_0;
impl Block for Q5_0 {
    const DTYPE: DType = DType::Q5_0;
    const OFFSET: u8 = 16;
    #[inline(always)]
    unsafe fn block<C: Codes>(p: C::From) -> C::B {
        five_bits::<C>(C::skip(p, 2))
    }
}

pub(crate) struct Q5_1;
impl Block for Q5_1 {
    const DTYPE: DType = DType::Q5_1;
    const MINS: bool = true;
    #[inline(always)]
    unsafe fn block<C: Codes>(p: C::From) -> C::B {
        five_bits::<C>(C::skip(p, 4))
    }
}

pub(crate) struct Q8_0;
impl Block for Q8_0 {
    const DTYPE: DType = DType::Q8_0;
    const SIGNED: bool = true;
    #[inline(always)]
    unsafe fn block<C: Codes>(p: C::From) -> C::B {
        C::load32(C::skip(p, 2))
    }
}

/// What the codes of `IQ4_NL` and `IQ4_XS` stand for.
pub(crate) const NONLINEAR: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

pub(crate) struct IQ4_NL;
impl Block for IQ4_NL {
    const DTYPE: DType = DType::IQ4_NL;
    const SIGNED: bool = true;
    #[inline(always)]
    unsafe fn block<C: Codes>(p: C::From) -> C::B {
        C::lookup(&NONLINEAR, C::nibbles(C::skip(p, 2)))
    }
}

/// Twice the values of 4-bit floats with 2 bits of exponent and 1 of mantissa.
const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

pub(crate) struct MXFP4;
impl Block for MXFP4 {
    const DTYPE: DType = DType::MXFP4;
    const SIGNED: bool = true;
    #[inline(always)]
    unsafe fn block<C: Codes>(p: C::From) -> C::B {
        C::lookup(&E2M1, C::nibbles(C::skip(p, 1)))
    }

    /// Half of `2^(byte - 127)`, since the codes are doubled; the two least are subnormal.
    #[inline(always)]
    unsafe fn block_scales<S: Simd>(p: *const u8, n: usize, s: *mut f32, _: *mut f32) {
        for i in 0..8 {
            let byte = if i < n { u32::from(*p.add(17 * i)) } else { 0 };
            let bits = if byte < 2 { 0x20_0000 << byte } else { (byte - 1) << 23 };
            *s.add(i) = f32::from_bits(if i < n { bits } else { 0 });
        }
    }
}
