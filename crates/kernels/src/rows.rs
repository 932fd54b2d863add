//! Functions of values and of rows of them.

use std::mem::MaybeUninit;

use crate::math::exp;
use crate::pool::Pool;
use crate::results::{copied, fill};
use crate::simd::{Isa, MAX_LANES, Simd, kernel};

/// A value, or room for one.
pub(crate) trait Value {}
impl Value for f32 {}
impl Value for MaybeUninit<f32> {}

/// Values `i..i + LANES` of a slice; zeros behind its end.
///
/// # Safety
/// As for [`Simd`]; `i` must be in `x`.
#[inline(always)]
unsafe fn get<S: Simd>(x: &[f32], i: usize) -> S::V {
    let (p, left) = (x.as_ptr().add(i), x.len() - i);
    if left >= S::LANES { S::load(p) } else { S::load_part(p, left) }
}

/// Stores values `i..i + LANES` of a slice, as far as it goes.
///
/// # Safety
/// As for [`Simd`]; `i` must be in `x`.
#[inline(always)]
unsafe fn set<S: Simd>(x: &mut [impl Value], i: usize, v: S::V) {
    let (p, left) = (x.as_mut_ptr().add(i).cast(), x.len() - i);
    if left >= S::LANES { S::store(p, v) } else { S::store_part(p, v, left) }
}

/// The sum of the products of `a` and `b`.
///
/// # Panics
/// If they differ in length.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    dot_with(Isa::best(), a, b)
}

/// The sum of the squares of `a`.
pub fn norm_sq(a: &[f32]) -> f32 {
    dot(a, a)
}

pub(crate) fn dot_with(isa: Isa, a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "lengths of the factors");
    // SAFETY: `isa` was detected, the lengths are equal.
    unsafe { dot_all(isa, a, b) }
}

/// Reads all of `bytes` (but fewer than 512 at the end) in order with the widest loads that the machine has, which is how
/// fast memory can be read; the sum of its 32-bit words.
pub fn read_through(bytes: &[u8]) -> i32 {
    // SAFETY: the set was detected.
    unsafe { read_with(Isa::widest(), bytes) }
}

kernel! {
    /// [`read_through`] with the instructions named.
    ///
    /// # Safety
    /// The machine must have them.
    pub(crate) unsafe fn read_with<S>(bytes: &[u8]) -> i32 {
        let mut sums = [S::splat_i32(0); 8];
        let step = 8 * 4 * S::LANES;
        for i in (0..bytes.len() / step * step).step_by(step) {
            for (j, sum) in sums.iter_mut().enumerate() {
                *sum = S::add_i32(*sum, S::load_i32(bytes.as_ptr().add(i + j * 4 * S::LANES)));
            }
        }
        let sum = sums[1..].iter().fold(sums[0], |a, b| S::add_i32(a, *b));
        let mut lanes = [0_i32; MAX_LANES];
        S::store_i32(lanes.as_mut_ptr().cast(), sum);
        lanes.iter().fold(0, |a, b| a.wrapping_add(*b))
    }
}

/// Asks for so many cache lines to write to them; they need not be there.
pub(crate) fn ask_to_write(p: *const u8, lines: usize) {
    // SAFETY: the set was detected.
    unsafe { ask_to_write_with(Isa::best(), p, lines) }
}

kernel! {
    unsafe fn ask_to_write_with<S>(p: *const u8, lines: usize) {
        for i in 0..lines {
            S::prefetch_to_write(p.wrapping_add(64 * i));
        }
    }
}

kernel! {
    unsafe fn dot_all<S>(a: &[f32], b: &[f32]) -> f32 {
        let mut sums = [S::zero(); 4];
        let step = 4 * S::LANES;
        let whole = a.len() - a.len() % step;
        for i in (0..whole).step_by(step) {
            for (j, sum) in sums.iter_mut().enumerate() {
                let at = i + j * S::LANES;
                let (a, b) = (S::load(a.as_ptr().add(at)), S::load(b.as_ptr().add(at)));
                *sum = S::fma(a, b, *sum);
            }
        }
        for i in (whole..a.len()).step_by(S::LANES) {
            sums[0] = S::fma(get::<S>(a, i), get::<S>(b, i), sums[0]);
        }
        S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])))
    }
}

kernel! {
    unsafe fn add_all<S>(x: &[f32], y: &[f32], out: &mut [MaybeUninit<f32>]) {
        for i in (0..out.len()).step_by(S::LANES) {
            set::<S>(out, i, S::add(get::<S>(x, i), get::<S>(y, i)));
        }
    }
}

kernel! {
    unsafe fn add_scaled_all<S>(x: &mut [f32], scale: f32, y: &[f32]) {
        let scale = S::splat(scale);
        for i in (0..x.len()).step_by(S::LANES) {
            set::<S>(x, i, S::fma(scale, get::<S>(y, i), get::<S>(x, i)));
        }
    }
}

/// `x += scale * y`.
pub(crate) fn add_scaled(isa: Isa, x: &mut [f32], scale: f32, y: &[f32]) {
    assert_eq!(x.len(), y.len(), "lengths of the terms");
    // SAFETY: `isa` was detected, the lengths are equal.
    unsafe { add_scaled_all(isa, x, scale, y) }
}

/// `out = x + y`.
///
/// # Panics
/// If the lengths differ.
pub fn add(pool: &Pool, x: &[f32], y: &[f32], out: &mut Vec<f32>) {
    assert_eq!(x.len(), y.len(), "lengths of the terms");
    let sums = |out: &mut [MaybeUninit<f32>], start: usize| {
        let (x, y) = (&x[start..][..out.len()], &y[start..][..out.len()]);
        // SAFETY: the pool's set was detected, the lengths are equal.
        unsafe { add_all(pool.isa(), x, y, out) }
    };
    // SAFETY: the shares are all of `out`.
    unsafe { fill(out, x.len(), |out| pool.rows(out, 16, 1, sums)) }
}

/// `x += y`.
///
/// # Panics
/// If the lengths differ.
pub fn add_inplace(pool: &Pool, x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "lengths of the terms");
    pool.rows(x, 16, 1, |x, start| add_scaled(pool.isa(), x, 1.0, &y[start..][..x.len()]));
}

/// `out = x / sqrt(mean(x^2) + eps) * weight` for each row of `d` values.
///
/// # Panics
/// If `weight` has not `d` values, or `x` is not whole rows.
pub fn rms_norm(pool: &Pool, x: &[f32], d: usize, weight: &[f32], eps: f32, out: &mut Vec<f32>) {
    assert_eq!(weight.len(), d, "weights of the norm");
    if x.is_empty() {
        return out.clear();
    }
    assert!(x.len().is_multiple_of(d), "rows of {d}");
    let norms = |out: &mut [MaybeUninit<f32>], start: usize| {
        for (row, out) in x[start..].chunks_exact(d).zip(out.chunks_exact_mut(d)) {
            scaled(pool.isa(), row, norm_scale(pool.isa(), row, eps), weight, out);
        }
    };
    // SAFETY: the shares are all of `out`, in whole rows.
    unsafe { fill(out, x.len(), |out| pool.rows(out, d, 2, norms)) }
}

/// `1 / sqrt(mean(x^2) + eps)`.
pub(crate) fn norm_scale(isa: Isa, x: &[f32], eps: f32) -> f32 {
    1.0 / (dot_with(isa, x, x) / x.len() as f32 + eps).sqrt()
}

/// `out = scale * x * weight`.
pub(crate) fn scaled<V: Value>(isa: Isa, x: &[f32], scale: f32, weight: &[f32], out: &mut [V]) {
    assert_eq!((x.len(), weight.len()), (out.len(), out.len()), "lengths of the factors");
    // SAFETY: the set was detected, all three have as many values.
    unsafe { scale_row::<V>(isa, x, scale, weight, out) }
}

kernel! {
    unsafe fn scale_row<S, V: Value>(x: &[f32], scale: f32, weight: &[f32], out: &mut [V]) {
        let scale = S::splat(scale);
        for i in (0..out.len()).step_by(S::LANES) {
            set::<S>(out, i, S::mul(S::mul(get::<S>(x, i), scale), get::<S>(weight, i)));
        }
    }
}

/// `y` is `x` with the first `rope_dim` values of each head turned, value `i` together with value
/// `i + rope_dim / 2`, by the angle of token and `i`: `x` is `[n, heads, head_dim]`, `cos` and
/// `sin` are `[n, rope_dim / 2]`.
///
/// # Panics
/// If a slice has not the length of its shape, or `rope_dim` is odd or exceeds `head_dim`.
#[allow(clippy::too_many_arguments, reason = "kernels take plain arguments")]
pub fn rope(
    pool: &Pool,
    x: &[f32],
    n: usize,
    heads: usize,
    head_dim: usize,
    rope_dim: usize,
    cos: &[f32],
    sin: &[f32],
    y: &mut Vec<f32>,
) {
    let (d, half) = (heads * head_dim, rope_dim / 2);
    assert_eq!(x.len(), n * d, "{n} rows of {heads} heads of {head_dim}");
    assert!(rope_dim.is_multiple_of(2) && rope_dim <= head_dim, "{rope_dim} of {head_dim}");
    assert_eq!((cos.len(), sin.len()), (n * half, n * half), "angles of {n} tokens");
    if x.is_empty() {
        return y.clear();
    }
    let turn = |y: &mut [MaybeUninit<f32>], start: usize| {
        let y = copied(y, &x[start..][..y.len()]);
        for (i, y) in y.chunks_exact_mut(d).enumerate() {
            let t = start / d + i;
            let (cos, sin) = (&cos[t * half..][..half], &sin[t * half..][..half]);
            y.chunks_exact_mut(head_dim).for_each(|head| turn_head(pool.isa(), head, cos, sin));
        }
    };
    // SAFETY: the shares are all of `y`.
    unsafe { fill(y, x.len(), |y| pool.rows(y, d, 2, turn)) }
}

/// [`rope`] of one head, in place.
pub(crate) fn turn_head(isa: Isa, head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let (low, high) = head.split_at_mut(half);
    let (high, sin) = (&mut high[..half], &sin[..half]);
    // SAFETY: the set was detected, all four have `half` values.
    unsafe { rotate(isa, low, high, cos, sin) }
}

kernel! {
    unsafe fn rotate<S>(low: &mut [f32], high: &mut [f32], cos: &[f32], sin: &[f32]) {
        for i in (0..low.len()).step_by(S::LANES) {
            let (a, b) = (get::<S>(low, i), get::<S>(high, i));
            let (c, s) = (get::<S>(cos, i), get::<S>(sin, i));
            set::<S>(low, i, S::sub(S::mul(a, c), S::mul(b, s)));
            set::<S>(high, i, S::add(S::mul(b, c), S::mul(a, s)));
        }
    }
}

/// Replaces each row of `cols` values by its softmax.
///
/// # Panics
/// If `x` is not whole rows.
pub fn softmax_rows(pool: &Pool, x: &mut [f32], cols: usize) {
    if x.is_empty() {
        return;
    }
    assert!(x.len().is_multiple_of(cols), "rows of {cols}");
    pool.rows(x, cols, 8, |x, _| {
        for row in x.chunks_exact_mut(cols) {
            // SAFETY: the pool's set was detected.
            unsafe { softmax(pool.isa(), row) }
        }
    });
}

kernel! {
    unsafe fn softmax<S>(x: &mut [f32]) {
        let whole = x.len() - x.len() % S::LANES;
        let mut most = S::splat(f32::NEG_INFINITY);
        for i in (0..whole).step_by(S::LANES) {
            most = S::max(most, S::load(x.as_ptr().add(i)));
        }
        let mut most = S::greatest(most);
        for x in &x[whole..] {
            most = most.max(*x);
        }
        let (most, mut sum) = (S::splat(most), S::zero());
        for i in (0..x.len()).step_by(S::LANES) {
            set::<S>(x, i, exp::<S>(S::sub(get::<S>(x, i), most)));
            sum = S::add(sum, get::<S>(x, i));
        }
        let scale = S::splat(1.0 / S::sum(sum));
        for i in (0..x.len()).step_by(S::LANES) {
            set::<S>(x, i, S::mul(get::<S>(x, i), scale));
        }
    }
}
