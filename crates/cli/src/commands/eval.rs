//! `quorate eval`: task files answered and scored, with all experts or with a choice of them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use quorate_eval::encode::encode_text;
use quorate_eval::evaluate::{EvalOptions, TaskScore, evaluate};
use quorate_eval::tasks::{TaskItem, load_tasks};
use quorate_lens::{Interventions, Library, retrieve};
use quorate_model::{Lens, Model, NoLens};
use serde_json::{Value, json};

use crate::common::{Common, interrupted, parse_count, peak_rss_bytes, say};
use crate::experts::{Beside, ExpertArgs, load_plan, need_experts, open};
use crate::stream;

/// Arguments of `eval`.
#[derive(Args)]
#[command(after_help = "\
Answers are compared word for word, after the last </think> if there is one. Items with \"meta\": {\"lm\": true} are plain \
text, scored by perplexity and next-token accuracy, and stand apart from the mean.

Examples:
  quorate eval                                 the embedded model, all experts
  quorate eval --task own --keep 8             each task with its own pattern's 8 experts per layer
  quorate eval --task auto --keep 16 --json    the pattern is found anew for each prompt
  quorate eval --tasks my.jsonl --task bios --metric reap")]
pub struct Eval {
    /// Task files or folders; left out with the embedded model, its own tasks
    #[arg(long, value_name = "PATH", num_args = 1..)]
    tasks: Vec<PathBuf>,
    /// Which files of a folder
    #[arg(long, default_value = "test")]
    split: String,
    /// Whose experts: `none` all, `own` the task's, `auto` the nearest, `random` random ones, or a pattern's name
    #[arg(long, default_value = "none")]
    task: String,
    /// Plan file: kept experts and interventions
    #[arg(long, value_name = "FILE", conflicts_with_all = ["task", "keep", "metric", "scope", "mode", "protect", "protect_file"])]
    plan: Option<PathBuf>,
    /// Items per task at most
    #[arg(long, value_name = "N", value_parser = parse_count)]
    limit: Option<usize>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 96, value_name = "N")]
    max_tokens: usize,
    /// Fail (exit 1) if the mean exact match is below this
    #[arg(long, value_name = "PERCENT")]
    expect: Option<f64>,
    #[command(flatten)]
    experts: ExpertArgs,
}

/// Items that are answered with the same experts.
struct Group<'a> {
    pattern: Option<String>,
    items: Vec<(usize, &'a TaskItem)>, // (task number, item)
}

impl Eval {
    pub fn run(&self, common: &Common) -> Result<std::process::ExitCode> {
        let start = Instant::now();
        let tasks = load_tasks(&common.task_paths(&self.tasks)?, Some(&self.split))?;
        let (mut model, library) = open(common, &self.experts, &self.task)?;
        let limit = self.limit.unwrap_or(usize::MAX);
        let items: Vec<(usize, &TaskItem)> = (tasks.iter().enumerate())
            .flat_map(|(t, task)| task.items.iter().take(limit).map(move |i| (t, i)))
            .collect();

        let mut experts = self.experts.clone();
        if self.task == "random" {
            experts.metric = "random".into();
        }
        let mut options = EvalOptions { max_tokens: self.max_tokens, ..EvalOptions::default() };
        if experts.memory.is_some() {
            options.parallel = 4;
        }
        let cache_tokens = options.parallel * model.spec().max_position_embeddings;
        let beside = Beside { cache_tokens, logit_rows: options.text_batch_tokens() };
        let mut interventions = Interventions::default();
        let mut plan = json!({ "keep": null, "task": self.task, "metric": null, "mode": null });
        let groups = match &self.plan {
            Some(path) => {
                let (read, prepared) = load_plan(common, &mut model, path, Some((&self.experts, beside)))?;
                interventions = prepared;
                plan = json!({ "keep": null, "task": read.task, "metric": read.metric, "mode": read.routing_mode });
                vec![Group { pattern: None, items: items.clone() }]
            }
            None => self.group(&mut model, &library, &items)?,
        };
        let mut none = NoLens;
        let lens: &mut dyn Lens = if interventions.is_empty() { &mut none } else { &mut interventions };
        let mut scores = vec![TaskScore::default(); tasks.len()];
        let mut used = vec![BTreeMap::<String, usize>::new(); tasks.len()];
        let mut resident = 0;
        let mut progress = common.progress("eval", items.len() as u64, "items");
        let mut done = 0;
        for group in &groups {
            if self.plan.is_none() {
                let loaded = experts.load(common, &mut model, &library, group.pattern.as_deref(), beside)?;
                if let Some(loaded) = loaded {
                    plan["keep"] = json!(
                        model.weights().experts_resident() as f64 / model.spec().moe_layers().len().max(1) as f64
                    );
                    plan["metric"] = json!(loaded.metric);
                    plan["mode"] = json!(loaded.routing_mode);
                }
            }
            resident = resident.max(model.weights().resident_bytes());
            let refs: Vec<&TaskItem> = group.items.iter().map(|(_, item)| *item).collect();
            let answers = evaluate(&model, &refs, &options, lens, &mut |n| {
                progress.set((done + n) as u64);
                !interrupted()
            })?;
            done += refs.len();
            for ((task, _), answer) in group.items.iter().zip(answers) {
                let Some(answer) = answer else { bail!("interrupted") };
                scores[*task].add(&answer);
                if let Some(pattern) = &group.pattern {
                    *used[*task].entry(pattern.clone()).or_default() += 1;
                }
            }
        }
        progress.finish();
        let rows: Vec<Value> = (tasks.iter().zip(&scores).zip(&used))
            .map(|((task, score), used)| {
                json!({ "task": task.name, "n": score.n, "exact_match": score.exact_match(),
                    "perplexity": score.perplexity(), "top1": score.top1(), "pattern_used": used })
            })
            .collect();
        let exact: Vec<f64> = scores.iter().filter_map(TaskScore::exact_match).collect();
        let mean = (!exact.is_empty()).then(|| exact.iter().sum::<f64>() / exact.len() as f64);
        let document = json!({
            "model": common.model_path()?, "fingerprint": model.checkpoint().fingerprint(), "plan": plan, "tasks": rows,
            "mean_exact_match": mean, "resident_bytes": resident, "model_bytes": model.weights().model_bytes(),
            "peak_rss_bytes": peak_rss_bytes(), "stream": stream::report(&model, &stream::stats(&model)),
            "seconds": start.elapsed().as_secs_f64(),
        });
        if common.json {
            common.print_json(&document)?;
        } else {
            print_table(&document)?;
        }
        Ok(match (self.expect, mean) {
            (Some(expected), mean) if mean.is_none_or(|m| m < expected) => {
                match mean {
                    Some(mean) => common.note(&format!("mean exact match {mean:.1} is below the expected {expected}")),
                    None => common.note(&format!("there are no questions whose exact match could reach {expected}")),
                }
                std::process::ExitCode::FAILURE
            }
            _ => std::process::ExitCode::SUCCESS,
        })
    }

    /// Sorts items by the pattern that serves them.
    fn group<'a>(
        &self,
        model: &mut Model,
        library: &Library,
        items: &[(usize, &'a TaskItem)],
    ) -> Result<Vec<Group<'a>>> {
        let all = |pattern| vec![Group { pattern, items: items.to_vec() }];
        if self.task == "none" {
            return Ok(all(None));
        }
        need_experts(model)?;
        let names: Vec<String> = match self.task.as_str() {
            "own" | "random" => items.iter().map(|(_, i)| i.task.clone()).collect(),
            "auto" => {
                let prompts =
                    items.iter().map(|(_, i)| encode_text(model, &i.prompt)).collect::<Result<Vec<_>, _>>()?;
                let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
                let Some(found) = retrieve(model, library, &prompts, self.experts.key.into())? else {
                    bail!(
                        "the library has no patterns of this model; help: make them with `quorate profile --tasks DIR`"
                    );
                };
                found.into_iter().map(|f| f.task).collect()
            }
            name => return Ok(all(Some(name.to_string()))),
        };
        let mut groups: BTreeMap<String, Vec<(usize, &TaskItem)>> = BTreeMap::new();
        for (name, item) in names.into_iter().zip(items) {
            groups.entry(name).or_default().push(*item);
        }
        Ok(groups.into_iter().map(|(name, items)| Group { pattern: Some(name), items }).collect())
    }
}

fn print_table(document: &Value) -> Result<()> {
    let number = |v: &Value| v.as_f64().map_or("-".to_string(), |v| format!("{v:.1}"));
    say!("{:16} {:>6} {:>12} {:>11} {:>7}  patterns used", "task", "n", "exact match", "perplexity", "top-1")?;
    for row in document["tasks"].as_array().map(Vec::as_slice).unwrap_or_default() {
        let used = row["pattern_used"].as_object().map(|used| {
            let mut used: Vec<(&String, u64)> = used.iter().map(|(k, v)| (k, v.as_u64().unwrap_or(0))).collect();
            used.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
            used.iter().map(|(name, n)| format!("{name} {n}")).collect::<Vec<_>>().join(", ")
        });
        say!(
            "{:16} {:>6} {:>12} {:>11} {:>7}  {}",
            row["task"].as_str().unwrap_or_default(),
            row["n"],
            number(&row["exact_match"]),
            number(&row["perplexity"]),
            number(&row["top1"]),
            used.unwrap_or_default(),
        )?;
    }
    say!(
        "mean exact match {}; {} in memory of {}; {:.1} s",
        number(&document["mean_exact_match"]),
        crate::common::human_bytes(document["resident_bytes"].as_u64().unwrap_or(0)),
        crate::common::human_bytes(document["model_bytes"].as_u64().unwrap_or(0)),
        document["seconds"].as_f64().unwrap_or(0.0),
    )?;
    Ok(())
}
