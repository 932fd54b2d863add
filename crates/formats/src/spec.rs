//! A model's architecture as data: what `config.json` (or, later, GGUF metadata) says, in one vocabulary for all
//! families. The forward pass is driven by these values alone; it knows no family by name.

use serde::{Deserialize, Serialize};

/// A whole decoder-only language model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// Name of the family that read it, e.g. `olmoe`.
    pub family: String,
    /// Rows of the embedding and of the output matrix.
    pub vocab_size: usize,
    /// Width `d` of the residual stream.
    pub hidden_size: usize,
    /// Longest position that the authors trained for, in tokens.
    pub max_position_embeddings: usize,
    /// Epsilon of every normalisation that has none of its own.
    pub norm_eps: f32,
    /// Whether the output matrix is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Tokens that end a text: union of `config.json` and `generation_config.json`.
    pub eos_token_ids: Vec<u32>,
    /// Token that begins a text, if the configuration names one.
    pub bos_token_id: Option<u32>,
    /// Kind of every normalisation of the residual stream.
    #[serde(default, skip_serializing_if = "is_default")]
    pub norm: NormKind,
    /// What differs from plain arithmetic on embeddings, residual branches and logits.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scales: Scales,
    /// Whether a learned vector for each position is added to the embedding (GPT-2).
    #[serde(default, skip_serializing_if = "is_default")]
    pub learned_positions: bool,
    /// Whether the output matrix has a bias.
    #[serde(default, skip_serializing_if = "is_default")]
    pub lm_head_bias: bool,
    /// One entry per decoder layer.
    pub layers: Vec<LayerSpec>,
}

/// Whether a field has the value that it has if it is left out. Such fields are not written, so that a model keeps its
/// fingerprint when the specification learns to say more.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Kind of a normalisation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// RMSNorm: `w * x / rms(x)`.
    #[default]
    Rms,
    /// RMSNorm with weights stored around zero: `(1 + w) * x / rms(x)` (Gemma, Qwen3-Next).
    RmsPlusOne,
    /// LayerNorm with weight and bias (GPT-2, Phi-3.5-MoE).
    Layer,
}

/// Factors and caps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scales {
    /// Factor on the embedding.
    pub embed: f32,
    /// Factor on what each block adds to the residual stream.
    pub residual: f32,
    /// Factor on the logits.
    pub logits: f32,
    /// Logits become `c * tanh(logits / c)`.
    pub logit_softcap: Option<f32>,
}

impl Default for Scales {
    fn default() -> Scales {
        Scales { embed: 1.0, residual: 1.0, logits: 1.0, logit_softcap: None }
    }
}

/// One decoder layer: a mixer of positions, then a feed-forward block, each added to the residual stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerSpec {
    /// Attention; of a layer with [`LayerSpec::delta`] what the other layers have.
    pub attn: AttnSpec,
    /// The feed-forward block: dense or a mixture of experts.
    pub ffn: FfnSpec,
    /// Where the norms stand.
    #[serde(default, skip_serializing_if = "is_default")]
    pub norms: NormPlacement,
    /// Linear attention in place of attention.
    #[serde(default, skip_serializing_if = "is_default")]
    pub delta: Option<DeltaSpec>,
}

impl LayerSpec {
    /// Attention and a feed-forward block, each after its norm.
    pub fn new(attn: AttnSpec, ffn: FfnSpec) -> LayerSpec {
        LayerSpec { attn, ffn, norms: NormPlacement::Before, delta: None }
    }
}

/// Where a layer's norms stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormPlacement {
    /// Before each block: `h += block(norm(h))`.
    #[default]
    Before,
    /// After each block: `h += norm(block(h))` (OLMo-2).
    After,
    /// Before and after: `h += norm2(block(norm1(h)))` (Gemma).
    Both,
}

/// Gated delta rule (Qwen3-Next): a matrix state per head in place of a KV cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeltaSpec {
    /// Query/key heads.
    pub n_key_heads: usize,
    /// Value heads, a multiple of them.
    pub n_value_heads: usize,
    /// Width of a query or key.
    pub key_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
    /// Positions that the causal convolution sees.
    pub conv_kernel: usize,
    /// How the input projections are laid out.
    pub layout: DeltaLayout,
}

/// Layout of a delta layer's input projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeltaLayout {
    /// `qkvz` and `ba`, grouped by key head (Qwen3-Next).
    Grouped,
    /// `qkv` (all q, all k, all v), `z`, `b` and `a` apart (Qwen3.5).
    Split,
    /// As `Split`, but value head `v` reads key head `v % Nk`, not `v / (Nv / Nk)` (Qwen3.5 in GGUF).
    Tiled,
}

/// Grouped-query attention, or multi-head latent attention.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttnSpec {
    /// Query heads `H`.
    pub n_heads: usize,
    /// Key/value heads `H_kv`; query head `h` reads key/value head `h / (H / H_kv)`.
    pub n_kv_heads: usize,
    /// Width of one head; not always `d / H`.
    pub head_dim: usize,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub o_bias: bool,
    /// Normalisation of q and k before RoPE.
    pub qk_norm: QkNorm,
    /// Clamp of q, k and v to `[-c, c]` after the q/k norm (OLMoE's `clip_qkv`).
    pub clip_qkv: Option<f32>,
    /// A query at position `p` sees keys with `p - key < window`.
    pub sliding_window: Option<usize>,
    /// Factor on `q . k`, usually `head_dim^-1/2`.
    pub scale: f32,
    /// Rotary position embedding.
    pub rope: RopeSpec,
    /// What else it has.
    #[serde(default, skip_serializing_if = "is_default")]
    pub extra: AttnExtra,
    /// Keys and values through a latent vector (DeepSeek-V2 and later).
    #[serde(default, skip_serializing_if = "is_default")]
    pub mla: Option<MlaSpec>,
}

/// What only some families' attention has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AttnExtra {
    /// A learned logit per head joins the softmax and is dropped after it (gpt-oss).
    pub sinks: bool,
    /// The query projection also gives a gate per head coordinate: `z * sigmoid(gate)` (Qwen3-Next).
    pub gated: bool,
    /// The q/k norm stands after RoPE (Hunyuan, Llama-4).
    pub norm_after_rope: bool,
    /// A query sees only keys of its own chunk of so many positions (Llama-4).
    pub chunk: Option<usize>,
    /// Scores become `c * tanh(scores / c)` (Gemma-2).
    pub softcap: Option<f32>,
    /// Queries at position `p` are multiplied by `1 + scale * ln(1 + floor((p + 1) / floor))` (Llama-4): `(floor, scale)`.
    pub temperature: Option<(f32, f32)>,
}

/// Multi-head latent attention. A head's query and key have `nope_dim` coordinates without position and then
/// `rope.dim` rotated ones (one rotated key for all heads); `head_dim` is their sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MlaSpec {
    /// Width of the queries' latent vector; `None` projects directly.
    pub q_lora_rank: Option<usize>,
    /// Width of the latent vector of keys and values.
    pub kv_lora_rank: usize,
    /// Coordinates of a query or key without position.
    pub nope_dim: usize,
    /// Width of a value.
    pub v_head_dim: usize,
}

impl AttnSpec {
    /// Width of one value vector.
    pub fn v_head_dim(&self) -> usize {
        self.mla.map_or(self.head_dim, |m| m.v_head_dim)
    }
}

/// Normalisation of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// None.
    None,
    /// RMSNorm over the whole projected vector, all heads together (OLMoE).
    Whole,
    /// RMSNorm over each head's vector with one weight `[head_dim]` (Qwen3).
    PerHead,
    /// `x / rms(x)` of each head's vector, without a weight (Llama-4).
    Unit,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeSpec {
    /// Rotated dimensions of each head, the last ones with [`MlaSpec`], else the first; the rest passes through. 0: none.
    pub dim: usize,
    /// Inverse frequency of each pair after scaling, length `dim / 2`.
    pub inv_freq: Vec<f32>,
    /// Factor on cos and sin (YaRN's attention factor, else 1).
    pub attention_factor: f32,
    /// Pairs are `(2j, 2j + 1)`; else `(j, j + dim/2)`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub interleaved: bool,
    /// Other frequencies once the sequence is longer than so many tokens (longrope).
    #[serde(default, skip_serializing_if = "is_default")]
    pub long: Option<LongRope>,
}

/// Frequencies of long sequences.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LongRope {
    /// They hold for sequences longer than this.
    pub above: usize,
    /// Inverse frequencies, length `dim / 2`.
    pub inv_freq: Vec<f32>,
    /// Factor on cos and sin.
    pub attention_factor: f32,
}

impl RopeSpec {
    /// No rotation at all.
    pub fn none() -> RopeSpec {
        RopeSpec { dim: 0, inv_freq: Vec::new(), attention_factor: 1.0, interleaved: false, long: None }
    }
}

/// The feed-forward block of a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FfnSpec {
    /// Gated FFN `down(act(gate x) * up x)`, or plain `down(act(up x))`.
    Dense {
        /// Inner width.
        intermediate_size: usize,
        /// Activation on the gate, or on `up x` if there is none.
        act: Activation,
        /// There is no gate, and both matrices have a bias (GPT-2).
        #[serde(default, skip_serializing_if = "is_default")]
        plain: bool,
    },
    /// Mixture of experts.
    Moe(MoeSpec),
}

/// A mixture-of-experts block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoeSpec {
    /// Routed experts `E`.
    pub n_experts: usize,
    /// Experts per token `k`.
    pub top_k: usize,
    /// Inner width of one expert.
    pub intermediate_size: usize,
    /// Activation on the gate.
    pub act: Activation,
    /// How experts are chosen and weighted.
    pub router: RouterSpec,
    /// The expert that every token passes, if there is one.
    pub shared: Option<SharedSpec>,
    /// Whether the experts' matrices have biases (gpt-oss).
    #[serde(default, skip_serializing_if = "is_default")]
    pub expert_bias: bool,
}

/// A shared expert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SharedSpec {
    /// Inner width.
    pub intermediate_size: usize,
    /// Whether its output is weighted by `sigmoid(w_sg . x)`.
    pub gated: bool,
}

/// From router logits `z` to chosen experts and their gates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouterSpec {
    /// Score function on the logits.
    pub score: RouterScore,
    /// Whether the chosen gates are divided by their sum.
    pub norm_topk_prob: bool,
    /// Factor on the gates after that.
    pub routed_scaling_factor: f32,
    /// What else it has.
    #[serde(default, skip_serializing_if = "is_default")]
    pub extra: RouterExtra,
}

/// What only some families' routers have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RouterExtra {
    /// A bias on the logits (gpt-oss).
    pub bias: bool,
    /// A bias added to the scores for the choice only (`e_score_correction_bias`).
    pub selection_bias: bool,
    /// Only experts of the best groups can be chosen.
    pub groups: Option<GroupSpec>,
    /// A learned factor on each chosen expert's gate (Pangu-Pro).
    pub expert_scale: bool,
    /// The gate multiplies the expert's input in place of its output (Llama-4).
    pub gate_on_input: bool,
    /// Threshold of the sparse mixer (`router_jitter_noise`).
    pub jitter: f32,
}

/// Groups of consecutive experts, of equal size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupSpec {
    /// Groups.
    pub n_group: usize,
    /// Groups of which experts can be chosen.
    pub topk_group: usize,
    /// How groups are compared.
    pub rule: GroupRule,
}

/// How groups limit the choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupRule {
    /// The best groups by their largest score (DeepSeek-V2).
    Max,
    /// The best groups by the sum of their two largest scores (DeepSeek-V3).
    Top2Sum,
    /// The best expert of every group (Pangu-Pro).
    OneOfEach,
}

/// Score function of a router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterScore {
    /// Softmax over all experts, then top-k.
    SoftmaxAll,
    /// Top-k on the logits, then softmax over the chosen ones.
    TopkThenSoftmax,
    /// Sigmoid of each logit.
    Sigmoid,
    /// Phi-3.5-MoE's sparse mixer: two choices, each weighted by a softmax over the logits near the largest.
    SparseMixer,
}

/// Activation function.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `0.5 x (1 + erf(x / sqrt 2))`.
    Gelu,
    /// gpt-oss: `(up + 1) * g * sigmoid(alpha g)` with `g = min(gate, limit)`, `up` clamped to `[-limit, limit]`.
    ClampedSwiglu {
        /// Clamp.
        limit: f32,
        /// Factor inside the sigmoid.
        alpha: f32,
    },
}

impl ModelSpec {
    /// Decoder-layer indices of the MoE layers, in order: MoE index -> decoder layer.
    pub fn moe_layers(&self) -> Vec<usize> {
        (0..self.layers.len()).filter(|&l| self.moe(l).is_some()).collect()
    }

    /// The mixture of experts of decoder layer `layer`, if that layer has one.
    pub fn moe(&self, layer: usize) -> Option<&MoeSpec> {
        match &self.layers.get(layer)?.ffn {
            FfnSpec::Moe(moe) => Some(moe),
            FfnSpec::Dense { .. } => None,
        }
    }

    /// Whether any layer is a mixture of experts.
    pub fn is_moe(&self) -> bool {
        !self.moe_layers().is_empty()
    }
}
