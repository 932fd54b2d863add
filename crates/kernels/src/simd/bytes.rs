//! What products of quantised blocks are made of: thirty-two codes at a time, and integer sums.

/// A vector of 32 bytes (one group of codes or of rounded activations), eight `f32` to gather their
/// products in, and as many `i32` as [`Simd`](super::Simd) has lanes. Pointers may lie at any address.
///
/// # Safety
/// As for [`Simd`](super::Simd): the machine must have the instructions, and a pointer be good for
/// the bytes that are read or written.
#[allow(clippy::missing_safety_doc, reason = "stated once, above")]
pub(crate) trait Bytes: Copy {
    /// 32 bytes.
    type B: Copy;
    /// 8 values of `f32`.
    type F: Copy;
    /// 16 values of `f32`, in which the products of two `B` are gathered.
    type P: Copy;
    /// `LANES` values of `i32`.
    type I: Copy;
    /// Whether [`Bytes::dot4`] wants signed codes with 128 added.
    const BIASED: bool;

    unsafe fn load32(p: *const u8) -> Self::B;
    unsafe fn store32(p: *mut u8, v: Self::B);
    /// The low nibbles of 16 bytes, then their high nibbles.
    unsafe fn nibbles(p: *const u8) -> Self::B;
    unsafe fn splat_byte(x: u8) -> Self::B;
    unsafe fn and(a: Self::B, b: Self::B) -> Self::B;
    unsafe fn or(a: Self::B, b: Self::B) -> Self::B;
    unsafe fn xor(a: Self::B, b: Self::B) -> Self::B;
    /// `a + b`, wrapping.
    unsafe fn add_bytes(a: Self::B, b: Self::B) -> Self::B;
    /// `a - b`, wrapping.
    unsafe fn sub_bytes(a: Self::B, b: Self::B) -> Self::B;
    /// Each byte shifted right by `N`, zeros from above.
    unsafe fn shr<const N: i32>(v: Self::B) -> Self::B;
    /// Each byte shifted left by `N`, zeros from below.
    unsafe fn shl<const N: i32>(v: Self::B) -> Self::B;
    /// `table[i]` for each byte `i`, which is below 16.
    unsafe fn lookup(table: &[i8; 16], i: Self::B) -> Self::B;
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
    unsafe fn splat_i32(x: i32) -> Self::I;
    /// Adds to each lane the products of its four bytes of `w` with those of `x`, which are signed
    /// and not -128. `w` is signed (biased, if [`Bytes::BIASED`]) or else unsigned up to 127.
    unsafe fn dot4<const SIGNED: bool>(acc: Self::I, w: Self::I, x: Self::I) -> Self::I;
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
