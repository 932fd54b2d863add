//! NAEE: the experts whose removal changes the layer's output least, and skipping of low-ranked experts while running.
//!
//! *What it measures.* For a subset of a layer's experts `|Z - Z'|_F^2` over calibration tokens: `Z` the routed sum, `Z'` that
//! of the router restricted to the subset, on the same inputs. With at most `--exhaustive` subsets all are tried; beyond,
//! experts are removed one by one, each time the cheapest, then swapped as long as that helps.
//! *What it changes.* The best subsets are kept. `--skip` adds dynamic skipping: with `beta` the median of `g_j / g_1` over
//! calibration tokens and ranks `j >= 2` of a layer, slots with `g_j < beta g_1` are emptied (plan operation `skip`).
//! *Agreement with the paper.* It masks before softmax (`--mode mask`) and minimises the sum of norms of batches, here the
//! norm of all tokens. It knows top-2 only; for larger k all ranks share one `beta`, which for k = 2 is the paper's.
//! *Limits.* Greedy removal with swaps finds a local optimum. Layer-wise errors ignore what a change does further up;
//! `--progressive` takes each layer's inputs from the model pruned so far.
//! *Reference.* arXiv 2402.14800.

use clap::Args;
use quorate_eval::statistics::quantile;
use quorate_lens::{Indices, Intervention, Keep, Op, PhaseSelector, Plan, Scope};
use quorate_model::{RoutingMode, Site, ops};
use serde::Serialize;
use serde_json::json;

use super::{Bench, Calibration, Compressed, Found, LayerFit, LayerSample, Setup, best_subset, prune};
use crate::{Card, Kind, Lab, MethodError, Report, Run};

/// The card of NAEE.
pub const CARD: Card = Card {
    id: "naee",
    title: "NAEE: not all experts are equal, subset search and dynamic skipping",
    paper: "arXiv 2402.14800",
    year: 2024,
    kind: Kind::Edit,
    needs: "a MoE model; texts of the task",
    cost: "one forward pass over the texts, all experts on some tokens, a search in each layer",
    metrics: &[],
    run: "quorate naee --keep 8\nquorate naee --task bios --mode mask --progressive --skip -o out/",
    about: "Searches in every layer for the experts that give the layer's output back best, exhaustively where there are \
            few, and compares the error and the answers with PEU, REAP and random experts.",
};

/// Subsets up to which all are tried.
const EXHAUSTIVE_MAX: usize = 5000;

/// Parameters of NAEE.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Naee {
    /// Try all subsets of a layer if there are at most so many
    #[arg(long, default_value_t = EXHAUSTIVE_MAX, value_name = "N")]
    pub exhaustive: usize,
    /// Take each layer's inputs from the model pruned so far
    #[arg(long)]
    pub progressive: bool,
    /// Also skip low-ranked experts of each token
    #[arg(long)]
    pub skip: bool,
    /// Calibration and measurement
    #[command(flatten)]
    #[serde(flatten)]
    pub setup: Setup,
}

/// Keeps the best subset of every layer.
///
/// # Errors
/// Experts that are not in memory.
pub fn compress(bench: &mut Bench<'_>, keep: usize) -> Result<Compressed, MethodError> {
    let (model, mode) = (bench.model, bench.mode);
    let mut kept = Vec::new();
    for fit in bench.calibration.fits(model)? {
        kept.push(best_subset(fit.experts, keep, EXHAUSTIVE_MAX, |k| fit.error(model, k, mode))?.kept);
    }
    Ok(Compressed::keeping(kept, mode))
}

impl Run for Naee {
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        let keep = self.setup.keep(lab, Setup::top_k(lab))?;
        let calibration = self.setup.calibration(lab)?;
        let (map, mode, spec) = (calibration.map().clone(), self.setup.mode, lab.model.spec().clone());
        let pruned = |metric: &str| prune(&spec, &calibration.table(metric)?, Keep::PerLayer(keep), Scope::Local, mode);
        let others = [pruned("peu")?, pruned("reap")?, pruned("random")?];
        let mut report = Report::default();
        report.headline("kept_per_layer", keep);
        let kept = self.search(lab, &calibration, keep, &others, &mut report)?;
        let found = Compressed::keeping(kept, mode);

        let [peu, reap, random] = &others;
        let all = Compressed::nothing(&map);
        let mut ways = vec![("all", &all), ("naee", &found), ("peu", peu), ("reap", reap), ("random", random)];
        let skips = if self.skip { skips(lab, &calibration, &found, &mut report)? } else { Vec::new() };
        let skipping = Compressed { intervene: skips.clone(), ..found.clone() };
        let all_skipping = Compressed { intervene: skips.clone(), ..all.clone() };
        if self.skip {
            ways.extend([("naee skipping", &skipping), ("all skipping", &all_skipping)]);
        }
        self.setup.measure(lab, &mut report, &ways)?;
        let kept: Vec<Vec<usize>> = found.kept.iter().map(|k| k.clone().unwrap_or_default()).collect();
        let mut plan = Plan::keeping(lab.model.checkpoint().fingerprint(), &map, &kept, mode);
        plan.task = Some(self.setup.task.clone());
        plan.metric = Some(CARD.id.to_string());
        plan.intervene = skips;
        report.file("plan.toml", "the kept experts, as a plan", plan.to_toml()?);
        Ok(report)
    }
}

impl Naee {
    /// The kept experts of every layer, and a table of errors.
    fn search(
        &self,
        lab: &mut Lab<'_>,
        calibration: &Calibration,
        keep: usize,
        others: &[Compressed],
        report: &mut Report,
    ) -> Result<Vec<Vec<usize>>, MethodError> {
        let mode = self.setup.mode;
        let layers = calibration.map().n_layers();
        let mut kept: Vec<Vec<usize>> = Vec::with_capacity(layers);
        let mut rows = Vec::with_capacity(layers);
        for moe in 0..layers {
            let fresh;
            let fit = if self.progressive && moe > 0 {
                let sample = self.sample_after(lab, &kept, layers)?;
                fresh = LayerFit::new(&lab.model, &sample[moe])?;
                &fresh
            } else {
                &calibration.fits(&lab.model)?[moe]
            };
            lab.progress("searching", moe, layers)?;
            let model = &lab.model;
            let found = best_subset(fit.experts, keep, self.exhaustive, |k| fit.error(model, k, mode))?;
            let energy = fit.energy(model)?.max(f64::MIN_POSITIVE);
            let Found { error, tried, exhaustive, kept: best } = found;
            let way = if exhaustive { "exhaustive" } else { "greedy, swaps" };
            let mut row = vec![json!(fit.layer), json!(way), json!(tried), json!(error / energy)];
            for other in others {
                let experts = other.kept[moe].as_deref().unwrap_or_default();
                row.push(json!(fit.error(model, experts, mode)? / energy));
            }
            rows.push(row);
            kept.push(best);
        }
        lab.progress("searching", layers, layers)?;
        let about = "squared error of the layer's output over its squared norm, calibration tokens";
        let columns = ["layer", "search", "subsets tried", "naee", "peu", "reap", "random"];
        let table = report.table("errors", about, &columns);
        rows.into_iter().for_each(|row| table.row(row));
        Ok(kept)
    }

    /// The layers' inputs when the first layers keep only these experts.
    fn sample_after(
        &self,
        lab: &mut Lab<'_>,
        kept: &[Vec<usize>],
        layers: usize,
    ) -> Result<Vec<LayerSample>, MethodError> {
        let items = self.setup.encoded(lab)?;
        let mut pruned: Vec<Option<Vec<usize>>> = kept.iter().cloned().map(Some).collect();
        pruned.resize(layers, None);
        lab.model.mask_experts(&pruned, self.setup.mode)?;
        let sample = Calibration::sample(lab, &items, self.setup.tokens);
        lab.model.mask_experts(&vec![None; layers], RoutingMode::Mask)?;
        sample
    }
}

/// Dynamic skipping, one intervention for each layer; a table of `beta` and of the slots that it empties.
fn skips(
    lab: &Lab<'_>,
    calibration: &Calibration,
    kept: &Compressed,
    report: &mut Report,
) -> Result<Vec<Intervention>, MethodError> {
    let table =
        report.table("skipping", "slots below beta times the first gate are emptied", &["layer", "beta", "slots"]);
    let mut list = Vec::with_capacity(calibration.sample.len());
    for (moe, sample) in calibration.sample.iter().enumerate() {
        let experts = calibration.map().experts[moe];
        let flags: Option<Vec<bool>> =
            kept.kept[moe].as_ref().map(|kept| (0..experts).map(|e| kept.contains(&e)).collect());
        let routing = lab.model.route(sample.layer, &sample.logits, flags.as_deref(), kept.mode)?;
        let ratios = ratios(&ops::values(&routing.gates)?, routing.k);
        let Some(beta) = quantile(&ratios, 0.5) else {
            return Err(MethodError::needs(
                "a token uses one expert",
                "skipping needs a model with two or more per token",
            ));
        };
        let below = ratios.iter().filter(|r| **r < beta).count() as f64 / ratios.len() as f64;
        table.row([json!(sample.layer), json!(beta), json!(below * (routing.k - 1) as f64 / routing.k as f64)]);
        list.push(Intervention {
            site: Site::Routing,
            layers: Indices::of(&[sample.layer]),
            units: Indices::All,
            positions: Indices::All,
            phase: PhaseSelector::All,
            op: if lab.model.spec().moe(sample.layer).is_some_and(|m| m.router.norm_topk_prob) {
                Op::SkipRenormalise { by: beta as f32 }
            } else {
                Op::Skip { by: beta as f32 }
            },
        });
    }
    Ok(list)
}

/// `g_j / g_1` of every token and rank `j >= 2`.
fn ratios(gates: &[f32], k: usize) -> Vec<f64> {
    let row = |row: &[f32]| -> Vec<f64> { row[1..].iter().map(|g| f64::from(*g) / f64::from(row[0])).collect() };
    gates.chunks_exact(k).filter(|r| r[0] > 0.0).flat_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beta_is_the_median_of_the_second_over_the_first() {
        let gates = [0.5, 0.1, 0.4, 0.4, 0.8, 0.4];
        let found = ratios(&gates, 2);
        assert!(found.iter().zip([0.2, 1.0, 0.5]).all(|(a, b)| (a - b).abs() < 1e-6), "{found:?}");
        assert!((quantile(&found, 0.5).unwrap() - 0.5).abs() < 1e-6);
    }
}
