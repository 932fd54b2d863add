//! What the relatives' commands have in common: on what they are calibrated, how many experts stay, and the measurement.

use clap::Args;
use quorate_eval::encode::EncodedItem;
use quorate_eval::evaluate::TaskScore;
use quorate_eval::tasks::TaskItem;
use quorate_model::RoutingMode;
use serde::Serialize;
use serde_json::json;

use super::{Calibration, Compressed};
use crate::{Lab, MethodError, Report};

/// Most tokens of an answer.
const ANSWER_TOKENS: usize = 96;

/// Calibration texts, number kept, measurement.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Setup {
    /// The task whose texts calibrate, and on whose test items answers are measured
    #[arg(long, default_value = "arithmetic")]
    pub task: String,
    /// Experts kept in every layer; left out, a quarter
    #[arg(long, value_name = "K")]
    pub keep: Option<usize>,
    /// Calibration texts at most
    #[arg(long, default_value_t = Setup::TEXTS, value_name = "N")]
    pub texts: usize,
    /// Tokens of them on which all experts of a layer are run, about
    #[arg(long, default_value_t = Setup::TOKENS, value_name = "N")]
    pub tokens: usize,
    /// Test items on which answers are measured (0: none)
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub items: usize,
    /// What happens to tokens whose expert is removed: mask, mask-full-gates, drop or drop-renormalise
    #[arg(long, default_value = "mask-full-gates", value_parser = parse_mode)]
    pub mode: RoutingMode,
}

fn parse_mode(name: &str) -> Result<RoutingMode, String> {
    let names = RoutingMode::ALL.map(RoutingMode::name).join(", ");
    let found = RoutingMode::ALL.into_iter().find(|m| m.name() == name);
    found.ok_or_else(|| format!("there is no routing mode `{name}`; help: the modes are {names}"))
}

impl Setup {
    /// Calibration texts, unless told otherwise.
    pub const TEXTS: usize = 400;
    /// Tokens on which all experts of a layer are run, unless told otherwise.
    pub const TOKENS: usize = 512;

    /// The calibration texts as tokens.
    ///
    /// # Errors
    /// No such task.
    pub fn encoded(&self, lab: &mut Lab<'_>) -> Result<Vec<EncodedItem>, MethodError> {
        let mut items = lab.task("train-sample", &self.task)?.items;
        items.truncate(self.texts);
        lab.encode(&items)
    }

    /// Records the calibration texts.
    ///
    /// # Errors
    /// A dense model, no such task, or no texts.
    pub fn calibration(&self, lab: &mut Lab<'_>) -> Result<Calibration, MethodError> {
        lab.experts()?;
        let items = self.encoded(lab)?;
        Calibration::record(lab, &items, self.tokens)
    }

    /// Experts kept in every layer, at least `least`.
    ///
    /// # Errors
    /// A number that no layer can keep.
    pub fn keep(&self, lab: &Lab<'_>, least: usize) -> Result<usize, MethodError> {
        let most = lab.experts()?.experts.iter().copied().min().unwrap_or(0);
        let keep = self.keep.unwrap_or((most / 4).max(least));
        if (least..=most).contains(&keep) {
            return Ok(keep);
        }
        Err(MethodError::needs(
            format!("{keep} experts cannot be kept in a layer"),
            format!("--keep {least} to --keep {most}"),
        ))
    }

    /// Experts that a token uses: the fewest that can be kept where removed ones are refilled.
    pub fn top_k(lab: &Lab<'_>) -> usize {
        let spec = lab.model.spec();
        spec.moe_layers().iter().filter_map(|&l| spec.moe(l)).map(|m| m.top_k).max().unwrap_or(1)
    }

    /// Measures answers to the task's test items in several ways; see [`measure`].
    ///
    /// # Errors
    /// As [`measure`].
    pub fn measure(
        &self,
        lab: &mut Lab<'_>,
        report: &mut Report,
        ways: &[(&str, &Compressed)],
    ) -> Result<(), MethodError> {
        if self.items == 0 {
            return Ok(());
        }
        let mut items = lab.task("test", &self.task)?.items;
        items.truncate(self.items);
        measure(lab, report, &items, ways)
    }
}

/// Answers items with each of several compressed models: a table of exact match (or perplexity of plain text), and a
/// headline for each.
///
/// # Errors
/// As [`Compressed::answer`].
pub fn measure(
    lab: &mut Lab<'_>,
    report: &mut Report,
    items: &[TaskItem],
    ways: &[(&str, &Compressed)],
) -> Result<(), MethodError> {
    let items: Vec<&TaskItem> = items.iter().collect();
    let mut rows = Vec::with_capacity(ways.len());
    for (i, (name, way)) in ways.iter().enumerate() {
        lab.part = (i, ways.len());
        let mut score = TaskScore::default();
        let answers = way.answer(lab, "answering the test items", &items, ANSWER_TOKENS)?;
        answers.iter().for_each(|answer| score.add(answer));
        rows.push([json!(name), json!(score.exact_match()), json!(score.perplexity()), json!(score.top1())]);
        let key = name.replace([' ', '-'], "_");
        match (score.exact_match(), score.perplexity()) {
            (Some(exact), _) => report.headline(&format!("exact_match_{key}"), exact),
            (None, perplexity) => report.headline(&format!("perplexity_{key}"), perplexity),
        }
    }
    lab.part = (0, 1);
    let about = format!("{} test items; exact match and next-token accuracy in percent", items.len());
    let table = report.table("answers", &about, &["experts", "exact match", "perplexity", "top-1"]);
    rows.into_iter().for_each(|row| table.row(row));
    Ok(())
}
