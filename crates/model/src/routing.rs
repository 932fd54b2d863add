//! From router logits to chosen experts and gates, for every router family and every way of removing experts.

mod gradient;

use candle_core::Tensor;
use quorate_formats::spec::{MoeSpec, RouterScore};
use quorate_kernels::NO_EXPERT;
use serde::{Deserialize, Serialize};

use crate::ModelError;
use crate::grad::attach;
use crate::ops::values;
use gradient::GateGradient;

/// Chosen experts of every token row, in rank order, and the gates with which their outputs are summed.
#[derive(Clone, Debug)]
pub struct Routing {
    /// Experts per token `k`.
    pub k: usize,
    /// Global expert ids, `[N, k]` row by row; [`NO_EXPERT`] is an empty slot.
    pub ids: Vec<u32>,
    /// Gates, `[N, k]`; 0 in empty slots. They are differentiable in the logits; the choice itself is a constant.
    pub gates: Tensor,
}

/// What happens to a token whose expert is not kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RoutingMode {
    /// Before top-k: logits of experts that are not kept become `-inf`; a lower-ranked kept expert fills the slot. This is
    /// what a physically pruned model with sliced router rows computes.
    #[default]
    Mask,
    /// As `mask` for the choice, but the gates come from the score function over all experts, so that the mass of the
    /// removed ones is lost. The same as `mask` where gates are renormalised.
    MaskFullGates,
    /// After top-k: the slot of an expert that is not kept contributes nothing; the other gates stay.
    Drop,
    /// As `drop`, the surviving gates scaled up to the sum before.
    DropRenormalise,
}

impl RoutingMode {
    /// All of them.
    pub const ALL: [RoutingMode; 4] =
        [RoutingMode::Mask, RoutingMode::MaskFullGates, RoutingMode::Drop, RoutingMode::DropRenormalise];

    /// The name used in plans and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            RoutingMode::Mask => "mask",
            RoutingMode::MaskFullGates => "mask-full-gates",
            RoutingMode::Drop => "drop",
            RoutingMode::DropRenormalise => "drop-renormalise",
        }
    }
}

/// Which experts of one layer may be used.
#[derive(Clone, Debug)]
pub(crate) struct Keep<'a> {
    /// `[E]`.
    pub kept: &'a [bool],
    pub mode: RoutingMode,
}

/// Chooses experts: `logits [n, E]`, `selection [n, E]` is added to the scores for the choice only.
///
/// Ties go to the larger logit, then to the lower index. Experts at `-inf` are never chosen; if fewer than `k` remain, slots stay empty.
///
/// # Errors
/// Logits that are NaN or plus infinity, a selection that is NaN.
pub(crate) fn route(
    moe: &MoeSpec,
    layer: usize,
    logits: &Tensor,
    selection: Option<&[f32]>,
    keep: Option<Keep<'_>>,
) -> Result<Routing, ModelError> {
    let (e, k) = (moe.n_experts, moe.top_k);
    let z = values(logits)?;
    let n = z.len() / e;
    let mut ids = vec![NO_EXPERT; n * k];
    let mut gates = vec![0f32; n * k];
    // With gradient, the choice before slots were dropped is needed on the way back.
    let mut chosen = if logits.track_op() { vec![NO_EXPERT; n * k] } else { Vec::new() };
    let mut row = Row { masked: vec![0.0; e], choice: vec![0.0; e] };
    for t in 0..n {
        let z = &z[t * e..(t + 1) * e];
        let bias = selection.map(|s| &s[t * e..(t + 1) * e]);
        let unusable = z.iter().any(|&v| v.is_nan() || v == f32::INFINITY);
        if unusable || bias.is_some_and(|b| b.iter().any(|v| v.is_nan())) {
            return Err(ModelError::NanRouter { layer });
        }
        row.fill(moe, z, bias, keep.as_ref());
        let (ids, gates) = (&mut ids[t * k..(t + 1) * k], &mut gates[t * k..(t + 1) * k]);
        top_k(&row.choice, &row.masked, ids);
        if let Some(chosen) = chosen.get_mut(t * k..(t + 1) * k) {
            chosen.copy_from_slice(ids);
        }
        let source = match &keep {
            Some(Keep { mode: RoutingMode::Mask, .. }) => &row.masked,
            _ => z,
        };
        gate(moe, source, ids, gates);
        if let Some(Keep { kept, mode: mode @ (RoutingMode::Drop | RoutingMode::DropRenormalise) }) = &keep {
            drop_slots(ids, gates, |id| !kept[id as usize], *mode == RoutingMode::DropRenormalise);
        }
    }
    let gates = attach(&[logits], gates, &[n, k], || {
        let keep = keep.map(|keep| (keep.kept.to_vec(), keep.mode));
        let gradient = GateGradient { moe: moe.clone(), chosen, keep };
        move |node| Ok(vec![Some(gradient.back(&values(node.args[0])?, node.dy))])
    })?;
    Ok(Routing { k, ids, gates })
}

struct Row {
    masked: Vec<f32>,
    choice: Vec<f32>,
}

impl Row {
    fn fill(&mut self, moe: &MoeSpec, z: &[f32], bias: Option<&[f32]>, keep: Option<&Keep<'_>>) {
        self.masked.copy_from_slice(z);
        if let Some(Keep { kept, mode: RoutingMode::Mask | RoutingMode::MaskFullGates }) = keep {
            for (v, &kept) in self.masked.iter_mut().zip(*kept) {
                if !kept {
                    *v = f32::NEG_INFINITY;
                }
            }
        }
        self.choice.copy_from_slice(&self.masked);
        if let Some(bias) = bias {
            match moe.router.score {
                RouterScore::SoftmaxAll => softmax(&mut self.choice),
                RouterScore::Sigmoid => self.choice.iter_mut().for_each(|v| *v = sigmoid(*v)),
                RouterScore::TopkThenSoftmax => {}
            }
            for ((c, b), z) in self.choice.iter_mut().zip(bias).zip(&self.masked) {
                *c = if *z == f32::NEG_INFINITY { f32::NEG_INFINITY } else { *c + b };
            }
        }
    }
}

/// Indices of the `ids.len()` largest values in descending order, `-inf` never. Ties go to the larger of `logits` (of
/// which scores may be too coarse an image), then to the lower index.
fn top_k(values: &[f32], logits: &[f32], ids: &mut [u32]) {
    let k = ids.len();
    let mut filled = 0;
    let beats = |i: usize, other: u32| {
        let other = other as usize;
        values[i] > values[other] || values[i] == values[other] && logits[i] > logits[other]
    };
    for (i, &v) in values.iter().enumerate() {
        if v == f32::NEG_INFINITY || filled == k && !beats(i, ids[k - 1]) {
            continue;
        }
        let mut at = if filled < k { filled } else { k - 1 };
        filled = (filled + 1).min(k);
        while at > 0 && beats(i, ids[at - 1]) {
            ids[at] = ids[at - 1];
            at -= 1;
        }
        ids[at] = i as u32;
    }
}

fn gate(moe: &MoeSpec, z: &[f32], ids: &[u32], gates: &mut [f32]) {
    let chosen = || ids.iter().filter(|&&id| id != NO_EXPERT).map(|&id| z[id as usize]);
    let (max, sum) = match moe.router.score {
        RouterScore::SoftmaxAll => {
            let max = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            (max, z.iter().map(|v| (v - max).exp()).sum::<f32>())
        }
        RouterScore::TopkThenSoftmax => {
            let max = chosen().fold(f32::NEG_INFINITY, f32::max);
            (max, chosen().map(|v| (v - max).exp()).sum::<f32>())
        }
        RouterScore::Sigmoid => (0.0, 1.0),
    };
    for (g, &id) in gates.iter_mut().zip(ids) {
        if id != NO_EXPERT {
            let v = z[id as usize];
            *g = if moe.router.score == RouterScore::Sigmoid { sigmoid(v) } else { (v - max).exp() / sum };
        }
    }
    if moe.router.norm_topk_prob {
        let sum = gates.iter().sum::<f32>().max(1e-20);
        gates.iter_mut().for_each(|g| *g /= sum);
    }
    if moe.router.routed_scaling_factor != 1.0 {
        gates.iter_mut().for_each(|g| *g *= moe.router.routed_scaling_factor);
    }
}

/// Empties the slots of one row whose expert `gone` names; with `renormalise` the survivors keep the sum.
pub fn drop_slots(ids: &mut [u32], gates: &mut [f32], gone: impl Fn(u32) -> bool, renormalise: bool) {
    let before: f32 = gates.iter().sum();
    for (id, g) in ids.iter_mut().zip(gates.iter_mut()) {
        if *id != NO_EXPERT && gone(*id) {
            *id = NO_EXPERT;
            *g = 0.0;
        }
    }
    let after: f32 = gates.iter().sum();
    if renormalise && after > 0.0 && after != before {
        gates.iter_mut().for_each(|g| *g *= before / after);
    }
}

fn sigmoid(v: f32) -> f32 {
    1.0 / (1.0 + (-v).exp())
}

/// Softmax in place; all `-inf` gives zeros.
pub fn softmax(values: &mut [f32]) {
    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        return values.fill(0.0);
    }
    values.iter_mut().for_each(|v| *v = (*v - max).exp());
    let sum: f32 = values.iter().sum();
    values.iter_mut().for_each(|v| *v /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use quorate_formats::spec::{Activation, RouterSpec};

    fn moe(score: RouterScore, norm: bool) -> MoeSpec {
        MoeSpec {
            n_experts: 4,
            top_k: 2,
            intermediate_size: 1,
            act: Activation::Silu,
            router: RouterSpec { score, norm_topk_prob: norm, routed_scaling_factor: 1.0 },
            shared: None,
        }
    }

    fn run(moe: &MoeSpec, z: &[f32], bias: Option<&[f32]>, keep: Option<Keep<'_>>) -> (Vec<u32>, Vec<f32>) {
        let z = Tensor::new(z, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let r = route(moe, 0, &z, bias, keep).unwrap();
        (r.ids, r.gates.flatten_all().unwrap().to_vec1().unwrap())
    }

    fn close(a: &[f32], b: &[f32]) {
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6), "{a:?} {b:?}");
    }

    #[test]
    fn softmax_router_by_hand() {
        let z = [0.0, 2f32.ln(), 5f32.ln(), 2f32.ln()]; // p = .1 .2 .5 .2; the tie goes to index 1
        let (ids, gates) = run(&moe(RouterScore::SoftmaxAll, false), &z, None, None);
        assert_eq!(ids, [2, 1]);
        close(&gates, &[0.5, 0.2]);
        let (_, gates) = run(&moe(RouterScore::SoftmaxAll, true), &z, None, None);
        close(&gates, &[5.0 / 7.0, 2.0 / 7.0]);
        let (_, same) = run(&moe(RouterScore::TopkThenSoftmax, false), &z, None, None);
        close(&gates, &same);
        let (_, gates) = run(&moe(RouterScore::Sigmoid, false), &z, None, None);
        close(&gates, &[5.0 / 6.0, 2.0 / 3.0]);
    }

    #[test]
    fn the_four_ways_of_removing_an_expert() {
        let z = [0.0, 2f32.ln(), 5f32.ln(), 2f32.ln()];
        let m = moe(RouterScore::SoftmaxAll, false);
        let kept = [true, true, false, true];
        let by = |mode| run(&m, &z, None, Some(Keep { kept: &kept, mode }));
        let (ids, gates) = by(RoutingMode::Mask);
        assert_eq!(ids, [1, 3]);
        close(&gates, &[0.4, 0.4]);
        let (ids, gates) = by(RoutingMode::MaskFullGates);
        assert_eq!(ids, [1, 3]);
        close(&gates, &[0.2, 0.2]);
        let (ids, gates) = by(RoutingMode::Drop);
        assert_eq!(ids, [NO_EXPERT, 1]);
        close(&gates, &[0.0, 0.2]);
        let (_, gates) = by(RoutingMode::DropRenormalise);
        close(&gates, &[0.0, 0.7]);
    }

    #[test]
    fn selection_changes_the_choice_but_not_the_gate() {
        let z = [0.0, 2f32.ln(), 5f32.ln(), 2f32.ln()];
        let bias = [f32::INFINITY, 0.0, 0.0, 0.0];
        let (ids, gates) = run(&moe(RouterScore::SoftmaxAll, false), &z, Some(&bias), None);
        assert_eq!(ids, [0, 2]);
        close(&gates, &[0.1, 0.5]);
    }

    #[test]
    fn too_few_experts_leave_empty_slots_and_nan_is_an_error() {
        let inf = f32::NEG_INFINITY;
        let m = moe(RouterScore::SoftmaxAll, false);
        let (ids, gates) = run(&m, &[inf, inf, 1.0, inf], None, None);
        assert_eq!(ids, [2, NO_EXPERT]);
        close(&gates, &[1.0, 0.0]);
        let nan = Tensor::new(&[[0.0, f32::NAN, 0.0, 0.0]], &Device::Cpu).unwrap();
        assert!(route(&m, 3, &nan, None, None).is_err());
    }
}
