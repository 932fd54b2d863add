//! Hunyuan-A13B: q/k norm after RoPE, one shared block, gates always renormalised; numbers may be lists, one per layer.

use super::Family;
use super::common::{Defaults, LLAMA_NAMES, attention, layers, mixture, model};
use crate::config::{EXPERTS_MAX, WIDTH_MAX};
use crate::role::TensorNames;
use crate::spec::{AttnExtra, AttnSpec, FfnSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm, SharedSpec};
use crate::{Config, Result};

pub static FAMILY: Family = Family {
    name: "hunyuan_v1_moe",
    model_types: &["hunyuan_v1_moe"],
    spec,
    names: TensorNames {
        q_norm: "model.layers.{l}.self_attn.query_layernorm.weight",
        k_norm: "model.layers.{l}.self_attn.key_layernorm.weight",
        router: "model.layers.{l}.mlp.gate.wg.weight",
        shared_gate: "model.layers.{l}.mlp.shared_mlp.gate_proj.weight",
        shared_up: "model.layers.{l}.mlp.shared_mlp.up_proj.weight",
        shared_down: "model.layers.{l}.mlp.shared_mlp.down_proj.weight",
        ..LLAMA_NAMES
    },
    expert_count_keys: &["num_experts"],
    fused: None,
};

const DEFAULTS: Defaults = Defaults { rope_theta: 10_000.0, norm_eps: 1e-5 };

/// A number, or the entry of a list with one for each layer.
fn of_layer(config: &Config, key: &str, layer: usize, max: usize) -> Result<Option<usize>> {
    if !config.get(key).is_some_and(serde_json::Value::is_array) {
        return config.opt_count(key, max);
    }
    let list = config.opt_indices(key)?.unwrap_or_default();
    let entry = list.get(layer).copied().filter(|n| (1..=max).contains(n));
    entry.map(Some).ok_or_else(|| config.refuse(key, format!("a number from 1 to {max} for layer {layer} expected")))
}

fn spec(config: &Config) -> Result<ModelSpec> {
    let bias = config.flag("attention_bias", false)?;
    let qk_norm = if config.flag("use_qk_norm", true)? { QkNorm::PerHead } else { QkNorm::None };
    let extra = AttnExtra { norm_after_rope: true, ..AttnExtra::default() };
    let attn = AttnSpec { qkv_bias: bias, o_bias: bias, qk_norm, extra, ..attention(config, &DEFAULTS)? };
    let layers = layers(config, |l| {
        let shared_width = config.count("intermediate_size", WIDTH_MAX)?;
        let width = of_layer(config, "moe_intermediate_size", l, WIDTH_MAX)?.unwrap_or(shared_width);
        let n = of_layer(config, "num_experts", l, EXPERTS_MAX)?.ok_or_else(|| config.missing("num_experts"))?;
        let k = of_layer(config, "moe_topk", l, EXPERTS_MAX)?.ok_or_else(|| config.missing("moe_topk"))?;
        let shared = of_layer(config, "num_shared_expert", l, EXPERTS_MAX)?.unwrap_or(1);
        let shared = SharedSpec { intermediate_size: shared * shared_width, gated: false };
        let moe = MoeSpec { shared: Some(shared), ..mixture(config, n, k, width, true)? };
        Ok(LayerSpec::new(attn.clone(), FfnSpec::Moe(moe)))
    })?;
    model(config, FAMILY.name, &DEFAULTS, layers)
}
