//! Mixtral 8x7B and 8x22B: the gates of the chosen experts are always renormalised.

use super::Family;
use super::common::{Defaults, LLAMA_NAMES, attention, layers, model, moe, window};
use crate::role::TensorNames;
use crate::spec::{AttnSpec, FfnSpec, LayerSpec, ModelSpec};
use crate::{Config, Result};

pub static FAMILY: Family = Family {
    name: "mixtral",
    model_types: &["mixtral"],
    spec,
    names: NAMES,
    expert_count_keys: &["num_local_experts", "num_experts"],
    fused: None,
};

/// Names of Mixtral's models, taken over by Phi-3.5-MoE.
pub const NAMES: TensorNames = TensorNames {
    router: "model.layers.{l}.block_sparse_moe.gate.weight",
    expert_gate: "model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight",
    expert_up: "model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight",
    expert_down: "model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight",
    ..LLAMA_NAMES
};

const DEFAULTS: Defaults = Defaults { rope_theta: 1_000_000.0, norm_eps: 1e-5 };

fn spec(config: &Config) -> Result<ModelSpec> {
    let attn = AttnSpec { sliding_window: window(config, None)?, ..attention(config, &DEFAULTS)? };
    let ffn = FfnSpec::Moe(moe(config, "intermediate_size", true)?);
    let layers = layers(config, |_| Ok(LayerSpec::new(attn.clone(), ffn.clone())))?;
    model(config, FAMILY.name, &DEFAULTS, layers)
}
