//! FLAME-MoE's routing metrics: how special experts are, which work together, how early routing settles.
//!
//! *What it measures*, for each MoE layer over given texts:
//! - token specialisation: `spec(i, v) = n(token v chose expert i) / n(token v)`; an expert's score is the mean over its top
//!   tokens;
//! - co-activation: `B[i][j] = n(i and j chosen together) / n(i chosen)`, diagonal 0; each row sums to `k - 1`;
//! - saturation against another checkpoint: `mean_t |S(t) and S'(t)| / k'` for the first `k' = 1, 2, 4 .. k` experts;
//! - entropy of the router's distribution over all experts against `ln E`, share of experts used, load (busiest / mean).
//!
//! *Control.* A blind router: the same tokens, each draws its experts with the load of the own router as weights.
//! *Agreement with the paper.* Tokens must occur some times to count (a token seen once has `spec` 1 for whatever it chose);
//! `k` comes with each trace; the paper's scripts use 6 here and 8 there. The paper shows the 16 experts with the largest
//! row maximum, so does the table of pairs.
//! *Limits.* Entropy, use and load are not of the paper. Saturation needs a checkpoint with the same tokens and experts.
//! *Reference.* arXiv 2505.20225.

use std::path::{Path, PathBuf};

use clap::Args;
use quorate_eval::encode::EncodedItem;
use quorate_eval::statistics::mean;
use quorate_eval::tasks::TaskItem;
use quorate_lens::{ExpertMap, RoutingTrace};
use quorate_model::{Model, ModelError};
use serde::Serialize;
use serde_json::json;

use super::choices::{Choices, LayerChoices, Speciality, prefixes};
use super::{Rows, load, record, used_share};
use crate::contrast::top;
use crate::{Card, Kind, Lab, MethodError, Report, Run};

/// The card of FLAME-MoE's metrics.
pub const CARD: Card = Card {
    id: "routing",
    title: "FLAME-MoE's routing metrics: specialisation, co-activation, saturation",
    paper: "arXiv 2505.20225",
    year: 2025,
    kind: Kind::Analysis,
    needs: "a MoE model and texts; for saturation another checkpoint of it",
    cost: "one forward pass over the texts for each checkpoint",
    metrics: &[],
    run: "quorate routing\nquorate routing --rows prompt --limit 50 -o out/\nquorate routing -m step-4000 --against final --tasks texts/",
    about: "How special each expert's tokens are, which experts are chosen together, how far the choice agrees with another \
            checkpoint's; and the entropy of the gates, the share of experts used, their load. Beside a router with the \
            same load that does not look at the token.",
};

/// Parameters of the routing metrics.
#[derive(Args, Clone, Debug, Serialize)]
pub struct RoutingMetrics {
    /// Another checkpoint of the model, with which the choice of experts is compared (saturation)
    #[arg(long, value_name = "MODEL")]
    pub against: Option<PathBuf>,
    /// Which tokens count
    #[arg(long, value_enum, default_value_t = Rows::All)]
    pub rows: Rows,
    /// Top tokens of an expert over which its specialisation is averaged
    #[arg(long, default_value_t = 10, value_name = "N")]
    pub top: usize,
    /// Tokens count that occur this often or more
    #[arg(long, default_value_t = 30, value_name = "N")]
    pub occurrences: u64,
}

/// Experts and pairs in the tables.
const SHOWN: usize = 16;

impl Run for RoutingMetrics {
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        let map = lab.experts()?;
        let texts: Vec<_> = lab.tasks("test")?.into_iter().flat_map(|t| t.items).collect();
        let items = lab.encode(&texts)?;
        let other = match &self.against {
            Some(path) => Some(Choices::of(&trace_of_other(lab, path, &texts, &items, self.rows)?, &map, self.rows)),
            None => None,
        };
        let (trace, entropies) = record(lab, &items, self.rows)?;
        let own = Choices::of(&trace, &map, self.rows);
        if own.tokens.is_empty() || self.top == 0 {
            let what = if self.top == 0 { "--top is 0" } else { "no token of the texts counts" };
            return Err(MethodError::needs(what, "give at least 1 top token, and texts with the --rows wanted"));
        }
        let blind = own.blind(lab.seed);
        let mut report = Report::default();
        report.headline("tokens", own.tokens.len());
        self.layers(&map, &own, &blind, &entropies, &mut report);
        self.specialities(lab, &map, &own, &blind, &mut report)?;
        pairs(&map, &own, &blind, &mut report);
        if let Some(other) = &other {
            saturation(&map, &own, other, &mut report);
        }
        report.note("random: the same tokens, each draws distinct experts by the load of the own router");
        Ok(report)
    }
}

impl RoutingMetrics {
    /// Entropy, use, load.
    fn layers(&self, map: &ExpertMap, own: &Choices, blind: &Choices, entropies: &[f64], report: &mut Report) {
        let about = "entropy of the router's distribution in nats; load: use of the busiest expert over the mean";
        let columns = ["layer", "entropy", "ln E", "used", "load", "load random"];
        let table = report.table("gates", about, &columns);
        let (mut flat, mut used, mut loads) = (Vec::new(), Vec::new(), Vec::new());
        for (moe, &layer) in map.layers.iter().enumerate() {
            let (counts, full) = (own.layers[moe].counts(), (map.experts[moe] as f64).ln());
            flat.push(entropies[moe] / full);
            used.push(used_share(&counts));
            loads.push(load(&counts));
            let random = load(&blind.layers[moe].counts());
            let numbers = [entropies[moe], full, used[moe], loads[moe], random];
            table.row([&[json!(layer)][..], &numbers.map(|v| json!(v))].concat());
        }
        report.headline("entropy_over_ln_experts", mean(&flat));
        report.headline("used_share", mean(&used));
        report.headline("load_busiest_over_mean", mean(&loads));
        let shares: Vec<f64> =
            own.layers.iter().flat_map(LayerChoices::counts).map(|c| c as f64 / own.tokens.len() as f64).collect();
        report.map("use", "share of the tokens that chose the expert", map, &shares, false);
    }

    fn specialities(
        &self,
        lab: &Lab<'_>,
        map: &ExpertMap,
        own: &Choices,
        blind: &Choices,
        report: &mut Report,
    ) -> Result<(), MethodError> {
        let of = |c: &Choices| -> Vec<Vec<Speciality>> {
            c.layers.iter().map(|l| l.specialities(&c.tokens, self.occurrences, self.top)).collect()
        };
        let (own, blind) = (of(own), of(blind));
        let layer_mean = |s: &[Speciality]| mean(&s.iter().filter_map(|s| s.score).collect::<Vec<_>>());
        let about = format!(
            "mean over experts; each the mean share of its {} top tokens (of {} occurrences or more)",
            self.top, self.occurrences
        );
        let table = report.table("specialisation", &about, &["layer", "own", "random"]);
        for (moe, &layer) in map.layers.iter().enumerate() {
            table.row([json!(layer), json!(layer_mean(&own[moe])), json!(layer_mean(&blind[moe]))]);
        }
        let scores: Vec<Option<f64>> = own.iter().flatten().map(|s| s.score).collect();
        if scores.iter().all(Option::is_none) {
            return Err(MethodError::needs(
                format!("no token occurs {} times", self.occurrences),
                "give more texts, or a smaller --occurrences",
            ));
        }
        let (own_mean, random) = (layer_mean(&own.concat()), layer_mean(&blind.concat()));
        report.headline("specialisation", json!({ "own": own_mean, "random": random }));
        report.map("specialisation", &about, map, &scores, false);

        let known: Vec<f64> = scores.iter().map(|s| s.unwrap_or(0.0)).collect();
        let about = "the most special ones; top tokens with their share";
        let table = report.table("experts", about, &["expert", "specialisation", "top tokens"]);
        for unit in top(&known, SHOWN) {
            let texts = own.iter().flatten().nth(unit).map_or(Ok(String::new()), |s| tokens_text(lab, &s.top))?;
            table.row([json!(map.id(unit).to_string()), json!(scores[unit]), json!(texts)]);
        }
        Ok(())
    }
}

/// Tokens as quoted text with their shares.
fn tokens_text(lab: &Lab<'_>, tokens: &[(u32, f64)]) -> Result<String, MethodError> {
    let text = |&(token, spec): &(u32, f64)| {
        let text = lab.model.tokenizer().decode(&[token], false).map_err(ModelError::from)?;
        Ok(format!("{text:?} {spec:.2}"))
    };
    Ok(tokens.iter().map(text).collect::<Result<Vec<_>, MethodError>>()?.join("  "))
}

/// Co-activation: row maxima, the strongest pairs, everything as CSV.
fn pairs(map: &ExpertMap, own: &Choices, blind: &Choices, report: &mut Report) {
    let matrices: Vec<Vec<Vec<f64>>> = own.layers.iter().map(LayerChoices::co_activation).collect();
    let maximum = |row: &Vec<f64>| row.iter().copied().fold(0.0, f64::max);
    let maxima: Vec<f64> = matrices.iter().flatten().map(maximum).collect();
    let random: Vec<f64> = blind.layers.iter().flat_map(LayerChoices::co_activation).map(|r| maximum(&r)).collect();
    let about = "largest share of an expert's tokens that also choose one certain other; mean over experts";
    let table = report.table("co-activation", about, &["layer", "own", "random", "(k-1)/(E-1)"]);
    let mut even = Vec::new();
    for (moe, &layer) in map.layers.iter().enumerate() {
        let LayerChoices { experts, k, .. } = own.layers[moe];
        even.push((k as f64 - 1.0) / (experts as f64 - 1.0).max(1.0));
        let of = |maxima: &[f64]| json!(mean(&maxima[map.range(moe)]));
        table.row([json!(layer), of(&maxima), of(&random), json!(even[moe])]);
    }
    let headline = json!({ "own": mean(&maxima), "random": mean(&random), "even": mean(&even) });
    report.headline("co_activation_row_maximum", headline);
    report.map("co-activation", about, map, &maxima, false);

    let about = "share of the expert's tokens that also choose the other, and the other way round";
    let table = report.table("pairs", about, &["expert", "other", "share", "back"]);
    let mut csv = "layer,expert,other,share\n".to_string();
    for unit in top(&maxima, SHOWN) {
        let id = map.id(unit);
        let Some(matrix) = map.moe_index(id.layer).map(|moe| &matrices[moe]) else { continue };
        let other = top(&matrix[id.expert], 1)[0];
        let (share, back) = (matrix[id.expert][other], matrix[other][id.expert]);
        table.row([json!(id.to_string()), json!(format!("{}:{other}", id.layer)), json!(share), json!(back)]);
    }
    for (layer, matrix) in map.layers.iter().zip(&matrices) {
        for (i, row) in matrix.iter().enumerate() {
            row.iter().enumerate().filter(|v| v.0 != i).for_each(|(j, v)| csv += &format!("{layer},{i},{j},{v}\n"));
        }
    }
    report.file("co-activation.csv", "share of an expert's tokens that also choose another", csv);
}

/// The routing of the same texts in another checkpoint.
fn trace_of_other(
    lab: &mut Lab<'_>,
    path: &Path,
    texts: &[TaskItem],
    items: &[EncodedItem],
    rows: Rows,
) -> Result<RoutingTrace, MethodError> {
    let other = lab.world().open_model(path)?;
    let differs = |what| {
        let what = format!("{} has {what}", path.display());
        Err(MethodError::needs(what, "saturation compares checkpoints of one model"))
    };
    let shape = |model: &Model| -> Vec<Option<(usize, usize)>> {
        let spec = model.spec();
        (0..spec.layers.len()).map(|l| spec.moe(l).map(|m| (m.n_experts, m.top_k))).collect()
    };
    if shape(&other) != shape(&lab.model) {
        return differs("other layers, experts or experts per token");
    }
    let own = std::mem::replace(&mut lab.model, other);
    let trace = match lab.encode(texts) {
        Ok(theirs) if theirs != items => differs("other tokens for the same texts"),
        Ok(theirs) => record(lab, &theirs, rows).map(|r| r.0),
        Err(error) => Err(error),
    };
    lab.model = own;
    trace
}

fn saturation(map: &ExpertMap, own: &Choices, other: &Choices, report: &mut Report) {
    let most = own.layers.iter().map(|l| l.k).max().unwrap_or(1);
    let prefixes = prefixes(most);
    let about = "share of the first k' experts that the other checkpoint's first k' also hold; chance k'/E";
    let names: Vec<String> = prefixes.iter().flat_map(|p| [format!("first {p}"), format!("chance {p}")]).collect();
    let columns: Vec<&str> = std::iter::once("layer").chain(names.iter().map(String::as_str)).collect();
    let table = report.table("saturation", about, &columns);
    let mut means = vec![Vec::new(); prefixes.len()];
    for (moe, &layer) in map.layers.iter().enumerate() {
        let (a, b) = (&own.layers[moe], &other.layers[moe]);
        let mut cells = vec![json!(layer)];
        for (&prefix, means) in prefixes.iter().zip(&mut means) {
            let prefix = prefix.min(a.k);
            let found = a.saturation(b, prefix);
            cells.extend([json!(found), json!(prefix as f64 / a.experts as f64)]);
            means.push(found);
        }
        table.row(cells);
    }
    let all: serde_json::Map<_, _> =
        prefixes.iter().zip(&means).map(|(p, m)| (format!("first_{p}"), json!(mean(m)))).collect();
    report.headline("saturation", all);
}
