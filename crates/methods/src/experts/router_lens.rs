//! Router Lens: experts that a router uses once it alone was tuned to answer by the context.
//!
//! *What it changes.* Nothing but routers is trained (rows in full, or a low-rank term), on questions whose passage
//! contradicts what the model knows; the wanted answer is the passage's.
//! *What it measures.* `N_{l,i}`: tokens of training items with their answers for which expert `i` of layer `l` is among the
//! top-k of the tuned router. The `n` most used of each layer are the context-faithful experts. Masked in the tuned model,
//! answers by the passage should fall far more than with random experts masked. Gains of the tuned model over the base at
//! the last prompt token, by layer: attention to the passage (CAG) and to the answer in it (AAG), mean over heads, and the
//! probability of the answer's first token through the logit lens.
//! *Agreement with the paper.* The paper describes routers tuned in full, its release a low-rank term of rank 8 and alpha
//! 32; both are here. No dropout. Best of ten evaluations by validation loss. Counts are of the choice the model makes, not
//! of a sort of its outputs.
//! *Limits.* The most used experts have no equals in use by definition: controls are the nearest in use, and their use is
//! reported. Counts with the gold answers appended are of teacher-forced tokens.
//! *Reference.* arXiv 2508.19594.

use clap::Args;
use quorate_eval::statistics::{deviation, mean};
use quorate_formats::Role;
use quorate_lens::{ExpertMap, Op, PhaseSelector, matched_sets, on_experts};
use quorate_model::{Overlay, Site};
use quorate_train::{Example, Form, select};
use serde::Serialize;
use serde_json::{Map, json};

use super::context::{Insight, Question, Rates, Source, Tuning, answered, insight, most_used, rates, under};
use crate::{Card, Kind, Lab, MethodError, Report, Run, Trained};

/// The card of Router Lens.
pub const CARD: Card = Card {
    id: "router-lens",
    title: "Router Lens: context-faithful experts by tuning the routers alone",
    paper: "arXiv 2508.19594",
    year: 2025,
    kind: Kind::Train,
    needs: "a MoE model; questions behind passages that contradict what it knows, in three splits",
    cost: "some hundred training steps of the routers; one evaluation for each control",
    metrics: &[],
    run: "quorate router-lens\nquorate router-lens --rank 0 --experts 4 -o lens/\nquorate ceft --from lens/experts.json",
    about: "Tunes only the routers to answer by the passage, takes the experts that the tuned routers use most, masks them \
            beside random ones, and compares attention and the logit lens of the tuned model and the base by layer. With \
            -o, the routers' adapter in the form of PEFT, the experts, and a plan that masks them.",
};

/// Items with answers on which use is counted, at most.
const COUNTED: usize = 2000;
/// Experts nearest in use from which each control is drawn.
const WINDOW: usize = 8;

/// Parameters of Router Lens.
#[derive(Args, Clone, Debug, Serialize)]
pub struct RouterLens {
    /// Router tuning and counting
    #[command(flatten)]
    #[serde(flatten)]
    pub search: Search,
    /// Random sets of experts to compare with
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub sets: usize,
}

/// How context-faithful experts are found.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Search {
    /// The questions
    #[command(flatten)]
    #[serde(flatten)]
    pub source: Source,
    /// The training
    #[command(flatten)]
    #[serde(flatten)]
    pub tuning: Tuning,
    /// Rank of the routers' term; 0 trains their rows in full
    #[arg(long, default_value_t = 8, value_name = "R")]
    pub rank: usize,
    /// Learning rate of the routers
    #[arg(long, default_value_t = 5e-3)]
    pub router_rate: f64,
    /// Context-faithful experts in each layer
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub experts: usize,
}

/// Questions of the three splits.
pub struct Splits {
    /// To learn from.
    pub train: Vec<Question>,
    /// To choose the best evaluation.
    pub validation: Vec<Question>,
    /// To report.
    pub test: Vec<Question>,
}

impl Splits {
    /// A remark if test questions are among those that were learned, as where one file is all splits.
    pub fn remark(&self, report: &mut Report) {
        let seen = |q: &&Question| self.train.iter().any(|other| other.text == q.text);
        let seen = self.test.iter().filter(seen).count();
        if seen > 0 {
            let of = self.test.len();
            report.note(format!("{seen} of {of} test questions were trained on: these rates say little of new ones"));
        }
    }
}

/// Tuned routers, and what they use.
pub struct Found {
    /// The routers.
    pub routers: Trained,
    /// Use of every expert by the tuned routers.
    pub counts: Vec<u64>,
    /// The context-faithful experts.
    pub experts: Vec<usize>,
}

impl Search {
    /// Reads the questions.
    ///
    /// # Errors
    /// As [`Source::questions`].
    pub fn splits(&self, lab: &mut Lab<'_>) -> Result<Splits, MethodError> {
        let train = self.source.questions(lab, "train-sample")?;
        let validation = self.source.questions(lab, "validation")?;
        Ok(Splits { train, validation, test: self.source.questions(lab, "test")? })
    }

    /// Tunes the routers and counts what they use.
    ///
    /// # Errors
    /// A dense model, no expert or all of a layer asked for, or as [`Lab::train`].
    pub fn find(&self, lab: &mut Lab<'_>, splits: &Splits) -> Result<Found, MethodError> {
        let map = lab.experts()?;
        let fewest = map.experts.iter().copied().min().unwrap_or(0);
        if self.experts == 0 || 2 * self.experts > fewest {
            let what = format!("{} experts of {fewest} cannot be compared with others", self.experts);
            return Err(MethodError::needs(what, "choose --experts from 1 to half of a layer"));
        }
        let form = match self.rank {
            0 => Form::Full,
            rank => Form::LowRank { rank, alpha: self.tuning.alpha },
        };
        let targets = select(lab.model.spec(), |role| matches!(role, Role::Router(_)).then(|| form.clone()));
        let options = self.tuning.options(self.router_rate, lab.seed);
        let (train, validation) = (examples(&splits.train), examples(&splits.validation));
        let routers = lab.train("tuning the routers", &targets, options, &train, &validation)?;
        let counts = counts(lab, &map, &routers.overlay, &splits.train)?;
        let experts = most_used(&map, &counts, self.experts);
        Ok(Found { routers, counts, experts })
    }
}

/// Questions as examples to learn.
pub fn examples(questions: &[Question]) -> Vec<Example> {
    questions.iter().map(Question::example).collect()
}

/// Tokens of questions with their answers for which each expert is chosen, with an overlay over the model.
fn counts(
    lab: &mut Lab<'_>,
    map: &ExpertMap,
    overlay: &Overlay,
    questions: &[Question],
) -> Result<Vec<u64>, MethodError> {
    let texts: Vec<_> = questions.iter().take(COUNTED).map(|q| q.text.clone()).collect();
    Ok(under(lab, overlay, |lab| lab.trace(&texts, false))?.counts(map))
}

/// Experts by layer, as `ceft --from` reads them.
pub fn list(map: &ExpertMap, units: &[usize]) -> Map<String, serde_json::Value> {
    let of_layer = |moe: usize| {
        let range = map.range(moe);
        let mut experts: Vec<usize> = units.iter().filter(|u| range.contains(u)).map(|u| u - range.start).collect();
        experts.sort_unstable();
        (map.layers[moe].to_string(), json!(experts))
    };
    (0..map.n_layers()).map(of_layer).collect()
}

impl Run for RouterLens {
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        let map = lab.experts()?;
        let splits = self.search.splits(lab)?;
        let none = Overlay::new();
        let base = rates(lab, "answering with the base model", &splits.test, &none, &[])?;
        let found = self.search.find(lab, &splits)?;
        let tuned = &found.routers.overlay;
        let own = rates(lab, "answering with tuned routers", &splits.test, tuned, &[])?;

        let mut report = Report::default();
        let all: u64 = lab.model.checkpoint().parameter_counts().total;
        report.headline(
            "questions",
            json!({ "train": splits.train.len(), "validation": splits.validation.len(), "test": splits.test.len() }),
        );
        report.headline(
            "trained_parameters",
            json!({ "values": found.routers.values, "percent": 100.0 * found.routers.values as f64 / all as f64 }),
        );
        report.headline("base", base);
        report.headline("tuned_routers", own);
        report.headline("gain_in_points", own.passage - base.passage);
        let written = self.search.source.as_written(lab)?;
        let before = answered(lab, "answering prompts as they stand", &written, &[])?;
        let after = under(lab, tuned, |lab| answered(lab, "answering prompts as they stand", &written, &[]))?;
        report.headline("prompts_as_written", json!({ "base": before, "tuned_routers": after }));
        splits.remark(&mut report);
        self.masks(lab, &mut report, &map, &splits, &found, own)?;
        let before = insight(lab, &splits.test)?;
        let after = under(lab, tuned, |lab| insight(lab, &splits.test))?;
        gains(&mut report, &before, &after);
        curve(&mut report, &found.routers);
        let about = "tokens of training items that choose the expert with tuned routers";
        report.map("use", about, &map, &found.counts.iter().map(|&c| c as f64).collect::<Vec<_>>(), false);
        report.adapter(&lab.model, tuned, "the tuned routers, an adapter of PEFT")?;
        let experts =
            serde_json::to_vec_pretty(&list(&map, &found.experts)).map_err(|e| MethodError::Outside(e.into()))?;
        report.file("experts.json", "the context-faithful experts by layer", experts);
        let mask = on_experts(&map.ids(&found.experts), Site::RouterLogits, PhaseSelector::All, &Op::Mask);
        report.file("plan.toml", "a plan that masks them", lab.plan(mask)?);
        Ok(report)
    }
}

impl RouterLens {
    /// What masking the found experts loses, beside random ones and those that the base uses most.
    fn masks(
        &self,
        lab: &mut Lab<'_>,
        report: &mut Report,
        map: &ExpertMap,
        splits: &Splits,
        found: &Found,
        own: Rates,
    ) -> Result<(), MethodError> {
        let tuned = &found.routers.overlay;
        let base_counts = counts(lab, map, &Overlay::new(), &splits.train)?;
        let base_top = most_used(map, &base_counts, self.search.experts);
        let shared = base_top.iter().filter(|u| found.experts.contains(u)).count();
        let use_of = |units: &[usize]| {
            let sum = |units: &[usize]| units.iter().map(|&u| found.counts[u]).sum::<u64>() as f64;
            100.0 * sum(units) / found.counts.iter().sum::<u64>().max(1) as f64
        };
        let masked =
            |lab: &mut Lab<'_>, stage: &str, units: &[usize]| rates(lab, stage, &splits.test, tuned, &map.ids(units));
        let faithful = masked(lab, "with the found experts masked", &found.experts)?;
        let top = masked(lab, "with the base's most used masked", &base_top)?;
        let sets = matched_sets(map, &found.counts, &found.experts, WINDOW, self.sets, lab.seed)?;
        let mut random = Vec::with_capacity(sets.len());
        for (i, set) in sets.iter().enumerate() {
            lab.part = (i, sets.len());
            random.push((masked(lab, "with random experts masked", set)?, use_of(set)));
        }
        lab.part = (0, 1);
        let lost: Vec<f64> = random.iter().map(|(r, _)| own.passage - r.passage).collect();
        let average = |values: Vec<f64>| mean(&values);
        report.headline(
            "lost_in_points",
            json!({
                "faithful": own.passage - faithful.passage,
                "base_most_used": own.passage - top.passage,
                "random_mean": mean(&lost),
                "random_deviation": deviation(&lost),
            }),
        );
        report.headline("faithful_also_most_used_by_base", format!("{shared} of {}", found.experts.len()));
        let about =
            "answers with tuned routers and experts masked, in percent; use: share of the choices on training items";
        let table = report.table("masked", about, &["masked", "experts", "use", "by passage", "by memory"]);
        let mut row = |name: &str, n: usize, share: f64, passage: f64, memory: Option<f64>| {
            table.row([json!(name), json!(n), json!(share), json!(passage), json!(memory)]);
        };
        row("none", 0, 0.0, own.passage, own.memory);
        row("context-faithful", found.experts.len(), use_of(&found.experts), faithful.passage, faithful.memory);
        row("most used by the base", base_top.len(), use_of(&base_top), top.passage, top.memory);
        if let Some(share) = average(random.iter().map(|(_, share)| *share).collect()) {
            let passage = average(random.iter().map(|(r, _)| r.passage).collect()).unwrap_or_default();
            let memory = average(random.iter().filter_map(|(r, _)| r.memory).collect());
            row("random, nearest in use (mean)", found.experts.len(), share, passage, memory);
        }
        Ok(())
    }
}

/// Gains of the tuned model over the base by layer.
fn gains(report: &mut Report, base: &Insight, tuned: &Insight) {
    let about = "last prompt token, tuned minus base: attention to the passage (CAG) and to the answer in it (AAG), and \
                 probability of the answers' first tokens by the logit lens";
    let table = report.table("gains", about, &["layer", "CAG", "AAG", "p(passage's answer)", "p(memory's answer)"]);
    for layer in 0..base.passage.len() {
        let gain = |of: fn(&Insight) -> &Vec<f64>| json!(of(tuned)[layer] - of(base)[layer]);
        table.row([
            json!(layer),
            gain(|i| &i.to_passage),
            gain(|i| &i.to_answer),
            gain(|i| &i.passage),
            gain(|i| &i.memory),
        ]);
    }
}

/// Validation losses.
pub fn curve(report: &mut Report, trained: &Trained) {
    let table = report.table("validation", "nats per answer token; the best is kept", &["step", "loss", "kept"]);
    for &(step, loss) in &trained.curve {
        table.row([json!(step), json!(loss), json!(if step == trained.best { "*" } else { "" })]);
    }
}
