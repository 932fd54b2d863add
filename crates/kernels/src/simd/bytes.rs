//! What products of quantised blocks are made of: thirty-two codes at a time, and integer sums.

use super::MAX_LANES;

/// What unpacking codes is made of: bytes of one row side by side, or of several rows turned upright ([`Turned`](super::Turned)).
///
/// # Safety
/// As for [`Simd`](super::Simd): the machine must have the instructions, and a source be good for the bytes that are read.
#[allow(clippy::missing_safety_doc, reason = "stated once, above")]
pub(crate) trait Codes: Copy {
    /// 32 bytes, of a row or of each row.
    type B: Copy;
    /// Where a block lies, in a row or in each row.
    type From: Copy;

    /// The source `bytes` further on.
    unsafe fn skip(from: Self::From, bytes: usize) -> Self::From;
    unsafe fn load32(from: Self::From) -> Self::B;
    /// The low nibbles of 16 bytes, then their high nibbles.
    unsafe fn nibbles(from: Self::From) -> Self::B;
    /// Byte `i` is 255 if bit `i` of the four bytes is set, else 0.
    unsafe fn bits(from: Self::From) -> Self::B;
    unsafe fn splat_byte(x: u8) -> Self::B;
    unsafe fn and(a: Self::B, b: Self::B) -> Self::B;
    unsafe fn or(a: Self::B, b: Self::B) -> Self::B;
    /// Each byte shifted right by `N`, zeros from above.
    unsafe fn shr<const N: i32>(v: Self::B) -> Self::B;
    /// Each byte shifted left by `N`, zeros from below.
    unsafe fn shl<const N: i32>(v: Self::B) -> Self::B;
    /// `table[i]` for each byte `i`, which is below 16.
    unsafe fn lookup(table: &[i8; 16], i: Self::B) -> Self::B;
}

/// A place in each of as many rows as vectors have lanes.
#[derive(Clone, Copy)]
pub(crate) struct Upright {
    rows: *const [*const u8; MAX_LANES],
    at: usize,
}

impl Upright {
    /// The beginnings of the rows, which must outlive this.
    #[inline(always)]
    pub(crate) fn new(rows: &[*const u8; MAX_LANES]) -> Self {
        Self { rows, at: 0 }
    }

    /// The place in row `r`.
    #[inline(always)]
    pub(super) unsafe fn row(&self, r: usize) -> *const u8 {
        (&*self.rows)[r].add(self.at)
    }
}

/// Rows of codes turned upright: each vector holds four bytes of all rows.
#[derive(Clone, Copy)]
pub(crate) struct Turned<S>(std::marker::PhantomData<S>);

/// Every byte of a lane.
const fn each(byte: u8) -> i32 {
    i32::from_ne_bytes([byte; 4])
}

#[allow(clippy::needless_range_loop, reason = "loops over registers are unrolled by their counters")]
impl<S: Bytes> Codes for Turned<S> {
    // Loops, since a closure given to a library function need not become part of the kernel.

    type B = [S::I; 8];
    type From = Upright;

    #[inline(always)]
    unsafe fn skip(from: Upright, bytes: usize) -> Upright {
        Upright { at: from.at + bytes, ..from }
    }
    #[inline(always)]
    unsafe fn load32(from: Upright) -> Self::B {
        S::turn32(&from)
    }
    #[inline(always)]
    unsafe fn nibbles(from: Upright) -> Self::B {
        let [a, b, c, d] = S::turn16(&from);
        let mask = S::splat_i32(each(15));
        let mut all = [a, b, c, d, S::shr_i32(a, 4), S::shr_i32(b, 4), S::shr_i32(c, 4), S::shr_i32(d, 4)];
        for v in &mut all {
            *v = S::and_i32(*v, mask);
        }
        all
    }
    #[inline(always)]
    unsafe fn bits(from: Upright) -> Self::B {
        let mut words = [0i32; MAX_LANES];
        for (r, word) in words.iter_mut().enumerate() {
            *word = from.row(r).cast::<i32>().read_unaligned();
        }
        let words = S::load_i32(words.as_ptr().cast());
        let mut all = [words; 8];
        for (u, v) in all.iter_mut().enumerate() {
            // Four bits, then one in each byte, then all bits of the byte.
            let four = S::and_i32(S::shr_i32(words, 4 * u as i32), S::splat_i32(15));
            let apart = S::and_i32(S::mul_i32(four, S::splat_i32(0x20_4081)), S::splat_i32(each(1)));
            *v = S::mul_i32(apart, S::splat_i32(255));
        }
        all
    }
    #[inline(always)]
    unsafe fn splat_byte(x: u8) -> Self::B {
        [S::splat_i32(each(x)); 8]
    }
    #[inline(always)]
    unsafe fn and(mut a: Self::B, b: Self::B) -> Self::B {
        for i in 0..8 {
            a[i] = S::and_i32(a[i], b[i]);
        }
        a
    }
    #[inline(always)]
    unsafe fn or(mut a: Self::B, b: Self::B) -> Self::B {
        for i in 0..8 {
            a[i] = S::or_i32(a[i], b[i]);
        }
        a
    }
    #[inline(always)]
    unsafe fn shr<const N: i32>(mut v: Self::B) -> Self::B {
        let mask = S::splat_i32(const { each(0xff >> N) });
        for v in &mut v {
            *v = S::and_i32(S::shr_i32(*v, N), mask);
        }
        v
    }
    #[inline(always)]
    unsafe fn shl<const N: i32>(mut v: Self::B) -> Self::B {
        let mask = S::splat_i32(const { each(0xff << N) });
        for v in &mut v {
            *v = S::and_i32(S::shl_i32(*v, N), mask);
        }
        v
    }
    #[inline(always)]
    unsafe fn lookup(table: &[i8; 16], mut i: Self::B) -> Self::B {
        for i in &mut i {
            *i = S::lookup_i32(table, *i);
        }
        i
    }
}

/// A vector of 32 bytes (one group of codes or of rounded activations), eight `f32` to gather their
/// products in, and as many `i32` as [`Simd`](super::Simd) has lanes. Pointers may lie at any address.
///
/// # Safety
/// As for [`Simd`](super::Simd): the machine must have the instructions, and a pointer be good for
/// the bytes that are read or written.
#[allow(clippy::missing_safety_doc, reason = "stated once, above")]
pub(crate) trait Bytes: Codes<From = *const u8> {
    /// 8 values of `f32`.
    type F: Copy;
    /// 16 values of `f32`, in which the products of two `B` are gathered.
    type P: Copy;
    /// 16 halves, signed.
    type H: Copy;
    /// Some values of `i32`, in which whole products are gathered.
    type W: Copy;
    /// `LANES` values of `i32`.
    type I: Copy;
    /// Whether [`Bytes::dot4`] of signed codes wants activations with 128 added.
    const BIASED: bool;

    unsafe fn store32(p: *mut u8, v: Self::B);
    unsafe fn xor(a: Self::B, b: Self::B) -> Self::B;
    /// `a + b`, wrapping.
    unsafe fn add_bytes(a: Self::B, b: Self::B) -> Self::B;
    /// `a - b`, wrapping.
    unsafe fn sub_bytes(a: Self::B, b: Self::B) -> Self::B;
    /// Byte `i` is 255 if bit `i` is set, else 0.
    unsafe fn spread_bits(bits: u32) -> Self::B;

    /// Products of unsigned codes up to 127 with signed bytes: each value gets four of them, the
    /// first four values those of bytes 0 to 15.
    unsafe fn dot_codes(w: Self::B, x: Self::B) -> Self::F;
    /// As [`Bytes::dot_codes`], with signed codes; `x` must not hold -128.
    unsafe fn dot_signed(w: Self::B, x: Self::B) -> Self::F;

    unsafe fn zero_pair() -> Self::P;
    /// Adds the products of 64 codes, those of `a` and then of `b`, with the 64 signed bytes at `x`, each times the scale of
    /// its group: two of 32 codes, or (`SMALL`) four of 16. Codes are signed or else unsigned up to 127; `x` must not hold
    /// -128.
    unsafe fn fma_pair<const SIGNED: bool, const SMALL: bool>(
        acc: Self::P,
        a: Self::B,
        b: Self::B,
        x: *const u8,
        scales: *const f32,
    ) -> Self::P;
    unsafe fn sum_pair(acc: Self::P) -> Self::F;

    // Whole sums of one row at a time, with `H` and `W`: unless [`Isa::takes_two_rows`](super::Isa::takes_two_rows).

    /// Sixteen signed bytes, widened.
    unsafe fn widen_levels(_bytes: [u64; 2]) -> Self::H {
        unreachable!("only asked for where rows are taken one by one")
    }
    /// The products of the first `n` of 16 halves (8 or 16) with those at `x`, in eight sums.
    unsafe fn dot_levels(_levels: Self::H, _x: *const i16, _n: usize) -> Self::F {
        unreachable!("only asked for where rows are taken one by one")
    }
    unsafe fn zero_whole() -> Self::W {
        unreachable!("only asked for where rows are taken one by one")
    }
    /// Adds the products of pair `pair` of 64 codes as [`Bytes::fma_pair`] does, but each times the level of its group: the
    /// `2 pair + i`-th of groups of 32, the `4 pair + i`-th of groups of 16. Codes are unsigned, up to 127.
    unsafe fn add_pair<const SMALL: bool>(
        _acc: Self::W,
        _a: Self::B,
        _b: Self::B,
        _x: *const u8,
        _levels: Self::H,
        _pair: usize,
    ) -> Self::W {
        unreachable!("only asked for where rows are taken one by one")
    }
    /// The sums as eight values.
    unsafe fn sum_whole(_acc: Self::W) -> Self::F {
        unreachable!("only asked for where rows are taken one by one")
    }

    unsafe fn load8(p: *const f32) -> Self::F;
    unsafe fn store8(p: *mut f32, v: Self::F);
    unsafe fn splat8(x: f32) -> Self::F;
    /// Four times `p[0]`, then four times `p[1]`.
    unsafe fn splat_pair(p: *const f32) -> Self::F;
    unsafe fn mul8(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn add8(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`; rounded once, except in portable code.
    unsafe fn fma8(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    unsafe fn sum8(v: Self::F) -> f32;
    /// Eight unsigned bytes, the lowest first.
    unsafe fn widen_u8(bytes: u64) -> Self::F;
    /// Eight signed bytes, the lowest first.
    unsafe fn widen_i8(bytes: u64) -> Self::F;
    /// Eight halves, the lowest first.
    unsafe fn widen_f16(halves: [u64; 2]) -> Self::F;

    unsafe fn load_i32(p: *const u8) -> Self::I;
    unsafe fn store_i32(p: *mut u8, v: Self::I);
    unsafe fn splat_i32(x: i32) -> Self::I;
    unsafe fn and_i32(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or_i32(a: Self::I, b: Self::I) -> Self::I;
    /// `a + b`, wrapping.
    unsafe fn add_i32(a: Self::I, b: Self::I) -> Self::I;
    /// The lower half of `a * b`.
    unsafe fn mul_i32(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn max_i32(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn min_i32(a: Self::I, b: Self::I) -> Self::I;
    /// Each lane shifted left by `n` below 32, zeros from below.
    unsafe fn shl_i32(v: Self::I, n: i32) -> Self::I;
    /// Each lane shifted right by `n` below 32, zeros from above.
    unsafe fn shr_i32(v: Self::I, n: i32) -> Self::I;
    /// Each lane shifted right by `n` below 32, its sign from above.
    unsafe fn sar_i32(v: Self::I, n: i32) -> Self::I;
    /// `a - b` of each byte, wrapping.
    unsafe fn sub_bytes_i32(a: Self::I, b: Self::I) -> Self::I;
    /// `table[i]` for each byte `i`, which is below 16.
    unsafe fn lookup_i32(table: &[i8; 16], i: Self::I) -> Self::I;
    /// The four bytes `4 u..4 u + 4` of each of `LANES` rows as vector `u`: 32 bytes of a row.
    unsafe fn turn32(rows: &Upright) -> [Self::I; 8];
    /// The same of 16 bytes of a row.
    unsafe fn turn16(rows: &Upright) -> [Self::I; 4];
    /// Adds to each lane the products of its four bytes of `w` with those of `x`, which are signed
    /// and not -128 (if `SIGNED` and [`Bytes::BIASED`], with 128 added). `w` is signed if `SIGNED`, or else
    /// unsigned up to 127.
    unsafe fn dot4<const SIGNED: bool>(acc: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// Adds to each lane the products of its two halves, signed.
    unsafe fn dot2(acc: Self::I, a: Self::I, b: Self::I) -> Self::I;
    /// Adds to each half of a lane the products of its two bytes of `w`, unsigned up to 127, with those of `x`, which are signed
    /// and not -128: half the work of [`Bytes::dot4`], if [`Isa::gathers_halves`](super::Isa::gathers_halves), as long as sums fit 16 bits.
    unsafe fn dot_halves(_acc: Self::I, _w: Self::I, _x: Self::I) -> Self::I {
        unreachable!("only asked for where sums are gathered in halves")
    }
}

/// Functions of two vectors of whole numbers that are one instruction each.
macro_rules! one_instruction {
    ($($name:ident = $instruction:ident)*) => {$(
        #[inline(always)]
        unsafe fn $name(a: Self::I, b: Self::I) -> Self::I {
            $instruction(a, b)
        }
    )*};
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) use one_instruction;

/// Sixteen signed bytes as halves.
#[cfg_attr(target_arch = "x86_64", allow(dead_code, reason = "x86 has instructions for it"))]
#[inline(always)]
pub(super) fn widened(bytes: [u64; 2]) -> [i16; 16] {
    std::array::from_fn(|i| i16::from((bytes[i / 8] >> (8 * (i % 8))) as i8))
}

/// [`Bytes::P`] as two `F`, each with its own `B`.
macro_rules! pair_of_halves {
    () => {
        type P = [Self::F; 2];

        #[inline(always)]
        unsafe fn zero_pair() -> Self::P {
            [Self::splat8(0.0); 2]
        }
        #[inline(always)]
        unsafe fn fma_pair<const SIGNED: bool, const SMALL: bool>(
            acc: Self::P,
            a: Self::B,
            b: Self::B,
            x: *const u8,
            scales: *const f32,
        ) -> Self::P {
            let half = |acc: Self::F, codes: Self::B, i: usize| {
                let x = Self::load32(x.add(32 * i));
                let products = if SIGNED { Self::dot_signed(codes, x) } else { Self::dot_codes(codes, x) };
                let scale = if SMALL { Self::splat_pair(scales.add(2 * i)) } else { Self::splat8(*scales.add(i)) };
                Self::fma8(products, scale, acc)
            };
            [half(acc[0], a, 0), half(acc[1], b, 1)]
        }
        #[inline(always)]
        unsafe fn sum_pair(acc: Self::P) -> Self::F {
            Self::add8(acc[0], acc[1])
        }
    };
}
pub(super) use pair_of_halves;
