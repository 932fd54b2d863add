//! `quorate compare`: which metric, and whose experts, answer best with few experts.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use quorate_eval::compare::{Cell, Comparison, Row, Source};
use quorate_eval::compare_tables::{Tables, relatives_table};
use quorate_eval::tasks::{Task, load_tasks};
use quorate_formats::write_file;
use quorate_lens::{Keep, Scope};
use quorate_methods::relatives::{Aligner, RELATIVES, RelativesComparison};
use quorate_methods::{DEFAULT_METRIC, Lab, METRICS, MethodError};
use quorate_model::RoutingMode;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::common::{Common, interrupted, parse_count, say};
use crate::experts::{ModeArg, ScopeArg, need_experts};
use crate::method::Outside;

/// Arguments of `compare`.
#[derive(Args)]
#[command(after_help = "\
Experts come from six sources: `all`; `own`, the task's pattern; `auto`, the pattern retrieved for each prompt; `other`, the \
mean over three other tasks' patterns; `generalist`; `random`. Only `own` is scored by every metric, the others by the \
first. Finished cells are kept in OUT.json, so that an interrupted comparison goes on when the same command is given again.

Examples:
  quorate compare --routing -o results
  quorate compare --relatives 60 --keep 16,8 --metrics peu -o relatives
  quorate compare --keep 8 --metrics easy-ep,peu,reap --limit 50 -o quick")]
pub struct Compare {
    /// Task files or folders; left out with the embedded model, its own tasks
    #[arg(long, value_name = "PATH", num_args = 1..)]
    tasks: Vec<PathBuf>,
    /// Which files of a folder
    #[arg(long, default_value = "test")]
    split: String,
    /// Experts per layer
    #[arg(long, value_name = "K,..", value_delimiter = ',', default_values_t = [16, 12, 8, 6, 4])]
    keep: Vec<usize>,
    /// Metrics; left out, all, the default first
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    metrics: Vec<String>,
    /// Items per task at most
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = parse_count)]
    limit: usize,
    /// Whether layers keep equal numbers or compete
    #[arg(long, value_enum, default_value_t = ScopeArg::Global)]
    scope: ScopeArg,
    /// What happens to tokens whose expert is not kept
    #[arg(long, value_enum, default_value_t = ModeArg::MaskFullGates)]
    mode: ModeArg,
    /// Also compare the scopes and routing modes, with the own pattern and the first metric
    #[arg(long)]
    routing: bool,
    /// Also compare the relatives (naee, mone, merging, ...) on at most N questions of each task, calibrated on its texts
    #[arg(long, value_name = "N", value_parser = parse_count)]
    relatives: Option<usize>,
    /// Writes OUT.md (tables) and OUT.json (cells)
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
}

impl Compare {
    pub fn run(&self, common: &Common) -> Result<()> {
        let metrics = self.metrics()?;
        let mut tasks = load_tasks(&common.task_paths(&self.tasks)?, Some(&self.split))?;
        tasks.iter_mut().for_each(|task| task.items.truncate(self.limit));
        let model = common.open_model(None)?;
        need_experts(&model)?;
        let scope: Scope = self.scope.into();
        self.keep.iter().try_for_each(|&k| Keep::per_layer(model.spec(), scope, k).map(|_| ()))?;
        let library = common.open_library()?;
        let fingerprint = model.checkpoint().fingerprint().to_string();
        let inputs = inputs(&tasks, &serde_json::to_string(&library.list(Some(&fingerprint))?)?);
        let experts = model.spec().moe_layers().into_iter().filter_map(|l| model.spec().moe(l));
        let experts = experts.map(|m| m.n_experts).min().unwrap_or(0);
        let rows = self.rows(&metrics, experts);
        let Saved { cells, mut relatives } = self.saved(&fingerprint, &inputs)?;
        let mut comparison = Comparison::new(model, library, tasks, cells)?;
        let save = |cells: &[Cell], relatives: &Option<Relatives>| -> Result<()> {
            let mut document = json!({ "fingerprint": fingerprint, "inputs": inputs, "split": self.split,
                "limit": self.limit, "cells": cells });
            if let Some(relatives) = relatives {
                document["relatives"] = json!(relatives);
            }
            Ok(write_file(&self.file("json"), serde_json::to_string(&document)?.as_bytes())?)
        };
        let n_tasks = comparison.tasks().len();
        let mut progress = common.progress("compare", (rows.len() * n_tasks) as u64, "cells");
        for (i, row) in rows.iter().enumerate() {
            for task in 0..n_tasks {
                if !comparison.cell(row, task, &mut || !interrupted())? {
                    save(&comparison.cells, &relatives)?;
                    bail!(INTERRUPTED);
                }
                progress.set((i * n_tasks + task + 1) as u64);
            }
            save(&comparison.cells, &relatives)?;
        }
        progress.finish();
        let mut section = String::new();
        if let Some(limit) = self.relatives {
            section =
                self.relatives(common, limit, &mut relatives, &mut |relatives| save(&comparison.cells, relatives))?;
        }
        let tables = Tables {
            cells: &comparison.cells,
            tasks: comparison.tasks().iter().map(|t| t.name.as_str()).collect(),
            metrics: &metrics,
            keep: &self.keep,
            experts,
            setting: (scope, self.mode.into()),
        };
        let mode = RoutingMode::from(self.mode).name();
        let (split, limit, scope) = (&self.split, self.limit, scope.name());
        let routing = if self.routing { " --routing" } else { "" };
        let routing = match self.relatives {
            Some(n) => format!("{routing} --relatives {n}"),
            None => routing.to_string(),
        };
        let text = format!(
            "# Answers with few experts\n\nMade by `quorate compare{routing} -o {}`: model `{fingerprint}`, split `{split}`, up to {limit} items per \
             task, scope `{scope}`, routing mode `{mode}`.\n\n{}",
            self.output.display(),
            tables.markdown() + &section
        );
        write_file(&self.file("md"), text.as_bytes())?;
        if common.json {
            let relatives = self.relatives.and(relatives).map(|r| r.cells);
            return common.print_json(&json!({ "cells": comparison.cells, "relatives": relatives }));
        }
        Ok(say!("{text}")?)
    }

    /// The metrics asked for, or all with the default first.
    fn metrics(&self) -> Result<Vec<String>> {
        let others = METRICS.iter().map(|m| m.name).filter(|&m| m != DEFAULT_METRIC);
        let all = || std::iter::once(DEFAULT_METRIC).chain(others).map(String::from).collect();
        let metrics: Vec<String> = if self.metrics.is_empty() { all() } else { self.metrics.clone() };
        metrics.iter().try_for_each(|m| quorate_methods::metric(m).map(|_| ()))?;
        Ok(metrics)
    }

    /// All that is compared, each once.
    fn rows(&self, metrics: &[String], experts: usize) -> Vec<Row> {
        let (scope, mode) = (Scope::from(self.scope), RoutingMode::from(self.mode));
        let mut rows = vec![Row::new(Source::All, &metrics[0], scope, mode, experts)];
        for &keep in &self.keep {
            rows.extend(Source::FEW.map(|source| Row::new(source, &metrics[0], scope, mode, keep)));
            rows.extend(metrics[1..].iter().map(|metric| Row::new(Source::Own, metric, scope, mode, keep)));
            if self.routing {
                for scope in [Scope::Local, Scope::Global] {
                    rows.extend(RoutingMode::ALL.map(|mode| Row::new(Source::Own, &metrics[0], scope, mode, keep)));
                }
            }
        }
        rows
    }

    /// OUT.md or OUT.json.
    fn file(&self, extension: &str) -> PathBuf {
        let mut name = self.output.clone().into_os_string();
        name.push(format!(".{extension}"));
        name.into()
    }

    /// Compares the relatives, going on where `known` stopped; returns their section of OUT.md.
    fn relatives(
        &self,
        common: &Common,
        limit: usize,
        known: &mut Option<Relatives>,
        save: &mut dyn FnMut(&Option<Relatives>) -> Result<()>,
    ) -> Result<String> {
        let paths = common.task_paths(&self.tasks)?;
        let mut tests = load_tasks(&paths, Some(&self.split))?;
        tests.iter_mut().for_each(|task| task.items.truncate(limit));
        let calibration = load_tasks(&paths, Some(CALIBRATION_SPLIT))?;
        let inputs = inputs(&tests, &inputs(&calibration, ""));
        let comparison = RelativesComparison::new(self.keep.clone(), self.mode.into());
        let earlier = known.get_or_insert_with(|| Relatives { inputs: inputs.clone(), limit, cells: Vec::new() });
        if earlier.inputs != inputs {
            bail!(
                "{} has relatives on {} questions per task, or other texts; help: give --relatives {1}, remove it or give another -o",
                self.file("json").display(),
                earlier.limit
            );
        }
        let mut model = common.open_model(None)?;
        common.load_all_experts(&mut model)?;
        let mut outside = Outside::new(common, &self.tasks);
        let mut lab = Lab::new(model, &mut outside);
        let mut aligner = Aligner::default();
        for test in &tests {
            let Some(own) = calibration.iter().find(|c| c.name == test.name) else {
                bail!(
                    "task `{}` has no file of the split `{CALIBRATION_SPLIT}`; help: the relatives need texts to calibrate on",
                    test.name
                );
            };
            let Some(Relatives { cells, .. }) = known else { continue };
            let outcome = comparison.task(&mut lab, &mut aligner, own, test, cells);
            save(known)?;
            match outcome {
                Err(MethodError::Interrupted) => bail!(INTERRUPTED),
                outcome => outcome?,
            }
        }
        let names: Vec<(&str, &str)> = RELATIVES.iter().map(|r| (r.name, r.about)).collect();
        let cells = known.as_ref().map_or(&[][..], |k| &k.cells);
        let asked: std::collections::HashSet<&str> = cells.iter().map(|c| c.task.as_str()).collect();
        Ok(format!(
            "\n### The relatives beside PEU, REAP and random experts\n\nMean exact match over {} tasks, the first {limit} questions of \
             each; every row is calibrated on the same {} texts of the task at most (`{CALIBRATION_SPLIT}`). Every layer keeps equally \
             many, but for the rows of equal shares, which keep so many on average; routing mode `{}` where experts are removed.\n\n{}",
            asked.len(),
            comparison.texts,
            comparison.mode.name(),
            relatives_table(cells, &names, &self.keep)
        ))
    }

    /// Cells of an earlier run of the same comparison.
    fn saved(&self, fingerprint: &str, inputs: &str) -> Result<Saved> {
        let path = self.file("json");
        let Ok(text) = std::fs::read_to_string(&path) else { return Ok(Saved::default()) };
        let saved: serde_json::Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        if saved["fingerprint"] != json!(fingerprint) || saved["inputs"] != json!(inputs) {
            bail!(
                "{} is of another model, other tasks or patterns; help: remove it or give another -o",
                path.display()
            );
        }
        serde_json::from_value(saved).with_context(|| path.display().to_string())
    }
}

/// The split whose texts calibrate the relatives.
const CALIBRATION_SPLIT: &str = "train-sample";
const INTERRUPTED: &str = "interrupted; what is done so far is kept, give the same command again to go on";

/// What OUT.json holds of an earlier run.
#[derive(Default, Deserialize)]
struct Saved {
    cells: Vec<Cell>,
    #[serde(default)]
    relatives: Option<Relatives>,
}

/// The relatives' part of OUT.json.
#[derive(Serialize, Deserialize)]
struct Relatives {
    /// A hash of questions and calibration texts.
    inputs: String,
    /// Questions per task at most.
    limit: usize,
    cells: Vec<Cell>,
}

/// A hash of what the answers depend on besides the model: task items and patterns.
fn inputs(tasks: &[Task], patterns: &str) -> String {
    let mut hash = crate::common::Fnv::default();
    tasks.iter().flat_map(|t| &t.items).for_each(|i| hash.mix(&format!("{}\0{}\0", i.prompt, i.answer)));
    hash.mix(patterns);
    hash.hex()
}
