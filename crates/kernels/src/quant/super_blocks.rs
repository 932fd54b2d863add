//! Types with blocks of 256 values, whose scales are rounded too: the K types and `IQ4_XS`.

#![allow(non_camel_case_types, reason = "the usual names")]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

#[cfg(target_arch = "x86_64")]
use super::TwinLevels;
use super::blocks::NONLINEAR;
use super::{GROUPS, Levels, Quant, Sink};
use crate::DType;
use crate::simd::{Codes, Simd, Turned, Upright};

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

#[inline(always)]
unsafe fn half(p: *const u8) -> u16 {
    p.cast::<u16>().read_unaligned()
}

/// What all types here have in common: scales are levels, and codes unpack in the same way in a row as in rows turned.
macro_rules! super_block {
    ($name:ident) => {
        const DTYPE: DType = DType::$name;
        const LEVELS: bool = true;
        const TURNS: bool = true;

        #[inline(always)]
        unsafe fn scales<S: Simd>(p: *const u8, _: usize, s: &mut [f32; GROUPS], m: &mut [f32; GROUPS]) {
            Self::levels(p).spread::<S, Self>(s, m);
        }
        #[inline(always)]
        unsafe fn codes<S: Simd>(p: *const u8, _: usize, sink: &mut impl Sink<S>) {
            Self::unpack::<S>(p, sink);
        }
        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        unsafe fn twins<C: Codes<From = [*const u8; 2]>>(from: [*const u8; 2], sink: &mut impl Sink<C>) {
            Self::unpack::<C>(from, sink);
        }
        #[inline(always)]
        unsafe fn turned<S: Simd>(from: Upright, _: usize, sink: &mut impl Sink<Turned<S>>) {
            Self::unpack::<Turned<S>>(from, sink);
        }
    };
}

/// Takes 32 from each byte below 128, as signed bytes.
#[inline(always)]
fn less_32(bytes: u64) -> u64 {
    const TOP: u64 = 0x8080_8080_8080_8080;
    ((bytes | TOP) - 0x2020_2020_2020_2020) ^ TOP
}

/// Bit `FROM` of each byte, as bit `TO`.
#[inline(always)]
unsafe fn bit<C: Codes, const FROM: i32, const TO: i32>(v: C::B) -> C::B {
    let moved = match TO - FROM {
        1 => C::shl::<1>(v),
        2 => C::shl::<2>(v),
        3 => C::shl::<3>(v),
        4 => C::shl::<4>(v),
        -1 => C::shr::<1>(v),
        -2 => C::shr::<2>(v),
        -3 => C::shr::<3>(v),
        -4 => C::shr::<4>(v),
        -5 => C::shr::<5>(v),
        _ => v,
    };
    C::and(moved, C::splat_byte(1 << TO))
}

/// What [`Quant::wide`] is made of.
#[cfg(target_arch = "x86_64")]
mod wide {
    use std::arch::x86_64::*;

    #[inline(always)]
    pub unsafe fn load(p: *const u8) -> __m512i {
        _mm512_loadu_si512(p.cast())
    }
    /// The same 32 bytes in both halves.
    #[inline(always)]
    pub unsafe fn twice(p: *const u8) -> __m512i {
        _mm512_broadcast_i64x4(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    pub unsafe fn and(v: __m512i, mask: u8) -> __m512i {
        _mm512_and_si512(v, _mm512_set1_epi8(mask as i8))
    }
    /// Bytes shifted right by `N`, of which `MASK` stays.
    #[inline(always)]
    pub unsafe fn shr<const G: bool, const N: u32, const MASK: u8>(v: __m512i) -> __m512i {
        if G {
            return _mm512_gf2p8affine_epi64_epi8::<0>(v, _mm512_set1_epi64(const { bits(-(N as i32), MASK) }));
        }
        and(_mm512_srli_epi32::<N>(v), MASK)
    }
    /// Bytes of the first half shifted left by `A`, those of the second by `B`, right if that is negative, of which `MASK` stays.
    #[inline(always)]
    pub unsafe fn moved<const G: bool, const A: i32, const B: i32, const MASK: u8>(v: __m512i) -> __m512i {
        if G {
            let (a, b) = const { (bits(A, MASK), bits(B, MASK)) };
            return _mm512_gf2p8affine_epi64_epi8::<0>(v, _mm512_setr_epi64(a, a, a, a, b, b, b, b));
        }
        let by = _mm512_inserti64x4::<1>(_mm512_set1_epi32(A), _mm256_set1_epi32(B));
        and(_mm512_rolv_epi32(v, by), MASK)
    }
    /// The matrix over bits that shifts a byte left by so much, right if it is negative, and keeps the bits of `mask`: the
    /// highest of its bytes says which bits of a byte make up the lowest bit.
    const fn bits(by: i32, mask: u8) -> i64 {
        let (mut all, mut to) = (0, 0);
        while to < 8 {
            let from = to - by;
            if mask >> to & 1 == 1 && 0 <= from && from < 8 {
                all |= 1 << (8 * (7 - to) + from);
            }
            to += 1;
        }
        all
    }
    #[inline(always)]
    pub unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        _mm512_or_si512(a, b)
    }
}

/// The 6-bit scales and mins of `Q4_K` and `Q5_K`: two halves, then twelve bytes.
#[inline(always)]
unsafe fn six_bit_pairs(p: *const u8) -> Levels {
    let (pair, mixed) = (word(p.add(4)), u64::from(p.add(12).cast::<u32>().read_unaligned()));
    let (low, top) = (pair & LOW6, pair >> 2 & (LOW4 << 4 & LOW6));
    let scales = join(low, mixed & LOW4 | top);
    let mins = join(low >> 32, mixed >> 4 & LOW4 | top >> 32);
    Levels { scales: [scales, 0], mins: [mins, 0], d: half(p), dmin: half(p.add(2)) }
}

pub(crate) struct Q2_K;
impl Quant for Q2_K {
    super_block!(Q2_K);
    const MOST: u8 = 3;
    const GROUP: usize = 16;
    const MINS: bool = true;
    #[cfg(target_arch = "x86_64")]
    const WIDE: [[usize; 2]; 4] = [[0, 4], [1, 5], [2, 6], [3, 7]];

    #[inline(always)]
    unsafe fn levels(p: *const u8) -> Levels {
        let (a, b) = (word(p), word(p.add(8)));
        let (scales, mins) = ([a & LOW4, b & LOW4], [a >> 4 & LOW4, b >> 4 & LOW4]);
        Levels { scales, mins, d: half(p.add(80)), dmin: half(p.add(82)) }
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn wide<const G: bool>(p: *const u8) -> [__m512i; 4] {
        let q = wide::load(p.add(16));
        [wide::and(q, 3), wide::shr::<G, 2, 3>(q), wide::shr::<G, 4, 3>(q), wide::shr::<G, 6, 3>(q)]
    }
}

impl Q2_K {
    #[inline(always)]
    unsafe fn unpack<C: Codes>(p: C::From, sink: &mut impl Sink<C>) {
        let mask = C::splat_byte(3);
        for half in 0..2 {
            let q = C::load32(C::skip(p, 16 + 32 * half));
            sink.take(4 * half, C::and(q, mask));
            sink.take(4 * half + 1, C::and(C::shr::<2>(q), mask));
            sink.take(4 * half + 2, C::and(C::shr::<4>(q), mask));
            sink.take(4 * half + 3, C::shr::<6>(q));
        }
    }
}

/// High bits, low pairs of bits, scales, a half.
pub(crate) struct Q3_K;
impl Quant for Q3_K {
    super_block!(Q3_K);
    const MOST: u8 = 7;
    const GROUP: usize = 16;
    const OFFSET: u8 = 4;
    #[cfg(target_arch = "x86_64")]
    const WIDE: [[usize; 2]; 4] = [[0, 4], [1, 5], [2, 6], [3, 7]];

    #[inline(always)]
    unsafe fn levels(p: *const u8) -> Levels {
        let (low, top) = (word(p.add(96)), u64::from(p.add(104).cast::<u32>().read_unaligned()));
        let first = low & LOW4 | (join(top, top >> 2) & LOW2) << 4;
        let second = low >> 4 & LOW4 | (join(top >> 4, top >> 6) & LOW2) << 4;
        Levels { scales: [less_32(first), less_32(second)], mins: [0; 2], d: half(p.add(108)), dmin: 0 }
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn wide<const G: bool>(p: *const u8) -> [__m512i; 4] {
        let (high, q) = (wide::twice(p), wide::load(p.add(32)));
        [
            wide::or(wide::and(q, 3), wide::moved::<G, 2, -2, 4>(high)),
            wide::or(wide::shr::<G, 2, 3>(q), wide::moved::<G, 1, -3, 4>(high)),
            wide::or(wide::shr::<G, 4, 3>(q), wide::moved::<G, 0, -4, 4>(high)),
            wide::or(wide::shr::<G, 6, 3>(q), wide::moved::<G, -1, -5, 4>(high)),
        ]
    }
}

impl Q3_K {
    #[inline(always)]
    unsafe fn unpack<C: Codes>(p: C::From, sink: &mut impl Sink<C>) {
        let (mask, high) = (C::splat_byte(3), C::load32(p));
        let (a, b) = (C::load32(C::skip(p, 32)), C::load32(C::skip(p, 64)));
        sink.take(0, C::or(C::and(a, mask), bit::<C, 0, 2>(high)));
        sink.take(1, C::or(C::and(C::shr::<2>(a), mask), bit::<C, 1, 2>(high)));
        sink.take(2, C::or(C::and(C::shr::<4>(a), mask), bit::<C, 2, 2>(high)));
        sink.take(3, C::or(C::shr::<6>(a), bit::<C, 3, 2>(high)));
        sink.take(4, C::or(C::and(b, mask), bit::<C, 4, 2>(high)));
        sink.take(5, C::or(C::and(C::shr::<2>(b), mask), bit::<C, 5, 2>(high)));
        sink.take(6, C::or(C::and(C::shr::<4>(b), mask), bit::<C, 6, 2>(high)));
        sink.take(7, C::or(C::shr::<6>(b), bit::<C, 7, 2>(high)));
    }
}

pub(crate) struct Q4_K;
impl Quant for Q4_K {
    super_block!(Q4_K);
    const MOST: u8 = 15;
    const GROUP: usize = 32;
    const MINS: bool = true;
    #[cfg(target_arch = "x86_64")]
    const WIDE: [[usize; 2]; 4] = [[0, 2], [1, 3], [4, 6], [5, 7]];

    #[inline(always)]
    unsafe fn levels(p: *const u8) -> Levels {
        six_bit_pairs(p)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn twin_levels(p: [*const u8; 2]) -> TwinLevels {
        TwinLevels::of_six_bit_pairs(p)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn wide<const G: bool>(p: *const u8) -> [__m512i; 4] {
        let (a, b) = (wide::load(p.add(16)), wide::load(p.add(80)));
        [wide::and(a, 15), wide::shr::<G, 4, 15>(a), wide::and(b, 15), wide::shr::<G, 4, 15>(b)]
    }
}

impl Q4_K {
    #[inline(always)]
    unsafe fn unpack<C: Codes>(p: C::From, sink: &mut impl Sink<C>) {
        for pair in 0..4 {
            let q = C::load32(C::skip(p, 16 + 32 * pair));
            sink.take(2 * pair, C::and(q, C::splat_byte(15)));
            sink.take(2 * pair + 1, C::shr::<4>(q));
        }
    }
}

/// Two halves, scales, fifth bits, nibbles.
pub(crate) struct Q5_K;
impl Quant for Q5_K {
    super_block!(Q5_K);
    const MOST: u8 = 31;
    const GROUP: usize = 32;
    const MINS: bool = true;
    #[cfg(target_arch = "x86_64")]
    const WIDE: [[usize; 2]; 4] = [[0, 2], [1, 3], [4, 6], [5, 7]];

    #[inline(always)]
    unsafe fn levels(p: *const u8) -> Levels {
        six_bit_pairs(p)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn twin_levels(p: [*const u8; 2]) -> TwinLevels {
        TwinLevels::of_six_bit_pairs(p)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn wide<const G: bool>(p: *const u8) -> [__m512i; 4] {
        let (high, a, b) = (wide::twice(p.add(16)), wide::load(p.add(48)), wide::load(p.add(112)));
        [
            wide::or(wide::and(a, 15), wide::moved::<G, 4, 2, 16>(high)),
            wide::or(wide::shr::<G, 4, 15>(a), wide::moved::<G, 3, 1, 16>(high)),
            wide::or(wide::and(b, 15), wide::moved::<G, 0, -2, 16>(high)),
            wide::or(wide::shr::<G, 4, 15>(b), wide::moved::<G, -1, -3, 16>(high)),
        ]
    }
}

impl Q5_K {
    #[inline(always)]
    unsafe fn unpack<C: Codes>(p: C::From, sink: &mut impl Sink<C>) {
        let high = C::load32(C::skip(p, 16));
        macro_rules! pairs {
            ($($pair:literal $low:literal $high:literal)*) => {$(
                let q = C::load32(C::skip(p, 48 + 32 * $pair));
                sink.take($low, C::or(C::and(q, C::splat_byte(15)), bit::<C, $low, 4>(high)));
                sink.take($high, C::or(C::shr::<4>(q), bit::<C, $high, 4>(high)));
            )*};
        }
        pairs!(0 0 1 1 2 3 2 4 5 3 6 7);
    }
}

/// Nibbles, upper pairs of bits, scales, a half.
pub(crate) struct Q6_K;
impl Quant for Q6_K {
    super_block!(Q6_K);
    const MOST: u8 = 63;
    const GROUP: usize = 16;
    const OFFSET: u8 = 32;

    #[inline(always)]
    unsafe fn levels(p: *const u8) -> Levels {
        Levels { scales: [word(p.add(192)), word(p.add(200))], mins: [0; 2], d: half(p.add(208)), dmin: 0 }
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn wide<const G: bool>(p: *const u8) -> [__m512i; 4] {
        let (a, b) = (wide::load(p), wide::load(p.add(64)));
        let (low, high) = (wide::twice(p.add(128)), wide::twice(p.add(160)));
        [
            wide::or(wide::and(a, 15), wide::moved::<G, 4, 2, 48>(low)),
            wide::or(wide::shr::<G, 4, 15>(a), wide::moved::<G, 0, -2, 48>(low)),
            wide::or(wide::and(b, 15), wide::moved::<G, 4, 2, 48>(high)),
            wide::or(wide::shr::<G, 4, 15>(b), wide::moved::<G, 0, -2, 48>(high)),
        ]
    }
}

impl Q6_K {
    #[inline(always)]
    unsafe fn unpack<C: Codes>(p: C::From, sink: &mut impl Sink<C>) {
        let (low, top) = (C::splat_byte(0x0f), C::splat_byte(0x30));
        for half in 0..2 {
            let (a, b) = (C::load32(C::skip(p, 64 * half)), C::load32(C::skip(p, 64 * half + 32)));
            let high = C::load32(C::skip(p, 128 + 32 * half));
            sink.take(4 * half, C::or(C::and(a, low), C::and(C::shl::<4>(high), top)));
            sink.take(4 * half + 1, C::or(C::and(b, low), C::and(C::shl::<2>(high), top)));
            sink.take(4 * half + 2, C::or(C::shr::<4>(a), C::and(high, top)));
            sink.take(4 * half + 3, C::or(C::shr::<4>(b), C::and(C::shr::<2>(high), top)));
        }
    }
}

/// A half, upper pairs of bits of the scales, their nibbles, codes.
pub(crate) struct IQ4_XS;
impl Quant for IQ4_XS {
    super_block!(IQ4_XS);
    const GROUP: usize = 32;
    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn levels(p: *const u8) -> Levels {
        let top = u64::from(half(p.add(2)));
        let low = u64::from(p.add(4).cast::<u32>().read_unaligned());
        let mut scales = 0;
        for i in 0..8 {
            scales |= (low >> (4 * i) & 15 | (top >> (2 * i) & 3) << 4) << (8 * i);
        }
        Levels { scales: [less_32(scales), 0], mins: [0; 2], d: half(p), dmin: 0 }
    }
}

impl IQ4_XS {
    #[inline(always)]
    unsafe fn unpack<C: Codes>(p: C::From, sink: &mut impl Sink<C>) {
        for i in 0..8 {
            sink.take(i, C::lookup(&NONLINEAR, C::nibbles(C::skip(p, 8 + 16 * i))));
        }
    }
}
