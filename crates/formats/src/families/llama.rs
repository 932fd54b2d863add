//! Llama 2 and 3, and the many models that use their architecture.

use super::Family;
use super::common::{Defaults, LLAMA_NAMES, attention, dense, layers, model};
use crate::spec::{AttnSpec, LayerSpec, ModelSpec};
use crate::{Config, Result};

pub static FAMILY: Family =
    Family { name: "llama", model_types: &["llama"], spec, names: LLAMA_NAMES, expert_count_keys: &[], fused: None };

const DEFAULTS: Defaults = Defaults { rope_theta: 10_000.0, norm_eps: 1e-6 };

fn spec(config: &Config) -> Result<ModelSpec> {
    let bias = config.flag("attention_bias", false)?;
    let attn = AttnSpec { qkv_bias: bias, o_bias: bias, ..attention(config, &DEFAULTS)? };
    let ffn = dense(config)?;
    let layers = layers(config, |_| Ok(LayerSpec::new(attn.clone(), ffn.clone())))?;
    model(config, FAMILY.name, &DEFAULTS, layers)
}
