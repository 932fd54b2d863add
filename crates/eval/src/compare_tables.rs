//! A comparison as Markdown tables.

use std::fmt::Write as _;

use quorate_lens::Scope;
use quorate_model::RoutingMode;

use crate::compare::{Cell, Row, Source};

/// What the tables show.
pub struct Tables<'a> {
    /// The cells.
    pub cells: &'a [Cell],
    /// Tasks, in the order of the rows.
    pub tasks: Vec<&'a str>,
    /// Metrics; the first one's experts are compared by source.
    pub metrics: &'a [String],
    /// Numbers of experts.
    pub keep: &'a [usize],
    /// Experts of a layer.
    pub experts: usize,
    /// Scope and routing mode of the main tables.
    pub setting: (Scope, RoutingMode),
}

const SOURCES: &str = "own | retrieved | other task's | generalist | random";

impl Tables<'_> {
    fn row(&self, source: Source, metric: &str, keep: usize) -> Row {
        let keep = if source == Source::All { self.experts } else { keep };
        Row::new(source, metric, self.setting.0, self.setting.1, keep)
    }

    /// Mean exact match of a row over the tasks.
    fn mean(&self, row: &Row) -> Option<f64> {
        let values: Vec<f64> = self.cells.iter().filter(|c| c.row == *row).filter_map(|c| c.exact_match).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    }

    /// All tables.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        self.by_source(&mut text);
        self.by_metric(&mut text);
        self.by_setting(&mut text);
        self.keep.iter().for_each(|&keep| self.by_task(&mut text, keep));
        text
    }

    fn by_source(&self, text: &mut String) {
        let metric = &self.metrics[0];
        line(text, &format!("### Mean exact match by source of the experts (metric `{metric}`)\n"));
        line(text, &format!("| kept of {} | {SOURCES} |\n|---|---|---|---|---|---|", self.experts));
        let all = number(self.mean(&self.row(Source::All, metric, 0)));
        line(text, &format!("| {} (all) | {all} | | | | |", self.experts));
        for &keep in self.keep {
            let cells = Source::FEW.map(|source| number(self.mean(&self.row(source, metric, keep))));
            line(text, &format!("| {keep} | {} |", cells.join(" | ")));
        }
    }

    fn by_metric(&self, text: &mut String) {
        line(text, "\n### Mean exact match by metric (own pattern)\n");
        self.keep_header(text, "metric");
        for metric in self.metrics {
            let source = if metric == "random" { Source::Random } else { Source::Own };
            let values = self.keep.iter().map(|&keep| number(self.mean(&self.row(source, metric, keep))));
            line(text, &format!("| {metric} | {} |", values.collect::<Vec<_>>().join(" | ")));
        }
    }

    /// Other scopes and routing modes, if there are any among the cells.
    fn by_setting(&self, text: &mut String) {
        let metric = &self.metrics[0];
        let mut rows = Vec::new();
        for scope in Scope::ALL {
            for mode in RoutingMode::ALL {
                let values: Vec<Option<f64>> =
                    self.keep.iter().map(|&k| self.mean(&Row::new(Source::Own, metric, scope, mode, k))).collect();
                if values.iter().any(Option::is_some) {
                    let values: Vec<String> = values.into_iter().map(number).collect();
                    rows.push(format!("| {}, {} | {} |", scope.name(), mode.name(), values.join(" | ")));
                }
            }
        }
        if rows.len() > 1 {
            line(text, &format!("\n### Mean exact match by scope and routing mode (own pattern, metric `{metric}`)\n"));
            self.keep_header(text, "scope, mode");
            rows.iter().for_each(|row| line(text, row));
        }
    }

    fn keep_header(&self, text: &mut String, first: &str) {
        let header: Vec<String> = self.keep.iter().map(|k| format!("{k} kept")).collect();
        line(text, &format!("| {first} | {} |\n|---|{}", header.join(" | "), "---|".repeat(header.len())));
    }

    fn by_task(&self, text: &mut String, keep: usize) {
        let metric = &self.metrics[0];
        line(text, &format!("\n### {keep} experts kept, by task (metric `{metric}`)\n"));
        line(text, &format!("| task | all | {SOURCES} | best metric (own) |\n|---|---|---|---|---|---|---|---|"));
        for &task in &self.tasks {
            let show = |source| {
                let row = self.row(source, metric, keep);
                match self.cells.iter().find(|c| c.task == task && c.row == row) {
                    Some(Cell { exact_match: Some(v), .. }) => format!("{v:.1}"),
                    Some(Cell { perplexity: Some(p), top1: Some(t), .. }) => format!("ppl {p:.1}, top-1 {t:.1}"),
                    _ => "-".to_string(),
                }
            };
            let few = Source::FEW.map(show).join(" | ");
            line(text, &format!("| {task} | {} | {few} | {} |", show(Source::All), self.best(task, keep)));
        }
    }

    /// The metrics with the best score of a task, and that score.
    fn best(&self, task: &str, keep: usize) -> String {
        let own = self.metrics.iter().filter_map(|metric| {
            let row = self.row(Source::Own, metric, keep);
            let cell = self.cells.iter().find(|c| c.task == task && c.row == row)?;
            Some((cell.exact_match.or(cell.top1)?, metric.as_str()))
        });
        let own: Vec<(f64, &str)> = own.collect();
        let Some(top) = own.iter().map(|c| c.0).max_by(f64::total_cmp) else { return "-".into() };
        let names: Vec<&str> = own.iter().filter(|c| c.0 == top).map(|c| c.1).collect();
        let named = match names.as_slice() {
            [a, b, rest @ ..] if rest.len() > 1 => format!("{a}, {b} and {} more", rest.len()),
            names => names.join(", "),
        };
        format!("{named} ({top:.1})")
    }
}

/// A table of mean exact match: one line for each of `names` (metric and what it is), one column for each number kept.
pub fn relatives_table(cells: &[Cell], names: &[(&str, &str)], keep: &[usize]) -> String {
    let mean = |of: &dyn Fn(&Row) -> bool| {
        let values: Vec<f64> = cells.iter().filter(|c| of(&c.row)).filter_map(|c| c.exact_match).collect();
        number((!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64))
    };
    let mut text = String::new();
    let header: Vec<String> = keep.iter().map(|k| format!("{k} kept")).collect();
    line(&mut text, &format!("| | what | {} |\n|---|---|{}", header.join(" | "), "---|".repeat(keep.len())));
    for (name, about) in names {
        let values: Vec<String> = keep.iter().map(|&k| mean(&|r| r.metric == *name && r.keep == k)).collect();
        line(&mut text, &format!("| {name} | {about} | {} |", values.join(" | ")));
    }
    line(&mut text, &format!("\nAll experts: {}.", mean(&|r| r.source == Source::All)));
    text
}

fn line(text: &mut String, line: &str) {
    let _ = writeln!(text, "{line}"); // strings can be written to
}

fn number(value: Option<f64>) -> String {
    value.map_or("-".to_string(), |v| format!("{v:.1}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relatives_are_means_over_tasks() {
        let cell = |source, metric: &str, keep, task: &str, value| Cell {
            row: Row::new(source, metric, Scope::Local, RoutingMode::Mask, keep),
            task: task.into(),
            exact_match: Some(value),
            perplexity: None,
            top1: None,
        };
        let cells = [
            cell(Source::All, "all", 8, "t", 90.0),
            cell(Source::Own, "x", 4, "t", 70.0),
            cell(Source::Own, "x", 4, "u", 50.0),
            cell(Source::Random, "random", 2, "u", 5.0),
        ];
        let text = relatives_table(&cells, &[("x", "an x"), ("random", "the control")], &[4, 2]);
        for part in ["| x | an x | 60.0 | - |", "| random | the control | - | 5.0 |", "All experts: 90.0."] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn means_and_best_metrics_by_hand() {
        let setting = (Scope::Global, RoutingMode::Mask);
        let cell = |source, metric: &str, keep, task: &str, value| Cell {
            row: Row::new(source, metric, setting.0, setting.1, keep),
            task: task.into(),
            exact_match: Some(value),
            perplexity: None,
            top1: None,
        };
        let cells = [
            cell(Source::All, "a", 8, "t", 90.0),
            cell(Source::All, "a", 8, "u", 80.0),
            cell(Source::Own, "a", 4, "t", 70.0),
            cell(Source::Own, "a", 4, "u", 60.0),
            cell(Source::Own, "b", 4, "t", 71.0),
            cell(Source::Random, "a", 4, "t", 10.0),
        ];
        let metrics = ["a".to_string(), "b".to_string()];
        let tables =
            Tables { cells: &cells, tasks: vec!["t", "u"], metrics: &metrics, keep: &[4], experts: 8, setting };
        let text = tables.markdown();
        for part in [
            "| 8 (all) | 85.0 |",
            "| 4 | 65.0 | - | - | - | 10.0 |",
            "| b | 71.0 |",
            "| t | 90.0 | 70.0 | - | - | - | 10.0 | b (71.0) |",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        assert!(!text.contains("scope and routing mode"));
    }
}
