//! Gemma 2 and 3 (text): norms before and after each block, embeddings times sqrt(d), windows, caps.

use super::Family;
use super::common::{Defaults, LLAMA_NAMES, attention, dense, layers, model, sliding_layers, window};
use crate::config::LAYERS_MAX;
use crate::role::TensorNames;
use crate::spec::{AttnExtra, AttnSpec, LayerSpec, ModelSpec, NormKind, NormPlacement, QkNorm, RopeSpec, Scales};
use crate::{Config, Result, rope};

const NAMES: TensorNames = TensorNames { ffn_norm: "model.layers.{l}.pre_feedforward_layernorm.weight", ..LLAMA_NAMES };

pub static GEMMA2: Family = Family {
    name: "gemma2",
    model_types: &["gemma2"],
    spec: |config| spec(config, "gemma2", QkNorm::None),
    names: NAMES,
    expert_count_keys: &[],
    fused: None,
};

pub static GEMMA3: Family = Family {
    name: "gemma3",
    model_types: &["gemma3_text", "gemma3"],
    spec: |config| spec(config, "gemma3", QkNorm::PerHead),
    names: NAMES,
    expert_count_keys: &[],
    fused: None,
};

const DEFAULTS: Defaults = Defaults { rope_theta: 10_000.0, norm_eps: 1e-6 };

fn spec(config: &Config, family: &str, qk_norm: QkNorm) -> Result<ModelSpec> {
    let third = qk_norm == QkNorm::PerHead;
    let plain = attention(config, &Defaults { rope_theta: if third { 1_000_000.0 } else { 10_000.0 }, ..DEFAULTS })?;
    let scalar = config.opt_positive("query_pre_attn_scalar")?.unwrap_or(256.0);
    // Gemma 3 names the cap but does not apply it.
    let softcap = config.opt_positive("attn_logit_softcapping")?.filter(|_| !third).map(|c| c as f32);
    let extra = AttnExtra { softcap, ..AttnExtra::default() };
    let full = AttnSpec { qk_norm, scale: scalar.powf(-0.5) as f32, extra, ..plain };
    let window = window(config, Some(4096))?;
    let every = config.opt_count("sliding_window_pattern", LAYERS_MAX)?.unwrap_or(if third { 6 } else { 2 });
    let slides = sliding_layers(config, |l| !(l + 1).is_multiple_of(every))?;
    let local = if third { local_rope(config, full.head_dim)? } else { full.rope.clone() };
    let near = AttnSpec { rope: local, sliding_window: window, ..full.clone() };
    let ffn = dense(config)?;
    let layers = layers(config, |l| {
        let attn = if slides(l) { near.clone() } else { full.clone() };
        Ok(LayerSpec { norms: NormPlacement::Both, ..LayerSpec::new(attn, ffn.clone()) })
    })?;
    let model = model(config, family, &DEFAULTS, layers)?;
    let scales = Scales {
        embed: (model.hidden_size as f64).sqrt() as f32,
        logit_softcap: config.opt_positive("final_logit_softcapping")?.map(|c| c as f32),
        ..Scales::default()
    };
    // Tied unless the configuration says otherwise.
    let tie_word_embeddings = config.flag("tie_word_embeddings", true)?;
    Ok(ModelSpec { norm: NormKind::RmsPlusOne, scales, tie_word_embeddings, ..model })
}

/// Windows have RoPE of their own base, without scaling.
fn local_rope(config: &Config, head_dim: usize) -> Result<RopeSpec> {
    let theta = match config.opt_section("rope_parameters")?.map(|s| s.opt_section("sliding_attention")).transpose()? {
        Some(Some(section)) => section.positive("rope_theta")?,
        _ => config.opt_positive("rope_local_base_freq")?.unwrap_or(10_000.0),
    };
    Ok(RopeSpec {
        dim: head_dim,
        inv_freq: rope::inverse_frequencies(head_dim, theta, &rope::RopeScaling::Default),
        ..RopeSpec { attention_factor: 1.0, ..RopeSpec::none() }
    })
}
