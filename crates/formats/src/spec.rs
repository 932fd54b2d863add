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
    /// One entry per decoder layer.
    pub layers: Vec<LayerSpec>,
}

/// One decoder layer: `h += Attn(norm1(h)); h += FFN(norm2(h))`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerSpec {
    /// The attention block.
    pub attn: AttnSpec,
    /// The feed-forward block: dense or a mixture of experts.
    pub ffn: FfnSpec,
}

/// Grouped-query attention.
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
}

/// Rotary position embedding, `half` (NeoX) layout: pairs `(j, j + dim/2)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeSpec {
    /// Rotated dimensions of each head; the rest passes through.
    pub dim: usize,
    /// Inverse frequency of each pair after scaling, length `dim / 2`.
    pub inv_freq: Vec<f32>,
    /// Factor on cos and sin (YaRN's attention factor, else 1).
    pub attention_factor: f32,
}

/// The feed-forward block of a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FfnSpec {
    /// Gated FFN `down(act(gate x) * up x)`.
    Dense {
        /// Inner width.
        intermediate_size: usize,
        /// Activation on the gate.
        act: Activation,
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
}

/// Activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `0.5 x (1 + erf(x / sqrt 2))`.
    Gelu,
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
