//! Merging experts: M-SMoE, HC-SMoE and REAM.
//!
//! *What it changes.* The experts of a layer are put into groups, the neurons of each brought into the order of the
//! group's leader (Hungarian method), and the weighted mean of the weights takes the place of every member. The router
//! stays: a token that chooses two members uses the merged expert twice, which is what one router row with their summed
//! gates would do.
//! *Groups.* `m-smoe`: leaders are the most used experts, the others join the leader whose router logits are most similar
//! (cosine over tokens); weights are use. `hc-smoe`: average linkage on the mean outputs over all tokens (Euclidean);
//! weights are use. `ream`: leaders are the best by REAP, each in turn takes the nearest free experts up to a group size,
//! nearness being the mean of the similarities of gated mean outputs and of router logits; weights are REAP.
//! *Agreement with the papers.* M-SMoE and HC-SMoE share places between layers by use, here layers keep equal numbers.
//! HC-SMoE merges without alignment (`--no-align`). REAM aligns by weights and activations and merges layer after layer on
//! the merged model's inputs; here by weights, on the original inputs. Its public code and HC-SMoE's drop the members'
//! router rows; here they stay, so that routing is unchanged.
//! *Limits.* Raw logits' cosine depends on the gauge of a softmax router. The written folder is not smaller: no format
//! gives several router rows one expert.
//! *Reference.* arXiv 2310.01334 (M-SMoE), 2410.08589 (HC-SMoE), 2604.04356 (REAM).

use clap::{Args, ValueEnum};
use quorate_lens::{ExpertId, ScoreTable};
use quorate_residency::Expert;
use serde::Serialize;
use serde_json::json;

use super::{
    Aligner, Bench, Compressed, LayerFit, LayerSample, Setup, average_linkage, groups_around, merged, prune,
    pseudo_groups,
};
use crate::{Card, Kind, Lab, MethodError, Report, Run};

/// The card of merging.
pub const CARD: Card = Card {
    id: "merge-experts",
    title: "Merging experts: M-SMoE, HC-SMoE, REAM",
    paper: "arXiv 2310.01334, 2410.08589, 2604.04356",
    year: 2023,
    kind: Kind::Edit,
    needs: "a MoE model; texts of the task",
    cost: "one forward pass over the texts, all experts on some tokens, one assignment of neurons for each merged expert",
    metrics: &[],
    run: "quorate merge-experts --keep 16\nquorate merge-experts --by ream --task bios --keep 24 -o merged/",
    about: "Groups the experts of each layer, aligns their neurons, and puts the weighted mean of a group's weights in the \
            place of each member. With -o, DIR/model is a folder for transformers.",
};

/// REAM's largest group.
pub const GROUP_SIZE: usize = 16;

/// Parameters of merging.
#[derive(Args, Clone, Debug, Serialize)]
pub struct MergeExperts {
    /// How groups are made
    #[arg(long, value_enum, default_value_t = By::HcSmoe)]
    pub by: By,
    /// Largest group of REAM
    #[arg(long, default_value_t = GROUP_SIZE, value_name = "N")]
    pub group_size: usize,
    /// Merge neurons in the order in which they are
    #[arg(long)]
    pub no_align: bool,
    /// Calibration and measurement; --keep is the number of groups
    #[command(flatten)]
    #[serde(flatten)]
    pub setup: Setup,
}

/// How groups are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum By {
    /// Around the most used, by the similarity of router logits
    #[value(name = "m-smoe")]
    MSmoe,
    /// Clusters of mean outputs
    HcSmoe,
    /// Around the best by REAP, by outputs and router logits
    Ream,
}

/// A group: its leader first.
type Groups = Vec<Vec<usize>>;

/// How experts are merged.
#[derive(Clone, Copy, Debug)]
struct How {
    by: By,
    group_size: usize,
    align: bool,
}

/// Merges the experts of every layer into `keep` groups.
///
/// # Errors
/// Experts that are not in memory, or REAM's groups too small.
pub fn compress(bench: &mut Bench<'_>, by: By, keep: usize) -> Result<Compressed, MethodError> {
    Ok(merge(bench, How { by, group_size: GROUP_SIZE, align: true }, keep)?.0)
}

fn merge(bench: &mut Bench<'_>, how: How, keep: usize) -> Result<(Compressed, Vec<Groups>), MethodError> {
    let calibration = bench.calibration;
    let weights = calibration.table(if how.by == By::Ream { "reap" } else { "frequency" })?;
    let mut compressed = Compressed::nothing(calibration.map());
    let mut all = Vec::new();
    for (moe, (fit, sample)) in calibration.fits(bench.model)?.iter().zip(&calibration.sample).enumerate() {
        let groups = groups(fit, sample, &weights, moe, how, keep)?;
        let values = &weights.values[weights.map.range(moe)];
        for group in groups.iter().filter(|g| g.len() > 1) {
            let expert = merge_group(bench.model, bench.aligner, fit.layer, group, values, how.align)?;
            let member = |&expert: &usize| ExpertId { layer: fit.layer, expert };
            compressed.replaced.extend(group.iter().map(member).map(|id| (id, expert.clone())));
        }
        all.push(groups);
    }
    Ok((compressed, all))
}

fn groups(
    fit: &LayerFit,
    sample: &LayerSample,
    weights: &ScoreTable,
    moe: usize,
    how: How,
    keep: usize,
) -> Result<Groups, MethodError> {
    let (e, ranking) = (fit.experts, weights.ranking(moe));
    let leaders = &ranking[..keep.min(e)];
    let logits: Vec<Vec<f64>> =
        (0..e).map(|i| sample.logits.iter().skip(i).step_by(e).map(|&v| f64::from(v)).collect()).collect();
    let of_logits = |i: usize, j: usize| cosine(&logits[i], &logits[j]);
    match how.by {
        By::MSmoe => Ok(groups_around(leaders, e, of_logits)),
        By::Ream => {
            let both = |i: usize, j: usize| cosine(&fit.gated_mean[i], &fit.gated_mean[j]) + of_logits(i, j);
            pseudo_groups(leaders, e, how.group_size, both)
        }
        By::HcSmoe => {
            let mut groups = average_linkage(e, keep, |i, j| distance(&fit.mean[i], &fit.mean[j]));
            let rank = |expert: &usize| ranking.iter().position(|r| r == expert);
            groups.iter_mut().for_each(|group| group.sort_by_key(rank));
            Ok(groups)
        }
    }
}

fn merge_group(
    model: &quorate_model::Model,
    aligner: &mut Aligner,
    layer: usize,
    group: &[usize],
    weights: &[f64],
    align: bool,
) -> Result<Expert, MethodError> {
    let leader = ExpertId { layer, expert: group[0] };
    let mut parts = Vec::with_capacity(group.len());
    for &expert in group {
        let weight = model.expert_weights(layer, expert)?;
        let order = if align && expert != leader.expert {
            aligner.get(model, leader, expert)?.to_vec()
        } else {
            (0..weight.gate.rows).collect()
        };
        parts.push((weight, order, weights[expert].max(0.0)));
    }
    merged(&parts)
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE)
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
}

impl Run for MergeExperts {
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        let keep = self.setup.keep(lab, Setup::top_k(lab))?;
        let calibration = self.setup.calibration(lab)?;
        let map = calibration.map().clone();
        let how = How { by: self.by, group_size: self.group_size, align: !self.no_align };
        let mut aligner = Aligner::default();
        let mode = self.setup.mode;
        let mut bench = Bench { model: &lab.model, calibration: &calibration, aligner: &mut aligner, mode };
        let (merged, groups) = merge(&mut bench, how, keep)?;
        let spec = lab.model.spec().clone();
        let pruned = |metric: &str| {
            let keep = quorate_lens::Keep::PerLayer(keep);
            prune(&spec, &calibration.table(metric)?, keep, quorate_lens::Scope::Local, mode)
        };
        let ways = [Compressed::nothing(&map), merged, pruned("reap")?, pruned("random")?];

        let mut report = Report::default();
        report.headline("groups_per_layer", keep);
        let names = ["all", "merged", "pruned by reap", "random"];
        let named: Vec<(&str, &Compressed)> = names.into_iter().zip(&ways).collect();
        self.setup.measure(lab, &mut report, &named)?;
        let table = report.table("groups", "merged experts, the leader first", &["layer", "experts"]);
        for (layer, groups) in map.layers.iter().zip(&groups) {
            for group in groups.iter().filter(|g| g.len() > 1) {
                let names: Vec<String> = group.iter().map(ToString::to_string).collect();
                table.row([json!(layer), json!(names.join(" "))]);
            }
        }
        report.note("routing is unchanged: every member of a group holds the group's merged weights");
        let [_, merged, ..] = ways;
        report.experts = merged.replaced;
        Ok(report)
    }
}
