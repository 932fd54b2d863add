//! The unified family of expert scores.
//!
//! *Formula.* `S_i(b, alpha, beta) = (1 / N_i^b) sum over tokens with i selected of g^alpha * n^beta`, `g` the gate, `n` the
//! norm of the expert's output before its gate, `N_i` the number of those tokens. Sums are divided by the number of all
//! tokens, which does not change the ranking.
//!
//! *Reference.* arXiv 2606.15716 (How to Score Experts); REAP: arXiv 2510.13999; SEER-MoE: arXiv 2404.05089.

use quorate_lens::{PhaseStats, Sum};

use super::{Metric, per_token};
use crate::{Card, Kind};

/// The card of the family.
pub const CARD: Card = Card {
    id: "unified",
    title: "How to score experts: one formula for frequency, gate sum, EAN, REAP, MAN, MSAN",
    paper: "arXiv 2606.15716",
    year: 2026,
    kind: Kind::Score,
    needs: "a MoE model; texts of each task",
    cost: "one forward pass over the texts",
    metrics: &["frequency", "gate-sum", "ean", "reap", "man", "msan", "gated-norm", "gated-energy"],
    run: "quorate eval --tasks tasks --metric reap --keep 16",
    about: "Scores from the number of selections, the gates and the norms of the experts' outputs. Gated norm (0,1,1) and \
            gated energy (0,2,2) are the paper's choice for pruning to a task, MAN and MSAN for pruning without one.",
};

macro_rules! metric {
    ($ident:ident, $name:literal, $about:literal, $score:expr) => {
        #[doc = $about]
        pub const $ident: Metric = Metric { name: $name, about: $about, gauge_dependent: false, score: $score };
    };
}

metric!(FREQUENCY, "frequency", "(0,0,0): how often the expert is selected", |s, _| {
    per_token(&s.count.iter().map(|&n| n as f64).collect::<Vec<_>>(), s)
});
metric!(GATE_SUM, "gate-sum", "(0,1,0): sum of gates", |s, _| per_token(s.sum(Sum::Gate), s));
metric!(EAN, "ean", "(0,0,1): sum of output norms", |s, _| per_token(s.sum(Sum::Norm), s));
metric!(REAP, "reap", "(1,1,1): mean gated output norm over the expert's tokens", |s, _| per_use(s, Sum::GateNorm));
metric!(MAN, "man", "(1,0,1): mean output norm over the expert's tokens", |s, _| per_use(s, Sum::Norm));
metric!(MSAN, "msan", "(1,0,2): mean squared output norm over the expert's tokens", |s, _| per_use(s, Sum::NormSq));
metric!(GATED_NORM, "gated-norm", "(0,1,1): sum of gated output norms", |s, _| per_token(s.sum(Sum::GateNorm), s));
metric!(GATED_ENERGY, "gated-energy", "(0,2,2): sum of squared gated output norms", |s, _| {
    per_token(s.sum(Sum::GateNormSq), s)
});

/// `sum / N_i`, 0 for an expert that is never selected.
fn per_use(stats: &PhaseStats, sum: Sum) -> Vec<f64> {
    let uses = stats.count.iter();
    stats.sum(sum).iter().zip(uses).map(|(v, &n)| if n == 0 { 0.0 } else { v / n as f64 }).collect()
}
