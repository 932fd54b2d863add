//! The texts of `quorate inspect`, from its document.

use anyhow::Result;
use quorate_formats::spec::{FfnSpec, ModelSpec};
use serde_json::{Value, json};

use crate::common::{human_bytes, say};

/// Prints the document of `inspect` for a reader.
pub fn print(spec: &ModelSpec, d: &Value) -> Result<()> {
    let count = |name: &str| match d[name].as_u64().unwrap_or(0) as f64 {
        n if n < 1e6 => format!("{:.1} thousand", n / 1e3),
        n if n < 1e9 => format!("{:.1} million", n / 1e6),
        n => format!("{:.2} billion", n / 1e9),
    };
    let text = |name: &str| d[name].as_str().unwrap_or_default();
    match (d["fingerprint"].as_str(), d["source"].as_str()) {
        (Some(fingerprint), _) => say!("{} ({}), fingerprint {fingerprint}", text("path"), text("family"))?,
        (None, Some(source)) => say!("{} ({}), values of {source}, no weights here", text("path"), text("family"))?,
        (None, None) => say!("{} ({}), no weights", text("path"), text("family"))?,
    }
    say!("parameters   {} in all, {} active per token", count("parameters"), count("active_parameters"))?;
    let (layers, hidden, vocabulary) = (&d["layers"], &d["hidden_size"], &d["vocab_size"]);
    say!("shape        {layers} layers, hidden {hidden}, vocabulary {vocabulary}, context {}", d["context"])?;
    print_attention(d)?;
    print_experts(spec, d)?;
    print_bytes(d)?;
    print_cache(d)?;
    if let Some(first) = d["first_unused_tensor"].as_str() {
        say!("unused       {} tensors, e.g. {first}", d["unused_tensors"])?;
    }
    print_quantisations(d)?;
    print_fits(d)
}

fn human(value: &Value) -> String {
    value.as_u64().map_or_else(|| "-".to_owned(), human_bytes)
}

fn print_attention(d: &Value) -> Result<()> {
    let mut more = String::new();
    if let Some(width) = d["latent_width"].as_u64() {
        more += &format!(", through a latent vector of {width}");
    }
    for (key, what) in [("linear_attention_layers", "with linear attention"), ("windowed_layers", "with a window")] {
        match d[key].as_u64() {
            Some(n) if n > 0 => more += &format!(", {n} layers {what}"),
            _ => {}
        }
    }
    say!("attention    {} heads of {}, {} key/value heads{more}", d["heads"], d["head_dim"], d["kv_heads"])?;
    Ok(())
}

fn print_experts(spec: &ModelSpec, d: &Value) -> Result<()> {
    if d["experts"].is_null() {
        say!("experts      none (dense model)")?;
        return Ok(());
    }
    let dense = spec.layers.iter().filter(|l| matches!(l.ffn, FfnSpec::Dense { .. })).count();
    let shared = if d["shared_expert"] == json!(true) { ", with a shared expert" } else { "" };
    let (experts, k, width) = (&d["experts"], &d["top_k"], &d["expert_intermediate_size"]);
    say!(
        "experts      {experts} per layer, {k} per token, width {width}, in {} layers ({dense} dense){shared}",
        d["moe_layers"]
    )?;
    Ok(())
}

fn print_bytes(d: &Value) -> Result<()> {
    if d["model_bytes"].is_null() {
        return Ok(());
    }
    let experts = match d["expert_bytes"].as_u64() {
        Some(each) => {
            format!(": {} outside the experts, {} each expert", human(&d["non_expert_bytes"]), human_bytes(each))
        }
        None => String::new(),
    };
    say!("bytes        {} in {} tensors, {} file(s){experts}", human(&d["model_bytes"]), d["tensors"], d["files"])?;
    Ok(())
}

fn print_cache(d: &Value) -> Result<()> {
    let (compact, beyond) = (&d["kv_compact_bytes_per_token"], &d["kv_compact_bytes_per_token_beyond_windows"]);
    let beyond = if compact == beyond { String::new() } else { format!(" ({} once windows are full)", human(beyond)) };
    let state = match d["kv_state_bytes"].as_u64() {
        Some(bytes) if bytes > 0 => format!(", and {} whatever the length", human_bytes(bytes)),
        _ => String::new(),
    };
    say!("KV cache     {} per token here; compact {}{beyond}{state}", human(&d["kv_bytes_per_token"]), human(compact))?;
    Ok(())
}

fn print_quantisations(d: &Value) -> Result<()> {
    let moe = !d["experts"].is_null();
    let heads = if moe { "  each expert  experts of a layer  outside the experts" } else { "" };
    say!("weights by type:\n  {:8} {:>5} {:>11}{heads}", "type", "bits", "in all")?;
    let mut last = None;
    for row in d["quantisations"].as_array().map(Vec::as_slice).unwrap_or_default() {
        // Types of the same size are one line.
        if last.replace(&row["bytes"]) == Some(&row["bytes"]) {
            continue;
        }
        let (name, bits) = (row["type"].as_str().unwrap_or_default(), row["bits_per_weight"].as_f64().unwrap_or(0.0));
        let of = |name: &str| human(&row[name]);
        let (expert, layer) = (of("expert_bytes"), of("experts_of_layer_bytes"));
        let more = match moe {
            true => format!("  {expert:>11}  {layer:>18}  {:>19}", of("non_expert_bytes")),
            false => String::new(),
        };
        say!("  {name:8} {bits:5.2} {:>11}{more}", of("bytes"))?;
    }
    Ok(())
}

fn print_fits(d: &Value) -> Result<()> {
    if d["experts"].is_null() {
        return Ok(());
    }
    let stored = d["fits_quantisation"].as_str().unwrap_or("weights as stored");
    let (context, cache) = (&d["fits_context"], human(&d["fits_cache_bytes"]));
    say!("what fits into --memory ({stored}; with a context of {context} tokens, {cache}):")?;
    for row in d["fits"].as_array().map(Vec::as_slice).unwrap_or_default() {
        let (memory, needed) = (human(&row["memory_bytes"]), human(&row["needed_bytes"]));
        match row["experts_per_layer"].as_u64() {
            Some(k) if row["all"] == json!(true) => say!("  {memory:>10}  all {k} experts of every layer")?,
            Some(k) => say!("  {memory:>10}  {k} experts of every layer")?,
            None => say!("  {memory:>10}  too small: {} experts of every layer need {needed}", d["top_k"])?,
        }
    }
    Ok(())
}
