//! EASY-EP: gated output norms, each token weighted by how much the routed experts turn it.
//!
//! *Formula.* `score_i = sum over tokens of g_i n_i max(0, 1 - cos(h, h + r))`, `h` the residual before the MoE block, `r` the
//! sum of the routed experts (shared ones excluded).
//!
//! *Reference.* arXiv 2504.06792.

use quorate_lens::Sum;

use super::{Metric, per_token};
use crate::{Card, Kind};

/// The card of EASY-EP.
pub const CARD: Card = Card {
    id: "easy-ep",
    title: "EASY-EP: output-aware expert importance with token contribution",
    paper: "arXiv 2504.06792",
    year: 2025,
    kind: Kind::Score,
    needs: "a MoE model; a few demonstrations of each task",
    cost: "one forward pass over the texts",
    metrics: &["easy-ep"],
    run: "quorate eval --tasks tasks --metric easy-ep --keep 16",
    about: "Sum of gated output norms, each token weighted by 1 - cosine between the residual before and after the MoE block.",
};

/// EASY-EP.
pub const EASY_EP: Metric = Metric {
    name: "easy-ep",
    about: "sum of gated output norms, weighted by how much the experts turn the token",
    gauge_dependent: false,
    score: |stats, _| per_token(stats.sum(Sum::Easy), stats),
};
