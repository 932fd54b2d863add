//! Blocks of 256 values whose scales are rounded too.

use super::search::{LEAST, Tries, offset, peak, positive, round, signed, sum};
use super::{Importance, as_f16, f16_bytes};

type Block = [f32; 256];

/// Tries where importance is known.
const WEIGHTED: Tries = Tries { first: -0.9, step: 0.05, steps: 36 };

/// The `g`-th group of a block.
#[inline(always)]
fn group<const N: usize>(x: &Block, g: usize) -> &[f32; N] {
    &x.as_chunks::<N>().0[g]
}

/// The weights of a group: importance of the columns, more for large values; without it, `plain`.
#[inline(always)]
fn weights<const N: usize>(
    x: &Block,
    importance: Option<Importance<'_, 256>>,
    share: f32,
    g: usize,
    plain: impl Fn(&[f32; N]) -> [f32; N],
) -> [f32; N] {
    let values = group::<N>(x, g);
    let Some(importance) = importance else { return plain(values) };
    let level = share * sum::<256>(|i| x[i] * x[i]) / 256.0;
    let columns = group::<N>(importance.columns, g);
    let mut w = [0.0; N];
    for (i, w) in w.iter_mut().enumerate() {
        *w = columns[i] * (level + values[i] * values[i]).sqrt();
    }
    w
}

/// Groups of `N` values with scale and offset, both rounded to `0..=top` of a half each; codes from 0 to `n`.
struct Offsets<const G: usize> {
    scale: f32,
    less: f32,
    scales: [u8; G],
    lesses: [u8; G],
    codes: [u8; 256],
}

#[inline(always)]
fn offsets<const N: usize, const G: usize>(
    x: &Block,
    importance: Option<Importance<'_, 256>>,
    (n, top, tries): (f32, f32, Tries),
    (share, plain): (f32, impl Fn(&[f32; N]) -> [f32; N] + Copy),
) -> Offsets<G> {
    let tries = if importance.is_some() { WEIGHTED } else { tries };
    let (mut scales, mut lesses, mut total, mut codes) = ([0.0; G], [0.0; G], [0.0; G], [0_u8; 256]);
    for g in 0..G {
        let w = weights(x, importance, share, g, plain);
        let found = offset(group::<N>(x, g), &w, n, tries);
        (scales[g], lesses[g], total[g]) = (found.0, found.1, sum::<N>(|i| w[i]));
        for (out, code) in codes[g * N..][..N].iter_mut().zip(found.2) {
            *out = code as u8;
        }
    }
    let ((scale, scales), (less, lesses)) = (positive(&scales, &total, top), positive(&lesses, &total, top));
    for g in 0..G {
        let (d, m) = (as_f16(scale) * scales[g], as_f16(less) * lesses[g]);
        if d != 0.0 {
            for (out, v) in codes[g * N..][..N].iter_mut().zip(group::<N>(x, g)) {
                *out = round((v + m) / d).max(0.0).min(n) as u8;
            }
        }
    }
    Offsets { scale, less, scales: scales.map(|s| s as u8), lesses: lesses.map(|s| s as u8), codes }
}

/// Twice four pairs of bits a byte, 32 values apart.
#[inline(always)]
fn pairs(codes: &[u8; 256], out: &mut [u8]) {
    for (i, out) in out.iter_mut().enumerate() {
        let at = i / 32 * 128 + i % 32;
        *out = codes[at] & 3 | (codes[at + 32] & 3) << 2 | (codes[at + 64] & 3) << 4 | (codes[at + 96] & 3) << 6;
    }
}

/// Nibbles, 32 values apart.
#[inline(always)]
fn nibbles(codes: &[u8; 256], out: &mut [u8]) {
    for (i, out) in out.iter_mut().enumerate() {
        let at = i / 32 * 64 + i % 32;
        *out = codes[at] & 15 | codes[at + 32] << 4;
    }
}

#[inline(always)]
pub(super) fn q2_k(x: &Block, importance: Option<Importance<'_, 256>>) -> [u8; 84] {
    let plain = |x: &[f32; 16]| x.map(f32::abs);
    let tries = Tries { first: -0.5, step: 0.1, steps: 15 };
    let found = offsets::<16, 16>(x, importance, (3.0, 15.0, tries), (1.0, plain));
    let mut out = [0; 84];
    for (g, out) in out[..16].iter_mut().enumerate() {
        *out = found.scales[g] | found.lesses[g] << 4;
    }
    pairs(&found.codes, &mut out[16..80]);
    out[80..82].copy_from_slice(&f16_bytes(found.scale));
    out[82..].copy_from_slice(&f16_bytes(found.less));
    out
}

/// Weights of groups of 32 without importance: magnitudes above the group's usual one.
#[inline(always)]
fn above_usual(x: &[f32; 32]) -> [f32; 32] {
    let usual = (sum::<32>(|i| x[i] * x[i]) / 32.0).sqrt();
    x.map(|v| usual + v.abs())
}

/// Two halves, and twelve bytes with eight pairs of 6 bits.
#[inline(always)]
fn six_bit_pairs(found: &Offsets<8>, out: &mut [u8]) {
    out[..2].copy_from_slice(&f16_bytes(found.scale));
    out[2..4].copy_from_slice(&f16_bytes(found.less));
    let packed = &mut out[4..];
    for g in 0..4 {
        let (high_s, high_m) = (found.scales[g + 4], found.lesses[g + 4]);
        packed[g] = found.scales[g] | high_s >> 4 << 6;
        packed[g + 4] = found.lesses[g] | high_m >> 4 << 6;
        packed[g + 8] = high_s & 15 | high_m << 4;
    }
}

#[inline(always)]
pub(super) fn q4_k(x: &Block, importance: Option<Importance<'_, 256>>) -> [u8; 144] {
    let tries = Tries { first: -1.0, step: 0.1, steps: 20 };
    let found = offsets::<32, 8>(x, importance, (15.0, 63.0, tries), (2.0, above_usual));
    let mut out = [0; 144];
    six_bit_pairs(&found, &mut out[..16]);
    nibbles(&found.codes, &mut out[16..]);
    out
}

#[inline(always)]
pub(super) fn q5_k(x: &Block, importance: Option<Importance<'_, 256>>) -> [u8; 176] {
    let tries = Tries { first: -0.5, step: 0.1, steps: 15 };
    let found = offsets::<32, 8>(x, importance, (31.0, 63.0, tries), (2.0, above_usual));
    let mut out = [0; 176];
    six_bit_pairs(&found, &mut out[..16]);
    for (i, out) in out[16..48].iter_mut().enumerate() {
        *out = (0..8).fold(0, |bits, g| bits | (found.codes[32 * g + i] >> 4) << g);
    }
    nibbles(&found.codes, &mut out[48..]);
    out
}

/// Groups of 16 with a signed scale each.
#[inline(always)]
fn signed_groups(x: &Block, n: f32, w: impl Fn(usize) -> [f32; 16]) -> ([f32; 16], [f32; 16], [u8; 256]) {
    let (mut scales, mut total, mut codes) = ([0.0; 16], [0.0; 16], [0_u8; 256]);
    for g in 0..16 {
        let w = w(g);
        let found = signed(group::<16>(x, g), &w, n);
        (scales[g], total[g]) = (found.0, sum::<16>(|i| w[i]));
        for (out, code) in codes[16 * g..][..16].iter_mut().zip(found.1) {
            *out = (code + n) as u8;
        }
    }
    (scales, total, codes)
}

/// Codes anew, with the scales as they will be read.
#[inline(always)]
fn recode(x: &Block, n: f32, codes: &mut [u8; 256], scale: impl Fn(usize) -> f32) {
    for g in 0..16 {
        let d = scale(g);
        if d != 0.0 {
            for (out, v) in codes[16 * g..][..16].iter_mut().zip(group::<16>(x, g)) {
                *out = (round(v / d).max(-n).min(n - 1.0) + n) as u8;
            }
        }
    }
}

#[inline(always)]
pub(super) fn q3_k(x: &Block, importance: Option<Importance<'_, 256>>) -> [u8; 110] {
    let plain = |x: &[f32; 16]| x.map(|v| v * v);
    let (scales, total, mut codes) = signed_groups(x, 4.0, |g| weights(x, importance, 2.0, g, plain));
    let (scale, scales) = signed(&scales, &total, 32.0);
    recode(x, 4.0, &mut codes, |g| as_f16(scale) * scales[g]);
    let mut out = [0; 110];
    for (i, out) in out[..32].iter_mut().enumerate() {
        *out = (0..8).fold(0, |bits, g| bits | (codes[32 * g + i] >> 2) << g);
    }
    pairs(&codes, &mut out[32..96]);
    let scales = scales.map(|s| (s + 32.0) as u8);
    for g in 0..8 {
        out[96 + g] = scales[g] & 15 | scales[g + 8] << 4;
    }
    for g in 0..4 {
        let top = |of: usize| scales[g + 4 * of] >> 4 << (2 * of);
        out[104 + g] = top(0) | top(1) | top(2) | top(3);
    }
    out[108..].copy_from_slice(&f16_bytes(scale));
    out
}

#[inline(always)]
pub(super) fn q6_k(x: &Block, importance: Option<Importance<'_, 256>>) -> [u8; 210] {
    let w = |g: usize| match importance {
        Some(importance) => *group::<16>(importance.columns, g),
        None => group::<16>(x, g).map(|v| v * v),
    };
    let (scales, _, mut codes) = signed_groups(x, 32.0, w);
    let mut out = [0; 210];
    let most = peak(&scales);
    if most.abs() < LEAST {
        return out;
    }
    let inverse = -128.0 / most;
    let scale = 1.0 / inverse;
    let scales = scales.map(|s| round(inverse * s).clamp(-128.0, 127.0));
    recode(x, 32.0, &mut codes, |g| as_f16(scale) * scales[g]);
    for half in 0..2 {
        let codes = &codes[128 * half..];
        for i in 0..32 {
            let four = [codes[i], codes[i + 32], codes[i + 64], codes[i + 96]];
            out[64 * half + i] = four[0] & 15 | four[2] << 4;
            out[64 * half + 32 + i] = four[1] & 15 | four[3] << 4;
            out[128 + 32 * half + i] = four.iter().rev().fold(0, |bits, c| bits << 2 | c >> 4);
        }
    }
    for (out, s) in out[192..208].iter_mut().zip(scales) {
        *out = s as i8 as u8;
    }
    out[208..].copy_from_slice(&f16_bytes(scale));
    out
}
