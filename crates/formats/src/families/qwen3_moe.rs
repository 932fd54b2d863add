//! Qwen3-MoE: per-head q/k norm, a head width of its own, no shared expert; a window is in all layers or none.

use super::Family;
use super::common::{
    Defaults, EXPERT_COUNT_KEYS, LLAMA_NAMES, attention, dense, layers, model, moe, qwen_window, sparse_layers,
};
use crate::spec::{AttnSpec, FfnSpec, LayerSpec, ModelSpec, QkNorm};
use crate::{Config, Result};

pub static FAMILY: Family = Family {
    name: "qwen3_moe",
    model_types: &["qwen3_moe"],
    spec,
    names: LLAMA_NAMES,
    expert_count_keys: EXPERT_COUNT_KEYS,
    fused: None,
};

const DEFAULTS: Defaults = Defaults { rope_theta: 10_000.0, norm_eps: 1e-6 };

fn spec(config: &Config) -> Result<ModelSpec> {
    let bias = config.flag("attention_bias", false)?;
    let attn = AttnSpec {
        qkv_bias: bias,
        o_bias: bias,
        qk_norm: QkNorm::PerHead,
        sliding_window: qwen_window(config)?,
        ..attention(config, &DEFAULTS)?
    };
    let moe = moe(config, "moe_intermediate_size", config.flag("norm_topk_prob", false)?)?;
    let sparse = sparse_layers(config)?;
    let layers = layers(config, |l| {
        let ffn = if sparse(l) { FfnSpec::Moe(moe.clone()) } else { dense(config)? };
        Ok(LayerSpec::new(attn.clone(), ffn))
    })?;
    model(config, FAMILY.name, &DEFAULTS, layers)
}
