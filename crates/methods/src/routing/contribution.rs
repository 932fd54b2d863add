//! Expert contributions on quiz tasks: which experts fire where the answer is decided, how flat the gate is there, and how
//! often the items were answered rightly on which an expert fired.
//!
//! *What it measures*, at the last prompt token of each item (the one that predicts the answer):
//! - use: items that chose each expert; share of experts never used, there and over the whole prompt;
//! - flatness: entropy of the router's distribution over all experts against `ln E`;
//! - contribution: `acc[l, i]` = mean correctness of the items that chose expert `i`, with Wilson's interval; the spread of a
//!   layer is its largest minus its smallest over experts with enough items.
//!
//! *Control.* Correctness shuffled over the items: a spread is real if it exceeds the 95th percentile of the shuffled ones.
//! A task that is both easy and routed to an expert makes a spread without the expert doing anything, so the spread is
//! repeated within groups: correctness minus the group's mean, shuffled within groups.
//! *Agreement with the paper.* It has no code; position and weighting are read from its text. It has neither interval nor
//! test nor groups. Where an item has choices, the model's answer is the one of the largest likelihood (summed over its
//! tokens, so choices should be equally long, as letters are); else it is the greedy answer, to be matched exactly.
//! *Limits.* An association, not an effect: nothing is switched off here.
//! *Reference.* arXiv 2502.17187.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use clap::Args;
use quorate_eval::encode::is_language_modelling;
use quorate_eval::evaluate::ItemScore;
use quorate_eval::statistics::{mean, spearman, wilson};
use quorate_eval::tasks::TaskItem;
use quorate_lens::{ExpertMap, ItemTrace, RoutingTrace};
use quorate_model::{NO_EXPERT, NoLens};
use serde::Serialize;
use serde_json::json;

use super::spread::{Fired, Shuffling, centred, sums};
use super::{Rows, record, used_share};
use crate::{Card, Kind, Lab, MethodError, Report, Run};

/// The card of expert contributions.
pub const CARD: Card = Card {
    id: "contribution",
    title: "Expert contributions on quiz tasks (MMLU)",
    paper: "arXiv 2502.17187",
    year: 2025,
    kind: Kind::Analysis,
    needs: "a MoE model; items with a right answer, some of which it gets wrong; best with `choices`",
    cost: "answering the items, and one forward pass over their prompts",
    metrics: &[],
    run: "quorate contribution\nquorate contribution --task code --limit 200\nquorate contribution -m MODEL --tasks mmlu.jsonl --group subject -o out/",
    about: "Accuracy of the items on which an expert fired at the answer's position, with intervals, the spread within each \
            layer against shuffled correctness, over all items and within groups of items; share of experts used and \
            entropy of the gate there.",
};

/// Parameters of expert contributions.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Contribution {
    /// The tasks whose items are answered, separated by commas; left out, all with a right answer
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub task: Vec<String>,
    /// Field of the items' `meta` that names their group; left out, the task is the group
    #[arg(long, value_name = "FIELD")]
    pub group: Option<String>,
    /// An expert fired if any token of the prompt chose it, not just the last
    #[arg(long)]
    pub all_tokens: bool,
    /// Fewest items of an expert that counts in a spread
    #[arg(long, default_value_t = 30, value_name = "N")]
    pub least: usize,
    /// How often correctness is shuffled
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub permutations: usize,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 96, value_name = "N")]
    pub max_tokens: usize,
}

/// Fewest items, and fewest of right and of wrong ones.
const ITEMS_MIN: usize = 20;
const CLASS_MIN: usize = 5;

impl Run for Contribution {
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        let map = lab.experts()?;
        let items = self.items(lab)?;
        let groups = self.groups(&items)?;
        let correct = self.correctness(lab, &items)?;
        let right = correct.iter().filter(|&&c| c > 0.5).count();
        if items.len() < ITEMS_MIN || right.min(items.len() - right) < CLASS_MIN {
            let what = format!(
                "{right} of {} items were answered rightly; {ITEMS_MIN} items are needed, and {CLASS_MIN} of each kind",
                items.len()
            );
            return Err(MethodError::needs(what, "give more items, harder or easier ones"));
        }
        let mut prompts = lab.encode(&items)?;
        prompts.iter_mut().for_each(|p| p.answer.clear());
        let (trace, entropies) = record(lab, &prompts, Rows::Last)?;
        let rows = if self.all_tokens { Rows::Prompt } else { Rows::Last };
        let fired = fired(&trace, &map, rows);

        let mut report = Report::default();
        report.headline("items", items.len());
        report.headline("accuracy", mean(&correct));
        use_tables(&map, &trace, &entropies, &mut report);
        self.contributions(&map, &fired, &correct, &mut report);
        self.spreads(&map, &fired, &correct, &groups, lab.seed, &mut report);
        report.note("random: correctness shuffled over the items; within groups, shuffled within each group");
        Ok(report)
    }
}

impl Contribution {
    /// The items with a right answer.
    fn items(&self, lab: &mut Lab<'_>) -> Result<Vec<TaskItem>, MethodError> {
        let tasks = if self.task.is_empty() {
            lab.tasks("test")?
        } else {
            self.task.iter().map(|name| lab.task("test", name)).collect::<Result<Vec<_>, _>>()?
        };
        let all = tasks.into_iter().flat_map(|t| t.items);
        let items: Vec<TaskItem> = all.filter(|i| i.choices.is_some() || !is_language_modelling(i)).collect();
        if items.is_empty() {
            let what = "the tasks are plain text: there is no right answer";
            return Err(MethodError::needs(what, "give items with an `answer`, best also with `choices`"));
        }
        Ok(items)
    }

    /// The group of each item, numbered, and the groups' names.
    fn groups(&self, items: &[TaskItem]) -> Result<(Vec<usize>, Vec<String>), MethodError> {
        let mut names: Vec<String> = Vec::new();
        let mut numbers = Vec::with_capacity(items.len());
        for item in items {
            let name = match &self.group {
                None => item.task.clone(),
                Some(field) => match item.meta.get(field) {
                    Some(serde_json::Value::String(text)) => text.clone(),
                    Some(value) => value.to_string(),
                    None => {
                        let what = format!("an item of task `{}` has no `{field}` in its meta", item.task);
                        return Err(MethodError::needs(what, "name a field that all items have, or leave --group out"));
                    }
                },
            };
            numbers.push(names.iter().position(|n| *n == name).unwrap_or_else(|| {
                names.push(name);
                names.len() - 1
            }));
        }
        Ok((numbers, names))
    }

    /// 1 for each item that is answered rightly, else 0.
    fn correctness(&self, lab: &mut Lab<'_>, items: &[TaskItem]) -> Result<Vec<f64>, MethodError> {
        let (choosing, open): (Vec<usize>, Vec<usize>) = (0..items.len()).partition(|&i| items[i].choices.is_some());
        let mut correct = vec![0.0; items.len()];
        let questions: Vec<&TaskItem> = open.iter().map(|&i| &items[i]).collect();
        if !questions.is_empty() {
            let scores = lab.answer("answering", &questions, self.max_tokens, &mut NoLens)?;
            for (&i, score) in open.iter().zip(&scores) {
                correct[i] = f64::from(u8::from(matches!(score, ItemScore::Exact { ok: true, .. })));
            }
        }
        let mut options = Vec::new();
        for &i in &choosing {
            options.extend(options_of(&items[i])?);
        }
        let options = lab.encode(&options)?;
        let scores = match options.is_empty() {
            true => Vec::new(),
            false => lab.losses("scoring the choices", &options, &mut NoLens)?,
        };
        let mut scores = scores.into_iter();
        for &i in &choosing {
            let choices = items[i].choices.as_deref().unwrap_or_default();
            let losses: Vec<f64> = scores.by_ref().take(choices.len()).map(|s| nats(&s)).collect();
            let best = (0..losses.len()).min_by(|&a, &b| losses[a].total_cmp(&losses[b]));
            correct[i] = f64::from(u8::from(best.is_some_and(|b| choices[b] == items[i].answer)));
        }
        Ok(correct)
    }

    fn contributions(&self, map: &ExpertMap, fired: &Fired, correct: &[f64], report: &mut Report) {
        let sums = sums(map.total(), fired, correct);
        let about = "accuracy of the items on which the expert fired, 95 % interval; weighted: by the gate";
        let mut accuracies = vec![None; map.total()];
        let mut rows = vec![None; map.total()];
        let mut csv = "expert,items,accuracy,low,high,weighted\n".to_string();
        for (unit, s) in sums.iter().enumerate().filter(|(_, s)| s.items > 0.0) {
            let (accuracy, (low, high)) = (s.values / s.items, wilson(s.values, s.items, 1.96));
            let weighted = if s.gates > 0.0 { s.gate_values / s.gates } else { accuracy };
            csv += &format!("{},{},{accuracy},{low},{high},{weighted}\n", map.id(unit), s.items);
            accuracies[unit] = Some(accuracy);
            rows[unit] = Some([s.items, accuracy, low, high, weighted]);
        }
        let columns = ["expert", "items", "accuracy", "low", "high", "weighted"];
        let shown = format!("highest and lowest of each layer, of {} items or more: {about}", self.least);
        let table = report.table("contributions", &shown, &columns);
        for moe in 0..map.n_layers() {
            let counted = map.range(moe).filter(|&u| sums[u].items >= self.least.max(1) as f64);
            let mut counted: Vec<usize> = counted.collect();
            counted.sort_by(|&a, &b| accuracies[b].partial_cmp(&accuracies[a]).unwrap_or(Ordering::Equal));
            let last = counted.len().saturating_sub(1);
            for (_, &unit) in counted.iter().enumerate().filter(|(i, _)| *i == 0 || *i == last) {
                let numbers = rows[unit].iter().flatten().map(|v| json!(v));
                table.row(std::iter::once(json!(map.id(unit).to_string())).chain(numbers).collect::<Vec<_>>());
            }
        }
        report.file("contributions.csv", "accuracy of every expert's items with its interval", csv);
        report.map("accuracy", about, map, &accuracies, false);
        let items: Vec<f64> = sums.iter().map(|s| s.items).collect();
        report.map("items", "items on which the expert fired", map, &items, false);
    }

    /// Spreads of each layer, over all items and within groups; and of each group by itself.
    fn spreads(
        &self,
        map: &ExpertMap,
        fired: &Fired,
        correct: &[f64],
        (groups, names): &(Vec<usize>, Vec<String>),
        seed: u64,
        report: &mut Report,
    ) {
        let shuffling = Shuffling { least: self.least, times: self.permutations, seed };
        let one = vec![0; correct.len()];
        let all = shuffling.test(map, fired, correct, &one);
        let within = shuffling.test(map, fired, &centred(correct, groups), groups);
        let about = format!(
            "largest minus smallest accuracy of experts with {} items or more; p95: of {} shufflings",
            self.least, self.permutations
        );
        let columns =
            ["layer", "experts", "spread", "random p95", "p", "within groups", "within random p95", "within p"];
        let table = report.table("spread", &about, &columns);
        let counted = |moe: usize| all.counted[map.range(moe)].iter().filter(|&&c| c).count();
        for (moe, &layer) in map.layers.iter().enumerate() {
            let mut cells = vec![json!(layer), json!(counted(moe))];
            for test in [&all, &within] {
                cells.extend([json!(test.spread[moe]), json!(test.p95[moe]), json!(test.p[moe])]);
            }
            table.row(cells);
        }
        for (name, test) in [("spread", &all), ("spread_within_groups", &within)] {
            let real = test.spread.iter().zip(&test.p95).filter(|(s, p)| matches!((s, p), (Some(s), Some(p)) if s > p));
            let of = |v: &[Option<f64>]| mean(&v.iter().flatten().copied().collect::<Vec<_>>());
            let line = json!({ "own": of(&test.spread), "random_p95": of(&test.p95), "layers_above": real.count() });
            report.headline(name, line);
        }
        group_table(map, fired, correct, groups, names, &shuffling, report);
    }
}

/// The spread of each group by itself.
fn group_table(
    map: &ExpertMap,
    fired: &Fired,
    correct: &[f64],
    groups: &[usize],
    names: &[String],
    shuffling: &Shuffling,
    report: &mut Report,
) {
    let about = "each group by itself: mean spread over layers that have experts with enough items";
    let table = report.table("groups", about, &["group", "items", "accuracy", "layers", "spread", "random p95"]);
    for (number, name) in names.iter().enumerate() {
        let of: Vec<usize> = (0..groups.len()).filter(|&i| groups[i] == number).collect();
        let fired: Fired = of.iter().map(|&i| fired[i].clone()).collect();
        let correct: Vec<f64> = of.iter().map(|&i| correct[i]).collect();
        let test = shuffling.test(map, &fired, &correct, &vec![0; of.len()]);
        let spreads: Vec<f64> = test.spread.iter().flatten().copied().collect();
        let p95: Vec<f64> = test.p95.iter().flatten().copied().collect();
        let cells = [json!(name), json!(of.len()), json!(mean(&correct)), json!(spreads.len())];
        table.row([&cells[..], &[json!(mean(&spreads)), json!(mean(&p95))]].concat());
    }
}

/// The experts that each item's counted tokens chose.
fn fired(trace: &RoutingTrace, map: &ExpertMap, rows: Rows) -> Fired {
    let of_item = |item: &ItemTrace| {
        let mut gates: BTreeMap<usize, f64> = BTreeMap::new();
        for (moe, layer) in item.layers.iter().enumerate() {
            for t in (0..item.tokens.len()).filter(|&t| rows.contains(item.phases[t])) {
                let slots = t * layer.k..(t + 1) * layer.k;
                for (&id, &gate) in layer.ids[slots.clone()].iter().zip(&layer.gates[slots]) {
                    if id != NO_EXPERT {
                        let most = gates.entry(map.range(moe).start + id as usize).or_default();
                        *most = most.max(f64::from(gate));
                    }
                }
            }
        }
        gates.into_iter().collect()
    };
    trace.items.iter().map(of_item).collect()
}

/// The item once with each of its choices as answer.
fn options_of(item: &TaskItem) -> Result<Vec<TaskItem>, MethodError> {
    let choices = item.choices.as_deref().unwrap_or_default();
    if !choices.contains(&item.answer) {
        let what = format!("the answer `{}` of an item of task `{}` is none of its choices", item.answer, item.task);
        return Err(MethodError::needs(what, "`answer` must be one of `choices`, letter by letter"));
    }
    let option = |answer: &String| TaskItem { answer: answer.clone(), meta: serde_json::Map::new(), ..item.clone() };
    Ok(choices.iter().map(option).collect())
}

fn nats(score: &ItemScore) -> f64 {
    match score {
        ItemScore::Text { nll, .. } => *nll,
        ItemScore::Exact { .. } => f64::INFINITY,
    }
}

/// Use and entropy of each layer where the answer is decided, beside use over the prompt.
fn use_tables(map: &ExpertMap, trace: &RoutingTrace, entropies: &[f64], report: &mut Report) {
    let counts = |rows: Rows| {
        let mut totals = vec![0; map.total()];
        for item in &trace.items {
            totals.iter_mut().zip(item.counts(map, |_, p| rows.contains(p))).for_each(|(a, b)| *a += b);
        }
        totals
    };
    let (last, prompt) = (counts(Rows::Last), counts(Rows::Prompt));
    let about = "share of experts used and entropy of the router's distribution (nats) at the last prompt token";
    let columns = ["layer", "used", "used over the prompt", "entropy", "ln E"];
    let table = report.table("use", about, &columns);
    let mut flat = Vec::new();
    for (moe, &layer) in map.layers.iter().enumerate() {
        let full = (map.experts[moe] as f64).ln();
        flat.push(entropies[moe] / full);
        let used = [&last, &prompt].map(|c| json!(used_share(&c[map.range(moe)])));
        table.row([json!(layer), used[0].clone(), used[1].clone(), json!(entropies[moe]), json!(full)]);
    }
    let depths: Vec<f64> = (0..flat.len()).map(|m| m as f64).collect();
    report.headline("used_share", json!({ "last_token": used_share(&last), "prompt": used_share(&prompt) }));
    report.headline("entropy_over_ln_experts", mean(&flat));
    report.headline("entropy_rank_correlation_with_depth", spearman(&depths, &flat));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_must_be_a_choice_and_thinking_is_not_scored() {
        let mut item = TaskItem {
            task: "quiz".into(),
            prompt: "?".into(),
            answer: "B".into(),
            choices: Some(vec!["A".into(), "B".into()]),
            meta: serde_json::Map::from_iter([("completion".to_string(), json!("<think>x</think>B"))]),
        };
        let options = options_of(&item).unwrap();
        assert_eq!(options.iter().map(quorate_eval::encode::full_answer).collect::<Vec<_>>(), ["A", "B"]);
        item.answer = "b".into();
        assert!(options_of(&item).unwrap_err().to_string().contains("none of its choices"));
    }
}
