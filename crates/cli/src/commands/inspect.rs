//! `quorate inspect`: what a model is, where its bytes are, what fits. Weights need not be there.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, ValueEnum};
use quorate_formats::spec::{AttnSpec, FfnSpec, ModelSpec, MoeSpec, QkNorm};
use quorate_formats::{Checkpoint, FormatError, Outline, Preset, QUANTISATIONS, Quantisation, shape};
use quorate_model::{CacheLayout, KvType, buffer_bytes};
use quorate_residency::WeightSizes;
use serde_json::{Value, json};

use super::inspect_text;
use crate::common::{Common, parse_count, say};
use crate::hub::{self, Hub};
use crate::stream::BASE_BYTES;

/// Arguments of `inspect`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  quorate inspect
  quorate inspect -m models/OLMoE-1B-7B --json
  quorate inspect -m deepseek-r1 --quant Q2_K --ctx 8192    a preset, without weights
  quorate inspect -m config.json                            a configuration alone
  quorate inspect -m Qwen/Qwen3-30B-A3B                     of the hub, without fetching its weights
  quorate inspect --presets                                 names of all presets")]
pub struct Inspect {
    /// Type of the weights for the table of what fits, e.g. Q4_K; left out, as stored, or Q4_K if there are no weights
    #[arg(long, value_name = "TYPE", value_parser = parse_quantisation)]
    quant: Option<Quantisation>,
    /// Tokens of context that must fit too; left out, 4096 or what the model allows
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    ctx: Option<usize>,
    /// How keys and values are kept, for the table of what fits
    #[arg(long, value_enum, default_value_t = Cache::Own)]
    kv: Cache,
    /// List the presets: models whose public configuration comes with the program
    #[arg(long, exclusive = true)]
    presets: bool,
}

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Cache {
    /// As this program keeps them: all positions, f32 (where weights are in blocks it keeps f16, half as much)
    Own,
    /// The least that computes the same: 16 bits, only positions that can still be seen
    Compact,
}

fn parse_quantisation(name: &str) -> Result<Quantisation, String> {
    let known = || QUANTISATIONS.iter().map(|q| q.name).collect::<Vec<_>>().join(", ");
    Quantisation::find(name).ok_or_else(|| format!("`{name}` is no type that is known here; help: one of {}", known()))
}

/// What is looked at.
enum Subject {
    Weights(Box<Checkpoint>),
    Outline { outline: Outline, named: String, preset: Option<&'static Preset> },
}

impl Subject {
    fn open(common: &Common) -> Result<Subject> {
        let preset = common.model.as_deref().filter(|m| !m.exists()).and_then(|m| Preset::find(m.to_str()?));
        if let Some(preset) = preset {
            let (outline, named) = (preset.outline()?, preset.name.to_owned());
            return Ok(Subject::Outline { outline, named, preset: Some(preset) });
        }
        let path = match common.model.as_deref().and_then(hub::named) {
            Some(repo) => Hub::new(common)?.outline(common, &repo)?,
            None => common.model_path()?,
        };
        let named = path.display().to_string();
        if let Some(config) = is_outline(&path) {
            return Ok(Subject::Outline { outline: Outline::open(&config)?, named, preset: None });
        }
        match Checkpoint::open(&path) {
            Ok(checkpoint) => Ok(Subject::Weights(Box::new(checkpoint))),
            // The header of a GGUF file says it all.
            Err(cut @ FormatError::Truncated { .. }) if path.extension().is_some_and(|end| end == "gguf") => {
                let Ok(outline) = Outline::open(&path) else { return Err(cut.into()) };
                common.note(&format!("{cut}; only its header is looked at"));
                Ok(Subject::Outline { outline, named, preset: None })
            }
            Err(other) => Err(other.into()),
        }
    }

    fn spec(&self) -> &ModelSpec {
        match self {
            Subject::Weights(checkpoint) => checkpoint.spec(),
            Subject::Outline { outline, .. } => &outline.spec,
        }
    }
}

/// The configuration, if that is all there is: a JSON file, or a folder without any weights.
fn is_outline(path: &Path) -> Option<PathBuf> {
    if path.is_file() {
        return path.extension().is_some_and(|e| e == "json").then(|| path.to_owned());
    }
    let config = path.join("config.json");
    let weights =
        |name: &str| [".safetensors", ".safetensors.index.json", ".gguf"].iter().any(|end| name.ends_with(end));
    let names = std::fs::read_dir(path).ok()?.filter_map(|entry| Some(entry.ok()?.file_name()));
    let any = names.into_iter().any(|name| name.to_str().is_some_and(weights));
    (config.is_file() && !any).then_some(config)
}

impl Inspect {
    pub fn run(&self, common: &Common) -> Result<()> {
        if self.presets {
            return list_presets(common);
        }
        let subject = Subject::open(common)?;
        let document = self.document(&subject)?;
        if common.json { common.print_json(&document) } else { inspect_text::print(subject.spec(), &document) }
    }

    fn document(&self, subject: &Subject) -> Result<Value> {
        let spec = subject.spec();
        let mut document = architecture(spec);
        let quantisation = match subject {
            Subject::Weights(checkpoint) => {
                add(&mut document, &stored(checkpoint));
                self.quant
            }
            Subject::Outline { outline, named, preset } => {
                let file = preset.map(Preset::read).transpose()?;
                add(
                    &mut document,
                    &json!({
                        "path": named, "family": outline.family.name, "fingerprint": null,
                        "source": file.as_ref().map(|f| &f.source), "published_parameters": file.map(|f| f.parameters),
                    }),
                );
                self.quant.or(Quantisation::find("Q4_K"))
            }
        };
        let sizes = match (subject, quantisation) {
            (Subject::Weights(checkpoint), None) => WeightSizes::stored(checkpoint),
            (_, quantisation) => WeightSizes::quantised(spec, quantisation.unwrap_or(QUANTISATIONS[0])),
        };
        let context = self.ctx.unwrap_or(spec.max_position_embeddings.min(4096));
        let cache = match self.kv {
            Cache::Own => CacheLayout::own(spec, KvType::F32),
            Cache::Compact => CacheLayout::compact(spec),
        };
        let fits = fits(&sizes, cache.bytes(context), BASE_BYTES + buffer_bytes(spec, 1));
        add(
            &mut document,
            &json!({
                "quantisations": QUANTISATIONS.iter().map(|&q| quantised(spec, q)).collect::<Vec<_>>(),
                "fits_quantisation": quantisation.map(|q| q.name), "fits_context": context,
                "fits_cache_bytes": cache.bytes(context), "fits": fits,
            }),
        );
        Ok(document)
    }
}

fn list_presets(common: &Common) -> Result<()> {
    let mut rows = Vec::new();
    for preset in quorate_formats::PRESETS {
        let (file, counts) = (preset.read()?, shape::parameter_counts(&preset.outline()?.spec));
        rows.push(json!({ "name": preset.name, "source": file.source, "published_parameters": file.parameters,
            "parameters": counts.total, "active_parameters": counts.active }));
    }
    if common.json {
        return common.print_json(&rows);
    }
    say!("{:24} {:>10} {:>10}  values of", "preset", "in all", "per token")?;
    for row in &rows {
        let count = |name: &str| format!("{:.1}B", row[name].as_f64().unwrap_or(0.0) / 1e9);
        let text = |name: &str| row[name].as_str().unwrap_or_default();
        say!("{:24} {:>10} {:>10}  {}", text("name"), count("parameters"), count("active_parameters"), text("source"))?;
    }
    Ok(())
}

/// Lays the entries of one object into another.
fn add(document: &mut Value, more: &Value) {
    if let (Some(document), Some(more)) = (document.as_object_mut(), more.as_object()) {
        document.extend(more.clone());
    }
}

fn first_moe(spec: &ModelSpec) -> Option<&MoeSpec> {
    spec.layers.iter().find_map(|l| match &l.ffn {
        FfnSpec::Moe(moe) => Some(moe),
        FfnSpec::Dense { .. } => None,
    })
}

/// Whether a query sees only some of the positions before it.
fn has_window(attn: &AttnSpec) -> bool {
    attn.sliding_window.is_some() || attn.extra.chunk.is_some()
}

/// What follows from the architecture.
fn architecture(spec: &ModelSpec) -> Value {
    let counts = shape::parameter_counts(spec);
    let moe = first_moe(spec);
    let attn = spec.layers.iter().find(|l| l.delta.is_none()).or(spec.layers.first()).map(|l| &l.attn);
    let (own, compact) = (CacheLayout::own(spec, KvType::F32), CacheLayout::compact(spec));
    json!({
        "path": null, "family": null, "fingerprint": null,
        "parameters": counts.total, "active_parameters": counts.active,
        "layers": spec.layers.len(), "hidden_size": spec.hidden_size, "vocab_size": spec.vocab_size,
        "context": spec.max_position_embeddings, "moe_layers": spec.moe_layers().len(),
        "experts": moe.map(|m| m.n_experts), "top_k": moe.map(|m| m.top_k),
        "expert_intermediate_size": moe.map(|m| m.intermediate_size),
        "shared_expert": moe.map(|m| m.shared.is_some()),
        "norm_topk_prob": moe.map(|m| m.router.norm_topk_prob),
        "heads": attn.map(|a| a.n_heads), "kv_heads": attn.map(|a| a.n_kv_heads), "head_dim": attn.map(|a| a.head_dim),
        "latent_width": attn.and_then(|a| a.mla.map(|mla| mla.kv_lora_rank + a.rope.dim)),
        "linear_attention_layers": spec.layers.iter().filter(|l| l.delta.is_some()).count(),
        "windowed_layers": spec.layers.iter().filter(|l| l.delta.is_none() && has_window(&l.attn)).count(),
        "qk_norm": attn.is_some_and(|a| a.qk_norm != QkNorm::None),
        "kv_bytes_per_token": own.bytes_per_token(), "kv_compact_bytes_per_token": compact.bytes_per_token(),
        "kv_compact_bytes_per_token_beyond_windows": compact.bytes_per_token_beyond_windows(),
        "kv_state_bytes": own.state_bytes,
    })
}

/// What a model's files say.
fn stored(checkpoint: &Checkpoint) -> Value {
    let spec = checkpoint.spec();
    let expert_bytes = spec.moe_layers().first().map(|&l| checkpoint.expert_bytes(l, 0));
    json!({
        "path": checkpoint.path(), "family": checkpoint.family().name, "fingerprint": checkpoint.fingerprint(),
        "model_bytes": checkpoint.total_bytes(), "non_expert_bytes": checkpoint.non_expert_bytes(),
        "expert_bytes": expert_bytes, "unused_tensors": checkpoint.unused_tensors().len(),
        "first_unused_tensor": checkpoint.unused_tensors().first(),
        "tensors": checkpoint.tensors().len(), "files": checkpoint.files().len(),
    })
}

/// What the weights would take in some type.
fn quantised(spec: &ModelSpec, quantisation: Quantisation) -> Value {
    let sizes = WeightSizes::quantised(spec, quantisation);
    let layer = sizes.layers.first();
    json!({
        "type": quantisation.name, "bytes": sizes.total_bytes(), "non_expert_bytes": sizes.skeleton_bytes,
        "expert_bytes": layer.map(|l| l.expert_bytes),
        "experts_of_layer_bytes": layer.map(|l| l.expert_bytes * l.experts as u64),
        "bits_per_weight": sizes.total_bytes() as f64 * 8.0 / shape::parameter_counts(spec).total.max(1) as f64,
    })
}

/// What fits into memories of some sizes.
fn fits(sizes: &WeightSizes, cache: u64, buffers: u64) -> Vec<Value> {
    let row = |bytes: u64| match sizes.memory_plan(bytes, cache, buffers) {
        Ok(plan) => json!({ "memory_bytes": bytes, "experts_per_layer": plan.experts_per_layer, "all": plan.all,
            "weight_bytes": plan.weight_bytes, "needed_bytes": plan.total_bytes }),
        Err(_) => {
            let least = sizes.layers.iter().map(|l| l.top_k).max().unwrap_or(0);
            let needed = sizes.skeleton_bytes + sizes.expert_bytes(least) + cache + buffers;
            json!({ "memory_bytes": bytes, "experts_per_layer": null, "all": null, "weight_bytes": null,
                "needed_bytes": needed })
        }
    };
    memory_sizes(sizes, cache + buffers).into_iter().map(row).collect()
}

/// Memory sizes worth a line: what parts of the experts of a small model need with `other` bytes, else the usual sizes.
fn memory_sizes(sizes: &WeightSizes, other: u64) -> Vec<u64> {
    if sizes.total_bytes() >= 4 << 30 {
        return [8u64, 16, 24, 32, 64, 128, 256, 512].map(|gib| gib << 30).to_vec();
    }
    let (least, all) = sizes.layers.first().map_or((1, 1), |l| (l.top_k, l.experts));
    let bytes = |keep: usize| sizes.skeleton_bytes + other + sizes.expert_bytes(keep);
    let keep = [least, all / 4, all / 2, all * 3 / 4, all].into_iter().filter(|&k| k >= least);
    let mut rows: Vec<u64> = keep.map(|k| bytes(k).next_multiple_of(1 << 20)).collect();
    rows.sort_unstable();
    rows.dedup();
    rows
}
