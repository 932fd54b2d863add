//! Tensor operations of the forward pass on the kernels. Tensors are candle's, contiguous f32 on the CPU.

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, Device, Storage, Tensor};
use quorate_kernels as kernels;
use quorate_kernels::{Pack, Pool};
use quorate_residency::Matrix;

use crate::ModelError;

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

/// `y = x W^T + b`; `x [n, in]`, `w [out, in]`.
pub(crate) fn linear(
    pool: &Pool,
    pack: Pack,
    x: &Tensor,
    w: &Matrix,
    bias: Option<&[f32]>,
) -> Result<Tensor, ModelError> {
    let x = values(x)?;
    let n = x.len() / w.cols;
    let mut y = vec![0.0; n * w.rows];
    kernels::matmul(pool, pack, w.as_ref(), &x, n, bias, &mut y);
    tensor(y, &[n, w.rows])
}

/// RMSNorm over the last `weight.len()` values of each row; keeps the shape.
pub(crate) fn rms_norm(pool: &Pool, x: &Tensor, weight: &[f32], eps: f32) -> Result<Tensor, ModelError> {
    let v = values(x)?;
    let mut y = vec![0.0; v.len()];
    kernels::rms_norm(pool, &v, weight.len(), weight, eps, &mut y);
    tensor(y, x.dims())
}

/// Sum of two tensors of one shape.
pub(crate) fn add(pool: &Pool, a: &Tensor, b: &Tensor) -> Result<Tensor, ModelError> {
    let (va, vb) = (values(a)?, values(b)?);
    let mut y = vec![0.0; va.len()];
    kernels::add(pool, &va, &vb, &mut y);
    tensor(y, a.dims())
}

/// Clamp to `[-c, c]`.
pub(crate) fn clip(x: &Tensor, c: f32) -> Result<Tensor, ModelError> {
    let y = values(x)?.iter().map(|v| v.clamp(-c, c)).collect();
    tensor(y, x.dims())
}

/// Rotary embedding of `x [n, heads, head_dim]`; `cos`, `sin` `[n, rope_dim / 2]`.
pub(crate) fn rope(pool: &Pool, x: &Tensor, rope_dim: usize, cos: &[f32], sin: &[f32]) -> Result<Tensor, ModelError> {
    let (n, heads, head_dim) = x.dims3()?;
    let mut y = values(x)?.to_vec();
    kernels::rope(pool, &mut y, n, heads, head_dim, rope_dim, cos, sin);
    tensor(y, x.dims())
}
