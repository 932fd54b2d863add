//! `quorate prune`: a model, or a list, with only the kept experts.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use quorate_convert::{Mix, Options, write_model};
use quorate_formats::{check_output, write_file, write_pruned_hf};
use quorate_kernels::Pool;
use quorate_lens::interchange::{self, ListKind, RankedKeep};
use quorate_lens::{Choice, ExpertMap, Library, Pattern, Plan};
use quorate_methods::patterns::{common_phases, merged};
use quorate_model::{Model, RoutingMode};
use serde_json::json;

use super::profile::patterns_of;
use super::quantize::{mix, note_elsewhere};
use crate::common::{Common, human_bytes, interrupted, parse_bytes, say};
use crate::experts::{Beside, ExpertArgs, ModeArg, ScopeArg, need_experts, open};

/// Arguments of `prune`.
#[derive(Args)]
#[command(after_help = "\
A folder for transformers (`hf`) and a file for llama.cpp (`gguf`, from safetensors or GGUF) compute what the routing mode `mask` does, with equal numbers in every layer; so their \
--scope is local and their --mode is mask. Those of `vllm` may be mask or drop, that of `easy-ep` is mask. A ranking for \
`ascend` has all experts. A plan is used with `quorate run --plan`.
With --list, kept experts are converted: a plan, a profile or kept lists of vLLM, a ranking of vllm-ascend or a mask of \
EASY-EP, told apart by what is in the file.

Examples:
  quorate prune --task arithmetic --keep 16 -o small --as hf
  quorate prune --task arithmetic --keep 16 -o small.gguf --as gguf
  quorate prune --task arithmetic,modular --keep 8 -o sums.toml --as plan
  quorate prune --task bios --keep 16 -o bios.json --as vllm --mode drop
  quorate prune --task bios -o bios.jsonl --as ascend
  quorate prune --list mask.json -o small --as hf
  quorate prune --list bios.jsonl --prune-ratio 0.5 -o bios.json --as vllm")]
pub struct Prune {
    /// Task or tasks, comma-separated; several are pooled
    #[arg(long, value_name = "NAME", required_unless_present = "list", value_delimiter = ',')]
    task: Vec<String>,
    /// List of kept experts to convert, in place of a task's pattern
    #[arg(long, value_name = "FILE", conflicts_with_all = ["task", "share", "memory", "scope", "protect"])]
    list: Option<PathBuf>,
    /// Share of each layer's experts that a ranking of --list leaves out
    #[arg(long, value_name = "R", requires = "list", conflicts_with = "keep")]
    prune_ratio: Option<f64>,
    /// What to write
    #[arg(long = "as", value_enum, default_value_t = Form::Plan)]
    form: Form,
    /// Folder (hf) or file to write
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Types of the matrices of a gguf file, e.g. Q4_K_M; left out, as they are stored
    #[arg(long = "type", value_name = "TYPE", value_parser = mix)]
    mix: Option<&'static Mix>,
    /// Largest size of one safetensors file
    #[arg(long, default_value = "4GiB", value_parser = parse_bytes, value_name = "SIZE")]
    shard_size: u64,
    #[command(flatten)]
    experts: ExpertArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Form {
    /// A folder that Hugging Face transformers loads
    Hf,
    /// A file that llama.cpp loads
    Gguf,
    /// A plan (TOML) for this program
    Plan,
    /// A pruned-experts profile (JSON) for vLLM
    Vllm,
    /// A full ranking (JSON Lines) for vllm-ascend
    Ascend,
    /// A mask (JSON) for EASY-EP
    EasyEp,
}

/// What is to be written, from a pattern or a list.
struct Kept {
    /// Task, or file.
    source: String,
    metric: Option<String>,
    plan: Plan,
    /// Kept experts of every MoE layer.
    experts: Vec<Vec<usize>>,
    /// All experts of every MoE layer, best first, where the source ranks them.
    rankings: Option<Vec<Vec<usize>>>,
}

impl Prune {
    pub fn run(&self, common: &Common) -> Result<()> {
        if self.form != Form::Hf {
            check_output(&self.output)?;
        }
        if self.mix.is_some() && self.form != Form::Gguf {
            bail!("--type is of a gguf file; help: leave it out, or write --as gguf");
        }
        let experts = self.modes()?;
        let (model, kept) = match &self.list {
            Some(path) => {
                let model = common.open_model(None)?;
                need_experts(&model)?;
                let kept = self.of_list(&model, path)?;
                (model, kept)
            }
            None => {
                let (model, library) = open(common, &experts, "")?;
                need_experts(&model)?;
                let kept = self.of_patterns(&model, &library, &experts)?;
                (model, kept)
            }
        };
        self.write(common, &model, &kept)?;
        self.report(common, &model, &kept)
    }

    /// The flags, with the routing mode and scope that the form asks for.
    fn modes(&self) -> Result<ExpertArgs> {
        let mut experts = self.experts.clone();
        if self.list.is_none() && matches!(self.form, Form::Hf | Form::Gguf | Form::Vllm | Form::EasyEp) {
            experts.mode = experts.mode.or(Some(ModeArg::Mask));
        }
        if matches!(self.form, Form::Hf | Form::Gguf) {
            let fits = |mode: Option<ModeArg>| mode.is_none_or(|m| m == ModeArg::Mask);
            experts.scope = experts.scope.or(Some(ScopeArg::Local));
            if !fits(experts.mode) || experts.scope != Some(ScopeArg::Local) {
                bail!(
                    "a pruned model masks before top-k and has equal numbers in every layer; \
                     help: leave --mode and --scope out, or write --as plan"
                );
            }
        }
        Ok(experts)
    }

    fn of_patterns(&self, model: &Model, library: &Library, experts: &ExpertArgs) -> Result<Kept> {
        let fingerprint = model.checkpoint().fingerprint();
        let patterns = patterns_of(library, fingerprint, &self.task)?;
        let pattern: Pattern = match patterns.as_slice() {
            [one] => one.clone(),
            several => {
                let refs: Vec<&Pattern> = several.iter().collect();
                merged(&self.task.join("+"), &refs, common_phases(&refs)?)?
            }
        };
        let choice = experts.choice(model, Beside::sequence(model.spec(), usize::MAX))?;
        let choice = Choice { even_groups: matches!(self.form, Form::Hf | Form::Gguf), ..choice };
        let plan = choice.plan(&pattern, model.spec(), fingerprint)?;
        let scores = pattern.scores(&experts.metric)?;
        let rankings = (0..scores.map.n_layers()).map(|moe| scores.ranking(moe)).collect();
        let metric = Some(experts.metric.clone());
        Kept::new(model, pattern.info.name.clone(), metric, plan, Some(rankings))
    }

    fn of_list(&self, model: &Model, path: &Path) -> Result<Kept> {
        let named = || path.display().to_string();
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let map = ExpertMap::of(model.spec());
        let keep = match (self.experts.keep, self.prune_ratio) {
            (Some(k), _) => Some(RankedKeep::Experts(k)),
            (None, ratio) => ratio.map(RankedKeep::PruneRatio),
        };
        let (kind, mut plan) = interchange::read_list(&text, keep, &map).with_context(named)?;
        if keep.is_some() && kind != ListKind::Ascend {
            bail!("{} says itself how many experts it keeps; help: leave --keep and --prune-ratio out", path.display());
        }
        if !plan.intervene.is_empty() && self.form != Form::Plan {
            bail!("{} has interventions, which only a plan can hold; help: write --as plan", path.display());
        }
        let rankings = (kind == ListKind::Ascend)
            .then(|| interchange::read_rankings(&text, &map))
            .transpose()
            .with_context(named)?;
        if let Some(mode) = self.experts.mode {
            plan.routing_mode = mode.into();
        }
        if plan.model.is_empty() {
            plan.model = model.checkpoint().fingerprint().to_string();
        }
        let (source, metric) = (plan.task.clone().unwrap_or_else(named), plan.metric.clone());
        Kept::new(model, source, metric, plan, rankings)
    }

    fn write(&self, common: &Common, model: &Model, kept: &Kept) -> Result<()> {
        let (map, mode) = (ExpertMap::of(model.spec()), kept.plan.routing_mode);
        let masks = matches!(self.form, Form::EasyEp | Form::Hf | Form::Gguf)
            || (self.form == Form::Ascend && self.list.is_some());
        if masks && mode != RoutingMode::Mask {
            bail!(
                "the format masks before top-k, the kept experts are for the mode `{}`; help: --mode mask",
                mode.name()
            );
        }
        if self.form != Form::Plan {
            kept.check_enough(model)?;
        }
        match self.form {
            Form::Plan => write_file(&self.output, kept.plan.to_toml()?.as_bytes())?,
            Form::Vllm => {
                let text = interchange::to_vllm(&kept.plan, &map)?;
                check_same(&interchange::from_vllm(&text, &map)?, &kept.experts, &map, mode)?;
                write_file(&self.output, text.as_bytes())?;
            }
            Form::EasyEp => {
                let text = interchange::to_easy_ep(&map, &kept.experts);
                check_same(&interchange::from_easy_ep(&text, &map)?, &kept.experts, &map, mode)?;
                write_file(&self.output, text.as_bytes())?;
            }
            Form::Ascend => {
                write_file(&self.output, interchange::to_ascend(&map, &kept.ranked(&map)?).as_bytes())?;
            }
            Form::Hf => {
                let mut progress = common.progress("writing", model.weights().model_bytes(), "bytes");
                write_pruned_hf(model.checkpoint(), &kept.experts, &self.output, self.shard_size, &mut |done, _| {
                    progress.set(done);
                    !interrupted()
                })
                .with_context(|| format!("cannot write {}", self.output.display()))?;
                progress.finish();
            }
            Form::Gguf => {
                let options = Options { kept: Some(&kept.experts), mix: self.mix, ..Options::default() };
                let pool = Pool::new(common.thread_count()?);
                let mut progress = common.progress("writing", model.weights().model_bytes(), "bytes");
                let written = write_model(model.checkpoint(), &options, &self.output, &pool, &mut |done, _| {
                    progress.set(done);
                    !interrupted()
                })
                .with_context(|| format!("cannot write {}", self.output.display()))?;
                progress.finish();
                note_elsewhere(common, &written);
            }
        }
        Ok(())
    }

    fn report(&self, common: &Common, model: &Model, kept: &Kept) -> Result<()> {
        let map = ExpertMap::of(model.spec());
        let counts: Vec<usize> = kept.experts.iter().map(Vec::len).collect();
        if common.json {
            let form = self.form.to_possible_value().map(|v| v.get_name().to_string());
            return common.print_json(&json!({
                "output": self.output, "as": form, "task": kept.source, "metric": kept.metric,
                "mode": kept.plan.routing_mode, "kept_per_layer": counts,
            }));
        }
        if self.form == Form::Ascend {
            return Ok(say!("{}: all {} experts, best first", self.output.display(), map.total())?);
        }
        let bytes: u64 = (map.layers.iter().zip(&kept.experts))
            .flat_map(|(&l, kept)| kept.iter().map(move |&e| (l, e)))
            .map(|(l, e)| model.checkpoint().expert_bytes(l, e))
            .sum();
        Ok(say!(
            "{}: {} of {} experts ({} of {}), kept per layer {counts:?}",
            self.output.display(),
            counts.iter().sum::<usize>(),
            map.total(),
            human_bytes(bytes + model.checkpoint().non_expert_bytes()),
            human_bytes(model.checkpoint().total_bytes()),
        )?)
    }
}

impl Kept {
    fn new(
        model: &Model,
        source: String,
        metric: Option<String>,
        plan: Plan,
        rankings: Option<Vec<Vec<usize>>>,
    ) -> Result<Kept> {
        let map = ExpertMap::of(model.spec());
        let kept = plan.kept(model.spec(), model.checkpoint().fingerprint())?;
        let all = |(kept, &experts): (Option<Vec<usize>>, &usize)| kept.unwrap_or_else(|| (0..experts).collect());
        let experts = kept.into_iter().zip(&map.experts).map(all).collect();
        Ok(Kept { source, metric, plan, experts, rankings })
    }

    /// Refuses layers in which a token could not fill its slots, which other engines cannot compute.
    fn check_enough(&self, model: &Model) -> Result<()> {
        if self.plan.routing_mode == RoutingMode::Drop {
            return Ok(());
        }
        for (kept, layer) in self.experts.iter().zip(model.spec().moe_layers()) {
            let top_k = model.spec().moe(layer).map_or(0, |m| m.top_k);
            if kept.len() < top_k {
                bail!(
                    "layer {layer} keeps {} experts, but each token needs {top_k}; help: keep more, or write --as plan",
                    kept.len()
                );
            }
        }
        Ok(())
    }

    /// All experts best first: as the source ranks them, or the kept ones before the others if all layers keep as many.
    fn ranked(&self, map: &ExpertMap) -> Result<Vec<Vec<usize>>> {
        if let Some(rankings) = &self.rankings {
            return Ok(rankings.clone());
        }
        let same = |pair: &[Vec<usize>]| pair[0].len() == pair[1].len();
        if !self.experts.windows(2).all(same) {
            bail!(
                "vllm-ascend keeps one share of every layer, here they keep different numbers; \
                 help: a list with equal numbers, or another --as"
            );
        }
        let order = |(kept, &experts): (&Vec<usize>, &usize)| {
            let others = (0..experts).filter(|e| !kept.contains(e));
            kept.iter().copied().chain(others).collect()
        };
        Ok(self.experts.iter().zip(&map.experts).map(order).collect())
    }
}

/// What was written says what was meant.
fn check_same(read: &Plan, kept: &[Vec<usize>], map: &ExpertMap, mode: RoutingMode) -> Result<()> {
    let expected = Plan::keeping("", map, kept, mode);
    if read.keep != expected.keep || read.routing_mode != expected.routing_mode {
        bail!("the file does not read back as it was written; this is a defect of quorate, please report it");
    }
    Ok(())
}
