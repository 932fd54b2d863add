//! Core experts of retrieval: whose use tells whether the model knows an answer, whether a passage helps, whether it is read.
//!
//! *What it measures.* `act_e(q)`: share of the prompt's tokens that choose expert `e`. For prompts of two kinds
//! `delta_e = mean of act_e over D+ - mean over D-`; Core+ are the `n` largest, Core- the `n` smallest of all layers. A prompt's
//! score is `z(q) = sum over Core+ of act_e(q) - sum over Core- of act_e(q)`, its threshold that of the best balanced accuracy.
//! Scenarios: *cognizant* (answered right without a passage or not), *quality* (the passage answers the question or not),
//! *in-context* (the answer follows the passage or not). Half of the subjects set experts and thresholds, the others are judged.
//! *What it changes.* Below the cognizant threshold a question is asked with its passage; in-context experts' gates are
//! multiplied by `beta` in the prompt.
//! *Agreement with the paper.* Sets and flow are the paper's; `z`, the thresholds and the boost are reconstructed. Random experts
//! and permuted labels are ours.
//! *Limits.* `z` compares prompts of like wording and length; other templates need thresholds of their own.
//! *Reference.* arXiv 2410.15438.

use std::collections::BTreeMap;

use clap::Args;
use quorate_eval::evaluate::ItemScore;
use quorate_eval::statistics::{auc, deviation, mean, quantile};
use quorate_eval::tasks::TaskItem;
use quorate_lens::{ExpertMap, Op, PhaseSelector, matched_sets, on_experts};
use quorate_model::sampling::SplitMix64;
use quorate_model::{NoLens, Site};
use serde::Serialize;
use serde_json::{Value, json};

use crate::contrast::{self, Tokens, Weight, best_threshold};
use crate::{Card, Kind, Lab, MethodError, Report, Run};

/// The card of the core experts of retrieval.
pub const CARD: Card = Card {
    id: "core-experts",
    title: "Core experts of retrieval-augmented generation: when to retrieve, what to keep, how to read it",
    paper: "arXiv 2410.15438",
    year: 2024,
    kind: Kind::Steer,
    needs: "a MoE model; prompts with `meta.scenario` (cognizant, quality, in-context) and, unless the model's own answers \
            label them, `meta.label`",
    cost: "one forward pass over the prompts; two answers of each question; an evaluation for each control",
    metrics: &[],
    run: "quorate core-experts\nquorate core-experts --tokens last --beta 1.2\nquorate -m MODEL core-experts --tasks questions.jsonl --task mine -o out/",
    about: "Contrasts the use of experts between prompts of two kinds, scores new prompts by the experts found, and decides by \
            that whether to retrieve a passage; boosts the experts of reading.",
};

/// Parameters of the core experts.
#[derive(Args, Clone, Debug, Serialize)]
pub struct CoreExperts {
    /// The task whose prompts are the scenarios
    #[arg(long, default_value = "rag")]
    pub task: String,
    /// Which files of a folder hold them
    #[arg(long, default_value = "scenarios", value_name = "SPLIT")]
    pub split: String,
    /// Tokens whose experts count
    #[arg(long, value_enum, default_value_t = Tokens::Prompt)]
    pub tokens: Tokens,
    /// How much a choice counts
    #[arg(long, value_enum, default_value_t = Weight::Count)]
    pub weight: Weight,
    /// Divide each expert's use by its deviation over the calibration prompts
    #[arg(long)]
    pub standardise: bool,
    /// Share of all experts that is Core+, and as much Core-
    #[arg(long, default_value_t = 0.05, value_name = "SHARE")]
    pub share: f64,
    /// What the gates of in-context experts are multiplied by while the prompt is read
    #[arg(long, default_value_t = 1.6)]
    pub beta: f32,
    /// Random orders of the calibration labels to compare with
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub permutations: usize,
    /// Random sets of experts to compare the boost with
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub sets: usize,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 24, value_name = "N")]
    pub max_tokens: usize,
}

/// What kind of prompts are contrasted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Scenario {
    Cognizant,
    Quality,
    InContext,
}

impl Scenario {
    const ALL: [Scenario; 3] = [Scenario::Cognizant, Scenario::Quality, Scenario::InContext];

    fn name(self) -> &'static str {
        match self {
            Scenario::Cognizant => "cognizant",
            Scenario::Quality => "quality",
            Scenario::InContext => "in-context",
        }
    }
}

/// The prompts of a scenario, and what is known of them.
struct Prompts {
    items: Vec<TaskItem>,
    labels: Vec<bool>,
    /// Share of tokens that choose each expert, `[prompt][expert]`.
    acts: Vec<Vec<f64>>,
    /// Whether the prompt sets experts and threshold; the others are judged.
    calibration: Vec<bool>,
}

/// Experts and threshold of a scenario.
#[derive(Clone, Debug, PartialEq)]
struct Core {
    plus: Vec<usize>,
    minus: Vec<usize>,
    delta: Vec<f64>,
}

impl Core {
    /// The `n` experts with the largest and the `n` with the smallest contrast.
    fn of(acts: &[Vec<f64>], labels: &[bool], n: usize) -> Result<Core, MethodError> {
        let delta = contrast::difference(acts, labels)?;
        let negated: Vec<f64> = delta.iter().map(|d| -d).collect();
        Ok(Core { plus: contrast::top(&delta, n), minus: contrast::top(&negated, n), delta })
    }

    /// `z` of a prompt.
    fn score(&self, act: &[f64]) -> f64 {
        let sum = |units: &[usize]| units.iter().map(|&u| act[u]).sum::<f64>();
        sum(&self.plus) - sum(&self.minus)
    }
}

/// How well a scenario's score does on prompts that set neither experts nor threshold.
struct Judged {
    core: Core,
    threshold: f64,
    balanced_accuracy: f64,
    auc: f64,
    permuted: Vec<f64>,
}

impl Run for CoreExperts {
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        let map = lab.experts()?;
        let n = ((self.share * map.total() as f64).round() as usize).clamp(1, map.total() / 2);
        let items = self.items(lab)?;
        let calibration = calibration_groups(&items, lab.seed);
        let mut report = Report::default();
        let columns =
            ["scenario", "prompts", "positive", "held out", "auc", "permuted", "+-", "threshold", "balanced accuracy"];
        report.table("scenarios", "experts and thresholds from half of the subjects, judged on the others", &columns);
        let mut found = BTreeMap::new();
        for scenario in Scenario::ALL {
            let of: Vec<TaskItem> = items.iter().filter(|(s, _)| *s == scenario).map(|(_, i)| i.clone()).collect();
            if of.is_empty() {
                report.note(format!("no prompts of the scenario {}", scenario.name()));
                continue;
            }
            let prompts = self.prompts(lab, &map, of, &calibration)?;
            let judged = self.judge(&prompts, scenario, n, lab.seed)?;
            describe(&mut report, &map, scenario, &prompts, &judged);
            found.insert(scenario, (prompts, judged));
        }
        if let Some((prompts, judged)) = found.get(&Scenario::Cognizant) {
            self.retrieve(lab, prompts, judged, &mut report)?;
        }
        if let Some((prompts, judged)) = found.get(&Scenario::InContext) {
            let reading = found.get(&Scenario::Quality).map(|(p, _)| p);
            self.boost(lab, &map, (prompts, reading), &judged.core.plus, &mut report)?;
        }
        let lists: BTreeMap<&str, Value> =
            found.iter().map(|(s, (_, judged))| (s.name(), list_of(&map, judged))).collect();
        report.file("core.json", "core experts and thresholds of each scenario", format!("{:#}\n", json!(lists)));
        Ok(report)
    }
}

impl CoreExperts {
    /// The prompts with their scenarios.
    fn items(&self, lab: &mut Lab<'_>) -> Result<Vec<(Scenario, TaskItem)>, MethodError> {
        let items = lab.task(&self.split, &self.task)?.items;
        let scenario = |item: TaskItem| {
            let name = item.meta.get("scenario").and_then(Value::as_str).unwrap_or_default();
            let found = Scenario::ALL.into_iter().find(|s| s.name() == name).ok_or_else(|| {
                MethodError::needs(
                    format!("a prompt of `{}` is of the scenario `{name}`", self.task),
                    "give each prompt `meta.scenario`: cognizant, quality or in-context",
                )
            });
            Ok((found?, item))
        };
        items.into_iter().map(scenario).collect()
    }

    /// Labels the prompts, by `meta.label` or else by whether the model's answer is right, and records their experts.
    fn prompts(
        &self,
        lab: &mut Lab<'_>,
        map: &ExpertMap,
        items: Vec<TaskItem>,
        calibration: &BTreeMap<String, bool>,
    ) -> Result<Prompts, MethodError> {
        let given: Vec<Option<bool>> = items.iter().map(|i| i.meta.get("label").and_then(Value::as_bool)).collect();
        let unlabelled: Vec<&TaskItem> =
            items.iter().zip(&given).filter(|(_, g)| g.is_none()).map(|(i, _)| i).collect();
        let mut answers = self.right(lab, "answering, to label the prompts", &unlabelled, &[])?.into_iter();
        let labels = given.iter().map(|g| g.or_else(|| answers.next()).unwrap_or(false)).collect();
        let mut encoded = lab.encode(&items)?;
        encoded.iter_mut().for_each(|e| e.answer.clear());
        let mut acts = contrast::uses(&lab.trace(&encoded, false)?, map, self.tokens, self.weight);
        let calibration: Vec<bool> =
            items.iter().map(|i| calibration.get(group(i)).copied().unwrap_or(false)).collect();
        if self.standardise {
            standardise(&mut acts, &calibration);
        }
        Ok(Prompts { items, labels, acts, calibration })
    }

    /// Whether each item is answered rightly, with the gates of `experts` boosted while the prompt is read.
    fn right(
        &self,
        lab: &mut Lab<'_>,
        stage: &str,
        items: &[&TaskItem],
        experts: &[quorate_lens::ExpertId],
    ) -> Result<Vec<bool>, MethodError> {
        let boost = on_experts(experts, Site::Routing, PhaseSelector::Prefill, &Op::Scale { by: self.beta });
        let scores = if experts.is_empty() {
            lab.answer(stage, items, self.max_tokens, &mut NoLens)?
        } else {
            lab.answer(stage, items, self.max_tokens, &mut lab.prepare(&boost)?)?
        };
        Ok(scores.iter().map(|s| matches!(s, ItemScore::Exact { ok: true, .. })).collect())
    }

    fn judge(&self, prompts: &Prompts, scenario: Scenario, n: usize, seed: u64) -> Result<Judged, MethodError> {
        let (acts, mut labels) = prompts.part(true);
        let (held_acts, held_labels) = prompts.part(false);
        let auc_of = |core: &Core| auc_of(core, &held_acts, &held_labels).ok_or_else(|| one_class(scenario));
        let core = Core::of(&acts, &labels, n)?;
        let (high, low) = split_scores(&core, &acts, &labels);
        let (threshold, _) = best_threshold(&high, &low).ok_or_else(|| one_class(scenario))?;
        let (high, low) = split_scores(&core, &held_acts, &held_labels);
        let share =
            |z: &[f64], above: bool| mean(&z.iter().map(|&z| f64::from((z > threshold) == above)).collect::<Vec<_>>());
        let balanced_accuracy =
            mean(&[share(&high, true), share(&low, false)].into_iter().flatten().collect::<Vec<_>>());
        let mut random = SplitMix64::new(seed);
        let mut permuted = Vec::with_capacity(self.permutations);
        for _ in 0..self.permutations {
            random.shuffle(&mut labels);
            permuted.push(auc_of(&Core::of(&acts, &labels, n)?)?);
        }
        let auc = auc_of(&core)?;
        Ok(Judged { core, threshold, balanced_accuracy: balanced_accuracy.unwrap_or(f64::NAN), auc, permuted })
    }

    /// Accuracy when the questions of the lowest scores are asked with their passages.
    fn retrieve(
        &self,
        lab: &mut Lab<'_>,
        prompts: &Prompts,
        judged: &Judged,
        report: &mut Report,
    ) -> Result<(), MethodError> {
        let with_passage = |i: &usize| {
            let item = &prompts.items[*i];
            let prompt = item.meta.get("retrieved").and_then(Value::as_str)?;
            Some((*i, TaskItem { prompt: prompt.to_string(), ..item.clone() }))
        };
        let held = (0..prompts.items.len()).filter(|&i| !prompts.calibration[i]);
        let asked: Vec<(usize, TaskItem)> = held.collect::<Vec<_>>().iter().filter_map(with_passage).collect();
        if asked.is_empty() {
            report.note(
                "no cognizant prompt has `meta.retrieved`, the prompt with its passage: retrieval is not measured",
            );
            return Ok(());
        }
        let closed: Vec<TaskItem> = asked.iter().map(|(i, _)| prompts.items[*i].clone()).collect();
        let without = self.right(lab, "answering without passages", &closed.iter().collect::<Vec<_>>(), &[])?;
        let with =
            self.right(lab, "answering with passages", &asked.iter().map(|(_, t)| t).collect::<Vec<_>>(), &[])?;
        let z: Vec<f64> = asked.iter().map(|(i, _)| judged.core.score(&prompts.acts[*i])).collect();
        let curve = adaptive(&z, &without, &with);
        let (never, always) = (curve[0], curve[z.len()]);
        let random = |calls: usize| never + (always - never) * calls as f64 / z.len() as f64;
        let about = "accuracy when the questions of the lowest scores, or random ones, are asked with their passages";
        let table = report.table("retrieval", about, &["calls", "share of calls", "adaptive", "random"]);
        for tenth in 0..=10 {
            let calls = z.len() * tenth / 10;
            table.row([json!(calls), json!(tenth as f64 / 10.0), json!(curve[calls]), json!(random(calls))]);
        }
        let (half, calls) = (z.len() / 2, z.iter().filter(|&&z| z <= judged.threshold).count());
        report.headline("accuracy_never_retrieving", never);
        report.headline("accuracy_always_retrieving", always);
        report.headline("accuracy_at_half_of_the_calls", json!({ "adaptive": curve[half], "random": random(half) }));
        let saved = 1.0 - calls as f64 / z.len() as f64;
        report.headline("at_the_threshold", json!({ "accuracy": curve[calls], "calls_saved": saved }));
        let line = |k: usize| {
            let retrieved = z[k] <= judged.threshold;
            let right = if retrieved { with[k] } else { without[k] };
            json!({ "prompt": closed[k].prompt, "z": z[k], "retrieved": retrieved, "right": right }).to_string() + "\n"
        };
        report.file(
            "retrieval.jsonl",
            "each question: score, decision, outcome",
            (0..z.len()).map(line).collect::<String>(),
        );
        Ok(())
    }

    /// How many held-out answers follow the passage, and how many passages are read rightly, with in-context experts
    /// boosted and with random ones.
    fn boost(
        &self,
        lab: &mut Lab<'_>,
        map: &ExpertMap,
        (prompts, reading): (&Prompts, Option<&Prompts>),
        units: &[usize],
        report: &mut Report,
    ) -> Result<(), MethodError> {
        let held = |p: &'_ Prompts, of: &dyn Fn(usize) -> bool| -> Vec<TaskItem> {
            let chosen = (0..p.items.len()).filter(|&i| !p.calibration[i] && of(i));
            chosen.map(|i| p.items[i].clone()).collect()
        };
        let items = held(prompts, &|_| true);
        let helpful = reading.map(|p| held(p, &|i| p.labels[i])).unwrap_or_default();
        let rate = |lab: &mut Lab<'_>, stage: &str, items: &[TaskItem], units: &[usize]| {
            let right = self.right(lab, stage, &items.iter().collect::<Vec<_>>(), &map.ids(units))?;
            Ok::<_, MethodError>(mean(&right.into_iter().map(f64::from).collect::<Vec<_>>()))
        };
        let stage = "boosting in-context experts";
        let (before, after) = (rate(lab, stage, &items, &[])?, rate(lab, stage, &items, units)?);
        let sets = matched_sets(map, &contrast::totals(&prompts.acts), units, 8, self.sets, lab.seed)?;
        let mut random = Vec::with_capacity(sets.len());
        for (i, set) in sets.iter().enumerate() {
            lab.part = (i, sets.len());
            random.extend(rate(lab, "boosting random experts", &items, set)?);
        }
        lab.part = (0, 1);
        let controls = json!({ "mean": mean(&random), "p5": quantile(&random, 0.05), "p95": quantile(&random, 0.95) });
        let follows = json!({ "before": before, "after": after, "random": controls });
        report.headline("answers_that_follow_the_passage", follows);
        if !helpful.is_empty() {
            let (before, after) = (rate(lab, stage, &helpful, &[])?, rate(lab, stage, &helpful, units)?);
            report.headline("accuracy_with_relevant_passages", json!({ "before": before, "after": after }));
        }
        let boost = on_experts(&map.ids(units), Site::Routing, PhaseSelector::Prefill, &Op::Scale { by: self.beta });
        report.file("boost.toml", "the boost of in-context experts, as a plan", lab.plan(boost)?);
        Ok(())
    }
}

impl Prompts {
    /// Acts and labels of the prompts that are, or are not, of the calibration half.
    fn part(&self, calibration: bool) -> (Vec<Vec<f64>>, Vec<bool>) {
        let chosen = (0..self.items.len()).filter(|&i| self.calibration[i] == calibration);
        chosen.map(|i| (self.acts[i].clone(), self.labels[i])).unzip()
    }
}

/// What a prompt is about; prompts without a group stand alone.
fn group(item: &TaskItem) -> &str {
    item.meta.get("group").and_then(Value::as_str).unwrap_or(&item.prompt)
}

/// Half of the groups, drawn at random: `true` for calibration.
fn calibration_groups(items: &[(Scenario, TaskItem)], seed: u64) -> BTreeMap<String, bool> {
    let mut names: Vec<&str> = items.iter().map(|(_, item)| group(item)).collect();
    names.sort_unstable();
    names.dedup();
    SplitMix64::new(seed).shuffle(&mut names);
    let half = names.len() / 2;
    names.into_iter().enumerate().map(|(i, name)| (name.to_string(), i < half)).collect()
}

/// Divides each expert's use by its deviation over the calibration prompts; 0 where it does not vary.
fn standardise(acts: &mut [Vec<f64>], calibration: &[bool]) {
    for unit in 0..acts.first().map_or(0, Vec::len) {
        let values: Vec<f64> = acts.iter().zip(calibration).filter(|(_, c)| **c).map(|(a, _)| a[unit]).collect();
        let scale = deviation(&values).filter(|&d| d > 0.0).map_or(0.0, |d| 1.0 / d);
        acts.iter_mut().for_each(|a| a[unit] *= scale);
    }
}

fn one_class(scenario: Scenario) -> MethodError {
    MethodError::needs(
        format!("the {} prompts of one half are all of one kind", scenario.name()),
        "give more prompts of both kinds, or labels in `meta.label`",
    )
}

/// Scores of the prompts of the first and of the second kind.
fn split_scores(core: &Core, acts: &[Vec<f64>], labels: &[bool]) -> (Vec<f64>, Vec<f64>) {
    let of = |kind: bool| acts.iter().zip(labels).filter(|(_, l)| **l == kind).map(|(a, _)| core.score(a)).collect();
    (of(true), of(false))
}

fn auc_of(core: &Core, acts: &[Vec<f64>], labels: &[bool]) -> Option<f64> {
    let (high, low) = split_scores(core, acts, labels);
    auc(&high, &low)
}

/// Accuracy with 0, 1, .. passages, given to the questions of the lowest scores first; ties in the order given.
fn adaptive(z: &[f64], without: &[bool], with: &[bool]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..z.len()).collect();
    order.sort_by(|&a, &b| z[a].total_cmp(&z[b]));
    let mut right = without.iter().filter(|&&ok| ok).count() as f64;
    let mut curve = vec![right / z.len() as f64];
    for i in order {
        right += f64::from(with[i]) - f64::from(without[i]);
        curve.push(right / z.len() as f64);
    }
    curve
}

fn list_of(map: &ExpertMap, judged: &Judged) -> Value {
    let names = |units: &[usize]| units.iter().map(|&u| map.id(u).to_string()).collect::<Vec<_>>();
    json!({ "plus": names(&judged.core.plus), "minus": names(&judged.core.minus), "threshold": judged.threshold })
}

fn describe(report: &mut Report, map: &ExpertMap, scenario: Scenario, prompts: &Prompts, judged: &Judged) {
    let positive = prompts.labels.iter().filter(|&&l| l).count();
    let held = prompts.calibration.iter().filter(|&&c| !c).count();
    let permuted = mean(&judged.permuted);
    report.headline(
        &format!("auc_{}", scenario.name().replace('-', "_")),
        json!({ "held_out": judged.auc, "permuted": permuted }),
    );
    report.tables[0].row([
        json!(scenario.name()),
        json!(prompts.items.len()),
        json!(positive),
        json!(held),
        json!(judged.auc),
        json!(permuted),
        json!(deviation(&judged.permuted)),
        json!(judged.threshold),
        json!(judged.balanced_accuracy),
    ]);
    let about = "share of the tokens that choose the expert, prompts of the first kind minus prompts of the second";
    report.map(&format!("delta {}", scenario.name()), about, map, &judged.core.delta, true);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_score_adds_core_plus_and_subtracts_core_minus() {
        // Expert 1 marks the first kind, expert 2 the second, 0 and 3 neither.
        let act = |kind: bool| if kind { vec![0.5, 0.4, 0.1, 0.2] } else { vec![0.5, 0.1, 0.4, 0.2] };
        let labels: Vec<bool> = (0..12).map(|i| i % 3 == 0).chain([true; 3]).collect();
        let acts: Vec<Vec<f64>> = labels.iter().map(|&l| act(l)).collect();
        let core = Core::of(&acts, &labels, 1).unwrap();
        assert_eq!((core.plus.as_slice(), core.minus.as_slice()), (&[1][..], &[2][..]));
        assert!((core.score(&act(true)) - 0.3).abs() < 1e-12 && (core.score(&act(false)) + 0.3).abs() < 1e-12);
        assert_eq!(auc_of(&core, &acts, &labels), Some(1.0));
    }

    #[test]
    fn passages_go_to_the_lowest_scores_first() {
        let curve = adaptive(&[2.0, -1.0, 0.5, 3.0], &[true, false, false, true], &[true, true, true, false]);
        assert_eq!(curve, [0.5, 0.75, 1.0, 1.0, 0.75]);
    }

    #[test]
    fn all_prompts_of_a_subject_are_on_one_side() {
        let item = |subject: &str| TaskItem {
            task: "t".into(),
            prompt: "p".into(),
            answer: "a".into(),
            choices: None,
            meta: [("group".to_string(), json!(subject))].into_iter().collect(),
        };
        let items: Vec<_> = ["a", "b", "a", "c", "d"].map(|s| (Scenario::Quality, item(s))).into();
        let halves = calibration_groups(&items, 3);
        assert_eq!((halves.len(), halves.values().filter(|&&c| c).count()), (4, 2));
    }
}
