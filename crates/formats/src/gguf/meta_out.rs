//! What a GGUF file's metadata says of an architecture: the other direction of [`super::model`].

use serde_json::Value;

use super::GgufValue;
use super::arch::Arch;
use crate::config::{POSITIONS_MAX, Section};
use crate::spec::{DeltaLayout, FfnSpec, ModelSpec, MoeSpec, NormKind, RouterScore};
use crate::{Checkpoint, FormatError, Result, rope};

/// The metadata of a checkpoint from safetensors: architecture and numbers, without the tokenizer.
///
/// # Errors
/// What the architecture cannot say.
pub fn metadata_for_gguf(checkpoint: &Checkpoint, arch: &Arch) -> Result<Vec<(String, GgufValue)>> {
    let (spec, config) = (checkpoint.spec(), checkpoint.config());
    let name = std::path::absolute(checkpoint.folder()).ok();
    let name = name.as_deref().and_then(|p| p.file_name()?.to_str()).unwrap_or("model").to_owned();
    let mut out = Out { arch, pairs: Vec::new() };
    out.general("architecture", GgufValue::Text(arch.name.to_owned()));
    out.general("type", GgufValue::Text("model".to_owned()));
    out.general("name", GgufValue::Text(name));
    out.number("block_count", spec.layers.len());
    out.number("context_length", spec.max_position_embeddings);
    out.number("embedding_length", spec.hidden_size);
    out.number("feed_forward_length", feed_forward(checkpoint)?);
    out.number("vocab_size", spec.vocab_size);
    let epsilon = if arch.name == "gpt2" { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" };
    out.float(epsilon, f64::from(spec.norm_eps));
    attention(&mut out, spec);
    rotation(&mut out, checkpoint)?;
    scales(&mut out, spec);
    if let Some(moe) = spec.moe_layers().first().and_then(|&l| spec.moe(l)) {
        experts(&mut out, spec, config, moe)?;
    }
    if let Some(delta) = spec.layers.iter().find_map(|layer| layer.delta.as_ref()) {
        out.number("ssm.conv_kernel", delta.conv_kernel);
        out.number("ssm.state_size", delta.key_dim);
        out.number("ssm.group_count", delta.n_key_heads);
        out.number("ssm.time_step_rank", delta.n_value_heads);
        out.number("ssm.inner_size", delta.n_value_heads * delta.value_dim);
        let recurrent = spec.layers.iter().map(|layer| GgufValue::Bool(layer.delta.is_some()));
        out.push("attention.recurrent_layers", GgufValue::list(recurrent));
        out.number("full_attention_interval", config.opt_index("full_attention_interval", 1 << 12)?.unwrap_or(4));
    }
    Ok(out.pairs)
}

/// Factors on the rotation's frequencies, which are tensors: name and values.
pub(super) fn factors(checkpoint: &Checkpoint) -> Result<Vec<(&'static str, Vec<f32>)>> {
    let config = checkpoint.config();
    let Some(section) = rope::section(config)? else { return Ok(Vec::new()) };
    match rope_type(&section)? {
        "llama3" => {
            let Some(layer) = checkpoint.spec().layers.iter().find(|l| l.attn.rope.dim > 0) else {
                return Ok(Vec::new());
            };
            let rope = &layer.attn.rope;
            let plain = rope::inverse_frequencies(rope.dim, theta(checkpoint)?, &rope::RopeScaling::Default);
            Ok(vec![("rope_freqs.weight", plain.iter().zip(&rope.inv_freq).map(|(a, b)| a / b).collect())])
        }
        "longrope" | "su" => {
            let list = |key: &str| match section.get(key) {
                Some(Value::Array(list)) => Ok(list.iter().filter_map(Value::as_f64).map(|v| v as f32).collect()),
                _ => Err(section.missing(key)),
            };
            Ok(vec![
                ("rope_factors_long.weight", list("long_factor")?),
                ("rope_factors_short.weight", list("short_factor")?),
            ])
        }
        _ => Ok(Vec::new()),
    }
}

fn rope_type(section: &Section) -> Result<&str> {
    let named = match section.opt_text("rope_type")? {
        Some(name) => Some(name),
        None => section.opt_text("type")?,
    };
    Ok(named.unwrap_or("default"))
}

/// The base of the rotation. One that the configuration leaves out is found in the frequencies.
fn theta(checkpoint: &Checkpoint) -> Result<f64> {
    let config = checkpoint.config();
    if let Some(section) = rope::section(config)?
        && let Some(theta) = section.opt_positive("rope_theta")?
    {
        return Ok(theta);
    }
    if let Some(theta) = config.opt_positive("rope_theta")? {
        return Ok(theta);
    }
    let rope = checkpoint.spec().layers.iter().map(|l| &l.attn.rope).find(|r| r.dim > 2);
    let found = rope.map_or(10_000.0, |r| f64::from(r.inv_freq[1]).powf(-(r.dim as f64) / 2.0));
    let unit = 10f64.powi(found.log10().floor() as i32 - 3);
    Ok((found / unit).round() * unit)
}

struct Out<'a> {
    arch: &'a Arch,
    pairs: Vec<(String, GgufValue)>,
}

impl Out<'_> {
    fn general(&mut self, key: &str, value: GgufValue) {
        self.pairs.push((format!("general.{key}"), value));
    }

    fn push(&mut self, key: &str, value: GgufValue) {
        self.pairs.push((format!("{}.{key}", self.arch.name), value));
    }

    fn number(&mut self, key: &str, value: usize) {
        self.push(key, GgufValue::Unsigned(value as u64));
    }

    /// As f32, as all readers expect it.
    fn float(&mut self, key: &str, value: f64) {
        self.push(key, GgufValue::Float(f64::from(value as f32)));
    }

    fn text(&mut self, key: &str, value: &str) {
        self.push(key, GgufValue::Text(value.to_owned()));
    }
}

/// The width of dense layers; of models without any, what their configuration calls so, or the width of experts.
fn feed_forward(checkpoint: &Checkpoint) -> Result<usize> {
    let spec = checkpoint.spec();
    let dense = spec.layers.iter().find_map(|layer| match layer.ffn {
        FfnSpec::Dense { intermediate_size, .. } => Some(intermediate_size),
        FfnSpec::Moe(_) => None,
    });
    let config = checkpoint.config();
    let named = match config.opt_index("intermediate_size_mlp", 1 << 24)? {
        Some(width) => Some(width),
        None => config.opt_index("intermediate_size", 1 << 24)?,
    };
    let of_experts = spec.moe_layers().first().and_then(|&l| spec.moe(l)).map(|moe| moe.intermediate_size);
    Ok(dense.or(named).or(of_experts).unwrap_or(0))
}

fn attention(out: &mut Out<'_>, spec: &ModelSpec) {
    let Some(attn) = spec.layers.first().map(|l| &l.attn) else { return };
    out.number("attention.head_count", attn.n_heads);
    match &attn.mla {
        Some(mla) => {
            out.number("attention.head_count_kv", 1);
            if let Some(rank) = mla.q_lora_rank {
                out.number("attention.q_lora_rank", rank);
            }
            out.number("attention.kv_lora_rank", mla.kv_lora_rank);
            out.number("attention.key_length", mla.kv_lora_rank + attn.rope.dim);
            out.number("attention.value_length", mla.kv_lora_rank);
            out.number("attention.key_length_mla", attn.head_dim);
            out.number("attention.value_length_mla", mla.v_head_dim);
        }
        None => {
            out.number("attention.head_count_kv", attn.n_kv_heads);
            if out.arch.name != "gpt2" {
                out.number("attention.key_length", attn.head_dim);
                out.number("attention.value_length", attn.head_dim);
            }
        }
    }
    if let Some(clip) = attn.clip_qkv {
        out.float("attention.clamp_kqv", f64::from(clip));
    }
    if let Some(window) = spec.layers.iter().find_map(|l| l.attn.sliding_window) {
        out.number("attention.sliding_window", window);
    }
    if let Some(cap) = attn.extra.softcap {
        out.float("attn_logit_softcapping", f64::from(cap));
    }
}

fn rotation(out: &mut Out<'_>, checkpoint: &Checkpoint) -> Result<()> {
    let (spec, config) = (checkpoint.spec(), checkpoint.config());
    let Some(rope) = spec.layers.iter().map(|l| &l.attn.rope).find(|r| r.dim > 0) else { return Ok(()) };
    let mut base = theta(checkpoint)?;
    out.number("rope.dimension_count", rope.dim);
    if out.arch.name == "qwen35moe" {
        // Pairs for time, height and width of an image, and none; of text all three count the same.
        let named = match rope::section(config)? {
            Some(section) => section.opt_indices("mrope_section")?,
            None => None,
        };
        let mut sections = named.unwrap_or_else(|| vec![rope.dim / 2]);
        sections.resize(4, 0);
        out.push("rope.dimension_sections", GgufValue::list(sections.iter().map(|&n| GgufValue::Signed(n as i64))));
    }
    if let Some(section) = rope::section(config)? {
        match rope_type(&section)? {
            "linear" => {
                out.text("rope.scaling.type", "linear");
                out.float("rope.scaling.factor", section.positive("factor")?);
            }
            "yarn" => yarn(out, &section)?,
            "dynamic" if section.opt_positive("alpha")?.is_some() => {
                let (alpha, dim) = (section.positive("alpha")?, rope.dim as f64);
                base *= alpha.powf(dim / (dim - 2.0));
                out.text("rope.scaling.type", "none");
            }
            "longrope" | "su" => {
                let original = match section.opt_count("original_max_position_embeddings", POSITIONS_MAX)? {
                    Some(original) => original,
                    None => config.count("original_max_position_embeddings", POSITIONS_MAX)?,
                };
                out.number("rope.scaling.original_context_length", original);
                out.float("rope.scaling.attn_factor", f64::from(rope.attention_factor));
            }
            _ => {}
        }
    }
    out.float("rope.freq_base", base);
    if out.arch.name == "gemma3" {
        let near =
            match config.opt_section("rope_parameters")?.map(|s| s.opt_section("sliding_attention")).transpose()? {
                Some(Some(section)) => Some(section.positive("rope_theta")?),
                _ => config.opt_positive("rope_local_base_freq")?,
            };
        out.float("rope.freq_base_swa", near.unwrap_or(10_000.0));
    }
    Ok(())
}

fn yarn(out: &mut Out<'_>, section: &Section) -> Result<()> {
    out.text("rope.scaling.type", "yarn");
    out.float("rope.scaling.factor", section.positive("factor")?);
    let original = section.opt_count("original_max_position_embeddings", POSITIONS_MAX)?;
    if let Some(original) = original {
        out.number("rope.scaling.original_context_length", original);
    }
    for (key, short) in [
        ("beta_fast", "rope.scaling.yarn_beta_fast"),
        ("beta_slow", "rope.scaling.yarn_beta_slow"),
        ("attention_factor", "rope.scaling.yarn_attn_factor"),
    ] {
        if let Some(value) = section.opt_positive(key)? {
            out.float(short, value);
        }
    }
    if let (true, Some(all)) = (out.arch.name == "deepseek2", section.opt_positive("mscale_all_dim")?) {
        out.float("rope.scaling.yarn_log_multiplier", 0.1 * all);
    }
    Ok(())
}

fn scales(out: &mut Out<'_>, spec: &ModelSpec) {
    if out.arch.name == "granitemoe" {
        let attn = spec.layers.first().map_or(1.0, |l| l.attn.scale);
        out.float("attention.scale", f64::from(attn));
        out.float("embedding_scale", f64::from(spec.scales.embed));
        out.float("residual_scale", f64::from(spec.scales.residual));
        out.float("logit_scale", 1.0 / f64::from(spec.scales.logits));
    }
    if let Some(cap) = spec.scales.logit_softcap {
        out.float("final_logit_softcapping", f64::from(cap));
    }
}

/// Numbers of a mixture of experts.
fn experts(out: &mut Out<'_>, spec: &ModelSpec, config: &Section, moe: &MoeSpec) -> Result<()> {
    let arch = out.arch.name;
    let layers = spec.moe_layers();
    let differs = |&l: &usize| spec.moe(l).is_some_and(|m| (m.n_experts, m.top_k) != (moe.n_experts, moe.top_k));
    if let Some(l) = layers.iter().copied().find(differs) {
        let problem = format!("layer {l} has another number of experts than layer {}", layers[0]);
        return Err(FormatError::NotInGguf { problem });
    }
    out.number("expert_count", moe.n_experts);
    out.number("expert_used_count", moe.top_k);
    if !matches!(arch, "llama" | "olmoe" | "granitemoe" | "phimoe") {
        out.number("expert_feed_forward_length", moe.intermediate_size);
    }
    if let Some(shared) = &moe.shared {
        if matches!(arch, "qwen2moe" | "qwen3next" | "qwen35moe" | "granitemoe" | "hunyuan-moe" | "ernie4_5-moe") {
            out.number("expert_shared_feed_forward_length", shared.intermediate_size);
        }
        if matches!(arch, "deepseek" | "deepseek2" | "glm4moe" | "hunyuan-moe" | "ernie4_5-moe") {
            out.number("expert_shared_count", shared.intermediate_size / moe.intermediate_size.max(1));
        }
    }
    if matches!(arch, "deepseek" | "deepseek2" | "glm4moe" | "ernie4_5-moe") {
        out.number("leading_dense_block_count", layers[0]);
    }
    let step = match arch {
        "llama4" => config.opt_index("interleave_moe_layer_step", 1 << 12)?,
        "ernie4_5-moe" => config.opt_index("moe_layer_interval", 1 << 12)?,
        _ => None,
    };
    if matches!(arch, "llama4" | "ernie4_5-moe") {
        out.number("interleave_moe_layer_step", step.unwrap_or(1));
    }
    let router = &moe.router;
    if matches!(arch, "deepseek" | "deepseek2" | "glm4moe") {
        out.float("expert_weights_scale", f64::from(router.routed_scaling_factor));
    }
    let usual = match arch {
        "deepseek2" | "glm4moe" => None,
        "olmoe" | "qwen2moe" => Some(false),
        "qwen3moe" | "qwen3next" | "qwen35moe" => Some(true),
        _ => Some(router.norm_topk_prob),
    };
    if usual != Some(router.norm_topk_prob) {
        out.push("expert_weights_norm", GgufValue::Bool(router.norm_topk_prob));
    }
    if matches!(arch, "deepseek2" | "glm4moe") {
        out.number("expert_gating_func", if router.score == RouterScore::Sigmoid { 2 } else { 1 });
    }
    let named = config.get("n_group").is_some() && matches!(arch, "deepseek2" | "glm4moe");
    let groups = router.extra.groups.map(|g| (g.n_group, g.topk_group)).or(named.then_some((1, 1)));
    if let Some((n, chosen)) = groups {
        out.number("expert_group_count", n);
        out.number("expert_group_used_count", chosen);
    }
    Ok(())
}

/// What of an architecture is lost or changed in a GGUF file; `None` if it is the same. Numbers may differ by rounding.
pub fn difference(source: &ModelSpec, written: &ModelSpec) -> Option<String> {
    let mut source = source.clone();
    if source.norm == NormKind::RmsPlusOne {
        source.norm = NormKind::Rms;
    }
    // The weights are laid out as the architecture has it.
    let layout = if source.family == "qwen3_5_moe" { DeltaLayout::Tiled } else { DeltaLayout::Split };
    source.layers.iter_mut().filter_map(|layer| layer.delta.as_mut()).for_each(|delta| delta.layout = layout);
    // One architecture may be of several families, which differ in what the rest says.
    source.family.clone_from(&written.family);
    source.eos_token_ids.clone_from(&written.eos_token_ids);
    source.bos_token_id = written.bos_token_id;
    let value = |spec: &ModelSpec| serde_json::to_value(spec).expect("a specification is JSON: its keys are text");
    differing(&value(&source), &value(written), "")
}

fn differing(a: &Value, b: &Value, path: &str) -> Option<String> {
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            let keys = x.keys().chain(y.keys().filter(|key| !x.contains_key(*key)));
            let null = &Value::Null;
            keys.into_iter().find_map(|key| {
                let at = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                differing(x.get(key).unwrap_or(null), y.get(key).unwrap_or(null), &at)
            })
        }
        (Value::Array(x), Value::Array(y)) if x.len() == y.len() => {
            x.iter().zip(y).enumerate().find_map(|(i, (x, y))| differing(x, y, &format!("{path}[{i}]")))
        }
        (Value::Number(x), Value::Number(y)) => {
            let (x, y) = (x.as_f64()?, y.as_f64()?);
            ((x - y).abs() > 2e-6 * x.abs().max(y.abs())).then(|| format!("{path} is {x}, and would be {y}"))
        }
        _ => (a != b).then(|| format!("{path} is {a}, and would be {b}")),
    }
}
