//! `quorate profile`: which experts each task needs.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use quorate_eval::encode::EncodedItem;
use quorate_eval::profile::{ProfileRun, Split};
use quorate_eval::tasks::{Task, load_tasks};
use quorate_formats::write_file;
use quorate_lens::interchange::{TraceFormat, TraceShape, read_trace};
use quorate_lens::{ExpertMap, GENERALIST, Library, Pattern, PatternInfo, ProfileData, safe_file_name};
use quorate_methods::patterns::{Summary, merged, summary};
use quorate_methods::{Phases, all_tables};
use quorate_model::Model;
use serde_json::json;

use super::profile_vllm::{Job, Order};
use crate::common::{Common, Fnv, interrupted, parse_count, say};
use crate::embedded;
use crate::experts::need_experts;
use crate::vllm::Server;

/// Batches, and time, between two savings of an unfinished profile.
const SAVE_EVERY: usize = 64;
pub const SAVE_AFTER: Duration = Duration::from_secs(30);
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
  quorate library merge shard0/*.pattern shard1/*.pattern
  quorate profile --from-trace expert_distribution_recorder_1.pt --name code
  quorate profile -m MODEL --from-vllm http://localhost:8000 --tasks tasks/

What another engine recorded of the same model's routing (--from-trace) makes a pattern with the metrics that the recording \
supports, and without a key: it is used by its name. Formats are described in docs/formats.md.")]
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
    /// Routing that another engine recorded, in place of running the tasks; several files add up
    #[arg(long, value_name = "FILE", num_args = 1.., requires = "name")]
    #[arg(conflicts_with_all = ["tasks", "limit", "shard", "restart", "phase", "holdout", "key_layer", "split"])]
    from_trace: Vec<PathBuf>,
    /// Task of the recorded routing
    #[arg(long, value_name = "TASK", requires = "from_trace")]
    name: Option<String>,
    /// vLLM server, e.g. http://localhost:8000, that routes the tasks' texts in place of this program; start it with \
    /// `vllm serve MODEL --enable-return-routed-experts`, and give -m MODEL here for its tokenizer and shape
    #[arg(long, value_name = "URL", conflicts_with = "from_trace")]
    from_vllm: Option<String>,
    /// Format of the recorded routing; left out, told by the file: routed-experts, router-logits, sglang-csv, \
    /// sglang-recorder, imatrix
    #[arg(long, value_name = "FORMAT", requires = "from_trace", value_parser = parse_format)]
    format: Option<TraceFormat>,
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

fn parse_format(text: &str) -> Result<TraceFormat, String> {
    let names = TraceFormat::ALL.map(TraceFormat::name).join(", ");
    let found = TraceFormat::ALL.into_iter().find(|f| f.name() == text);
    found.ok_or_else(|| format!("`{text}` is no format of recordings; help: there is {names}"))
}

impl Profile {
    pub fn run(&self, common: &Common) -> Result<()> {
        if let Some(name) = &self.name {
            return self.read_trace(common, name);
        }
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
        let library = self.destination(common)?;
        let server = self.from_vllm.as_deref().map(Server::connect).transpose()?;
        match &server {
            Some(server) => {
                common.note(&format!("routed by {}; known are the experts chosen, not their gates", server.model()))
            }
            None => common.load_all_experts(&mut model)?,
        }
        let phases: Phases = self.phase.into();
        let mut patterns = Vec::with_capacity(tasks.len() + 1);
        for task in &tasks {
            let Some(pattern) = self.profile(common, &mut model, server.as_ref(), task, phases)? else {
                bail!("interrupted; what is done so far is kept, give the same command again to go on");
            };
            patterns.push(pattern);
        }
        if patterns.len() > 1 && self.shard.is_none() {
            patterns.push(merged(GENERALIST, &patterns.iter().collect::<Vec<_>>(), phases)?);
        }
        self.store(library, &mut patterns)?;
        for task in &tasks {
            let _ = std::fs::remove_file(self.partial_path(&model, task)?); // gone already if nothing was saved
        }
        report(common, &model, &patterns)
    }

    /// The library to write to, or `None` for the folder of `-o`. Before the work, so that what cannot be written to is known
    /// at once.
    fn destination(&self, common: &Common) -> Result<Option<Library>> {
        let Some(folder) = &self.output else { return common.open_library().map(Some) };
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        Ok(None)
    }

    fn store(&self, library: Option<Library>, patterns: &mut [Pattern]) -> Result<()> {
        if let Some(mut library) = library {
            library.put(patterns)?;
        }
        if let Some(folder) = &self.output {
            let shard = self.shard.map(|(i, n)| format!(".{i}-of-{n}")).unwrap_or_default();
            for pattern in patterns {
                if self.compact {
                    pattern.data = None;
                }
                pattern.write(folder, &shard)?;
            }
        }
        Ok(())
    }

    /// A pattern from routing that another engine recorded.
    fn read_trace(&self, common: &Common, name: &str) -> Result<()> {
        check_name(name)?;
        if name == GENERALIST {
            bail!("the task name `{GENERALIST}` is taken by the pooled pattern; help: choose another name");
        }
        let model = common.open_model(None)?;
        need_experts(&model)?;
        let library = self.destination(common)?;
        let shape = TraceShape::of(model.spec());
        let mut data = ProfileData::new(&shape.map);
        for path in &self.from_trace {
            data.stats.merge(&read_trace(path, self.format, &shape)?);
        }
        let file_name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let info = PatternInfo {
            name: name.to_string(),
            fingerprint: model.checkpoint().fingerprint().to_string(),
            data: self.from_trace.iter().map(file_name).collect(),
            phases: Phases::Both.name().to_string(),
            ..PatternInfo::default()
        };
        let mut patterns = [Pattern::build(info, data, |stats| all_tables(stats, &[stats], Phases::Both))];
        self.store(library, &mut patterns)?;
        let metrics: Vec<&str> = patterns[0].scores.iter().map(|s| s.metric.name.as_str()).collect();
        let [prompt, answer] = patterns[0].info.tokens;
        common.note(&format!(
            "{name}: {} tokens; metrics: {}; the pattern has no key, use it with --task {name}",
            prompt + answer,
            metrics.join(", ")
        ));
        report(common, &model, &patterns)
    }

    /// Profiles one task, from where an earlier run stopped; `None` if interrupted.
    fn profile(
        &self,
        common: &Common,
        model: &mut Model,
        server: Option<&Server>,
        task: &Task,
        phases: Phases,
    ) -> Result<Option<Pattern>> {
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
        let save = |data: &ProfileData| -> Result<()> {
            if let Some(folder) = partial.parent() {
                std::fs::create_dir_all(folder)
                    .with_context(|| format!("cannot make the folder {}", folder.display()))?;
            }
            let unfinished = Pattern::build(info.clone(), data.clone(), |_| Vec::new());
            Ok(write_file(&partial, &unfinished.to_bytes()?)?)
        };
        let gathered = match server {
            None => profile_here(common, ProfileRun::new(model, &items, split, data), &task.name, &save)?,
            Some(server) => {
                let (train, held) = split.order(items.len());
                let (shape, order) = (TraceShape::of(model.spec()), Order { train, held });
                let job = Job { server, shape, task: &task.name, items: &items, order };
                let mut gathered = job.gather(common, data, &save)?;
                gathered.as_mut().map_or(Ok(()), |data| job.add_keys(model, self.key_layer, data))?;
                gathered
            }
        };
        let Some(mut data) = gathered else { return Ok(None) };
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
        let mut hash = Fnv::default();
        hash.mix(&format!("{:?} {:?} {} {}", self.limit, self.shard, self.holdout, self.key_layer));
        if self.from_vllm.is_some() {
            hash.mix("vllm");
        }
        task.items.iter().for_each(|i| hash.mix(&format!("{}\0{}\0", i.prompt, i.answer)));
        let name = format!("{}-{}-{}.partial", model.checkpoint().fingerprint(), task.name, hash.hex());
        let name = safe_file_name(&name);
        Ok(embedded::home()?.join("profiles").join(name))
    }
}

/// Runs a profile to its end; `None` if interrupted.
fn profile_here(
    common: &Common,
    mut run: ProfileRun<'_>,
    task: &str,
    save: &dyn Fn(&ProfileData) -> Result<()>,
) -> Result<Option<ProfileData>> {
    if run.done_tokens() > 0 {
        common.note(&format!("{task}: going on at {} of {} tokens", run.done_tokens(), run.total_tokens()));
    }
    let mut progress = common.progress(task, run.total_tokens() as u64, "tokens");
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
    Ok(Some(run.into_profile()))
}

/// Refuses names of patterns that no command could address.
pub fn check_name(name: &str) -> Result<()> {
    if RESERVED.contains(&name) {
        bail!("no pattern can be called `{name}`, --task means something else by it; help: choose another name");
    }
    Ok(())
}

/// Held-out coverage at several numbers of kept experts, and the overlap with the other patterns.
fn report(common: &Common, model: &Model, patterns: &[Pattern]) -> Result<()> {
    let summaries = patterns.iter().map(|p| summary(model.spec(), p, patterns)).collect::<Result<Vec<_>, _>>()?;
    if common.json {
        return common.print_json(&json!({ "fingerprint": model.checkpoint().fingerprint(), "patterns": summaries }));
    }
    let mut metrics: Vec<&str> = summaries.iter().map(|s| s.metric.as_str()).collect();
    metrics.dedup();
    say!(
        "held-out coverage (share of selections / of gate mass that the kept experts serve), metric {}",
        metrics.join(", ")
    )?;
    summaries.iter().try_for_each(print_summary)
}

/// Prints a summary on one line.
pub fn print_summary(summary: &Summary) -> Result<()> {
    let percent = |share: f64| if share.is_nan() { "?".to_string() } else { format!("{:.0}", 100.0 * share) };
    let covered = summary.heldout_coverage.iter().map(|c| match c.coverage {
        Some(found) => format!("{:>2}: {:>3}/{} %", c.keep, percent(found.selections), percent(found.gate_mass)),
        None => format!("{:>2}: -", c.keep),
    });
    let overlap = &summary.overlap;
    let nearest = match (&overlap.nearest, overlap.mean) {
        (Some(most), Some(mean)) => {
            format!("; overlap {} %, most with {} ({} %)", percent(mean), most.name, percent(most.overlap))
        }
        _ => String::new(),
    };
    Ok(say!("{:14} {}{nearest}", summary.name, covered.collect::<Vec<_>>().join("  "))?)
}

/// Patterns by name, from the library.
pub fn patterns_of(library: &Library, fingerprint: &str, names: &[String]) -> Result<Vec<Pattern>> {
    names.iter().map(|name| Ok(library.get(fingerprint, name)?)).collect()
}
