use super::*;

/// One row of one head, by the definition.
fn attend(shape: &AttnShape, s: &AttnSegment<'_>, row: usize, head: usize, q: &[f32]) -> Vec<f64> {
    let AttnShape { n_heads, n_kv_heads, head_dim: d, scale, window } = *shape;
    let position = s.pos0 + row;
    let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
    let cached = |j: usize| (j * n_kv_heads + head / (n_heads / n_kv_heads)) * d;
    let q = &q[((s.row0 + row) * n_heads + head) * d..][..d];
    let (k, v) = (s.k.values(), s.v.values());
    let score = |j: usize| {
        let sum: f64 = q.iter().zip(&k[cached(j)..]).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
        sum * f64::from(scale)
    };
    let scores: Vec<f64> = (first..=position).map(score).collect();
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut z = vec![0.0; d];
    for (j, weight) in (first..=position).zip(weights) {
        for (z, v) in z.iter_mut().zip(&v[cached(j)..]) {
            *z += weight / sum * f64::from(*v);
        }
    }
    z
}

fn pages(dtype: DType, shape: &AttnShape, rows: &[f32]) -> KvPages {
    let mut pages = KvPages::new(dtype, shape.n_kv_heads, shape.head_dim);
    pages.extend(rows);
    pages
}

/// Segments as rows and cached positions before them, one row apart, with values times `size`.
fn check(shape: AttnShape, lens: &[(usize, usize)], size: f32, seed: u64, pools: &[Pool]) {
    let mut random = Random(seed);
    let d = shape.head_dim;
    let mut values = |n: usize| random.values(n).iter().map(|x| x * size).collect::<Vec<f32>>();
    let dtype = if d.is_multiple_of(32) && seed.is_multiple_of(4) { DType::Q8_0 } else { TYPES[seed as usize % 3] };
    let mut cache = |rows: usize| pages(dtype, &shape, &values(rows * shape.n_kv_heads * d));
    let caches: Vec<_> = lens.iter().map(|(len, pos0)| (cache(pos0 + len), cache(pos0 + len))).collect();
    let (mut segments, mut row0) = (Vec::new(), 0);
    for (&(len, pos0), (k, v)) in lens.iter().zip(&caches) {
        segments.push(AttnSegment { row0, len, pos0, k, v });
        row0 += len + 1;
    }
    let q = values(row0 * shape.n_heads * d);
    for pool in pools {
        let mut z = vec![7.0; q.len()];
        attention(pool, &shape, &q, &segments, &mut z);
        for s in &segments {
            for (row, head) in (0..s.len).flat_map(|r| (0..shape.n_heads).map(move |h| (r, h))) {
                let want = attend(&shape, s, row, head, &q);
                let got = &z[((s.row0 + row) * shape.n_heads + head) * d..][..d];
                for (got, want) in got.iter().zip(want) {
                    let tolerance = 2e-6 * f64::from(size.max(size * size * size));
                    let isa = pool.isa();
                    near(*got, want, tolerance, format_args!("{isa:?} {shape:?} {lens:?} {row}"));
                }
            }
            let gap = (s.row0 + s.len) * shape.n_heads * d;
            assert!(z[gap..][..shape.n_heads * d].iter().all(|z| *z == 0.0), "rows of nobody");
        }
    }
}

fn shape(n_heads: usize, n_kv_heads: usize, head_dim: usize) -> AttnShape {
    let scale = 1.0 / (head_dim as f32).sqrt();
    AttnShape { n_heads, n_kv_heads, head_dim, scale, window: None }
}

#[test]
fn attention_of_all_head_sizes() {
    let pools = pools(2);
    for d in (1..=70).step_by(3).chain([4, 8, 16, 32, 64, 80, 96, 128]) {
        check(shape(2, 1, d), &[(3, 5), (11, 0)], 1.0, d as u64, &pools);
    }
}

#[test]
fn attention_of_all_lengths() {
    let pools = pools(3);
    for len in 1..=20 {
        check(shape(3, 3, 16), &[(len, 7 * len), (1, 64 * len), (len, 0)], 1.0, 1, &pools);
    }
    check(shape(4, 2, 32), &[(150, 0), (40, 130), (1, 63), (1, 64)], 1.0, 2, &pools);
    check(shape(72, 1, 8), &[(3, 100)], 1.0, 3, &pools);
    check(shape(6, 2, 64), &[(70, 0), (5, 130), (1, 63), (1, 64)], 1.0, 4, &pools);
}

#[test]
fn attention_in_a_window() {
    let pools = pools(2);
    for window in [1, 2, 63, 64, 65, 100, 1000] {
        let shape = AttnShape { window: Some(window), ..shape(2, 2, 16) };
        check(shape, &[(140, 0), (1, 200), (9, 190)], 1.0, window as u64, &pools);
    }
}

#[test]
fn attention_of_extreme_scores() {
    check(shape(2, 2, 32), &[(70, 0), (1, 80)], 30.0, 5, &pools(1));
    check(shape(2, 2, 32), &[(70, 0), (1, 80)], 0.0, 6, &pools(1));
}

#[test]
fn threads_do_not_change_attention() {
    let mut random = Random(9);
    let shape = AttnShape { window: Some(90), ..shape(4, 2, 24) };
    let (k, v) = (random.values(301 * 48), random.values(301 * 48));
    let q = random.values(301 * 96);
    let run = |threads: usize| {
        let mut z = vec![0.0; q.len()];
        let of = |rows: usize, x: &[f32]| pages(DType::F32, &shape, &x[..rows * 48]);
        let (of_many, of_one) = ([of(300, &k), of(300, &v)], [of(301, &k), of(301, &v)]);
        let many = AttnSegment { row0: 0, len: 300, pos0: 0, k: &of_many[0], v: &of_many[1] };
        let one = AttnSegment { row0: 300, len: 1, pos0: 300, k: &of_one[0], v: &of_one[1] };
        attention(&Pool::new(threads), &shape, &q, &[many, one], &mut z);
        z
    };
    identical(&(1..=4).map(run).collect::<Vec<_>>(), "attention");
}

/// The next token at once is what norms, RoPE, the cache and attention give step by step, to the bit.
#[test]
fn attention_of_the_next_token_is_its_steps() {
    let mut random = Random(66);
    let pools: Vec<_> = pools(3).into_iter().chain([Pool::new(1), Pool::new(2)]).collect();
    let shapes = [(1, 1, 8), (4, 4, 32), (6, 2, 64), (8, 1, 128), (16, 16, 128), (3, 3, 20)];
    for (at, (n_heads, n_kv_heads, d)) in shapes.into_iter().enumerate() {
        let mut shape = shape(n_heads, n_kv_heads, d);
        for pos0 in [0, 1, 63, 64, 130] {
            shape.window = (pos0 == 130).then_some(70);
            let dtype = if d == 64 { DType::Q8_0 } else { TYPES[at % 3] };
            let half = [d / 2, 0, d / 4][pos0 % 3];
            let [q, k, v] = [n_heads, n_kv_heads, n_kv_heads].map(|heads| random.values(heads * d));
            let (cos, sin) = (random.values(half), random.values(half));
            let weights = match pos0 % 3 {
                0 => None,
                1 => Some([random.values(d), random.values(d)]),
                _ => Some([random.values(q.len()), random.values(k.len())]),
            };
            let norms = weights.as_ref().map(|weights| weights.each_ref().map(Vec::as_slice));
            let turn = Turn { norms, eps: 1e-5, cos: &cos, sin: &sin };
            let before = [
                pages(dtype, &shape, &random.values(pos0 * k.len())),
                pages(dtype, &shape, &random.values(pos0 * k.len())),
            ];
            for pool in &pools {
                let stepwise = |x: &[f32], which: usize| {
                    let (mut normed, mut turned) = (x.to_vec(), Vec::new());
                    if let Some(norms) = norms {
                        rms_norm(pool, x, norms[which].len(), norms[which], 1e-5, &mut normed);
                    }
                    rope(pool, &normed, 1, x.len() / d, d, 2 * half, &cos, &sin, &mut turned);
                    turned
                };
                let [mut keys, mut values] = before.clone();
                keys.extend(&stepwise(&k, 1));
                values.extend(&v);
                let (mut steps, mut once) = (Vec::new(), Vec::new());
                let segment = AttnSegment { row0: 0, len: 1, pos0, k: &keys, v: &values };
                attention(pool, &shape, &stepwise(&q, 0), &[segment], &mut steps);
                let [mut new_keys, mut new_values] = before.clone();
                attention_of_next(pool, &shape, &turn, [&q, &k, &v], [&mut new_keys, &mut new_values], &mut once);
                let what = format!("{:?} {shape:?} after {pos0}, {} threads", pool.isa(), pool.threads());
                assert_eq!(once, steps, "{what}");
                assert!(new_keys.values() == keys.values() && new_values.values() == values.values(), "cache: {what}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "segment 1 overlaps another")]
fn attention_refuses_overlapping_segments() {
    let (k, q, mut z) = ([0.0; 16], [0.0; 24], Vec::new());
    let k = pages(DType::F32, &shape(1, 1, 8), &k);
    let segment = AttnSegment { row0: 0, len: 2, pos0: 0, k: &k, v: &k };
    let other = AttnSegment { row0: 1, ..segment };
    attention(&Pool::new(1), &shape(1, 1, 8), &q, &[segment, other], &mut z);
}

#[test]
fn attention_of_nothing() {
    let mut z = vec![1.0];
    attention(&Pool::new(1), &shape(1, 1, 8), &[], &[], &mut z);
    assert!(z.is_empty());
}

/// Pages give back what was put in, whatever the pieces it came in and whatever was taken back in between.
#[test]
fn pages_keep_what_they_get() {
    let mut random = Random(11);
    let (heads, dim) = (3, 32);
    let rows = random.values(200 * heads * dim);
    for dtype in [DType::F32, DType::F16, DType::Q8_0] {
        let bytes = dtype.row_bytes(rows.len()).unwrap();
        let mut rounded = vec![0; bytes];
        quantize(dtype, &rows, &mut rounded);
        let mut want = vec![0.0; rows.len()];
        dequantize(dtype, &rounded, &mut want);
        let mut pages = KvPages::new(dtype, heads, dim);
        let width = heads * dim;
        for (from, to) in [(0, 1), (1, 64), (64, 150), (100, 130), (128, 129), (129, 200)] {
            pages.truncate(from);
            pages.extend(&rows[from * width..to * width]);
            assert_eq!((pages.len(), pages.is_empty()), (to, false));
            assert!(pages.values() == want[..to * width], "{} up to {to}", dtype.name());
        }
        pages.truncate(300);
        assert_eq!(pages.len(), 200);
    }
}
