//! What a weight is for, and its name in a family's files.

use std::fmt;

/// A weight's place in the model. The first number is the decoder layer, the second the expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Token embedding `[V, d]`.
    Embed,
    /// Output matrix `[V, d]`; absent if tied to the embedding.
    LmHead,
    /// Norm before the output `[d]`.
    FinalNorm,
    /// Norm before attention `[d]`.
    AttnNorm(usize),
    /// Norm before the feed-forward block `[d]`.
    FfnNorm(usize),
    /// Query projection `[H * head_dim, d]`.
    Q(usize),
    /// Key projection `[H_kv * head_dim, d]`.
    K(usize),
    /// Value projection `[H_kv * head_dim, d]`.
    V(usize),
    /// Output projection `[d, H * head_dim]`.
    O(usize),
    /// Bias of the query projection.
    QBias(usize),
    /// Bias of the key projection.
    KBias(usize),
    /// Bias of the value projection.
    VBias(usize),
    /// Bias of the output projection.
    OBias(usize),
    /// Norm of the queries: `[H * head_dim]` (whole) or `[head_dim]` (per head).
    QNorm(usize),
    /// Norm of the keys: `[H_kv * head_dim]` (whole) or `[head_dim]` (per head).
    KNorm(usize),
    /// Router `[E, d]`.
    Router(usize),
    /// Gate projection of a dense block `[I, d]`.
    DenseGate(usize),
    /// Up projection of a dense block `[I, d]`.
    DenseUp(usize),
    /// Down projection of a dense block `[d, I]`.
    DenseDown(usize),
    /// Gate projection of the shared expert `[S, d]`.
    SharedGate(usize),
    /// Up projection of the shared expert `[S, d]`.
    SharedUp(usize),
    /// Down projection of the shared expert `[d, S]`.
    SharedDown(usize),
    /// The shared expert's own gate `[1, d]`.
    SharedExpertGate(usize),
    /// Learned vector of each position `[P, d]`.
    PositionEmbed,
    /// Bias of the output matrix `[V]`.
    LmHeadBias,
    /// Bias of the final norm `[d]`.
    FinalNormBias,
    /// Bias of the norm before attention `[d]`.
    AttnNormBias(usize),
    /// Bias of the norm before the feed-forward block `[d]`.
    FfnNormBias(usize),
    /// Norm after attention `[d]`.
    AttnPostNorm(usize),
    /// Norm after the feed-forward block `[d]`.
    FfnPostNorm(usize),
    /// Sink logit of each head `[H]`.
    Sinks(usize),
    /// Down projection of the queries `[q_lora_rank, d]`; then [`Role::Q`] is the up projection.
    QA(usize),
    /// Norm of the queries' latent vector `[q_lora_rank]`.
    QANorm(usize),
    /// Down projection to the latent vector of keys and values and to the rotated key `[kv_lora_rank + rope dim, d]`.
    KvA(usize),
    /// Norm of the latent vector of keys and values `[kv_lora_rank]`.
    KvANorm(usize),
    /// Up projection `[H * (nope_dim + v_head_dim), kv_lora_rank]`: per head the key's rows, then the value's.
    KvB(usize),
    /// Bias of the router's logits `[E]`.
    RouterBias(usize),
    /// Added to the scores for the choice of experts `[E]`.
    SelectionBias(usize),
    /// Factor on each expert's gate `[E]`.
    ExpertScale(usize),
    /// Bias of the up projection of a dense block `[I]`.
    DenseUpBias(usize),
    /// Bias of the down projection of a dense block `[d]`.
    DenseDownBias(usize),
    /// Biases of the experts' gate projections `[E, I]`.
    ExpertGateBias(usize),
    /// Biases of the experts' up projections `[E, I]`.
    ExpertUpBias(usize),
    /// Biases of the experts' down projections `[E, d]`.
    ExpertDownBias(usize),
    /// Input projection of a delta layer: q, k, v (and z, if grouped).
    DeltaQkv(usize),
    /// Output gate projection of a delta layer `[Nv * dv, d]`; absent if grouped.
    DeltaZ(usize),
    /// Projection to beta and decay of a delta layer: grouped `[2 Nv, d]`, else beta `[Nv, d]`.
    DeltaBa(usize),
    /// Projection to the decay of a delta layer `[Nv, d]`; absent if grouped.
    DeltaA(usize),
    /// Causal convolution over q, k, v `[2 Nk dk + Nv dv, kernel]`.
    DeltaConv(usize),
    /// Logarithm of the decay rate `[Nv]`.
    DeltaALog(usize),
    /// Bias of the decay `[Nv]`.
    DeltaDtBias(usize),
    /// Norm of each value head's output `[dv]`.
    DeltaNorm(usize),
    /// Output projection of a delta layer `[d, Nv * dv]`.
    DeltaOut(usize),
    /// Gate projection of a routed expert `[I, d]`.
    ExpertGate(usize, usize),
    /// Up projection of a routed expert `[I, d]`.
    ExpertUp(usize, usize),
    /// Down projection of a routed expert `[d, I]`.
    ExpertDown(usize, usize),
}

impl Role {
    /// Whether the weight belongs to a routed expert.
    pub fn is_expert(self) -> bool {
        matches!(self, Self::ExpertGate(..) | Self::ExpertUp(..) | Self::ExpertDown(..))
    }

    /// Whether the weight is of a layer's experts: `Some(None)` if it has something for each of them (router, biases),
    /// `Some(Some(expert))` if it belongs to one.
    pub fn of_experts(self) -> Option<Option<usize>> {
        match self {
            Self::ExpertGate(_, e) | Self::ExpertUp(_, e) | Self::ExpertDown(_, e) => Some(Some(e)),
            Self::Router(_)
            | Self::RouterBias(_)
            | Self::SelectionBias(_)
            | Self::ExpertScale(_)
            | Self::ExpertGateBias(_)
            | Self::ExpertUpBias(_)
            | Self::ExpertDownBias(_) => Some(None),
            _ => None,
        }
    }

    /// The same weight of another expert; of what belongs to no single expert, itself.
    pub fn renumbered(self, expert: usize) -> Self {
        match self {
            Self::ExpertGate(l, _) => Self::ExpertGate(l, expert),
            Self::ExpertUp(l, _) => Self::ExpertUp(l, expert),
            Self::ExpertDown(l, _) => Self::ExpertDown(l, expert),
            other => other,
        }
    }

    /// The decoder layer; `None` of what is outside the layers.
    pub fn layer(self) -> Option<usize> {
        match self {
            Self::Embed
            | Self::PositionEmbed
            | Self::LmHead
            | Self::LmHeadBias
            | Self::FinalNorm
            | Self::FinalNormBias => None,
            Self::AttnNorm(l)
            | Self::FfnNorm(l)
            | Self::Q(l)
            | Self::K(l)
            | Self::V(l)
            | Self::O(l)
            | Self::QBias(l)
            | Self::KBias(l)
            | Self::VBias(l)
            | Self::OBias(l)
            | Self::QNorm(l)
            | Self::KNorm(l)
            | Self::Router(l)
            | Self::DenseGate(l)
            | Self::DenseUp(l)
            | Self::DenseDown(l)
            | Self::SharedGate(l)
            | Self::SharedUp(l)
            | Self::SharedDown(l)
            | Self::SharedExpertGate(l)
            | Self::AttnNormBias(l)
            | Self::FfnNormBias(l)
            | Self::AttnPostNorm(l)
            | Self::FfnPostNorm(l)
            | Self::Sinks(l)
            | Self::QA(l)
            | Self::QANorm(l)
            | Self::KvA(l)
            | Self::KvANorm(l)
            | Self::KvB(l)
            | Self::RouterBias(l)
            | Self::SelectionBias(l)
            | Self::ExpertScale(l)
            | Self::DenseUpBias(l)
            | Self::DenseDownBias(l)
            | Self::ExpertGateBias(l)
            | Self::ExpertUpBias(l)
            | Self::ExpertDownBias(l)
            | Self::DeltaQkv(l)
            | Self::DeltaZ(l)
            | Self::DeltaBa(l)
            | Self::DeltaA(l)
            | Self::DeltaConv(l)
            | Self::DeltaALog(l)
            | Self::DeltaDtBias(l)
            | Self::DeltaNorm(l)
            | Self::DeltaOut(l)
            | Self::ExpertGate(l, _)
            | Self::ExpertUp(l, _)
            | Self::ExpertDown(l, _) => Some(l),
        }
    }

    /// The three weights of a routed expert: gate, up, down.
    pub fn of_expert(layer: usize, expert: usize) -> [Self; 3] {
        [Self::ExpertGate(layer, expert), Self::ExpertUp(layer, expert), Self::ExpertDown(layer, expert)]
    }

    /// Whether the weight is that of an RMSNorm of the residual stream or of queries and keys: one that
    /// [`NormKind::RmsPlusOne`] stores around zero.
    pub fn is_plain_norm(self) -> bool {
        matches!(
            self,
            Self::FinalNorm
                | Self::AttnNorm(_)
                | Self::FfnNorm(_)
                | Self::AttnPostNorm(_)
                | Self::FfnPostNorm(_)
                | Self::QNorm(_)
                | Self::KNorm(_)
        )
    }

    /// Whether the weight is a vector (norm or bias), or small numbers that are kept like one, row after row; all others are
    /// matrices.
    pub fn is_vector(self) -> bool {
        matches!(
            self,
            Self::FinalNorm
                | Self::AttnNorm(_)
                | Self::FfnNorm(_)
                | Self::QBias(_)
                | Self::KBias(_)
                | Self::VBias(_)
                | Self::OBias(_)
                | Self::QNorm(_)
                | Self::KNorm(_)
                | Self::LmHeadBias
                | Self::FinalNormBias
                | Self::AttnNormBias(_)
                | Self::FfnNormBias(_)
                | Self::AttnPostNorm(_)
                | Self::FfnPostNorm(_)
                | Self::Sinks(_)
                | Self::QANorm(_)
                | Self::KvANorm(_)
                | Self::RouterBias(_)
                | Self::SelectionBias(_)
                | Self::ExpertGateBias(_)
                | Self::ExpertUpBias(_)
                | Self::ExpertDownBias(_)
                | Self::DeltaConv(_)
                | Self::PositionEmbed
                | Self::ExpertScale(_)
                | Self::DenseUpBias(_)
                | Self::DenseDownBias(_)
                | Self::DeltaALog(_)
                | Self::DeltaDtBias(_)
                | Self::DeltaNorm(_)
        )
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, layer) = match *self {
            Self::Embed => return f.write_str("the token embedding"),
            Self::LmHead => return f.write_str("the output matrix"),
            Self::FinalNorm => return f.write_str("the final norm"),
            Self::PositionEmbed => return f.write_str("the position embedding"),
            Self::LmHeadBias => return f.write_str("the output bias"),
            Self::FinalNormBias => return f.write_str("the final norm's bias"),
            Self::ExpertGate(l, e) => return write!(f, "layer {l} expert {e} gate"),
            Self::ExpertUp(l, e) => return write!(f, "layer {l} expert {e} up"),
            Self::ExpertDown(l, e) => return write!(f, "layer {l} expert {e} down"),
            Self::AttnNorm(l) => ("attention norm", l),
            Self::FfnNorm(l) => ("feed-forward norm", l),
            Self::Q(l) => ("query projection", l),
            Self::K(l) => ("key projection", l),
            Self::V(l) => ("value projection", l),
            Self::O(l) => ("attention output projection", l),
            Self::QBias(l) => ("query bias", l),
            Self::KBias(l) => ("key bias", l),
            Self::VBias(l) => ("value bias", l),
            Self::OBias(l) => ("attention output bias", l),
            Self::QNorm(l) => ("query norm", l),
            Self::KNorm(l) => ("key norm", l),
            Self::Router(l) => ("router", l),
            Self::DenseGate(l) => ("dense gate", l),
            Self::DenseUp(l) => ("dense up", l),
            Self::DenseDown(l) => ("dense down", l),
            Self::SharedGate(l) => ("shared expert gate projection", l),
            Self::SharedUp(l) => ("shared expert up", l),
            Self::SharedDown(l) => ("shared expert down", l),
            Self::SharedExpertGate(l) => ("shared expert's own gate", l),
            Self::AttnNormBias(l) => ("attention norm bias", l),
            Self::FfnNormBias(l) => ("feed-forward norm bias", l),
            Self::AttnPostNorm(l) => ("norm after attention", l),
            Self::FfnPostNorm(l) => ("norm after the feed-forward block", l),
            Self::Sinks(l) => ("attention sinks", l),
            Self::QA(l) => ("query down projection", l),
            Self::QANorm(l) => ("query latent norm", l),
            Self::KvA(l) => ("key/value down projection", l),
            Self::KvANorm(l) => ("key/value latent norm", l),
            Self::KvB(l) => ("key/value up projection", l),
            Self::RouterBias(l) => ("router bias", l),
            Self::SelectionBias(l) => ("selection bias", l),
            Self::ExpertScale(l) => ("expert scale", l),
            Self::DenseUpBias(l) => ("dense up bias", l),
            Self::DenseDownBias(l) => ("dense down bias", l),
            Self::ExpertGateBias(l) => ("expert gate biases", l),
            Self::ExpertUpBias(l) => ("expert up biases", l),
            Self::ExpertDownBias(l) => ("expert down biases", l),
            Self::DeltaQkv(l) => ("delta input projection", l),
            Self::DeltaZ(l) => ("delta gate projection", l),
            Self::DeltaBa(l) => ("delta beta projection", l),
            Self::DeltaA(l) => ("delta decay projection", l),
            Self::DeltaConv(l) => ("delta convolution", l),
            Self::DeltaALog(l) => ("delta decay rate", l),
            Self::DeltaDtBias(l) => ("delta decay bias", l),
            Self::DeltaNorm(l) => ("delta output norm", l),
            Self::DeltaOut(l) => ("delta output projection", l),
        };
        write!(f, "layer {layer} {what}")
    }
}

/// Name templates of a family: `{l}` is the decoder layer, `{e}` the expert.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "one field per role, named like it")]
pub struct TensorNames {
    pub embed: &'static str,
    pub lm_head: &'static str,
    pub final_norm: &'static str,
    pub attn_norm: &'static str,
    pub ffn_norm: &'static str,
    pub q: &'static str,
    pub k: &'static str,
    pub v: &'static str,
    pub o: &'static str,
    pub q_bias: &'static str,
    pub k_bias: &'static str,
    pub v_bias: &'static str,
    pub o_bias: &'static str,
    pub q_norm: &'static str,
    pub k_norm: &'static str,
    pub router: &'static str,
    pub dense_gate: &'static str,
    pub dense_up: &'static str,
    pub dense_down: &'static str,
    pub shared_gate: &'static str,
    pub shared_up: &'static str,
    pub shared_down: &'static str,
    pub shared_expert_gate: &'static str,
    pub expert_gate: &'static str,
    pub expert_up: &'static str,
    pub expert_down: &'static str,
    pub position_embed: &'static str,
    pub lm_head_bias: &'static str,
    pub final_norm_bias: &'static str,
    pub attn_norm_bias: &'static str,
    pub ffn_norm_bias: &'static str,
    pub attn_post_norm: &'static str,
    pub ffn_post_norm: &'static str,
    pub sinks: &'static str,
    pub q_a: &'static str,
    pub q_a_norm: &'static str,
    pub kv_a: &'static str,
    pub kv_a_norm: &'static str,
    pub kv_b: &'static str,
    pub router_bias: &'static str,
    pub selection_bias: &'static str,
    pub expert_scale: &'static str,
    pub dense_up_bias: &'static str,
    pub dense_down_bias: &'static str,
    pub expert_gate_bias: &'static str,
    pub expert_up_bias: &'static str,
    pub expert_down_bias: &'static str,
    pub delta_qkv: &'static str,
    pub delta_z: &'static str,
    pub delta_ba: &'static str,
    pub delta_a: &'static str,
    pub delta_conv: &'static str,
    pub delta_a_log: &'static str,
    pub delta_dt_bias: &'static str,
    pub delta_norm: &'static str,
    pub delta_out: &'static str,
}

impl TensorNames {
    /// The name of a role's tensor.
    pub fn of(&self, role: Role) -> String {
        let (template, layer, expert) = match role {
            Role::Embed => (self.embed, 0, 0),
            Role::LmHead => (self.lm_head, 0, 0),
            Role::FinalNorm => (self.final_norm, 0, 0),
            Role::AttnNorm(l) => (self.attn_norm, l, 0),
            Role::FfnNorm(l) => (self.ffn_norm, l, 0),
            Role::Q(l) => (self.q, l, 0),
            Role::K(l) => (self.k, l, 0),
            Role::V(l) => (self.v, l, 0),
            Role::O(l) => (self.o, l, 0),
            Role::QBias(l) => (self.q_bias, l, 0),
            Role::KBias(l) => (self.k_bias, l, 0),
            Role::VBias(l) => (self.v_bias, l, 0),
            Role::OBias(l) => (self.o_bias, l, 0),
            Role::QNorm(l) => (self.q_norm, l, 0),
            Role::KNorm(l) => (self.k_norm, l, 0),
            Role::Router(l) => (self.router, l, 0),
            Role::DenseGate(l) => (self.dense_gate, l, 0),
            Role::DenseUp(l) => (self.dense_up, l, 0),
            Role::DenseDown(l) => (self.dense_down, l, 0),
            Role::SharedGate(l) => (self.shared_gate, l, 0),
            Role::SharedUp(l) => (self.shared_up, l, 0),
            Role::SharedDown(l) => (self.shared_down, l, 0),
            Role::SharedExpertGate(l) => (self.shared_expert_gate, l, 0),
            Role::ExpertGate(l, e) => (self.expert_gate, l, e),
            Role::ExpertUp(l, e) => (self.expert_up, l, e),
            Role::ExpertDown(l, e) => (self.expert_down, l, e),
            Role::PositionEmbed => (self.position_embed, 0, 0),
            Role::LmHeadBias => (self.lm_head_bias, 0, 0),
            Role::FinalNormBias => (self.final_norm_bias, 0, 0),
            Role::AttnNormBias(l) => (self.attn_norm_bias, l, 0),
            Role::FfnNormBias(l) => (self.ffn_norm_bias, l, 0),
            Role::AttnPostNorm(l) => (self.attn_post_norm, l, 0),
            Role::FfnPostNorm(l) => (self.ffn_post_norm, l, 0),
            Role::Sinks(l) => (self.sinks, l, 0),
            Role::QA(l) => (self.q_a, l, 0),
            Role::QANorm(l) => (self.q_a_norm, l, 0),
            Role::KvA(l) => (self.kv_a, l, 0),
            Role::KvANorm(l) => (self.kv_a_norm, l, 0),
            Role::KvB(l) => (self.kv_b, l, 0),
            Role::RouterBias(l) => (self.router_bias, l, 0),
            Role::SelectionBias(l) => (self.selection_bias, l, 0),
            Role::ExpertScale(l) => (self.expert_scale, l, 0),
            Role::DenseUpBias(l) => (self.dense_up_bias, l, 0),
            Role::DenseDownBias(l) => (self.dense_down_bias, l, 0),
            Role::ExpertGateBias(l) => (self.expert_gate_bias, l, 0),
            Role::ExpertUpBias(l) => (self.expert_up_bias, l, 0),
            Role::ExpertDownBias(l) => (self.expert_down_bias, l, 0),
            Role::DeltaQkv(l) => (self.delta_qkv, l, 0),
            Role::DeltaZ(l) => (self.delta_z, l, 0),
            Role::DeltaBa(l) => (self.delta_ba, l, 0),
            Role::DeltaA(l) => (self.delta_a, l, 0),
            Role::DeltaConv(l) => (self.delta_conv, l, 0),
            Role::DeltaALog(l) => (self.delta_a_log, l, 0),
            Role::DeltaDtBias(l) => (self.delta_dt_bias, l, 0),
            Role::DeltaNorm(l) => (self.delta_norm, l, 0),
            Role::DeltaOut(l) => (self.delta_out, l, 0),
        };
        template.replace("{l}", &layer.to_string()).replace("{e}", &expert.to_string())
    }
}
