//! Qwen3: per-head q/k norm, no biases, a head width of its own; the upper layers may slide.

use super::Family;
use super::common::{Defaults, LLAMA_NAMES, attention, dense, layers, model, qwen_window, sliding_layers};
use crate::config::LAYERS_MAX;
use crate::spec::{AttnSpec, LayerSpec, ModelSpec, QkNorm};
use crate::{Config, Result};

pub static FAMILY: Family =
    Family { name: "qwen3", model_types: &["qwen3"], spec, names: LLAMA_NAMES, expert_count_keys: &[], fused: None };

const DEFAULTS: Defaults = Defaults { rope_theta: 10_000.0, norm_eps: 1e-6 };

fn spec(config: &Config) -> Result<ModelSpec> {
    let bias = config.flag("attention_bias", false)?;
    let attn = AttnSpec { qkv_bias: bias, o_bias: bias, qk_norm: QkNorm::PerHead, ..attention(config, &DEFAULTS)? };
    let window = qwen_window(config)?;
    let full_below = config.opt_index("max_window_layers", LAYERS_MAX)?.unwrap_or(28);
    let slides = sliding_layers(config, |l| l >= full_below)?;
    let ffn = dense(config)?;
    let layers = layers(config, |l| {
        let attn = AttnSpec { sliding_window: window.filter(|_| slides(l)), ..attn.clone() };
        Ok(LayerSpec::new(attn, ffn.clone()))
    })?;
    model(config, FAMILY.name, &DEFAULTS, layers)
}
