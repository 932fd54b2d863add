//! `quorate inspect`: what a model is, where its bytes are, what fits.

use anyhow::Result;
use clap::Args;
use quorate_formats::Checkpoint;
use quorate_formats::spec::{FfnSpec, QkNorm};
use quorate_model::{KvCache, buffer_bytes};
use quorate_residency::{memory_plan, skeleton_bytes};
use serde_json::{Value, json};

use crate::common::{Common, human_bytes, say};
use crate::stream::BASE_BYTES;

/// Arguments of `inspect`.
#[derive(Args)]
#[command(after_help = "Examples:\n  quorate inspect\n  quorate inspect -m models/OLMoE-1B-7B --json")]
pub struct Inspect {}

impl Inspect {
    pub fn run(&self, common: &Common) -> Result<()> {
        let checkpoint = Checkpoint::open(&common.model_path()?)?;
        let spec = checkpoint.spec();
        let counts = checkpoint.parameter_counts();
        let moe_layers = spec.moe_layers();
        let first_moe = moe_layers.first().and_then(|&l| spec.moe(l).map(|m| (l, m)));
        let expert_bytes = first_moe.map(|(l, _)| checkpoint.expert_bytes(l, 0));
        let kv = KvCache::bytes_per_token(spec);
        let context = spec.max_position_embeddings.min(4096);
        let (cache, buffers) = (kv * context as u64, BASE_BYTES + buffer_bytes(spec, 1));
        let fits: Vec<Value> = memory_sizes(&checkpoint, cache + buffers)
            .into_iter()
            .map(|bytes| {
                let plan = memory_plan(&checkpoint, bytes, cache, buffers).ok();
                json!({ "memory_bytes": bytes, "experts_per_layer": plan.map(|p| p.experts_per_layer),
                    "all": plan.map(|p| p.all), "weight_bytes": plan.map(|p| p.weight_bytes) })
            })
            .collect();
        let document = json!({
            "path": checkpoint.path(), "family": checkpoint.family().name, "fingerprint": checkpoint.fingerprint(),
            "parameters": counts.total, "active_parameters": counts.active,
            "layers": spec.layers.len(), "hidden_size": spec.hidden_size, "vocab_size": spec.vocab_size,
            "context": spec.max_position_embeddings, "moe_layers": moe_layers.len(),
            "experts": first_moe.map(|(_, m)| m.n_experts), "top_k": first_moe.map(|(_, m)| m.top_k),
            "expert_intermediate_size": first_moe.map(|(_, m)| m.intermediate_size),
            "shared_expert": first_moe.map(|(_, m)| m.shared.is_some()),
            "norm_topk_prob": first_moe.map(|(_, m)| m.router.norm_topk_prob),
            "heads": spec.layers.first().map(|l| l.attn.n_heads), "kv_heads": spec.layers.first().map(|l| l.attn.n_kv_heads),
            "head_dim": spec.layers.first().map(|l| l.attn.head_dim),
            "qk_norm": spec.layers.first().is_some_and(|l| l.attn.qk_norm != QkNorm::None),
            "model_bytes": checkpoint.total_bytes(), "non_expert_bytes": checkpoint.non_expert_bytes(),
            "expert_bytes": expert_bytes, "kv_bytes_per_token": kv,
            "unused_tensors": checkpoint.unused_tensors().len(),
            "tensors": checkpoint.tensors().len(), "files": checkpoint.files().len(),
            "fits_context": context, "fits": fits,
        });
        if common.json {
            return common.print_json(&document);
        }
        print(&checkpoint, &document)
    }
}

/// Memory sizes worth a line: what parts of the experts of a small model need with `other` bytes, else the usual sizes.
fn memory_sizes(checkpoint: &Checkpoint, other: u64) -> Vec<u64> {
    if checkpoint.total_bytes() < 4 << 30 {
        let spec = checkpoint.spec();
        let moe = spec.moe_layers().first().and_then(|&l| spec.moe(l));
        let (least, all) = moe.map_or((1, 1), |m| (m.top_k, m.n_experts));
        let experts = checkpoint.total_bytes() - checkpoint.non_expert_bytes();
        let bytes = |keep: usize| skeleton_bytes(checkpoint) + other + experts * keep as u64 / all as u64;
        let keep = [least, all / 4, all / 2, all * 3 / 4, all].into_iter().filter(|&k| k >= least);
        let mut sizes: Vec<u64> = keep.map(|k| bytes(k).next_multiple_of(1 << 20)).collect();
        sizes.sort_unstable();
        sizes.dedup();
        return sizes;
    }
    [8u64, 16, 24, 32, 64, 128, 256, 512].map(|gib| gib << 30).to_vec()
}

fn print(checkpoint: &Checkpoint, d: &Value) -> Result<()> {
    let spec = checkpoint.spec();
    let bytes = |name: &str| human_bytes(d[name].as_u64().unwrap_or(0));
    let count = |name: &str| match d[name].as_u64().unwrap_or(0) as f64 {
        n if n < 1e6 => format!("{:.1} thousand", n / 1e3),
        n if n < 1e9 => format!("{:.1} million", n / 1e6),
        n => format!("{:.2} billion", n / 1e9),
    };
    say!("{} ({}), fingerprint {}", checkpoint.path().display(), checkpoint.family().name, checkpoint.fingerprint())?;
    say!("parameters   {} in all, {} active per token", count("parameters"), count("active_parameters"))?;
    say!(
        "shape        {} layers, hidden {}, vocabulary {}, context {}",
        d["layers"],
        d["hidden_size"],
        d["vocab_size"],
        d["context"]
    )?;
    say!("attention    {} heads of {}, {} key/value heads", d["heads"], d["head_dim"], d["kv_heads"])?;
    let dense = spec.layers.iter().filter(|l| matches!(l.ffn, FfnSpec::Dense { .. })).count();
    if d["experts"].is_null() {
        say!("experts      none (dense model)")?;
    } else {
        say!(
            "experts      {} per layer, {} per token, width {}, in {} layers ({dense} dense){}",
            d["experts"],
            d["top_k"],
            d["expert_intermediate_size"],
            d["moe_layers"],
            if d["shared_expert"] == json!(true) { ", with a shared expert" } else { "" }
        )?;
    }
    let (tensors, files) = (&d["tensors"], &d["files"]);
    let experts = match d["expert_bytes"].as_u64() {
        Some(each) => format!(": {} outside the experts, {} each expert", bytes("non_expert_bytes"), human_bytes(each)),
        None => String::new(),
    };
    say!("bytes        {} in {tensors} tensors, {files} file(s){experts}", bytes("model_bytes"))?;
    say!("KV cache     {} per token", bytes("kv_bytes_per_token"))?;
    if !checkpoint.unused_tensors().is_empty() {
        say!("unused       {} tensors, e.g. {}", checkpoint.unused_tensors().len(), checkpoint.unused_tensors()[0])?;
    }
    if d["experts"].is_null() {
        return Ok(());
    }
    say!("what fits into --memory (with a context of {} tokens):", d["fits_context"])?;
    for row in d["fits"].as_array().map(Vec::as_slice).unwrap_or_default() {
        let memory = human_bytes(row["memory_bytes"].as_u64().unwrap_or(0));
        match row["experts_per_layer"].as_u64() {
            Some(k) if row["all"] == json!(true) => say!("  {memory:>10}  all {k} experts of every layer")?,
            Some(k) => say!("  {memory:>10}  {k} experts of every layer")?,
            None => say!("  {memory:>10}  too small")?,
        }
    }
    Ok(())
}
