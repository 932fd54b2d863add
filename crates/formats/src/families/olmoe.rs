//! OLMoE: q/k norm over the whole projection, optional clamp, gates as the softmax over all experts has them.

use super::Family;
use super::common::{Defaults, EXPERT_COUNT_KEYS, LLAMA_NAMES, attention, layers, model, moe};
use crate::spec::{AttnSpec, FfnSpec, LayerSpec, ModelSpec, QkNorm};
use crate::{Config, Result};

pub static FAMILY: Family = Family {
    name: "olmoe",
    model_types: &["olmoe"],
    spec,
    names: LLAMA_NAMES,
    expert_count_keys: EXPERT_COUNT_KEYS,
    fused: None,
};

const DEFAULTS: Defaults = Defaults { rope_theta: 10_000.0, norm_eps: 1e-5 };

fn spec(config: &Config) -> Result<ModelSpec> {
    let bias = config.flag("attention_bias", false)?;
    let attn = AttnSpec {
        qkv_bias: bias,
        o_bias: bias,
        qk_norm: QkNorm::Whole,
        clip_qkv: config.opt_positive("clip_qkv")?.map(|c| c as f32),
        ..attention(config, &DEFAULTS)?
    };
    // `intermediate_size` is the width of one expert.
    let ffn = FfnSpec::Moe(moe(config, "intermediate_size", config.flag("norm_topk_prob", false)?)?);
    let layers = layers(config, |_| Ok(LayerSpec::new(attn.clone(), ffn.clone())))?;
    model(config, FAMILY.name, &DEFAULTS, layers)
}
