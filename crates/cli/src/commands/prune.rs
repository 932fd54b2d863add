//! `quorate prune`: a model, or a list, with only the kept experts.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use quorate_formats::{check_output, write_file, write_pruned_hf};
use quorate_lens::{ExpertMap, Pattern, Plan, interchange};
use quorate_methods::patterns::{common_phases, merged};
use quorate_model::RoutingMode;
use serde_json::json;

use super::profile::patterns_of;
use crate::common::{Common, human_bytes, interrupted, parse_bytes, say};
use crate::experts::{Beside, ExpertArgs, ModeArg, ScopeArg, need_experts, open};

/// Arguments of `prune`.
#[derive(Args)]
#[command(after_help = "\
A folder for transformers (`hf`) computes what the routing mode `mask` does, with equal numbers in every layer; so its \
--scope is local and its --mode is mask. Those of `vllm` may be mask or drop. A ranking for `ascend` has all experts. \
A plan is used with `quorate run --plan`.

Examples:
  quorate prune --task arithmetic --keep 16 -o small --as hf
  quorate prune --task arithmetic,modular --keep 8 -o sums.toml --as plan
  quorate prune --task bios --keep 16 -o bios.json --as vllm --mode drop
  quorate prune --task bios -o bios.jsonl --as ascend")]
pub struct Prune {
    /// Task or tasks, comma-separated; several are pooled
    #[arg(long, value_name = "NAME", required = true, value_delimiter = ',')]
    task: Vec<String>,
    /// What to write
    #[arg(long = "as", value_enum, default_value_t = Form::Plan)]
    form: Form,
    /// Folder (hf) or file to write
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
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
    /// A plan (TOML) for this program
    Plan,
    /// A pruned-experts profile (JSON) for vLLM
    Vllm,
    /// A full ranking (JSON Lines) for vllm-ascend
    Ascend,
}

impl Prune {
    pub fn run(&self, common: &Common) -> Result<()> {
        let mut experts = self.experts.clone();
        if matches!(self.form, Form::Hf | Form::Vllm) {
            experts.mode = experts.mode.or(Some(ModeArg::Mask));
        }
        if self.form == Form::Hf {
            experts.scope = experts.scope.or(Some(ScopeArg::Local));
            if (experts.mode, experts.scope) != (Some(ModeArg::Mask), Some(ScopeArg::Local)) {
                bail!(
                    "a pruned folder masks before top-k and has equal numbers in every layer; \
                     help: leave --mode and --scope out, or write --as plan"
                );
            }
        } else {
            check_output(&self.output)?;
        }
        let (model, library) = open(common, &experts, "")?;
        need_experts(&model)?;
        let fingerprint = model.checkpoint().fingerprint();
        let patterns = patterns_of(&library, fingerprint, &self.task)?;
        let pattern: Pattern = match patterns.as_slice() {
            [one] => one.clone(),
            several => {
                let refs: Vec<&Pattern> = several.iter().collect();
                merged(&self.task.join("+"), &refs, common_phases(&refs)?)?
            }
        };
        let choice = experts.choice(&model, Beside::sequence(model.spec(), usize::MAX))?;
        let plan = choice.plan(&pattern, model.spec(), fingerprint)?;
        let map = ExpertMap::of(model.spec());
        let kept: Vec<Vec<usize>> =
            plan.kept(model.spec(), fingerprint)?.into_iter().map(Option::unwrap_or_default).collect();
        match self.form {
            Form::Plan => write_file(&self.output, plan.to_toml()?.as_bytes())?,
            Form::Vllm => {
                let text = interchange::to_vllm(&plan, &map)?;
                check_same(&interchange::from_vllm(&text, &map)?, &kept, &map, plan.routing_mode)?;
                write_file(&self.output, text.as_bytes())?;
            }
            Form::Ascend => {
                write_file(&self.output, interchange::to_ascend(pattern.scores(&experts.metric)?).as_bytes())?;
            }
            Form::Hf => {
                let mut progress = common.progress("writing", model.weights().model_bytes(), "bytes");
                write_pruned_hf(model.checkpoint(), &kept, &self.output, self.shard_size, &mut |done, _| {
                    progress.set(done);
                    !interrupted()
                })
                .with_context(|| format!("cannot write {}", self.output.display()))?;
                progress.finish();
            }
        }
        let counts: Vec<usize> = kept.iter().map(Vec::len).collect();
        if common.json {
            return common.print_json(&json!({
                "output": self.output, "as": format!("{:?}", self.form).to_lowercase(), "task": pattern.info.name,
                "metric": experts.metric, "mode": plan.routing_mode, "kept_per_layer": counts,
            }));
        }
        if self.form == Form::Ascend {
            return Ok(say!("{}: all {} experts, best first", self.output.display(), map.total())?);
        }
        let bytes: u64 = (map.layers.iter().zip(&kept))
            .flat_map(|(&l, kept)| kept.iter().map(move |&e| (l, e)))
            .map(|(l, e)| model.checkpoint().expert_bytes(l, e))
            .sum();
        say!(
            "{}: {} of {} experts ({} of {}), kept per layer {counts:?}",
            self.output.display(),
            counts.iter().sum::<usize>(),
            map.total(),
            human_bytes(bytes + model.checkpoint().non_expert_bytes()),
            human_bytes(model.checkpoint().total_bytes()),
        )?;
        Ok(())
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
