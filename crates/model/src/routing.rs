//! From router logits to chosen experts and gates, for every router family and every way of removing experts.

mod gradient;

use candle_core::Tensor;
use quorate_formats::spec::{GroupRule, GroupSpec, MoeSpec, RouterScore};
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

/// A router's learned vectors besides its matrix.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Learned<'a> {
    /// Added to the scores for the choice only, `[E]`.
    pub selection_bias: Option<&'a [f32]>,
    /// Factor on each expert's gate, `[E]`.
    pub expert_scale: Option<&'a [f32]>,
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
    learned: Learned<'_>,
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
    let mut row = Row { masked: vec![0.0; e], choice: vec![0.0; e], learned };
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
        if let Some(scale) = learned.expert_scale {
            let slots = gates.iter_mut().zip(ids.iter()).filter(|(_, id)| **id != NO_EXPERT);
            slots.for_each(|(g, &id)| *g *= scale[id as usize]);
        }
        if let Some(Keep { kept, mode: mode @ (RoutingMode::Drop | RoutingMode::DropRenormalise) }) = &keep {
            drop_slots(ids, gates, |id| !kept[id as usize], *mode == RoutingMode::DropRenormalise);
        }
    }
    let gates = attach(&[logits], gates, &[n, k], || {
        let keep = keep.map(|keep| (keep.kept.to_vec(), keep.mode));
        let expert_scale = learned.expert_scale.map(<[f32]>::to_vec);
        let gradient = GateGradient { moe: moe.clone(), chosen, keep, expert_scale };
        move |node| Ok(vec![Some(gradient.back(&values(node.args[0])?, node.dy))])
    })?;
    Ok(Routing { k, ids, gates })
}

/// Chooses experts for logits `[n, E]` that were computed elsewhere: ids and gates `[n, k]`, as in [`Routing`].
///
/// # Errors
/// Logits that are NaN or plus infinity, no whole rows, a router that chooses or weighs by learned vectors besides.
pub fn route_logits(moe: &MoeSpec, layer: usize, logits: &[f32]) -> Result<(Vec<u32>, Vec<f32>), ModelError> {
    if moe.router.extra.selection_bias || moe.router.extra.expert_scale {
        let message = "this router chooses by more than its logits; help: record the chosen experts in place of logits";
        return Err(ModelError::Lens(message.into()));
    }
    let e = moe.n_experts;
    let logits = Tensor::from_slice(logits, (logits.len() / e.max(1), e), &candle_core::Device::Cpu)?;
    let routing = route(moe, layer, &logits, Learned::default(), None, None)?;
    let gates = values(&routing.gates)?.to_vec();
    Ok((routing.ids, gates))
}

struct Row<'a> {
    masked: Vec<f32>,
    choice: Vec<f32>,
    learned: Learned<'a>,
}

impl Row<'_> {
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
        let learned = self.learned.selection_bias;
        let groups = moe.router.extra.groups;
        if bias.is_none() && learned.is_none() && groups.is_none() {
            return; // the order of the logits is that of the scores
        }
        match moe.router.score {
            RouterScore::SoftmaxAll => softmax(&mut self.choice),
            RouterScore::Sigmoid => self.choice.iter_mut().for_each(|v| *v = sigmoid(*v)),
            RouterScore::TopkThenSoftmax | RouterScore::SparseMixer => {}
        }
        for bias in [learned, bias].into_iter().flatten() {
            self.choice.iter_mut().zip(bias).for_each(|(c, b)| *c += b);
        }
        for (c, z) in self.choice.iter_mut().zip(&self.masked) {
            if *z == f32::NEG_INFINITY {
                *c = f32::NEG_INFINITY;
            }
        }
        if let Some(groups) = groups {
            limit_groups(&groups, &mut self.choice, &self.masked);
        }
    }
}

/// Leaves only what the groups allow: other scores become `-inf`.
fn limit_groups(groups: &GroupSpec, choice: &mut [f32], logits: &[f32]) {
    let size = choice.len() / groups.n_group;
    if groups.rule == GroupRule::OneOfEach {
        for (choice, logits) in choice.chunks_exact_mut(size).zip(logits.chunks_exact(size)) {
            let mut best = [NO_EXPERT];
            top_k(choice, logits, &mut best);
            let others = choice.iter_mut().enumerate().filter(|(i, _)| *i != best[0] as usize);
            others.for_each(|(_, c)| *c = f32::NEG_INFINITY);
        }
        return;
    }
    let largest = |scores: &[f32]| {
        let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &s in scores {
            if s > first {
                (first, second) = (s, first);
            } else if s > second {
                second = s;
            }
        }
        // A group of one kept expert is as good as that one.
        let second = if second == f32::NEG_INFINITY { 0.0 } else { second };
        if groups.rule == GroupRule::Max { first } else { first + second }
    };
    let scores: Vec<f32> = choice.chunks_exact(size).map(largest).collect();
    let mut kept = vec![NO_EXPERT; groups.topk_group];
    top_k(&scores, &scores, &mut kept);
    for (g, choice) in (0u32..).zip(choice.chunks_exact_mut(size)) {
        if !kept.contains(&g) {
            choice.fill(f32::NEG_INFINITY);
        }
    }
}

/// Whether the sparse mixer's softmax for a choice with logit `best` sees logit `z`.
pub(crate) fn near_enough(best: f32, z: f32, jitter: f32) -> bool {
    z != f32::NEG_INFINITY && (best - z) / z.abs().max(best) <= 2.0 * jitter
}

/// Gates of the sparse mixer: each choice's share of a softmax over the logits near it; the second does not see the first.
fn sparse_mixer(z: &[f32], jitter: f32, ids: &[u32], gates: &mut [f32]) {
    for (slot, &id) in ids.iter().enumerate().filter(|(_, id)| **id != NO_EXPERT) {
        let best = z[id as usize];
        let seen = |i: usize| !ids[..slot].contains(&(i as u32)) && near_enough(best, z[i], jitter);
        let sum: f32 = (0..z.len()).filter(|&i| i == id as usize || seen(i)).map(|i| (z[i] - best).exp()).sum();
        gates[slot] = 1.0 / sum;
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
    if moe.router.score == RouterScore::SparseMixer {
        return sparse_mixer(z, moe.router.extra.jitter, ids, gates);
    }
    let (max, sum) = match moe.router.score {
        RouterScore::SoftmaxAll => {
            let max = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            (max, z.iter().map(|v| (v - max).exp()).sum::<f32>())
        }
        RouterScore::TopkThenSoftmax => {
            let max = chosen().fold(f32::NEG_INFINITY, f32::max);
            (max, chosen().map(|v| (v - max).exp()).sum::<f32>())
        }
        RouterScore::Sigmoid | RouterScore::SparseMixer => (0.0, 1.0),
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
    use quorate_formats::spec::{Activation, RouterExtra, RouterSpec};

    fn moe(score: RouterScore, norm: bool) -> MoeSpec {
        MoeSpec {
            n_experts: 4,
            top_k: 2,
            intermediate_size: 1,
            act: Activation::Silu,
            router: RouterSpec {
                score,
                norm_topk_prob: norm,
                routed_scaling_factor: 1.0,
                extra: RouterExtra::default(),
            },
            shared: None,
            expert_bias: false,
        }
    }

    fn run(moe: &MoeSpec, z: &[f32], bias: Option<&[f32]>, keep: Option<Keep<'_>>) -> (Vec<u32>, Vec<f32>) {
        let z = Tensor::new(z, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let r = route(moe, 0, &z, Learned::default(), bias, keep).unwrap();
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
        assert!(route(&m, 3, &nan, Learned::default(), None, None).is_err());
    }
}
