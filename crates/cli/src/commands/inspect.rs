//! `quorate inspect`: what a model is, where its bytes are, what fits.

use anyhow::Result;
use clap::Args;
use quorate_formats::Checkpoint;
use quorate_formats::spec::{FfnSpec, QkNorm};
use quorate_model::KvCache;
use serde_json::{Value, json};

use crate::common::{Common, human_bytes};

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
        let fits: Vec<Value> = memory_sizes(&checkpoint)
            .into_iter()
            .map(|bytes| {
                let room = quorate_residency::memory_plan(&checkpoint, bytes, kv * 4096, 64 << 20);
                let plan = room.ok();
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
            "tensors": checkpoint.tensors().len(), "files": checkpoint.files().len(), "fits": fits,
        });
        if common.json {
            return common.print_json(&document);
        }
        print(&checkpoint, &document);
        Ok(())
    }
}

/// Memory sizes worth a line: around the model's own size for small models, else the usual ones.
fn memory_sizes(checkpoint: &Checkpoint) -> Vec<u64> {
    let total = checkpoint.total_bytes();
    if total < 4 << 30 {
        let step = |n: u64| (64 << 20) + total * n / 8;
        return [2, 3, 4, 6, 8].map(step).to_vec();
    }
    [8u64, 16, 24, 32, 64, 128, 256, 512].map(|gib| gib << 30).to_vec()
}

fn print(checkpoint: &Checkpoint, d: &Value) {
    let spec = checkpoint.spec();
    let bytes = |name: &str| human_bytes(d[name].as_u64().unwrap_or(0));
    let millions = |name: &str| format!("{:.1} M", d[name].as_u64().unwrap_or(0) as f64 / 1e6);
    println!(
        "{} ({}), fingerprint {}",
        checkpoint.path().display(),
        checkpoint.family().name,
        checkpoint.fingerprint()
    );
    println!("parameters   {} in all, {} active per token", millions("parameters"), millions("active_parameters"));
    println!(
        "shape        {} layers, hidden {}, vocabulary {}, context {}",
        d["layers"], d["hidden_size"], d["vocab_size"], d["context"]
    );
    println!("attention    {} heads of {}, {} key/value heads", d["heads"], d["head_dim"], d["kv_heads"]);
    let dense = spec.layers.iter().filter(|l| matches!(l.ffn, FfnSpec::Dense { .. })).count();
    if d["experts"].is_null() {
        println!("experts      none (dense model)");
    } else {
        println!(
            "experts      {} per layer, {} per token, width {}, in {} layers ({dense} dense){}",
            d["experts"],
            d["top_k"],
            d["expert_intermediate_size"],
            d["moe_layers"],
            if d["shared_expert"] == json!(true) { ", with a shared expert" } else { "" }
        );
    }
    println!(
        "bytes        {} in {} tensors and {} files: {} outside the experts, {} each expert",
        bytes("model_bytes"),
        d["tensors"],
        d["files"],
        bytes("non_expert_bytes"),
        bytes("expert_bytes")
    );
    println!("KV cache     {} per token", bytes("kv_bytes_per_token"));
    if !checkpoint.unused_tensors().is_empty() {
        println!("unused       {} tensors, e.g. {}", checkpoint.unused_tensors().len(), checkpoint.unused_tensors()[0]);
    }
    if d["experts"].is_null() {
        return;
    }
    println!("what fits (with a context of 4096 tokens and 64 MiB of buffers):");
    for row in d["fits"].as_array().map(Vec::as_slice).unwrap_or_default() {
        let memory = human_bytes(row["memory_bytes"].as_u64().unwrap_or(0));
        match row["experts_per_layer"].as_u64() {
            Some(k) if row["all"] == json!(true) => println!("  {memory:>10}  all {k} experts of every layer"),
            Some(k) => println!("  {memory:>10}  {k} experts of every layer"),
            None => println!("  {memory:>10}  too small"),
        }
    }
}
