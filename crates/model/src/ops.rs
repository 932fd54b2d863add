//! Tensor operations of the forward pass on the kernels, and the way of the gradient through each. Tensors are candle's,
//! contiguous f32 on the CPU.

use std::ops::{Deref, Range};
use std::sync::Arc;

use candle_core::{CpuStorage, Device, Storage, Tensor};
use quorate_kernels as kernels;
use quorate_kernels::{MatRef, Pack, Pool};
use quorate_residency::Matrix;

use crate::ModelError;
use crate::grad::attach;
use crate::overlay::{Linear, Vector, Weight};

/// Borrowed values of a tensor.
pub struct Values<Guard> {
    storage: Guard,
    range: Range<usize>,
}

impl<Guard: Deref<Target = Storage>> Deref for Values<Guard> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            _ => unreachable!("`values` lets only contiguous f32 CPU tensors pass"),
        }
    }
}

/// The values of a contiguous f32 tensor, without a copy.
///
/// # Errors
/// A tensor of another type, on another device or not contiguous (a lens may have put it there).
pub fn values(tensor: &Tensor) -> Result<Values<impl Deref<Target = Storage> + '_>, ModelError> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(_)), Some((start, end))) => Ok(Values { storage, range: start..end }),
        _ => Err(ModelError::NotPlainTensor { shape: tensor.dims().to_vec(), dtype: tensor.dtype().as_str() }),
    }
}

/// A tensor of the given shape.
pub fn tensor(values: Vec<f32>, shape: &[usize]) -> Result<Tensor, ModelError> {
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// `y = x W^T + scale (x A^T) B^T + b`; `x [n, in]`, `W [out, in]`.
pub(crate) fn linear(
    pool: &Arc<Pool>,
    pack: Pack,
    x: &Tensor,
    w: &Linear<'_>,
    bias: Option<Vector<'_>>,
) -> Result<Tensor, ModelError> {
    let (fixed, open) = match bias {
        Some(Vector::Stored(bias)) => (Some(bias), None),
        Some(Vector::Open(bias)) => (None, Some(bias)),
        None => (None, None),
    };
    let mut y = product(pool, pack, x, w.weight, fixed)?;
    if let Some(low_rank) = w.low_rank {
        let h = product(pool, pack, x, Weight::Open(&low_rank.a), None)?;
        let delta = product(pool, pack, &h, Weight::Open(&low_rank.b), None)?;
        y = add_scaled(&y, &delta, low_rank.scale)?;
    }
    match open {
        Some(bias) => Ok(y.broadcast_add(bias)?),
        None => Ok(y),
    }
}

/// [`linear`] with three matrices and their biases, with the same results, at once if nothing lies over them.
pub(crate) fn linear_each<'a>(
    pool: &Arc<Pool>,
    pack: Pack,
    x: &Tensor,
    all: [(Linear<'a>, Option<Vector<'a>>); 3],
) -> Result<[Tensor; 3], ModelError> {
    let plain = |(w, bias): &(Linear<'a>, Option<Vector<'a>>)| {
        let bias = match bias {
            Some(Vector::Stored(bias)) => Some(*bias),
            None => None,
            Some(Vector::Open(_)) => return None,
        };
        Some((w.stored()?, bias))
    };
    let [Some(a), Some(b), Some(c)] = [0, 1, 2].map(|i| plain(&all[i])) else {
        let [a, b, c] = all.map(|(w, bias)| linear(pool, pack, x, &w, bias));
        return Ok([a?, b?, c?]);
    };
    let v = values(x)?;
    let n = v.len() / a.0.cols;
    let mut y = [Vec::new(), Vec::new(), Vec::new()];
    kernels::matmul_each(pool, pack, [a, b, c].map(|(w, bias)| (w.as_ref(), bias)), &v, n, y.each_mut());
    let [of_a, of_b, of_c] = y;
    let tensor = |w, y| attach_product(pool, x, w, y, n);
    Ok([tensor(a.0, of_a)?, tensor(b.0, of_b)?, tensor(c.0, of_c)?])
}

/// `y = x W^T` as a tensor.
fn attach_product(pool: &Arc<Pool>, x: &Tensor, w: &Matrix, y: Vec<f32>, n: usize) -> Result<Tensor, ModelError> {
    attach(&[x], y, &[n, w.rows], || {
        let (pool, w) = (pool.clone(), w.clone());
        move |node| Ok(vec![Some(times_transposed(&pool, w.as_ref(), node.dy, n))])
    })
}

/// `y = x W^T + b`.
fn product(
    pool: &Arc<Pool>,
    pack: Pack,
    x: &Tensor,
    w: Weight<'_>,
    bias: Option<&[f32]>,
) -> Result<Tensor, ModelError> {
    let (rows, cols) = w.shape()?;
    let v = values(x)?;
    let n = v.len() / cols;
    let mut y = Vec::new();
    match w {
        Weight::Stored(w) => {
            kernels::matmul(pool, pack, w.as_ref(), &v, n, bias, &mut y);
            attach_product(pool, x, w, y, n)
        }
        Weight::Open(w) => {
            kernels::matmul(pool, pack, MatRef::of_f32(rows, cols, &values(w)?), &v, n, bias, &mut y);
            attach(&[x, w], y, &[n, rows], || {
                let pool = pool.clone();
                move |node| {
                    let [x, w] = [values(node.args[0])?, values(node.args[1])?];
                    let dx = || times_transposed(&pool, MatRef::of_f32(rows, cols, &w), node.dy, n);
                    // dW = dy^T x: the product of the rows of dy^T with the transpose of x^T.
                    let dw = || times_transposed(&pool, MatRef::of_f32(n, cols, &x), &turned(node.dy, n, rows), rows);
                    Ok(vec![node.args[0].track_op().then(dx), node.args[1].track_op().then(dw)])
                }
            })
        }
    }
}

/// `x W` of `n` rows.
pub(crate) fn times_transposed(pool: &Pool, w: MatRef<'_>, x: &[f32], n: usize) -> Vec<f32> {
    let mut y = Vec::new();
    kernels::matmul_transposed(pool, w, x, n, &mut y);
    y
}

/// The transpose of `x [rows, cols]`.
pub(crate) fn turned(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    for (r, row) in x.chunks_exact(cols.max(1)).enumerate() {
        for (c, v) in row.iter().enumerate() {
            y[c * rows + r] = *v;
        }
    }
    y
}

/// RMSNorm over the last `weight.len()` values of each row; keeps the shape.
pub(crate) fn rms_norm(pool: &Arc<Pool>, x: &Tensor, weight: Vector<'_>, eps: f32) -> Result<Tensor, ModelError> {
    let v = values(x)?;
    let mut y = Vec::new();
    match weight {
        Vector::Stored(w) => {
            kernels::rms_norm(pool, &v, w.len(), w, eps, &mut y);
            attach(&[x], y, x.dims(), || {
                let w = w.to_vec();
                move |node| Ok(vec![Some(rms_norm_backward(&values(node.args[0])?, &w, eps, node.dy).0)])
            })
        }
        Vector::Open(weight) => {
            let w = values(weight)?;
            kernels::rms_norm(pool, &v, w.len(), &w, eps, &mut y);
            attach(&[x, weight], y, x.dims(), || {
                move |node| {
                    let (dx, dw) = rms_norm_backward(&values(node.args[0])?, &values(node.args[1])?, eps, node.dy);
                    Ok(vec![Some(dx), Some(dw)])
                }
            })
        }
    }
}

/// Of `y = r x * w` with `r = 1 / sqrt(mean(x^2) + eps)`: `dx = r (w dy) - r^3 x mean(w dy x)`, `dw = sum over rows of r x dy`.
fn rms_norm_backward(x: &[f32], w: &[f32], eps: f32, dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let d = w.len();
    let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; d]);
    let mut scaled = vec![0.0; d];
    for ((x, dy), dx) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d)) {
        let r = 1.0 / (kernels::norm_sq(x) / d as f32 + eps).sqrt();
        for (i, s) in scaled.iter_mut().enumerate() {
            *s = w[i] * dy[i];
            dw[i] += r * x[i] * dy[i];
        }
        let back = r * r * r * kernels::dot(&scaled, x) / d as f32;
        for (i, dx) in dx.iter_mut().enumerate() {
            *dx = r * scaled[i] - back * x[i];
        }
    }
    (dx, dw)
}

/// Sum of two tensors of one shape.
pub(crate) fn add(pool: &Pool, a: &Tensor, b: &Tensor) -> Result<Tensor, ModelError> {
    let (va, vb) = (values(a)?, values(b)?);
    let mut y = Vec::new();
    kernels::add(pool, &va, &vb, &mut y);
    attach(&[a, b], y, a.dims(), || |node| Ok(vec![Some(node.dy.to_vec()), Some(node.dy.to_vec())]))
}

/// `a + scale b`.
fn add_scaled(a: &Tensor, b: &Tensor, scale: f32) -> Result<Tensor, ModelError> {
    let y = values(a)?.iter().zip(&*values(b)?).map(|(a, b)| a + scale * b).collect();
    attach(&[a, b], y, a.dims(), || {
        move |node| Ok(vec![Some(node.dy.to_vec()), Some(node.dy.iter().map(|dy| scale * dy).collect())])
    })
}

/// Clamp to `[-c, c]`.
pub(crate) fn clip(x: &Tensor, c: f32) -> Result<Tensor, ModelError> {
    let y = values(x)?.iter().map(|v| v.clamp(-c, c)).collect();
    attach(&[x], y, x.dims(), || {
        move |node| {
            let x = values(node.args[0])?;
            Ok(vec![Some(x.iter().zip(node.dy).map(|(x, dy)| if x.abs() <= c { *dy } else { 0.0 }).collect())])
        }
    })
}

/// Cosines and sines of every row's position, `[N, rope_dim / 2]` each.
#[derive(Debug, Default)]
pub(crate) struct Angles {
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
}

/// Rotary embedding of `x [n, heads, head_dim]`. Its gradient is turned back by the same angles.
pub(crate) fn rope(pool: &Arc<Pool>, x: &Tensor, rope_dim: usize, angles: &Arc<Angles>) -> Result<Tensor, ModelError> {
    let (n, heads, head_dim) = x.dims3()?;
    let mut y = Vec::new();
    kernels::rope(pool, &values(x)?, n, heads, head_dim, rope_dim, &angles.cos, &angles.sin, &mut y);
    attach(&[x], y, x.dims(), || {
        let (pool, angles) = (pool.clone(), angles.clone());
        move |node| {
            let back: Vec<f32> = angles.sin.iter().map(|s| -s).collect();
            let mut dx = Vec::new();
            kernels::rope(&pool, node.dy, n, heads, head_dim, rope_dim, &angles.cos, &back, &mut dx);
            Ok(vec![Some(dx)])
        }
    })
}

/// Rows of `x [N, d]` by their numbers.
pub(crate) fn pick_rows(x: &Tensor, rows: &[usize]) -> Result<Tensor, ModelError> {
    let d = x.dim(1)?;
    let v = values(x)?;
    let mut y = Vec::with_capacity(rows.len() * d);
    rows.iter().for_each(|&row| y.extend_from_slice(&v[row * d..(row + 1) * d]));
    attach(&[x], y, &[rows.len(), d], || {
        let rows = rows.to_vec();
        move |node| {
            let mut dx = vec![0.0; node.args[0].elem_count()];
            for (&row, dy) in rows.iter().zip(node.dy.chunks_exact(d)) {
                dx[row * d..(row + 1) * d].iter_mut().zip(dy).for_each(|(dx, dy)| *dx += dy);
            }
            Ok(vec![Some(dx)])
        }
    })
}

/// `x * sigmoid(gate)`: a gate for each value, or for each row of `x` (`gate [n, 1]`).
pub(crate) fn sigmoid_gated(x: &Tensor, gate: &Tensor) -> Result<Tensor, ModelError> {
    let each = x.elem_count() / gate.elem_count().max(1);
    let g = values(gate)?;
    let y = values(x)?.iter().enumerate().map(|(i, v)| v / (1.0 + (-g[i / each]).exp())).collect();
    attach(&[x, gate], y, x.dims(), || {
        move |node| {
            let [x, gate] = [values(node.args[0])?, values(node.args[1])?];
            let s: Vec<f32> = gate.iter().map(|g| 1.0 / (1.0 + (-g).exp())).collect();
            let dx = node.dy.iter().enumerate().map(|(i, dy)| dy * s[i / each]).collect();
            let gates = x.chunks_exact(each).zip(node.dy.chunks_exact(each)).zip(&s);
            let dgate = gates.map(|((x, dy), s)| kernels::dot(x, dy) * s * (1.0 - s)).collect();
            Ok(vec![Some(dx), Some(dgate)])
        }
    })
}

/// LayerNorm over the last `weight.len()` values of each row; keeps the shape. Weight and bias are constants here.
pub(crate) fn layer_norm(x: &Tensor, weight: &[f32], bias: &[f32], eps: f32) -> Result<Tensor, ModelError> {
    let d = weight.len();
    let v = values(x)?;
    let mut y = Vec::with_capacity(v.len());
    for row in v.chunks_exact(d) {
        let (mean, r) = moments(row, eps);
        y.extend(row.iter().zip(weight.iter().zip(bias)).map(|(x, (w, b))| (x - mean) * r * w + b));
    }
    attach(&[x], y, x.dims(), || {
        let weight = weight.to_vec();
        move |node| {
            let x = values(node.args[0])?;
            let mut dx = Vec::with_capacity(x.len());
            for (x, dy) in x.chunks_exact(d).zip(node.dy.chunks_exact(d)) {
                let (mean, r) = moments(x, eps);
                let scaled: Vec<f32> = weight.iter().zip(dy).map(|(w, dy)| w * dy).collect();
                let average = scaled.iter().sum::<f32>() / d as f32;
                let along = scaled.iter().zip(x).map(|(s, x)| s * (x - mean) * r).sum::<f32>() / d as f32;
                dx.extend(scaled.iter().zip(x).map(|(s, x)| r * (s - average - (x - mean) * r * along)));
            }
            Ok(vec![Some(dx)])
        }
    })
}

/// Mean and `1 / sqrt(variance + eps)`.
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f64;
    let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let variance = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
    (mean as f32, (1.0 / (variance + f64::from(eps)).sqrt()) as f32)
}

/// `factor * x`.
pub(crate) fn scaled(x: Tensor, factor: f32) -> Result<Tensor, ModelError> {
    if factor == 1.0 {
        return Ok(x);
    }
    let y = values(&x)?.iter().map(|v| factor * v).collect();
    attach(&[&x], y, x.dims(), || move |node| Ok(vec![Some(node.dy.iter().map(|dy| factor * dy).collect())]))
}

/// Row `n` of `x [N, ..]` times `factors[n]`.
pub(crate) fn rows_scaled(x: &Tensor, factors: Vec<f32>) -> Result<Tensor, ModelError> {
    let width = x.elem_count() / factors.len().max(1);
    let times = move |x: &[f32], factors: &[f32]| -> Vec<f32> {
        x.chunks_exact(width).zip(factors).flat_map(|(row, f)| row.iter().map(move |v| f * v)).collect()
    };
    let y = times(&values(x)?, &factors);
    attach(&[x], y, x.dims(), || move |node| Ok(vec![Some(times(node.dy, &factors))]))
}

/// `c tanh(x / c)`.
pub(crate) fn softcap(x: Tensor, c: f32) -> Result<Tensor, ModelError> {
    let y = values(&x)?.iter().map(|v| c * (v / c).tanh()).collect();
    attach(&[&x], y, x.dims(), || {
        move |node| {
            let x = values(node.args[0])?;
            Ok(vec![Some(x.iter().zip(node.dy).map(|(x, dy)| dy * (1.0 - (x / c).tanh().powi(2))).collect())])
        }
    })
}

/// gpt-oss's activation: `(u + 1) g sigmoid(alpha g)` with `g = min(gate, limit)`, `u` clamped to `[-limit, limit]`.
pub(crate) fn clamped_swiglu(gate: &Tensor, up: &Tensor, limit: f32, alpha: f32) -> Result<Tensor, ModelError> {
    let sigmoid = |g: f32| 1.0 / (1.0 + (-g).exp());
    let one = move |(g, u): (&f32, &f32)| {
        let (g, u) = (g.min(limit), u.clamp(-limit, limit));
        (u + 1.0) * g * sigmoid(alpha * g)
    };
    let y = values(gate)?.iter().zip(&*values(up)?).map(one).collect();
    attach(&[gate, up], y, gate.dims(), || {
        move |node| {
            let [gate, up] = [values(node.args[0])?, values(node.args[1])?];
            let (mut dgate, mut dup) = (Vec::with_capacity(gate.len()), Vec::with_capacity(up.len()));
            for ((g, u), dy) in gate.iter().zip(&*up).zip(node.dy) {
                let (open_g, open_u) = (*g <= limit, u.abs() <= limit);
                let (g, u) = (g.min(limit), u.clamp(-limit, limit));
                let s = sigmoid(alpha * g);
                dgate.push(if open_g { dy * (u + 1.0) * (s + alpha * g * s * (1.0 - s)) } else { 0.0 });
                dup.push(if open_u { dy * g * s } else { 0.0 });
            }
            Ok(vec![Some(dgate), Some(dup)])
        }
    })
}

/// Rotary embedding of pairs `(2j, 2j + 1)` of the first `rope_dim` values of each head, `x [n, heads, head_dim]`.
pub(crate) fn rope_interleaved(x: &Tensor, rope_dim: usize, angles: &Arc<Angles>) -> Result<Tensor, ModelError> {
    let (_, heads, head_dim) = x.dims3()?;
    let turn = move |x: &mut [f32], angles: &Angles, sign: f32| {
        for (row, head) in x.chunks_exact_mut(head_dim).enumerate() {
            let at = row / heads * rope_dim / 2;
            for (j, pair) in head[..rope_dim].chunks_exact_mut(2).enumerate() {
                let (cos, sin) = (angles.cos[at + j], sign * angles.sin[at + j]);
                (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos);
            }
        }
    };
    let mut y = values(x)?.to_vec();
    turn(&mut y, angles, 1.0);
    attach(&[x], y, x.dims(), || {
        let angles = angles.clone();
        move |node| {
            let mut dx = node.dy.to_vec();
            turn(&mut dx, &angles, -1.0);
            Ok(vec![Some(dx)])
        }
    })
}
