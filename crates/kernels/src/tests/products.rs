use super::*;

/// Products of `n` tokens with `w` on all paths.
fn check_matmul(w: &Weights, x: &[f32], n: usize, bias: Option<&[f32]>, pools: &[Pool]) {
    for pool in pools {
        let mut y = vec![f32::NAN; n * w.rows];
        matmul(pool, Pack::BySize, w.get(), x, n, bias, &mut y);
        for (i, y) in y.iter().enumerate() {
            let (t, r) = (i / w.rows, i % w.rows);
            let (sum, size) = w.times(r, &x[t * w.cols..][..w.cols]);
            let b = bias.map_or(0.0, |b| f64::from(b[r]));
            let tolerance = (4.0 + (w.cols as f64).sqrt()) * EPS * (size + b.abs()) + 1e-37;
            let (isa, dtype, rows, cols) = (pool.isa(), w.dtype, w.rows, w.cols);
            near(*y, sum + b, tolerance, format_args!("{isa:?} {dtype:?} {rows}x{cols} n{n} {t},{r}"));
        }
    }
}

#[test]
fn matmul_of_all_sizes() {
    let (mut random, pools) = (Random(1), pools(2));
    for dtype in TYPES {
        for size in 1..=70 {
            for (rows, cols) in [(size, 1 + random.below(70)), (1 + random.below(70), size)] {
                let cols = cols * dtype.block_len();
                let n = 1 + random.below(20);
                let values = random.nasty(rows * cols);
                let w = Weights::new(dtype, rows, cols, &values);
                let (x, bias) = (random.nasty(n * cols), random.values(rows));
                check_matmul(&w, &x, n, (n % 2 == 0).then_some(&bias), &pools);
            }
        }
    }
}

#[test]
fn products_with_the_transpose() {
    let (mut random, pools) = (Random(21), pools(2));
    for dtype in TYPES {
        for size in (1..=70).step_by(3) {
            let (rows, cols) = (1 + random.below(70), size * dtype.block_len());
            let n = random.below(30);
            let w = Weights::new(dtype, rows, cols, &random.nasty(rows * cols));
            let x = random.nasty(n * rows);
            let column = |c: usize| (0..rows).map(move |r| (r, r * cols + c));
            for pool in &pools {
                let mut y = vec![f32::NAN; n * cols];
                matmul_transposed(pool, w.get(), &x, n, &mut y);
                for (i, y) in y.iter().enumerate() {
                    let (t, c) = (i / cols, i % cols);
                    let terms = column(c).map(|(r, at)| w.exact[at] * f64::from(x[t * rows + r]));
                    let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), v| (sum + v, size + v.abs()));
                    let tolerance = (4.0 + (rows as f64).sqrt()) * EPS * size + 1e-37;
                    near(*y, sum, tolerance, format_args!("{:?} {dtype:?} {rows}x{cols} n{n} {t},{c}", pool.isa()));
                }
            }
        }
    }
}

#[test]
fn slot_products_are_the_products_of_their_experts() {
    let (mut random, pools) = (Random(22), pools(2));
    let (rows, cols, ids) = (20, 32, [2, NO_EXPERT, 0, 2, 2, 0]);
    let weights: Vec<Weights> =
        (0..3).map(|_| Weights::new(DType::BF16, rows, cols, &random.values(rows * cols))).collect();
    let refs: Vec<_> = weights.iter().enumerate().map(|(e, w)| (e != 1).then(|| w.get())).collect();
    for pool in &pools {
        for (side, inner, outer) in [(Side::Rows, cols, rows), (Side::Columns, rows, cols)] {
            let x = random.values(3 * inner);
            let (mut y, mut one) = (vec![f32::NAN; 6 * outer], vec![0.0; outer]);
            slot_products(pool, side, &refs, &x, 2, &ids, outer, &mut y).unwrap();
            for (s, y) in y.chunks(outer).enumerate() {
                let x = &x[s / 2 * inner..][..inner];
                match (ids[s], side) {
                    (NO_EXPERT, _) => one = vec![0.0; outer],
                    (e, Side::Rows) => matmul(pool, Pack::Always, weights[e as usize].get(), x, 1, None, &mut one),
                    (e, Side::Columns) => matmul_transposed(pool, weights[e as usize].get(), x, 1, &mut one),
                }
                assert_eq!(y, one, "{side:?} slot {s}");
            }
            assert!(slot_products(pool, side, &refs, &x, 2, &[1; 6], outer, &mut y).is_err());
        }
    }
}

#[test]
fn matmul_of_all_token_counts() {
    let (mut random, pools) = (Random(2), pools(1));
    for dtype in TYPES {
        let values = random.values(37 * 96);
        let w = Weights::new(dtype, 37, 96, &values);
        for n in (0..=40).chain([95, 96, 97, 200]) {
            let x = random.values(n * 96);
            check_matmul(&w, &x, n, None, &pools);
        }
    }
}

#[test]
fn matmul_keeps_huge_subnormal_and_infinite_values() {
    let mut random = Random(3);
    for pool in pools(1) {
        for n in [1, 3, 16] {
            let big = Weights::new(DType::F32, 5, 33, &[1e30; 5 * 33]);
            let (mut x, mut y) = (random.values(n * 33), vec![0.0; n * 5]);
            x[7] = f32::INFINITY;
            matmul(&pool, Pack::BySize, big.get(), &x, n, None, &mut y);
            assert!(y[..5].iter().all(|y| *y == f32::INFINITY), "{:?} {y:?}", pool.isa());
            assert!(y[5..].iter().all(|y| y.is_finite()));
            x[7] = f32::NAN;
            matmul(&pool, Pack::BySize, big.get(), &x, n, None, &mut y);
            assert!(y[..5].iter().all(|y| y.is_nan()));
            let tiny = Weights::new(DType::F32, 1, 33, &[1e-40; 33]);
            matmul(&pool, Pack::BySize, tiny.get(), &vec![1.0; n * 33], n, None, &mut y);
            near(y[0], 33e-40, 1e-43, format_args!("{:?}", pool.isa()));
        }
    }
}

#[test]
fn matmul_without_inputs_is_the_bias() {
    for pool in pools(1) {
        for n in [1, 16] {
            let w = MatRef::new(DType::F32, 3, 0, &[]).expect("an empty matrix");
            let mut y = vec![f32::NAN; 3 * n];
            matmul(&pool, Pack::BySize, w, &[], n, Some(&[1.0, 2.0, 3.0]), &mut y);
            assert!(y.chunks(3).all(|y| y == [1.0, 2.0, 3.0]), "{y:?}");
            matmul(&pool, Pack::BySize, w, &[], n, None, &mut y);
            assert!(y.iter().all(|y| *y == 0.0), "{y:?}");
        }
        let w = MatRef::new(DType::F32, 0, 3, &[]).expect("an empty matrix");
        let mut y = vec![1.0];
        matmul(&pool, Pack::BySize, w, &[1.0; 6], 2, None, &mut y);
        assert!(y.is_empty());
    }
}

#[test]
fn gated_hidden_with_all_activations() {
    let (mut random, pools) = (Random(4), pools(2));
    for (i, n) in [1, 2, 5, 13, 20].into_iter().enumerate() {
        let (rows, cols, act) = (19 + i, 64, ACTS[i % 3]);
        let (gate, up) = (random.values(rows * cols), random.values(rows * cols));
        let gate = Weights::new(TYPES[i % 3], rows, cols, &gate);
        let up = Weights::new(TYPES[(i + 1) % 3], rows, cols, &up);
        let x = random.values(n * cols);
        for pool in &pools {
            let mut hidden = vec![f32::NAN; n * rows];
            gated_hidden(pool, Pack::BySize, gate.get(), up.get(), &x, n, act, &mut hidden);
            for (at, h) in hidden.iter().enumerate() {
                let x = &x[at / rows * cols..][..cols];
                let ((g, g_size), (u, u_size)) = (gate.times(at % rows, x), up.times(at % rows, x));
                let tolerance = 12.0 * EPS * (1.0 + g_size) * (1.0 + u_size);
                near(*h, activated(act, g) * u, tolerance, format_args!("{act:?} n{n} {at}"));
            }
        }
    }
}

/// Experts of a type, of which the third is missing.
pub(super) struct Experts {
    pub d: usize,
    pub i: usize,
    pub weights: Vec<[Weights; 3]>,
}

impl Experts {
    fn new(random: &mut Random, dtype: DType, count: usize, d: usize, i: usize) -> Self {
        let mut matrix = |rows, cols| {
            let values = random.values(rows * cols);
            Weights::new(dtype, rows, cols, &values)
        };
        let weights = (0..count).map(|_| [matrix(i, d), matrix(i, d), matrix(d, i)]).collect();
        Self { d, i, weights }
    }

    pub(super) fn get(&self) -> Vec<Option<ExpertRef<'_>>> {
        let refs = self
            .weights
            .iter()
            .map(|[gate, up, down]| Some(ExpertRef { gate: gate.get(), up: up.get(), down: down.get() }));
        refs.enumerate().map(|(e, expert)| if e == 2 { None } else { expert }).collect()
    }
}

/// Ids of `n` times `k` slots: some empty, none of expert 2, expert 0 often.
pub(super) fn some_ids(random: &mut Random, slots: usize, experts: usize) -> Vec<u32> {
    let mut id = || match random.below(experts + 3) {
        2 => NO_EXPERT,
        e if e >= experts => 0,
        e => e as u32,
    };
    (0..slots).map(|_| id()).collect()
}

#[test]
fn experts_of_all_token_counts() {
    let (mut random, pools) = (Random(5), pools(3));
    for n in (1..=20).chain([70]) {
        let (k, dtype, act) = (1 + n % 3, TYPES[n % 3], ACTS[n % 3]);
        let experts = Experts::new(&mut random, dtype, 5, 64, 32 * (1 + n % 2));
        let (d, i) = (experts.d, experts.i);
        let ids = some_ids(&mut random, n * k, 5);
        let x = random.values(n * d);
        for pool in &pools {
            let mut hidden = vec![f32::NAN; n * k * i];
            let done = expert_hidden(pool, Pack::BySize, &experts.get(), &x, n, k, &ids, act, i, &mut hidden);
            assert_eq!(done, Ok(()));
            let mut out = vec![f32::NAN; n * k * d];
            let done = expert_down(pool, Pack::BySize, &experts.get(), &hidden, n, k, &ids, d, &mut out);
            assert_eq!(done, Ok(()));
            for s in 0..n * k {
                let (h, o) = (&hidden[s * i..][..i], &out[s * d..][..d]);
                if ids[s] == NO_EXPERT {
                    assert!(h.iter().chain(o).all(|x| x.to_bits() == 0), "empty slot {s}");
                    continue;
                }
                let [gate, up, down] = &experts.weights[ids[s] as usize];
                let x = &x[s / k * d..][..d];
                for (r, got) in h.iter().enumerate() {
                    let ((g, g_size), (u, u_size)) = (gate.times(r, x), up.times(r, x));
                    let tolerance = 12.0 * EPS * (1.0 + g_size) * (1.0 + u_size);
                    near(*got, activated(act, g) * u, tolerance, format_args!("n{n} {s},{r}"));
                }
                for (r, got) in o.iter().enumerate() {
                    let (sum, size) = down.times(r, h);
                    near(*got, sum, 12.0 * EPS * size, format_args!("down n{n} {s},{r}"));
                }
            }
        }
    }
}

/// One token through its experts at once, by any number of threads, is what the three steps give, to the bit.
pub(super) fn check_ffn(experts: &Experts, x: &[f32], act: Act, pools: &[Pool]) {
    let (d, i, all) = (experts.d, experts.i, experts.get());
    for ids in [&[0, 3, 1][..], &[3], &[1, 1, 0, 3, 0, 1, 3, 3, 0]] {
        let chosen: Vec<_> = ids.iter().map(|&id| all[id as usize].expect("not the second")).collect();
        let gates: Vec<f32> = (0..ids.len()).map(|j| 0.1 + 0.3 * j as f32).collect();
        for pool in pools {
            let (k, [mut hidden, mut out, mut sum, mut y]) = (ids.len(), [const { Vec::new() }; 4]);
            expert_hidden(pool, Pack::BySize, &all, x, 1, k, ids, act, i, &mut hidden).unwrap();
            expert_down(pool, Pack::BySize, &all, &hidden, 1, k, ids, d, &mut out).unwrap();
            combine(pool, &out, &gates, ids, 1, k, d, &mut sum);
            expert_ffn(pool, &chosen, &gates, x, act, &mut y);
            let dtype = experts.weights[0][2].dtype;
            assert_eq!(y, sum, "{:?} {dtype:?} {d}x{i} {ids:?}, {} threads", pool.isa(), pool.threads());
        }
    }
}

#[test]
fn experts_at_once_are_their_steps() {
    let mut random = Random(15);
    let pools: Vec<_> = pools(3).into_iter().chain([Pool::new(1), Pool::new(2)]).collect();
    for (at, (d, i)) in [(64, 32), (96, 1), (1, 64), (32, 33), (2112, 96), (160, 704)].into_iter().enumerate() {
        let experts = Experts::new(&mut random, [DType::F32, DType::BF16][at % 2], 4, d, i);
        check_ffn(&experts, &random.values(d), ACTS[at % 3], &pools);
    }
    let nothing = Experts::new(&mut random, DType::F32, 4, 8, 0);
    let mut y = vec![1.0];
    expert_ffn(&pools[0], &[], &[], &[1.0; 8], Act::Silu, &mut y);
    assert_eq!(y, [0.0; 8]);
    check_ffn(&nothing, &[1.0; 8], Act::Silu, &pools);
}

#[test]
#[should_panic(expected = "shape of the weights")]
fn experts_at_once_refuse_other_shapes() {
    let mut random = Random(16);
    let (a, b) = (Experts::new(&mut random, DType::F32, 1, 8, 8), Experts::new(&mut random, DType::F32, 1, 8, 9));
    let both = [a.get()[0].unwrap(), b.get()[0].unwrap()];
    expert_ffn(&Pool::new(2), &both, &[0.5; 2], &[1.0; 8], Act::Silu, &mut Vec::new());
}

#[test]
fn missing_experts_are_errors() {
    let experts = Experts::new(&mut Random(6), DType::F32, 4, 8, 8);
    let pool = Pool::new(1);
    for expert in [2, 4, u32::MAX - 1] {
        let ids = [0, NO_EXPERT, 1, expert];
        let mut hidden = vec![7.0; 32];
        let error = Err(KernelError::MissingExpert { expert, slot: 3 });
        let (x, experts) = ([1.0; 16], experts.get());
        let done = expert_hidden(&pool, Pack::BySize, &experts, &x, 2, 2, &ids, Act::Silu, 8, &mut hidden);
        assert_eq!(done, error);
        assert_eq!(hidden, [7.0; 32]);
        let mut out = Vec::new();
        assert_eq!(expert_down(&pool, Pack::BySize, &experts, &hidden, 2, 2, &ids, 8, &mut out), error);
    }
}

#[test]
fn experts_without_slots() {
    let pool = Pool::new(2);
    let mut hidden = vec![1.0; 6];
    assert_eq!(expert_hidden(&pool, Pack::BySize, &[], &[], 0, 4, &[], Act::Silu, 3, &mut hidden), Ok(()));
    assert!(hidden.is_empty());
    assert_eq!(expert_down(&pool, Pack::BySize, &[], &[], 0, 4, &[], 2, &mut hidden), Ok(()));
    let ids = [NO_EXPERT; 2];
    let done = expert_hidden(&pool, Pack::BySize, &[None], &[1.0; 4], 2, 1, &ids, Act::Silu, 3, &mut hidden);
    assert_eq!((done, hidden), (Ok(()), vec![0.0; 6]));
}

#[test]
fn combine_adds_in_order_and_skips_empty_slots() {
    let mut random = Random(7);
    for pool in pools(2) {
        for (n, k, d) in [(1, 1, 1), (3, 4, 17), (20, 2, 70), (300, 3, 64)] {
            let (slots, gates) = (random.nasty(n * k * d), random.values(n * k));
            let ids = some_ids(&mut random, n * k, 6);
            let mut y = vec![f32::NAN; n * d];
            combine(&pool, &slots, &gates, &ids, n, k, d, &mut y);
            for (i, y) in y.iter().enumerate() {
                let (mut sum, mut size) = (0.0, 0.0);
                for s in (i / d * k..(i / d + 1) * k).filter(|s| ids[*s] != NO_EXPERT) {
                    let term = f64::from(gates[s]) * f64::from(slots[s * d + i % d]);
                    sum += term;
                    size += term.abs();
                }
                near(*y, sum, 4.0 * EPS * size + 1e-44, format_args!("{n} {k} {d} {i}"));
            }
        }
    }
}

#[test]
fn threads_do_not_change_products() {
    let mut random = Random(8);
    let pools: Vec<_> = (1..=4).map(Pool::new).collect();
    for (n, rows) in [(1, 700), (5, 333), (15, 130), (130, 77), (700, 40)] {
        let values = random.values(rows * 192);
        let (w, x) = (Weights::new(DType::BF16, rows, 192, &values), random.values(n * 192));
        let product = |pool: &Pool| {
            let mut y = vec![0.0; n * rows];
            matmul(pool, Pack::BySize, w.get(), &x, n, None, &mut y);
            y
        };
        identical(&pools.iter().map(product).collect::<Vec<_>>(), "matmul");
    }
    for n in [1, 7, 90] {
        let experts = Experts::new(&mut random, DType::Q8_0, 9, 128, 96);
        let (ids, x) = (some_ids(&mut random, n * 4, 9), random.values(n * 128));
        let both = |pool: &Pool| {
            let (mut hidden, mut out) = (vec![0.0; n * 4 * 96], vec![0.0; n * 4 * 128]);
            expert_hidden(pool, Pack::BySize, &experts.get(), &x, n, 4, &ids, Act::Silu, experts.i, &mut hidden)
                .unwrap();
            expert_down(pool, Pack::BySize, &experts.get(), &hidden, n, 4, &ids, experts.d, &mut out).unwrap();
            hidden.extend(out);
            hidden
        };
        identical(&pools.iter().map(both).collect::<Vec<_>>(), "experts");
    }
}

#[test]
#[should_panic(expected = "inputs: rows of 4")]
fn matmul_refuses_wrong_lengths() {
    let w = Weights::new(DType::F32, 3, 4, &[0.0; 12]);
    matmul(&Pool::new(1), Pack::BySize, w.get(), &[0.0; 7], 2, None, &mut Vec::new());
}

#[test]
fn matrices_refuse_wrong_shapes() {
    use KernelError::{DataLength, RowLength};
    let dtype = DType::Q8_0;
    let error = MatRef::new(dtype, 1, 33, &[0; 34]).unwrap_err();
    assert_eq!(error, RowLength { dtype, cols: 33 });
    let error = MatRef::new(dtype, 2, 32, &[0; 67]).unwrap_err();
    assert_eq!(error, DataLength { dtype, rows: 2, cols: 32, expected: 68, found: 67 });
    assert_eq!(error.to_string(), "a Q8_0 matrix of 2 x 32 needs 68 bytes, found 67");
    assert!(MatRef::new(DType::F32, usize::MAX, 8, &[]).is_err());
    assert_eq!(DType::F32.row_bytes(usize::MAX / 2), None);
}

#[test]
fn packed_rows_do_not_depend_on_their_neighbours() {
    let mut random = Random(9);
    let (rows, cols, n) = (50, 64, 30);
    let values = random.values(rows * cols);
    let w = Weights::new(DType::BF16, rows, cols, &values);
    let x = random.values(n * cols);
    for pool in pools(2) {
        let mut all = vec![0.0; n * rows];
        matmul(&pool, Pack::Always, w.get(), &x, n, None, &mut all);
        for (from, to) in [(0, 1), (3, 7), (11, 24), (29, 30)] {
            let mut some = vec![0.0; (to - from) * rows];
            matmul(&pool, Pack::Always, w.get(), &x[from * cols..to * cols], to - from, None, &mut some);
            assert_eq!(some, all[from * rows..to * rows], "{:?} {from}..{to}", pool.isa());
        }
    }
}
