//! Every path that this machine has, against plain `f64` arithmetic.

mod attention;
mod encode;
mod pool;
mod products;
mod quant;
mod rows;

use half::{bf16, f16};

use crate::weight::dequantize_with;
use crate::*;

/// Types whose products are of the values as they are, without rounded activations.
const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const ACTS: [Act; 3] = [Act::Silu, Act::GeluTanh, Act::Gelu];

/// Half an ulp, relative.
const EPS: f64 = 6e-8;

/// One pool per path.
fn pools(threads: usize) -> Vec<Pool> {
    Isa::available().map(|isa| Pool::with_isa(threads, isa)).collect()
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`.
    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }

    /// A value in -1..1.
    fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }

    /// Zeros, subnormals, huge and negative values among ordinary ones.
    fn nasty(&mut self, n: usize) -> Vec<f32> {
        let scales = [0.0, -0.0, 1e-40, -1e-38, 1e4, -1e4, 1.0, 1.0, -1e-3, 1.0];
        (0..n).map(|_| scales[self.below(scales.len())] * self.value()).collect()
    }
}

/// Weights of a type, at an odd address, and the same as `f64`.
struct Weights {
    dtype: DType,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
    exact: Vec<f64>,
}

impl Weights {
    fn new(dtype: DType, rows: usize, cols: usize, values: &[f32]) -> Self {
        let len = rows * dtype.row_bytes(cols).expect("whole blocks");
        let mut bytes = vec![0; len + 1];
        quantize(dtype, values, &mut bytes[1..]);
        let exact = widen(dtype, &bytes[1..]);
        Self { dtype, rows, cols, bytes, exact }
    }

    fn get(&self) -> MatRef<'_> {
        MatRef::new(self.dtype, self.rows, self.cols, &self.bytes[1..]).expect("a matrix")
    }

    /// The product with a token, and the sum of the magnitudes in it.
    fn times(&self, row: usize, x: &[f32]) -> (f64, f64) {
        let terms = self.exact[row * self.cols..].iter().zip(x).map(|(w, x)| w * f64::from(*x));
        terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
    }
}

/// Values as the definition of their type says.
fn widen(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let half = |b: &[u8]| f64::from(f16::from_le_bytes([b[0], b[1]]));
    match dtype {
        DType::F32 => bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect(),
        DType::F16 => bytes.chunks_exact(2).map(half).collect(),
        DType::BF16 => bytes.chunks_exact(2).map(|b| f64::from(bf16::from_le_bytes([b[0], b[1]]))).collect(),
        DType::Q8_0 => {
            bytes.chunks_exact(34).flat_map(|b| b[2..].iter().map(move |q| half(b) * f64::from(*q as i8))).collect()
        }
        // The others are proved by the fixture in `quant`.
        _ => {
            let mut values = vec![0.0; bytes.len() / dtype.block_bytes() * dtype.block_len()];
            dequantize_with(Isa::Portable, dtype, bytes, &mut values);
            values.into_iter().map(f64::from).collect()
        }
    }
}

fn activated(act: Act, x: f64) -> f64 {
    match act {
        Act::Silu => x / (1.0 + (-x).exp()),
        Act::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            // As tanh(u) = 1 - 2 / (1 + exp(2u)), without its cancellation.
            x / (1.0 + (-2.0 * u).exp())
        }
        Act::Gelu => 0.5 * x * erfc(-x / 2.0_f64.sqrt()),
    }
}

/// The complementary error function: its series near 0, its continued fraction beyond.
fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    let root_pi = std::f64::consts::PI.sqrt();
    if x < 2.5 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return 1.0 - 2.0 / root_pi * sum;
    }
    let fraction = (1..200).rev().fold(x, |below, n| x + f64::from(n) / 2.0 / below);
    (-x * x).exp() / root_pi / fraction
}

#[track_caller]
fn near(got: f32, want: f64, tolerance: f64, what: std::fmt::Arguments<'_>) {
    let apart = (f64::from(got) - want).abs();
    assert!(apart <= tolerance, "{what}: {got:e}, not {want:e}; apart {apart:e} > {tolerance:e}");
}

/// Whether all results are the same to the bit.
#[track_caller]
fn identical(results: &[Vec<f32>], what: &str) {
    let bits = |v: &Vec<f32>| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for other in &results[1..] {
        assert!(bits(&results[0]) == bits(other), "{what}: threads change the result");
    }
}
