//! Qwen1.5-MoE and Qwen2-MoE: a gated shared expert beside the routed ones, biases in q, k and v.

use super::Family;
use super::common::{
    Defaults, EXPERT_COUNT_KEYS, LLAMA_NAMES, attention, dense, layers, model, moe, qwen_window, sliding_layers,
    sparse_layers,
};
use crate::config::{LAYERS_MAX, WIDTH_MAX};
use crate::spec::{AttnSpec, FfnSpec, LayerSpec, ModelSpec, MoeSpec, SharedSpec};
use crate::{Config, Result};

pub static FAMILY: Family = Family {
    name: "qwen2_moe",
    model_types: &["qwen2_moe"],
    spec,
    names: LLAMA_NAMES,
    expert_count_keys: EXPERT_COUNT_KEYS,
    fused: None,
};

const DEFAULTS: Defaults = Defaults { rope_theta: 10_000.0, norm_eps: 1e-6 };

fn spec(config: &Config) -> Result<ModelSpec> {
    let attn = AttnSpec { qkv_bias: config.flag("qkv_bias", true)?, ..attention(config, &DEFAULTS)? };
    let window = qwen_window(config)?;
    // Without `layer_types`, every other layer of the first `max_window_layers` slides, the first one included.
    let full_from = config.opt_index("max_window_layers", LAYERS_MAX)?.unwrap_or(28);
    let slides = sliding_layers(config, |l| l < full_from && l.is_multiple_of(2))?;
    let shared = config.count("shared_expert_intermediate_size", WIDTH_MAX)?;
    let moe = MoeSpec {
        shared: Some(SharedSpec { intermediate_size: shared, gated: true }),
        ..moe(config, "moe_intermediate_size", config.flag("norm_topk_prob", false)?)?
    };
    let sparse = sparse_layers(config)?;
    let layers = layers(config, |l| {
        let attn = AttnSpec { sliding_window: window.filter(|_| slides(l)), ..attn.clone() };
        let ffn = if sparse(l) { FfnSpec::Moe(moe.clone()) } else { dense(config)? };
        Ok(LayerSpec::new(attn, ffn))
    })?;
    model(config, FAMILY.name, &DEFAULTS, layers)
}
