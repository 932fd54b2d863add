//! Causal attention over the KV cache: at once by the kernel, or step by step where a lens wants its scores or pattern; and
//! the way of the gradient through both.

use std::ops::{Deref, Range};
use std::sync::Arc;

use candle_core::Tensor;
use quorate_formats::spec::AttnSpec;
use quorate_kernels::{self as kernels, AttnSegment, AttnShape, MatRef, Pack, Pool};

use crate::grad::{Grads, Node, attach};
use crate::ops::{times_transposed, turned, values};
use crate::{KvCache, ModelError, Rows, Span};

/// Query rows that the way back takes at a time; it bounds the memory of their scores.
const BLOCK: usize = 64;

/// The attention of one layer in one pass, whose keys and values are in the cache already.
pub(crate) struct Attention<'a> {
    pub pool: &'a Arc<Pool>,
    pub spec: &'a AttnSpec,
    pub rows: &'a Rows,
    pub cache: &'a KvCache,
    pub layer: usize,
}

impl Attention<'_> {
    fn shape(&self) -> Shape {
        let spec = self.spec;
        Shape { kernel: kernel_shape(spec), v_dim: spec.v_head_dim(), chunk: spec.extra.chunk }
    }

    /// Whether the kernel computes all that this attention is.
    pub fn is_plain(&self) -> bool {
        let (spec, extra) = (self.spec, &self.spec.extra);
        let same_width = spec.v_head_dim() == spec.head_dim;
        same_width && !extra.sinks && extra.chunk.is_none() && extra.softcap.is_none()
    }

    /// Longest key range of the batch.
    fn longest(&self) -> usize {
        self.rows.position.iter().max().map_or(0, |p| p + 1)
    }

    /// Head outputs `[N, H, head_dim]` by the kernel, which keeps no scores. `k` and `v` are the rows that this pass has
    /// put into the cache; their gradient goes through them.
    pub fn at_once(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, ModelError> {
        let segments: Vec<AttnSegment<'_>> = (self.rows.spans.iter())
            .map(|span| {
                let (k, v) = self.cache.layer(span.slot, self.layer);
                AttnSegment { row0: span.row0, len: span.len, pos0: span.pos0, k, v }
            })
            .collect();
        let mut z = Vec::new();
        kernels::attention(self.pool, &self.shape().kernel, &values(q)?, &segments, &mut z);
        attach(&[q, k, v], z, q.dims(), || {
            let (pool, back) = (self.pool.clone(), self.back());
            move |node| back.at_once(&pool, node)
        })
    }

    /// Scores after scaling, `[N, H, S]`, `-inf` where invisible.
    pub fn scores(&self, q: &Tensor, k: &Tensor) -> Result<Tensor, ModelError> {
        let (rows, heads, dim, longest) = (self.rows, self.spec.n_heads, self.spec.head_dim, self.longest());
        let shape = self.shape();
        let mut scores = vec![f32::NEG_INFINITY; rows.len() * heads * longest];
        let query = values(q)?;
        let caches = self.cached();
        for (row, head_scores) in scores.chunks_exact_mut(longest).enumerate() {
            let (n, h) = (row / heads, row % heads);
            let (keys, _) = &caches[rows.segment[n]];
            for key in visible(&shape, rows.position[n]) {
                let k = &keys[at(&shape, key, h)];
                head_scores[key] = self.spec.scale * kernels::dot(&query[row * dim..(row + 1) * dim], k);
            }
        }
        attach(&[q, k], scores, &[rows.len(), heads, longest], || {
            let back = self.back();
            move |node| back.scores(node)
        })
    }

    /// `c tanh(scores / c)` of visible keys.
    pub fn capped(&self, scores: Tensor) -> Result<Tensor, ModelError> {
        let Some(c) = self.spec.extra.softcap else { return Ok(scores) };
        let cap = move |s: &f32| if *s == f32::NEG_INFINITY { *s } else { c * (s / c).tanh() };
        let y = values(&scores)?.iter().map(cap).collect();
        attach(&[&scores], y, scores.dims(), || {
            move |node| {
                let slope = |(s, dy): (&f32, &f32)| dy * (1.0 - (s / c).tanh().powi(2));
                Ok(vec![Some(values(node.args[0])?.iter().zip(node.dy).map(slope).collect())])
            }
        })
    }

    /// Softmax of the scores of visible keys, zero elsewhere; with `sinks [H]`, a logit of each head that takes its share.
    pub fn pattern(&self, scores: &Tensor, sinks: Option<&[f32]>) -> Result<Tensor, ModelError> {
        let (heads, longest, shape) = (self.spec.n_heads, self.longest(), self.shape());
        let mut pattern = vec![0.0; scores.elem_count()];
        let from = values(scores)?;
        for (row, pattern) in pattern.chunks_exact_mut(longest).enumerate() {
            let keys = visible(&shape, self.rows.position[row / heads]);
            pattern[keys.clone()].copy_from_slice(&from[row * longest..][keys.clone()]);
            let pattern = &mut pattern[keys];
            match sinks {
                Some(sinks) => softmax_beside(pattern, sinks[row % heads]),
                None => crate::routing::softmax(pattern),
            }
        }
        let kept = if scores.track_op() { pattern.clone() } else { Vec::new() };
        attach(&[scores], pattern, scores.dims(), || {
            move |node| {
                let rows = kept.chunks_exact(longest).zip(node.dy.chunks_exact(longest));
                Ok(vec![Some(rows.flat_map(|(p, dp)| softmax_backward(p, dp)).collect())])
            }
        })
    }

    /// `z = pattern V`, `[N, H, v_head_dim]`; of the pattern only visible keys count.
    pub fn mix(&self, pattern: &Tensor, v: &Tensor) -> Result<Tensor, ModelError> {
        let (rows, heads, dim) = (self.rows, self.spec.n_heads, self.spec.v_head_dim());
        let (longest, shape) = (self.longest(), self.shape());
        let mut z = vec![0.0; rows.len() * heads * dim];
        let p = values(pattern)?;
        let caches = self.cached();
        for (row, z) in z.chunks_exact_mut(dim).enumerate() {
            let (n, h) = (row / heads, row % heads);
            let (_, v) = &caches[rows.segment[n]];
            for key in visible(&shape, rows.position[n]) {
                let p = p[row * longest + key];
                z.iter_mut().zip(&v[value_at(&shape, key, h)]).for_each(|(z, v)| *z += p * v);
            }
        }
        attach(&[pattern, v], z, &[rows.len(), heads, dim], || {
            let back = self.back();
            move |node| back.mix(node)
        })
    }

    /// Keys and values of each span's sequence.
    fn cached(&self) -> Vec<(Vec<f32>, Vec<f32>)> {
        self.rows.spans.iter().map(|span| self.cache.layer_values(span.slot, self.layer)).collect()
    }

    /// What the way back needs: keys and values as they are in the cache now.
    fn back(&self) -> Back {
        let rows = |span: &Span| {
            let (k, v) = self.cache.layer_values(span.slot, self.layer);
            Sequence { span: *span, k, v }
        };
        Back { shape: self.shape(), longest: self.longest(), sequences: self.rows.spans.iter().map(rows).collect() }
    }
}

/// What the kernels know of an attention.
pub(crate) fn kernel_shape(spec: &AttnSpec) -> AttnShape {
    let AttnSpec { n_heads, n_kv_heads, head_dim, scale, sliding_window: window, .. } = *spec;
    AttnShape { n_heads, n_kv_heads, head_dim, scale, window }
}

/// Heads, widths, and which keys are seen.
#[derive(Clone, Copy)]
struct Shape {
    kernel: AttnShape,
    v_dim: usize,
    chunk: Option<usize>,
}

impl Deref for Shape {
    type Target = AttnShape;
    fn deref(&self) -> &AttnShape {
        &self.kernel
    }
}

/// Keys that a query at a position sees.
fn visible(shape: &Shape, position: usize) -> Range<usize> {
    let end = position + 1;
    let chunk = shape.chunk.map_or(0, |c| position / c * c);
    shape.window.map_or(0, |w| end.saturating_sub(w)).max(chunk)..end
}

/// Number of the key or value that head `h` reads.
fn number(shape: &Shape, key: usize, h: usize) -> usize {
    key * shape.n_kv_heads + h / (shape.n_heads / shape.n_kv_heads)
}

/// Where the key that head `h` reads lies among a cache's values.
fn at(shape: &Shape, key: usize, h: usize) -> Range<usize> {
    let start = number(shape, key, h) * shape.head_dim;
    start..start + shape.head_dim
}

/// Where the value that head `h` reads lies among a cache's values.
fn value_at(shape: &Shape, key: usize, h: usize) -> Range<usize> {
    let start = number(shape, key, h) * shape.v_dim;
    start..start + shape.v_dim
}

/// Softmax of `values` and one more logit, which is left out of the result.
fn softmax_beside(values: &mut [f32], sink: f32) {
    let max = values.iter().copied().fold(sink, f32::max);
    values.iter_mut().for_each(|v| *v = (*v - max).exp());
    let sum = values.iter().sum::<f32>() + (sink - max).exp();
    values.iter_mut().for_each(|v| *v /= sum);
}

/// Of a softmax `p` with gradient `dp`: `p (dp - sum p dp)`.
fn softmax_backward(p: &[f32], dp: &[f32]) -> Vec<f32> {
    let inner = kernels::dot(p, dp);
    // Where the probability is zero the gradient is, even if the other factor overflows.
    p.iter().zip(dp).map(|(p, dp)| if *p == 0.0 { 0.0 } else { p * (dp - inner) }).collect()
}

struct Sequence {
    span: Span,
    k: Vec<f32>,
    v: Vec<f32>,
}

struct Back {
    shape: Shape,
    longest: usize,
    sequences: Vec<Sequence>,
}

impl Back {
    /// Rows of the pass in `span`, as a range of a tensor `[N, heads, head_dim]`.
    fn part(&self, span: &Span, heads: usize) -> Range<usize> {
        let width = heads * self.shape.head_dim;
        span.row0 * width..(span.row0 + span.len) * width
    }

    fn at_once(&self, pool: &Pool, node: &Node<'_>) -> Grads {
        let (heads, kv_heads) = (self.shape.n_heads, self.shape.n_kv_heads);
        let q = values(node.args[0])?;
        let mut dq = vec![0.0; q.len()];
        let (mut dk, mut dv) = (vec![0.0; node.args[1].elem_count()], vec![0.0; node.args[2].elem_count()]);
        for sequence in &self.sequences {
            let (of_q, of_k) = (self.part(&sequence.span, heads), self.part(&sequence.span, kv_heads));
            let (mut all_dk, mut all_dv) = (vec![0.0; sequence.k.len()], vec![0.0; sequence.v.len()]);
            for h in 0..heads {
                let (q, dz) = (&q[of_q.clone()], &node.dy[of_q.clone()]);
                self.head(pool, sequence, h, q, dz, &mut dq[of_q.clone()], &mut all_dk, &mut all_dv);
            }
            // What the cache held before is a constant.
            let before = sequence.k.len() - of_k.len();
            dk[of_k.clone()].copy_from_slice(&all_dk[before..]);
            dv[of_k].copy_from_slice(&all_dv[before..]);
        }
        Ok(vec![Some(dq), Some(dk), Some(dv)])
    }

    /// One query head of one sequence; `q`, `dz`, `dq` are its rows, `[len, H, head_dim]`, `dk` and `dv` those of the cache.
    #[allow(clippy::too_many_arguments, reason = "slices, as kernels take them")]
    fn head(
        &self,
        pool: &Pool,
        sequence: &Sequence,
        h: usize,
        q: &[f32],
        dz: &[f32],
        dq: &mut [f32],
        dk: &mut [f32],
        dv: &mut [f32],
    ) {
        let (shape, dim, span) = (&self.shape, self.shape.head_dim, &sequence.span);
        let of_head = |row: usize| (row * shape.n_heads + h) * dim..(row * shape.n_heads + h + 1) * dim;
        for first in (0..span.len).step_by(BLOCK) {
            let block = first..span.len.min(first + BLOCK);
            let keys = visible(shape, span.pos0 + block.start).start..span.pos0 + block.end;
            let gather = |x: &[f32]| block.clone().flat_map(|row| x[of_head(row)].to_vec()).collect::<Vec<f32>>();
            let cached = |x: &[f32]| keys.clone().flat_map(|key| x[at(shape, key, h)].to_vec()).collect::<Vec<f32>>();
            let (q, dz, k, v) = (gather(q), gather(dz), cached(&sequence.k), cached(&sequence.v));
            let (b, m) = (block.len(), keys.len());
            let product = |w: &[f32], x: &[f32]| {
                let mut y = Vec::new();
                kernels::matmul(pool, Pack::Always, MatRef::of_f32(m, dim, w), x, b, None, &mut y);
                y
            };
            let (mut p, mut ds) = (product(&k, &q), product(&v, &dz));
            for (i, (p, ds)) in p.chunks_exact_mut(m).zip(ds.chunks_exact_mut(m)).enumerate() {
                let seen = visible(shape, span.pos0 + block.start + i);
                let seen = seen.start - keys.start..seen.end - keys.start;
                p[..seen.start].fill(0.0);
                p[seen.end..].fill(0.0);
                p[seen.clone()].iter_mut().for_each(|s| *s *= shape.scale);
                crate::routing::softmax(&mut p[seen]);
                let back = softmax_backward(p, ds);
                ds.iter_mut().zip(back).for_each(|(ds, back)| *ds = shape.scale * back);
            }
            let dq_block = times_transposed(pool, MatRef::of_f32(m, dim, &k), &ds, b);
            let dk_block = times_transposed(pool, MatRef::of_f32(b, dim, &q), &turned(&ds, b, m), m);
            let dv_block = times_transposed(pool, MatRef::of_f32(b, dim, &dz), &turned(&p, b, m), m);
            for (row, from) in block.zip(dq_block.chunks_exact(dim)) {
                dq[of_head(row)].copy_from_slice(from);
            }
            for (key, (dk_row, dv_row)) in keys.zip(dk_block.chunks_exact(dim).zip(dv_block.chunks_exact(dim))) {
                add_to(&mut dk[at(shape, key, h)], 1.0, dk_row);
                add_to(&mut dv[at(shape, key, h)], 1.0, dv_row);
            }
        }
    }

    /// Calls `pair(row of [N, H], index in [N, H, S], number of the key in the cache, number in the pass, sequence)` for every
    /// visible key.
    fn each(&self, mut pair: impl FnMut(usize, usize, usize, Option<usize>, &Sequence)) {
        let shape = &self.shape;
        for sequence in &self.sequences {
            let span = &sequence.span;
            for (i, h) in (0..span.len).flat_map(|i| (0..shape.n_heads).map(move |h| (i, h))) {
                let row = (span.row0 + i) * shape.n_heads + h;
                for key in visible(shape, span.pos0 + i) {
                    let in_pass = key.checked_sub(span.pos0).map(|key| number(shape, span.row0 + key, h));
                    pair(row, row * self.longest + key, number(shape, key, h), in_pass, sequence);
                }
            }
        }
    }

    fn scores(&self, node: &Node<'_>) -> Grads {
        let (dim, scale) = (self.shape.head_dim, self.shape.scale);
        let of = |i: usize| i * dim..(i + 1) * dim;
        let q = values(node.args[0])?;
        let (mut dq, mut dk) = (vec![0.0; q.len()], vec![0.0; node.args[1].elem_count()]);
        self.each(|row, score, cached, in_pass, sequence| {
            let ds = scale * node.dy[score];
            add_to(&mut dq[of(row)], ds, &sequence.k[of(cached)]);
            if let Some(key) = in_pass {
                add_to(&mut dk[of(key)], ds, &q[of(row)]);
            }
        });
        Ok(vec![Some(dq), Some(dk)])
    }

    fn mix(&self, node: &Node<'_>) -> Grads {
        let dim = self.shape.v_dim;
        let of = |i: usize| i * dim..(i + 1) * dim;
        let p = values(node.args[0])?;
        let (mut dp, mut dv) = (vec![0.0; p.len()], vec![0.0; node.args[1].elem_count()]);
        self.each(|row, score, cached, in_pass, sequence| {
            let dz = &node.dy[of(row)];
            dp[score] = kernels::dot(dz, &sequence.v[of(cached)]);
            if let Some(key) = in_pass {
                add_to(&mut dv[of(key)], p[score], dz);
            }
        });
        Ok(vec![Some(dp), Some(dv)])
    }
}

/// `x += scale y`.
fn add_to(x: &mut [f32], scale: f32, y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += scale * y);
}
