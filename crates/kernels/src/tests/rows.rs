use super::*;
use crate::math::exp_all;
use crate::rows::{dot_with, read_with};
use crate::weight::dequantize_with;

#[test]
fn exp_is_within_two_units() {
    let edges = [0.0, -0.0, 1e-40, 88.72, 88.73, -87.3, -87.4, -100.0, -103.9, -104.1, -1e30];
    let sweep = (-105_000..89_000).step_by(37).map(|i| i as f32 * 1e-3);
    let x: Vec<f32> = sweep.chain(edges).collect();
    for isa in Isa::available() {
        let mut y = x.clone();
        // SAFETY: the set was detected.
        unsafe { exp_all(isa, &mut y) };
        for (x, y) in x.iter().zip(y) {
            let want = f64::from(*x).exp();
            if want < f64::from(f32::MAX) {
                near(
                    y,
                    want,
                    1.5e-7 * want + if want < 1.18e-38 { want } else { 0.0 },
                    format_args!("{isa:?} exp({x})"),
                );
            } else {
                assert_eq!(y, f32::INFINITY, "{isa:?} exp({x})");
            }
        }
        let mut special = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        // SAFETY: the set was detected.
        unsafe { exp_all(isa, &mut special) };
        assert_eq!(special[..2], [f32::INFINITY, 0.0]);
        assert!(special[2].is_nan());
    }
}

#[test]
fn activations() {
    let x: Vec<f32> = (-9000..9000).map(|i| i as f32 * 2e-3).chain([1e30, -1e30, 0.0]).collect();
    for pool in pools(2) {
        for act in ACTS {
            let mut y = x.clone();
            act_inplace(&pool, act, &mut y);
            for (x, y) in x.iter().zip(y) {
                let want = activated(act, f64::from(*x));
                // The exponent grows with the cube, its rounding likewise.
                let relative = 4e-7 * (1.0 + f64::from(x.abs()).min(20.0).powi(3) / 10.0);
                near(y, want, relative * want.abs() + 1e-37, format_args!("{act:?}({x}) {:?}", pool.isa()));
            }
        }
    }
}

#[test]
fn dots_and_sums_of_all_lengths() {
    let mut random = Random(11);
    for n in (0..=70).chain([1000, 70_001]) {
        let (a, b) = (random.nasty(n), random.nasty(n));
        let terms = a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b));
        let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
        for pool in pools(2) {
            let what = format_args!("{:?} {n}", pool.isa());
            let tolerance = (4.0 + (n as f64).sqrt()) * EPS * size + 1e-37;
            near(dot_with(pool.isa(), &a, &b), sum, tolerance, what);
            let mut out = vec![f32::NAN; n];
            add(&pool, &a, &b, &mut out);
            let want: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
            assert_eq!(out, want, "{what}");
            out.copy_from_slice(&a);
            add_inplace(&pool, &mut out, &b);
            assert_eq!(out, want, "{what}");
        }
    }
    assert_eq!(norm_sq(&[3.0, 4.0]), dot(&[5.0], &[5.0]));
}

#[test]
fn norms_of_all_lengths() {
    let mut random = Random(12);
    for d in (1..=70).chain([2048]) {
        let n = 1 + random.below(40);
        let (x, weight) = (random.values(n * d), random.values(d));
        for pool in pools(2) {
            let mut out = vec![f32::NAN; n * d];
            rms_norm(&pool, &x, d, &weight, 1e-5, &mut out);
            for (i, got) in out.iter().enumerate() {
                let row = &x[i / d * d..][..d];
                let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / d as f64;
                let want = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i % d]);
                near(*got, want, 1e-6 * want.abs() + 1e-30, format_args!("{d} {i}"));
            }
        }
    }
}

#[test]
fn rope_turns_the_first_values_of_heads() {
    let mut random = Random(13);
    for (heads, head_dim, rope_dim) in [(1, 2, 2), (3, 70, 66), (2, 64, 64), (4, 24, 12), (2, 8, 0)] {
        for n in [1, 2, 20] {
            let (x, half) = (random.values(n * heads * head_dim), rope_dim / 2);
            let (cos, sin) = (random.values(n * half), random.values(n * half));
            for pool in pools(3) {
                let mut y = Vec::new();
                rope(&pool, &x, n, heads, head_dim, rope_dim, &cos, &sin, &mut y);
                for (at, y) in y.iter().enumerate() {
                    let (t, i) = (at / (heads * head_dim), at % head_dim);
                    let angle = |i: usize| (f64::from(cos[t * half + i]), f64::from(sin[t * half + i]));
                    let value = |at: usize| f64::from(x[at]);
                    let want = if i < half {
                        value(at) * angle(i).0 - value(at + half) * angle(i).1
                    } else if i < rope_dim {
                        value(at) * angle(i - half).0 + value(at - half) * angle(i - half).1
                    } else {
                        value(at)
                    };
                    near(*y, want, 2e-7, format_args!("{heads} {head_dim} {rope_dim} {at}"));
                }
            }
        }
    }
}

#[test]
fn softmax_of_all_lengths() {
    let mut random = Random(14);
    for cols in (1..=70).chain([5000]) {
        let mut x = random.values(20 * cols);
        for (i, x) in x.iter_mut().enumerate() {
            *x *= [1.0, 0.0, 1e4, 30.0][i / cols % 4];
        }
        x[0] = if cols > 1 { f32::NEG_INFINITY } else { 0.0 };
        for pool in pools(2) {
            let mut y = x.clone();
            softmax_rows(&pool, &mut y, cols);
            for (x, y) in x.chunks(cols).zip(y.chunks(cols)) {
                let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weight = |x: f32| (f64::from(x) - f64::from(most)).exp();
                let sum: f64 = x.iter().map(|x| weight(*x)).sum();
                for (x, y) in x.iter().zip(y) {
                    let want = weight(*x) / sum;
                    let relative = 1e-7 * (5.0 + f64::from(x.abs() + most.abs()).min(200.0));
                    near(*y, want, relative * want + 1.2e-38, format_args!("{cols} exp({x})"));
                }
            }
        }
    }
}

#[test]
fn threads_do_not_change_rows() {
    let mut random = Random(15);
    let (x, weight) = (random.values(900 * 100), random.values(100));
    let run = |threads: usize| {
        let pool = Pool::new(threads);
        let mut y = Vec::new();
        let mut normed = Vec::new();
        rms_norm(&pool, &x, 100, &weight, 1e-6, &mut normed);
        rope(&pool, &normed, 900, 2, 50, 50, &x[..900 * 25], &x[1..][..900 * 25], &mut y);
        softmax_rows(&pool, &mut y, 100);
        act_inplace(&pool, Act::Gelu, &mut y);
        y
    };
    identical(&(1..=4).map(run).collect::<Vec<_>>(), "rows");
}

#[test]
fn dequantize_is_exact() {
    let mut random = Random(16);
    for n in (1..=70).chain([1024]) {
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::Q8_0] {
            let n = n * dtype.block_len();
            let bytes: Vec<u8> = (0..=dtype.row_bytes(n).unwrap()).map(|_| random.next() as u8).collect();
            let want = widen(dtype, &bytes[1..]);
            for isa in Isa::available() {
                let mut got = vec![f32::INFINITY; n];
                dequantize_with(isa, dtype, &bytes[1..], &mut got);
                for (got, want) in got.iter().zip(&want) {
                    let same = f64::from(*got) == *want || (got.is_nan() && want.is_nan());
                    assert!(same, "{isa:?} {dtype:?} {got} {want}");
                }
            }
        }
    }
    let halves: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for (isa, dtype) in Isa::available().flat_map(|i| [(i, DType::F16), (i, DType::BF16)]) {
        let (mut got, want) = (vec![0.0; 1 << 16], widen(dtype, &halves));
        dequantize_with(isa, dtype, &halves, &mut got);
        for (got, want) in got.iter().zip(&want) {
            let same = f64::from(*got).to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
            assert!(same, "{isa:?} {dtype:?} {got} {want}");
        }
    }
}

#[test]
fn quantize_rounds_to_the_nearest() {
    let mut random = Random(17);
    let x = random.nasty(64 * 32);
    for (dtype, relative, smallest) in
        [(DType::F32, 0.0, 0.0), (DType::F16, 4.9e-4, 3e-8), (DType::BF16, 3.91e-3, 1e-40)]
    {
        let w = Weights::new(dtype, 64, 32, &x);
        for (x, w) in x.iter().zip(&w.exact) {
            let tolerance = relative * f64::from(x.abs()) + smallest;
            near(*x, *w, tolerance, format_args!("{dtype:?}"));
        }
        // What a type can hold comes back as it was.
        let exact: Vec<f32> = w.exact.iter().map(|w| *w as f32).collect();
        assert_eq!(Weights::new(dtype, 64, 32, &exact).bytes, w.bytes);
    }
    // 1 + 2^-8 and 1 + 3 * 2^-8 lie halfway: to the even ones, 1 and 1 + 2^-6.
    let tie = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0];
    assert_eq!(Weights::new(DType::BF16, 1, 2, &tie).exact, [1.0, 1.015_625]);
    assert_eq!(Weights::new(DType::F16, 1, 1, &[2049.0]).exact, [2048.0]);
}

#[test]
fn q8_0_follows_ggml() {
    let mut random = Random(18);
    let x = random.nasty(300 * 32);
    let w = Weights::new(DType::Q8_0, 300, 32, &x);
    for (x, w) in x.chunks(32).zip(w.exact.chunks(32)) {
        let most = f64::from(x.iter().fold(0.0_f32, |most, x| most.max(x.abs())));
        for (x, w) in x.iter().zip(w) {
            // Half a step, the rounding of the scale, and the least half.
            near(*x, *w, most * (0.5 / 127.0 + 5e-4) + 127.0 * 3e-8, format_args!("{most}"));
        }
    }
    let mut block = [0; 34];
    let mut x = [0.0; 32];
    x[..4].copy_from_slice(&[127.0, -127.0, 2.5, -2.5]);
    quantize(DType::Q8_0, &x, &mut block);
    let want = [0x00, 0x3c, 127, -127_i8 as u8, 3, -3_i8 as u8, 0, 0];
    assert_eq!(block[..8], want);
}

#[test]
fn reading_through_misses_nothing_but_the_end() {
    let bytes: Vec<u8> = (0..5000_u32).map(|i| (i * i % 251) as u8).collect();
    for isa in Isa::available() {
        let whole = bytes.len() - bytes.len() % (32 * isa.lanes());
        let want = bytes[..whole]
            .chunks(4)
            .fold(0_i32, |sum, word| sum.wrapping_add(i32::from_le_bytes(word.try_into().expect("four bytes"))));
        // SAFETY: the set was detected.
        assert_eq!(unsafe { read_with(isa, &bytes) }, want, "{isa:?}");
    }
}
