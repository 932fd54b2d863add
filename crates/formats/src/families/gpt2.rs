//! GPT-2: learned positions, LayerNorm, biases, plain feed-forward blocks; matrices stored `[in, out]`.

use super::Family;
use super::common::{Defaults, LLAMA_NAMES};
use crate::config::{HEADS_MAX, LAYERS_MAX, POSITIONS_MAX, VOCAB_MAX, WIDTH_MAX};
use crate::role::{Role, TensorNames};
use crate::source::{Fused, Part};
use crate::spec::{Activation, AttnExtra, AttnSpec, FfnSpec, LayerSpec, ModelSpec, NormKind, QkNorm, RopeSpec, Scales};
use crate::{Config, Result};

pub static FAMILY: Family = Family {
    name: "gpt2",
    model_types: &["gpt2"],
    spec,
    names: TensorNames {
        embed: "transformer.wte.weight",
        position_embed: "transformer.wpe.weight",
        final_norm: "transformer.ln_f.weight",
        final_norm_bias: "transformer.ln_f.bias",
        attn_norm: "transformer.h.{l}.ln_1.weight",
        attn_norm_bias: "transformer.h.{l}.ln_1.bias",
        ffn_norm: "transformer.h.{l}.ln_2.weight",
        ffn_norm_bias: "transformer.h.{l}.ln_2.bias",
        o_bias: "transformer.h.{l}.attn.c_proj.bias",
        dense_up_bias: "transformer.h.{l}.mlp.c_fc.bias",
        dense_down_bias: "transformer.h.{l}.mlp.c_proj.bias",
        ..LLAMA_NAMES
    },
    expert_count_keys: &[],
    fused: Some(fused),
};

const DEFAULTS: Defaults = Defaults { rope_theta: 10_000.0, norm_eps: 1e-5 };

fn spec(config: &Config) -> Result<ModelSpec> {
    let (d, heads) = (config.count("n_embd", WIDTH_MAX)?, config.count("n_head", HEADS_MAX)?);
    if !d.is_multiple_of(heads) {
        return Err(config.refuse("n_head", format!("it must divide n_embd, which is {d}")));
    }
    let attn = AttnSpec {
        n_heads: heads,
        n_kv_heads: heads,
        head_dim: d / heads,
        qkv_bias: true,
        o_bias: true,
        qk_norm: QkNorm::None,
        clip_qkv: None,
        sliding_window: None,
        scale: if config.flag("scale_attn_weights", true)? { (d as f64 / heads as f64).powf(-0.5) as f32 } else { 1.0 },
        rope: RopeSpec::none(),
        extra: AttnExtra::default(),
        mla: None,
    };
    if config.flag("scale_attn_by_inverse_layer_idx", false)? {
        return Err(config.refuse("scale_attn_by_inverse_layer_idx", "not supported"));
    }
    let act = match config.opt_text("activation_function")?.unwrap_or("gelu_new") {
        "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
        "gelu" => Activation::Gelu,
        _ => return Err(config.refuse("activation_function", "not supported; known: gelu_new, gelu")),
    };
    let intermediate_size = config.opt_count("n_inner", WIDTH_MAX)?.unwrap_or(4 * d);
    let ffn = FfnSpec::Dense { intermediate_size, act, plain: true };
    let n_layers = config.count("n_layer", LAYERS_MAX)?;
    Ok(ModelSpec {
        family: FAMILY.name.to_owned(),
        vocab_size: config.count("vocab_size", VOCAB_MAX)?,
        hidden_size: d,
        max_position_embeddings: config.count("n_positions", POSITIONS_MAX)?,
        norm_eps: config.opt_positive("layer_norm_epsilon")?.unwrap_or(DEFAULTS.norm_eps) as f32,
        tie_word_embeddings: config.flag("tie_word_embeddings", true)?,
        eos_token_ids: config.eos_token_ids()?,
        bos_token_id: config.bos_token_id()?,
        norm: NormKind::Layer,
        scales: Scales::default(),
        learned_positions: true,
        lm_head_bias: false,
        layers: vec![LayerSpec::new(attn, ffn); n_layers],
    })
}

fn fused(spec: &ModelSpec, role: Role) -> Option<Fused> {
    let l = role.layer()?;
    let d = spec.hidden_size;
    let FfnSpec::Dense { intermediate_size: i, .. } = spec.layers.get(l)?.ffn else { return None };
    let of =
        |name: &str, shape: Vec<usize>, part| Some(Fused { tensor: format!("transformer.h.{l}.{name}"), shape, part });
    let columns = |first, count| Part::Columns { index: 0, first, step: 1, count };
    let rows = |first| Part::Rows { first, rows: d };
    match role {
        Role::Q(_) => of("attn.c_attn.weight", vec![d, 3 * d], columns(0, d)),
        Role::K(_) => of("attn.c_attn.weight", vec![d, 3 * d], columns(d, d)),
        Role::V(_) => of("attn.c_attn.weight", vec![d, 3 * d], columns(2 * d, d)),
        Role::O(_) => of("attn.c_proj.weight", vec![d, d], columns(0, d)),
        Role::QBias(_) => of("attn.c_attn.bias", vec![3 * d], rows(0)),
        Role::KBias(_) => of("attn.c_attn.bias", vec![3 * d], rows(d)),
        Role::VBias(_) => of("attn.c_attn.bias", vec![3 * d], rows(2 * d)),
        Role::DenseUp(_) => of("mlp.c_fc.weight", vec![d, i], columns(0, i)),
        Role::DenseDown(_) => of("mlp.c_proj.weight", vec![i, d], columns(0, d)),
        _ => None,
    }
}
