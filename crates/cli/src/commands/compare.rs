//! `quorate compare`: which metric, and whose experts, answer best with few experts.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use quorate_eval::compare::{Cell, mean, score_task};
use quorate_eval::encode::encode_text;
use quorate_eval::tasks::{Task, load_tasks};
use quorate_lens::{Choice, GENERALIST, KeyMetric, Library, Plan, retrieve};
use quorate_methods::{DEFAULT_METRIC, METRICS};
use quorate_model::{Model, RoutingMode};
use serde_json::json;

use crate::common::{Common, interrupted, parse_count, say, write_file};
use crate::experts::{ModeArg, ScopeArg, need_experts, per_layer};

/// Arguments of `compare`.
#[derive(Args)]
#[command(after_help = "\
Experts come from six sources: `all`; `own`, the task's pattern; `auto`, the pattern retrieved for each prompt; `other`, the \
mean over three other tasks' patterns; `generalist`; `random`. The last four use the first metric. Finished cells are kept \
in OUT.json, so that an interrupted comparison goes on when the same command is given again.

Examples:
  quorate compare -o results
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
    /// Writes OUT.md (tables) and OUT.json (cells)
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
}

/// Everything that one comparison needs.
struct Comparison<'a> {
    args: &'a Compare,
    model: Model,
    library: Library,
    tasks: Vec<Task>,
    /// Pattern retrieved for every item of every task.
    retrieved: Vec<Vec<String>>,
    cells: Vec<Cell>,
}

/// One row of work: a source, a metric and a number of experts.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    source: &'static str,
    metric: String,
    keep: usize,
}

impl Compare {
    pub fn run(&self, common: &Common) -> Result<()> {
        let metrics: Vec<String> = if self.metrics.is_empty() {
            let others = METRICS.iter().map(|m| m.name).filter(|&m| m != DEFAULT_METRIC);
            std::iter::once(DEFAULT_METRIC).chain(others).map(String::from).collect()
        } else {
            self.metrics.clone()
        };
        metrics.iter().try_for_each(|m| quorate_methods::metric(m).map(|_| ()))?;
        let tasks = load_tasks(&common.task_paths(&self.tasks)?, Some(&self.split))?;
        let mut model = common.open_model(None)?;
        need_experts(&model)?;
        self.keep.iter().try_for_each(|&k| per_layer(model.spec(), self.scope, k).map(|_| ()))?;
        let library = common.open_library()?;
        let retrieved = retrieved(&mut model, &library, &tasks, self.limit)?;
        model.load_all_experts()?;
        let cells = self.saved(model.checkpoint().fingerprint())?;
        let mut comparison = Comparison { args: self, model, library, tasks, retrieved, cells };

        let experts = comparison.model.spec().moe_layers().into_iter().filter_map(|l| comparison.model.spec().moe(l));
        let experts = experts.map(|m| m.n_experts).min().unwrap_or(0);
        let mut rows = vec![Row { source: "all", metric: metrics[0].clone(), keep: experts }];
        for &keep in &self.keep {
            for source in ["own", "auto", "other", "generalist", "random"] {
                let metric = if source == "random" { "random".to_string() } else { metrics[0].clone() };
                rows.push(Row { source, metric, keep });
            }
            rows.extend(metrics[1..].iter().map(|m| Row { source: "own", metric: m.clone(), keep }));
        }
        let mut progress = common.progress("compare", (rows.len() * comparison.tasks.len()) as u64, "cells");
        let mut done = 0;
        for row in &rows {
            for task in 0..comparison.tasks.len() {
                comparison.cell(row, task)?;
                done += 1;
                progress.set(done);
            }
            comparison.save()?;
        }
        progress.finish();
        let text = comparison.markdown(&metrics, experts);
        write_file(&self.file("md"), text.as_bytes())?;
        if common.json {
            return common.print_json(&json!({ "cells": comparison.cells }));
        }
        Ok(say!("{text}")?)
    }

    /// OUT.md or OUT.json.
    fn file(&self, extension: &str) -> PathBuf {
        let mut name = self.output.clone().into_os_string();
        name.push(format!(".{extension}"));
        name.into()
    }

    /// Cells of an earlier run with the same model and settings.
    fn saved(&self, fingerprint: &str) -> Result<Vec<Cell>> {
        let path = self.file("json");
        let Ok(text) = std::fs::read_to_string(&path) else { return Ok(Vec::new()) };
        let saved: serde_json::Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        if saved["fingerprint"] != json!(fingerprint)
            || saved["limit"] != json!(self.limit)
            || saved["split"] != json!(self.split)
        {
            bail!("{} is of another model, split or limit; help: remove it or give another -o", path.display());
        }
        serde_json::from_value(saved["cells"].clone()).with_context(|| path.display().to_string())
    }
}

/// The pattern that each item's prompt retrieves.
fn retrieved(model: &mut Model, library: &Library, tasks: &[Task], limit: usize) -> Result<Vec<Vec<String>>> {
    let mut all = Vec::with_capacity(tasks.len());
    for task in tasks {
        let prompts =
            task.items.iter().take(limit).map(|i| encode_text(model, &i.prompt)).collect::<Result<Vec<_>, _>>()?;
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let Some(found) = retrieve(model, library, &prompts, KeyMetric::Hidden)? else {
            bail!("the library has no patterns of this model; help: make them with `quorate profile --tasks DIR`");
        };
        all.push(found.into_iter().map(|f| f.task).collect());
    }
    Ok(all)
}

impl Comparison<'_> {
    /// Computes a cell unless it is there.
    fn cell(&mut self, row: &Row, task: usize) -> Result<()> {
        let mode = RoutingMode::from(self.args.mode).name().to_string();
        let scope = format!("{:?}", self.args.scope).to_lowercase();
        let name = self.tasks[task].name.clone();
        let same = |c: &Cell| {
            (c.source.as_str(), &c.metric, c.keep, &c.task, &c.mode, &c.scope)
                == (row.source, &row.metric, row.keep, &name, &mode, &scope)
        };
        if self.cells.iter().any(same) {
            return Ok(());
        }
        let items: Vec<usize> = (0..self.tasks[task].items.len().min(self.args.limit)).collect();
        let names: Vec<String> = self.tasks.iter().map(|t| t.name.clone()).collect();
        let mut scores = Vec::new();
        for plans in match row.source {
            "all" => vec![vec![(None, items)]],
            "own" | "random" => vec![vec![(Some(self.plan(&name, row)?), items)]],
            "generalist" => vec![vec![(Some(self.plan(GENERALIST, row)?), items)]],
            "auto" => vec![self.auto(task, row)?],
            _ => [1, 5, 11]
                .iter()
                .map(|shift| Ok(vec![(Some(self.plan(&names[(task + shift) % names.len()], row)?), items.clone())]))
                .collect::<Result<Vec<_>>>()?,
        } {
            let score =
                score_task(&mut self.model, &self.tasks[task], self.args.limit, &plans, &mut || !interrupted())?;
            let Some(score) = score else {
                self.save()?;
                bail!("interrupted; what is done so far is kept, give the same command again to go on");
            };
            scores.push(score);
        }
        let average = |f: fn(&quorate_eval::evaluate::TaskScore) -> Option<f64>| {
            let values: Vec<f64> = scores.iter().filter_map(f).collect();
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        self.cells.push(Cell {
            source: row.source.to_string(),
            metric: row.metric.clone(),
            mode,
            scope,
            keep: row.keep,
            task: name,
            exact_match: average(|s| s.exact_match()),
            perplexity: average(|s| s.perplexity()),
            top1: average(|s| s.top1()),
        });
        Ok(())
    }

    /// Plans of the patterns that a task's items retrieve, with the items of each.
    fn auto(&self, task: usize, row: &Row) -> Result<Vec<(Option<Plan>, Vec<usize>)>> {
        let mut groups: std::collections::BTreeMap<&str, Vec<usize>> = std::collections::BTreeMap::new();
        for (item, name) in self.retrieved[task].iter().enumerate() {
            groups.entry(name).or_default().push(item);
        }
        groups.into_iter().map(|(name, items)| Ok((Some(self.plan(name, row)?), items))).collect()
    }

    fn plan(&self, pattern: &str, row: &Row) -> Result<Plan> {
        let fingerprint = self.model.checkpoint().fingerprint();
        let keep = per_layer(self.model.spec(), self.args.scope, row.keep)?;
        let (metric, scope, mode) = (row.metric.clone(), self.args.scope.into(), self.args.mode.into());
        let choice = Choice { metric, keep: Some(keep), scope, mode, protect: Vec::new() };
        Ok(choice.plan(&self.library.get(fingerprint, pattern)?, self.model.spec(), fingerprint)?)
    }

    fn save(&self) -> Result<()> {
        let (fingerprint, args) = (self.model.checkpoint().fingerprint(), self.args);
        let document =
            json!({ "fingerprint": fingerprint, "split": args.split, "limit": args.limit, "cells": self.cells });
        write_file(&args.file("json"), serde_json::to_string(&document)?.as_bytes())
    }

    /// The tables.
    fn markdown(&self, metrics: &[String], experts: usize) -> String {
        let (mode, scope) = (RoutingMode::from(self.args.mode).name(), format!("{:?}", self.args.scope).to_lowercase());
        let here: Vec<&Cell> = self.cells.iter().filter(|c| c.mode == mode && c.scope == scope).collect();
        let number = |v: Option<f64>| v.map_or("-".to_string(), |v| format!("{v:.1}"));
        let mut text = String::new();
        let _ = writeln!(
            text,
            "Model `{}`, split `{}`, up to {} items per task, routing mode `{mode}`, scope `{scope}`.\n",
            self.model.checkpoint().fingerprint(),
            self.args.split,
            self.args.limit
        );
        let _ = writeln!(text, "### Mean exact match by source of the experts (metric `{}`)\n", metrics[0]);
        let _ = writeln!(
            text,
            "| kept of {experts} | own | retrieved | other task's | generalist | random |\n|---|---|---|---|---|---|"
        );
        let mean_of = |source: &str, metric: &str, keep: usize| {
            mean(here.iter().copied(), |c| c.source == source && c.metric == metric && c.keep == keep)
        };
        let all = mean(here.iter().copied(), |c| c.source == "all");
        let _ = writeln!(text, "| {experts} (all) | {} | | | | |", number(all));
        for &keep in &self.args.keep {
            let by =
                |source: &str| number(mean_of(source, if source == "random" { "random" } else { &metrics[0] }, keep));
            let cells: Vec<String> = ["own", "auto", "other", "generalist", "random"].iter().map(|s| by(s)).collect();
            let _ = writeln!(text, "| {keep} | {} |", cells.join(" | "));
        }
        let _ = writeln!(text, "\n### Mean exact match by metric (own pattern)\n");
        let header: Vec<String> = self.args.keep.iter().map(|k| format!("{k} kept")).collect();
        let _ = writeln!(text, "| metric | {} |\n|---|{}", header.join(" | "), "---|".repeat(header.len()));
        for metric in metrics {
            let source = if metric == "random" { "random" } else { "own" };
            let values: Vec<String> = self.args.keep.iter().map(|&k| number(mean_of(source, metric, k))).collect();
            let _ = writeln!(text, "| {metric} | {} |", values.join(" | "));
        }
        for &keep in &self.args.keep {
            let _ = writeln!(text, "\n### {keep} experts kept, by task (metric `{}`)\n", metrics[0]);
            let _ = writeln!(
                text,
                "| task | all | own | retrieved | other task's | generalist | random | best metric (own) |\n|---|---|---|---|---|---|---|---|"
            );
            for task in &self.tasks {
                let cell = |source: &str, metric: &str, keep: usize| {
                    let mut fits = here.iter().filter(|c| c.task == task.name && c.source == source && c.keep == keep);
                    fits.find(|c| c.metric == metric)
                };
                let show = |c: Option<&&Cell>| match c {
                    Some(Cell { exact_match: Some(v), .. }) => format!("{v:.1}"),
                    Some(Cell { perplexity: Some(p), top1: Some(t), .. }) => format!("ppl {p:.1}, top-1 {t:.1}"),
                    _ => "-".to_string(),
                };
                let mut row = vec![show(cell("all", &metrics[0], experts))];
                for source in ["own", "auto", "other", "generalist", "random"] {
                    let metric = if source == "random" { "random" } else { metrics[0].as_str() };
                    row.push(show(cell(source, metric, keep)));
                }
                row.push(self.best(metrics, &task.name, keep, &here));
                let _ = writeln!(text, "| {} | {} |", task.name, row.join(" | "));
            }
        }
        text
    }

    /// The metrics with the best score of a task, and that score.
    fn best(&self, metrics: &[String], task: &str, keep: usize, here: &[&Cell]) -> String {
        let value = |c: &Cell| c.exact_match.or(c.top1).unwrap_or(0.0);
        let own: Vec<&&Cell> = (here.iter())
            .filter(|c| c.task == task && c.keep == keep && c.source == "own" && metrics.contains(&c.metric))
            .collect();
        let Some(top) = own.iter().map(|c| value(c)).max_by(f64::total_cmp) else { return "-".into() };
        let names: Vec<&str> = own.iter().filter(|c| value(c) == top).map(|c| c.metric.as_str()).collect();
        let named = if names.len() > 3 {
            format!("{} and {} more", names[..2].join(", "), names.len() - 2)
        } else {
            names.join(", ")
        };
        format!("{named} ({top:.1})")
    }
}
