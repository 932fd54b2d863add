//! The gradient of gates in the router's logits, the choice of experts held fast.

use quorate_formats::spec::{MoeSpec, RouterScore};
use quorate_kernels::NO_EXPERT;

use super::{RoutingMode, near_enough, sigmoid, softmax};

/// What was chosen, and how gates followed from logits.
pub(super) struct GateGradient {
    pub moe: MoeSpec,
    /// `[n, k]`, before slots were dropped.
    pub chosen: Vec<u32>,
    pub keep: Option<(Vec<bool>, RoutingMode)>,
    pub expert_scale: Option<Vec<f32>>,
}

impl GateGradient {
    /// Gradient of the logits `z [n, E]` from that of the gates `[n, k]`.
    pub fn back(&self, z: &[f32], dgates: &[f32]) -> Vec<f32> {
        let (e, k) = (self.moe.n_experts, self.moe.top_k);
        let mut dz = vec![0.0; z.len()];
        let rows = z.chunks_exact(e).zip(dgates.chunks_exact(k)).zip(self.chosen.chunks_exact(k));
        for (((z, dgates), chosen), dz) in rows.zip(dz.chunks_exact_mut(e)) {
            self.row(z, dgates, chosen, dz);
        }
        dz
    }

    /// One token: back through dropping, scaling, renormalising and the score function, in this order.
    fn row(&self, z: &[f32], dgates: &[f32], chosen: &[u32], dz: &mut [f32]) {
        let router = &self.moe.router;
        if router.score == RouterScore::SparseMixer {
            return self.sparse_mixer(z, dgates, chosen, dz);
        }
        let scores = self.scores(z, chosen);
        let of = |id: u32| if id == NO_EXPERT { 0.0 } else { scores[id as usize] };
        let raw: Vec<f32> = chosen.iter().map(|&id| of(id)).collect();
        let sum = if router.norm_topk_prob { raw.iter().sum::<f32>().max(1e-20) } else { 1.0 };
        let scale = |id: u32| self.expert_scale.as_ref().filter(|_| id != NO_EXPERT).map_or(1.0, |s| s[id as usize]);
        let factor = |&id: &u32| scale(id) * router.routed_scaling_factor;
        let gates: Vec<f32> = raw.iter().zip(chosen).map(|(r, id)| r / sum * factor(id)).collect();
        let mut d = dgates.to_vec();
        self.through_drops(chosen, &gates, &mut d);
        d.iter_mut().zip(chosen).for_each(|(d, &id)| *d *= scale(id));
        d.iter_mut().for_each(|d| *d *= router.routed_scaling_factor);
        if router.norm_topk_prob {
            let inner: f32 = d.iter().zip(&raw).map(|(d, r)| d * r / sum).sum();
            d.iter_mut().for_each(|d| *d = (*d - inner) / sum);
        }
        let slots = || chosen.iter().zip(&d).filter(|(id, _)| **id != NO_EXPERT).map(|(id, d)| (*id as usize, *d));
        if router.score == RouterScore::Sigmoid {
            slots().for_each(|(i, d)| dz[i] += d * scores[i] * (1.0 - scores[i]));
            return;
        }
        let inner: f32 = slots().map(|(i, d)| d * scores[i]).sum();
        dz.iter_mut().zip(&scores).for_each(|(dz, p)| *dz = -p * inner);
        slots().for_each(|(i, d)| dz[i] += d * scores[i]);
    }

    /// Each choice's share of a softmax over the logits near it.
    fn sparse_mixer(&self, z: &[f32], dgates: &[f32], chosen: &[u32], dz: &mut [f32]) {
        let masked = |i: usize| matches!(&self.keep, Some((kept, RoutingMode::Mask)) if !kept[i]);
        let jitter = self.moe.router.extra.jitter;
        let mut shares: Vec<Vec<f32>> = Vec::with_capacity(chosen.len());
        for (slot, &id) in chosen.iter().enumerate() {
            let mut share = vec![f32::NEG_INFINITY; z.len()];
            if id != NO_EXPERT {
                let best = z[id as usize];
                let seen = |i: usize| {
                    let free = !masked(i) && !chosen[..slot].contains(&(i as u32));
                    i == id as usize || free && near_enough(best, z[i], jitter)
                };
                (0..z.len()).filter(|&i| seen(i)).for_each(|i| share[i] = z[i]);
            }
            softmax(&mut share);
            shares.push(share);
        }
        let of = |slot: usize, id: u32| if id == NO_EXPERT { 0.0 } else { shares[slot][id as usize] };
        let gates: Vec<f32> = chosen.iter().enumerate().map(|(slot, &id)| of(slot, id)).collect();
        let mut d = dgates.to_vec();
        self.through_drops(chosen, &gates, &mut d);
        for ((share, (&id, g)), d) in shares.iter().zip(chosen.iter().zip(&gates)).zip(d) {
            if id != NO_EXPERT {
                dz.iter_mut().zip(share).for_each(|(dz, p)| *dz -= d * g * p);
                dz[id as usize] += d * g;
            }
        }
    }

    /// The score function's values, `[E]`; zero for experts that it does not see.
    fn scores(&self, z: &[f32], chosen: &[u32]) -> Vec<f32> {
        let masked = |i: usize| matches!(&self.keep, Some((kept, RoutingMode::Mask)) if !kept[i]);
        let of_all = |i: usize, v: f32| if masked(i) { f32::NEG_INFINITY } else { v };
        let mut scores: Vec<f32> = z.iter().enumerate().map(|(i, v)| of_all(i, *v)).collect();
        match self.moe.router.score {
            RouterScore::Sigmoid => scores.iter_mut().for_each(|v| *v = sigmoid(*v)),
            RouterScore::SoftmaxAll => softmax(&mut scores),
            RouterScore::SparseMixer => {} // has a way of its own
            RouterScore::TopkThenSoftmax => {
                let mut seen = vec![f32::NEG_INFINITY; z.len()];
                for &id in chosen.iter().filter(|&&id| id != NO_EXPERT) {
                    seen[id as usize] = z[id as usize];
                }
                scores = seen;
                softmax(&mut scores);
            }
        }
        scores
    }

    /// From the gradient of what the drops left to that of the gates before them.
    fn through_drops(&self, chosen: &[u32], gates: &[f32], d: &mut [f32]) {
        let Some((kept, mode @ (RoutingMode::Drop | RoutingMode::DropRenormalise))) = &self.keep else { return };
        let stays: Vec<bool> = chosen.iter().map(|&id| id != NO_EXPERT && kept[id as usize]).collect();
        let sum = |of: &dyn Fn(usize) -> f32| (0..d.len()).filter(|&j| stays[j]).map(of).sum::<f32>();
        let (before, after) = (gates.iter().sum::<f32>(), sum(&|j| gates[j]));
        let inner = sum(&|j| d[j] * gates[j]);
        let renormalise = *mode == RoutingMode::DropRenormalise && after > 0.0;
        for (d, stays) in d.iter_mut().zip(&stays) {
            *d = match (renormalise, stays) {
                (false, true) => *d,
                (false, false) => 0.0,
                (true, true) => *d * before / after + inner * (1.0 / after - before / (after * after)),
                (true, false) => inner / after,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, Var};
    use quorate_formats::spec::{Activation, RouterExtra, RouterSpec};

    use super::super::{Keep, Learned, route};
    use super::*;
    use crate::ops::values;

    /// Logits of 3 tokens for 6 experts, far enough apart that small steps change no choice.
    const LOGITS: [f32; 18] = [
        0.3, -1.2, 0.9, 1.6, -0.4, 0.0, //
        -0.7, 2.1, 0.2, -0.1, 1.1, 0.6, //
        1.5, 0.1, -0.9, 0.5, -0.3, 1.0,
    ];

    #[test]
    fn gates_of_all_routers_and_modes() {
        let kept = [true, false, true, true, false, true];
        let weights: Vec<f32> = (0..9).map(|i| ((i * 7 % 5) as f32 - 1.7) * 0.6).collect();
        let mut modes: Vec<Option<RoutingMode>> = RoutingMode::ALL.map(Some).to_vec();
        modes.push(None);
        for score in [RouterScore::SoftmaxAll, RouterScore::TopkThenSoftmax, RouterScore::Sigmoid] {
            for (norm_topk_prob, mode) in [false, true].into_iter().flat_map(|n| modes.iter().map(move |m| (n, *m))) {
                let router =
                    RouterSpec { score, norm_topk_prob, routed_scaling_factor: 2.5, extra: RouterExtra::default() };
                let act = Activation::Silu;
                let moe = MoeSpec {
                    n_experts: 6,
                    top_k: 3,
                    intermediate_size: 1,
                    act,
                    router,
                    shared: None,
                    expert_bias: false,
                };
                let gates = |z: &Tensor| {
                    let keep = mode.map(|mode| Keep { kept: &kept, mode });
                    route(&moe, 0, z, Learned::default(), None, keep).unwrap().gates
                };
                let sum = |z: &[f32]| -> f64 {
                    let z = Tensor::from_slice(z, (3, 6), &Device::Cpu).unwrap();
                    let gates = gates(&z);
                    let gates = values(&gates).unwrap();
                    gates.iter().zip(&weights).map(|(g, w)| f64::from(g * w)).sum()
                };
                let z = Var::from_slice(&LOGITS, (3, 6), &Device::Cpu).unwrap();
                let c = Tensor::from_slice(&weights, (3, 3), &Device::Cpu).unwrap();
                let grads = (gates(&z) * c).unwrap().sum_all().unwrap().backward().unwrap();
                let found = grads.get(&z).unwrap();
                for (i, found) in values(found).unwrap().iter().enumerate() {
                    let at = |step: f32| {
                        let mut z = LOGITS;
                        z[i] += step;
                        sum(&z)
                    };
                    let numeric = (at(5e-3) - at(-5e-3)) / 1e-2;
                    let what = format!("{score:?}, renormalised {norm_topk_prob}, {mode:?}, logit {i}");
                    assert!((f64::from(*found) - numeric).abs() < 3e-4, "{what}: {found}, {numeric}");
                }
            }
        }
    }
}
