//! ERNIE-4.5 MoE: a bias on the probabilities for the choice only, shared experts in one block, interleaved RoPE.

use super::Family;
use super::common::{Defaults, attention, dense, layers, mixture, model};
use super::deepseek;
use crate::config::{EXPERTS_MAX, LAYERS_MAX, WIDTH_MAX};
use crate::role::TensorNames;
use crate::spec::{AttnSpec, FfnSpec, LayerSpec, ModelSpec, MoeSpec, RouterExtra, RouterSpec, SharedSpec};
use crate::{Config, Result};

pub static FAMILY: Family = Family {
    name: "ernie4_5_moe",
    model_types: &["ernie4_5_moe"],
    spec,
    names: TensorNames {
        selection_bias: "model.layers.{l}.mlp.moe_statics.e_score_correction_bias",
        ..deepseek::NAMES
    },
    expert_count_keys: &["moe_num_experts"],
    fused: None,
};

const DEFAULTS: Defaults = Defaults { rope_theta: 500_000.0, norm_eps: 1e-5 };

fn spec(config: &Config) -> Result<ModelSpec> {
    let bias = config.flag("use_bias", false)?;
    let mut attn = AttnSpec { qkv_bias: bias, o_bias: bias, ..attention(config, &DEFAULTS)? };
    attn.rope.interleaved = true;
    let width = config.count("moe_intermediate_size", WIDTH_MAX)?;
    let (n, k) = (config.count("moe_num_experts", EXPERTS_MAX)?, config.count("moe_k", EXPERTS_MAX)?);
    let plain = mixture(config, n, k, width, true)?;
    let shared = config.opt_index("moe_num_shared_experts", EXPERTS_MAX)?.unwrap_or(0);
    let extra = RouterExtra { selection_bias: true, ..RouterExtra::default() };
    let moe = FfnSpec::Moe(MoeSpec {
        router: RouterSpec { extra, ..plain.router },
        shared: (shared > 0).then_some(SharedSpec { intermediate_size: shared * width, gated: false }),
        ..plain
    });
    let first = config.opt_index("moe_layer_start_index", LAYERS_MAX)?.unwrap_or(1);
    // -1 is the last layer.
    let last = config.opt_number("moe_layer_end_index")?.filter(|&l| l >= 0.0).map_or(usize::MAX, |l| l as usize);
    let step = config.opt_count("moe_layer_interval", LAYERS_MAX)?.unwrap_or(1);
    let layers = layers(config, |l| {
        let sparse = (first..=last).contains(&l) && (l + 1).is_multiple_of(step);
        let ffn = if sparse { moe.clone() } else { dense(config)? };
        Ok(LayerSpec::new(attn.clone(), ffn))
    })?;
    model(config, FAMILY.name, &DEFAULTS, layers)
}
