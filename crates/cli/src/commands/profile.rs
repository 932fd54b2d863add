//! `quorate profile`: which experts each task needs.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use quorate_eval::encode::EncodedItem;
use quorate_eval::profile::{ProfileRun, Split};
use quorate_eval::tasks::{Task, load_tasks};
use quorate_lens::{
    ExpertMap, GENERALIST, Library, Pattern, PatternInfo, ProfileData, Scope, Selection, coverage, overlap,
};
use quorate_methods::{DEFAULT_METRIC, Phases, all_tables};
use quorate_model::Model;
use serde_json::json;

use crate::common::{Common, interrupted, parse_count, say, write_file};
use crate::embedded;
use crate::experts::need_experts;

/// Batches, and time, between two savings of an unfinished profile.
const SAVE_EVERY: usize = 64;
const SAVE_AFTER: Duration = Duration::from_secs(30);
/// Names that `--task` understands otherwise.
const RESERVED: [&str; 4] = ["auto", "none", "own", "random"];

/// Arguments of `profile`.
#[derive(Args)]
#[command(after_help = "\
Task files are JSON Lines: {\"task\",\"prompt\",\"answer\",\"meta\"?}. In a folder, files named NAME.SPLIT.jsonl belong to a \
split; profiling reads `train-sample` unless --split says otherwise. Every fifth item is held out to tell how well the \
kept experts would serve new texts. A killed profile goes on where it stopped when the same command is given again. \
With two or more tasks the pattern `generalist` pools them all; unfamiliar prompts fall back to it.

Examples:
  quorate profile --tasks tasks/
  quorate profile --tasks math.jsonl --phase answer
  quorate profile --tasks tasks/ --shard 0/2 -o shard0
  quorate profile --tasks tasks/ --shard 1/2 -o shard1
  quorate library merge shard0/*.pattern shard1/*.pattern")]
pub struct Profile {
    /// Task files or folders; left out with the embedded model, its own tasks
    #[arg(long, value_name = "PATH", num_args = 1..)]
    tasks: Vec<PathBuf>,
    /// Which files of a folder
    #[arg(long, default_value = "train-sample")]
    split: String,
    /// Which tokens count
    #[arg(long, value_enum, default_value_t = PhaseArg::Balanced)]
    phase: PhaseArg,
    /// Items per task at most
    #[arg(long, value_name = "N", value_parser = parse_count)]
    limit: Option<usize>,
    /// Hold out every Nth item (0: none)
    #[arg(long, default_value_t = 5, value_name = "N")]
    holdout: usize,
    /// MoE layer (0: the first) whose router recognises prompts; a later one needs the experts before it
    #[arg(long, default_value_t = 0, value_name = "N")]
    key_layer: usize,
    /// Profile only shard I of N of each task's items; shards merge exactly
    #[arg(long, value_name = "I/N", value_parser = parse_shard)]
    shard: Option<(usize, usize)>,
    /// Write pattern files into this folder in place of the library
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// With -o: leave out of the files what only exact merging needs
    #[arg(long, requires = "output")]
    compact: bool,
    /// Begin anew even if an unfinished profile of the same data exists
    #[arg(long)]
    restart: bool,
}

/// [`Phases`] on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum PhaseArg {
    /// Prompt tokens
    Prompt,
    /// Answer tokens
    Answer,
    /// All tokens alike
    Both,
    /// Prompt and answer count half each, whatever their lengths
    Balanced,
}

impl From<PhaseArg> for Phases {
    fn from(phase: PhaseArg) -> Phases {
        match phase {
            PhaseArg::Prompt => Phases::Prompt,
            PhaseArg::Answer => Phases::Answer,
            PhaseArg::Both => Phases::Both,
            PhaseArg::Balanced => Phases::Balanced,
        }
    }
}

fn parse_shard(text: &str) -> Result<(usize, usize), String> {
    let parts = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    parts
        .filter(|(i, n)| i < n)
        .ok_or_else(|| format!("`{text}` is no shard; help: write I/N with I below N, e.g. 0/2"))
}

impl Profile {
    pub fn run(&self, common: &Common) -> Result<()> {
        let tasks = load_tasks(&common.task_paths(&self.tasks)?, Some(&self.split))?;
        tasks.iter().try_for_each(|task| check_name(&task.name))?;
        if tasks.iter().any(|t| t.name == GENERALIST) {
            bail!("the task name `{GENERALIST}` is taken by the pooled pattern; help: rename the task");
        }
        let mut model = common.open_model(None)?;
        need_experts(&model)?;
        let layers = model.spec().moe_layers().len();
        if self.key_layer >= layers {
            let most = layers - 1;
            bail!(
                "--key-layer {} is out of range; help: give 0 to {most}, one of the model's MoE layers",
                self.key_layer
            );
        }
        // Before the work, so that what cannot be written to is known at once.
        let library = match &self.output {
            None => Some(common.open_library()?),
            Some(folder) => {
                std::fs::create_dir_all(folder)
                    .with_context(|| format!("cannot make the folder {}", folder.display()))?;
                None
            }
        };
        model.load_all_experts()?;
        let phases: Phases = self.phase.into();
        let mut patterns = Vec::with_capacity(tasks.len() + 1);
        for task in &tasks {
            let Some(pattern) = self.profile(common, &model, task, phases)? else {
                bail!("interrupted; what is done so far is kept, give the same command again to go on");
            };
            patterns.push(pattern);
        }
        if patterns.len() > 1 && self.shard.is_none() {
            patterns.push(merged(GENERALIST, &patterns.iter().collect::<Vec<_>>(), phases)?);
        }
        if let Some(mut library) = library {
            library.put(&patterns)?;
        }
        if let Some(folder) = &self.output {
            for pattern in &mut patterns {
                if self.compact {
                    pattern.data = None;
                }
                let shard = self.shard.map(|(i, n)| format!(".{i}-of-{n}")).unwrap_or_default();
                write_pattern(pattern, &folder.join(file_name(&format!("{}{shard}.pattern", pattern.info.name))))?;
            }
        }
        for task in &tasks {
            let _ = std::fs::remove_file(self.partial_path(&model, task)?); // gone already if nothing was saved
        }
        report(common, &model, &patterns)
    }

    /// Profiles one task, from where an earlier run stopped; `None` if interrupted.
    fn profile(&self, common: &Common, model: &Model, task: &Task, phases: Phases) -> Result<Option<Pattern>> {
        let limit = self.limit.unwrap_or(usize::MAX);
        let items = task.items.iter().take(limit).map(|item| EncodedItem::new(model, item));
        let items = items.collect::<Result<Vec<_>, _>>()?;
        let shard = self.shard.unwrap_or((0, 1));
        let split = Split { holdout_every: self.holdout, key_layer: self.key_layer, shard };
        let partial = self.partial_path(model, task)?;
        let mut data = ProfileData::new(&ExpertMap::of(model.spec()));
        if !self.restart && partial.exists() {
            let bytes = std::fs::read(&partial).with_context(|| partial.display().to_string())?;
            match Pattern::from_bytes(&bytes, &partial.display().to_string()) {
                Ok(Pattern { data: Some(saved), .. }) => data = saved,
                _ => common.note(&format!("{} is damaged; {} begins anew", partial.display(), task.name)),
            }
        }
        let info = PatternInfo {
            name: task.name.clone(),
            fingerprint: model.checkpoint().fingerprint().to_string(),
            data: task.files.iter().map(|f| f.file_name().unwrap_or_default().to_string_lossy().into_owned()).collect(),
            phases: phases.name().to_string(),
            key_layer: self.key_layer,
            ..PatternInfo::default()
        };
        let save =
            |data: &ProfileData| write_pattern(&Pattern::build(info.clone(), data.clone(), |_| Vec::new()), &partial);
        let mut run = ProfileRun::new(model, &items, split, data);
        if run.done_tokens() > 0 {
            common.note(&format!("{}: going on at {} of {} tokens", task.name, run.done_tokens(), run.total_tokens()));
        }
        let mut progress = common.progress(&task.name, run.total_tokens() as u64, "tokens");
        progress.set(run.done_tokens() as u64);
        let (mut batches, mut saved) = (0, Instant::now());
        while run.step()? {
            batches += 1;
            progress.set(run.done_tokens() as u64);
            if interrupted() {
                save(run.profile())?;
                return Ok(None);
            }
            if batches % SAVE_EVERY == 0 || saved.elapsed() > SAVE_AFTER {
                save(run.profile())?;
                saved = Instant::now();
            }
        }
        progress.finish();
        save(run.profile())?;
        let mut data = run.into_profile();
        data.done_batches = 0;
        let pattern = Pattern::build(info, data, |stats| all_tables(stats, &[stats], phases));
        let [prompt, answer] = pattern.info.tokens;
        let counted = match phases {
            Phases::Prompt => prompt,
            Phases::Answer => answer,
            Phases::Both | Phases::Balanced => prompt + answer,
        };
        if counted == 0 && self.shard.is_none() {
            bail!(
                "task `{}` leaves no tokens to profile (phase {}, {} items, {} of them held out); \
                 help: another --phase, --holdout 0, or more items",
                task.name,
                phases.name(),
                items.len(),
                pattern.info.heldout_items
            );
        }
        Ok(Some(pattern))
    }

    /// Where the unfinished profile of a task is kept: its name tells model, data and settings.
    fn partial_path(&self, model: &Model, task: &Task) -> Result<PathBuf> {
        let mut hash = 0xcbf2_9ce4_8422_2325u64; // FNV-1a
        let mut mix =
            |text: &str| text.bytes().for_each(|b| hash = (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        mix(&format!("{:?} {:?} {} {}", self.limit, self.shard, self.holdout, self.key_layer));
        task.items.iter().for_each(|i| mix(&format!("{}\0{}\0", i.prompt, i.answer)));
        let name = file_name(&format!("{}-{}-{hash:016x}.partial", model.checkpoint().fingerprint(), task.name));
        Ok(embedded::home()?.join("profiles").join(name))
    }
}

/// Refuses names of patterns that no command could address.
pub fn check_name(name: &str) -> Result<()> {
    if RESERVED.contains(&name) {
        bail!("no pattern can be called `{name}`, --task means something else by it; help: choose another name");
    }
    Ok(())
}

/// A task's name as the name of a file, which lies in no other folder whatever the task is called.
pub fn file_name(name: &str) -> String {
    let plain = |(i, c): (usize, char)| {
        let strange = c.is_control() || "/\\:%".contains(c) || (i == 0 && c == '.');
        if strange { format!("%{:02X}", u32::from(c)) } else { c.to_string() }
    };
    name.chars().enumerate().map(plain).collect()
}

/// Writes a pattern file, and its folder if there is none.
pub fn write_pattern(pattern: &Pattern, path: &Path) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    }
    write_file(path, &pattern.to_bytes()?)
}

/// One pattern of several: their tokens pooled. Compact patterns have only scores; then those are averaged by tokens.
pub fn merged(name: &str, patterns: &[&Pattern], phases: Phases) -> Result<Pattern> {
    let first = patterns.first().context("nothing to merge")?;
    patterns.iter().try_for_each(|p| p.check_model(&first.info.fingerprint))?;
    let mut files: Vec<String> = patterns.iter().flat_map(|p| p.info.data.iter().cloned()).collect();
    files.dedup();
    let same = patterns.iter().all(|p| p.info.name == first.info.name);
    let merged_from = if same { Vec::new() } else { patterns.iter().map(|p| p.info.name.clone()).collect() };
    let info = PatternInfo {
        name: name.to_string(),
        fingerprint: first.info.fingerprint.clone(),
        data: files,
        phases: phases.name().to_string(),
        merged_from,
        key_layer: first.info.key_layer,
        ..PatternInfo::default()
    };
    let Some(parts) = patterns.iter().map(|p| p.data.as_ref()).collect::<Option<Vec<&ProfileData>>>() else {
        return Ok(Pattern::averaged(info, patterns)?);
    };
    let mut data = ProfileData::new(&first.map);
    parts.iter().for_each(|part| data.merge(part));
    let domains = if same { vec![&data.stats] } else { parts.iter().map(|p| &p.stats).collect() };
    let tables = all_tables(&data.stats, &domains, phases);
    Ok(Pattern::build(info, data, |_| tables))
}

/// Held-out coverage at several numbers of kept experts, and the overlap with the other patterns.
fn report(common: &Common, model: &Model, patterns: &[Pattern]) -> Result<()> {
    let summaries = patterns.iter().map(|p| summary(model, p, patterns)).collect::<Result<Vec<_>>>()?;
    if common.json {
        return common.print_json(&json!({ "fingerprint": model.checkpoint().fingerprint(), "patterns": summaries }));
    }
    say!(
        "held-out coverage (share of selections / of gate mass that the kept experts serve), metric {DEFAULT_METRIC}"
    )?;
    summaries.iter().try_for_each(print_summary)
}

/// What a profile is never shown without.
pub fn summary(model: &Model, pattern: &Pattern, others: &[Pattern]) -> Result<serde_json::Value> {
    let scores = pattern.scores(DEFAULT_METRIC)?;
    let floor: Vec<usize> = pattern.map.layers.iter().map(|&l| model.spec().moe(l).map_or(0, |m| m.top_k)).collect();
    let selection = Selection { scope: Scope::Global, floor, ..Selection::default() };
    let experts = pattern.map.experts.iter().min().copied().unwrap_or(0);
    let top_k = selection.floor.iter().max().copied().unwrap_or(1);
    let keep = |k: usize| quorate_lens::Keep::Total(k * pattern.map.n_layers());
    let mut covered = Vec::new();
    for k in
        [experts / 2, experts * 3 / 8, experts / 4, experts * 3 / 16, experts / 8].into_iter().filter(|&k| k >= top_k)
    {
        let kept = selection.select(scores, keep(k))?;
        let found = coverage(&pattern.map, &pattern.heldout_count, &pattern.heldout_gate, &kept);
        covered.push(json!({ "keep": k, "coverage": found }));
    }
    let quarter = (experts / 4).max(top_k);
    let own = selection.select(scores, keep(quarter))?;
    let mut overlaps = Vec::new();
    for other in others.iter().filter(|o| o.info.name != pattern.info.name && o.info.merged_from.is_empty()) {
        let theirs = selection.select(other.scores(DEFAULT_METRIC)?, keep(quarter))?;
        overlaps.push((overlap(&own, &theirs), other.info.name.clone()));
    }
    overlaps.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mean = (!overlaps.is_empty()).then(|| overlaps.iter().map(|o| o.0).sum::<f64>() / overlaps.len() as f64);
    Ok(json!({
        "name": pattern.info.name, "items": pattern.info.items, "prompt_tokens": pattern.info.tokens[0],
        "answer_tokens": pattern.info.tokens[1], "heldout_items": pattern.info.heldout_items,
        "phases": pattern.info.phases, "metric": DEFAULT_METRIC, "heldout_coverage": covered,
        "overlap": { "keep": quarter, "mean": mean, "chance": quarter as f64 / experts.max(1) as f64,
            "nearest": overlaps.first().map(|o| json!({ "name": o.1, "overlap": o.0 })) },
    }))
}

/// Prints what [`summary`] gave, on one line.
pub fn print_summary(summary: &serde_json::Value) -> Result<()> {
    let percent = |v: &serde_json::Value| v.as_f64().map_or("  -".to_string(), |v| format!("{:3.0}", 100.0 * v));
    let list = summary["heldout_coverage"].as_array().map(Vec::as_slice).unwrap_or_default();
    let covered: Vec<String> = (list.iter())
        .map(|c| {
            let found = &c["coverage"];
            format!("{}: {}/{} %", c["keep"], percent(&found["selections"]), percent(&found["gate_mass"]).trim_start())
        })
        .collect();
    let overlap = &summary["overlap"];
    let nearest = overlap["nearest"]["name"].as_str().map_or(String::new(), |name| {
        let share = percent(&overlap["nearest"]["overlap"]);
        format!("; overlap {} %, most with {name} ({} %)", percent(&overlap["mean"]).trim(), share.trim())
    });
    Ok(say!("{:14} {}{nearest}", summary["name"].as_str().unwrap_or_default(), covered.join("  "))?)
}

/// The phases of stored patterns, if they agree.
pub fn phases_of(patterns: &[&Pattern]) -> Result<Phases> {
    let first = patterns.first().context("nothing to merge")?;
    if let Some(other) = patterns.iter().find(|p| p.info.phases != first.info.phases) {
        bail!(
            "patterns `{}` and `{}` count different tokens ({} and {}); help: profile them alike",
            first.info.name,
            other.info.name,
            first.info.phases,
            other.info.phases
        );
    }
    Phases::of_name(&first.info.phases).with_context(|| format!("unknown phases `{}`", first.info.phases))
}

/// Patterns by name, from the library.
pub fn patterns_of(library: &Library, fingerprint: &str, names: &[String]) -> Result<Vec<Pattern>> {
    names.iter().map(|name| Ok(library.get(fingerprint, name)?)).collect()
}
