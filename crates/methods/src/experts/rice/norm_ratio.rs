//! How much larger scaled gates make the routed output of a layer.

use candle_core::Tensor;
use quorate_lens::ExpertId;
use quorate_model::{At, Flow, Lens, ModelError, NO_EXPERT, Site, SiteSet, ops};

/// Compares, wherever one of some experts is chosen, the norm of the routed sum with that of the sum in which those experts'
/// gates are divided by `beta`. It follows the steering in the chain of lenses.
pub(super) struct NormRatio {
    experts: Vec<ExpertId>,
    beta: f32,
    sum: f64,
    rows: u64,
}

impl NormRatio {
    pub(super) fn new(experts: &[ExpertId], beta: f32) -> NormRatio {
        NormRatio { experts: experts.to_vec(), beta, sum: 0.0, rows: 0 }
    }

    /// Mean ratio over the tokens that chose one of the experts; `None` if none did.
    pub(super) fn mean(&self) -> Option<f64> {
        (self.rows > 0).then(|| self.sum / self.rows as f64)
    }

    /// Takes in one token: its experts, gates `[k]` and outputs `[k, d]`.
    fn add(&mut self, layer: usize, ids: &[u32], gates: &[f32], outputs: &[f32]) {
        let steered = |id: u32| self.experts.contains(&ExpertId { layer, expert: id as usize });
        if !ids.iter().any(|&id| id != NO_EXPERT && steered(id)) {
            return;
        }
        let d = outputs.len() / ids.len();
        let (mut with, mut without) = (vec![0f64; d], vec![0f64; d]);
        for ((&id, &gate), output) in ids.iter().zip(gates).zip(outputs.chunks_exact(d)) {
            let before = if steered(id) { gate / self.beta } else { gate };
            for ((w, o), &v) in with.iter_mut().zip(&mut without).zip(output) {
                *w += f64::from(gate * v);
                *o += f64::from(before * v);
            }
        }
        let norm = |v: &[f64]| v.iter().map(|v| v * v).sum::<f64>().sqrt();
        self.sum += norm(&with) / norm(&without).max(1e-30);
        self.rows += 1;
    }
}

impl Lens for NormRatio {
    fn sites(&self, layer: usize) -> SiteSet {
        if self.experts.iter().any(|e| e.layer == layer) { SiteSet::of(&[Site::ExpertOut]) } else { SiteSet::NONE }
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        let Some(routing) = at.routing else { return Ok(Flow::Continue) };
        let (outputs, gates, k) = (ops::values(value)?, ops::values(&routing.gates)?, routing.k);
        let width = outputs.len() / at.rows.len();
        for (row, outputs) in outputs.chunks_exact(width).enumerate() {
            let slots = row * k..(row + 1) * k;
            self.add(at.layer, &routing.ids[slots.clone()], &gates[slots], outputs);
        }
        Ok(Flow::Continue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratio_by_hand() {
        let mut ratio = NormRatio::new(&[ExpertId { layer: 1, expert: 7 }], 4.0);
        assert_eq!(ratio.mean(), None);
        // Gates 0.25 (scaled to 1) and 0.5; outputs (3, 0) and (0, 2): before (0.75, 1), after (3, 1).
        ratio.add(1, &[7, 2], &[1.0, 0.5], &[3.0, 0.0, 0.0, 2.0]);
        assert!((ratio.mean().unwrap() - 10f64.sqrt() / 1.25).abs() < 1e-9);
        ratio.add(0, &[7, 2], &[1.0, 0.5], &[3.0, 0.0, 0.0, 2.0]);
        ratio.add(1, &[3, 2], &[1.0, 0.5], &[3.0, 0.0, 0.0, 2.0]);
        assert_eq!(ratio.rows, 1, "another layer, other experts");
    }
}
