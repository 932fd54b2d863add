//! The small IQ types: groups of values from codebooks, with signs or a shift.

#![allow(non_camel_case_types, reason = "the usual names")]

use half::f16;

use super::{GROUPS, Quant, Sink, grids};
use crate::DType;
use crate::simd::Simd;

/// Entries as bytes, the first level lowest: eight levels of two bits, or four of three.
const fn expand<const ENTRIES: usize>(grid: &[u16; ENTRIES], values: &[u8]) -> [u64; ENTRIES] {
    let (n, bits) = if values.len() == 3 { (8, 2) } else { (4, 3) };
    let mut all = [0; ENTRIES];
    let mut i = 0;
    while i < ENTRIES {
        let mut j = 0;
        while j < n {
            let level = grid[i] >> (bits * j) & ((1 << bits) - 1);
            all[i] |= (values[level as usize] as u64) << (8 * j);
            j += 1;
        }
        i += 1;
    }
    all
}

static GRID_2XXS: [u64; 256] = expand(&grids::IQ2_XXS, &[8, 25, 43]);
static GRID_2XS: [u64; 512] = expand(&grids::IQ2_XS, &[8, 25, 43]);
static GRID_2S: [u64; 1024] = expand(&grids::IQ2_S, &[8, 25, 43]);
static GRID_3XXS: [u64; 256] = expand(&grids::IQ3_XXS, &[4, 12, 20, 28, 36, 44, 52, 62]);
static GRID_3S: [u64; 512] = expand(&grids::IQ3_S, &[1, 3, 5, 7, 9, 11, 13, 15]);
/// Eight times -1, 0 and 1, so that a shift by an eighth is one.
static GRID_1: [u64; 2048] = expand(&grids::IQ1_S, &[248, 0, 8]);

#[inline(always)]
unsafe fn read<T>(p: *const u8) -> T {
    p.cast::<T>().read_unaligned()
}

#[inline(always)]
unsafe fn half(p: *const u8) -> f32 {
    f16::from_bits(read(p)).to_f32()
}

/// Nibble `i` of the bytes at `p`.
#[inline(always)]
unsafe fn nibble(p: *const u8, i: usize) -> f32 {
    f32::from(*p.add(i / 2) >> (4 * (i % 2)) & 15)
}

/// Thirty-two codes, negated where a sign is set.
#[inline(always)]
unsafe fn signed<S: Simd>(sizes: [u64; 4], signs: u32) -> S::B {
    let negative = S::spread_bits(signs);
    S::sub_bytes(S::xor(S::load32(sizes.as_ptr().cast()), negative), negative)
}

/// Eight signs from the seven that are kept: their number is even.
#[inline(always)]
fn even(signs: u32) -> u32 {
    let signs = signs & 127;
    signs | (signs.count_ones() & 1) << 7
}

/// Two groups of four as one of eight.
#[inline(always)]
fn fours(low: usize, high: usize, grid: &[u64]) -> u64 {
    grid[low] | grid[high] << 32
}

pub(crate) struct IQ2_XXS;
impl Quant for IQ2_XXS {
    const DTYPE: DType = DType::IQ2_XXS;
    const GROUP: usize = 32;
    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8, _: usize, s: &mut [f32; GROUPS], _: &mut [f32; GROUPS]) {
        for g in 0..8 {
            s[g] = half(p) * (0.5 + f32::from(*p.add(9 + 8 * g) >> 4)) * 0.25;
        }
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(p: *const u8, _: usize, sink: &mut impl Sink<S>) {
        for g in 0..8 {
            let [a, b, c, d]: [u8; 4] = read(p.add(2 + 8 * g));
            let packed: u32 = read(p.add(6 + 8 * g));
            let signs = even(packed) | even(packed >> 7) << 8 | even(packed >> 14) << 16 | even(packed >> 21) << 24;
            let sizes = [a, b, c, d].map(|i| GRID_2XXS[usize::from(i)]);
            sink.take(g, signed::<S>(sizes, signs));
        }
    }
}

pub(crate) struct IQ2_XS;
impl Quant for IQ2_XS {
    const DTYPE: DType = DType::IQ2_XS;
    const GROUP: usize = 16;
    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8, _: usize, s: &mut [f32; GROUPS], _: &mut [f32; GROUPS]) {
        for g in 0..16 {
            s[g] = half(p) * (0.5 + nibble(p.add(66), g)) * 0.25;
        }
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(p: *const u8, _: usize, sink: &mut impl Sink<S>) {
        for g in 0..8 {
            let packed: [u16; 4] = read(p.add(2 + 8 * g));
            let [a, b, c, d] = packed.map(|q| even(u32::from(q >> 9)));
            let sizes = packed.map(|q| GRID_2XS[usize::from(q & 511)]);
            sink.take(g, signed::<S>(sizes, a | b << 8 | c << 16 | d << 24));
        }
    }
}

pub(crate) struct IQ2_S;
impl Quant for IQ2_S {
    const DTYPE: DType = DType::IQ2_S;
    const GROUP: usize = 16;
    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8, _: usize, s: &mut [f32; GROUPS], _: &mut [f32; GROUPS]) {
        for g in 0..16 {
            s[g] = half(p) * (0.5 + nibble(p.add(74), g)) * 0.25;
        }
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(p: *const u8, _: usize, sink: &mut impl Sink<S>) {
        for g in 0..8 {
            let (low, top): ([u8; 4], u8) = (read(p.add(2 + 4 * g)), *p.add(66 + g));
            let entry = |j: usize| usize::from(low[j]) | usize::from(top >> (2 * j) & 3) << 8;
            let sizes = [0, 1, 2, 3].map(|j| GRID_2S[entry(j)]);
            sink.take(g, signed::<S>(sizes, read(p.add(34 + 4 * g))));
        }
    }
}

pub(crate) struct IQ3_XXS;
impl Quant for IQ3_XXS {
    const DTYPE: DType = DType::IQ3_XXS;
    const GROUP: usize = 32;
    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8, _: usize, s: &mut [f32; GROUPS], _: &mut [f32; GROUPS]) {
        for g in 0..8 {
            s[g] = half(p) * (0.5 + f32::from(*p.add(69 + 4 * g) >> 4)) * 0.5;
        }
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(p: *const u8, _: usize, sink: &mut impl Sink<S>) {
        for g in 0..8 {
            let q: [u8; 8] = read(p.add(2 + 8 * g));
            let packed: u32 = read(p.add(66 + 4 * g));
            let signs = even(packed) | even(packed >> 7) << 8 | even(packed >> 14) << 16 | even(packed >> 21) << 24;
            let pair = |j: usize| fours(usize::from(q[2 * j]), usize::from(q[2 * j + 1]), &GRID_3XXS);
            sink.take(g, signed::<S>([0, 1, 2, 3].map(pair), signs));
        }
    }
}

pub(crate) struct IQ3_S;
impl Quant for IQ3_S {
    const DTYPE: DType = DType::IQ3_S;
    const GROUP: usize = 32;
    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8, _: usize, s: &mut [f32; GROUPS], _: &mut [f32; GROUPS]) {
        for g in 0..8 {
            s[g] = half(p) * (1.0 + 2.0 * nibble(p.add(106), g));
        }
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(p: *const u8, _: usize, sink: &mut impl Sink<S>) {
        for g in 0..8 {
            let (q, top): ([u8; 8], u8) = (read(p.add(2 + 8 * g)), *p.add(66 + g));
            let entry = |j: usize| usize::from(q[j]) | usize::from(top >> j & 1) << 8;
            let pair = |j: usize| fours(entry(2 * j), entry(2 * j + 1), &GRID_3S);
            sink.take(g, signed::<S>([0, 1, 2, 3].map(pair), read(p.add(74 + 4 * g))));
        }
    }
}

/// Thirty-two codes of the common codebook of the 1-bit types: bit `j` of `down` says that group `j`
/// of eight is shifted down, not up.
#[inline(always)]
unsafe fn shifted<S: Simd>(entries: [usize; 4], down: u32) -> S::B {
    let values = entries.map(|i| GRID_1[i]);
    let bits = [0, 1, 2, 3].map(|j| if down >> j & 1 == 1 { 0xff } else { 0 });
    let shift = S::or(S::spread_bits(u32::from_le_bytes(bits)), S::splat_byte(1));
    S::add_bytes(S::load32(values.as_ptr().cast()), shift)
}

pub(crate) struct IQ1_S;
impl Quant for IQ1_S {
    const DTYPE: DType = DType::IQ1_S;
    const GROUP: usize = 32;
    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8, _: usize, s: &mut [f32; GROUPS], _: &mut [f32; GROUPS]) {
        for g in 0..8 {
            let top: u16 = read(p.add(34 + 2 * g));
            s[g] = half(p) * f32::from(2 * (top >> 12 & 7) + 1) * 0.125;
        }
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(p: *const u8, _: usize, sink: &mut impl Sink<S>) {
        for g in 0..8 {
            let (low, top): ([u8; 4], u16) = (read(p.add(2 + 4 * g)), read(p.add(34 + 2 * g)));
            let entry = |j: usize| usize::from(low[j]) | usize::from(top >> (3 * j) & 7) << 8;
            let down = if top & 0x8000 == 0 { 0 } else { 15 };
            sink.take(g, shifted::<S>([0, 1, 2, 3].map(entry), down));
        }
    }
}

pub(crate) struct IQ1_M;
impl Quant for IQ1_M {
    const DTYPE: DType = DType::IQ1_M;
    const GROUP: usize = 16;
    const SIGNED: bool = true;

    /// The half is scattered over the upper nibbles of the scales.
    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8, _: usize, s: &mut [f32; GROUPS], _: &mut [f32; GROUPS]) {
        let words: [u16; 4] = read(p.add(48));
        let [a, b, c, d] = words;
        let half = f16::from_bits(a >> 12 | b >> 8 & 0xf0 | c >> 4 & 0xf00 | d & 0xf000).to_f32();
        for g in 0..16 {
            s[g] = half * f32::from(2 * (words[g / 4] >> (3 * (g % 4)) & 7) + 1) * 0.125;
        }
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(p: *const u8, _: usize, sink: &mut impl Sink<S>) {
        for g in 0..8 {
            let (low, top): ([u8; 4], u16) = (read(p.add(4 * g)), read(p.add(32 + 2 * g)));
            let entry = |j: usize| usize::from(low[j]) | usize::from(top >> (4 * j) & 7) << 8;
            let down = u32::from(top >> 3 & 1 | top >> 6 & 2 | top >> 9 & 4 | top >> 12 & 8);
            sink.take(g, shifted::<S>([0, 1, 2, 3].map(entry), down));
        }
    }
}
