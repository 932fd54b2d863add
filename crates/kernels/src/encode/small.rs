//! Blocks of 32 values.

use super::search::{LEAST, Tries, offset, peak, signed, sum};
use super::{Importance, f16_bytes};
use crate::quant::NONLINEAR;

/// Tries where importance is known.
const WEIGHTED: Tries = Tries { first: -0.9, step: 0.05, steps: 36 };

/// Importance of each value: that of its column, and more if it is large.
#[inline(always)]
fn weights(x: &[f32; 32], importance: Importance<'_, 32>) -> [f32; 32] {
    let mut w = [0.0; 32];
    for (i, w) in w.iter_mut().enumerate() {
        *w = importance.columns[i] * (importance.mean_square + x[i] * x[i]).sqrt();
    }
    w
}

/// Scale and codes from 0 to `2 n - 1`, less `n`.
#[inline(always)]
fn centred(x: &[f32; 32], importance: Option<Importance<'_, 32>>, n: f32) -> (f32, [u8; 32]) {
    if let Some(importance) = importance {
        let (scale, codes) = signed(x, &weights(x, importance), n);
        return (scale, codes.map(|c| (c + n) as u8));
    }
    let scale = peak(x) / -n;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    // Halves go up; the other end of the span is one code short.
    (scale, x.map(|v| (v * inverse + (n + 0.5)).min(2.0 * n - 1.0) as u8))
}

/// Scale, what is added, and codes from 0 to `n`.
#[inline(always)]
fn shifted(x: &[f32; 32], importance: Option<Importance<'_, 32>>, n: f32) -> (f32, f32, [u8; 32]) {
    if let Some(importance) = importance {
        let (scale, less, codes) = offset(x, &weights(x, importance), n, WEIGHTED);
        return (scale, -less, codes.map(|c| c as u8));
    }
    let least = x.iter().fold(f32::INFINITY, |m, &v| m.min(v));
    let most = x.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let scale = (most - least) / n;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    (scale, least, x.map(|v| ((v - least) * inverse + 0.5).min(n) as u8))
}

/// The first 16 codes in low nibbles, the others in high ones.
#[inline(always)]
fn nibbles(codes: &[u8; 32], out: &mut [u8]) {
    for (i, out) in out.iter_mut().enumerate() {
        *out = codes[i] & 15 | codes[i + 16] << 4;
    }
}

/// The fifth bits.
#[inline(always)]
fn fifths(codes: &[u8; 32]) -> [u8; 4] {
    let bits = codes.iter().enumerate().fold(0_u32, |bits, (i, c)| bits | u32::from(c >> 4 & 1) << i);
    bits.to_le_bytes()
}

#[inline(always)]
pub(super) fn q4_0(x: &[f32; 32], importance: Option<Importance<'_, 32>>) -> [u8; 18] {
    let (scale, codes) = centred(x, importance, 8.0);
    let mut out = [0; 18];
    out[..2].copy_from_slice(&f16_bytes(scale));
    nibbles(&codes, &mut out[2..]);
    out
}

#[inline(always)]
pub(super) fn q4_1(x: &[f32; 32], importance: Option<Importance<'_, 32>>) -> [u8; 20] {
    let (scale, least, codes) = shifted(x, importance, 15.0);
    let mut out = [0; 20];
    out[..2].copy_from_slice(&f16_bytes(scale));
    out[2..4].copy_from_slice(&f16_bytes(least));
    nibbles(&codes, &mut out[4..]);
    out
}

#[inline(always)]
pub(super) fn q5_0(x: &[f32; 32], importance: Option<Importance<'_, 32>>) -> [u8; 22] {
    let (scale, codes) = centred(x, importance, 16.0);
    let mut out = [0; 22];
    out[..2].copy_from_slice(&f16_bytes(scale));
    out[2..6].copy_from_slice(&fifths(&codes));
    nibbles(&codes, &mut out[6..]);
    out
}

#[inline(always)]
pub(super) fn q5_1(x: &[f32; 32], importance: Option<Importance<'_, 32>>) -> [u8; 24] {
    let (scale, least, codes) = shifted(x, importance, 31.0);
    let mut out = [0; 24];
    out[..2].copy_from_slice(&f16_bytes(scale));
    out[2..4].copy_from_slice(&f16_bytes(least));
    out[4..8].copy_from_slice(&fifths(&codes));
    nibbles(&codes, &mut out[8..]);
    out
}

/// The place of the nearest number in an ascending list; of two equally near the upper one.
#[inline(always)]
fn nearest(list: &[i8; 16], v: f32) -> u8 {
    let mut place = 0;
    for pair in list.windows(2) {
        place += u8::from(v >= (f32::from(pair[0]) + f32::from(pair[1])) * 0.5);
    }
    place
}

/// Codes of a table of signed bytes.
#[inline(always)]
pub(super) fn iq4_nl(x: &[f32; 32], importance: Option<Importance<'_, 32>>) -> [u8; 18] {
    const TRIES: i8 = 7;
    let mut out = [0; 18];
    let peak = peak(x);
    if peak.abs() < LEAST {
        return out;
    }
    let w = match importance {
        // Here the mean square is that of the block, doubled.
        Some(of) => weights(x, Importance { mean_square: sum::<32>(|i| x[i] * x[i]) / 16.0, ..of }),
        None => x.map(|v| v * v),
    };
    let (mut gain, mut scale) = (0.0, 0.0);
    for step in -TRIES..=TRIES {
        let inverse = f32::from(NONLINEAR[0] + step) / peak;
        let codes = x.map(|v| f32::from(NONLINEAR[usize::from(nearest(&NONLINEAR, inverse * v))]));
        let (xl, ll) = (sum::<32>(|i| w[i] * x[i] * codes[i]), sum::<32>(|i| w[i] * codes[i] * codes[i]));
        if ll > 0.0 && xl * xl > gain * ll {
            (gain, scale) = (xl * xl / ll, xl / ll);
        }
    }
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    out[..2].copy_from_slice(&f16_bytes(scale));
    nibbles(&x.map(|v| nearest(&NONLINEAR, inverse * v)), &mut out[2..]);
    out
}

/// 4-bit floats with a power of two as scale, such that the largest value fits.
#[inline(always)]
pub(super) fn mxfp4(x: &[f32; 32], _: Option<Importance<'_, 32>>) -> [u8; 17] {
    /// Where one magnitude ends and the next begins.
    const EDGES: [f32; 7] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];
    let mut out = [0; 17];
    let most = peak(x).abs();
    if most == 0.0 {
        return out;
    }
    // The largest value's own exponent, as biased, less 2: the largest codes are 4 and 6.
    let exponent = ((most.to_bits() >> 23) as i32 - 2).clamp(0, 254);
    let inverse = (2.0_f64).powi(127 - exponent);
    let code = |v: f32| {
        let size = (f64::from(v.abs()) * inverse) as f32;
        let place = EDGES.iter().filter(|&&edge| size > edge).count() as u8;
        if v < 0.0 && place > 0 { place | 8 } else { place }
    };
    out[0] = exponent as u8;
    nibbles(&x.map(code), &mut out[1..]);
    out
}

#[cfg(test)]
mod tests {
    use super::super::as_f16;
    use super::super::search::round;
    use super::*;

    #[test]
    fn nearest_in_a_table() {
        assert_eq!(NONLINEAR.map(|v| nearest(&NONLINEAR, f32::from(v))), std::array::from_fn(|i| i as u8));
        assert_eq!([-1e9, -116.0, -115.0, 0.0, 1e9].map(|v| nearest(&NONLINEAR, v)), [0, 0, 1, 8, 15]);
    }

    #[test]
    fn rounding_and_halves() {
        assert_eq!([0.5, 1.5, -0.5, -2.4].map(round), [0.0, 2.0, 0.0, -2.0]);
        assert_eq!(as_f16(1.0 + 1.0 / 4096.0), 1.0);
    }
}
