//! Controls that every metric must beat: random experts, and the worst ones.

use quorate_lens::{ExpertMap, PhaseStats};

use super::{Metric, premoe};
use crate::{Card, Kind};

/// The card of the controls.
pub const CARD: Card = Card {
    id: "controls",
    title: "Controls: random experts and the worst experts",
    paper: "none",
    year: 2026,
    kind: Kind::Control,
    needs: "nothing",
    cost: "none",
    metrics: &["random", "bottom"],
    run: "quorate eval --tasks tasks --metric random --keep 16",
    about: "Random scores (drawn from a hash of layer, expert and token count, so each task draws others), and PEU upside down.",
};

/// Random scores, the same in every run.
pub const RANDOM: Metric = Metric {
    name: "random",
    about: "random experts: the control that every metric must beat",
    gauge_dependent: false,
    score: |stats, map| random(stats.tokens, map),
};

/// PEU upside down.
pub const BOTTOM: Metric =
    Metric { name: "bottom", about: "the worst experts by PEU", gauge_dependent: true, score: bottom };

fn bottom(stats: &PhaseStats, map: &ExpertMap) -> Vec<f64> {
    (premoe::PEU.score)(stats, map).iter().map(|s| -s).collect()
}

/// Uniform numbers in [0, 1), a function of seed and expert.
pub fn random(seed: u64, map: &ExpertMap) -> Vec<f64> {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let draw = |unit: usize| {
        let z = mix(seed.wrapping_add((unit as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        (z >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..map.total()).map(draw).collect()
}
