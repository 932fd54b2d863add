//! Phi-3: q, k, v in one matrix, gate and up in another; longrope.

use super::Family;
use super::common::{Defaults, LLAMA_NAMES, attention, dense, layers, model, window};
use crate::role::Role;
use crate::source::{Fused, Part};
use crate::spec::{AttnSpec, FfnSpec, LayerSpec, ModelSpec};
use crate::{Config, Result};

pub static FAMILY: Family = Family {
    name: "phi3",
    model_types: &["phi3"],
    spec,
    names: LLAMA_NAMES,
    expert_count_keys: &[],
    fused: Some(fused),
};

const DEFAULTS: Defaults = Defaults { rope_theta: 10_000.0, norm_eps: 1e-5 };

fn spec(config: &Config) -> Result<ModelSpec> {
    let attn = AttnSpec { sliding_window: window(config, None)?, ..attention(config, &DEFAULTS)? };
    let ffn = dense(config)?;
    let layers = layers(config, |_| Ok(LayerSpec::new(attn.clone(), ffn.clone())))?;
    model(config, FAMILY.name, &DEFAULTS, layers)
}

fn fused(spec: &ModelSpec, role: Role) -> Option<Fused> {
    let l = role.layer()?;
    let (d, layer) = (spec.hidden_size, spec.layers.get(l)?);
    let (q, kv) = (layer.attn.n_heads * layer.attn.head_dim, layer.attn.n_kv_heads * layer.attn.head_dim);
    let FfnSpec::Dense { intermediate_size: i, .. } = layer.ffn else { return None };
    let of = |name: &str, all, first, rows| {
        let tensor = format!("model.layers.{l}.{name}.weight");
        Some(Fused { tensor, shape: vec![all, d], part: Part::Rows { first, rows } })
    };
    match role {
        Role::Q(_) => of("self_attn.qkv_proj", q + 2 * kv, 0, q),
        Role::K(_) => of("self_attn.qkv_proj", q + 2 * kv, q, kv),
        Role::V(_) => of("self_attn.qkv_proj", q + 2 * kv, q + kv, kv),
        Role::DenseGate(_) => of("mlp.gate_up_proj", 2 * i, 0, i),
        Role::DenseUp(_) => of("mlp.gate_up_proj", 2 * i, i, i),
        _ => None,
    }
}
