//! CEFT: fine-tuning of the context-faithful experts only.
//!
//! *What it changes.* Low-rank terms on gate, up and down of the experts that [`router_lens`](super::router_lens) found, from
//! the base model; routers, attention and all other experts stay as they are, bit for bit.
//! *What it is compared with.* All experts and all attention in full, random experts of the same layers and number, and the
//! base.
//! *Agreement with the paper.* Rank 8, alpha 32 as in the release; no dropout; best of ten evaluations. Full tuning leaves
//! routers, norms and embeddings alone.
//! *Limits.* Tuning for the passage costs answers from memory where a prompt asks for them: see the column `as written`.
//! *Reference.* arXiv 2508.19594.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use quorate_eval::encode::EncodedItem;
use quorate_eval::statistics::{deviation, mean};
use quorate_formats::Role;
use quorate_lens::{ExpertId, ExpertMap, matched_sets};
use quorate_model::Overlay;
use quorate_train::{Example, Form, select};
use serde::Serialize;
use serde_json::json;

use super::context::{Rates, answered, rates, under};
use super::router_lens::{Search, Splits, curve, examples};
use crate::{Card, Kind, Lab, MethodError, Report, Run, Trained};

/// The card of CEFT.
pub const CARD: Card = Card {
    id: "ceft",
    title: "Context-faithful expert fine-tuning",
    paper: "arXiv 2508.19594",
    year: 2025,
    kind: Kind::Train,
    needs: "a MoE model; questions behind passages that contradict what it knows, in three splits",
    cost: "router tuning (unless --from), and some hundred training steps for the experts, for each control, and in full",
    metrics: &[],
    run: "quorate ceft\nquorate router-lens -o lens/ && quorate ceft --from lens/experts.json -o ceft/\nquorate ceft --random 1 --no-full",
    about: "Trains low-rank terms on the experts that tuned routers use most, and on nothing else, and compares with random \
            experts and with all experts and attention trained in full. With -o, the adapter in the form of PEFT.",
};

/// Parameters of CEFT.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Ceft {
    /// How the experts are found
    #[command(flatten)]
    #[serde(flatten)]
    pub search: Search,
    /// Experts found before: the file experts.json of router-lens
    #[arg(long, value_name = "FILE")]
    pub from: Option<PathBuf>,
    /// Rank of the experts' terms
    #[arg(long, default_value_t = 8, value_name = "R")]
    pub expert_rank: usize,
    /// Learning rate of the experts' terms
    #[arg(long, default_value_t = 2e-3)]
    pub expert_rate: f64,
    /// Sets of random experts to compare with
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub random: usize,
    /// Leave out the comparison with all experts and attention trained in full
    #[arg(long)]
    pub no_full: bool,
    /// Learning rate of full tuning
    #[arg(long, default_value_t = 3e-4)]
    pub full_rate: f64,
}

/// A training and what came of it.
struct Tuned {
    trained: Trained,
    rates: Rates,
    as_written: Option<f64>,
}

/// What every training learns from and is measured on.
struct Data {
    splits: Splits,
    train: Vec<Example>,
    validation: Vec<Example>,
    written: Vec<EncodedItem>,
}

impl Run for Ceft {
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        let map = lab.experts()?;
        let splits = self.search.splits(lab)?;
        let (units, routers) = match &self.from {
            Some(path) => (units(&map, &lab.world().read_text(path)?)?, None),
            None => {
                let found = self.search.find(lab, &splits)?;
                (found.experts, Some(found.routers))
            }
        };
        let (train, validation) = (examples(&splits.train), examples(&splits.validation));
        let data = Data { written: self.search.source.as_written(lab)?, splits, train, validation };
        // Any other experts of the same layers: the window holds the whole layer.
        let sets = matched_sets(&map, &vec![0; map.total()], &units, usize::MAX, self.random, lab.seed)?;

        let nothing = Trained { overlay: Overlay::new(), values: 0, curve: Vec::new(), best: 0 };
        let base = measured(lab, &data, nothing)?;
        let targets = self.expert_targets(lab, &map, &units);
        let own = self.tune(lab, "tuning the found experts", &data, targets, self.expert_rate)?;
        let mut random = Vec::with_capacity(sets.len());
        for (i, set) in sets.iter().enumerate() {
            lab.part = (i, sets.len());
            let targets = self.expert_targets(lab, &map, set);
            random.push(self.tune(lab, "tuning random experts", &data, targets, self.expert_rate)?);
        }
        lab.part = (0, 1);
        let full = match self.no_full {
            true => None,
            false => {
                let targets = full_targets(lab);
                Some(self.tune(lab, "tuning all experts and attention", &data, targets, self.full_rate)?)
            }
        };
        let routers = routers.map(|routers| measured(lab, &data, routers)).transpose()?;

        let mut report = Report::default();
        data.splits.remark(&mut report);
        report.headline("experts", units.len());
        headlines(lab, &mut report, &base, &own, &random, full.as_ref());
        let about = "answers to test questions and to prompts as written, in percent; loss: validation, nats a token";
        let columns = ["tuned", "values", "by passage", "by memory", "as written", "loss"];
        let table = report.table("tuned", about, &columns);
        let mut row = |name: &str, t: &Tuned| table.row(row_of(name, t));
        row("nothing", &base);
        routers.iter().for_each(|t| row("routers", t));
        row("context-faithful experts", &own);
        random.iter().enumerate().for_each(|(i, t)| row(&format!("random experts {}", i + 1), t));
        full.iter().for_each(|t| row("all experts and attention", t));
        curve(&mut report, &own.trained);
        report.adapter(
            &lab.model,
            &own.trained.overlay,
            "terms on the context-faithful experts, an adapter of PEFT",
        )?;
        Ok(report)
    }
}

impl Ceft {
    /// The matrices of some experts, in low-rank form.
    fn expert_targets(&self, lab: &Lab<'_>, map: &ExpertMap, units: &[usize]) -> Vec<(Role, Form)> {
        let roles: Vec<Role> =
            units.iter().map(|&u| map.id(u)).flat_map(|id| Role::of_expert(id.layer, id.expert)).collect();
        let form = Form::LowRank { rank: self.expert_rank, alpha: self.search.tuning.alpha };
        select(lab.model.spec(), |role| roles.contains(&role).then(|| form.clone()))
    }

    fn tune(
        &self,
        lab: &mut Lab<'_>,
        stage: &str,
        data: &Data,
        targets: Vec<(Role, Form)>,
        rate: f64,
    ) -> Result<Tuned, MethodError> {
        let options = self.search.tuning.options(rate, lab.seed);
        let trained = lab.train(stage, &targets, options, &data.train, &data.validation)?;
        measured(lab, data, trained)
    }
}

/// How the test questions and the prompts as written are answered with what was trained.
fn measured(lab: &mut Lab<'_>, data: &Data, trained: Trained) -> Result<Tuned, MethodError> {
    let (part, stage) = (std::mem::replace(&mut lab.part, (0, 1)), "answering");
    let rates = rates(lab, stage, &data.splits.test, &trained.overlay, &[])?;
    let as_written = under(lab, &trained.overlay, |lab| answered(lab, stage, &data.written, &[]))?;
    lab.part = part;
    Ok(Tuned { trained, rates, as_written })
}

fn headlines(lab: &Lab<'_>, report: &mut Report, base: &Tuned, own: &Tuned, random: &[Tuned], full: Option<&Tuned>) {
    let all = lab.model.checkpoint().parameter_counts().total as f64;
    let (values, passage) = (own.trained.values, own.rates.passage);
    report.headline("trained_parameters", json!({ "values": values, "percent": 100.0 * values as f64 / all }));
    report.headline("by_passage", json!({ "base": base.rates.passage, "ceft": passage }));
    let others: Vec<f64> = random.iter().map(|t| t.rates.passage).collect();
    if let Some(mean) = mean(&others) {
        let gap = json!({ "mean": passage - mean, "deviation": deviation(&others) });
        report.headline("over_random_experts_in_points", gap);
    }
    if let Some(full) = full {
        report.headline("behind_full_tuning_in_points", full.rates.passage - passage);
    }
}

/// All experts and all attention, in full.
fn full_targets(lab: &Lab<'_>) -> Vec<(Role, Form)> {
    select(lab.model.spec(), |role| {
        let attention = matches!(role, Role::Q(_) | Role::K(_) | Role::V(_) | Role::O(_));
        (attention || role.is_expert()).then_some(Form::Full)
    })
}

fn row_of(name: &str, t: &Tuned) -> [serde_json::Value; 6] {
    let loss = t.trained.curve.iter().map(|(_, loss)| *loss).reduce(f64::min);
    let (passage, memory) = (json!(t.rates.passage), json!(t.rates.memory));
    [json!(name), json!(t.trained.values), passage, memory, json!(t.as_written), json!(loss)]
}

/// Reads a list of experts by layer.
fn units(map: &ExpertMap, text: &str) -> Result<Vec<usize>, MethodError> {
    let refuse = |what: String| MethodError::needs(what, "give the file experts.json of `quorate router-lens -o DIR`");
    let list: BTreeMap<usize, Vec<usize>> =
        serde_json::from_str(text).map_err(|e| refuse(format!("the list of experts cannot be read: {e}")))?;
    let ids = list.iter().flat_map(|(&layer, experts)| experts.iter().map(move |&expert| ExpertId { layer, expert }));
    let unit = |id: ExpertId| map.unit(id).ok_or_else(|| refuse(format!("the model has no expert {id}")));
    let mut units: Vec<usize> = ids.map(unit).collect::<Result<_, _>>()?;
    units.sort_unstable();
    units.dedup();
    if units.is_empty() {
        return Err(refuse("the list of experts is empty".to_string()));
    }
    Ok(units)
}

#[cfg(test)]
mod tests {
    use super::super::router_lens::list;
    use super::*;

    #[test]
    fn a_list_is_read_as_it_was_written() {
        let map = ExpertMap::new(vec![1, 3], vec![4, 4]);
        let text = serde_json::to_string(&list(&map, &[6, 1, 3])).unwrap();
        assert_eq!(text, r#"{"1":[1,3],"3":[2]}"#);
        assert_eq!(units(&map, &text).unwrap(), [1, 3, 6]);
        for (bad, why) in [("[1]", "cannot be read"), (r#"{"1":[]}"#, "empty"), (r#"{"2":[0]}"#, "no expert 2:0")] {
            let error = units(&map, bad).unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("help: "), "{error}");
        }
    }
}
