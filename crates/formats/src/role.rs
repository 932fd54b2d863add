//! What a weight is for, its name in a family's files, and its shape by the specification.

use std::fmt;

use crate::spec::{FfnSpec, ModelSpec, MoeSpec, QkNorm};

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

    /// The three weights of a routed expert: gate, up, down.
    pub fn of_expert(layer: usize, expert: usize) -> [Self; 3] {
        [Self::ExpertGate(layer, expert), Self::ExpertUp(layer, expert), Self::ExpertDown(layer, expert)]
    }

    /// Whether the weight is a vector (norm or bias); all others are matrices.
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
        )
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, layer) = match *self {
            Self::Embed => return f.write_str("the token embedding"),
            Self::LmHead => return f.write_str("the output matrix"),
            Self::FinalNorm => return f.write_str("the final norm"),
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
        };
        template.replace("{l}", &layer.to_string()).replace("{e}", &expert.to_string())
    }
}

/// The roles that a model has, layer by layer, experts last in each. Lazy: a false number of experts costs nothing
/// before the first missing tensor.
pub fn roles(spec: &ModelSpec) -> impl Iterator<Item = Role> {
    let head = (!spec.tie_word_embeddings).then_some(Role::LmHead);
    let layers = (0..spec.layers.len()).flat_map(move |l| {
        let experts = spec.moe(l).map_or(0, |moe| moe.n_experts);
        layer_roles(spec, l).into_iter().chain((0..experts).flat_map(move |e| Role::of_expert(l, e)))
    });
    [Role::Embed].into_iter().chain(head).chain([Role::FinalNorm]).chain(layers)
}

/// All roles of a layer but its routed experts.
fn layer_roles(spec: &ModelSpec, l: usize) -> Vec<Role> {
    let layer = &spec.layers[l];
    let mut roles = vec![Role::AttnNorm(l), Role::FfnNorm(l), Role::Q(l), Role::K(l), Role::V(l), Role::O(l)];
    if layer.attn.qkv_bias {
        roles.extend([Role::QBias(l), Role::KBias(l), Role::VBias(l)]);
    }
    if layer.attn.o_bias {
        roles.push(Role::OBias(l));
    }
    if layer.attn.qk_norm != QkNorm::None {
        roles.extend([Role::QNorm(l), Role::KNorm(l)]);
    }
    match &layer.ffn {
        FfnSpec::Dense { .. } => roles.extend([Role::DenseGate(l), Role::DenseUp(l), Role::DenseDown(l)]),
        FfnSpec::Moe(moe) => {
            roles.push(Role::Router(l));
            if let Some(shared) = &moe.shared {
                roles.extend([Role::SharedGate(l), Role::SharedUp(l), Role::SharedDown(l)]);
                roles.extend(shared.gated.then_some(Role::SharedExpertGate(l)));
            }
        }
    }
    roles
}

/// The shape of a role's tensor; `None` if the model has no such weight.
pub fn expected_shape(spec: &ModelSpec, role: Role) -> Option<Vec<usize>> {
    let d = spec.hidden_size;
    match role {
        Role::Embed => Some(vec![spec.vocab_size, d]),
        Role::LmHead => (!spec.tie_word_embeddings).then(|| vec![spec.vocab_size, d]),
        Role::FinalNorm => Some(vec![d]),
        Role::AttnNorm(l) | Role::FfnNorm(l) => spec.layers.get(l).map(|_| vec![d]),
        Role::Q(l)
        | Role::K(l)
        | Role::V(l)
        | Role::O(l)
        | Role::QBias(l)
        | Role::KBias(l)
        | Role::VBias(l)
        | Role::OBias(l)
        | Role::QNorm(l)
        | Role::KNorm(l) => attention_shape(spec, l, role),
        Role::DenseGate(l) | Role::DenseUp(l) | Role::DenseDown(l) => match &spec.layers.get(l)?.ffn {
            FfnSpec::Dense { intermediate_size: i, .. } if matches!(role, Role::DenseDown(_)) => Some(vec![d, *i]),
            FfnSpec::Dense { intermediate_size: i, .. } => Some(vec![*i, d]),
            FfnSpec::Moe(_) => None,
        },
        Role::Router(l)
        | Role::SharedGate(l)
        | Role::SharedUp(l)
        | Role::SharedDown(l)
        | Role::SharedExpertGate(l)
        | Role::ExpertGate(l, _)
        | Role::ExpertUp(l, _)
        | Role::ExpertDown(l, _) => moe_shape(d, spec.moe(l)?, role),
    }
}

fn attention_shape(spec: &ModelSpec, l: usize, role: Role) -> Option<Vec<usize>> {
    let d = spec.hidden_size;
    let attn = &spec.layers.get(l)?.attn;
    let (q, kv) = (attn.n_heads * attn.head_dim, attn.n_kv_heads * attn.head_dim);
    let norm = |whole: usize| match attn.qk_norm {
        QkNorm::None => None,
        QkNorm::Whole => Some(vec![whole]),
        QkNorm::PerHead => Some(vec![attn.head_dim]),
    };
    match role {
        Role::Q(_) => Some(vec![q, d]),
        Role::K(_) | Role::V(_) => Some(vec![kv, d]),
        Role::O(_) => Some(vec![d, q]),
        Role::QBias(_) => attn.qkv_bias.then(|| vec![q]),
        Role::KBias(_) | Role::VBias(_) => attn.qkv_bias.then(|| vec![kv]),
        Role::OBias(_) => attn.o_bias.then(|| vec![d]),
        Role::QNorm(_) => norm(q),
        Role::KNorm(_) => norm(kv),
        _ => None,
    }
}

fn moe_shape(d: usize, moe: &MoeSpec, role: Role) -> Option<Vec<usize>> {
    let shared = moe.shared.as_ref();
    match role {
        Role::Router(_) => Some(vec![moe.n_experts, d]),
        Role::SharedGate(_) | Role::SharedUp(_) => shared.map(|s| vec![s.intermediate_size, d]),
        Role::SharedDown(_) => shared.map(|s| vec![d, s.intermediate_size]),
        Role::SharedExpertGate(_) => shared.filter(|s| s.gated).map(|_| vec![1, d]),
        Role::ExpertGate(_, e) | Role::ExpertUp(_, e) => (e < moe.n_experts).then(|| vec![moe.intermediate_size, d]),
        Role::ExpertDown(_, e) => (e < moe.n_experts).then(|| vec![d, moe.intermediate_size]),
        _ => None,
    }
}
