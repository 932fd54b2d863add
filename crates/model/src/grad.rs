//! How the gradient goes back through what the kernels computed.
//!
//! There is one forward: every operation is computed by the kernels, whoever watches. If an input is tracked (a lens
//! added a `Var` to it, or a weight is one), [`attach`] records with the result how to get from its gradient to those of the
//! inputs, and candle's `backward` calls that. Without tracked inputs nothing is recorded.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Device, Error, Layout, Result, Shape, Tensor};

use crate::ModelError;
use crate::ops::values;

/// One operation, seen on the way back.
pub(crate) struct Node<'a> {
    /// The inputs.
    pub args: &'a [&'a Tensor],
    /// The gradient of the result.
    pub dy: &'a [f32],
}

/// Gradients of the inputs, in their shapes; `None` where none is wanted or there is none.
pub(crate) type Grads = std::result::Result<Vec<Option<Vec<f32>>>, ModelError>;

/// A result of the kernels as a tensor; with its gradient if one of `args` (one to three) is tracked.
pub(crate) fn attach<B>(
    args: &[&Tensor],
    y: Vec<f32>,
    shape: &[usize],
    backward: impl FnOnce() -> B,
) -> std::result::Result<Tensor, ModelError>
where
    B: Fn(&Node<'_>) -> Grads + Send + Sync + 'static,
{
    if !args.iter().any(|arg| arg.track_op()) {
        return Ok(Tensor::from_vec(y, shape, &Device::Cpu)?);
    }
    let op = Op { result: Mutex::new(Some(y)), shape: Shape::from(shape), backward: backward() };
    Ok(match *args {
        [a] => a.apply_op1(op)?,
        [a, b] => a.apply_op2(b, op)?,
        [a, b, c] => a.apply_op3(b, c, op)?,
        _ => unreachable!("operations have one to three inputs"),
    })
}

/// The result of a forward that is done, and the way back.
struct Op<B> {
    result: Mutex<Option<Vec<f32>>>,
    shape: Shape,
    backward: B,
}

impl<B: Fn(&Node<'_>) -> Grads> Op<B> {
    fn forward(&self) -> Result<(CpuStorage, Shape)> {
        let result = self.result.lock().unwrap_or_else(PoisonError::into_inner).take();
        let result = result.ok_or_else(|| Error::msg("a recorded operation was applied twice"))?;
        Ok((CpuStorage::F32(result), self.shape.clone()))
    }

    fn back(&self, args: &[&Tensor], dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let dy = dy.contiguous()?;
        let grads = values(&dy).and_then(|dy| (self.backward)(&Node { args, dy: &dy })).map_err(Error::wrap)?;
        let tensor = |(arg, grad): (&&Tensor, Option<Vec<f32>>)| match grad {
            Some(grad) if arg.track_op() => Tensor::from_vec(grad, arg.shape(), &Device::Cpu).map(Some),
            _ => Ok(None),
        };
        args.iter().zip(grads).map(tensor).collect()
    }
}

const NAME: &str = "quorate";

impl<B: Fn(&Node<'_>) -> Grads> CustomOp1 for Op<B> {
    fn name(&self) -> &'static str {
        NAME
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward()
    }
    fn bwd(&self, a: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.back(&[a], dy)?.swap_remove(0))
    }
}

impl<B: Fn(&Node<'_>) -> Grads> CustomOp2 for Op<B> {
    fn name(&self) -> &'static str {
        NAME
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward()
    }
    fn bwd(&self, a: &Tensor, b: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.back(&[a, b], dy)?.into_iter();
        let mut next = || grads.next().flatten();
        Ok((next(), next()))
    }
}

impl<B: Fn(&Node<'_>) -> Grads> CustomOp3 for Op<B> {
    fn name(&self) -> &'static str {
        NAME
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward()
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.back(&[a, b, c], dy)?.into_iter();
        let mut next = || grads.next().flatten();
        Ok((next(), next(), next()))
    }
}
