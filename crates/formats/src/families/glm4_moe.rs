//! GLM-4.5 and 4.6: the mixture of DeepSeek-V3 with plain attention, part of whose coordinates rotate.

use super::Family;
use super::common::{Defaults, attention, dense, layers, model, sparse_from};
use super::deepseek::{NAMES, experts};
use crate::spec::{AttnSpec, FfnSpec, LayerSpec, ModelSpec, QkNorm};
use crate::{Config, Result};

pub static FAMILY: Family = Family {
    name: "glm4_moe",
    model_types: &["glm4_moe"],
    spec,
    names: NAMES,
    expert_count_keys: &["n_routed_experts"],
    fused: None,
};

const DEFAULTS: Defaults = Defaults { rope_theta: 10_000.0, norm_eps: 1e-5 };

fn spec(config: &Config) -> Result<ModelSpec> {
    let qk_norm = if config.flag("use_qk_norm", false)? { QkNorm::PerHead } else { QkNorm::None };
    let qkv_bias = config.flag("attention_bias", false)?;
    let attn = AttnSpec { qkv_bias, qk_norm, ..attention(config, &DEFAULTS)? };
    let moe = FfnSpec::Moe(experts(config)?);
    let sparse = sparse_from(config, "first_k_dense_replace", "moe_layer_freq")?;
    let layers = layers(config, |l| {
        let ffn = if sparse(l) { moe.clone() } else { dense(config)? };
        Ok(LayerSpec::new(attn.clone(), ffn))
    })?;
    model(config, FAMILY.name, &DEFAULTS, layers)
}
