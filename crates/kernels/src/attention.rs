//! Causal attention over key and value caches.
//!
//! The queries that share a key head (tokens in order, and the heads of its group within a token)
//! form rows. A block of rows meets the keys in blocks of [`KEYS`], keeping a running maximum and
//! sum for the softmax, so that the scores of a block are all that is ever held.

#![allow(clippy::needless_range_loop, reason = "loops over registers are unrolled by their counters")]

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::math::exp;
use crate::pool::{Pool, SendPtr, Share};
use crate::results::{fill, zeros};
use crate::rows::{norm_scale, scaled, turn_head};
use crate::scratch;
use crate::simd::{Isa, Simd, kernel};
use crate::tile::{Columns, DOT_TOKENS, Rows, dots, multiply, pack};
use crate::weight::{Weight, widen, with_weight};
use crate::{DType, KvPages};

/// Rows of queries in a block.
const QUERIES: usize = 64;

/// Keys in a block: a page of the cache.
const KEYS: usize = KvPages::PAGE;

/// From this many rows on keys are packed.
const PACK_FROM: usize = 9;

/// The cost of a key and its value, in rows' worth of using them.
const KEY_COST: usize = 8;

/// What is common to all segments.
#[derive(Clone, Copy, Debug)]
pub struct AttnShape {
    /// Heads of the queries: a multiple of `n_kv_heads`, which share keys in order.
    pub n_heads: usize,
    /// Heads of keys and values.
    pub n_kv_heads: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// Factor of the scores, above 0; usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// If given, a query at position `p` sees only keys after `p - window`; above 0.
    pub window: Option<usize>,
}

/// Queries of one sequence, with its cache.
#[derive(Clone, Copy, Debug)]
pub struct AttnSegment<'a> {
    /// Its first row in `q` and `z`.
    pub row0: usize,
    /// Its rows.
    pub len: usize,
    /// Position of its first row.
    pub pos0: usize,
    /// Keys of positions `0..pos0 + len`.
    pub k: &'a KvPages,
    /// Values, likewise.
    pub v: &'a KvPages,
}

/// `z = softmax(scale q k) v` for each row and head: a row at position `p` sees the keys
/// `0..=p`, within the window. `q` is `[n, n_heads * head_dim]`, as `z` becomes; rows of no segment are zero.
///
/// # Panics
/// If a slice has not the length of its shape, segments overlap, or `shape` breaks its own rules.
pub fn attention(pool: &Pool, shape: &AttnShape, q: &[f32], segments: &[AttnSegment<'_>], z: &mut Vec<f32>) {
    check(shape, q, segments);
    let rows: usize = segments.iter().map(|segment| segment.len).sum();
    let attend = |z: &mut [MaybeUninit<f32>]| {
        if rows * shape.n_heads * shape.head_dim < z.len() {
            zeros(z);
        }
        let z = SendPtr(z.as_mut_ptr().cast());
        // SAFETY: the lengths were checked, a block has rows and heads of its own.
        each_block(pool, shape, segments, |block| unsafe { block.attend(pool.isa(), q.as_ptr(), z) });
    };
    // SAFETY: segments do not overlap, so that with so many rows they have every row, with all heads.
    unsafe { fill(z, q.len(), attend) }
}

/// What becomes of a token's queries and keys before they meet.
#[derive(Clone, Copy, Debug)]
pub struct Turn<'a> {
    /// Weights of the RMS norms of queries and keys, if there are any: of each head's `head_dim` values, or of all heads' together.
    pub norms: Option<[&'a [f32]; 2]>,
    /// What the norms add to the mean of squares.
    pub eps: f32,
    /// Cosines of the angles by which value `i` of each head is turned together with value `i + cos.len()`; may be empty.
    pub cos: &'a [f32],
    /// Sines, likewise.
    pub sin: &'a [f32],
}

impl Turn<'_> {
    /// Writes what becomes of head `head` of `x`, whose norm has `weight`; `scale` is that of all heads' norm.
    fn head(&self, isa: Isa, x: &[f32], weight: Option<(&[f32], f32)>, head: usize, out: &mut [f32]) {
        let at = head * out.len()..(head + 1) * out.len();
        let x_head = &x[at.clone()];
        match weight {
            None => out.copy_from_slice(x_head),
            Some((weight, scale)) => {
                let whole = weight.len() == x.len();
                let (scale, weight) =
                    if whole { (scale, &weight[at]) } else { (norm_scale(isa, x_head, self.eps), weight) };
                scaled(isa, x_head, scale, weight, out);
            }
        }
        turn_head(isa, out, self.cos, self.sin);
    }

    /// The weights of a norm, and its scale if it is one of all of `x`.
    fn norm<'x>(&'x self, isa: Isa, which: usize, x: &[f32]) -> Option<(&'x [f32], f32)> {
        let weight = self.norms?[which];
        Some((weight, if weight.len() == x.len() { norm_scale(isa, x, self.eps) } else { 0.0 }))
    }
}

/// [`attention`] of the next token of a sequence, whose key and value are appended to its cache: `q` is `[n_heads * head_dim]`, `k` and
/// `v` are `[n_kv_heads * head_dim]`, `z` becomes as `q`. It gives what norms ([`rms_norm`](crate::rms_norm)), RoPE
/// ([`rope`](crate::rope)), [`KvPages::extend`] and [`attention`] give one after another, to the bit, but each thread does
/// all of it for its own heads.
///
/// # Panics
/// If a slice has not the length of its shape, the caches differ, or `shape` breaks its own rules.
pub fn attention_of_next(
    pool: &Pool,
    shape: &AttnShape,
    turn: &Turn<'_>,
    [q, k, v]: [&[f32]; 3],
    [keys, values]: [&mut KvPages; 2],
    z: &mut Vec<f32>,
) {
    let (d, pos0, half) = (shape.head_dim, keys.len(), turn.cos.len());
    assert_eq!(q.len(), shape.n_heads * d, "queries of {shape:?}");
    assert_eq!((k.len(), v.len()), (shape.n_kv_heads * d, shape.n_kv_heads * d), "keys and values of {shape:?}");
    assert!(turn.sin.len() == half && 2 * half <= d, "{half} angles for heads of {d}");
    for (x, which) in [(q, 0), (k, 1)] {
        let fits = |weight: &[f32]| weight.len() == d || weight.len() == x.len();
        assert!(turn.norms.is_none_or(|norms| fits(norms[which])), "weights of the norm of {} values", x.len());
    }
    let places = [keys.grow(), values.grow()];
    let segments = [AttnSegment { row0: 0, len: 1, pos0, k: keys, v: values }];
    check(shape, q, &segments);
    let isa = pool.isa();
    scratch::shared(q.len(), |turned| {
        let turned = SendPtr(turned.as_mut_ptr());
        let attend = |z: &mut [MaybeUninit<f32>]| {
            let z = SendPtr(z.as_mut_ptr().cast());
            each_block(pool, shape, &segments, |block| {
                let AttnSegment { k: keys, v: values, .. } = *block.segment;
                let heads = block.kv_heads.clone();
                heads.clone().for_each(|head| [keys, values].iter().for_each(|pages| pages.ask_for_last(head)));
                let [of_q, of_k] = [turn.norm(isa, 0, q), turn.norm(isa, 1, k)];
                // SAFETY: the lengths were checked, a block has heads of its own, and both caches have just grown.
                unsafe {
                    for head in heads.start * block.group..heads.end * block.group {
                        let out = std::slice::from_raw_parts_mut(turned.get().add(head * d), d);
                        turn.head(isa, q, of_q, head, out);
                    }
                    scratch::floats(d, |key| {
                        for head in heads {
                            turn.head(isa, k, of_k, head, key);
                            keys.put(places[0], head, key);
                            values.put(places[1], head, &v[head * d..][..d]);
                        }
                    });
                    block.attend(isa, turned.get(), z);
                }
            });
        };
        // SAFETY: there are all heads of the one row.
        unsafe { fill(z, q.len(), attend) }
    });
}

/// Calls `f` once for each block of the queries.
fn each_block(pool: &Pool, shape: &AttnShape, segments: &[AttnSegment<'_>], f: impl Fn(Block<'_>) + Sync) {
    // Every block, with its cost.
    let blocks = |f: &mut dyn FnMut(Block<'_>, u64)| {
        let group = shape.n_heads / shape.n_kv_heads;
        for segment in segments {
            for first in (0..segment.len * group).step_by(QUERIES) {
                let rows = first..(first + QUERIES).min(segment.len * group);
                let heads = shape.n_kv_heads.div_ceil(pool.threads()).min(QUERIES / rows.len());
                for head in (0..shape.n_kv_heads).step_by(heads) {
                    let kv_heads = head..(head + heads).min(shape.n_kv_heads);
                    let block = Block { shape, segment, kv_heads, group, rows: rows.clone() };
                    let cost = block.kv_heads.len() * (rows.len() + KEY_COST) * block.keys().len();
                    f(block, cost as u64);
                }
            }
        }
    };
    let mut total = 0;
    blocks(&mut |_, cost| total += cost);
    pool.run_parts(total as usize * shape.head_dim, |part| {
        let mut share = Share::new(total, part);
        blocks(&mut |block, cost| {
            if !share.take(1, cost).is_empty() {
                f(block);
            }
        });
    });
}

fn check(shape: &AttnShape, q: &[f32], segments: &[AttnSegment<'_>]) {
    let AttnShape { n_heads, n_kv_heads, head_dim, window, .. } = *shape;
    assert!(n_kv_heads > 0 && head_dim > 0 && n_heads.is_multiple_of(n_kv_heads), "{shape:?}");
    assert!(window != Some(0) && shape.scale > 0.0, "{shape:?}");
    let width = n_heads * head_dim;
    for (i, s) in segments.iter().enumerate() {
        assert!(s.row0 + s.len <= q.len() / width.max(1), "segment {i} within {} values", q.len());
        for m in [s.k, s.v] {
            let shape = (m.len(), m.heads(), m.head_dim());
            assert_eq!(shape, (s.pos0 + s.len, n_kv_heads, head_dim), "cache of segment {i}");
        }
        let apart = |o: &AttnSegment<'_>| s.row0 + s.len <= o.row0 || o.row0 + o.len <= s.row0;
        assert!(segments[..i].iter().all(apart), "segment {i} overlaps another");
    }
}

/// Some rows of some key heads, [`QUERIES`] at most. Row `r` of a key head is the `r % group`-th
/// of its heads for token `r / group`.
///
/// A block takes several key heads if they have few queries, since what they have of a page of positions lies side by side.
struct Block<'a> {
    shape: &'a AttnShape,
    segment: &'a AttnSegment<'a>,
    kv_heads: Range<usize>,
    group: usize,
    rows: Range<usize>,
}

impl Block<'_> {
    /// The keys that a row sees.
    fn seen(&self, row: usize) -> Range<usize> {
        let end = self.segment.pos0 + row / self.group + 1;
        self.shape.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// The keys that any row sees, from the beginning of a block of keys.
    fn keys(&self) -> Range<usize> {
        let start = self.seen(self.rows.start).start;
        start - start % KEYS..self.seen(self.rows.end - 1).end
    }

    /// Where a row of a key head lies in `q` and `z`.
    fn offset(&self, kv_head: usize, row: usize) -> usize {
        let token = self.segment.row0 + row / self.group;
        let head = kv_head * self.group + row % self.group;
        (token * self.shape.n_heads + head) * self.shape.head_dim
    }

    /// Computes the block's part of `z`.
    ///
    /// # Safety
    /// All lengths must fit, and nobody else touch these rows of `z`.
    unsafe fn attend(&self, isa: Isa, q: *const f32, z: SendPtr) {
        let (d, tile) = (self.shape.head_dim, isa.tile_rows());
        let padded = d.next_multiple_of(tile);
        let n = self.rows.len();
        let lengths = [QUERIES * padded, QUERIES * KEYS, d * tile, KEYS * padded];
        scratch::floats(lengths.iter().sum(), |scratch| {
            let (sums, rest) = scratch.split_at_mut(lengths[0]);
            let (scores, rest) = rest.split_at_mut(lengths[1]);
            // Of keys that must be widened, and then of values.
            let (packed, copy) = rest.split_at_mut(lengths[2]);
            sums[..self.kv_heads.len() * n * padded].fill(0.0);
            let mut state = [(f32::MIN, 0.0); QUERIES];
            let mut queries = [std::ptr::null(); QUERIES];
            let mut weights = [std::ptr::null(); QUERIES];
            for (i, weights) in weights.iter_mut().enumerate() {
                *weights = scores.as_ptr().add(i * KEYS);
            }
            let all = self.keys();
            let straight = n < PACK_FROM && !self.segment.v.dtype().is_quantized();
            for first in all.clone().step_by(KEYS) {
                let keys = first..(first + KEYS).min(all.end);
                for kv_head in self.kv_heads.clone() {
                    for (query, row) in queries.iter_mut().zip(self.rows.clone()) {
                        *query = q.add(self.offset(kv_head, row));
                    }
                    let v = self.segment.v.rows(kv_head, &keys);
                    let mut k = Rows { then: Some(v.data), ..self.segment.k.rows(kv_head, &keys) };
                    // The next keys are of the next head, or of the first one in the next page.
                    let next = if kv_head + 1 < self.kv_heads.end {
                        Some((kv_head + 1, keys.clone()))
                    } else {
                        (keys.end < all.end).then(|| (self.kv_heads.start, keys.end..keys.end + 1))
                    };
                    let next = next.map(|(head, keys)| self.segment.k.rows(head, &keys).data);
                    let v = Rows { then: next, ..v };
                    if k.dtype.is_quantized() {
                        let data = self.copied(isa, &k, padded, copy).data.cast();
                        k = Rows { dtype: DType::F32, data, stride: 4 * padded, then: None, ..k };
                    }
                    self.scores(isa, &k, &queries[..n], packed, scores);
                    let at = (kv_head - self.kv_heads.start) * n;
                    let sums = &mut sums[at * padded..];
                    self.soften(isa, &keys, scores, &mut state[at..], sums, padded);
                    if straight {
                        for (i, weights) in weights[..n].chunks(DOT_TOKENS).enumerate() {
                            mix(isa, &v, weights, sums.as_mut_ptr().add(i * DOT_TOKENS * padded), padded);
                        }
                        continue;
                    }
                    let b = self.copied(isa, &v, padded, copy);
                    for c in (0..padded).step_by(tile) {
                        let b = Columns { data: b.data.add(c), ..b };
                        multiply(isa, &b, &weights[..n], sums.as_mut_ptr().add(c), padded, true);
                    }
                }
            }
            let rows = self.kv_heads.clone().flat_map(|h| self.rows.clone().map(move |r| (h, r)));
            for (i, (kv_head, row)) in rows.enumerate() {
                let z = z.get().add(self.offset(kv_head, row));
                let scale = 1.0 / state[i].1;
                for (c, sum) in sums[i * padded..][..d].iter().enumerate() {
                    z.add(c).write(sum * scale);
                }
            }
        });
    }

    /// [`soften`] for each row of a key head.
    unsafe fn soften(
        &self,
        isa: Isa,
        keys: &Range<usize>,
        scores: &mut [f32],
        state: &mut [(f32, f32)],
        sums: &mut [f32],
        padded: usize,
    ) {
        let scores = scores.chunks_exact_mut(KEYS).zip(sums.chunks_exact_mut(padded));
        for (((scores, sums), state), row) in scores.zip(state).zip(self.rows.clone()) {
            let seen = self.seen(row);
            let seen = seen.start.clamp(keys.start, keys.end)..seen.end.clamp(keys.start, keys.end);
            let seen = seen.start - keys.start..seen.end - keys.start;
            soften(isa, scores, seen, self.shape.scale, state, sums);
        }
    }

    /// `scores[i * KEYS + j]` is the product of query `i` and key `j` of `k`.
    unsafe fn scores(&self, isa: Isa, k: &Rows, queries: &[*const f32], packed: &mut [f32], scores: &mut [f32]) {
        let (d, tile) = (self.shape.head_dim, isa.tile_rows());
        for first in (0..k.rows).step_by(tile) {
            let out = scores.as_mut_ptr().add(first);
            if queries.len() >= PACK_FROM {
                pack(isa, k, first, packed.as_mut_ptr());
                let b = Columns { data: packed.as_ptr(), stride: tile, k: d };
                multiply(isa, &b, queries, out, KEYS, false);
            } else {
                let count = tile.min(k.rows - first);
                for (i, queries) in queries.chunks(DOT_TOKENS).enumerate() {
                    let out = out.add(i * DOT_TOKENS * KEYS);
                    dots(isa, k, first, count, queries, out, KEYS);
                }
            }
        }
    }

    /// A copy of a head's rows, widened, side by side, as columns of whole tiles.
    unsafe fn copied(&self, isa: Isa, rows: &Rows, padded: usize, copy: &mut [f32]) -> Columns {
        let d = self.shape.head_dim;
        for (i, copy) in copy.chunks_exact_mut(padded).take(rows.rows).enumerate() {
            widen(isa, rows.dtype, rows.row(i), &mut copy[..d]);
            copy[d..].fill(0.0);
        }
        Columns { data: copy.as_ptr(), stride: padded, k: rows.rows }
    }
}

kernel! {
    /// `out[t * width + c] += sum over j of weights[t][j] * v[j][c]`, for up to [`DOT_TOKENS`] rows of weights.
    ///
    /// # Safety
    /// `v` must be valid, each of `weights` have a value for each of its rows, and `out` a row of `width` for each, which is
    /// a multiple of the vector and no less than `cols`.
    unsafe fn mix<S>(v: &Rows, weights: &[*const f32], out: *mut f32, width: usize) {
        let many = S::ISA.registers() == 32;
        with_weight!(v.dtype, W => match weights.len() {
            1 => mix_rows::<S, W, 8, 1>(v, weights, out, width),
            2 => mix_rows::<S, W, 4, 2>(v, weights, out, width),
            3 if many => mix_rows::<S, W, 4, 3>(v, weights, out, width),
            4 if many => mix_rows::<S, W, 4, 4>(v, weights, out, width),
            3 => mix_rows::<S, W, 2, 3>(v, weights, out, width),
            4 => mix_rows::<S, W, 2, 4>(v, weights, out, width),
            _ => {}
        });
    }
}

/// [`mix`] for `T` rows of weights, `C` vectors of columns at a time.
#[inline(always)]
unsafe fn mix_rows<S: Simd, W: Weight, const C: usize, const T: usize>(
    v: &Rows,
    weights: &[*const f32],
    out: *mut f32,
    width: usize,
) {
    let mut rows = [std::ptr::null(); T];
    rows.copy_from_slice(weights);
    let mut c = 0;
    while c + C * S::LANES <= v.cols {
        mix_columns::<S, W, C, T>(v, c, &rows, out.add(c), width);
        c += C * S::LANES;
    }
    while c + S::LANES <= v.cols {
        mix_columns::<S, W, 1, T>(v, c, &rows, out.add(c), width);
        c += S::LANES;
    }
    if c < v.cols {
        for t in 0..T {
            let mut sum = S::load(out.add(t * width + c));
            for j in 0..v.rows {
                let value = W::load_part::<S>(v.row(j), c, v.cols - c);
                sum = S::fma(S::splat(*rows[t].add(j)), value, sum);
            }
            S::store(out.add(t * width + c), sum);
        }
    }
}

/// Some whole vectors of columns.
#[inline(always)]
unsafe fn mix_columns<S: Simd, W: Weight, const C: usize, const T: usize>(
    v: &Rows,
    first: usize,
    weights: &[*const f32; T],
    out: *mut f32,
    width: usize,
) {
    let mut sums = [[S::zero(); C]; T];
    for t in 0..T {
        for i in 0..C {
            sums[t][i] = S::load(out.add(t * width + i * S::LANES));
        }
    }
    let ahead = v.ahead(1);
    for j in 0..v.rows {
        let row = v.data.add(j * v.stride);
        let mut value = [S::zero(); C];
        for i in 0..C {
            value[i] = W::load::<S>(row, first + i * S::LANES);
            if i * const { S::LANES * W::DTYPE.block_bytes() / W::DTYPE.block_len() } % 64 == 0 {
                Rows::prefetch::<S, W>(row, first + i * S::LANES, ahead);
            }
        }
        for t in 0..T {
            let weight = S::splat(*weights[t].add(j));
            for i in 0..C {
                sums[t][i] = S::fma(weight, value[i], sums[t][i]);
            }
        }
    }
    for t in 0..T {
        for i in 0..C {
            S::store(out.add(t * width + i * S::LANES), sums[t][i]);
        }
    }
}

kernel! {
    /// Turns a row's scores for a block of keys into weights relative to the greatest so far,
    /// zero outside `seen`; keeps that and the sum of weights in `state`, and rescales `sums`,
    /// the weighted values so far.
    ///
    /// # Safety
    /// Lengths must be multiples of the vector, and `seen` within the scores.
    unsafe fn soften<S>(
        scores: &mut [f32], seen: Range<usize>, scale: f32, state: &mut (f32, f32),
        sums: &mut [f32],
    ) {
        if seen.is_empty() {
            scores.fill(0.0);
            return;
        }
        scores[..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end..].fill(f32::NEG_INFINITY);
        let (p, scale) = (scores.as_mut_ptr(), S::splat(scale));
        let mut most = S::splat(state.0);
        for i in (0..scores.len()).step_by(S::LANES) {
            let score = S::mul(S::load(p.add(i)), scale);
            S::store(p.add(i), score);
            most = S::max(most, score);
        }
        let most = S::greatest(most);
        let (past, most) = (S::splat(state.0 - most), (S::splat(most), most));
        let mut sum = S::zero();
        for i in (0..scores.len()).step_by(S::LANES) {
            let weight = exp::<S>(S::sub(S::load(p.add(i)), most.0));
            S::store(p.add(i), weight);
            sum = S::add(sum, weight);
        }
        if most.1 > state.0 {
            let past = exp::<S>(past);
            let p = sums.as_mut_ptr();
            for i in (0..sums.len()).step_by(S::LANES) {
                S::store(p.add(i), S::mul(S::load(p.add(i)), past));
            }
            state.1 *= S::greatest(past);
        }
        *state = (most.1, state.1 + S::sum(sum));
    }
}
