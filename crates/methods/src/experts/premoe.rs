//! PreMoe: experts that a task needs, from the router logits alone.
//!
//! *Measures.* How confidently the router wants each expert, over a task's tokens.
//!
//! *Formula.* Per token and MoE layer, `C` = the `top_k` experts of largest logit `s`, `p_i = exp(s_i) / sum_C exp(s_j)`.
//! Threshold `r = mean over tokens of max_C p` of the layer. `u_i = f(s_i)` if `i in C` and `p_i >= r`, else 0;
//! the score is the mean of `u_i` over all tokens. PEU: `f(s) = max(s, sigmoid(s))`. TCESS: `f(s) = s`, no threshold; the
//! public code has a pool of one expert.
//!
//! *Agreement with the paper.* `r` is rounded to a multiple of 1/64 and `p` compared in the same bins, so that one
//! streaming pass suffices and profiles merge exactly. The variant `peu-gauge-free` has `f = p` and does not change when a
//! constant is added to all logits of a token, as raw logits of a softmax router may.
//!
//! *Limits.* Blind to what experts compute; see `gated-norm` and `easy-ep`.
//!
//! *Reference.* arXiv 2505.17639 v1 (TCESS, TAER) and v3 (PEU).

use quorate_lens::{BinSum, CONFIDENCE_BINS, ExpertMap, PhaseStats, RouterStats, Sum};

use super::{Metric, Phases, per_token};
use crate::{Card, Kind};

/// The card of PreMoe.
pub const CARD: Card = Card {
    id: "premoe",
    title: "PreMoE: proactive inference, expert pruning and retrieval",
    paper: "arXiv 2505.17639",
    year: 2025,
    kind: Kind::System,
    needs: "a MoE model; texts of each task (prompt and answer)",
    cost: "one forward pass over the texts",
    metrics: &["peu", "peu-identity", "peu-sigmoid", "peu-gauge-free", "peu-per-domain", "tcess", "tcess-code"],
    run: "quorate profile --tasks tasks && quorate run \"78+95=\" --metric peu --keep 16",
    about: "Scores every routed expert of every layer for a task from the router logits alone, keeps the best, stores the \
            scores as the task's pattern, and finds the pattern nearest to a prompt with the first router.",
};

/// PEU with the adaptive threshold and `max(s, sigmoid(s))`.
pub const PEU: Metric = Metric {
    name: "peu",
    about: "PreMoE v3: mean of max(s, sigmoid s) where the expert's confidence passes the layer's mean top confidence",
    gauge_dependent: true,
    score: |stats, map| peu(stats, map, BinSum::Max, None),
};

/// PEU with `f(s) = s`.
pub const PEU_IDENTITY: Metric = Metric {
    name: "peu-identity",
    about: "PEU with the raw logit in place of max(s, sigmoid s)",
    gauge_dependent: true,
    score: |stats, map| peu(stats, map, BinSum::Logit, None),
};

/// PEU with `f(s) = sigmoid(s)`.
pub const PEU_SIGMOID: Metric = Metric {
    name: "peu-sigmoid",
    about: "PEU with sigmoid s in place of max(s, sigmoid s)",
    gauge_dependent: true,
    score: |stats, map| peu(stats, map, BinSum::Sigmoid, None),
};

/// PEU with `f = p`.
pub const PEU_GAUGE_FREE: Metric = Metric {
    name: "peu-gauge-free",
    about: "PEU with the confidence p itself: unchanged by a constant added to all logits",
    gauge_dependent: false,
    score: |stats, map| peu(stats, map, BinSum::Confidence, None),
};

/// PEU of a generalist with each domain's own threshold.
pub const PEU_PER_DOMAIN: Metric = Metric {
    name: "peu-per-domain",
    about: "PEU of a generalist, each task with its own threshold; the same as peu for one task",
    gauge_dependent: true,
    score: PEU.score,
};

/// TCESS as in the paper's first version.
pub const TCESS: Metric = Metric {
    name: "tcess",
    about: "PreMoe v1: mean raw logit of the selected experts, 0 elsewhere",
    gauge_dependent: true,
    score: |stats, map| peu(stats, map, BinSum::Logit, Some(0.0)),
};

/// TCESS as the public code computes it.
pub const TCESS_CODE: Metric = Metric {
    name: "tcess-code",
    about: "PreMoe's public code: mean raw logit of the first-ranked expert, 0 elsewhere",
    gauge_dependent: true,
    score: |stats, _| per_token(stats.sum(Sum::TopLogit), stats),
};

/// The PEU family. `threshold`: `None` is adaptive.
pub fn peu(stats: &PhaseStats, map: &ExpertMap, transform: BinSum, threshold: Option<f64>) -> Vec<f64> {
    let tokens = stats.tokens.max(1) as f64;
    let mut scores = vec![0.0; map.total()];
    for moe in 0..map.n_layers() {
        let r = threshold.unwrap_or(stats.max_confidence[moe] / tokens);
        let first = (r * CONFIDENCE_BINS as f64).round() as usize;
        for unit in map.range(moe) {
            scores[unit] = stats.bins_from(transform, unit, first) / tokens;
        }
    }
    scores
}

/// A generalist's PEU over several domains, each with its own threshold: the token-weighted mean of the domains' scores.
/// (PEU itself scores a generalist's pooled tokens with one pooled threshold.)
pub fn peu_per_domain(domains: &[&RouterStats], phases: Phases) -> Vec<f64> {
    let tokens = |d: &RouterStats| (d.prompt.tokens + d.answer.tokens) as f64;
    let all: f64 = domains.iter().map(|d| tokens(d)).sum();
    let mut scores = vec![0.0; domains.first().map_or(0, |d| d.map.total())];
    for domain in domains {
        let own = PEU.values(domain, phases);
        scores.iter_mut().zip(own).for_each(|(s, o)| *s += o * tokens(domain) / all.max(1.0));
    }
    scores
}
