//! Llama-4's text model: one expert per token whose input is scaled, a shared expert, chunks, layers without RoPE.

use super::Family;
use super::common::{Defaults, LLAMA_NAMES, attention, layers, mixture, model};
use crate::config::{EXPERTS_MAX, LAYERS_MAX, POSITIONS_MAX, WIDTH_MAX};
use crate::role::{Role, TensorNames};
use crate::source::{Fused, Part};
use crate::spec::{
    AttnExtra, AttnSpec, FfnSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm, RopeSpec, RouterExtra, RouterScore,
    RouterSpec, SharedSpec,
};
use crate::{Config, Result};

pub static FAMILY: Family = Family {
    name: "llama4",
    model_types: &["llama4_text", "llama4"],
    spec,
    names: TensorNames {
        router: "model.layers.{l}.feed_forward.router.weight",
        dense_gate: "model.layers.{l}.feed_forward.gate_proj.weight",
        dense_up: "model.layers.{l}.feed_forward.up_proj.weight",
        dense_down: "model.layers.{l}.feed_forward.down_proj.weight",
        shared_gate: "model.layers.{l}.feed_forward.shared_expert.gate_proj.weight",
        shared_up: "model.layers.{l}.feed_forward.shared_expert.up_proj.weight",
        shared_down: "model.layers.{l}.feed_forward.shared_expert.down_proj.weight",
        ..LLAMA_NAMES
    },
    expert_count_keys: &["num_local_experts"],
    fused: Some(fused),
};

const DEFAULTS: Defaults = Defaults { rope_theta: 500_000.0, norm_eps: 1e-5 };

fn spec(config: &Config) -> Result<ModelSpec> {
    let bias = config.flag("attention_bias", false)?;
    let mut attn = AttnSpec { qkv_bias: bias, o_bias: bias, ..attention(config, &DEFAULTS)? };
    attn.rope.interleaved = true;
    let width = config.count("intermediate_size", WIDTH_MAX)?;
    let k = config.count("num_experts_per_tok", EXPERTS_MAX)?;
    let plain = mixture(config, config.count("num_local_experts", EXPERTS_MAX)?, k, width, false)?;
    let router = RouterSpec {
        score: RouterScore::Sigmoid,
        extra: RouterExtra { gate_on_input: true, ..RouterExtra::default() },
        ..plain.router
    };
    let shared = Some(SharedSpec { intermediate_size: width, gated: false });
    let moe = FfnSpec::Moe(MoeSpec { router, shared, ..plain });
    let dense = FfnSpec::Dense {
        intermediate_size: config.opt_count("intermediate_size_mlp", WIDTH_MAX)?.unwrap_or(width),
        act: super::common::activation(config)?,
        plain: false,
    };
    let step = config.opt_count("interleave_moe_layer_step", LAYERS_MAX)?.unwrap_or(1);
    let listed = config.opt_indices("moe_layers")?;
    let with_rope = config.opt_indices("no_rope_layers")?.filter(|l| !l.is_empty());
    let every = config.opt_count("no_rope_layer_interval", LAYERS_MAX)?.unwrap_or(4);
    let (rotating, still) = (rotating(config, &attn)?, still(config, &attn)?);
    let layers = layers(config, |l| {
        let sparse = listed.as_ref().map_or((l + 1).is_multiple_of(step), |listed| listed.contains(&l));
        // In spite of its name the list says 1 for layers with RoPE.
        let rotates = with_rope.as_ref().map_or(!(l + 1).is_multiple_of(every), |r| r.get(l) != Some(&0));
        let attn = if rotates { rotating.clone() } else { still.clone() };
        Ok(LayerSpec::new(attn, if sparse { moe.clone() } else { dense.clone() }))
    })?;
    model(config, FAMILY.name, &DEFAULTS, layers)
}

/// Attention within chunks, with RoPE and a norm behind it.
fn rotating(config: &Config, attn: &AttnSpec) -> Result<AttnSpec> {
    let chunk = config.opt_count("attention_chunk_size", POSITIONS_MAX)?;
    let qk_norm = if config.flag("use_qk_norm", true)? { QkNorm::Unit } else { QkNorm::None };
    let extra = AttnExtra { norm_after_rope: true, chunk, ..attn.extra };
    Ok(AttnSpec { qk_norm, extra, ..attn.clone() })
}

/// Attention over all positions without RoPE, queries growing with the position.
fn still(config: &Config, attn: &AttnSpec) -> Result<AttnSpec> {
    let floor = config.opt_positive("floor_scale")?.unwrap_or(8192.0) as f32;
    let scale = config.opt_positive("attn_scale")?.unwrap_or(0.1) as f32;
    let tuned = config.flag("attn_temperature_tuning", true)?;
    let extra = AttnExtra { temperature: tuned.then_some((floor, scale)), ..attn.extra };
    Ok(AttnSpec { rope: RopeSpec::none(), extra, ..attn.clone() })
}

/// Stored `[in, out]`: gate first, then up.
fn fused(spec: &ModelSpec, role: Role) -> Option<Fused> {
    let l = role.layer()?;
    let (d, moe) = (spec.hidden_size, spec.moe(l)?);
    let (e, i) = (moe.n_experts, moe.intermediate_size);
    let of = |name: &str, shape: Vec<usize>, index, first, count| {
        let tensor = format!("model.layers.{l}.feed_forward.experts.{name}");
        Some(Fused { tensor, shape, part: Part::Columns { index, first, step: 1, count } })
    };
    match role {
        Role::ExpertGate(_, x) => of("gate_up_proj", vec![e, d, 2 * i], x, 0, i),
        Role::ExpertUp(_, x) => of("gate_up_proj", vec![e, d, 2 * i], x, i, i),
        Role::ExpertDown(_, x) => of("down_proj", vec![e, i, d], x, 0, d),
        _ => None,
    }
}
