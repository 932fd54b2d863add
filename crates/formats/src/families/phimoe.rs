//! Phi-3.5-MoE: two choices by the sparse mixer, LayerNorm, biases everywhere, longrope with factors of its own.

use super::Family;
use super::common::{Defaults, attention, layers, model, moe, window};
use super::mixtral;
use crate::spec::{AttnSpec, FfnSpec, LayerSpec, ModelSpec, MoeSpec, NormKind, RouterExtra, RouterScore, RouterSpec};
use crate::{Config, Result};

pub static FAMILY: Family = Family {
    name: "phimoe",
    model_types: &["phimoe"],
    spec,
    names: mixtral::NAMES,
    expert_count_keys: &["num_local_experts"],
    fused: None,
};

const DEFAULTS: Defaults = Defaults { rope_theta: 10_000.0, norm_eps: 1e-5 };

fn spec(config: &Config) -> Result<ModelSpec> {
    let bias = config.flag("attention_bias", false)?;
    let window = window(config, None)?;
    let attn = AttnSpec { qkv_bias: bias, o_bias: bias, sliding_window: window, ..attention(config, &DEFAULTS)? };
    let plain = moe(config, "intermediate_size", false)?;
    if plain.top_k != 2 {
        return Err(config.refuse("num_experts_per_tok", "the sparse mixer makes two choices"));
    }
    let jitter = config.opt_number("router_jitter_noise")?.unwrap_or(0.01) as f32;
    let router = RouterSpec {
        score: RouterScore::SparseMixer,
        extra: RouterExtra { jitter, ..RouterExtra::default() },
        ..plain.router
    };
    let ffn = FfnSpec::Moe(MoeSpec { router, ..plain });
    let layers = layers(config, |_| Ok(LayerSpec::new(attn.clone(), ffn.clone())))?;
    let lm_head_bias = config.flag("lm_head_bias", false)?;
    Ok(ModelSpec { norm: NormKind::Layer, lm_head_bias, ..model(config, FAMILY.name, &DEFAULTS, layers)? })
}
