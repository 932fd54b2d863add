//! Searches for the scale (and offset) with which rounded codes lose least: weighted least squares over a few candidates
//! near the scale that spans the values.
//!
//! Codes stay `f32` here, so that the loops become vector instructions; sums are kept in eight lanes, so that the result
//! is the same with every instruction set.

/// Magnitudes below this are zeros.
pub(super) const LEAST: f32 = 1e-15;

/// To the nearest whole number, ties to even, for magnitudes below 2^22.
#[inline(always)]
pub(super) fn round(v: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: here neighbours are 1 apart
    (v + MAGIC) - MAGIC
}

/// `f(0) + .. + f(N - 1)`, in eight lanes.
#[inline(always)]
pub(super) fn sum<const N: usize>(f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; 8];
    for i in (0..N).step_by(8) {
        for (j, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + j);
        }
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + b) + (c + d)) + ((e + f) + (g + h))
}

/// The value of the largest magnitude, with its sign.
#[inline(always)]
pub(super) fn peak(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |most: f32, &v| if v.abs() > most.abs() { v } else { most })
}

/// A scale and codes from `-n` to `n - 1` with the least weighted squared error; the value of the largest magnitude gets the
/// code `-n` or one near it. All zeros have the scale 0 and codes 0.
#[inline(always)]
pub(super) fn signed<const N: usize>(x: &[f32; N], w: &[f32; N], n: f32) -> (f32, [f32; N]) {
    let peak = peak(x);
    if peak.abs() < LEAST {
        return (0.0, [0.0; N]);
    }
    fitted(x, w, n, -peak, 9, [-n, n - 1.0])
}

/// A scale and codes between two ends: of `(n + 0.1 i) / span` for `i` from `-reach` to `reach`, the inverse scale with
/// the least weighted squared error.
#[inline(always)]
fn fitted<const N: usize>(
    x: &[f32; N],
    w: &[f32; N],
    n: f32,
    span: f32,
    reach: i32,
    [low, high]: [f32; 2],
) -> (f32, [f32; N]) {
    let code = |inverse: f32, i: usize| round(inverse * x[i]).max(low).min(high);
    let (mut gain, mut scale, mut inverse) = (0.0, span / n, n / span);
    // The middle first: of equals the first is taken.
    for step in std::iter::once(0).chain(-reach..0).chain(1..=reach) {
        let candidate = (n + 0.1 * step as f32) / span;
        let xl = sum::<N>(|i| w[i] * x[i] * code(candidate, i));
        let ll = sum::<N>(|i| w[i] * code(candidate, i) * code(candidate, i));
        if ll > 0.0 && xl * xl > gain * ll {
            (gain, scale, inverse) = (xl * xl / ll, xl / ll, candidate);
        }
    }
    let mut codes = [0.0; N];
    for (i, out) in codes.iter_mut().enumerate() {
        *out = code(inverse, i);
    }
    (scale, codes)
}

/// Which scales [`offset`] tries: `(n + first + step * i) / span` for `i` up to `steps`.
#[derive(Clone, Copy)]
pub(super) struct Tries {
    pub first: f32,
    pub step: f32,
    pub steps: usize,
}

/// A scale, what is taken from the scaled codes (not below 0), and codes from 0 to `n`, with the least weighted squared
/// error among the tries.
#[inline(always)]
pub(super) fn offset<const N: usize>(x: &[f32; N], w: &[f32; N], n: f32, tries: Tries) -> (f32, f32, [f32; N]) {
    let mut least = x.iter().fold(0.0_f32, |m, &v| m.min(v));
    let most = x.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    if most - least < LEAST {
        return (0.0, -least, [0.0; N]);
    }
    let (sum_w, sum_x) = (sum::<N>(|i| w[i]), sum::<N>(|i| w[i] * x[i]));
    let encode = |inverse: f32, least: f32| {
        let mut codes = [0.0; N];
        for (out, v) in codes.iter_mut().zip(x) {
            *out = round(inverse * (v - least)).max(0.0).min(n);
        }
        codes
    };
    let error = |codes: &[f32; N], scale: f32, least: f32| {
        sum::<N>(|i| {
            let off = scale * codes[i] + least - x[i];
            w[i] * off * off
        })
    };
    let (mut scale, mut best) = ((most - least) / n, encode(n / (most - least), least));
    let mut lowest = error(&best, scale, least);
    for i in 0..=tries.steps {
        // From the best offset so far.
        let codes = encode((tries.first + tries.step * i as f32 + n) / (most - least), least);
        let sum_l = sum::<N>(|i| w[i] * codes[i]);
        let sum_ll = sum::<N>(|i| w[i] * codes[i] * codes[i]);
        let sum_lx = sum::<N>(|i| w[i] * codes[i] * x[i]);
        let determinant = sum_w * sum_ll - sum_l * sum_l;
        if determinant > 0.0 {
            let mut fitted = (sum_w * sum_lx - sum_x * sum_l) / determinant;
            let mut from = (sum_ll * sum_x - sum_l * sum_lx) / determinant;
            if from > 0.0 {
                (fitted, from) = (sum_lx / sum_ll, 0.0);
            }
            let off = error(&codes, fitted, from);
            if off < lowest {
                (scale, least, best, lowest) = (fitted, from, codes, off);
            }
        }
    }
    (scale, -least, best)
}

/// A scale and codes from 0 to `n` of values that are not negative.
#[inline(always)]
pub(super) fn positive<const N: usize>(x: &[f32; N], w: &[f32; N], n: f32) -> (f32, [f32; N]) {
    let most = x.iter().fold(0.0_f32, |m, &v| m.max(v));
    if most < LEAST {
        return (0.0, [0.0; N]);
    }
    fitted(x, w, n, most, 4, [0.0, n])
}
