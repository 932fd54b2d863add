//! Analyses of routing and of the experts behind it: nothing is changed, everything is counted. What the papers share is
//! here.

pub mod choices;
pub mod closer_look;
pub mod contribution;
pub mod flame;
pub mod pathway;
pub mod pathways;
pub mod similarity;
pub mod spread;

use candle_core::Tensor;
use clap::ValueEnum;
use quorate_eval::encode::EncodedItem;
use quorate_formats::spec::{ModelSpec, RouterScore};
use quorate_lens::{ExpertMap, RoutingTrace, TraceRecorder};
use quorate_model::{At, Chain, Flow, Lens, ModelError, Phase, Site, SiteSet, ops};
use serde::Serialize;

use crate::{Lab, MethodError};

/// Which tokens of a text count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Rows {
    /// Prompt and answer
    All,
    /// The prompt
    Prompt,
    /// The last token of the prompt, which predicts the answer
    Last,
    /// The answer
    Answer,
}

impl Rows {
    /// Whether a token of this phase counts.
    pub fn contains(self, phase: Phase) -> bool {
        match self {
            Rows::All => true,
            Rows::Prompt => phase.is_prompt(),
            Rows::Last => phase == Phase::PromptLast,
            Rows::Answer => !phase.is_prompt(),
        }
    }
}

/// The router's distribution over all experts: the softmax of the logits or, for routers that take the sigmoid of each
/// logit, the sigmoids divided by their sum (a softmax of the sigmoids would be almost flat whatever the router says).
pub fn distribution(score: RouterScore, logits: &[f32]) -> Vec<f64> {
    let mut p: Vec<f64> = logits.iter().map(|&z| f64::from(z)).collect();
    match score {
        RouterScore::SoftmaxAll | RouterScore::TopkThenSoftmax | RouterScore::SparseMixer => {
            let max = p.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            p.iter_mut().for_each(|z| *z = (*z - max).exp());
        }
        RouterScore::Sigmoid => p.iter_mut().for_each(|z| *z = 1.0 / (1.0 + (-*z).exp())),
    }
    let sum: f64 = p.iter().sum();
    p.iter_mut().for_each(|v| *v /= sum);
    p
}

/// `-sum p ln p`, in nats.
pub fn entropy(p: &[f64]) -> f64 {
    -p.iter().filter(|&&p| p > 0.0).map(|p| p * p.ln()).sum::<f64>()
}

/// Share of the experts that were used at all.
pub fn used_share(counts: &[u64]) -> f64 {
    counts.iter().filter(|&&c| c > 0).count() as f64 / counts.len().max(1) as f64
}

/// Use of the busiest expert over the mean use: 1 is even.
pub fn load(counts: &[u64]) -> f64 {
    let (most, sum) = (counts.iter().max().copied().unwrap_or(0), counts.iter().sum::<u64>());
    most as f64 * counts.len() as f64 / sum.max(1) as f64
}

/// Mean entropy of the router's distribution in each MoE layer.
#[derive(Debug)]
struct EntropyRecorder {
    map: ExpertMap,
    scores: Vec<RouterScore>,
    rows: Rows,
    sums: Vec<f64>,
    tokens: Vec<u64>,
}

impl EntropyRecorder {
    fn new(spec: &ModelSpec, rows: Rows) -> EntropyRecorder {
        let map = ExpertMap::of(spec);
        let scores: Vec<RouterScore> = map.layers.iter().filter_map(|&l| Some(spec.moe(l)?.router.score)).collect();
        EntropyRecorder { scores, rows, sums: vec![0.0; map.n_layers()], tokens: vec![0; map.n_layers()], map }
    }

    /// Nats per MoE layer.
    fn means(&self) -> Vec<f64> {
        self.sums.iter().zip(&self.tokens).map(|(s, &n)| s / n.max(1) as f64).collect()
    }
}

impl Lens for EntropyRecorder {
    fn sites(&self, layer: usize) -> SiteSet {
        self.map.moe_index(layer).map_or(SiteSet::NONE, |_| SiteSet::of(&[Site::RouterLogits]))
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        if let Some(moe) = self.map.moe_index(at.layer) {
            let logits = ops::values(value)?;
            for (row, &phase) in logits.chunks_exact(self.map.experts[moe]).zip(&at.rows.phase) {
                if self.rows.contains(phase) {
                    self.sums[moe] += entropy(&distribution(self.scores[moe], row));
                    self.tokens[moe] += 1;
                }
            }
        }
        Ok(Flow::Continue)
    }
}

/// The routing of texts, and the mean entropy of the router's distribution in each MoE layer over the tokens that `rows`
/// picks, in nats.
///
/// # Errors
/// A dense model, or as [`Lab::observe`].
pub fn record(lab: &mut Lab<'_>, items: &[EncodedItem], rows: Rows) -> Result<(RoutingTrace, Vec<f64>), MethodError> {
    let mut recorder = TraceRecorder::new(lab.experts()?, false);
    let mut entropies = EntropyRecorder::new(lab.model.spec(), rows);
    let mut both = Chain(vec![&mut recorder, &mut entropies]);
    lab.observe("recording the routing", items, &mut both, |_, _| {})?;
    Ok((recorder.into_trace(), entropies.means()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-6, "{a} {b}");
    }

    #[test]
    fn uniform_logits_have_the_entropy_of_all_experts() {
        for score in [RouterScore::SoftmaxAll, RouterScore::TopkThenSoftmax, RouterScore::Sigmoid] {
            near(entropy(&distribution(score, &[0.7; 8])), 8f64.ln());
        }
        near(entropy(&[1.0, 0.0]), 0.0);
        near(entropy(&distribution(RouterScore::SoftmaxAll, &[1e3, f32::NEG_INFINITY, 0.0])), 0.0);
    }

    /// Scores 0.9, 0.09, 0.009, 0.001 of a sigmoid router: decided, and so its entropy says. Softmax on top of the sigmoid
    /// would call it undecided (1.30 of ln 4 = 1.39).
    #[test]
    fn a_sigmoid_router_is_not_given_a_softmax() {
        let q = [0.9, 0.09, 0.009, 0.001f64];
        let logits: Vec<f32> = q.iter().map(|q| (q / (1.0 - q)).ln() as f32).collect();
        let p = distribution(RouterScore::Sigmoid, &logits);
        p.iter().zip(q).for_each(|(p, q)| near(*p, q));
        let by_hand: f64 = q.iter().map(|q| -q * q.ln()).sum();
        near(entropy(&p), by_hand);
        let sigmoids: Vec<f32> = q.iter().map(|&q| q as f32).collect();
        assert!(entropy(&distribution(RouterScore::SoftmaxAll, &sigmoids)) > 3.0 * by_hand);
    }

    #[test]
    fn use_by_hand() {
        near(used_share(&[0, 3, 1, 0]), 0.5);
        near(load(&[0, 3, 1, 0]), 3.0);
        near(load(&[5, 5, 5]), 1.0);
    }

    #[test]
    fn rows_follow_the_phase() {
        let phases = [Phase::Prompt, Phase::PromptLast, Phase::Answer, Phase::Decode];
        let of = |rows: Rows| phases.map(|p| rows.contains(p));
        assert_eq!(of(Rows::All), [true; 4]);
        assert_eq!(of(Rows::Prompt), [true, true, false, false]);
        assert_eq!(of(Rows::Last), [false, true, false, false]);
        assert_eq!(of(Rows::Answer), [false, false, true, true]);
    }
}
