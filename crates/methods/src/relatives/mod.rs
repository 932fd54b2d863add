//! The closest relatives of PreMoe: other ways of making a mixture of experts smaller, on the same texts, so that they can
//! be compared. A relative says which experts stay and what stands in for the others ([`Compressed`]); the rest, answering,
//! plans, tables, is shared.

pub mod aimer;
mod calibration;
mod comparison;
pub mod esft;
mod fit;
pub mod merge_experts;
mod merging;
pub mod mone;
pub mod naee;
mod setup;

pub use calibration::{Calibration, LayerSample};
pub use comparison::RelativesComparison;
pub use fit::{Found, LayerFit, best_subset};
pub use merging::{Aligner, aligned, average_linkage, groups_around, merged, pseudo_groups};
pub use setup::{Setup, measure};

use quorate_eval::evaluate::ItemScore;
use quorate_eval::tasks::TaskItem;
use quorate_formats::spec::ModelSpec;
use quorate_lens::{ExpertId, ExpertMap, Intervention, Keep, Scope, ScoreTable, Selection};
use quorate_model::{KeptExperts, Model, RoutingMode};
use quorate_residency::Expert;

use crate::{Lab, MethodError};

/// What is made of a model: which experts stay, and what stands in for the others.
#[derive(Clone, Debug, Default)]
pub struct Compressed {
    /// Experts that a token may choose, per MoE layer; `None` all.
    pub kept: Vec<KeptExperts>,
    /// What happens to tokens whose expert is not kept.
    pub mode: RoutingMode,
    /// Changes while the model runs.
    pub intervene: Vec<Intervention>,
    /// Experts put in the place of others.
    pub replaced: Vec<(ExpertId, Expert)>,
}

impl Compressed {
    /// All experts, as they are.
    pub fn nothing(map: &ExpertMap) -> Compressed {
        Compressed { kept: vec![None; map.n_layers()], ..Compressed::default() }
    }

    /// Some experts and no substitutes.
    pub fn keeping(kept: Vec<Vec<usize>>, mode: RoutingMode) -> Compressed {
        Compressed { kept: kept.into_iter().map(Some).collect(), mode, ..Compressed::default() }
    }

    /// Answers and scores items with the compressed model; the lab's model is as before afterwards.
    ///
    /// # Errors
    /// As [`Lab::answer`], or what is kept or replaced does not fit the model.
    pub fn answer(
        &self,
        lab: &mut Lab<'_>,
        stage: &str,
        items: &[&TaskItem],
        max_tokens: usize,
    ) -> Result<Vec<ItemScore>, MethodError> {
        let mut lens = lab.prepare(&self.intervene)?;
        lab.model.mask_experts(&self.kept, self.mode)?;
        let old = swap(&mut lab.model, &self.replaced)?;
        let scores = lab.answer(stage, items, max_tokens, &mut lens);
        swap(&mut lab.model, &old)?;
        lab.model.mask_experts(&vec![None; self.kept.len()], RoutingMode::Mask)?;
        scores
    }
}

/// Puts experts in their places and returns those that were there.
fn swap(model: &mut Model, experts: &[(ExpertId, Expert)]) -> Result<Vec<(ExpertId, Expert)>, MethodError> {
    let mut old = Vec::with_capacity(experts.len());
    for (id, expert) in experts {
        old.push((*id, model.replace_expert(id.layer, id.expert, expert.clone())?));
    }
    Ok(old)
}

/// The best experts of a score table.
///
/// # Errors
/// A number that cannot be kept.
pub fn prune(
    spec: &ModelSpec,
    table: &ScoreTable,
    keep: Keep,
    scope: Scope,
    mode: RoutingMode,
) -> Result<Compressed, MethodError> {
    let floor = table.map.layers.iter().map(|&l| spec.moe(l).map_or(0, |m| m.top_k)).collect();
    let selection = Selection { scope, floor, ..Selection::default() };
    Ok(Compressed::keeping(selection.select(table, keep)?, mode))
}

/// What a relative works with.
pub struct Bench<'a> {
    /// The model, all experts loaded.
    pub model: &'a Model,
    /// What was recorded on the calibration texts.
    pub calibration: &'a Calibration,
    /// Permutations of neurons found so far.
    pub aligner: &'a mut Aligner,
    /// Routing mode of those that remove experts.
    pub mode: RoutingMode,
}

/// One way of making a model smaller, as a row of a comparison.
#[derive(Clone, Copy)]
pub struct Relative {
    /// Its name.
    pub name: &'static str,
    /// One line of what it is.
    pub about: &'static str,
    /// Whether layers keep equal numbers.
    pub scope: Scope,
    /// Makes a model with so many experts per layer.
    pub compress: fn(&mut Bench<'_>, usize) -> Result<Compressed, MethodError>,
}

/// The relatives, PEU and REAP first and random last; all calibrated on the same texts.
pub const RELATIVES: &[Relative] = &[
    Relative { name: "peu", about: "PreMoe's score", scope: Scope::Local, compress: |b, k| by_metric(b, "peu", k) },
    Relative { name: "reap", about: "mean gated norm", scope: Scope::Local, compress: |b, k| by_metric(b, "reap", k) },
    Relative {
        name: "naee",
        about: "least error of the layer's output, greedy removal and swaps",
        scope: Scope::Local,
        compress: naee::compress,
    },
    Relative {
        name: "mone",
        about: "mean outputs in the place of the removed",
        scope: Scope::Local,
        compress: |b, k| mone::compress(b, mone::ACCESS, k),
    },
    Relative {
        name: "m-smoe",
        about: "merged around the most used",
        scope: Scope::Local,
        compress: |b, k| merge_experts::compress(b, merge_experts::By::MSmoe, k),
    },
    Relative {
        name: "hc-smoe",
        about: "merged by clusters of mean outputs",
        scope: Scope::Local,
        compress: |b, k| merge_experts::compress(b, merge_experts::By::HcSmoe, k),
    },
    Relative {
        name: "ream",
        about: "merged around the best by REAP",
        scope: Scope::Local,
        compress: |b, k| merge_experts::compress(b, merge_experts::By::Ream, k),
    },
    Relative {
        name: "esft-gate",
        about: "equal shares of the gate sum in every layer",
        scope: Scope::EqualShare,
        compress: |b, k| by_share(b, "gate-sum", k),
    },
    Relative {
        name: "esft-token",
        about: "equal shares of the selections in every layer",
        scope: Scope::EqualShare,
        compress: |b, k| by_share(b, "frequency", k),
    },
    Relative { name: "aimer", about: "weights only", scope: Scope::Local, compress: aimer::compress },
    Relative { name: "random", about: "the control", scope: Scope::Local, compress: |b, k| by_metric(b, "random", k) },
];

/// Equally many experts of each layer by a metric.
fn by_metric(bench: &Bench<'_>, metric: &str, keep: usize) -> Result<Compressed, MethodError> {
    let table = bench.calibration.table(metric)?;
    prune(bench.model.spec(), &table, Keep::PerLayer(keep), Scope::Local, bench.mode)
}

/// `keep` experts per layer on average, equal shares of a metric in all layers.
fn by_share(bench: &Bench<'_>, metric: &str, keep: usize) -> Result<Compressed, MethodError> {
    let table = bench.calibration.table(metric)?;
    prune(bench.model.spec(), &table, Keep::PerLayer(keep), Scope::EqualShare, bench.mode)
}
