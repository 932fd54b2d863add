//! Writing blocks: as little is lost as ggml loses, the bytes are the same where it only rounds, and nothing depends on
//! threads or instruction sets.

use super::*;
use crate::encode;

const ROWS: usize = 32;
const COLS: usize = 512;

/// Numbers between -1 and 1 that look random.
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Like weights: bell-shaped, with some far out.
fn weights() -> Vec<f32> {
    let bell = |u: &[f32; 4]| ((u[0] + u[1]) + (u[2] + u[3])) * 0.02;
    let mut x: Vec<f32> = noise(1, 4 * ROWS * COLS).as_chunks::<4>().0.iter().map(bell).collect();
    x.iter_mut().step_by(97).for_each(|v| *v *= 6.0);
    x
}

fn importance() -> Vec<f32> {
    noise(2, COLS).iter().map(|v| v * v + 0.01).collect()
}

fn encoded(pool: &Pool, dtype: DType, x: &[f32], w: Option<&[f32]>) -> Vec<u8> {
    let mut out = vec![0xaa; x.len() / dtype.block_len() * dtype.block_bytes()];
    encode(pool, dtype, COLS, x, w, &mut out).unwrap();
    out
}

/// The weighted error relative to the weighted size.
fn loss(dtype: DType, bytes: &[u8], x: &[f32], w: &[f32]) -> f64 {
    let mut y = vec![0.0; x.len()];
    dequantize(dtype, bytes, &mut y);
    let (mut off, mut size) = (0.0, 0.0);
    for (i, (x, y)) in x.iter().zip(&y).enumerate() {
        let w = f64::from(w[i % COLS]);
        off += w * (f64::from(*x) - f64::from(*y)).powi(2);
        size += w * f64::from(*x).powi(2);
    }
    (off / size).sqrt()
}

/// What ggml 0.25.3 loses of the same numbers: without importance, and with it.
const GGML: [(DType, f64, f64); 12] = [
    (DType::Q4_0, 0.120016, 0.116299),
    (DType::Q4_1, 0.088686, 0.076333),
    (DType::Q5_0, 0.059823, 0.057926),
    (DType::Q5_1, 0.042900, 0.037257),
    (DType::Q8_0, 0.007536, 0.007664),
    (DType::Q2_K, 0.328007, 0.266043),
    (DType::Q3_K, 0.179975, 0.167114),
    (DType::Q4_K, 0.082290, 0.078767),
    (DType::Q5_K, 0.041922, 0.040788),
    (DType::Q6_K, 0.022413, 0.021780),
    (DType::IQ4_NL, 0.095292, 0.092012),
    (DType::MXFP4, 0.134750, 0.132803),
];

#[test]
fn no_more_is_lost_than_by_ggml() {
    let (x, w, pool) = (weights(), importance(), Pool::new(2));
    for (dtype, plain, weighted) in GGML {
        let plainly = loss(dtype, &encoded(&pool, dtype, &x, None), &x, &[1.0; COLS]);
        let with_importance = loss(dtype, &encoded(&pool, dtype, &x, Some(&w)), &x, &w);
        assert!(plainly <= 1.02 * plain, "{}: {plainly} of {plain}", dtype.name());
        assert!(with_importance <= 1.02 * weighted, "{}: {with_importance} of {weighted}", dtype.name());
        assert!(plainly >= 0.9 * plain, "{}: {plainly} of {plain} is too good to be true", dtype.name());
    }
}

/// FNV-1a of what ggml writes.
#[test]
fn plain_rounding_gives_the_same_bytes_as_ggml() {
    let (x, pool) = (weights(), Pool::new(1));
    let expected = [
        (DType::Q4_0, 0xc3bf_1b75_a2ac_75bf),
        (DType::Q4_1, 0xbec8_822e_ff3c_0ca4),
        (DType::Q5_0, 0xad91_6c3e_b4d0_ab75),
        (DType::Q5_1, 0x757f_5e48_b5bc_bf34),
        (DType::Q8_0, 0x5462_3d0e_d295_452a),
        (DType::MXFP4, 0xe95d_996c_f7c5_4d65),
    ];
    for (dtype, hash) in expected {
        let bytes = encoded(&pool, dtype, &x, None);
        let found =
            bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h: u64, &b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        assert_eq!(found, hash, "{}", dtype.name());
    }
}

#[test]
fn threads_and_instruction_sets_change_nothing() {
    let (x, w) = (weights(), importance());
    for (dtype, ..) in GGML {
        for w in [None, Some(w.as_slice())] {
            let expected = encoded(&Pool::with_isa(1, Isa::Portable), dtype, &x, w);
            for isa in Isa::available() {
                assert!(encoded(&Pool::with_isa(3, isa), dtype, &x, w) == expected, "{} {isa:?}", dtype.name());
            }
        }
    }
}

#[test]
fn what_can_be_held_exactly_is_held() {
    let pool = Pool::new(1);
    for (dtype, ..) in GGML {
        let bytes = encoded(&pool, dtype, &[0.0; COLS], None);
        let mut y = [1.0; COLS];
        dequantize(dtype, &bytes, &mut y);
        assert!(y.iter().all(|v| *v == 0.0), "{}: zeros", dtype.name());
    }
    // All values of 4-bit floats at three scales.
    let values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, 0.5];
    let x: Vec<f32> = (0..COLS).map(|i| values[i % 16] * [1.0, 2f32.powi(-20), 2f32.powi(60)][i / 32 % 3]).collect();
    let mut y = [0.0; COLS];
    dequantize(DType::MXFP4, &encoded(&pool, DType::MXFP4, &x, None), &mut y);
    assert_eq!(x, y);
}

#[test]
fn what_cannot_be_held_is_refused() {
    let pool = Pool::new(1);
    let mut out = vec![0; 2 * COLS / 32 * 34];
    let mut x = vec![1.0; 2 * COLS];
    for (value, says) in [(f32::NAN, "row 1 has the value NaN"), (-1e5, "help: BF16")] {
        x[COLS + 3] = value;
        let error = encode(&pool, DType::Q8_0, COLS, &x, None, &mut out).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}
