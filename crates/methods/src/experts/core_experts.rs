//! Core experts of retrieval: whose use tells whether the model knows an answer, whether a passage helps, whether it is read.
//!
//! *What it measures.* `act_e(q)`: share of the prompt's tokens that choose expert `e`. For prompts of two kinds
//! `delta_e = mean of act_e over D+ - mean over D-`; Core+ are the `n` largest, Core- the `n` smallest of all layers. A prompt's
//! score is `z(q) = sum over Core+ of act_e(q) - sum over Core- of act_e(q)`, its threshold that of the best balanced accuracy.
//! Scenarios: *cognizant* (answered right without a passage or not), *quality* (the passage answers the question or not),
//! *in-context* (the answer follows the passage or not). Half of the subjects set experts and thresholds,
//! the others are judged; means over several random halves, since one half may be lucky.
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
    /// Share of all experts that is Core+, and as much Core-
    #[arg(long, default_value_t = 0.05, value_name = "SHARE")]
    pub share: f64,
    /// What the gates of in-context experts are multiplied by while the prompt is read
    #[arg(long, default_value_t = 1.6)]
    pub beta: f32,
    /// Random halves of the subjects over which scores are averaged; lists, thresholds and the boost are those of the first
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub splits: u32,
    /// Random orders of the calibration labels of each half to compare with
    #[arg(long, default_value_t = 50, value_name = "N")]
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
    /// Whether the prompt sets experts and threshold (the others are judged), `[split][prompt]`.
    splits: Vec<Vec<bool>>,
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
        let seed = lab.seed;
        let splits: Vec<_> =
            (0..u64::from(self.splits)).map(|i| calibration_groups(&items, seed.wrapping_add(i))).collect();
        let mut report = Report::default();
        let columns = [
            "scenario",
            "prompts",
            "positive",
            "auc",
            "+-",
            "permuted",
            "permuted +-",
            "balanced accuracy",
            "threshold",
        ];
        let about =
            "experts and thresholds from half of the subjects, judged on the others; mean and deviation over halves";
        report.table("scenarios", about, &columns);
        let mut found = BTreeMap::new();
        for scenario in Scenario::ALL {
            let of: Vec<TaskItem> = items.iter().filter(|(s, _)| *s == scenario).map(|(_, i)| i.clone()).collect();
            if of.is_empty() {
                report.note(format!("no prompts of the scenario {}", scenario.name()));
                continue;
            }
            let prompts = self.prompts(lab, &map, of, &splits)?;
            let judge = |split| self.judge(&prompts, scenario, n, split, seed);
            let judged: Vec<Judged> = (0..splits.len()).map(judge).collect::<Result<_, _>>()?;
            describe(&mut report, &map, scenario, &prompts, &judged);
            found.insert(scenario, (prompts, judged));
        }
        if let Some((prompts, judged)) = found.get(&Scenario::Cognizant) {
            self.retrieve(lab, prompts, judged, &mut report)?;
        }
        if let Some((prompts, judged)) = found.get(&Scenario::InContext) {
            let reading = found.get(&Scenario::Quality).map(|(p, _)| p);
            self.boost(lab, &map, (prompts, reading), &judged[0].core.plus, &mut report)?;
        }
        let lists: BTreeMap<&str, Value> =
            found.iter().map(|(s, (_, judged))| (s.name(), list_of(&map, &judged[0]))).collect();
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
        splits: &[BTreeMap<String, bool>],
    ) -> Result<Prompts, MethodError> {
        let given: Vec<Option<bool>> = items.iter().map(|i| i.meta.get("label").and_then(Value::as_bool)).collect();
        let unlabelled: Vec<&TaskItem> =
            items.iter().zip(&given).filter(|(_, g)| g.is_none()).map(|(i, _)| i).collect();
        let mut answers = self.right(lab, "answering, to label the prompts", &unlabelled, &[])?.into_iter();
        let labels = given.iter().map(|g| g.or_else(|| answers.next()).unwrap_or(false)).collect();
        let mut encoded = lab.encode(&items)?;
        encoded.iter_mut().for_each(|e| e.answer.clear());
        let acts = contrast::uses(&lab.trace(&encoded, false)?, map, self.tokens, self.weight);
        let of = |split: &BTreeMap<String, bool>| {
            items.iter().map(|i| split.get(group(i)).copied().unwrap_or(false)).collect()
        };
        let splits = splits.iter().map(of).collect();
        Ok(Prompts { items, labels, acts, splits })
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

    /// Experts and threshold from one half of a split, judged on the other.
    fn judge(
        &self,
        prompts: &Prompts,
        scenario: Scenario,
        n: usize,
        split: usize,
        seed: u64,
    ) -> Result<Judged, MethodError> {
        let (acts, mut labels) = prompts.part(split, true);
        let (held_acts, held_labels) = prompts.part(split, false);
        let auc_of = |core: &Core| auc_of(core, &held_acts, &held_labels).ok_or_else(|| one_class(scenario));
        let core = Core::of(&acts, &labels, n)?;
        let (high, low) = split_scores(&core, &acts, &labels);
        let (threshold, _) = best_threshold(&high, &low).ok_or_else(|| one_class(scenario))?;
        let (high, low) = split_scores(&core, &held_acts, &held_labels);
        let share =
            |z: &[f64], above: bool| mean(&z.iter().map(|&z| f64::from((z > threshold) == above)).collect::<Vec<_>>());
        let balanced_accuracy =
            mean(&[share(&high, true), share(&low, false)].into_iter().flatten().collect::<Vec<_>>());
        let mut random = SplitMix64::new(seed.wrapping_add(split as u64));
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
        judged: &[Judged],
        report: &mut Report,
    ) -> Result<(), MethodError> {
        let with_passage = |i: usize| {
            let item = &prompts.items[i];
            let prompt = item.meta.get("retrieved").and_then(Value::as_str)?;
            Some((i, TaskItem { prompt: prompt.to_string(), ..item.clone() }))
        };
        let asked: Vec<(usize, TaskItem)> = (0..prompts.items.len()).filter_map(with_passage).collect();
        if asked.is_empty() {
            report.note(
                "no cognizant prompt has `meta.retrieved`, the prompt with its passage: retrieval is not measured",
            );
            return Ok(());
        }
        let closed: Vec<&TaskItem> = asked.iter().map(|(i, _)| &prompts.items[*i]).collect();
        let open: Vec<&TaskItem> = asked.iter().map(|(_, item)| item).collect();
        let without = self.right(lab, "answering without passages", &closed, &[])?;
        let with = self.right(lab, "answering with passages", &open, &[])?;
        let mut decisions = Vec::new();
        for (split, judged) in judged.iter().enumerate() {
            let held: Vec<usize> = (0..asked.len()).filter(|&k| !prompts.splits[split][asked[k].0]).collect();
            if held.is_empty() {
                continue;
            }
            decisions.push(Decisions {
                z: held.iter().map(|&k| judged.core.score(&prompts.acts[asked[k].0])).collect(),
                without: held.iter().map(|&k| without[k]).collect(),
                with: held.iter().map(|&k| with[k]).collect(),
                threshold: judged.threshold,
                held,
            });
        }
        if let Some(first) = decisions.first() {
            let lines = first.lines(&closed);
            report.file("retrieval.jsonl", "each question of the first half judged: score, decision, outcome", lines);
        }
        retrieval_of(&decisions, report);
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
            let chosen = (0..p.items.len()).filter(|&i| !p.splits[0][i] && of(i));
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
    /// Acts and labels of the prompts that are, or are not, of the calibration half of a split.
    fn part(&self, split: usize, calibration: bool) -> (Vec<Vec<f64>>, Vec<bool>) {
        let chosen = (0..self.items.len()).filter(|&i| self.splits[split][i] == calibration);
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

/// The held-out questions of a split: scores, and whether they are answered right without and with their passages.
struct Decisions {
    held: Vec<usize>,
    z: Vec<f64>,
    without: Vec<bool>,
    with: Vec<bool>,
    threshold: f64,
}

impl Decisions {
    fn lines(&self, asked: &[&TaskItem]) -> String {
        let line = |(k, &i): (usize, &usize)| {
            let retrieved = self.z[k] <= self.threshold;
            let right = if retrieved { self.with[k] } else { self.without[k] };
            let prompt = &asked[i].prompt;
            json!({ "prompt": prompt, "z": self.z[k], "retrieved": retrieved, "right": right }).to_string() + "\n"
        };
        self.held.iter().enumerate().map(line).collect()
    }
}

/// Accuracy by share of calls, mean over splits.
fn retrieval_of(decisions: &[Decisions], report: &mut Report) {
    let curves: Vec<Vec<f64>> = decisions.iter().map(|d| adaptive(&d.z, &d.without, &d.with)).collect();
    let over = |of: &dyn Fn(usize) -> f64| mean(&(0..curves.len()).map(of).collect::<Vec<_>>());
    let at = |share: f64| over(&|s| curves[s][((curves[s].len() - 1) as f64 * share) as usize]);
    let random = |share: f64| over(&|s| curves[s][0] + (curves[s][curves[s].len() - 1] - curves[s][0]) * share);
    let about = "accuracy when the questions of the lowest scores, or random ones, are asked with their passages";
    let table = report.table("retrieval", about, &["share of calls", "adaptive", "random"]);
    for tenth in 0..=10 {
        let share = f64::from(tenth) / 10.0;
        table.row([json!(share), json!(at(share)), json!(random(share))]);
    }
    let calls = |s: usize| decisions[s].z.iter().filter(|&&z| z <= decisions[s].threshold).count();
    let saved = over(&|s| 1.0 - calls(s) as f64 / decisions[s].z.len() as f64);
    report.headline("accuracy_never_retrieving", at(0.0));
    report.headline("accuracy_always_retrieving", at(1.0));
    report.headline("accuracy_at_half_of_the_calls", json!({ "adaptive": at(0.5), "random": random(0.5) }));
    let accuracy = over(&|s| curves[s][calls(s)]);
    report.headline("at_the_threshold", json!({ "accuracy": accuracy, "calls_saved": saved }));
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

fn describe(report: &mut Report, map: &ExpertMap, scenario: Scenario, prompts: &Prompts, judged: &[Judged]) {
    let positive = prompts.labels.iter().filter(|&&l| l).count();
    let aucs: Vec<f64> = judged.iter().map(|j| j.auc).collect();
    let balanced: Vec<f64> = judged.iter().map(|j| j.balanced_accuracy).collect();
    let permuted: Vec<f64> = judged.iter().flat_map(|j| j.permuted.iter().copied()).collect();
    report.headline(
        &format!("auc_{}", scenario.name().replace('-', "_")),
        json!({ "held_out": mean(&aucs), "deviation": deviation(&aucs), "permuted": mean(&permuted) }),
    );
    report.tables[0].row([
        json!(scenario.name()),
        json!(prompts.items.len()),
        json!(positive),
        json!(mean(&aucs)),
        json!(deviation(&aucs)),
        json!(mean(&permuted)),
        json!(deviation(&permuted)),
        json!(mean(&balanced)),
        json!(judged[0].threshold),
    ]);
    let about = "share of the tokens that choose the expert, prompts of the first kind minus prompts of the second";
    report.map(&format!("delta {}", scenario.name()), about, map, &judged[0].core.delta, true);
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
