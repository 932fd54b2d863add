//! Which weights a model has by its specification, and their shapes.

use crate::role::Role;
use crate::spec::{DeltaLayout, DeltaSpec, FfnSpec, LayerSpec, ModelSpec, MoeSpec, NormKind, NormPlacement, QkNorm};

/// The roles that a model has, layer by layer, experts last in each. Lazy: a false number of experts costs nothing
/// before the first missing tensor.
pub fn roles(spec: &ModelSpec) -> impl Iterator<Item = Role> {
    let layers = (0..spec.layers.len()).flat_map(move |l| {
        let experts = spec.moe(l).map_or(0, |moe| moe.n_experts);
        layer_roles(spec, l).into_iter().chain((0..experts).flat_map(move |e| Role::of_expert(l, e)))
    });
    outside_layers(spec).into_iter().chain(layers)
}

fn outside_layers(spec: &ModelSpec) -> Vec<Role> {
    let mut outside = vec![Role::Embed];
    outside.extend(spec.learned_positions.then_some(Role::PositionEmbed));
    outside.extend((!spec.tie_word_embeddings).then_some(Role::LmHead));
    outside.extend(spec.lm_head_bias.then_some(Role::LmHeadBias));
    outside.push(Role::FinalNorm);
    outside.extend((spec.norm == NormKind::Layer).then_some(Role::FinalNormBias));
    outside
}

/// How many numbers a model has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterCounts {
    /// All, tied matrices once.
    pub total: u64,
    /// Those that one token passes: all but the experts that are not chosen for it.
    pub active: u64,
}

/// Counts a model's numbers by their shapes.
pub fn parameter_counts(spec: &ModelSpec) -> ParameterCounts {
    let numbers = |role| expected_shape(spec, role).map_or(0, |shape| shape.iter().map(|&n| n as u64).product());
    let outside: u64 = roles_outside_experts(spec).map(numbers).sum();
    let mut counts = ParameterCounts { total: outside, active: outside };
    for l in spec.moe_layers() {
        let expert: u64 = Role::of_expert(l, 0).map(numbers).iter().sum();
        let (all, chosen) = spec.moe(l).map_or((0, 0), |moe| (moe.n_experts as u64, moe.top_k as u64));
        counts.total += all * expert;
        counts.active += chosen * expert;
    }
    counts
}

/// The roles that a model has outside its routed experts.
pub fn roles_outside_experts(spec: &ModelSpec) -> impl Iterator<Item = Role> {
    outside_layers(spec).into_iter().chain((0..spec.layers.len()).flat_map(move |l| layer_roles(spec, l)))
}

/// All roles of a layer but its routed experts.
fn layer_roles(spec: &ModelSpec, l: usize) -> Vec<Role> {
    let layer = &spec.layers[l];
    let mut roles = Vec::new();
    if layer.norms != NormPlacement::After {
        roles.extend([Role::AttnNorm(l), Role::FfnNorm(l)]);
        if spec.norm == NormKind::Layer {
            roles.extend([Role::AttnNormBias(l), Role::FfnNormBias(l)]);
        }
    }
    if layer.norms != NormPlacement::Before {
        roles.extend([Role::AttnPostNorm(l), Role::FfnPostNorm(l)]);
    }
    roles.extend(mixer_roles(layer, l));
    match &layer.ffn {
        FfnSpec::Dense { plain: true, .. } => {
            roles.extend([Role::DenseUp(l), Role::DenseUpBias(l), Role::DenseDown(l), Role::DenseDownBias(l)]);
        }
        FfnSpec::Dense { .. } => roles.extend([Role::DenseGate(l), Role::DenseUp(l), Role::DenseDown(l)]),
        FfnSpec::Moe(moe) => roles.extend(moe_roles(moe, l)),
    }
    roles
}

fn mixer_roles(layer: &LayerSpec, l: usize) -> Vec<Role> {
    let attn = &layer.attn;
    if let Some(delta) = &layer.delta {
        let mut roles = vec![Role::DeltaQkv(l), Role::DeltaBa(l), Role::DeltaConv(l), Role::DeltaALog(l)];
        roles.extend([Role::DeltaDtBias(l), Role::DeltaNorm(l), Role::DeltaOut(l)]);
        if delta.layout != DeltaLayout::Grouped {
            roles.extend([Role::DeltaZ(l), Role::DeltaA(l)]);
        }
        return roles;
    }
    let mut roles = vec![Role::Q(l), Role::O(l)];
    match &attn.mla {
        Some(mla) => {
            if mla.q_lora_rank.is_some() {
                roles.extend([Role::QA(l), Role::QANorm(l)]);
            }
            roles.extend([Role::KvA(l), Role::KvANorm(l), Role::KvB(l)]);
        }
        None => roles.extend([Role::K(l), Role::V(l)]),
    }
    if attn.qkv_bias {
        roles.extend([Role::QBias(l), Role::KBias(l), Role::VBias(l)]);
    }
    roles.extend(attn.o_bias.then_some(Role::OBias(l)));
    if matches!(attn.qk_norm, QkNorm::Whole | QkNorm::PerHead) {
        roles.extend([Role::QNorm(l), Role::KNorm(l)]);
    }
    roles.extend(attn.extra.sinks.then_some(Role::Sinks(l)));
    roles
}

fn moe_roles(moe: &MoeSpec, l: usize) -> Vec<Role> {
    let extra = &moe.router.extra;
    let mut roles = vec![Role::Router(l)];
    roles.extend(extra.bias.then_some(Role::RouterBias(l)));
    roles.extend(extra.selection_bias.then_some(Role::SelectionBias(l)));
    roles.extend(extra.expert_scale.then_some(Role::ExpertScale(l)));
    if moe.expert_bias {
        roles.extend([Role::ExpertGateBias(l), Role::ExpertUpBias(l), Role::ExpertDownBias(l)]);
    }
    if let Some(shared) = &moe.shared {
        roles.extend([Role::SharedGate(l), Role::SharedUp(l), Role::SharedDown(l)]);
        roles.extend(shared.gated.then_some(Role::SharedExpertGate(l)));
    }
    roles
}

/// The shape of a role's weight; `None` if the model has no such weight.
pub fn expected_shape(spec: &ModelSpec, role: Role) -> Option<Vec<usize>> {
    let d = spec.hidden_size;
    match role {
        Role::Embed => Some(vec![spec.vocab_size, d]),
        Role::PositionEmbed => spec.learned_positions.then(|| vec![spec.max_position_embeddings, d]),
        Role::LmHead => (!spec.tie_word_embeddings).then(|| vec![spec.vocab_size, d]),
        Role::LmHeadBias => spec.lm_head_bias.then(|| vec![spec.vocab_size]),
        Role::FinalNorm => Some(vec![d]),
        Role::FinalNormBias => (spec.norm == NormKind::Layer).then(|| vec![d]),
        _ => {
            let l = role.layer()?;
            let layer = spec.layers.get(l)?;
            if !role.is_expert() && !layer_roles(spec, l).contains(&role) {
                return None;
            }
            layer_shape(d, layer, role)
        }
    }
}

/// The shape of a weight that the layer has.
fn layer_shape(d: usize, layer: &LayerSpec, role: Role) -> Option<Vec<usize>> {
    match role {
        Role::AttnNorm(_)
        | Role::FfnNorm(_)
        | Role::AttnNormBias(_)
        | Role::FfnNormBias(_)
        | Role::AttnPostNorm(_)
        | Role::FfnPostNorm(_) => return Some(vec![d]),
        _ => {}
    }
    mixer_shape(d, layer, role).or_else(|| match &layer.ffn {
        FfnSpec::Dense { intermediate_size: i, .. } => match role {
            Role::DenseGate(_) | Role::DenseUp(_) => Some(vec![*i, d]),
            Role::DenseDown(_) => Some(vec![d, *i]),
            Role::DenseUpBias(_) => Some(vec![*i]),
            Role::DenseDownBias(_) => Some(vec![d]),
            _ => None,
        },
        FfnSpec::Moe(moe) => moe_shape(d, moe, role),
    })
}

fn mixer_shape(d: usize, layer: &LayerSpec, role: Role) -> Option<Vec<usize>> {
    let attn = &layer.attn;
    if let Some(delta) = &layer.delta {
        return delta_shape(d, delta, role);
    }
    let (q, kv) = (attn.n_heads * attn.head_dim, attn.n_kv_heads * attn.head_dim);
    let norm = |whole: usize| if attn.qk_norm == QkNorm::PerHead { attn.head_dim } else { whole };
    let q_out = if attn.extra.gated { 2 * q } else { q };
    Some(match (role, &attn.mla) {
        (Role::Q(_), mla) => vec![q_out, mla.and_then(|m| m.q_lora_rank).unwrap_or(d)],
        (Role::O(_), _) => vec![d, attn.n_heads * attn.v_head_dim()],
        (Role::K(_) | Role::V(_), None) => vec![kv, d],
        (Role::QA(_), Some(m)) => vec![m.q_lora_rank?, d],
        (Role::QANorm(_), Some(m)) => vec![m.q_lora_rank?],
        (Role::KvA(_), Some(m)) => vec![m.kv_lora_rank + attn.rope.dim, d],
        (Role::KvANorm(_), Some(m)) => vec![m.kv_lora_rank],
        (Role::KvB(_), Some(m)) => vec![attn.n_heads * (m.nope_dim + m.v_head_dim), m.kv_lora_rank],
        (Role::QBias(_), _) => vec![q_out],
        (Role::KBias(_) | Role::VBias(_), _) => vec![kv],
        (Role::OBias(_), _) => vec![d],
        (Role::QNorm(_), _) => vec![norm(q)],
        (Role::KNorm(_), _) => vec![norm(kv)],
        (Role::Sinks(_), _) => vec![attn.n_heads],
        _ => return None,
    })
}

fn delta_shape(d: usize, delta: &DeltaSpec, role: Role) -> Option<Vec<usize>> {
    let (keys, values) = (delta.n_key_heads * delta.key_dim, delta.n_value_heads * delta.value_dim);
    let grouped = delta.layout == DeltaLayout::Grouped;
    Some(match role {
        Role::DeltaQkv(_) => vec![2 * keys + values + if grouped { values } else { 0 }, d],
        Role::DeltaBa(_) => vec![if grouped { 2 } else { 1 } * delta.n_value_heads, d],
        Role::DeltaZ(_) => vec![values, d],
        Role::DeltaA(_) => vec![delta.n_value_heads, d],
        Role::DeltaConv(_) => vec![2 * keys + values, delta.conv_kernel],
        Role::DeltaALog(_) | Role::DeltaDtBias(_) => vec![delta.n_value_heads],
        Role::DeltaNorm(_) => vec![delta.value_dim],
        Role::DeltaOut(_) => vec![d, values],
        _ => return None,
    })
}

fn moe_shape(d: usize, moe: &MoeSpec, role: Role) -> Option<Vec<usize>> {
    let shared = moe.shared.as_ref();
    match role {
        Role::Router(_) => Some(vec![moe.n_experts, d]),
        Role::RouterBias(_) | Role::SelectionBias(_) | Role::ExpertScale(_) => Some(vec![moe.n_experts]),
        Role::ExpertGateBias(_) | Role::ExpertUpBias(_) => Some(vec![moe.n_experts, moe.intermediate_size]),
        Role::ExpertDownBias(_) => Some(vec![moe.n_experts, d]),
        Role::SharedGate(_) | Role::SharedUp(_) => shared.map(|s| vec![s.intermediate_size, d]),
        Role::SharedDown(_) => shared.map(|s| vec![d, s.intermediate_size]),
        Role::SharedExpertGate(_) => shared.filter(|s| s.gated).map(|_| vec![1, d]),
        Role::ExpertGate(_, e) | Role::ExpertUp(_, e) => (e < moe.n_experts).then(|| vec![moe.intermediate_size, d]),
        Role::ExpertDown(_, e) => (e < moe.n_experts).then(|| vec![d, moe.intermediate_size]),
        _ => None,
    }
}
