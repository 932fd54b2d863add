//! Codes and sums as arrays.

use super::bytes::{Bytes, Codes, Upright, pair_of_halves};
use super::portable::widen_half;
use super::{Isa, Portable};

const N: usize = Isa::Portable.lanes();

#[inline(always)]
fn zip(a: [u8; 32], b: [u8; 32], f: impl Fn(u8, u8) -> u8) -> [u8; 32] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn zip8(a: [f32; 8], b: [f32; 8], f: impl Fn(f32, f32) -> f32) -> [f32; 8] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Codes for Portable {
    type B = [u8; 32];
    type From = *const u8;

    #[inline(always)]
    unsafe fn skip(from: *const u8, bytes: usize) -> *const u8 {
        from.add(bytes)
    }
    #[inline(always)]
    unsafe fn bits(from: *const u8) -> [u8; 32] {
        Self::spread_bits(from.cast::<u32>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn load32(p: *const u8) -> [u8; 32] {
        p.cast::<[u8; 32]>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn nibbles(p: *const u8) -> [u8; 32] {
        let bytes = p.cast::<[u8; 16]>().read_unaligned();
        std::array::from_fn(|i| if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 })
    }
    #[inline(always)]
    unsafe fn splat_byte(x: u8) -> [u8; 32] {
        [x; 32]
    }
    #[inline(always)]
    unsafe fn and(a: [u8; 32], b: [u8; 32]) -> [u8; 32] {
        zip(a, b, |a, b| a & b)
    }
    #[inline(always)]
    unsafe fn or(a: [u8; 32], b: [u8; 32]) -> [u8; 32] {
        zip(a, b, |a, b| a | b)
    }
    #[inline(always)]
    unsafe fn shr<const SHIFT: i32>(v: [u8; 32]) -> [u8; 32] {
        v.map(|x| x >> SHIFT)
    }
    #[inline(always)]
    unsafe fn shl<const SHIFT: i32>(v: [u8; 32]) -> [u8; 32] {
        v.map(|x| x << SHIFT)
    }
    #[inline(always)]
    unsafe fn lookup(table: &[i8; 16], i: [u8; 32]) -> [u8; 32] {
        i.map(|i| table[usize::from(i & 15)] as u8)
    }
}

impl Bytes for Portable {
    type F = [f32; 8];
    type I = [i32; N];
    const BIASED: bool = false;
    pair_of_halves!();
    type H = [i16; 16];
    type W = [i32; 8];

    #[inline(always)]
    unsafe fn widen_levels(bytes: [u64; 2]) -> [i16; 16] {
        super::bytes::widened(bytes)
    }
    #[inline(always)]
    unsafe fn dot_levels(levels: [i16; 16], x: *const i16, n: usize) -> [f32; 8] {
        let mut sums = [0; 8];
        for (i, level) in levels.into_iter().enumerate().take(n) {
            sums[i % 8] += i32::from(level) * i32::from(x.add(i).read_unaligned());
        }
        sums.map(|sum| sum as f32)
    }
    #[inline(always)]
    unsafe fn zero_whole() -> [i32; 8] {
        [0; 8]
    }
    #[inline(always)]
    unsafe fn add_pair<const SMALL: bool>(
        mut acc: [i32; 8],
        a: [u8; 32],
        b: [u8; 32],
        x: *const u8,
        levels: [i16; 16],
        pair: usize,
    ) -> [i32; 8] {
        for (half, codes) in [a, b].into_iter().enumerate() {
            let x = x.add(32 * half).cast::<[u8; 32]>().read_unaligned();
            for quarter in 0..2 {
                let level = levels[if SMALL { 4 * pair + 2 * half + quarter } else { 2 * pair + half }];
                for i in 0..16 {
                    let at = 16 * quarter + i;
                    acc[i % 8] += i32::from(level) * i32::from(i16::from(codes[at] as i8) * i16::from(x[at] as i8));
                }
            }
        }
        acc
    }
    #[inline(always)]
    unsafe fn sum_whole(acc: [i32; 8]) -> [f32; 8] {
        acc.map(|sum| sum as f32)
    }

    #[inline(always)]
    unsafe fn store32(p: *mut u8, v: [u8; 32]) {
        p.cast::<[u8; 32]>().write_unaligned(v);
    }
    #[inline(always)]
    unsafe fn xor(a: [u8; 32], b: [u8; 32]) -> [u8; 32] {
        zip(a, b, |a, b| a ^ b)
    }
    #[inline(always)]
    unsafe fn add_bytes(a: [u8; 32], b: [u8; 32]) -> [u8; 32] {
        zip(a, b, u8::wrapping_add)
    }
    #[inline(always)]
    unsafe fn sub_bytes(a: [u8; 32], b: [u8; 32]) -> [u8; 32] {
        zip(a, b, u8::wrapping_sub)
    }
    #[inline(always)]
    unsafe fn spread_bits(bits: u32) -> [u8; 32] {
        std::array::from_fn(|i| if bits >> i & 1 == 1 { 255 } else { 0 })
    }
    #[inline(always)]
    unsafe fn dot_codes(w: [u8; 32], x: [u8; 32]) -> [f32; 8] {
        Self::dot_signed(w, x)
    }
    #[inline(always)]
    unsafe fn dot_signed(w: [u8; 32], x: [u8; 32]) -> [f32; 8] {
        // Which four of the sixteen bytes of its half a value gets is free: strides suit vectors.
        let product = |i: usize| i32::from(i16::from(w[i] as i8) * i16::from(x[i] as i8));
        std::array::from_fn(|i| {
            let i = i % 4 + i / 4 * 16;
            (product(i) + product(i + 4) + product(i + 8) + product(i + 12)) as f32
        })
    }
    #[inline(always)]
    unsafe fn load8(p: *const f32) -> [f32; 8] {
        p.cast::<[f32; 8]>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store8(p: *mut f32, v: [f32; 8]) {
        p.cast::<[f32; 8]>().write_unaligned(v);
    }
    #[inline(always)]
    unsafe fn splat8(x: f32) -> [f32; 8] {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn splat_pair(p: *const f32) -> [f32; 8] {
        let [a, b] = p.cast::<[f32; 2]>().read_unaligned();
        [a, a, a, a, b, b, b, b]
    }
    #[inline(always)]
    unsafe fn mul8(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        zip8(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn add8(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        zip8(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn fma8(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn sum8(v: [f32; 8]) -> f32 {
        let [a, b, c, d, e, f, g, h] = v;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
    #[inline(always)]
    unsafe fn widen_u8(bytes: u64) -> [f32; 8] {
        bytes.to_le_bytes().map(f32::from)
    }
    #[inline(always)]
    unsafe fn widen_i8(bytes: u64) -> [f32; 8] {
        bytes.to_le_bytes().map(|b| f32::from(b as i8))
    }
    #[inline(always)]
    unsafe fn widen_f16(halves: [u64; 2]) -> [f32; 8] {
        std::array::from_fn(|i| widen_half((halves[i / 4] >> (16 * (i % 4))) as u16))
    }
    #[inline(always)]
    unsafe fn load_i32(p: *const u8) -> [i32; N] {
        p.cast::<[i32; N]>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store_i32(p: *mut u8, v: [i32; N]) {
        p.cast::<[i32; N]>().write_unaligned(v);
    }
    #[inline(always)]
    unsafe fn and_i32(a: [i32; N], b: [i32; N]) -> [i32; N] {
        std::array::from_fn(|i| a[i] & b[i])
    }
    #[inline(always)]
    unsafe fn or_i32(a: [i32; N], b: [i32; N]) -> [i32; N] {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    unsafe fn add_i32(a: [i32; N], b: [i32; N]) -> [i32; N] {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    unsafe fn mul_i32(a: [i32; N], b: [i32; N]) -> [i32; N] {
        std::array::from_fn(|i| a[i].wrapping_mul(b[i]))
    }
    #[inline(always)]
    unsafe fn max_i32(a: [i32; N], b: [i32; N]) -> [i32; N] {
        std::array::from_fn(|i| a[i].max(b[i]))
    }
    #[inline(always)]
    unsafe fn min_i32(a: [i32; N], b: [i32; N]) -> [i32; N] {
        std::array::from_fn(|i| a[i].min(b[i]))
    }
    #[inline(always)]
    unsafe fn shl_i32(v: [i32; N], n: i32) -> [i32; N] {
        v.map(|v| v << n)
    }
    #[inline(always)]
    unsafe fn shr_i32(v: [i32; N], n: i32) -> [i32; N] {
        v.map(|v| (v as u32 >> n) as i32)
    }
    #[inline(always)]
    unsafe fn sar_i32(v: [i32; N], n: i32) -> [i32; N] {
        v.map(|v| v >> n)
    }
    #[inline(always)]
    unsafe fn sub_bytes_i32(a: [i32; N], b: [i32; N]) -> [i32; N] {
        std::array::from_fn(|i| {
            let (a, b) = (a[i].to_ne_bytes(), b[i].to_ne_bytes());
            i32::from_ne_bytes(std::array::from_fn(|j| a[j].wrapping_sub(b[j])))
        })
    }
    #[inline(always)]
    unsafe fn lookup_i32(table: &[i8; 16], i: [i32; N]) -> [i32; N] {
        i.map(|i| i32::from_ne_bytes(i.to_ne_bytes().map(|i| table[usize::from(i & 15)] as u8)))
    }
    #[inline(always)]
    unsafe fn turn32(rows: &Upright) -> [[i32; N]; 8] {
        std::array::from_fn(|u| std::array::from_fn(|r| rows.row(r).cast::<i32>().add(u).read_unaligned()))
    }
    #[inline(always)]
    unsafe fn turn16(rows: &Upright) -> [[i32; N]; 4] {
        std::array::from_fn(|u| std::array::from_fn(|r| rows.row(r).cast::<i32>().add(u).read_unaligned()))
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> [i32; N] {
        [x; N]
    }
    #[inline(always)]
    unsafe fn dot4<const SIGNED: bool>(acc: [i32; N], w: [i32; N], x: [i32; N]) -> [i32; N] {
        let byte = |v: i32, at: u32| v << (24 - 8 * at) >> 24;
        std::array::from_fn(|i| {
            let product = |at| byte(w[i], at) * byte(x[i], at);
            acc[i] + product(0) + product(1) + product(2) + product(3)
        })
    }
    #[inline(always)]
    unsafe fn dot2(acc: [i32; N], a: [i32; N], b: [i32; N]) -> [i32; N] {
        std::array::from_fn(|i| acc[i] + (a[i] << 16 >> 16) * (b[i] << 16 >> 16) + (a[i] >> 16) * (b[i] >> 16))
    }
}
