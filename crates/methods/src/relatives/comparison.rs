//! The relatives beside each other: every task answered by the model that each makes on the task's own calibration texts.

use quorate_eval::compare::{Cell, Row, Source};
use quorate_eval::encode::is_language_modelling;
use quorate_eval::evaluate::TaskScore;
use quorate_eval::tasks::{Task, TaskItem};
use quorate_lens::Scope;
use quorate_model::RoutingMode;

use super::{Aligner, Bench, Calibration, Compressed, RELATIVES, Setup};
use crate::{Lab, MethodError};

/// Most tokens of an answer.
const ANSWER_TOKENS: usize = 96;

/// What is compared.
#[derive(Clone, Debug)]
pub struct RelativesComparison {
    /// Experts kept per layer.
    pub keep: Vec<usize>,
    /// Routing mode of those that remove experts.
    pub mode: RoutingMode,
    /// Calibration texts at most.
    pub texts: usize,
    /// Tokens of them on which all experts are run.
    pub tokens: usize,
}

impl RelativesComparison {
    /// With as many texts and tokens as the commands take.
    pub fn new(keep: Vec<usize>, mode: RoutingMode) -> RelativesComparison {
        RelativesComparison { keep, mode, texts: Setup::TEXTS, tokens: Setup::TOKENS }
    }

    /// The rows of the table, the full model first.
    pub fn rows(&self, experts: usize) -> Vec<Row> {
        let mut rows = vec![Row::new(Source::All, "all", Scope::Local, self.mode, experts)];
        for relative in RELATIVES {
            let source = if relative.name == "random" { Source::Random } else { Source::Own };
            rows.extend(self.keep.iter().map(|&k| Row::new(source, relative.name, relative.scope, self.mode, k)));
        }
        rows
    }

    /// Answers the questions of `test` by every row that `cells` does not hold yet, calibrated on `calibration`. What is
    /// done when the user stops stays in `cells`. A task without questions adds none.
    ///
    /// # Errors
    /// A number that cannot be kept, no texts, or as [`Lab::answer`].
    pub fn task(
        &self,
        lab: &mut Lab<'_>,
        aligner: &mut Aligner,
        calibration: &Task,
        test: &Task,
        cells: &mut Vec<Cell>,
    ) -> Result<(), MethodError> {
        let map = lab.experts()?;
        let items: Vec<&TaskItem> = test.items.iter().filter(|i| !is_language_modelling(i)).collect();
        let rows = self.rows(map.experts.iter().copied().min().unwrap_or(0));
        let open: Vec<&Row> =
            rows.iter().filter(|row| !cells.iter().any(|c| c.row == **row && c.task == test.name)).collect();
        if items.is_empty() || open.is_empty() {
            return Ok(());
        }
        let texts: Vec<TaskItem> = calibration.items.iter().take(self.texts).cloned().collect();
        let encoded = lab.encode(&texts)?;
        let calibration = Calibration::record(lab, &encoded, self.tokens)?;
        for (i, row) in open.iter().enumerate() {
            lab.part = (i, open.len());
            let made = match RELATIVES.iter().find(|r| r.name == row.metric) {
                Some(relative) => {
                    let mut bench =
                        Bench { model: &lab.model, calibration: &calibration, aligner: &mut *aligner, mode: self.mode };
                    (relative.compress)(&mut bench, row.keep)?
                }
                None => Compressed::nothing(&map),
            };
            let mut score = TaskScore::default();
            let answers = made.answer(lab, &format!("answering {}", test.name), &items, ANSWER_TOKENS)?;
            answers.iter().for_each(|a| score.add(a));
            let (row, task) = ((*row).clone(), test.name.clone());
            cells.push(Cell { row, task, exact_match: score.exact_match(), perplexity: None, top1: None });
        }
        lab.part = (0, 1);
        Ok(())
    }
}
