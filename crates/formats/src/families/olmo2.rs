//! OLMo-2: norms after each block, q/k norm over the whole projection.

use super::Family;
use super::common::{Defaults, LLAMA_NAMES, attention, dense, layers, model};
use crate::spec::{AttnSpec, LayerSpec, ModelSpec, NormPlacement, QkNorm};
use crate::{Config, Result};

pub static FAMILY: Family =
    Family { name: "olmo2", model_types: &["olmo2"], spec, names: LLAMA_NAMES, expert_count_keys: &[], fused: None };

const DEFAULTS: Defaults = Defaults { rope_theta: 500_000.0, norm_eps: 1e-5 };

fn spec(config: &Config) -> Result<ModelSpec> {
    let bias = config.flag("attention_bias", false)?;
    let attn = AttnSpec { qkv_bias: bias, o_bias: bias, qk_norm: QkNorm::Whole, ..attention(config, &DEFAULTS)? };
    let ffn = dense(config)?;
    let layers =
        layers(config, |_| Ok(LayerSpec { norms: NormPlacement::After, ..LayerSpec::new(attn.clone(), ffn.clone()) }))?;
    model(config, FAMILY.name, &DEFAULTS, layers)
}
