//! Types with blocks of 256 values, whose scales are rounded too: the K types and `IQ4_XS`.

#![allow(non_camel_case_types, reason = "the usual names")]

use super::blocks::NONLINEAR;
use super::{GROUPS, Quant, Sink};
use crate::DType;
use crate::simd::Simd;

const LOW2: u64 = 0x0303_0303_0303_0303;
const LOW4: u64 = 0x0f0f_0f0f_0f0f_0f0f;
const LOW6: u64 = 0x3f3f_3f3f_3f3f_3f3f;

#[inline(always)]
unsafe fn word(p: *const u8) -> u64 {
    p.cast::<u64>().read_unaligned()
}

/// The bytes of `low`, then those of `high`.
#[inline(always)]
fn join(low: u64, high: u64) -> u64 {
    low & 0xffff_ffff | high << 32
}

/// Writes eight bytes times the half at `d`.
#[inline(always)]
unsafe fn scaled<S: Simd>(bytes: S::F, d: *const u8, out: *mut f32) {
    let half = d.cast::<u16>().read_unaligned();
    let d = S::widen_f16([u64::from(half) * 0x1_0001_0001_0001; 2]);
    S::store8(out, S::mul8(d, bytes));
}

/// Takes 32 from each byte below 128, as signed bytes.
#[inline(always)]
fn less_32(bytes: u64) -> u64 {
    const TOP: u64 = 0x8080_8080_8080_8080;
    ((bytes | TOP) - 0x2020_2020_2020_2020) ^ TOP
}

/// Bit `FROM` of each byte, as bit `TO`.
#[inline(always)]
unsafe fn bit<S: Simd, const FROM: i32, const TO: i32>(v: S::B) -> S::B {
    let moved = match TO - FROM {
        1 => S::shl::<1>(v),
        2 => S::shl::<2>(v),
        3 => S::shl::<3>(v),
        4 => S::shl::<4>(v),
        -1 => S::shr::<1>(v),
        -2 => S::shr::<2>(v),
        -3 => S::shr::<3>(v),
        -4 => S::shr::<4>(v),
        -5 => S::shr::<5>(v),
        _ => v,
    };
    S::and(moved, S::splat_byte(1 << TO))
}

/// The 6-bit scales and mins of `Q4_K` and `Q5_K`: two halves, then twelve bytes.
#[inline(always)]
unsafe fn six_bit_pairs<S: Simd>(p: *const u8, s: &mut [f32; GROUPS], m: &mut [f32; GROUPS]) {
    let (pair, mixed) = (word(p.add(4)), u64::from(p.add(12).cast::<u32>().read_unaligned()));
    let (low, top) = (pair & LOW6, pair >> 2 & (LOW4 << 4 & LOW6));
    let scales = join(low, mixed & LOW4 | top);
    let mins = join(low >> 32, mixed >> 4 & LOW4 | top >> 32);
    scaled::<S>(S::widen_u8(scales), p, s.as_mut_ptr());
    scaled::<S>(S::widen_u8(mins), p.add(2), m.as_mut_ptr());
}

pub(crate) struct Q2_K;
impl Quant for Q2_K {
    const DTYPE: DType = DType::Q2_K;
    const GROUP: usize = 16;
    const MINS: bool = true;

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8, _: usize, s: &mut [f32; GROUPS], m: &mut [f32; GROUPS]) {
        for half in 0..2 {
            let pairs = word(p.add(8 * half));
            scaled::<S>(S::widen_u8(pairs & LOW4), p.add(80), s.as_mut_ptr().add(8 * half));
            scaled::<S>(S::widen_u8(pairs >> 4 & LOW4), p.add(82), m.as_mut_ptr().add(8 * half));
        }
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(p: *const u8, _: usize, sink: &mut impl Sink<S>) {
        let mask = S::splat_byte(3);
        for half in 0..2 {
            let q = S::load32(p.add(16 + 32 * half));
            sink.take(4 * half, S::and(q, mask));
            sink.take(4 * half + 1, S::and(S::shr::<2>(q), mask));
            sink.take(4 * half + 2, S::and(S::shr::<4>(q), mask));
            sink.take(4 * half + 3, S::shr::<6>(q));
        }
    }
}

/// High bits, low pairs of bits, scales, a half.
pub(crate) struct Q3_K;
impl Quant for Q3_K {
    const DTYPE: DType = DType::Q3_K;
    const GROUP: usize = 16;
    const OFFSET: u8 = 4;

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8, _: usize, s: &mut [f32; GROUPS], _: &mut [f32; GROUPS]) {
        let (low, top) = (word(p.add(96)), u64::from(p.add(104).cast::<u32>().read_unaligned()));
        let first = low & LOW4 | (join(top, top >> 2) & LOW2) << 4;
        let second = low >> 4 & LOW4 | (join(top >> 4, top >> 6) & LOW2) << 4;
        scaled::<S>(S::widen_i8(less_32(first)), p.add(108), s.as_mut_ptr());
        scaled::<S>(S::widen_i8(less_32(second)), p.add(108), s.as_mut_ptr().add(8));
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(p: *const u8, _: usize, sink: &mut impl Sink<S>) {
        let (mask, high) = (S::splat_byte(3), S::load32(p));
        let (a, b) = (S::load32(p.add(32)), S::load32(p.add(64)));
        sink.take(0, S::or(S::and(a, mask), bit::<S, 0, 2>(high)));
        sink.take(1, S::or(S::and(S::shr::<2>(a), mask), bit::<S, 1, 2>(high)));
        sink.take(2, S::or(S::and(S::shr::<4>(a), mask), bit::<S, 2, 2>(high)));
        sink.take(3, S::or(S::shr::<6>(a), bit::<S, 3, 2>(high)));
        sink.take(4, S::or(S::and(b, mask), bit::<S, 4, 2>(high)));
        sink.take(5, S::or(S::and(S::shr::<2>(b), mask), bit::<S, 5, 2>(high)));
        sink.take(6, S::or(S::and(S::shr::<4>(b), mask), bit::<S, 6, 2>(high)));
        sink.take(7, S::or(S::shr::<6>(b), bit::<S, 7, 2>(high)));
    }
}

pub(crate) struct Q4_K;
impl Quant for Q4_K {
    const DTYPE: DType = DType::Q4_K;
    const GROUP: usize = 32;
    const MINS: bool = true;

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8, _: usize, s: &mut [f32; GROUPS], m: &mut [f32; GROUPS]) {
        six_bit_pairs::<S>(p, s, m);
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(p: *const u8, _: usize, sink: &mut impl Sink<S>) {
        for pair in 0..4 {
            let q = S::load32(p.add(16 + 32 * pair));
            sink.take(2 * pair, S::and(q, S::splat_byte(15)));
            sink.take(2 * pair + 1, S::shr::<4>(q));
        }
    }
}

/// Two halves, scales, fifth bits, nibbles.
pub(crate) struct Q5_K;
impl Quant for Q5_K {
    const DTYPE: DType = DType::Q5_K;
    const GROUP: usize = 32;
    const MINS: bool = true;

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8, _: usize, s: &mut [f32; GROUPS], m: &mut [f32; GROUPS]) {
        six_bit_pairs::<S>(p, s, m);
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(p: *const u8, _: usize, sink: &mut impl Sink<S>) {
        let high = S::load32(p.add(16));
        macro_rules! pairs {
            ($($pair:literal $low:literal $high:literal)*) => {$(
                let q = S::load32(p.add(48 + 32 * $pair));
                sink.take($low, S::or(S::and(q, S::splat_byte(15)), bit::<S, $low, 4>(high)));
                sink.take($high, S::or(S::shr::<4>(q), bit::<S, $high, 4>(high)));
            )*};
        }
        pairs!(0 0 1 1 2 3 2 4 5 3 6 7);
    }
}

/// Nibbles, upper pairs of bits, scales, a half.
pub(crate) struct Q6_K;
impl Quant for Q6_K {
    const DTYPE: DType = DType::Q6_K;
    const GROUP: usize = 16;
    const OFFSET: u8 = 32;

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8, _: usize, s: &mut [f32; GROUPS], _: &mut [f32; GROUPS]) {
        for half in 0..2 {
            let bytes = S::widen_i8(word(p.add(192 + 8 * half)));
            scaled::<S>(bytes, p.add(208), s.as_mut_ptr().add(8 * half));
        }
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(p: *const u8, _: usize, sink: &mut impl Sink<S>) {
        let (low, top) = (S::splat_byte(0x0f), S::splat_byte(0x30));
        for half in 0..2 {
            let (a, b) = (S::load32(p.add(64 * half)), S::load32(p.add(64 * half + 32)));
            let high = S::load32(p.add(128 + 32 * half));
            sink.take(4 * half, S::or(S::and(a, low), S::and(S::shl::<4>(high), top)));
            sink.take(4 * half + 1, S::or(S::and(b, low), S::and(S::shl::<2>(high), top)));
            sink.take(4 * half + 2, S::or(S::shr::<4>(a), S::and(high, top)));
            sink.take(4 * half + 3, S::or(S::shr::<4>(b), S::and(S::shr::<2>(high), top)));
        }
    }
}

/// A half, upper pairs of bits of the scales, their nibbles, codes.
pub(crate) struct IQ4_XS;
impl Quant for IQ4_XS {
    const DTYPE: DType = DType::IQ4_XS;
    const GROUP: usize = 32;
    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8, _: usize, s: &mut [f32; GROUPS], _: &mut [f32; GROUPS]) {
        let top = u64::from(p.add(2).cast::<u16>().read_unaligned());
        let low = u64::from(p.add(4).cast::<u32>().read_unaligned());
        let mut scales = 0;
        for i in 0..8 {
            scales |= (low >> (4 * i) & 15 | (top >> (2 * i) & 3) << 4) << (8 * i);
        }
        scaled::<S>(S::widen_i8(less_32(scales)), p, s.as_mut_ptr());
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(p: *const u8, _: usize, sink: &mut impl Sink<S>) {
        for i in 0..8 {
            sink.take(i, S::lookup(&NONLINEAR, S::nibbles(p.add(8 + 16 * i))));
        }
    }
}
