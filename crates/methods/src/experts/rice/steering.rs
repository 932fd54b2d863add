//! Steering with the found experts: thinking and accuracy before, after, and with random experts of the same layers and use.

use quorate_eval::encode::encode_text;
use quorate_eval::evaluate::ItemScore;
use quorate_eval::statistics::{mean, quantile};
use quorate_eval::tasks::TaskItem;
use quorate_lens::{ExpertMap, Intervention, Op, PhaseSelector, matched_sets, on_experts};
use quorate_model::{Chain, ModelError, Site};
use serde_json::json;

use super::norm_ratio::NormRatio;
use super::npmi::best;
use super::thinking::{Bounds, Change, Thought};
use super::{Found, Rice, TEXTS_MIN, Which};
use crate::{Lab, MethodError, Report};

/// Texts on which the norm of the steered output is measured.
const NORM_TEXTS: usize = 64;

/// The test prompts and how the model answers them unsteered.
pub(super) struct Before {
    items: Vec<TaskItem>,
    thoughts: Vec<Thought>,
}

impl Rice {
    pub(super) fn change(&self, map: &ExpertMap, experts: &[usize], beta: f32) -> Vec<Intervention> {
        let phase = if self.answer_only { PhaseSelector::Decode } else { PhaseSelector::All };
        on_experts(&map.ids(experts), Site::Routing, phase, &Op::Scale { by: beta })
    }

    pub(super) fn before(&self, lab: &mut Lab<'_>, bounds: Bounds) -> Result<Before, MethodError> {
        let mut items = lab.task("test", &self.task)?.items;
        for (old, new) in &self.replace {
            items.iter_mut().for_each(|i| i.prompt = i.prompt.replace(old, new));
        }
        let thoughts = self.thoughts(lab, "answering the test prompts", &items, &[], bounds)?;
        let measured = |t: &Thought| self.prompts == Which::All || t.begun;
        let (items, thoughts): (Vec<_>, Vec<_>) = items.into_iter().zip(thoughts).filter(|(_, t)| measured(t)).unzip();
        if items.len() < TEXTS_MIN {
            return Err(MethodError::needs(
                format!("{} test prompts of `{}` can be used, {TEXTS_MIN} are needed", items.len(), self.task),
                "give more prompts, another --task, or --prompts all",
            ));
        }
        Ok(Before { items, thoughts })
    }

    pub(super) fn steer(
        &self,
        lab: &mut Lab<'_>,
        found: &Found,
        before: &Before,
        report: &mut Report,
    ) -> Result<(), MethodError> {
        let base = Change::between(&before.thoughts, &before.thoughts);
        report.headline("prompts", before.items.len());
        report.headline("before", json!({ "length": base.length, "thinking": base.begun, "accuracy": base.right }));
        let target = best(&found.scores, self.experts);
        let sets = matched_sets(&found.map, &found.counts, &target, 8, self.sets, lab.seed)?;
        let own = self.changed(lab, "with the found experts", found, before, (&target, self.beta))?;
        let mut random = Vec::with_capacity(sets.len());
        for (i, set) in sets.iter().enumerate() {
            lab.part = (i, sets.len());
            random.push(self.changed(lab, "with random experts", found, before, (set, self.beta))?);
        }
        lab.part = (0, 1);
        let sizes: Vec<f64> = random.iter().map(|c| c.change.abs()).collect();
        let accuracy = mean(&random.iter().map(|c| c.right).collect::<Vec<_>>());
        let of_own = json!({ "change": own.change, "standard_errors": own.errors(), "accuracy": own.right });
        let of_random = json!({ "mean_size": mean(&sizes), "p95_size": quantile(&sizes, 0.95), "accuracy": accuracy });
        report.headline("found", of_own);
        report.headline("random", of_random);
        let mut rows = vec![(self.experts, self.beta, own, sizes)];
        let more = self.scan_betas.iter().map(|&b| (self.experts, b));
        for (n, beta) in more.chain(self.scan_experts.iter().map(|&n| (n, self.beta))) {
            let own = self.changed(lab, "scanning", found, before, (&best(&found.scores, n), beta))?;
            rows.push((n, beta, own, Vec::new()));
        }
        self.steering_table(lab, found, rows, report)
    }

    fn steering_table(
        &self,
        lab: &mut Lab<'_>,
        found: &Found,
        rows: Vec<(usize, f32, Change, Vec<f64>)>,
        report: &mut Report,
    ) -> Result<(), MethodError> {
        let mut ratios = Vec::with_capacity(rows.len());
        for (n, beta, ..) in &rows {
            ratios.push(self.norm_ratio(lab, found, &best(&found.scores, *n), *beta)?);
        }
        let columns = [
            "experts",
            "beta",
            "length",
            "change",
            "in errors",
            "random",
            "random p95",
            "thinking",
            "ended",
            "accuracy",
            "norm",
        ];
        let about = "tokens of thinking, their change and the size of the change with random experts";
        let table = report.table("steering", about, &columns);
        for ((n, beta, own, random), norm) in rows.into_iter().zip(ratios) {
            let (size, p95) = (mean(&random), quantile(&random, 0.95));
            table.row([
                json!(n),
                json!(beta),
                json!(own.length),
                json!(own.change),
                json!(own.errors()),
                json!(size),
                json!(p95),
                json!(own.begun),
                json!(own.ended),
                json!(own.right),
                json!(norm),
            ]);
        }
        report.note(
            "thinking: share of answers that think; ended: share of those whose thinking ends. norm: how many times larger \
             the steering makes the routed output of its layers, mean over tokens that chose a steered expert.",
        );
        Ok(())
    }

    fn changed(
        &self,
        lab: &mut Lab<'_>,
        stage: &str,
        found: &Found,
        before: &Before,
        (experts, beta): (&[usize], f32),
    ) -> Result<Change, MethodError> {
        let list = self.change(&found.map, experts, beta);
        let after = self.thoughts(lab, stage, &before.items, &list, found.bounds)?;
        Ok(Change::between(&before.thoughts, &after))
    }

    /// Answers items under interventions and looks at their thinking.
    fn thoughts(
        &self,
        lab: &mut Lab<'_>,
        stage: &str,
        items: &[TaskItem],
        list: &[Intervention],
        bounds: Bounds,
    ) -> Result<Vec<Thought>, MethodError> {
        let mut lens = lab.prepare(list)?;
        let scores = lab.answer(stage, &items.iter().collect::<Vec<_>>(), self.max_tokens, &mut lens)?;
        let thought = |(item, score): (&TaskItem, ItemScore)| {
            let ItemScore::Exact { ok, text } = score else {
                return Err(MethodError::needs(
                    format!("`{}` is plain text, not questions", self.task),
                    "choose another --task",
                ));
            };
            let mut tokens = encode_text(&lab.model, &item.prompt)?;
            tokens.extend(lab.model.tokenizer().encode(&text, false).map_err(ModelError::from)?);
            Ok(Thought::of(&tokens, bounds, ok))
        };
        items.iter().zip(scores).map(thought).collect()
    }

    /// By how much the steering enlarges the routed output on the transcripts.
    fn norm_ratio(
        &self,
        lab: &mut Lab<'_>,
        found: &Found,
        experts: &[usize],
        beta: f32,
    ) -> Result<Option<f64>, MethodError> {
        let mut steering = lab.prepare(&self.change(&found.map, experts, beta))?;
        let mut observer = NormRatio::new(&found.map.ids(experts), beta);
        let texts = &found.transcripts[..found.transcripts.len().min(NORM_TEXTS)];
        lab.observe("measuring the routed output", texts, &mut Chain(vec![&mut steering, &mut observer]), |_, _| {})?;
        Ok(observer.mean())
    }
}
