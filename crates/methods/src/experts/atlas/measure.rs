//! What the atlas measures of every expert on a set of texts.

use candle_core::Tensor;
use quorate_eval::encode::EncodedItem;
use quorate_lens::{ExpertMap, RoutingTrace, TraceRecorder};
use quorate_model::{At, Chain, Flow, Lens, ModelError, NO_EXPERT, Site, SiteSet, ops};

use crate::experts::super_experts::{GUARD, PERCENTILE, Thresholds};
use crate::routing::choices::Choices;
use crate::routing::entropy;
use crate::{Lab, MethodError};

/// Sums over the tokens that chose an expert: of its gates and of its outputs before the gate.
#[derive(Clone, Debug, PartialEq)]
struct OutputSums {
    map: ExpertMap,
    gate: Vec<f64>,
    norm: Vec<f64>,
    /// Largest absolute value of an output.
    peak: Vec<f64>,
}

impl Lens for OutputSums {
    fn sites(&self, layer: usize) -> SiteSet {
        self.map.moe_index(layer).map_or(SiteSet::NONE, |_| SiteSet::of(&[Site::ExpertOut]))
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        if let (Some(moe), Some(routing)) = (self.map.moe_index(at.layer), at.routing) {
            let (start, gates, outputs) =
                (self.map.range(moe).start, ops::values(&routing.gates)?, ops::values(value)?);
            let width = outputs.len() / routing.ids.len().max(1);
            for ((&id, &gate), output) in routing.ids.iter().zip(gates.iter()).zip(outputs.chunks_exact(width.max(1))) {
                if id == NO_EXPERT {
                    continue;
                }
                let unit = start + id as usize;
                self.gate[unit] += f64::from(gate);
                self.norm[unit] += output.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
                self.peak[unit] = output.iter().fold(self.peak[unit], |peak, x| peak.max(f64::from(x.abs())));
            }
        }
        Ok(Flow::Continue)
    }
}

/// A recorded set of texts.
pub struct Recorded {
    /// Routing of the texts.
    pub trace: RoutingTrace,
    /// Task of each text.
    pub tasks: Vec<usize>,
    sums: OutputSums,
}

impl Recorded {
    /// Runs the texts through the model.
    ///
    /// # Errors
    /// As [`Lab::observe`].
    pub fn new(lab: &mut Lab<'_>, items: &[EncodedItem], tasks: Vec<usize>) -> Result<Recorded, MethodError> {
        let map = lab.experts()?;
        let zeros = vec![0.0; map.total()];
        let mut sums = OutputSums { gate: zeros.clone(), norm: zeros.clone(), peak: zeros, map: map.clone() };
        let mut recorder = TraceRecorder::new(map, false);
        lab.observe("recording", items, &mut Chain(vec![&mut recorder, &mut sums]), |_, _| {})?;
        Ok(Recorded { trace: recorder.into_trace(), tasks, sums })
    }

    /// Adds other texts.
    pub fn merge(&mut self, other: Recorded) {
        self.trace.items.extend(other.trace.items);
        self.tasks.extend(other.tasks);
        let add = |a: &mut Vec<f64>, b: Vec<f64>, f: fn(f64, f64) -> f64| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a = f(*a, b))
        };
        add(&mut self.sums.gate, other.sums.gate, |a, b| a + b);
        add(&mut self.sums.norm, other.sums.norm, |a, b| a + b);
        add(&mut self.sums.peak, other.sums.peak, f64::max);
    }
}

/// Numbers of every expert, numbered by an [`ExpertMap`]; `None` of an expert that no token chose.
pub struct Numbers {
    /// Tokens that chose the expert.
    pub count: Vec<u64>,
    /// Share of all tokens.
    pub usage: Vec<Option<f64>>,
    /// Tokens of each task that chose it, `[task][expert]`.
    pub of_task: Vec<Vec<u64>>,
    /// Tokens of each task.
    pub task_tokens: Vec<u64>,
    /// Entropy over tasks, every task weighing the same, over `ln(tasks)`.
    pub task_entropy: Vec<Option<f64>>,
    /// Entropy over tokens, in nats.
    pub token_entropy: Vec<Option<f64>>,
    /// Mean norm of its output before the gate.
    pub norm: Vec<Option<f64>>,
    /// Mean gate.
    pub gate: Vec<Option<f64>>,
    /// Largest absolute value of its output.
    pub peak: Vec<Option<f64>>,
    /// Whether it is a super expert.
    pub is_super: Vec<bool>,
}

impl Numbers {
    /// The numbers of recorded texts of `tasks` tasks.
    pub fn of(recorded: &Recorded, choices: &Choices, tasks: usize) -> Numbers {
        let map = &recorded.sums.map;
        let (mut of_task, mut task_tokens) = (vec![vec![0; map.total()]; tasks], vec![0; tasks]);
        for (item, &task) in recorded.trace.items.iter().zip(&recorded.tasks) {
            task_tokens[task] += item.tokens.len() as u64;
            of_task[task].iter_mut().zip(item.counts(map, |_, _| true)).for_each(|(a, b)| *a += b);
        }
        let count: Vec<u64> = (0..map.total()).map(|u| of_task.iter().map(|t| t[u]).sum()).collect();
        let tokens = task_tokens.iter().sum::<u64>();
        let used = |unit: usize, value: f64| (count[unit] > 0).then_some(value);
        let mean = |sums: &[f64]| (0..map.total()).map(|u| used(u, sums[u] / count[u].max(1) as f64)).collect();
        let usage = (0..map.total()).map(|u| Some(count[u] as f64 / tokens.max(1) as f64)).collect();
        let entropy_of = |u: usize| {
            let rates: Vec<f64> =
                of_task.iter().zip(&task_tokens).map(|(n, &t)| n[u] as f64 / t.max(1) as f64).collect();
            used(u, spread(&rates))
        };
        let peak: Vec<Option<f64>> = (0..map.total()).map(|u| used(u, recorded.sums.peak[u])).collect();
        Numbers {
            usage,
            task_entropy: (0..map.total()).map(entropy_of).collect(),
            token_entropy: choices.layers.iter().flat_map(|l| l.token_entropies(&choices.tokens)).collect(),
            norm: mean(&recorded.sums.norm),
            gate: mean(&recorded.sums.gate),
            is_super: super_experts(&peak),
            peak,
            count,
            of_task,
            task_tokens,
        }
    }

    /// `P(expert | task) / P(expert)`; `None` of an expert that no token chose.
    pub fn lift(&self, unit: usize, task: usize) -> Option<f64> {
        let rate = self.of_task[task][unit] as f64 / self.task_tokens[task].max(1) as f64;
        self.usage[unit].filter(|u| *u > 0.0).map(|u| rate / u)
    }

    /// The lifts of all experts for a task.
    pub fn lifts(&self, task: usize) -> Vec<Option<f64>> {
        (0..self.count.len()).map(|u| self.lift(u, task)).collect()
    }

    /// What is compared between halves, with names.
    pub fn quantities(&self) -> [(&'static str, &[Option<f64>]); 6] {
        [
            ("use", &self.usage),
            ("task entropy", &self.task_entropy),
            ("token entropy", &self.token_entropy),
            ("output norm", &self.norm),
            ("gate", &self.gate),
            ("peak output", &self.peak),
        ]
    }
}

/// Entropy of weights over that of even ones: 0 of a single one, 1 of even weights.
pub fn spread(weights: &[f64]) -> f64 {
    let sum: f64 = weights.iter().sum();
    if sum <= 0.0 || weights.len() < 2 {
        return 0.0;
    }
    entropy(&weights.iter().map(|w| w / sum).collect::<Vec<_>>()) / (weights.len() as f64).ln()
}

/// Super experts by their outputs alone: [`Thresholds`] as `quorate super-experts` has them unless told otherwise.
fn super_experts(peaks: &[Option<f64>]) -> Vec<bool> {
    let known: Vec<f64> = peaks.iter().copied().flatten().collect();
    let least = Thresholds::of(&known, PERCENTILE, GUARD).map_or(f64::INFINITY, |t| t.least);
    peaks.iter().map(|p| p.is_some_and(|p| p > least)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_zero_of_one_task_and_one_of_all() {
        assert_eq!((spread(&[0.0, 3.0, 0.0]), spread(&[0.0; 3]), spread(&[1.0])), (0.0, 0.0, 0.0));
        assert!((spread(&[2.0; 5]) - 1.0).abs() < 1e-12 && (spread(&[1.0, 1.0, 0.0, 0.0]) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn a_super_expert_is_found_and_an_even_model_has_none() {
        let mut peaks: Vec<Option<f64>> = (0..1000).map(|i| Some(1.0 + f64::from(i) * 1e-3)).collect();
        assert!(super_experts(&peaks).iter().all(|s| !s), "the largest of many alike is not super");
        (peaks[7], peaks[8], peaks[9]) = (Some(900.0), Some(50.0), None);
        let found = super_experts(&peaks);
        assert!(found[7] && found.iter().filter(|s| **s).count() == 1, "50 is below a tenth of the largest");
    }
}
