//! DeepSeek-MoE 16B, V2, V2-Lite, V3, R1 and Kimi-K2: shared experts, dense layers first, groups of experts; from V2 on keys
//! and values through a latent vector.

use super::Family;
use super::common::{Defaults, LLAMA_NAMES, activation, attention, dense, layers, mixture, model, sparse_from};
use crate::config::{EXPERTS_MAX, HEAD_DIM_MAX, HEADS_MAX, WIDTH_MAX};
use crate::role::{Role, TensorNames};
use crate::source::{Fused, Part};
use crate::spec::{
    AttnExtra, AttnSpec, FfnSpec, GroupRule, GroupSpec, LayerSpec, MlaSpec, ModelSpec, MoeSpec, QkNorm, RouterExtra,
    RouterScore, RouterSpec, SharedSpec,
};
use crate::{Config, Result, rope};

/// Names of DeepSeek's models.
pub const NAMES: TensorNames = TensorNames {
    shared_gate: "model.layers.{l}.mlp.shared_experts.gate_proj.weight",
    shared_up: "model.layers.{l}.mlp.shared_experts.up_proj.weight",
    shared_down: "model.layers.{l}.mlp.shared_experts.down_proj.weight",
    ..LLAMA_NAMES
};

const COUNT_KEYS: &[&str] = &["n_routed_experts"];
const DEFAULTS: Defaults = Defaults { rope_theta: 10_000.0, norm_eps: 1e-6 };

pub static V1: Family = Family {
    name: "deepseek",
    model_types: &["deepseek"],
    spec: |config| {
        let bias = config.flag("attention_bias", false)?;
        spec(config, "deepseek", AttnSpec { qkv_bias: bias, o_bias: bias, ..attention(config, &DEFAULTS)? })
    },
    names: NAMES,
    expert_count_keys: COUNT_KEYS,
    fused: None,
};

pub static V2: Family = Family {
    name: "deepseek_v2",
    model_types: &["deepseek_v2"],
    spec: |config| spec(config, "deepseek_v2", latent_attention(config)?),
    names: NAMES,
    expert_count_keys: COUNT_KEYS,
    fused: Some(fused),
};

pub static V3: Family = Family {
    name: "deepseek_v3",
    model_types: &["deepseek_v3", "kimi_k2"],
    spec: |config| spec(config, "deepseek_v3", latent_attention(config)?),
    names: NAMES,
    expert_count_keys: COUNT_KEYS,
    fused: Some(fused),
};

/// Attention through a latent vector.
fn latent_attention(config: &Config) -> Result<AttnSpec> {
    let n_heads = config.count("num_attention_heads", HEADS_MAX)?;
    let rope_dim = config.count("qk_rope_head_dim", HEAD_DIM_MAX)?;
    let mla = MlaSpec {
        q_lora_rank: config.opt_count("q_lora_rank", WIDTH_MAX)?,
        kv_lora_rank: config.count("kv_lora_rank", WIDTH_MAX)?,
        nope_dim: config.count("qk_nope_head_dim", HEAD_DIM_MAX)?,
        v_head_dim: config.count("v_head_dim", HEAD_DIM_MAX)?,
    };
    if config.flag("attention_bias", false)? {
        return Err(config.refuse("attention_bias", "biases beside latent vectors are not supported"));
    }
    let head_dim = mla.nope_dim + rope_dim;
    let mut rope = rope::from_config(config, rope_dim, DEFAULTS.rope_theta)?;
    rope.interleaved = true;
    // The softmax's factor grows with the square of YaRN's `mscale_all_dim`.
    let m = rope::mscale_all_dim(config)?;
    Ok(AttnSpec {
        n_heads,
        n_kv_heads: n_heads,
        head_dim,
        qkv_bias: false,
        o_bias: false,
        qk_norm: QkNorm::None,
        clip_qkv: None,
        sliding_window: None,
        scale: ((head_dim as f64).powf(-0.5) * m * m) as f32,
        rope,
        extra: AttnExtra::default(),
        mla: Some(mla),
    })
}

fn spec(config: &Config, family: &str, attn: AttnSpec) -> Result<ModelSpec> {
    let moe = FfnSpec::Moe(experts(config)?);
    let sparse = sparse_from(config, "first_k_dense_replace", "moe_layer_freq")?;
    let layers = layers(config, |l| {
        let ffn = if sparse(l) { moe.clone() } else { dense(config)? };
        Ok(LayerSpec::new(attn.clone(), ffn))
    })?;
    model(config, family, &DEFAULTS, layers)
}

/// The mixture of DeepSeek's models and of GLM-4.5.
pub fn experts(config: &Config) -> Result<MoeSpec> {
    let n_experts = config.count("n_routed_experts", EXPERTS_MAX)?;
    let top_k = config.count("num_experts_per_tok", EXPERTS_MAX)?;
    let width = config.count("moe_intermediate_size", WIDTH_MAX)?;
    let sigmoid = match config.opt_text("scoring_func")? {
        Some("softmax") => false,
        Some("sigmoid") => true,
        Some(_) => return Err(config.refuse("scoring_func", "not supported; known: softmax, sigmoid")),
        // GLM-4.5 does not say; its models are sigmoid routers, and so are V3's.
        None => matches!(config.opt_text("model_type")?, Some("deepseek_v3" | "glm4_moe" | "kimi_k2")),
    };
    // V2 never renormalises, whatever its configuration says; the first one's code does.
    let first = config.opt_text("model_type")? == Some("deepseek");
    let norm = (sigmoid || first) && config.flag("norm_topk_prob", sigmoid)?;
    let groups = match config.opt_text("topk_method")? {
        Some("greedy") => None,
        _ => groups(config, n_experts, sigmoid)?,
    };
    let shared = config.opt_index("n_shared_experts", EXPERTS_MAX)?.unwrap_or(0);
    let plain = mixture(config, n_experts, top_k, width, norm)?;
    Ok(MoeSpec {
        router: RouterSpec {
            score: if sigmoid { RouterScore::Sigmoid } else { RouterScore::SoftmaxAll },
            routed_scaling_factor: config.opt_positive("routed_scaling_factor")?.unwrap_or(1.0) as f32,
            extra: RouterExtra { selection_bias: sigmoid, groups, ..RouterExtra::default() },
            ..plain.router
        },
        shared: (shared > 0).then_some(SharedSpec { intermediate_size: shared * width, gated: false }),
        act: activation(config)?,
        ..plain
    })
}

fn groups(config: &Config, n_experts: usize, sigmoid: bool) -> Result<Option<GroupSpec>> {
    let n_group = config.opt_count("n_group", EXPERTS_MAX)?.unwrap_or(1);
    let topk_group = config.opt_count("topk_group", EXPERTS_MAX)?.unwrap_or(1);
    if !n_experts.is_multiple_of(n_group) {
        return Err(config.refuse("n_group", format!("it must divide the {n_experts} experts")));
    }
    if topk_group > n_group {
        return Err(config.refuse("topk_group", format!("there are only {n_group} groups")));
    }
    let rule = if sigmoid { GroupRule::Top2Sum } else { GroupRule::Max };
    Ok((n_group > 1).then_some(GroupSpec { n_group, topk_group, rule }))
}

/// With a latent vector of the queries, what makes queries of it has another name.
fn fused(spec: &ModelSpec, role: Role) -> Option<Fused> {
    let Role::Q(l) = role else { return None };
    let attn = &spec.layers.get(l)?.attn;
    let rank = attn.mla.as_ref()?.q_lora_rank?;
    let rows = attn.n_heads * attn.head_dim;
    let tensor = format!("model.layers.{l}.self_attn.q_b_proj.weight");
    Some(Fused { tensor, shape: vec![rows, rank], part: Part::Rows { first: 0, rows } })
}
