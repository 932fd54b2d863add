//! MoTE: experts whose use on the prompt tells how it will be answered, turned against it, switched off or on.
//!
//! *What it measures.* For prompts answered in one way (refused, say) and in others: how much each expert is used on the
//! counted tokens, `A_q[e] = mean over tokens of the gate of e` (0 where it is not chosen); the contrast is the mean of `A_q` over
//! the class minus the mean over all others, `D_e`.
//! *What it changes.* The experts of the largest `D_e`: gates times `-factor` (`reverse`), never chosen (`suppress`: the
//! next-ranked expert takes the slot), without contribution (`drop`), or always chosen (`force`). With `--invert` the experts of
//! the smallest `D_e`, those of the other prompts.
//! *Agreement with the paper.* The paper counts choices over all prompt tokens, and suppresses or forces at all tokens: that is
//! `--tokens prompt --weight count --action suppress --at all --experts 10` (counts are divided by the prompt's length, since
//! lengths differ). The defaults are what works on the embedded model, chosen on its validation split. Random controls are
//! matched in layer and in use; the paper draws them uniformly.
//! *Limits.* A model whose refusal is carried by many experts does not feel the loss of a few; see the method's page.
//! *Reference.* arXiv 2502.11096.

use std::collections::{BTreeMap, BTreeSet};

use clap::{Args, ValueEnum};
use quorate_eval::answer::exact_match;
use quorate_eval::evaluate::{ItemScore, TaskScore};
use quorate_eval::statistics::{deviation, mean, quantile};
use quorate_eval::tasks::TaskItem;
use quorate_lens::{ExpertId, Intervention, Op, PhaseSelector, matched_sets, on_experts};
use quorate_model::Site;
use serde::Serialize;
use serde_json::{Value, json};

use crate::contrast::{self, Tokens, Weight};
use crate::{Card, Kind, Lab, MethodError, Report, Run};

/// The card of MoTE.
pub const CARD: Card = Card {
    id: "mote",
    title: "Mixture of Tunable Experts: experts that tell refused from answered prompts",
    paper: "arXiv 2502.11096",
    year: 2025,
    kind: Kind::Steer,
    needs: "a MoE model; a task whose prompts are answered in two ways, told apart by a marker in the answer or by a field of \
            the prompts",
    cost: "one forward pass over the prompts; one evaluation for each control",
    metrics: &[],
    run: "quorate mote\nquorate mote --invert --experts 10 --factor 1\nquorate mote --tokens prompt --weight count --action suppress --at all --experts 10\nquorate mote --tasks prompts.jsonl --task mine --label-field refuse -o out/",
    about: "Ranks experts by the difference of their use on prompts of one class of answers and on all others, then turns the \
            most distinctive ones against their class, switches them off or on, and compares the rates with random experts of \
            the same layers and use.",
};

/// What marks a refusal if the user names neither a marker nor a field.
const MARKER: &str = "I cannot";

/// Parameters of MoTE.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Mote {
    /// The task whose prompts are contrasted
    #[arg(long, default_value = "safety")]
    pub task: String,
    /// Answers that contain this text are of the class; left out, `I cannot`, or with --label-field the answers that only
    /// prompts of the class get
    #[arg(long, value_name = "TEXT")]
    pub marker: Option<String>,
    /// Prompts whose `meta.FIELD` is true are of the class; left out, those whose answer has the marker
    #[arg(long, value_name = "FIELD")]
    pub label_field: Option<String>,
    /// Tokens whose experts count
    #[arg(long, value_enum, default_value_t = Tokens::Last)]
    pub tokens: Tokens,
    /// How much a choice counts
    #[arg(long, value_enum, default_value_t = Weight::Gate)]
    pub weight: Weight,
    /// How many of the most distinctive experts are changed
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub experts: usize,
    /// What happens to them
    #[arg(long, value_enum, default_value_t = Action::Reverse)]
    pub action: Action,
    /// Size of the reversed gates, as a multiple of their own
    #[arg(long, default_value_t = 3.0)]
    pub factor: f32,
    /// Where it happens
    #[arg(long, value_enum, default_value_t = Place::Last)]
    pub at: Place,
    /// Change the experts most used on the other prompts, to bring those to the class
    #[arg(long)]
    pub invert: bool,
    /// Random sets of experts to compare with
    #[arg(long, default_value_t = 50, value_name = "N")]
    pub sets: usize,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 32, value_name = "N")]
    pub max_tokens: usize,
    /// Items of each other task on which harm is measured (0: none)
    #[arg(long, default_value_t = 50, value_name = "N")]
    pub others: usize,
}

/// What happens to the found experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Chosen as before, gates times -FACTOR
    Reverse,
    /// Never chosen; the next-ranked expert takes the slot
    Suppress,
    /// Chosen as before, but contributes nothing
    Drop,
    /// Always chosen, with the gate of its own score
    Force,
}

/// Tokens at which experts are changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// The last token of the prompt, where the answer is decided
    Last,
    /// All tokens of prompt and answer
    All,
}

/// Which answers are of the class.
enum Judge {
    /// Those that contain a text.
    Marker(String),
    /// These.
    Texts(BTreeSet<String>),
}

impl Judge {
    fn is_of_class(&self, answer: &str) -> bool {
        match self {
            Judge::Marker(marker) => answer.contains(marker),
            Judge::Texts(texts) => texts.contains(answer.trim()),
        }
    }
}

/// Test prompts, their classes, and who judges their answers.
struct Test {
    items: Vec<TaskItem>,
    classes: Vec<bool>,
    judge: Judge,
}

/// Shares of the test prompts answered in the way of the class: of those of the class, and of the others.
#[derive(Clone, Copy)]
struct Rates {
    inside: f64,
    outside: f64,
}

impl Run for Mote {
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        let map = lab.experts()?;
        let items = lab.task("train-sample", &self.task)?.items;
        let answers = self.answers(lab, "answering, to label the prompts", &items, &[])?;
        let classes = self.classes(&items, &answers)?;
        let judge = self.judge(&classes, &answers)?;
        let uses = self.uses(lab, &items)?;
        let difference = contrast::difference(&uses, &classes)?;
        let sign = if self.invert { -1.0 } else { 1.0 };
        let ranked = contrast::top(&difference.iter().map(|d| sign * d).collect::<Vec<_>>(), map.total());
        let found = &ranked[..self.experts.min(ranked.len())];
        let totals = contrast::totals(&uses);
        let sets = matched_sets(&map, &totals, found, 8, self.sets, lab.seed)?;

        let items = lab.task("test", &self.task)?.items;
        let plain = self.answers(lab, "answering the test prompts", &items, &[])?;
        let test = Test { classes: self.classes(&items, &plain)?, items, judge };
        let before = self.rates(&test, &plain)?;
        let changed = self.answers(lab, "with the found experts changed", &test.items, &map.ids(found))?;
        let after = self.rates(&test, &changed)?;
        let mut random = Vec::with_capacity(sets.len());
        for (i, set) in sets.iter().enumerate() {
            lab.part = (i, sets.len());
            let answers = self.answers(lab, "with random experts changed", &test.items, &map.ids(set))?;
            random.push(self.rates(&test, &answers)?);
        }
        lab.part = (0, 1);

        let mut report = Report::default();
        let ids = map.ids(found);
        report.headline("experts", ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "));
        self.effects(&mut report, before, after, &random);
        answers_of(&test, &plain, &changed, &mut report);
        self.harm(lab, &ids, &mut report)?;
        let about = "mean use of the expert, prompts of the class minus others";
        let table = report.table("experts", about, &["rank", "expert", "contrast", "use"]);
        for (rank, &unit) in ranked.iter().take(self.experts.max(10)).enumerate() {
            let mean_use = totals[unit] as f64 / (contrast::TOTALS_UNIT * uses.len() as f64);
            table.row([json!(rank + 1), json!(map.id(unit).to_string()), json!(difference[unit]), json!(mean_use)]);
        }
        report.map("contrast", about, &map, &difference, true);
        report.file("plan.toml", "the change, as a plan", lab.plan(self.change(&ids))?);
        Ok(report)
    }
}

impl Mote {
    /// The interventions on a set of experts.
    fn change(&self, ids: &[ExpertId]) -> Vec<Intervention> {
        let (site, op) = match self.action {
            Action::Reverse => (Site::Routing, Op::Scale { by: -self.factor }),
            Action::Suppress => (Site::RouterLogits, Op::Mask),
            Action::Drop => (Site::Routing, Op::Drop),
            Action::Force => (Site::Selection, Op::Force),
        };
        let phase = match self.at {
            Place::Last => PhaseSelector::Last,
            Place::All => PhaseSelector::All,
        };
        on_experts(ids, site, phase, &op)
    }

    /// The model's answers with experts changed.
    fn answers(
        &self,
        lab: &mut Lab<'_>,
        stage: &str,
        items: &[TaskItem],
        changed: &[ExpertId],
    ) -> Result<Vec<String>, MethodError> {
        let mut lens = lab.prepare(&self.change(changed))?;
        let scores = lab.answer(stage, &items.iter().collect::<Vec<_>>(), self.max_tokens, &mut lens)?;
        let text = |score| match score {
            ItemScore::Exact { text, .. } => Ok(text),
            ItemScore::Text { .. } => Err(MethodError::needs(
                format!("task `{}` is plain text", self.task),
                "give prompts that are answered, without `meta.lm`",
            )),
        };
        scores.into_iter().map(text).collect()
    }

    /// Which prompts are of the class.
    fn classes(&self, items: &[TaskItem], answers: &[String]) -> Result<Vec<bool>, MethodError> {
        let Some(field) = &self.label_field else {
            let marker = self.marker.as_deref().unwrap_or(MARKER);
            return Ok(answers.iter().map(|a| a.contains(marker)).collect());
        };
        let label = |item: &TaskItem| {
            item.meta.get(field).and_then(Value::as_bool).ok_or_else(|| {
                let what = format!("a prompt of `{}` has no `meta.{field}` that is true or false", self.task);
                MethodError::needs(what, "label each prompt there, or leave --label-field out and give a --marker")
            })
        };
        items.iter().map(label).collect()
    }

    fn judge(&self, classes: &[bool], answers: &[String]) -> Result<Judge, MethodError> {
        if self.label_field.is_none() || self.marker.is_some() {
            return Ok(Judge::Marker(self.marker.clone().unwrap_or_else(|| MARKER.to_string())));
        }
        let of = |class: bool| {
            let of_class = answers.iter().zip(classes).filter(move |(_, c)| **c == class);
            of_class.map(|(a, _)| a.trim().to_string()).collect::<BTreeSet<_>>()
        };
        let texts: BTreeSet<String> = of(true).difference(&of(false)).cloned().collect();
        if texts.is_empty() {
            return Err(MethodError::needs("no answer is given to prompts of the class only", "give a --marker"));
        }
        Ok(Judge::Texts(texts))
    }

    /// Use of each expert by each prompt.
    fn uses(&self, lab: &mut Lab<'_>, items: &[TaskItem]) -> Result<Vec<Vec<f64>>, MethodError> {
        let map = lab.experts()?;
        let mut prompts = lab.encode(items)?;
        prompts.iter_mut().for_each(|p| p.answer.clear());
        Ok(contrast::uses(&lab.trace(&prompts, false)?, &map, self.tokens, self.weight))
    }

    fn rates(&self, test: &Test, answers: &[String]) -> Result<Rates, MethodError> {
        let share = |class: bool| {
            let of = answers.iter().zip(&test.classes).filter(|(_, c)| **c == class);
            let hits: Vec<f64> = of.map(|(a, _)| f64::from(test.judge.is_of_class(a))).collect();
            mean(&hits).ok_or_else(|| {
                let which = if class { "of the class" } else { "outside the class" };
                let what = format!("no test prompt of `{}` is {which}", self.task);
                MethodError::needs(what, "give test prompts of both kinds, or another --marker or --label-field")
            })
        };
        Ok(Rates { inside: share(true)?, outside: share(false)? })
    }

    /// The class's rate falls on its own prompts when its experts are taken away, and rises on the others when its experts
    /// are forced or those of the others are taken away.
    fn effects(&self, report: &mut Report, before: Rates, after: Rates, random: &[Rates]) {
        let rises = (self.action == Action::Force) != self.invert;
        let effect = |r: &Rates| if rises { r.outside - before.outside } else { before.inside - r.inside };
        let effects: Vec<f64> = random.iter().map(effect).collect();
        report.headline("class_rate_of_class_prompts", json!({ "before": before.inside, "after": after.inside }));
        report.headline("class_rate_of_other_prompts", json!({ "before": before.outside, "after": after.outside }));
        report.headline(if rises { "rise" } else { "fall" }, effect(&after));
        report.headline("random_mean", mean(&effects));
        report.headline("random_deviation", deviation(&effects));
        report.headline("random_p95", quantile(&effects, 0.95));
        report.headline("random_sets", random.len());
    }

    /// Exact match of the other tasks before and after.
    fn harm(&self, lab: &mut Lab<'_>, ids: &[ExpertId], report: &mut Report) -> Result<(), MethodError> {
        if self.others == 0 {
            return Ok(());
        }
        let tasks = lab.tasks("test")?;
        let table = report.table("other tasks", "exact match in percent", &["task", "before", "after"]);
        let (mut befores, mut afters) = (Vec::new(), Vec::new());
        for task in tasks.iter().filter(|t| t.name != self.task) {
            let items: Vec<&TaskItem> = task.items.iter().take(self.others).collect();
            let mut of = |changed: &[ExpertId]| {
                let mut lens = lab.prepare(&self.change(changed))?;
                let mut score = TaskScore::default();
                lab.answer("answering other tasks", &items, 96, &mut lens)?.iter().for_each(|s| score.add(s));
                Ok::<_, MethodError>(score.exact_match())
            };
            let (Some(before), Some(after)) = (of(&[])?, of(ids)?) else { continue };
            table.row([json!(task.name), json!(before), json!(after)]);
            befores.push(before);
            afters.push(after);
        }
        report.headline("other_tasks_exact_match", json!({ "before": mean(&befores), "after": mean(&afters) }));
        Ok(())
    }
}

/// Exact match of the prompts outside the class, and the commonest answers of the class's prompts after the change.
fn answers_of(test: &Test, plain: &[String], changed: &[String], report: &mut Report) {
    let right = |answers: &[String]| {
        let outside = answers.iter().zip(&test.items).zip(&test.classes).filter(|(_, class)| !**class);
        mean(&outside.map(|((a, item), _)| f64::from(exact_match(a, &item.answer))).collect::<Vec<_>>())
    };
    report.headline("exact_match_of_other_prompts", json!({ "before": right(plain), "after": right(changed) }));
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    changed.iter().zip(&test.classes).filter(|(_, c)| **c).for_each(|(a, _)| *counts.entry(a).or_default() += 1);
    let mut counts: Vec<(&str, usize)> = counts.into_iter().collect();
    counts.sort_by_key(|&(_, n)| std::cmp::Reverse(n));
    let table =
        report.table("answers", "commonest answers of the class's prompts after the change", &["count", "answer"]);
    counts.iter().take(6).for_each(|&(text, n)| table.row([json!(n), json!(text)]));
}
