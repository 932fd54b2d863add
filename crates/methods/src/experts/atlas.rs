//! The atlas: one card for every expert, with what is measured of it on the tasks' texts.
//!
//! *What it measures*, over all tokens of the texts (prompts and answers):
//! - tasks: `share = P(task | expert)`, `lift = P(expert | task) / P(expert)`, and the entropy over tasks of `P(expert | task)`
//!   divided by its sum, so that every task weighs the same, over `ln(tasks)`;
//! - tokens: `spec = n(token chose expert) / n(token)` (FLAME-MoE) with examples, and the entropy over tokens in nats;
//! - mean norm of the output before the gate, mean gate, largest absolute output;
//! - partners: `share = P(other | expert)`, `lift` = that over `P(other)`;
//! - contrasts of labelled classes of texts: mean share of a text's tokens that choose the expert, class minus others, within
//!   each task that has both, mean over tasks.
//!
//! *Flags.* `never used`; a contrast's name if the contrast reaches `--effect` and the 95th percentile of the largest contrast
//! of any expert under shuffled labels; `super expert`.
//! *Control.* Everything is measured on two halves of every task's texts as well, and compared by Spearman's correlation.
//! *Limits.* A contrast counts all tokens, hence also those that tell the class (`/think`); it shows use, not cause. Token entropy
//! grows with the number of tokens seen. The routing of all texts is held in memory.

mod labels;
mod measure;
mod page;

use clap::Args;
use quorate_eval::statistics::spearman;
use quorate_eval::tasks::Task;
use quorate_lens::ExpertMap;
use serde::Serialize;
use serde_json::json;

use crate::contrast::{CLASS_ITEMS_MIN, shares, top};
use crate::routing::Rows;
use crate::routing::choices::Choices;
use crate::{Card, Kind, Lab, MethodError, Report, Run};
use labels::{Group, Label, contrast, shuffled_p95};
use measure::{Numbers, Recorded};

/// The card of the atlas.
pub const CARD: Card = Card {
    id: "atlas",
    title: "Expert atlas: a card for every expert",
    paper: "measures of arXiv 2505.20225, 2502.11096, 2507.23279",
    year: 2025,
    kind: Kind::Analysis,
    needs: "a MoE model and tasks; for contrasts a field of the tasks' `meta` that tells the classes",
    cost: "one forward pass over the texts",
    metrics: &[],
    run: "quorate atlas --html atlas.html\nquorate atlas --limit 50 --label refusal:refuse=true -o out/",
    about: "For every expert the tasks and tokens that it serves, with examples, its output's norm, its gate, the experts it \
            works with, and flags: never used, used for a labelled class of texts beyond chance, super expert. Each \
            quantity is compared between two halves of the texts.",
};

/// Contrasts that are made if the tasks have such labels.
const LABELS: [&str; 3] =
    ["refusal:refuse=true", "thinking:variant=think/direct", "context-faithful:variant=conflict/memory"];

/// Parameters of the atlas.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Atlas {
    /// Labelled classes of texts: NAME:FIELD=IN or NAME:FIELD=IN/OUT, by how a field of `meta` begins
    #[arg(long = "label", value_name = "LABEL", num_args = 1.., default_values = LABELS)]
    pub labels: Vec<Label>,
    /// Least contrast that gives a flag: a difference of shares of tokens
    #[arg(long, default_value_t = 0.1, value_name = "SHARE")]
    pub effect: f64,
    /// How often labels are shuffled
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub shuffles: usize,
    /// Typical tokens on a card
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub tokens: usize,
    /// Tokens count that occur this often or more
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub occurrences: u64,
    /// Examples of each token, from different texts
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub examples: usize,
    /// Tasks and partners on a card
    #[arg(long, default_value_t = 6, value_name = "N")]
    pub rows: usize,
}

/// A contrast that was made.
struct Found {
    name: String,
    values: Vec<f64>,
    /// What an expert must reach to be flagged.
    bar: f64,
}

impl Run for Atlas {
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        let (map, tasks) = (lab.experts()?, lab.tasks("test")?);
        if self.shuffles == 0 {
            return Err(MethodError::needs("--shuffles is 0", "flags need at least 20 shuffles of the labels"));
        }
        let names: Vec<String> = tasks.iter().map(|t| t.name.clone()).collect();
        let (mut all, other) = (half(lab, &tasks, 0)?, half(lab, &tasks, 1)?);
        let measured = |r: &Recorded| {
            let choices = Choices::of(&r.trace, &map, Rows::All);
            (Numbers::of(r, &choices, names.len()), choices)
        };
        let halves = [measured(&all).0, measured(&other).0];
        all.merge(other);
        let (numbers, choices) = measured(&all);
        if choices.tokens.is_empty() {
            return Err(MethodError::needs("the tasks have no texts", "give more with --tasks or --limit"));
        }
        let mut report = Report::default();
        report.headline("experts", map.total());
        report.headline("tokens", choices.tokens.len());
        let found = self.contrasts(lab, &map, &tasks, &all, &mut report)?;
        stability(&halves, &mut report);
        self.flagged(&map, &numbers, &found, &mut report);
        maps(&map, &numbers, &found, &names, &mut report);
        report.cards = Some(page::cards(self, lab, &map, &all, &choices, &numbers, &found, &names)?);
        Ok(report)
    }
}

/// Every other text of each task, from `first` on.
fn half(lab: &mut Lab<'_>, tasks: &[Task], first: usize) -> Result<Recorded, MethodError> {
    lab.part = (first, 2);
    let of = |(t, task): (usize, &Task)| {
        task.items.iter().skip(first).step_by(2).map(|i| (i.clone(), t)).collect::<Vec<_>>()
    };
    let (items, of_task): (Vec<_>, Vec<_>) = tasks.iter().enumerate().flat_map(of).unzip();
    let encoded = lab.encode(&items)?;
    let recorded = Recorded::new(lab, &encoded, of_task);
    lab.part = (0, 1);
    recorded
}

impl Atlas {
    fn contrasts(
        &self,
        lab: &Lab<'_>,
        map: &ExpertMap,
        tasks: &[Task],
        all: &Recorded,
        report: &mut Report,
    ) -> Result<Vec<Found>, MethodError> {
        let mut found = Vec::new();
        let mut rows = Vec::new();
        for label in &self.labels {
            let groups = groups(label, map, tasks, all);
            let Some(values) = contrast(&groups) else {
                let what = format!("no task has {CLASS_ITEMS_MIN} texts on both sides of the label `{label}`");
                if LABELS.contains(&label.to_string().as_str()) {
                    report.note(format!("{what}: no flag `{}`", label.name));
                    continue;
                }
                return Err(MethodError::needs(
                    what,
                    "name a field of `meta` and how its values begin, or give more texts",
                ));
            };
            let random = shuffled_p95(&groups, self.shuffles, lab.seed).unwrap_or(f64::INFINITY);
            let bar = self.effect.max(random);
            let sizes = groups.iter().map(Group::sizes).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
            let flagged = values.iter().filter(|v| **v >= bar).count();
            let best = top(&values, 1)[0];
            rows.push(vec![
                json!(label.name),
                json!(sizes.0),
                json!(sizes.1),
                json!(map.id(best).to_string()),
                json!(values[best]),
                json!(random),
                json!(flagged),
            ]);
            found.push(Found { name: label.name.clone(), values, bar });
        }
        let about = format!(
            "share of a text's tokens that choose the expert, class minus others; random: 95th percentile of the largest of \
             any expert with shuffled labels; flagged: at least that and {}",
            self.effect
        );
        let columns = ["label", "class texts", "other texts", "best expert", "contrast", "random", "flagged"];
        report.table("contrasts", &about, &columns).rows = rows;
        Ok(found)
    }

    fn flagged(&self, map: &ExpertMap, numbers: &Numbers, found: &[Found], report: &mut Report) {
        let flags: Vec<Vec<String>> = (0..map.total()).map(|u| flags(u, numbers, found)).collect();
        let mut counts = serde_json::Map::new();
        for flag in page::flags(self, found) {
            counts.insert(flag.name.clone(), json!(flags.iter().filter(|f| f.contains(&flag.name)).count()));
        }
        report.headline("flags", counts);
    }
}

/// The labelled texts of each task that has enough of both sides.
fn groups(label: &Label, map: &ExpertMap, tasks: &[Task], all: &Recorded) -> Vec<Group> {
    let mut groups = Vec::new();
    for (t, task) in tasks.iter().enumerate() {
        // In the order of recording: the even texts, then the odd ones.
        let order = (0..2).flat_map(|first| task.items.iter().skip(first).step_by(2));
        let traces = all.trace.items.iter().zip(&all.tasks).filter(|x| *x.1 == t).map(|x| x.0);
        let (items, labels): (Vec<_>, Vec<bool>) =
            order.zip(traces).filter_map(|(item, trace)| Some((trace.clone(), label.of(item)?))).unzip();
        let mut group = Group { shares: Vec::new(), labels };
        if group.suffices() {
            group.shares = shares(&quorate_lens::RoutingTrace { items }, map, |_, _| true);
            groups.push(group);
        }
    }
    groups
}

/// Names of the flags of an expert.
fn flags(unit: usize, numbers: &Numbers, found: &[Found]) -> Vec<String> {
    let mut flags = Vec::new();
    if numbers.count[unit] == 0 {
        flags.push(page::NEVER.to_string());
    }
    flags.extend(found.iter().filter(|f| f.values[unit] >= f.bar).map(|f| f.name.clone()));
    if numbers.is_super[unit] {
        flags.push(page::SUPER.to_string());
    }
    flags
}

/// Each quantity in one half of the texts against the other.
fn stability([a, b]: &[Numbers; 2], report: &mut Report) {
    let lifts = |n: &Numbers| -> Vec<Option<f64>> { (0..n.of_task.len()).flat_map(|t| n.lifts(t)).collect() };
    let (lifts_a, lifts_b) = (lifts(a), lifts(b));
    let pairs = a.quantities().into_iter().zip(b.quantities()).map(|((name, a), (_, b))| (name, a, b));
    let about = "Spearman's correlation over experts (for lifts over experts and tasks) of the two halves of the texts";
    let table = report.table("stability", about, &["quantity", "correlation", "pairs"]);
    let mut headline = serde_json::Map::new();
    for (name, a, b) in pairs.chain([("task lift", lifts_a.as_slice(), lifts_b.as_slice())]) {
        let (x, y): (Vec<f64>, Vec<f64>) = a.iter().zip(b).filter_map(|(a, b)| Some(((*a)?, (*b)?))).unzip();
        let correlation = spearman(&x, &y);
        table.row([json!(name), json!(correlation), json!(x.len())]);
        headline.insert(name.to_string(), json!(correlation));
    }
    report.headline("stability_between_halves", headline);
}

fn maps(map: &ExpertMap, numbers: &Numbers, found: &[Found], names: &[String], report: &mut Report) {
    let abouts = [
        "share of all tokens that chose the expert",
        "entropy over tasks, each weighing the same, over ln(tasks): 0 serves one task, 1 all alike",
        "entropy in nats of the tokens that chose the expert",
        "mean norm of the output before the gate",
        "mean gate when chosen",
        "largest absolute value of an output before the gate",
    ];
    for ((name, values), about) in numbers.quantities().into_iter().zip(abouts) {
        report.map(name, about, map, &rounded(values), false);
    }
    for f in found {
        let about = format!("share of a text's tokens, class minus others; flagged from {:.3}", f.bar);
        let values: Vec<Option<f64>> = f.values.iter().map(|v| Some(*v)).collect();
        report.map(&format!("{} contrast", f.name), &about, map, &rounded(&values), true);
    }
    for (t, name) in names.iter().enumerate() {
        let about = "lift: P(expert | task) / P(expert)";
        report.map(&format!("task: {name}"), about, map, &rounded(&numbers.lifts(t)), false);
    }
}

/// Values with five significant digits, so that the documents of large models stay small.
fn rounded(values: &[Option<f64>]) -> Vec<Option<f64>> {
    values.iter().map(|v| v.map(round)).collect()
}

fn round(v: f64) -> f64 {
    format!("{v:.4e}").parse().unwrap_or(v)
}
