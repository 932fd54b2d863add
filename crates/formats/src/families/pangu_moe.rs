//! Pangu-Pro-MoE: the best expert of each group, a learned factor on its gate, one shared block.

use super::Family;
use super::common::{Defaults, LLAMA_NAMES, attention, dense, layers, mixture, model};
use crate::config::{EXPERTS_MAX, WIDTH_MAX};
use crate::spec::{
    AttnSpec, FfnSpec, GroupRule, GroupSpec, LayerSpec, ModelSpec, MoeSpec, RouterExtra, RouterSpec, SharedSpec,
};
use crate::{Config, Result};

pub static FAMILY: Family = Family {
    name: "pangu_pro_moe",
    model_types: &["PanguProMoE", "pangu_pro_moe"],
    spec,
    names: LLAMA_NAMES,
    expert_count_keys: &["num_experts"],
    fused: None,
};

const DEFAULTS: Defaults = Defaults { rope_theta: 10_000.0, norm_eps: 1e-5 };

fn spec(config: &Config) -> Result<ModelSpec> {
    let attn = AttnSpec { qkv_bias: true, o_bias: true, ..attention(config, &DEFAULTS)? };
    let n = config.count("num_experts", EXPERTS_MAX)?;
    let k = config.count("num_experts_per_tok", EXPERTS_MAX)?;
    if !n.is_multiple_of(k) {
        return Err(config.refuse("num_experts_per_tok", format!("one expert of each group: it must divide the {n}")));
    }
    let plain = mixture(config, n, k, config.count("moe_intermediate_size", WIDTH_MAX)?, false)?;
    let groups = Some(GroupSpec { n_group: k, topk_group: k, rule: GroupRule::OneOfEach });
    let shared = config.count("shared_expert_intermediate_size", WIDTH_MAX)?;
    let moe = FfnSpec::Moe(MoeSpec {
        router: RouterSpec {
            extra: RouterExtra { groups, expert_scale: true, ..RouterExtra::default() },
            ..plain.router
        },
        shared: Some(SharedSpec { intermediate_size: shared, gated: false }),
        ..plain
    });
    let dense_layers = config.opt_indices("mlp_only_layers")?.unwrap_or_default();
    let layers = layers(config, |l| {
        let ffn = if dense_layers.contains(&l) { dense(config)? } else { moe.clone() };
        Ok(LayerSpec::new(attn.clone(), ffn))
    })?;
    model(config, FAMILY.name, &DEFAULTS, layers)
}
