//! AIMER: experts ranked by their weights alone.
//!
//! *What it measures.* `a_i = mean |w| / sqrt(mean w^2)` over all weights of expert `i`: between 0 and 1, larger the more
//! alike its weights are in size (`sqrt(2 / pi)` for a Gaussian). Experts with the largest `a` are removed: the score is `-a`.
//! *Agreement with the paper.* Equal numbers in every layer; all three matrices weigh by their number of weights.
//! *Limits.* The same experts for every task: what it can reach is what a generalist can.
//! *Reference.* arXiv 2603.18492.

use clap::Args;
use quorate_lens::{ExpertMap, Keep, MetricInfo, Plan, Scope, ScoreTable};
use quorate_model::Model;
use quorate_residency::Expert;
use serde::Serialize;

use super::{Bench, Compressed, Setup, measure, prune};
use crate::experts::controls::random;
use crate::{Card, Kind, Lab, MethodError, Report, Run};

/// The card of AIMER.
pub const CARD: Card = Card {
    id: "aimer",
    title: "AIMER: absolute mean over root mean square of an expert's weights",
    paper: "arXiv 2603.18492",
    year: 2026,
    kind: Kind::Score,
    needs: "a MoE model; no texts, but for the measurement",
    cost: "one look at every weight of the experts",
    metrics: &[],
    run: "quorate aimer --keep 24\nquorate aimer --keep 16 --items 0 -o out/",
    about: "Scores every expert from its weights alone, keeps those with the smallest ratio of mean size to root mean square, \
            and compares answers to all tasks with the other end of the ranking and with random experts.",
};

/// Parameters of AIMER.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Aimer {
    /// Experts kept in every layer; left out, half of them
    #[arg(long, value_name = "K")]
    pub keep: Option<usize>,
    /// Test items of each task on which answers are measured (0: none)
    #[arg(long, default_value_t = 10, value_name = "N")]
    pub items: usize,
}

/// `mean |w| / sqrt(mean w^2)` of an expert; 0 if all weights are 0.
pub fn ratio(expert: &Expert) -> f64 {
    let (mut size, mut square, mut count) = (0.0, 0.0, 0usize);
    for matrix in [&expert.gate, &expert.up, &expert.down] {
        let weights = matrix.to_f32();
        count += weights.len();
        for w in weights.into_iter().map(f64::from) {
            size += w.abs();
            square += w * w;
        }
    }
    let n = count.max(1) as f64;
    if square > 0.0 { size / n / (square / n).sqrt() } else { 0.0 }
}

/// AIMER's scores of all experts in memory.
///
/// # Errors
/// Experts that are not in memory.
pub fn scores(model: &Model) -> Result<ScoreTable, MethodError> {
    let map = ExpertMap::of(model.spec());
    let mut values = Vec::with_capacity(map.total());
    for unit in 0..map.total() {
        let id = map.id(unit);
        values.push(-ratio(model.expert_weights(id.layer, id.expert)?));
    }
    Ok(table("aimer", map, values))
}

fn table(name: &str, map: ExpertMap, values: Vec<f64>) -> ScoreTable {
    let metric = MetricInfo { name: name.into(), gauge_dependent: false };
    ScoreTable { counts: vec![0; map.total()], map, metric, values }
}

/// Keeps the best by AIMER's score.
///
/// # Errors
/// Experts that are not in memory, or a number that cannot be kept.
pub fn compress(bench: &mut Bench<'_>, keep: usize) -> Result<Compressed, MethodError> {
    prune(bench.model.spec(), &scores(bench.model)?, Keep::PerLayer(keep), Scope::Local, bench.mode)
}

impl Run for Aimer {
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        let map = lab.experts()?;
        let half = map.experts.iter().min().map_or(1, |e| e / 2).max(Setup::top_k(lab));
        let keep = self.keep.unwrap_or(half);
        Keep::per_layer(lab.model.spec(), Scope::Local, keep)?;
        let own = scores(&lab.model)?;
        let reversed = table("aimer-reversed", map.clone(), own.values.iter().map(|v| -v).collect());
        let control = table("random", map.clone(), random(lab.seed, &map));
        // Without texts there is no reason to lose the mass of the removed experts: what a pruned checkpoint computes.
        let mode = quorate_model::RoutingMode::Mask;
        let pruned = |t: &ScoreTable| prune(lab.model.spec(), t, Keep::PerLayer(keep), Scope::Local, mode);
        let ways = [Compressed::nothing(&map), pruned(&own)?, pruned(&reversed)?, pruned(&control)?];

        let mut report = Report::default();
        report.headline("kept_per_layer", keep);
        if self.items > 0 {
            let tasks = lab.tasks("test")?;
            let questions = |i: &&quorate_eval::tasks::TaskItem| !quorate_eval::encode::is_language_modelling(i);
            let items: Vec<_> =
                tasks.iter().flat_map(|t| t.items.iter().filter(questions).take(self.items)).cloned().collect();
            let names = ["all", "aimer", "other end", "random"];
            let ways: Vec<(&str, &Compressed)> = names.into_iter().zip(&ways).collect();
            measure(lab, &mut report, &items, &ways)?;
        }
        let about = "minus mean |w| over root mean square of the expert's weights";
        report.map("score", about, &map, &own.values, false);
        let kept: Vec<Vec<usize>> = ways[1].kept.iter().map(|k| k.clone().unwrap_or_default()).collect();
        let mut plan = Plan::keeping(lab.model.checkpoint().fingerprint(), &map, &kept, mode);
        plan.metric = Some(CARD.id.to_string());
        report.file("plan.toml", "the kept experts, as a plan", plan.to_toml()?);
        Ok(report)
    }
}
