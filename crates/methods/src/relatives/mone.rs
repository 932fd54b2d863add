//! MoNE: the expert that is removed leaves its mean output behind.
//!
//! *What it measures.* `score_i = sd_i * use_i`: `sd_i = sqrt(sum over tokens that choose i of |f_i - mean_i|^2 / (N_i - 1))`
//! and `use_i` the share of tokens that choose it. An expert that is rarely used, or puts out nearly the same always, can
//! be replaced.
//! *What it changes.* The output of a replaced expert is the constant vector `mean_i`, before its gate; the router stays.
//! *Agreement with the paper.* Its public code takes the mean gate for `use_i`: `--access gate-sum`.
//! *Limits.* A plan with novices needs all experts in memory here, since the engine computes an expert before its output is
//! replaced; what is saved is not memory but shown by the numbers only.
//! *Reference.* arXiv 2507.00390.

use clap::Args;
use quorate_formats::{TensorOut, safetensors_bytes};
use quorate_lens::{ExpertMap, Keep, MetricInfo, Op, PhaseSelector, Scope, ScoreTable, Value, on_experts};
use quorate_model::{RoutingMode, Site};
use serde::Serialize;

use super::{Bench, Calibration, Compressed, Setup, prune};
use crate::{Card, Kind, Lab, MethodError, Report, Run};

/// The card of MoNE.
pub const CARD: Card = Card {
    id: "mone",
    title: "MoNE: redundant experts replaced by their mean output",
    paper: "arXiv 2507.00390",
    year: 2025,
    kind: Kind::Edit,
    needs: "a MoE model; texts of the task",
    cost: "one forward pass over the texts",
    metrics: &[],
    run: "quorate mone --keep 8\nquorate mone --task bios --access gate-sum -o out/",
    about: "Scores experts by use times standard deviation of the output, and lets a constant vector stand for each of the \
            others, as a plan with `mean` interventions at `expert_out`.",
};

/// The metric that stands for access frequency.
pub const ACCESS: &str = "frequency";
/// The file of the constant vectors, beside the plan.
const FILE: &str = "novices.safetensors";

/// Parameters of MoNE.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Mone {
    /// Metric of use
    #[arg(long, default_value = ACCESS, value_name = "METRIC")]
    pub access: String,
    /// Calibration and measurement
    #[command(flatten)]
    #[serde(flatten)]
    pub setup: Setup,
}

/// MoNE's scores.
///
/// # Errors
/// An unknown metric of use.
pub fn scores(calibration: &Calibration, access: &str) -> Result<ScoreTable, MethodError> {
    let access = calibration.table(access)?;
    let spread = (0..access.values.len()).map(|unit| calibration.outputs.variance(unit).sqrt());
    let values = access.values.iter().zip(spread).map(|(a, s)| a * s).collect();
    let metric = MetricInfo { name: "mone".into(), gauge_dependent: access.metric.gauge_dependent };
    Ok(ScoreTable { values, metric, ..access })
}

/// Keeps the best by MoNE's score, with novices in the place of the others.
///
/// # Errors
/// An unknown metric of use, or a number that cannot be kept.
pub fn compress(bench: &Bench<'_>, access: &str, keep: usize) -> Result<Compressed, MethodError> {
    let table = scores(bench.calibration, access)?;
    let kept = prune(bench.model.spec(), &table, Keep::PerLayer(keep), Scope::Local, RoutingMode::Mask)?;
    Ok(with_novices(bench.calibration, &kept))
}

/// Replaced experts of each MoE layer, ascending, numbered by the map.
fn replaced(map: &ExpertMap, kept: &Compressed) -> Vec<Vec<usize>> {
    let layer = |moe: usize| {
        let range = map.range(moe);
        let stays = |unit: &usize| kept.kept[moe].as_ref().is_none_or(|k| k.contains(&(unit - range.start)));
        range.clone().filter(|unit| !stays(unit)).collect()
    };
    (0..map.n_layers()).map(layer).collect()
}

/// All experts may be chosen; those that are not kept put out their mean.
fn with_novices(calibration: &Calibration, kept: &Compressed) -> Compressed {
    let map = calibration.map();
    let mut compressed = Compressed::nothing(map);
    for units in replaced(map, kept).iter().filter(|u| !u.is_empty()) {
        let op = Op::Mean { value: Value::Inline(means(calibration, units)) };
        compressed.intervene.extend(on_experts(&map.ids(units), Site::ExpertOut, PhaseSelector::All, &op));
    }
    compressed
}

/// Mean outputs of experts, one after the other.
fn means(calibration: &Calibration, units: &[usize]) -> Vec<f32> {
    units.iter().flat_map(|&unit| calibration.outputs.mean(unit)).map(|v| v as f32).collect()
}

impl Run for Mone {
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        let keep = self.setup.keep(lab, Setup::top_k(lab))?;
        let calibration = self.setup.calibration(lab)?;
        let map = calibration.map().clone();
        let table = scores(&calibration, &self.access)?;
        let spec = lab.model.spec().clone();
        let keep_of = |table: &ScoreTable, mode| prune(&spec, table, Keep::PerLayer(keep), Scope::Local, mode);
        let kept = keep_of(&table, self.setup.mode)?;
        let novices = with_novices(&calibration, &kept);
        let random = with_novices(&calibration, &keep_of(&calibration.table("random")?, self.setup.mode)?);

        let mut report = Report::default();
        report.headline("kept_per_layer", keep);
        let all = Compressed::nothing(&map);
        let dropped = Compressed { mode: RoutingMode::Drop, ..kept.clone() };
        let ways = [
            ("all", &all),
            ("novices", &novices),
            ("removed", &kept),
            ("dropped", &dropped),
            ("random novices", &random),
        ];
        self.setup.measure(lab, &mut report, &ways)?;
        let about = "share of tokens that choose the expert, times the standard deviation of its output";
        report.map("score", about, &map, &table.values, false);
        self.files(lab, &calibration, &kept, &mut report)?;
        Ok(report)
    }
}

impl Mone {
    /// The plan, and the constant vectors beside it.
    fn files(
        &self,
        lab: &Lab<'_>,
        calibration: &Calibration,
        kept: &Compressed,
        report: &mut Report,
    ) -> Result<(), MethodError> {
        let (map, d) = (calibration.map(), lab.model.spec().hidden_size);
        let (mut tensors, mut list) = (Vec::new(), Vec::new());
        for (moe, units) in replaced(map, kept).iter().enumerate().filter(|(_, u)| !u.is_empty()) {
            let tensor = format!("novice.{}", map.layers[moe]);
            tensors.push(TensorOut::f32(tensor.clone(), &[units.len(), d], means(calibration, units)));
            let op = Op::Mean { value: Value::File { file: FILE.into(), tensor } };
            list.extend(on_experts(&map.ids(units), Site::ExpertOut, PhaseSelector::All, &op));
        }
        report.file("plan.toml", "the replaced experts, as a plan", lab.plan(list)?);
        let bytes = safetensors_bytes(None, tensors).map_err(|e| MethodError::Outside(e.into()))?;
        report.file(FILE, "their mean outputs, beside the plan", bytes);
        Ok(())
    }
}
