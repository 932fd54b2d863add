//! Granite-MoE, with or without a shared block: factors on embedding, residual branches, attention and logits; softmax over
//! the chosen experts; matrices of all experts in one tensor.

use super::Family;
use super::common::{Defaults, LLAMA_NAMES, attention, layers, model, moe};
use crate::config::WIDTH_MAX;
use crate::role::{Role, TensorNames};
use crate::source::{Fused, Part};
use crate::spec::{AttnSpec, FfnSpec, LayerSpec, ModelSpec, MoeSpec, RouterScore, RouterSpec, Scales, SharedSpec};
use crate::{Config, Result};

pub static FAMILY: Family = Family {
    name: "granitemoe",
    model_types: &["granitemoe", "granitemoeshared"],
    spec,
    names: TensorNames { router: "model.layers.{l}.block_sparse_moe.router.layer.weight", ..LLAMA_NAMES },
    expert_count_keys: &["num_local_experts"],
    fused: Some(fused),
};

const DEFAULTS: Defaults = Defaults { rope_theta: 10_000.0, norm_eps: 1e-6 };

fn spec(config: &Config) -> Result<ModelSpec> {
    let factor = |key: &str| Ok::<_, crate::FormatError>(config.opt_positive(key)?.unwrap_or(1.0));
    let bias = config.flag("attention_bias", false)?;
    let scale = factor("attention_multiplier")? as f32;
    let attn = AttnSpec { qkv_bias: bias, o_bias: bias, scale, ..attention(config, &DEFAULTS)? };
    let plain = moe(config, "intermediate_size", false)?;
    let shared = config.opt_index("shared_intermediate_size", WIDTH_MAX)?.unwrap_or(0);
    let ffn = FfnSpec::Moe(MoeSpec {
        router: RouterSpec { score: RouterScore::TopkThenSoftmax, ..plain.router },
        shared: (shared > 0).then_some(SharedSpec { intermediate_size: shared, gated: false }),
        ..plain
    });
    let layers = layers(config, |_| Ok(LayerSpec::new(attn.clone(), ffn.clone())))?;
    let scales = Scales {
        embed: factor("embedding_multiplier")? as f32,
        residual: factor("residual_multiplier")? as f32,
        logits: (1.0 / factor("logits_scaling")?) as f32,
        logit_softcap: None,
    };
    Ok(ModelSpec { scales, ..model(config, FAMILY.name, &DEFAULTS, layers)? })
}

/// Gate rows first, then up rows.
fn fused(spec: &ModelSpec, role: Role) -> Option<Fused> {
    let l = role.layer()?;
    let (d, moe) = (spec.hidden_size, spec.moe(l)?);
    let (e, i) = (moe.n_experts, moe.intermediate_size);
    let s = moe.shared.as_ref().map_or(0, |s| s.intermediate_size);
    let rows = |tensor: &str, shape: Vec<usize>, first, rows| {
        let tensor = format!("model.layers.{l}.{tensor}.weight");
        Some(Fused { tensor, shape, part: Part::Rows { first, rows } })
    };
    match role {
        Role::ExpertGate(_, x) => rows("block_sparse_moe.input_linear", vec![e, 2 * i, d], x * 2 * i, i),
        Role::ExpertUp(_, x) => rows("block_sparse_moe.input_linear", vec![e, 2 * i, d], x * 2 * i + i, i),
        Role::ExpertDown(_, x) => rows("block_sparse_moe.output_linear", vec![e, d, i], x * d, d),
        Role::SharedGate(_) => rows("shared_mlp.input_linear", vec![2 * s, d], 0, s),
        Role::SharedUp(_) => rows("shared_mlp.input_linear", vec![2 * s, d], s, s),
        Role::SharedDown(_) => rows("shared_mlp.output_linear", vec![d, s], 0, d),
        _ => None,
    }
}
