//! Weights in blocks: their values against ggml's, their products against `f64`.

use std::ops::Range;

use super::products::{Experts, check_ffn, some_ids};
use super::*;

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/gguf_types/");

/// Per type its blocks, and the 1024 values that ggml makes of them.
fn fixture() -> Vec<(DType, Vec<u8>, Vec<f32>)> {
    let read = |name: &str| std::fs::read(format!("{FIXTURE}{name}")).expect("the fixture is there");
    let (blocks, values) = (read("blocks.bin"), read("values.bin"));
    let values: Vec<f32> = values.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let index = String::from_utf8(read("index.txt")).expect("the index is text");
    let (mut at, mut all) = (0, Vec::new());
    for (line, values) in index.lines().zip(values.chunks_exact(1024)) {
        let (name, len) = line.split_once(' ').expect("a name and a length");
        let dtype = *DType::ALL.iter().find(|t| t.name() == name).expect("a type of this crate");
        let len: usize = len.parse().expect("a number of bytes");
        all.push((dtype, blocks[at..at + len].to_vec(), values.to_vec()));
        at += len;
    }
    assert_eq!((at, all.len()), (blocks.len(), DType::ALL.len()), "every type, and nothing else");
    all
}

#[test]
fn values_are_those_of_ggml_to_the_bit() {
    for (dtype, blocks, want) in fixture() {
        for isa in Isa::available() {
            let mut got = vec![f32::NAN; want.len()];
            dequantize_with(isa, dtype, &blocks, &mut got);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                // Zeros may differ in sign, as ggml's own paths do.
                assert!(got == want, "{isa:?} {} value {i}: {got:e}, not {want:e}", dtype.name());
            }
        }
    }
}

/// The types with blocks, each with real blocks of it.
fn block_types() -> impl Iterator<Item = (DType, Vec<u8>)> {
    fixture().into_iter().filter(|(t, ..)| t.is_quantized()).map(|(dtype, blocks, _)| (dtype, blocks))
}

/// How weights are made.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// The fixture's blocks.
    Real,
    /// Any bits, as long as no value exceeds 1e20: scales of all magnitudes and signs.
    Bits,
    /// Real blocks, most of whose bytes are the extremes that an instruction might trip over.
    Extreme,
}

impl Weights {
    /// Weights of a type with blocks; `blocks` are some that ggml made.
    fn of_blocks(random: &mut Random, dtype: DType, blocks: &[u8], kind: Kind, rows: usize, cols: usize) -> Self {
        let (len, size) = (dtype.block_len(), dtype.block_bytes());
        let mut bytes = vec![0; 1 + rows * cols / len * size];
        let mut values = vec![0.0; len];
        let mut sane = |block: &[u8]| {
            dequantize_with(Isa::Portable, dtype, block, &mut values);
            // Only this type can hide a scale that overflows behind codes of zero.
            let huge = dtype == DType::MXFP4 && block[0] > 190;
            !huge && values.iter().all(|v| v.abs() < 1e20)
        };
        for block in bytes[1..].chunks_exact_mut(size) {
            block.copy_from_slice(&blocks[random.below(blocks.len() / size) * size..][..size]);
            match kind {
                Kind::Real => {}
                Kind::Bits => loop {
                    block.fill_with(|| random.next() as u8);
                    if sane(block) {
                        break;
                    }
                },
                Kind::Extreme => {
                    let extreme = [0xff, 0xff, 0x80, 0x7f, 0][random.below(5)];
                    for i in 0..size {
                        let old = std::mem::replace(&mut block[i], extreme);
                        if !sane(block) || random.below(20) == 0 {
                            block[i] = old;
                        }
                    }
                }
            }
        }
        let exact = widen(dtype, &bytes[1..]);
        Self { dtype, rows, cols, bytes, exact }
    }
}

/// Tokens whose 32s have different sizes, among them zeros, and all of one magnitude.
fn tokens(random: &mut Random, n: usize, cols: usize) -> Vec<f32> {
    let mut x = random.values(n * cols);
    for x in x.chunks_mut(32) {
        match random.below(8) {
            0 => x.fill(0.0),
            1 => x.fill(-3.0),
            2 => x.iter_mut().for_each(|x| *x = 5.0_f32.copysign(*x)),
            3 => x.iter_mut().for_each(|x| *x *= 1e-30),
            4 => x.iter_mut().for_each(|x| *x *= 1e5),
            5 => x[7] = 40.0,
            _ => {}
        }
    }
    x
}

/// Values that are rounded together for weights of a type.
fn extent(dtype: DType) -> usize {
    let levels = [DType::Q2_K, DType::Q3_K, DType::Q4_K, DType::Q5_K, DType::Q6_K, DType::IQ4_XS];
    if levels.contains(&dtype) { 256 } else { 32 }
}

/// What the products are to be made of: every `extent` values in whole steps of 1/127 of their greatest.
fn rounded(x: &[f32], extent: usize) -> Vec<f64> {
    let group = |x: &[f32]| {
        let most = x.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        let inverse = if most < 1e-35 { 0.0 } else { 127.0 / most };
        let step = f64::from(most / 127.0);
        x.iter().map(|x| f64::from((x * inverse).round_ties_even()) * step).collect::<Vec<_>>()
    };
    x.chunks(extent).flat_map(group).collect()
}

/// The product of a row with a token as the kernel rounds it, and how far off `f32` may be: codes and
/// offsets are gathered apart, so errors are in proportion to the greatest weight that a chunk's scales
/// allow: that there is, or `reach`.
fn expect(w: &Weights, row: usize, x: &[f64], reach: f64) -> (f64, f64) {
    let w = &w.exact[row * w.cols..][..w.cols];
    let sum = w.iter().zip(x).map(|(w, x)| w * x).sum();
    let size: f64 = w.chunks(256).zip(x.chunks(256)).map(|(w, x)| greatest(w).max(reach) * total(x)).sum();
    (sum, (4.0 + (w.len() as f64).sqrt()) * 8.0 * EPS * size + 1e-30)
}

fn greatest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |most, v| most.max(v.abs()))
}

fn total(values: &[f64]) -> f64 {
    values.iter().map(|v| v.abs()).sum()
}

#[test]
fn products_are_those_of_rounded_tokens() {
    let (mut random, pools) = (Random(31), pools(2));
    for (dtype, blocks) in block_types() {
        for (i, kind) in [Kind::Real, Kind::Bits, Kind::Extreme].into_iter().enumerate() {
            // Extreme bytes leave codes that cancel their offsets, but no greater scales than real blocks have.
            let reach = if matches!(kind, Kind::Extreme) { greatest(&widen(dtype, &blocks)) } else { 0.0 };
            for n in (1..=8).chain([13, 40]) {
                let (rows, cols) = (1 + random.below(70), dtype.block_len() * (1 + (n + i) % 3));
                let w = Weights::of_blocks(&mut random, dtype, &blocks, kind, rows, cols);
                let x = tokens(&mut random, n, cols);
                let exact = rounded(&x, extent(dtype));
                let bias = random.values(rows);
                for (pool, pack) in pools.iter().flat_map(|p| [(p, Pack::BySize), (p, Pack::Always)]) {
                    let mut y = vec![f32::NAN; n * rows];
                    matmul(pool, pack, w.get(), &x, n, (n % 2 == 0).then_some(&bias), &mut y);
                    for (i, y) in y.iter().enumerate() {
                        let (t, r) = (i / rows, i % rows);
                        let (sum, tolerance) = expect(&w, r, &exact[t * cols..][..cols], reach);
                        let b = if n % 2 == 0 { f64::from(bias[r]) } else { 0.0 };
                        let (isa, name) = (pool.isa(), dtype.name());
                        let what = format_args!("{isa:?} {name} {kind:?} {pack:?} {rows}x{cols} n{n} {t},{r}");
                        near(*y, sum + b, tolerance + EPS * b.abs(), what);
                    }
                }
            }
        }
    }
}

/// The tolerance that is promised: each token's value may be off by 1/254 of the greatest of its 32 or 256.
#[test]
fn rounding_tokens_costs_what_is_stated() {
    let (mut random, pool) = (Random(32), Pool::new(1));
    for (dtype, blocks) in block_types() {
        let (n, rows, cols) = (9, 40, 512);
        let w = Weights::of_blocks(&mut random, dtype, &blocks, Kind::Real, rows, cols);
        let x = random.values(n * cols);
        let mut y = vec![f32::NAN; n * rows];
        matmul(&pool, Pack::BySize, w.get(), &x, n, None, &mut y);
        let (mut error, mut power) = (0.0, 0.0);
        for (i, y) in y.iter().enumerate() {
            let (x, r) = (&x[i / rows * cols..][..cols], i % rows);
            let (sum, _) = w.times(r, x);
            let groups = w.exact[r * cols..][..cols].chunks(extent(dtype)).zip(x.chunks(extent(dtype)));
            let worst: f64 = groups
                .map(|(w, x)| f64::from(x.iter().fold(0.0_f32, |most, x| most.max(x.abs()))) / 254.0 * total(w))
                .sum();
            near(*y, sum, worst * 1.001, format_args!("{} {i}", dtype.name()));
            error += (f64::from(*y) - sum).powi(2);
            power += sum.powi(2);
        }
        assert!(error.sqrt() < 0.01 * power.sqrt(), "{}: {:e}", dtype.name(), (error / power).sqrt());
    }
}

#[test]
fn values_that_are_not_finite_spoil_their_token_alone() {
    let mut random = Random(33);
    for (dtype, blocks) in block_types() {
        let w = Weights::of_blocks(&mut random, dtype, &blocks, Kind::Real, 9, 256);
        for (pool, n) in pools(1).iter().flat_map(|p| [(p, 3), (p, 7)]) {
            for bad in [f32::NAN, f32::INFINITY, -f32::INFINITY] {
                let (mut x, mut y) = (random.values(n * 256), vec![0.0; n * 9]);
                x[256 + 77] = bad;
                matmul(pool, Pack::BySize, w.get(), &x, n, None, &mut y);
                for (i, y) in y.iter().enumerate() {
                    assert_eq!(y.is_nan(), i / 9 == 1, "{:?} {} n{n} {bad} {i}: {y}", pool.isa(), dtype.name());
                }
            }
        }
    }
}

#[test]
fn transposed_products_are_exact() {
    let (mut random, pools) = (Random(34), pools(2));
    for (dtype, blocks) in block_types() {
        let (n, rows, cols) = (5, 21, 2 * dtype.block_len());
        let w = Weights::of_blocks(&mut random, dtype, &blocks, Kind::Bits, rows, cols);
        let x = random.values(n * rows);
        for pool in &pools {
            let mut y = vec![f32::NAN; n * cols];
            matmul_transposed(pool, w.get(), &x, n, &mut y);
            for (i, y) in y.iter().enumerate() {
                let terms = (0..rows).map(|r| w.exact[r * cols + i % cols] * f64::from(x[i / cols * rows + r]));
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), v| (sum + v, size + v.abs()));
                near(*y, sum, 9.0 * EPS * size + 1e-37, format_args!("{:?} {} {i}", pool.isa(), dtype.name()));
            }
        }
    }
}

#[test]
fn gated_hidden_of_two_types() {
    let mut random = Random(35);
    let types: Vec<_> = block_types().collect();
    let find = |dtype| types.iter().find(|(t, _)| *t == dtype).expect("a type of the fixture");
    let (rows, cols) = (45, 256);
    for (a, b) in
        [(DType::Q4_K, DType::Q6_K), (DType::Q5_K, DType::Q4_0), (DType::Q8_0, DType::F32), (DType::BF16, DType::MXFP4)]
    {
        let mut matrix = |dtype: DType| {
            if dtype.is_quantized() {
                let (_, blocks) = find(dtype);
                Weights::of_blocks(&mut random, dtype, blocks, Kind::Real, rows, cols)
            } else {
                let values = random.values(rows * cols);
                Weights::new(dtype, rows, cols, &values)
            }
        };
        let (gate, up) = (matrix(a), matrix(b));
        for n in [1, 4, 6, 14, 210] {
            let x = random.values(n * cols);
            let exact: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            let rounded = rounded(&x, extent(a).max(extent(b)));
            let of = |dtype: DType| if dtype.is_quantized() { &rounded } else { &exact };
            for pool in pools(2) {
                let mut hidden = vec![f32::NAN; n * rows];
                gated_hidden(&pool, Pack::BySize, gate.get(), up.get(), &x, n, Act::Silu, &mut hidden);
                for (i, h) in hidden.iter().enumerate() {
                    let (t, r) = (i / rows * cols, i % rows);
                    let (g, g_off) = expect(&gate, r, &of(a)[t..][..cols], 0.0);
                    let (u, u_off) = expect(&up, r, &of(b)[t..][..cols], 0.0);
                    // The slope of silu is at most 1.1.
                    let tolerance = 1.1 * g_off * (u.abs() + u_off) + u_off * g.abs() + 20.0 * EPS * (g * u).abs();
                    let want = activated(Act::Silu, g) * u;
                    near(*h, want, tolerance + 1e-9, format_args!("{:?} {a:?} {b:?} n{n} {i}", pool.isa()));
                }
            }
        }
    }
}

#[test]
fn experts_at_once_of_different_types() {
    let (mut random, pools) = (Random(37), pools(2));
    let types: Vec<_> = block_types().collect();
    for pair in types.windows(2) {
        let mut matrix = |which: usize, rows, cols| {
            let (dtype, blocks) = &pair[which];
            Weights::of_blocks(&mut random, *dtype, blocks, Kind::Real, rows, cols)
        };
        let weights = [0, 1, 1, 0].map(|e| [matrix(e, 256, 256), matrix(1 - e, 256, 256), matrix(e, 256, 256)]).into();
        let experts = Experts { d: 256, i: 256, weights };
        check_ffn(&experts, &random.values(256), Act::Silu, &pools);
    }
}

#[test]
fn experts_of_all_block_types() {
    let (mut random, pools) = (Random(36), pools(3));
    for (at, (dtype, blocks)) in block_types().enumerate() {
        let (k, d, i) = (2, 256, 256 * (1 + at % 2));
        let mut matrix = |rows, cols| Weights::of_blocks(&mut random, dtype, &blocks, Kind::Real, rows, cols);
        let weights: Vec<_> = (0..4).map(|_| [matrix(i, d), matrix(i, d), matrix(d, i)]).collect();
        let experts = Experts { d, i, weights };
        check_ffn(&experts, &random.values(d), Act::Silu, &pools);
        for n in [1, 3, 30] {
            let ids = some_ids(&mut random, n * k, 4);
            let x = random.values(n * d);
            for pool in &pools {
                let (mut hidden, mut out) = (vec![f32::NAN; n * k * i], vec![f32::NAN; n * k * d]);
                let (mut h, mut o);
                let pack = Pack::Always;
                expert_hidden(pool, pack, &experts.get(), &x, n, k, &ids, Act::Silu, i, &mut hidden).unwrap();
                expert_down(pool, pack, &experts.get(), &hidden, n, k, &ids, d, &mut out).unwrap();
                for (s, id) in ids.iter().enumerate() {
                    (h, o) = (vec![0.0; i], vec![0.0; d]);
                    if *id != NO_EXPERT {
                        let [gate, up, down] = &experts.weights[*id as usize];
                        let x = &x[s / k * d..][..d];
                        gated_hidden(pool, pack, gate.get(), up.get(), x, 1, Act::Silu, &mut h);
                        matmul(pool, pack, down.get(), &h, 1, None, &mut o);
                    }
                    let what = format!("{:?} {} n{n} slot {s}", pool.isa(), dtype.name());
                    assert!(h == hidden[s * i..][..i] && o == out[s * d..][..d], "{what}");
                }
            }
        }
    }
}

#[test]
fn neither_threads_nor_neighbours_change_products_of_blocks() {
    let mut random = Random(37);
    let pools: Vec<_> = (1..=4).map(Pool::new).collect();
    for (dtype, blocks) in block_types() {
        let (rows, cols) = (300, 512);
        let w = Weights::of_blocks(&mut random, dtype, &blocks, Kind::Real, rows, cols);
        let x = tokens(&mut random, 40, cols);
        let product = |pool: &Pool, pack, x: &[f32]| {
            let mut y = vec![0.0; x.len() / cols * rows];
            matmul(pool, pack, w.get(), x, x.len() / cols, None, &mut y);
            y
        };
        for n in [1, 3, 40] {
            let of = |pool: &Pool| product(pool, Pack::BySize, &x[..n * cols]);
            identical(&pools.iter().map(of).collect::<Vec<_>>(), dtype.name());
        }
        let all = product(&pools[1], Pack::Always, &x);
        for (from, to) in [(0, 1), (3, 7), (11, 24), (39, 40)] {
            let some = product(&pools[1], Pack::Always, &x[from * cols..to * cols]);
            identical(&[some, all[from * rows..to * rows].to_vec()], dtype.name());
        }
    }
}

/// Many tokens are cut into chunks, each of which meets all rows.
#[test]
fn chunks_of_tokens_do_not_change_products_of_blocks() {
    let (mut random, pool) = (Random(48), Pool::new(2));
    for (dtype, blocks) in block_types() {
        let (n, few, rows, cols) = (421, 30, 70, dtype.block_len().max(64));
        let w = Weights::of_blocks(&mut random, dtype, &blocks, Kind::Real, rows, cols);
        let x = tokens(&mut random, n, cols);
        let product = |x: &[f32]| {
            let mut y = vec![f32::NAN; x.len() / cols * rows];
            matmul(&pool, Pack::Always, w.get(), x, x.len() / cols, None, &mut y);
            y
        };
        let parts: Vec<f32> = x.chunks(few * cols).flat_map(product).collect();
        identical(&[product(&x), parts], dtype.name());
    }
}

/// Some experts of a product have many tokens, others few: activations are rounded once for both ways.
#[test]
fn experts_with_many_and_few_tokens_are_those_alone() {
    let mut random = Random(50);
    for (dtype, blocks) in block_types() {
        let (rows, cols, ids) = (70, dtype.block_len().max(256), [0, 0, 1, 0, 0, 0, 0]);
        let [a, b] = [(); 2].map(|()| Weights::of_blocks(&mut random, dtype, &blocks, Kind::Real, rows, cols));
        let experts = [&a, &b].map(|w| Some(ExpertRef { gate: w.get(), up: w.get(), down: w.get() }));
        let x = tokens(&mut random, ids.len(), cols);
        for pool in pools(2) {
            let mut y = vec![f32::NAN; ids.len() * rows];
            expert_down(&pool, Pack::BySize, &experts, &x, ids.len(), 1, &ids, rows, &mut y).unwrap();
            for (id, w) in [&a, &b].into_iter().enumerate() {
                let of = |all: &[f32], width: usize| -> Vec<f32> {
                    all.chunks(width)
                        .zip(ids)
                        .filter(|(_, of)| *of as usize == id)
                        .flat_map(|(v, _)| v.to_vec())
                        .collect()
                };
                let x = of(&x, cols);
                let mut alone = vec![f32::NAN; x.len() / cols * rows];
                matmul(&pool, Pack::BySize, w.get(), &x, x.len() / cols, None, &mut alone);
                identical(&[alone, of(&y, rows)], &format!("{:?} {} {id}", pool.isa(), dtype.name()));
            }
        }
    }
}

/// Several matrices at once: of types whose activations are rounded in one way, in two, and not at all.
#[test]
fn products_with_several_matrices_are_those_with_each() {
    let mut random = Random(51);
    let types: Vec<_> = block_types().collect();
    let cols = 256;
    for dtypes in [
        [DType::Q4_K, DType::Q6_K, DType::Q4_K],
        [DType::Q4_K, DType::Q8_0, DType::F32],
        [DType::Q4_0, DType::F16, DType::Q8_0],
        [DType::F32, DType::F32, DType::BF16],
    ] {
        let mut rows = 20;
        let matrices = dtypes.map(|dtype| {
            rows += 25;
            match types.iter().find(|(t, _)| *t == dtype) {
                Some((_, blocks)) => Weights::of_blocks(&mut random, dtype, blocks, Kind::Real, rows, cols),
                None => Weights::new(dtype, rows, cols, &random.values(rows * cols)),
            }
        });
        let bias = random.values(matrices[1].rows);
        let all = [(matrices[0].get(), None), (matrices[1].get(), Some(&bias[..])), (matrices[2].get(), None)];
        for (pool, pack) in pools(3).iter().flat_map(|p| [(p, Pack::BySize), (p, Pack::Always)]) {
            for n in [0, 1, 3, 40] {
                let x = tokens(&mut random, n, cols);
                let mut each = [vec![f32::NAN], vec![], vec![f32::NAN; 9000]];
                matmul_each(pool, pack, all, &x, n, each.each_mut());
                for ((w, bias), each) in all.into_iter().zip(each) {
                    let mut alone = vec![];
                    matmul(pool, pack, w, &x, n, bias, &mut alone);
                    identical(&[each, alone], &format!("{:?} {dtypes:?} {pack:?} n{n}", pool.isa()));
                }
            }
        }
    }
}

/// Some rows of a matrix.
fn rows_of(w: MatRef<'_>, rows: Range<usize>) -> MatRef<'_> {
    let bytes = w.row_bytes();
    MatRef::new(w.dtype, rows.len(), w.cols, &w.data[rows.start * bytes..rows.end * bytes]).unwrap()
}

/// Many rows are cut into pieces, of which two streams are read at a time: rows of one matrix, or of two.
#[test]
fn pieces_of_rows_do_not_change_products_of_blocks() {
    let mut random = Random(49);
    for (dtype, blocks) in block_types() {
        let (rows, cols) = (2500, dtype.block_len().max(256));
        let [a, b] = [(); 2].map(|()| Weights::of_blocks(&mut random, dtype, &blocks, Kind::Real, rows, cols));
        let x = tokens(&mut random, 3, cols);
        for isa in Isa::available() {
            let pool = Pool::with_isa(2, isa);
            for n in [1, 3] {
                let x = &x[..n * cols];
                let mut by_rows = [vec![vec![]; n], vec![vec![]; n]];
                let mut whole = [vec![f32::NAN; n * rows], vec![f32::NAN; n * rows]];
                for part in [0..1, 1..701, 701..2500, 0..2500] {
                    let (mut y, mut z) = (vec![f32::NAN; n * part.len()], vec![f32::NAN; n * part.len()]);
                    let [a, b] = [&a, &b].map(|w| rows_of(w.get(), part.clone()));
                    matmul(&pool, Pack::BySize, a, x, n, None, &mut y);
                    gated_hidden(&pool, Pack::BySize, a, b, x, n, Act::Silu, &mut z);
                    if part.len() == rows {
                        whole = [y, z];
                        continue;
                    }
                    for (of, y) in by_rows.iter_mut().zip([y, z]) {
                        for (t, of) in of.iter_mut().enumerate() {
                            of.extend_from_slice(&y[t * part.len()..][..part.len()]);
                        }
                    }
                }
                for (by_rows, whole) in by_rows.into_iter().zip(whole) {
                    identical(&[by_rows.concat(), whole], &format!("{isa:?} {} {n}", dtype.name()));
                }
            }
        }
    }
}

/// With AMX many tokens are multiplied in another way than few, with the same results; also tokens that lie apart in memory.
#[test]
fn tiles_of_whole_numbers_are_those_of_vectors() {
    if !Isa::available().any(|isa| isa == Isa::Amx) {
        return;
    }
    let (mut random, n, few) = (Random(47), 90, 5);
    let pool = Pool::with_isa(2, Isa::Amx);
    for (dtype, blocks) in block_types() {
        for kind in [Kind::Real, Kind::Extreme] {
            let (rows, cols) = (45, 2 * dtype.block_len().max(256));
            let experts: Vec<_> =
                (0..3).map(|_| Weights::of_blocks(&mut random, dtype, &blocks, kind, rows, cols)).collect();
            let x = tokens(&mut random, n, cols);
            let ids: Vec<u32> = (0..n).map(|t| if t < 33 { 0 } else { random.below(3) as u32 }).collect();
            let refs: Vec<_> = experts.iter().map(|w| Some(w.get())).collect();
            let products = |x: &[f32], ids: &[u32]| {
                let mut y = vec![f32::NAN; ids.len() * rows];
                slot_products(&pool, Side::Rows, &refs, x, 1, ids, rows, &mut y).unwrap();
                y
            };
            let tiles = products(&x, &ids);
            let vectors: Vec<f32> =
                x.chunks(few * cols).zip(ids.chunks(few)).flat_map(|(x, ids)| products(x, ids)).collect();
            assert_eq!(tiles, vectors, "{} {kind:?}", dtype.name());
        }
    }
}

/// The two ways in which AVX-512 unpacks codes, with GFNI and without.
#[cfg(target_arch = "x86_64")]
#[test]
fn codes_are_the_same_with_and_without_gfni() {
    use crate::quant::*;
    use std::arch::x86_64::{__m512i, _mm512_storeu_si512};

    #[target_feature(enable = "avx512f,avx512bw,gfni")]
    unsafe fn both<Q: Quant>(block: *const u8) -> [[[u8; 64]; 4]; 2] {
        // SAFETY: there is a block, and the caller saw to the instructions.
        let vectors: [[__m512i; 4]; 2] = unsafe { [Q::wide::<true>(block), Q::wide::<false>(block)] };
        let mut bytes = [[[0; 64]; 4]; 2];
        for (vector, bytes) in vectors.iter().flatten().zip(bytes.iter_mut().flatten()) {
            // SAFETY: as many bytes as a vector has.
            unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), *vector) };
        }
        bytes
    }
    if !Isa::available().any(|isa| isa == Isa::Avx512) || !is_x86_feature_detected!("gfni") {
        return;
    }
    let random = &mut Random(29);
    for dtype in [DType::Q2_K, DType::Q3_K, DType::Q4_K, DType::Q5_K, DType::Q6_K] {
        for _ in 0..20 {
            let block: Vec<u8> = (0..dtype.block_bytes()).map(|_| random.next() as u8).collect();
            let [with, without] = with_quant!(dtype, Q => {
                // SAFETY: a block, and instructions that were detected.
                unsafe { both::<Q>(block.as_ptr()) }
            }, else unreachable!());
            assert_eq!(with, without, "{}", dtype.name());
            assert!(with.as_flattened().iter().any(|&code| code != 0), "{} has codes", dtype.name());
        }
    }
}
