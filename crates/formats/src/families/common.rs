//! What the llama-like families share: keys, defaults and tensor names.

use crate::config::{EXPERTS_MAX, HEAD_DIM_MAX, HEADS_MAX, LAYERS_MAX, POSITIONS_MAX, VOCAB_MAX, WIDTH_MAX};
use crate::role::TensorNames;
use crate::spec::{
    Activation, AttnExtra, AttnSpec, FfnSpec, LayerSpec, ModelSpec, MoeSpec, NormKind, QkNorm, RouterExtra,
    RouterScore, RouterSpec, Scales,
};
use crate::{Config, FormatError, Result, packed, rope};

/// Tensor names of Llama and of all who took them over.
pub const LLAMA_NAMES: TensorNames = TensorNames {
    embed: "model.embed_tokens.weight",
    lm_head: "lm_head.weight",
    final_norm: "model.norm.weight",
    attn_norm: "model.layers.{l}.input_layernorm.weight",
    ffn_norm: "model.layers.{l}.post_attention_layernorm.weight",
    q: "model.layers.{l}.self_attn.q_proj.weight",
    k: "model.layers.{l}.self_attn.k_proj.weight",
    v: "model.layers.{l}.self_attn.v_proj.weight",
    o: "model.layers.{l}.self_attn.o_proj.weight",
    q_bias: "model.layers.{l}.self_attn.q_proj.bias",
    k_bias: "model.layers.{l}.self_attn.k_proj.bias",
    v_bias: "model.layers.{l}.self_attn.v_proj.bias",
    o_bias: "model.layers.{l}.self_attn.o_proj.bias",
    q_norm: "model.layers.{l}.self_attn.q_norm.weight",
    k_norm: "model.layers.{l}.self_attn.k_norm.weight",
    router: "model.layers.{l}.mlp.gate.weight",
    dense_gate: "model.layers.{l}.mlp.gate_proj.weight",
    dense_up: "model.layers.{l}.mlp.up_proj.weight",
    dense_down: "model.layers.{l}.mlp.down_proj.weight",
    shared_gate: "model.layers.{l}.mlp.shared_expert.gate_proj.weight",
    shared_up: "model.layers.{l}.mlp.shared_expert.up_proj.weight",
    shared_down: "model.layers.{l}.mlp.shared_expert.down_proj.weight",
    shared_expert_gate: "model.layers.{l}.mlp.shared_expert_gate.weight",
    expert_gate: "model.layers.{l}.mlp.experts.{e}.gate_proj.weight",
    expert_up: "model.layers.{l}.mlp.experts.{e}.up_proj.weight",
    expert_down: "model.layers.{l}.mlp.experts.{e}.down_proj.weight",
    position_embed: "model.embed_positions.weight",
    lm_head_bias: "lm_head.bias",
    final_norm_bias: "model.norm.bias",
    attn_norm_bias: "model.layers.{l}.input_layernorm.bias",
    ffn_norm_bias: "model.layers.{l}.post_attention_layernorm.bias",
    attn_post_norm: "model.layers.{l}.post_attention_layernorm.weight",
    ffn_post_norm: "model.layers.{l}.post_feedforward_layernorm.weight",
    sinks: "model.layers.{l}.self_attn.sinks",
    q_a: "model.layers.{l}.self_attn.q_a_proj.weight",
    q_a_norm: "model.layers.{l}.self_attn.q_a_layernorm.weight",
    kv_a: "model.layers.{l}.self_attn.kv_a_proj_with_mqa.weight",
    kv_a_norm: "model.layers.{l}.self_attn.kv_a_layernorm.weight",
    kv_b: "model.layers.{l}.self_attn.kv_b_proj.weight",
    router_bias: "model.layers.{l}.mlp.gate.bias",
    selection_bias: "model.layers.{l}.mlp.gate.e_score_correction_bias",
    expert_scale: "model.layers.{l}.mlp.router_scale",
    dense_up_bias: "model.layers.{l}.mlp.up_proj.bias",
    dense_down_bias: "model.layers.{l}.mlp.down_proj.bias",
    expert_gate_bias: "model.layers.{l}.mlp.experts.gate_proj_bias",
    expert_up_bias: "model.layers.{l}.mlp.experts.up_proj_bias",
    expert_down_bias: "model.layers.{l}.mlp.experts.down_proj_bias",
    delta_qkv: "model.layers.{l}.linear_attn.in_proj_qkvz.weight",
    delta_z: "model.layers.{l}.linear_attn.in_proj_z.weight",
    delta_ba: "model.layers.{l}.linear_attn.in_proj_ba.weight",
    delta_a: "model.layers.{l}.linear_attn.in_proj_a.weight",
    delta_conv: "model.layers.{l}.linear_attn.conv1d.weight",
    delta_a_log: "model.layers.{l}.linear_attn.A_log",
    delta_dt_bias: "model.layers.{l}.linear_attn.dt_bias",
    delta_norm: "model.layers.{l}.linear_attn.norm.weight",
    delta_out: "model.layers.{l}.linear_attn.out_proj.weight",
};

/// The two names under which the number of routed experts is written.
pub const EXPERT_COUNT_KEYS: &[&str] = &["num_experts", "num_local_experts"];

/// Values that a configuration may leave out; they differ between families.
pub struct Defaults {
    pub rope_theta: f64,
    pub norm_eps: f64,
}

/// The whole model, from its layers.
pub fn model(config: &Config, family: &str, defaults: &Defaults, layers: Vec<LayerSpec>) -> Result<ModelSpec> {
    packed::scheme(config)?; // refuses what is not read
    let norm_eps = config.opt_positive("rms_norm_eps")?.unwrap_or(defaults.norm_eps);
    if norm_eps > 0.1 {
        return Err(config.refuse("rms_norm_eps", "a small number expected"));
    }
    Ok(ModelSpec {
        family: family.to_owned(),
        vocab_size: config.count("vocab_size", VOCAB_MAX)?,
        hidden_size: config.count("hidden_size", WIDTH_MAX)?,
        max_position_embeddings: config.count("max_position_embeddings", POSITIONS_MAX)?,
        norm_eps: norm_eps as f32,
        tie_word_embeddings: config.flag("tie_word_embeddings", false)?,
        eos_token_ids: config.eos_token_ids()?,
        bos_token_id: config.bos_token_id()?,
        norm: NormKind::Rms,
        scales: Scales::default(),
        learned_positions: false,
        lm_head_bias: false,
        layers,
    })
}

/// One [`LayerSpec`] per decoder layer.
pub fn layers(config: &Config, layer: impl Fn(usize) -> Result<LayerSpec>) -> Result<Vec<LayerSpec>> {
    (0..config.count("num_hidden_layers", LAYERS_MAX)?).map(layer).collect()
}

/// Attention without biases, q/k norm, clip and window; a family sets what it has.
pub fn attention(config: &Config, defaults: &Defaults) -> Result<AttnSpec> {
    let n_heads = config.count("num_attention_heads", HEADS_MAX)?;
    let n_kv_heads = config.opt_count("num_key_value_heads", HEADS_MAX)?.unwrap_or(n_heads);
    if !n_heads.is_multiple_of(n_kv_heads) {
        let problem = format!("it must divide num_attention_heads, which is {n_heads}");
        return Err(config.refuse("num_key_value_heads", problem));
    }
    let head_dim = match config.opt_count("head_dim", HEAD_DIM_MAX)? {
        Some(head_dim) => head_dim,
        None => {
            let hidden = config.count("hidden_size", WIDTH_MAX)?;
            if !hidden.is_multiple_of(n_heads) || hidden / n_heads > HEAD_DIM_MAX {
                let problem = format!("hidden_size {hidden} is no multiple of it, and there is no head_dim");
                return Err(config.refuse("num_attention_heads", problem));
            }
            hidden / n_heads
        }
    };
    Ok(AttnSpec {
        n_heads,
        n_kv_heads,
        head_dim,
        qkv_bias: false,
        o_bias: false,
        qk_norm: QkNorm::None,
        clip_qkv: None,
        sliding_window: None,
        scale: (head_dim as f64).powf(-0.5) as f32,
        rope: rope::from_config(config, head_dim, defaults.rope_theta)?,
        extra: AttnExtra::default(),
        mla: None,
    })
}

/// The activation on the gate.
pub fn activation(config: &Config) -> Result<Activation> {
    let key = if config.get("hidden_activation").is_some() { "hidden_activation" } else { "hidden_act" };
    match config.opt_text(key)?.unwrap_or("silu") {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        _ => Err(config.refuse(key, "not supported; known: silu, gelu, gelu_new, gelu_pytorch_tanh")),
    }
}

/// A dense block of width `intermediate_size`.
pub fn dense(config: &Config) -> Result<FfnSpec> {
    if config.flag("mlp_bias", false)? {
        return Err(config.refuse("mlp_bias", "biases in the feed-forward block are not supported"));
    }
    let intermediate_size = config.count("intermediate_size", WIDTH_MAX)?;
    Ok(FfnSpec::Dense { intermediate_size, act: activation(config)?, plain: false })
}

/// A mixture of experts with softmax over all, whose width stands under `width_key`.
pub fn moe(config: &Config, width_key: &str, norm_topk_prob: bool) -> Result<MoeSpec> {
    let count = |key: &&&str| config.get(key).is_some();
    let key = EXPERT_COUNT_KEYS.iter().find(count).ok_or_else(|| config.missing(EXPERT_COUNT_KEYS[0]))?;
    let n_experts = config.count(key, EXPERTS_MAX)?;
    mixture(
        config,
        n_experts,
        config.count("num_experts_per_tok", EXPERTS_MAX)?,
        config.count(width_key, WIDTH_MAX)?,
        norm_topk_prob,
    )
}

/// A mixture of experts with softmax over all.
pub fn mixture(
    config: &Config,
    n_experts: usize,
    top_k: usize,
    intermediate_size: usize,
    norm_topk_prob: bool,
) -> Result<MoeSpec> {
    if top_k > n_experts {
        let problem = format!("{top_k} experts per token, but a layer has only {n_experts}");
        return Err(config.refuse("num_experts_per_tok", problem));
    }
    Ok(MoeSpec {
        n_experts,
        top_k,
        intermediate_size,
        act: activation(config)?,
        router: RouterSpec {
            score: RouterScore::SoftmaxAll,
            norm_topk_prob,
            routed_scaling_factor: 1.0,
            extra: RouterExtra::default(),
        },
        shared: None,
        expert_bias: false,
    })
}

/// The rule of Qwen's mixtures: layer `l` is one if it is not listed in `mlp_only_layers` and its number, counted from
/// 1, is a multiple of `decoder_sparse_step`.
pub fn sparse_layers(config: &Config) -> Result<impl Fn(usize) -> bool> {
    let dense = config.opt_indices("mlp_only_layers")?.unwrap_or_default();
    let step = config.opt_count("decoder_sparse_step", LAYERS_MAX)?.unwrap_or(1);
    Ok(move |l: usize| !dense.contains(&l) && (l + 1).is_multiple_of(step))
}

/// The rule of DeepSeek's mixtures: the first `first_key` layers are dense, and of the others those whose number is a
/// multiple of `step_key` are mixtures.
pub fn sparse_from(config: &Config, first_key: &str, step_key: &str) -> Result<impl Fn(usize) -> bool> {
    let first = config.opt_index(first_key, LAYERS_MAX)?.unwrap_or(0);
    let step = config.opt_count(step_key, LAYERS_MAX)?.unwrap_or(1);
    Ok(move |l: usize| l >= first && l.is_multiple_of(step))
}

/// The window of families in which all layers have it, or none: absent is `default`, null is none.
pub fn window(config: &Config, default: Option<usize>) -> Result<Option<usize>> {
    match config.json().contains_key("sliding_window") {
        true => config.opt_count("sliding_window", POSITIONS_MAX),
        false => Ok(default),
    }
}

/// Window of Qwen's models where `use_sliding_window` is on. Null and 0 are none.
pub fn qwen_window(config: &Config) -> Result<Option<usize>> {
    if !config.flag("use_sliding_window", false)? {
        return Ok(None);
    }
    let window = match config.json().contains_key("sliding_window") {
        true => config.opt_index("sliding_window", POSITIONS_MAX)?,
        false => Some(4096),
    };
    Ok(window.filter(|&w| w > 0))
}

/// Which layers slide: `layer_types` says so, else `default` by layer.
pub fn sliding_layers(config: &Config, default: impl Fn(usize) -> bool) -> Result<impl Fn(usize) -> bool> {
    let key = "layer_types";
    let types = match config.opt_texts(key)? {
        None => None,
        Some(types) => {
            let n_layers = config.count("num_hidden_layers", LAYERS_MAX)?;
            if types.len() != n_layers {
                return Err(config.refuse(key, format!("one entry per layer expected, which are {n_layers}")));
            }
            let slides = |t: &&str| match *t {
                "sliding_attention" => Ok(true),
                "full_attention" => Ok(false),
                other => Err::<bool, FormatError>(config.refuse(key, format!("{other:?} is not supported"))),
            };
            Some(types.iter().map(slides).collect::<Result<Vec<bool>>>()?)
        }
    };
    Ok(move |l: usize| types.as_ref().map_or_else(|| default(l), |t| t[l]))
}
