//! Architectures of GGUF files: which family each is, and how its metadata says what a `config.json` says.
//!
//! The tables serve both directions. Reading: [`super::model`] makes a configuration of them, so that a model has one
//! specification, whatever file it came in.

use crate::config::Section;

/// One value of `general.architecture`.
#[derive(Debug)]
pub struct Arch {
    /// The value, and the prefix of the architecture's keys.
    pub name: &'static str,
    /// Values of `model_type` that are written so; the first is what it is read as, unless `choose` says another.
    pub model_types: &'static [&'static str],
    /// Index into `model_types`, by the metadata (keys without the architecture's prefix).
    pub choose: fn(&Section) -> usize,
    /// Pairs of a key of `config.json` and a key of the metadata without prefix, beyond [`COMMON_KEYS`] or in place of an
    /// entry there.
    pub keys: &'static [(&'static str, &'static str)],
    /// What the architecture means where the metadata is silent, as JSON.
    pub given: &'static [(&'static str, &'static str)],
    /// Whether the rows of each head's q and k are stored in another order, so that interleaved rotation of them is the half
    /// rotation of the original: row `j` of the first half, then row `j` of the second.
    pub permuted: bool,
    /// Whether norms are stored with their 1 added.
    pub one_added: bool,
}

/// Pairs of a key of `config.json` and a key of the metadata without prefix.
pub const COMMON_KEYS: &[(&str, &str)] = &[
    ("num_hidden_layers", "block_count"),
    ("max_position_embeddings", "context_length"),
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("rope_theta", "rope.freq_base"),
    ("clip_qkv", "attention.clamp_kqv"),
    ("sliding_window", "attention.sliding_window"),
    ("num_experts", "expert_count"),
    ("num_experts_per_tok", "expert_used_count"),
    ("moe_intermediate_size", "expert_feed_forward_length"),
    ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
    ("norm_topk_prob", "expert_weights_norm"),
    ("routed_scaling_factor", "expert_weights_scale"),
    ("n_group", "expert_group_count"),
    ("topk_group", "expert_group_used_count"),
    ("n_shared_experts", "expert_shared_count"),
    ("first_k_dense_replace", "leading_dense_block_count"),
    ("num_nextn_predict_layers", "nextn_predict_layers"),
];

/// An architecture of one family, with no keys of its own.
const fn plain(name: &'static str, model_types: &'static [&'static str]) -> Arch {
    Arch { name, model_types, choose: |_| 0, keys: &[], given: &[], permuted: false, one_added: false }
}

const DEEPSEEK_COUNT: (&str, &str) = ("n_routed_experts", "expert_count");

/// Keys of Qwen's delta layers.
const DELTA_KEYS: &[(&str, &str)] = &[
    ("linear_conv_kernel_dim", "ssm.conv_kernel"),
    ("linear_key_head_dim", "ssm.state_size"),
    ("linear_num_key_heads", "ssm.group_count"),
    ("linear_num_value_heads", "ssm.time_step_rank"),
    ("full_attention_interval", "full_attention_interval"),
];

/// All architectures that are read.
pub static ARCHS: &[Arch] = &[
    Arch { given: &[("norm_topk_prob", "false")], ..plain("olmoe", &["olmoe"]) },
    Arch {
        choose: |meta| usize::from(meta.opt_index("expert_count", usize::MAX).is_ok_and(|n| n.unwrap_or(0) > 0)),
        permuted: true,
        ..plain("llama", &["llama", "mixtral", "mistral"])
    },
    plain("qwen2", &["qwen2"]),
    Arch { given: &[("norm_topk_prob", "false")], ..plain("qwen2moe", &["qwen2_moe"]) },
    plain("qwen3", &["qwen3"]),
    // llama.cpp always renormalises here.
    Arch { given: &[("norm_topk_prob", "true")], ..plain("qwen3moe", &["qwen3_moe"]) },
    Arch {
        keys: DELTA_KEYS,
        given: &[("norm_topk_prob", "true")],
        one_added: true,
        ..plain("qwen3next", &["qwen3_next"])
    },
    Arch {
        keys: DELTA_KEYS,
        given: &[("norm_topk_prob", "true")],
        one_added: true,
        ..plain("qwen35moe", &["qwen3_5_moe_text"])
    },
    Arch {
        keys: &[DEEPSEEK_COUNT],
        given: &[("scoring_func", "\"softmax\"")],
        permuted: true,
        ..plain("deepseek", &["deepseek"])
    },
    Arch {
        choose: |meta| usize::from(matches!(meta.opt_index("expert_gating_func", 9), Ok(Some(2)))),
        keys: &[
            DEEPSEEK_COUNT,
            ("q_lora_rank", "attention.q_lora_rank"),
            ("kv_lora_rank", "attention.kv_lora_rank"),
            ("qk_rope_head_dim", "rope.dimension_count"),
            ("v_head_dim", "attention.value_length_mla"),
        ],
        given: &[("norm_topk_prob", "false")],
        ..plain("deepseek2", &["deepseek_v2", "deepseek_v3", "kimi_k2"])
    },
    Arch { keys: &[DEEPSEEK_COUNT], given: &[("norm_topk_prob", "false")], ..plain("glm4moe", &["glm4_moe"]) },
    Arch { keys: &[("intermediate_size", "expert_feed_forward_length")], ..plain("gpt-oss", &["gpt_oss"]) },
    plain("phi3", &["phi3"]),
    plain("phimoe", &["phimoe"]),
    Arch {
        keys: &[
            ("embedding_multiplier", "embedding_scale"),
            ("residual_multiplier", "residual_scale"),
            ("attention_multiplier", "attention.scale"),
            ("logits_scaling", "logit_scale"),
            ("num_local_experts", "expert_count"),
            ("shared_intermediate_size", "expert_shared_feed_forward_length"),
        ],
        permuted: true,
        ..plain("granitemoe", &["granitemoe", "granitemoeshared"])
    },
    Arch {
        keys: &[
            ("num_local_experts", "expert_count"),
            ("intermediate_size", "expert_feed_forward_length"),
            ("intermediate_size_mlp", "feed_forward_length"),
            ("interleave_moe_layer_step", "interleave_moe_layer_step"),
        ],
        given: &[("attention_chunk_size", "8192"), ("floor_scale", "8192"), ("attn_scale", "0.1")],
        ..plain("llama4", &["llama4_text", "llama4"])
    },
    Arch {
        keys: &[("moe_topk", "expert_used_count"), ("num_shared_expert", "expert_shared_count")],
        ..plain("hunyuan-moe", &["hunyuan_v1_moe"])
    },
    Arch {
        keys: &[
            ("moe_num_experts", "expert_count"),
            ("moe_k", "expert_used_count"),
            ("moe_num_shared_experts", "expert_shared_count"),
            ("moe_layer_start_index", "leading_dense_block_count"),
            ("moe_layer_interval", "interleave_moe_layer_step"),
        ],
        ..plain("ernie4_5-moe", &["ernie4_5_moe"])
    },
    Arch {
        keys: &[
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ],
        given: &[("hidden_activation", "\"gelu_pytorch_tanh\""), ("sliding_window", "4096")],
        one_added: true,
        ..plain("gemma2", &["gemma2"])
    },
    Arch {
        keys: &[("rope_local_base_freq", "rope.freq_base_swa"), ("final_logit_softcapping", "final_logit_softcapping")],
        given: &[("hidden_activation", "\"gelu_pytorch_tanh\""), ("sliding_window", "null")],
        one_added: true,
        ..plain("gemma3", &["gemma3_text", "gemma3"])
    },
    plain("olmo2", &["olmo2"]),
    Arch {
        keys: &[
            ("n_embd", "embedding_length"),
            ("n_head", "attention.head_count"),
            ("n_layer", "block_count"),
            ("n_positions", "context_length"),
            ("n_inner", "feed_forward_length"),
            ("layer_norm_epsilon", "attention.layer_norm_epsilon"),
        ],
        ..plain("gpt2", &["gpt2"])
    },
];

impl Arch {
    /// The architecture of that name.
    pub fn named(name: &str) -> Option<&'static Arch> {
        ARCHS.iter().find(|arch| arch.name == name)
    }

    /// The architecture as which a family is written.
    pub fn of_model_type(model_type: &str) -> Option<&'static Arch> {
        ARCHS.iter().find(|arch| arch.model_types.contains(&model_type))
    }

    /// All pairs of a key of `config.json` and a key of the metadata without prefix.
    pub fn pairs(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let own = self.keys;
        let common = COMMON_KEYS.iter().filter(move |(key, _)| own.iter().all(|(k, _)| k != key));
        own.iter().chain(common).copied()
    }
}
