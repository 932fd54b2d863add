//! Gated feed-forward networks, dense and of experts, and the way of the gradient through them.
//!
//! Experts whose weights lie as matrices are computed at once, tokens grouped by expert. Those that an overlay opened (a
//! tracked weight, or a low-rank term) are computed one by one and put in their slots.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use quorate_formats::spec::{Activation, MoeSpec};
use quorate_kernels::{self as kernels, Act, ExpertRef, MatRef, NO_EXPERT, Pack, Pool, Side};
use quorate_residency::{Expert, Lease, Matrix};

use crate::grad::{Grads, Node, attach};
use crate::ops::{self, linear, values};
use crate::overlay::{Linear, Vector, Weight};
use crate::{Model, ModelError, Routing};

/// The weights of one expert, or of a dense block.
#[derive(Clone, Copy)]
pub(crate) struct Gated<'a> {
    pub gate: Linear<'a>,
    pub up: Linear<'a>,
    pub down: Linear<'a>,
    /// Biases of the three.
    pub biases: Option<[&'a [f32]; 3]>,
    /// Whether the activation takes gate and up together.
    pub clamped: bool,
}

/// A product of grouped slots.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Half {
    Hidden,
    Down,
}

impl<'a> Gated<'a> {
    /// Whether the kernels can take these weights as they are.
    fn plain(&self, half: Half) -> bool {
        match half {
            _ if self.biases.is_some() || self.clamped => false,
            Half::Hidden => self.gate.stored().is_some() && self.up.stored().is_some(),
            Half::Down => self.down.stored().is_some(),
        }
    }

    /// For the kernels; a matrix that lies as a tensor is empty here.
    fn as_ref(&self) -> ExpertRef<'a> {
        ExpertRef { gate: base(&self.gate), up: base(&self.up), down: base(&self.down) }
    }
}

fn base<'a>(linear: &Linear<'a>) -> MatRef<'a> {
    match linear.weight {
        Weight::Stored(matrix) => matrix.as_ref(),
        Weight::Open(_) => MatRef::of_f32(0, 0, &[]),
    }
}

/// The experts of one layer in one pass.
pub(crate) struct Experts<'a> {
    model: &'a Model,
    layer: usize,
    /// `None` is not in memory.
    weights: Vec<Option<&'a Expert>>,
    /// What the kernels take.
    refs: Vec<Option<ExpertRef<'a>>>,
}

impl<'a> Experts<'a> {
    /// Those of the layer's `count` experts that are `wanted` and loaded.
    pub fn loaded(model: &'a Model, layer: usize, count: usize, wanted: &[u32]) -> Experts<'a> {
        let mut weights = vec![None; count];
        for &id in wanted.iter().filter(|id| (**id as usize) < count) {
            weights[id as usize] = model.weights().expert(layer, id as usize);
        }
        Experts::of(model, layer, weights)
    }

    /// Those of a lease.
    pub fn leased(model: &'a Model, layer: usize, count: usize, lease: &'a Lease<'_>) -> Experts<'a> {
        let mut weights = vec![None; count];
        lease.experts().for_each(|(e, expert)| weights[e] = Some(expert));
        Experts::of(model, layer, weights)
    }

    fn of(model: &'a Model, layer: usize, weights: Vec<Option<&'a Expert>>) -> Experts<'a> {
        let one = |(e, weights): (usize, &Option<&'a Expert>)| Some(model.gated(layer, e, (*weights)?).as_ref());
        let refs = weights.iter().enumerate().map(one).collect();
        Experts { model, layer, weights, refs }
    }

    /// Whether the expert is in memory.
    pub fn has(&self, id: u32) -> bool {
        self.refs.get(id as usize).is_some_and(Option::is_some)
    }

    /// Whether the kernels can take all experts as they are.
    fn all_plain(&self) -> bool {
        let biased = self.model.spec().moe(self.layer).is_some_and(|moe| moe.expert_bias || is_clamped(moe.act));
        !biased && self.model.overlay().is_empty()
    }

    fn get(&self, id: u32) -> Option<Gated<'a>> {
        let weights = (*self.weights.get(id as usize)?)?;
        Some(self.model.gated(self.layer, id as usize, weights))
    }

    /// The ids without those of experts that cannot be computed at once.
    fn together<'i>(&self, half: Half, ids: &'i [u32]) -> Cow<'i, [u32]> {
        if self.all_plain() {
            return Cow::Borrowed(ids);
        }
        let open = |id: u32| self.get(id).is_some_and(|e| !e.plain(half));
        Cow::Owned(ids.iter().map(|&id| if open(id) { NO_EXPERT } else { id }).collect())
    }

    /// Handles on the matrices of the experts that occur, for the way back.
    fn held(&self, ids: &[u32], matrices: impl Fn(&Gated<'a>) -> Vec<Option<&'a Matrix>>) -> Matrices {
        let mut held = vec![None; self.refs.len()];
        for &id in ids {
            if let Some(expert) = self.get(id).filter(|_| held[id as usize].is_none()) {
                held[id as usize] = matrices(&expert).into_iter().map(|m| m.cloned()).collect();
            }
        }
        held
    }

    /// Computes the experts that [`Experts::together`] left out, each on its slots, and adds them to where the others left
    /// zeros.
    fn one_by_one(
        &self,
        half: Half,
        ids: &[u32],
        together: Tensor,
        compute: impl Fn(&Gated<'a>, &[u32]) -> Result<Tensor, ModelError>,
    ) -> Result<Tensor, ModelError> {
        if self.all_plain() {
            return Ok(together);
        }
        let mut slots_of = vec![Vec::new(); self.refs.len()];
        for (slot, &id) in (0u32..).zip(ids).filter(|(_, id)| **id != NO_EXPERT) {
            slots_of[id as usize].push(slot);
        }
        let (mut places, mut parts) = (Vec::new(), Vec::new());
        for (id, slots) in (0u32..).zip(&slots_of).filter(|(_, slots)| !slots.is_empty()) {
            let Some(expert) = self.get(id).filter(|e| !e.plain(half)) else { continue };
            parts.push(compute(&expert, slots)?);
            places.extend_from_slice(slots);
        }
        if parts.is_empty() {
            return Ok(together);
        }
        let count = places.len();
        let places = Tensor::from_vec(places, count, &Device::Cpu)?;
        Ok(together.index_add(&places, &Tensor::cat(&parts, 0)?, 0)?)
    }
}

/// Some experts' matrices: of each, one or two.
type Matrices = Vec<Option<Vec<Matrix>>>;

/// `act(gate x) * (up x)`, `[n, I]`, of `x [n, d]`.
pub(crate) fn hidden(
    pool: &Arc<Pool>,
    pack: Pack,
    ffn: &Gated<'_>,
    act: Activation,
    x: &Tensor,
) -> Result<Tensor, ModelError> {
    let bias = |i: usize| ffn.biases.map(|b| Vector::Stored(b[i]));
    let apart = || -> Result<[Tensor; 2], ModelError> {
        Ok([linear(pool, pack, x, &ffn.gate, bias(0))?, linear(pool, pack, x, &ffn.up, bias(1))?])
    };
    let act = match kernel_act(act) {
        KernelAct::One(act) => act,
        KernelAct::ClampedSwiglu { limit, alpha } => {
            let [gate, up] = apart()?;
            return ops::clamped_swiglu(&gate, &up, limit, alpha);
        }
    };
    let (Some(gate), Some(up), None) = (ffn.gate.stored(), ffn.up.stored(), ffn.biases) else {
        let [gate, up] = apart()?;
        return gated(&gate, &up, pool, act);
    };
    let v = values(x)?;
    let n = v.len() / gate.cols;
    let mut y = Vec::new();
    kernels::gated_hidden(pool, pack, gate.as_ref(), up.as_ref(), &v, n, act, &mut y);
    attach(&[x], y, &[n, gate.rows], || {
        let (pool, matrices) = (pool.clone(), vec![Some(vec![gate.clone(), up.clone()])]);
        move |node| hidden_backward(&pool, &matrices, &vec![0; n], 1, act, node)
    })
}

/// `act(x)`, value by value.
pub(crate) fn activated(pool: &Arc<Pool>, x: &Tensor, act: Activation) -> Result<Tensor, ModelError> {
    match kernel_act(act) {
        KernelAct::One(act) => gated(x, &x.ones_like()?, pool, act),
        // Without an `up`, its one is zero: `(0 + 1) g sigmoid(alpha g)`.
        KernelAct::ClampedSwiglu { limit, alpha } => ops::clamped_swiglu(x, &x.zeros_like()?, limit, alpha),
    }
}

/// `act(gate) * up`, value by value.
fn gated(gate: &Tensor, up: &Tensor, pool: &Arc<Pool>, act: Act) -> Result<Tensor, ModelError> {
    let mut y = values(gate)?.to_vec();
    kernels::act_inplace(pool, act, &mut y);
    y.iter_mut().zip(&*values(up)?).for_each(|(y, u)| *y *= u);
    attach(&[gate, up], y, gate.dims(), || {
        let pool = pool.clone();
        move |node| {
            let (dg, du) = gated_backward(&pool, act, &values(node.args[0])?, values(node.args[1])?.to_vec(), node.dy);
            Ok(vec![Some(dg), Some(du)])
        }
    })
}

/// What [`expert_hidden`], [`expert_down`] and [`combine`] give for one token `x [1, d]`, to the bit, in one step that takes less time;
/// `None` if more than plain weights and activations is needed, or a gradient is to go back.
pub(crate) fn expert_ffn(
    model: &Model,
    layer: usize,
    moe: &MoeSpec,
    x: &Tensor,
    routing: &Routing,
) -> Result<Option<Tensor>, ModelError> {
    let KernelAct::One(act) = kernel_act(moe.act) else { return Ok(None) };
    if moe.expert_bias || !model.overlay().is_empty() || x.track_op() || routing.gates.track_op() {
        return Ok(None);
    }
    let (mut experts, mut gates) = (Vec::with_capacity(routing.k), Vec::with_capacity(routing.k));
    for (&id, &gate) in routing.ids.iter().zip(&*values(&routing.gates)?).filter(|(id, _)| **id != NO_EXPERT) {
        let expert = model.weights().expert(layer, id as usize);
        let Expert { gate: w, up, down } = expert.ok_or(ModelError::ExpertNotLoaded { layer, expert: id })?;
        experts.push(ExpertRef { gate: w.as_ref(), up: up.as_ref(), down: down.as_ref() });
        gates.push(gate);
    }
    let mut y = Vec::new();
    kernels::expert_ffn(model.pool(), &experts, &gates, &values(x)?, act, &mut y);
    Ok(Some(ops::tensor(y, x.dims())?))
}

/// Inner activations of the experts `ids [n, k]`, `[n, k, I]`, of `x [n, d]`.
pub(crate) fn expert_hidden(
    pool: &Arc<Pool>,
    pack: Pack,
    experts: &Experts<'_>,
    act: Activation,
    width: usize,
    x: &Tensor,
    (k, ids): (usize, &[u32]),
) -> Result<Tensor, ModelError> {
    let (n, chosen) = (x.dim(0)?, ids);
    // Experts with another activation are computed one by one, and the kernel has nothing to do.
    let kernel = match kernel_act(act) {
        KernelAct::One(kernel) => kernel,
        KernelAct::ClampedSwiglu { .. } => Act::Silu,
    };
    let ids = experts.together(Half::Hidden, chosen);
    let mut y = Vec::new();
    kernels::expert_hidden(pool, pack, &experts.refs, &values(x)?, n, k, &ids, kernel, width, &mut y)?;
    let together = attach(&[x], y, &[n * k, width], || {
        let (pool, ids) = (pool.clone(), ids.to_vec());
        let matrices = experts.held(&ids, |e| vec![e.gate.stored(), e.up.stored()]);
        move |node| hidden_backward(&pool, &matrices, &ids, k, kernel, node)
    })?;
    let all = experts.one_by_one(Half::Hidden, chosen, together, |expert, slots| {
        let tokens: Vec<usize> = slots.iter().map(|&s| s as usize / k).collect();
        hidden(pool, pack, expert, act, &ops::pick_rows(x, &tokens)?)
    })?;
    Ok(all.reshape((n, k, width))?)
}

/// Outputs of the experts `chosen [n, k]` before their gates, `[n, k, d]`, of `hidden [n, k, I]`.
pub(crate) fn expert_down(
    pool: &Arc<Pool>,
    pack: Pack,
    experts: &Experts<'_>,
    d: usize,
    hidden: &Tensor,
    chosen: &[u32],
) -> Result<Tensor, ModelError> {
    let (n, k, width) = hidden.dims3()?;
    let hidden = hidden.reshape((n * k, width))?;
    let ids = experts.together(Half::Down, chosen);
    let mut y = Vec::new();
    kernels::expert_down(pool, pack, &experts.refs, &values(&hidden)?, n, k, &ids, d, &mut y)?;
    let together = attach(&[&hidden], y, &[n * k, d], || {
        let (pool, ids) = (pool.clone(), ids.to_vec());
        let matrices = experts.held(&ids, |e| vec![e.down.stored()]);
        move |node| Ok(vec![Some(slots(&pool, Side::Columns, &matrices, 0, node.dy, 1, &ids, width)?)])
    })?;
    let all = experts.one_by_one(Half::Down, chosen, together, |expert, slots| {
        let rows: Vec<usize> = slots.iter().map(|&s| s as usize).collect();
        let bias = expert.biases.map(|b| Vector::Stored(b[2]));
        linear(pool, pack, &ops::pick_rows(&hidden, &rows)?, &expert.down, bias)
    })?;
    Ok(all.reshape((n, k, d))?)
}

/// The gated sum over each token's slots: `slots [n, k, d]` to `[n, d]`.
pub(crate) fn combine(pool: &Pool, slots: &Tensor, routing: &Routing) -> Result<Tensor, ModelError> {
    let (n, k, d) = slots.dims3()?;
    let mut y = Vec::new();
    kernels::combine(pool, &values(slots)?, &values(&routing.gates)?, &routing.ids, n, k, d, &mut y);
    attach(&[slots, &routing.gates], y, &[n, d], || {
        let ids = routing.ids.clone();
        move |node| {
            let [slots, gates] = [values(node.args[0])?, values(node.args[1])?];
            let (mut dslots, mut dgates) = (vec![0.0; slots.len()], vec![0.0; gates.len()]);
            for s in (0..ids.len()).filter(|&s| ids[s] != NO_EXPERT) {
                let (dy, at) = (&node.dy[s / k * d..][..d], s * d..(s + 1) * d);
                dgates[s] = kernels::dot(&slots[at.clone()], dy);
                dslots[at].iter_mut().zip(dy).for_each(|(ds, dy)| *ds = gates[s] * dy);
            }
            Ok(vec![Some(dslots), Some(dgates)])
        }
    })
}

/// One product of every slot with the `which`-th matrix of its expert.
#[allow(clippy::too_many_arguments, reason = "kernels take plain arguments")]
fn slots(
    pool: &Pool,
    side: Side,
    matrices: &Matrices,
    which: usize,
    x: &[f32],
    per_row: usize,
    ids: &[u32],
    width: usize,
) -> Result<Vec<f32>, ModelError> {
    let matrices: Vec<_> = matrices.iter().map(|m| m.as_ref().map(|m| m[which].as_ref())).collect();
    let mut y = Vec::new();
    kernels::slot_products(pool, side, &matrices, x, per_row, ids, width, &mut y)?;
    Ok(y)
}

/// The gradient of `x` through `act(gate x) * (up x)` of its `k` slots. The two products are computed again, which takes
/// less memory than to keep them.
fn hidden_backward(pool: &Pool, matrices: &Matrices, ids: &[u32], k: usize, act: Act, node: &Node<'_>) -> Grads {
    let x = values(node.args[0])?;
    let mut dx = vec![0.0; x.len()];
    if k == 0 || ids.iter().all(|&id| id == NO_EXPERT) {
        return Ok(vec![Some(dx)]);
    }
    let (d, width) = (x.len() * k / ids.len(), node.dy.len() / ids.len());
    let gate = slots(pool, Side::Rows, matrices, 0, &x, k, ids, width)?;
    let up = slots(pool, Side::Rows, matrices, 1, &x, k, ids, width)?;
    let (dgate, dup) = gated_backward(pool, act, &gate, up, node.dy);
    for (which, dy) in [dgate, dup].iter().enumerate() {
        let dslots = slots(pool, Side::Columns, matrices, which, dy, 1, ids, d)?;
        for (slot, dslot) in dslots.chunks_exact(d).enumerate() {
            dx[slot / k * d..][..d].iter_mut().zip(dslot).for_each(|(dx, ds)| *dx += ds);
        }
    }
    Ok(vec![Some(dx)])
}

/// Of `h = act(g) u`: `dg = dh u act'(g)` and `du = dh act(g)`.
fn gated_backward(pool: &Pool, act: Act, gate: &[f32], up: Vec<f32>, dh: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let mut du = gate.to_vec();
    kernels::act_inplace(pool, act, &mut du);
    let mut dg = up;
    for (((dg, du), &g), dh) in dg.iter_mut().zip(&mut du).zip(gate).zip(dh) {
        *dg *= dh * slope(act, g, *du);
        *du *= dh;
    }
    (dg, du)
}

/// The derivative of an activation at `x`, where its value is `y`.
fn slope(act: Act, x: f32, y: f32) -> f32 {
    match act {
        Act::Silu => {
            let s = 1.0 / (1.0 + (-x).exp());
            s + y * (1.0 - s)
        }
        Act::GeluTanh => {
            let (a, b) = ((2.0 / std::f32::consts::PI).sqrt(), 0.044_715);
            let t = (a * (x + b * x * x * x)).tanh();
            0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * a * (1.0 + 3.0 * b * x * x)
        }
        Act::Gelu => {
            let density = (-0.5 * x * x).exp() / (2.0 * std::f32::consts::PI).sqrt();
            // y is x times the distribution function; near zero their quotient loses its digits.
            let distribution = if x.abs() < 1e-2 { 0.5 + x * density } else { y / x };
            distribution + x * density
        }
    }
}

/// Whether an activation takes gate and up together.
pub(crate) fn is_clamped(act: Activation) -> bool {
    matches!(act, Activation::ClampedSwiglu { .. })
}

/// How the kernels compute an activation.
pub(crate) enum KernelAct {
    /// On the gate, value by value.
    One(Act),
    /// On gate and up together.
    ClampedSwiglu { limit: f32, alpha: f32 },
}

pub(crate) fn kernel_act(act: Activation) -> KernelAct {
    KernelAct::One(match act {
        Activation::Silu => Act::Silu,
        Activation::GeluTanh => Act::GeluTanh,
        Activation::Gelu => Act::Gelu,
        Activation::ClampedSwiglu { limit, alpha } => return KernelAct::ClampedSwiglu { limit, alpha },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_those_of_the_activations() {
        let pool = Pool::new(1);
        for act in [Act::Silu, Act::GeluTanh, Act::Gelu] {
            for x in [-6.0f32, -1.5, -0.3, -0.005, 0.0, 0.005, 0.02, 0.7, 3.0, 8.0] {
                let at = |x: f32| {
                    let mut y = [x];
                    kernels::act_inplace(&pool, act, &mut y);
                    y[0]
                };
                let step = 1e-2;
                let numeric = (at(x + step) - at(x - step)) / (2.0 * step);
                assert!((slope(act, x, at(x)) - numeric).abs() < 1e-4, "{act:?} at {x}: {numeric}");
            }
        }
    }
}
