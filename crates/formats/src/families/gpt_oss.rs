//! gpt-oss: attention sinks, alternating windows, biases on router and experts, a clamped gate; experts transposed and
//! interleaved, or in 4-bit floats.

use super::Family;
use super::common::{Defaults, LLAMA_NAMES, attention, layers, model, moe, sliding_layers, window};
use crate::role::{Role, TensorNames};
use crate::source::{Fused, Part};
use crate::spec::{
    Activation, AttnExtra, AttnSpec, FfnSpec, LayerSpec, ModelSpec, MoeSpec, RouterExtra, RouterScore, RouterSpec,
};
use crate::{Config, Result};

pub static FAMILY: Family = Family {
    name: "gpt_oss",
    model_types: &["gpt_oss"],
    spec,
    names: TensorNames {
        router: "model.layers.{l}.mlp.router.weight",
        router_bias: "model.layers.{l}.mlp.router.bias",
        expert_down_bias: "model.layers.{l}.mlp.experts.down_proj_bias",
        ..LLAMA_NAMES
    },
    expert_count_keys: &["num_local_experts"],
    fused: Some(fused),
};

const DEFAULTS: Defaults = Defaults { rope_theta: 150_000.0, norm_eps: 1e-5 };

fn spec(config: &Config) -> Result<ModelSpec> {
    let bias = config.flag("attention_bias", true)?;
    let extra = AttnExtra { sinks: true, ..AttnExtra::default() };
    let attn = AttnSpec { qkv_bias: bias, o_bias: bias, extra, ..attention(config, &DEFAULTS)? };
    let window = window(config, Some(128))?;
    let slides = sliding_layers(config, |l| l.is_multiple_of(2))?;
    let limit = config.opt_positive("swiglu_limit")?.unwrap_or(7.0) as f32;
    let alpha = config.opt_positive("swiglu_alpha")?.unwrap_or(1.702) as f32;
    let plain = moe(config, "intermediate_size", false)?;
    let router = RouterSpec {
        score: RouterScore::TopkThenSoftmax,
        extra: RouterExtra { bias: true, ..RouterExtra::default() },
        ..plain.router
    };
    let act = Activation::ClampedSwiglu { limit, alpha };
    let ffn = FfnSpec::Moe(MoeSpec { router, act, expert_bias: true, ..plain });
    let layers = layers(config, |l| {
        let attn = AttnSpec { sliding_window: window.filter(|_| slides(l)), ..attn.clone() };
        Ok(LayerSpec::new(attn, ffn.clone()))
    })?;
    model(config, FAMILY.name, &DEFAULTS, layers)
}

/// Stored `[in, out]`; gate in the even columns, up in the odd ones.
fn fused(spec: &ModelSpec, role: Role) -> Option<Fused> {
    let l = role.layer()?;
    let (d, moe) = (spec.hidden_size, spec.moe(l)?);
    let (e, i) = (moe.n_experts, moe.intermediate_size);
    let of = |name: &str, shape: Vec<usize>, part: Part| {
        Some(Fused { tensor: format!("model.layers.{l}.mlp.experts.{name}"), shape, part })
    };
    let columns = |index, first, step, count| Part::Columns { index, first, step, count };
    match role {
        Role::ExpertGate(_, x) => of("gate_up_proj", vec![e, d, 2 * i], columns(x, 0, 2, i)),
        Role::ExpertUp(_, x) => of("gate_up_proj", vec![e, d, 2 * i], columns(x, 1, 2, i)),
        Role::ExpertDown(_, x) => of("down_proj", vec![e, i, d], columns(x, 0, 1, d)),
        Role::ExpertGateBias(_) => of("gate_up_proj_bias", vec![e, 2 * i], Part::EverySecond { first: 0 }),
        Role::ExpertUpBias(_) => of("gate_up_proj_bias", vec![e, 2 * i], Part::EverySecond { first: 1 }),
        _ => None,
    }
}
