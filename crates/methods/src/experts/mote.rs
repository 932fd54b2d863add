//! MoTE: experts whose use on the prompt tells how it will be answered, switched off or on.
//!
//! *What it measures.* For prompts answered in one way (refused, say) and in others, the share of prompt tokens that choose
//! each expert; the contrast is the class mean minus the mean of all others.
//! *What it changes.* The most distinctive experts are never chosen (`suppress`: masked, the next-ranked expert takes the
//! slot), contribute nothing (`drop`), or are always chosen (`force`).
//! *Agreement with the paper.* Counts are divided by the prompt's length, since lengths differ; the paper sums. Random
//! controls are matched in layer and in use; the paper draws them uniformly.
//! *Reference.* arXiv 2502.11096.

use clap::{Args, ValueEnum};
use quorate_eval::evaluate::{ItemScore, TaskScore};
use quorate_eval::statistics::{deviation, mean, quantile};
use quorate_eval::tasks::TaskItem;
use quorate_lens::{Op, PhaseSelector, matched_sets, on_experts};
use quorate_model::{NoLens, Site};
use serde::Serialize;
use serde_json::json;

use crate::{Card, Kind, Lab, MethodError, Report, Run, contrast};

/// The card of MoTE.
pub const CARD: Card = Card {
    id: "mote",
    title: "Mixture of Tunable Experts: experts that tell refused from answered prompts",
    paper: "arXiv 2502.11096",
    year: 2025,
    kind: Kind::Steer,
    needs: "a MoE model; a task whose prompts are answered in two ways, told apart by a marker in the answer",
    cost: "one forward pass over the prompts; one evaluation for each control",
    metrics: &[],
    run: "quorate mote\nquorate mote --action force --experts 3\nquorate mote --marker \"I cannot\" --tasks prompts.jsonl --task mine -o out/",
    about: "Ranks experts by the difference of their use on prompts of one class of answers and on all others, then switches \
            the most distinctive ones off or on and compares the rates with random experts of the same layers and use.",
};

/// Parameters of MoTE.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Mote {
    /// The task whose prompts are contrasted
    #[arg(long, default_value = "safety")]
    pub task: String,
    /// Answers that contain this text are of the class
    #[arg(long, default_value = "I cannot", value_name = "TEXT")]
    pub marker: String,
    /// How many of the most distinctive experts are changed
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub experts: usize,
    /// What happens to them
    #[arg(long, value_enum, default_value_t = Action::Suppress)]
    pub action: Action,
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
    /// Never chosen; the next-ranked expert takes the slot
    Suppress,
    /// Chosen as before, but contributes nothing
    Drop,
    /// Chosen for every token
    Force,
}

impl Action {
    fn intervention(self) -> (Site, Op) {
        match self {
            Action::Suppress => (Site::RouterLogits, Op::Mask),
            Action::Drop => (Site::Routing, Op::Drop),
            Action::Force => (Site::Selection, Op::Force),
        }
    }
}

/// Shares of the test prompts answered in the way of the class: of those that were before, and of the others.
struct Rates {
    inside: f64,
    outside: f64,
}

impl Run for Mote {
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        let map = lab.experts()?;
        let items = lab.task("train-sample", &self.task)?.items;
        let labels = self.labels(lab, "answering, to label the prompts", &items, &[])?;
        let mut prompts = lab.encode(&items)?;
        prompts.iter_mut().for_each(|p| p.answer.clear());
        let trace = lab.trace(&prompts, false)?;
        let shares = contrast::shares(&trace, &map, |_, phase| phase.is_prompt());
        let difference = contrast::difference(&shares, &labels)?;
        let found = contrast::top(&difference, self.experts);
        let sets = matched_sets(&map, &trace.counts(&map), &found, 8, self.sets, lab.seed)?;

        let test = lab.task("test", &self.task)?.items;
        let before = self.labels(lab, "answering the test prompts", &test, &[])?;
        let own = self.rates(lab, "with the found experts changed", &test, &before, &map.ids(&found))?;
        let mut random = Vec::with_capacity(sets.len());
        for (i, set) in sets.iter().enumerate() {
            lab.part = (i, sets.len());
            random.push(self.rates(lab, "with random experts changed", &test, &before, &map.ids(set))?);
        }
        lab.part = (0, 1);

        let mut report = Report::default();
        let ids = map.ids(&found);
        report.headline("experts", ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "));
        report.headline("class_rate_of_class_prompts", json!({ "before": 1.0, "after": own.inside }));
        report.headline("class_rate_of_other_prompts", json!({ "before": 0.0, "after": own.outside }));
        // The class's rate falls on its own prompts when experts are taken away, and rises on the others when forced.
        let effect = |r: &Rates| if self.action == Action::Force { r.outside } else { 1.0 - r.inside };
        let effects: Vec<f64> = random.iter().map(effect).collect();
        report.headline("effect", effect(&own));
        report.headline("random_effect_mean", mean(&effects));
        report.headline("random_effect_deviation", deviation(&effects));
        report.headline("random_effect_p95", quantile(&effects, 0.95));
        self.harm(lab, &ids, &mut report)?;

        let about = "contrast: share of prompt tokens that choose the expert, class minus others";
        let table = report.table("experts", about, &["rank", "expert", "contrast", "tokens"]);
        let counts = trace.counts(&map);
        for (rank, &unit) in contrast::top(&difference, self.experts.max(10)).iter().enumerate() {
            table.row([json!(rank + 1), json!(map.id(unit).to_string()), json!(difference[unit]), json!(counts[unit])]);
        }
        report.map("contrast", about, &map, &difference, true);
        let (site, op) = self.action.intervention();
        report.file("plan.toml", "the change, as a plan", lab.plan(on_experts(&ids, site, PhaseSelector::All, &op))?);
        Ok(report)
    }
}

impl Mote {
    /// Whether each item's answer has the marker, with experts changed.
    fn labels(
        &self,
        lab: &mut Lab<'_>,
        stage: &str,
        items: &[TaskItem],
        changed: &[quorate_lens::ExpertId],
    ) -> Result<Vec<bool>, MethodError> {
        let scores = self.answers(lab, stage, &items.iter().collect::<Vec<_>>(), changed)?;
        let label = |score: &ItemScore| matches!(score, ItemScore::Exact { text, .. } if text.contains(&self.marker));
        Ok(scores.iter().map(label).collect())
    }

    fn answers(
        &self,
        lab: &mut Lab<'_>,
        stage: &str,
        items: &[&TaskItem],
        changed: &[quorate_lens::ExpertId],
    ) -> Result<Vec<ItemScore>, MethodError> {
        if changed.is_empty() {
            return lab.answer(stage, items, self.max_tokens, &mut NoLens);
        }
        let (site, op) = self.action.intervention();
        let mut lens = lab.prepare(&on_experts(changed, site, PhaseSelector::All, &op))?;
        lab.answer(stage, items, self.max_tokens, &mut lens)
    }

    fn rates(
        &self,
        lab: &mut Lab<'_>,
        stage: &str,
        items: &[TaskItem],
        before: &[bool],
        changed: &[quorate_lens::ExpertId],
    ) -> Result<Rates, MethodError> {
        let after = self.labels(lab, stage, items, changed)?;
        let share = |class: bool| {
            let of: Vec<f64> =
                after.iter().zip(before).filter(|(_, b)| **b == class).map(|(a, _)| f64::from(u8::from(*a))).collect();
            mean(&of).ok_or_else(|| {
                MethodError::needs(
                    format!(
                        "no test prompt of `{}` is answered {} `{}`",
                        self.task,
                        if class { "with" } else { "without" },
                        self.marker
                    ),
                    "give test prompts of both kinds, or another --marker",
                )
            })
        };
        Ok(Rates { inside: share(true)?, outside: share(false)? })
    }

    /// Exact match of the other tasks before and after.
    fn harm(&self, lab: &mut Lab<'_>, ids: &[quorate_lens::ExpertId], report: &mut Report) -> Result<(), MethodError> {
        if self.others == 0 {
            return Ok(());
        }
        let tasks = lab.tasks("test")?;
        let others: Vec<_> = tasks.iter().filter(|t| t.name != self.task).collect();
        let table = report.table("other tasks", "exact match in percent", &["task", "before", "after"]);
        let (mut befores, mut afters) = (Vec::new(), Vec::new());
        for task in others {
            let items: Vec<&TaskItem> = task.items.iter().take(self.others).collect();
            let mut of = |changed| {
                let mut score = TaskScore::default();
                let options = Mote { max_tokens: 96, ..self.clone() };
                options.answers(lab, "answering other tasks", &items, changed)?.iter().for_each(|s| score.add(s));
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
