//! Mistral 7B: Llama with a sliding window in all layers.

use super::Family;
use super::common::{Defaults, LLAMA_NAMES, attention, dense, layers, model, window};
use crate::spec::{AttnSpec, LayerSpec, ModelSpec};
use crate::{Config, Result};

pub static FAMILY: Family = Family {
    name: "mistral",
    model_types: &["mistral"],
    spec,
    names: LLAMA_NAMES,
    expert_count_keys: &[],
    fused: None,
};

const DEFAULTS: Defaults = Defaults { rope_theta: 10_000.0, norm_eps: 1e-6 };

fn spec(config: &Config) -> Result<ModelSpec> {
    // The first release came without the key and meant 4096.
    let attn = AttnSpec { sliding_window: window(config, Some(4096))?, ..attention(config, &DEFAULTS)? };
    let ffn = dense(config)?;
    let layers = layers(config, |_| Ok(LayerSpec::new(attn.clone(), ffn.clone())))?;
    model(config, FAMILY.name, &DEFAULTS, layers)
}
