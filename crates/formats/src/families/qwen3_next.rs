//! Qwen3-Next and Qwen3.5-MoE: three layers of gated delta rule, then one of gated attention; norms around zero.

use super::Family;
use super::common::{Defaults, EXPERT_COUNT_KEYS, LLAMA_NAMES, attention, dense, layers, model, moe, sparse_layers};
use crate::config::{HEAD_DIM_MAX, HEADS_MAX, LAYERS_MAX, WIDTH_MAX};
use crate::role::{Role, TensorNames};
use crate::source::{Fused, Part};
use crate::spec::{
    AttnExtra, AttnSpec, DeltaLayout, DeltaSpec, FfnSpec, LayerSpec, ModelSpec, MoeSpec, NormKind, QkNorm, SharedSpec,
};
use crate::{Config, Result};

pub static FAMILY: Family = Family {
    name: "qwen3_next",
    model_types: &["qwen3_next"],
    spec: |config| spec(config, "qwen3_next", DeltaLayout::Grouped),
    names: LLAMA_NAMES,
    expert_count_keys: EXPERT_COUNT_KEYS,
    fused: None,
};

pub static QWEN3_5: Family = Family {
    name: "qwen3_5_moe",
    model_types: &["qwen3_5_moe_text", "qwen3_5_moe"],
    spec: |config| spec(config, "qwen3_5_moe", DeltaLayout::Split),
    names: TensorNames {
        delta_qkv: "model.layers.{l}.linear_attn.in_proj_qkv.weight",
        delta_ba: "model.layers.{l}.linear_attn.in_proj_b.weight",
        ..LLAMA_NAMES
    },
    expert_count_keys: EXPERT_COUNT_KEYS,
    fused: Some(fused),
};

const DEFAULTS: Defaults = Defaults { rope_theta: 10_000_000.0, norm_eps: 1e-6 };

fn spec(config: &Config, family: &str, layout: DeltaLayout) -> Result<ModelSpec> {
    let bias = config.flag("attention_bias", false)?;
    let extra = AttnExtra { gated: true, ..AttnExtra::default() };
    let plain = attention(config, &DEFAULTS)?;
    let attn = AttnSpec { qkv_bias: bias, o_bias: bias, qk_norm: QkNorm::PerHead, extra, ..plain };
    let delta = delta(config, layout)?;
    let shared = config.count("shared_expert_intermediate_size", WIDTH_MAX)?;
    let norm = layout == DeltaLayout::Split || config.flag("norm_topk_prob", true)?;
    let moe = FfnSpec::Moe(MoeSpec {
        shared: Some(SharedSpec { intermediate_size: shared, gated: true }),
        ..moe(config, "moe_intermediate_size", norm)?
    });
    let sparse = sparse_layers(config)?;
    let linear = linear_layers(config)?;
    let layers = layers(config, |l| {
        let ffn = if sparse(l) { moe.clone() } else { dense(config)? };
        Ok(LayerSpec { delta: linear(l).then(|| delta.clone()), ..LayerSpec::new(attn.clone(), ffn) })
    })?;
    Ok(ModelSpec { norm: NormKind::RmsPlusOne, ..model(config, family, &DEFAULTS, layers)? })
}

fn delta(config: &Config, layout: DeltaLayout) -> Result<DeltaSpec> {
    let n_key_heads = config.count("linear_num_key_heads", HEADS_MAX)?;
    let n_value_heads = config.count("linear_num_value_heads", HEADS_MAX)?;
    if !n_value_heads.is_multiple_of(n_key_heads) {
        return Err(
            config.refuse("linear_num_value_heads", format!("a multiple of the {n_key_heads} key heads expected"))
        );
    }
    Ok(DeltaSpec {
        n_key_heads,
        n_value_heads,
        key_dim: config.count("linear_key_head_dim", HEAD_DIM_MAX)?,
        value_dim: config.count("linear_value_head_dim", HEAD_DIM_MAX)?,
        conv_kernel: config.opt_count("linear_conv_kernel_dim", 64)?.unwrap_or(4),
        layout,
    })
}

/// Which layers are linear: `layer_types` says so, else all but every `full_attention_interval`-th.
fn linear_layers(config: &Config) -> Result<impl Fn(usize) -> bool> {
    let types = config.opt_texts("layer_types")?.map(|t| t.into_iter().map(str::to_owned).collect::<Vec<_>>());
    let every = config.opt_count("full_attention_interval", LAYERS_MAX)?.unwrap_or(4);
    if let Some(types) = &types {
        let n = config.count("num_hidden_layers", LAYERS_MAX)?;
        let known = |t: &String| t == "linear_attention" || t == "full_attention";
        if types.len() != n || !types.iter().all(known) {
            return Err(config.refuse("layer_types", format!("{n} times linear_attention or full_attention expected")));
        }
    }
    Ok(move |l: usize| {
        types.as_ref().map_or(!(l + 1).is_multiple_of(every), |t| t.get(l).is_some_and(|t| t == "linear_attention"))
    })
}

/// Qwen3.5 stores the experts of a layer in two tensors, gate rows before up rows.
fn fused(spec: &ModelSpec, role: Role) -> Option<Fused> {
    let l = role.layer()?;
    let (d, moe) = (spec.hidden_size, spec.moe(l)?);
    let (e, i) = (moe.n_experts, moe.intermediate_size);
    let of = |name: &str, shape: Vec<usize>, first, rows| {
        let tensor = format!("model.layers.{l}.mlp.experts.{name}");
        Some(Fused { tensor, shape, part: Part::Rows { first, rows } })
    };
    match role {
        Role::ExpertGate(_, x) => of("gate_up_proj", vec![e, 2 * i, d], x * 2 * i, i),
        Role::ExpertUp(_, x) => of("gate_up_proj", vec![e, 2 * i, d], x * 2 * i + i, i),
        Role::ExpertDown(_, x) => of("down_proj", vec![e, d, i], x * d, d),
        _ => None,
    }
}
