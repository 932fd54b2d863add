//! Where the weights of a model lie in GGUF tensors: stacked, fused, reordered or split by the converters.

use std::collections::HashMap;

use super::arch::Arch;
use super::names::GGUF_NAMES;
use crate::TensorLoc;
use crate::role::Role;
use crate::source::{Fused, Part, RowOrder};
use crate::spec::{AttnSpec, DeltaLayout, FfnSpec, MlaSpec, ModelSpec, NormPlacement};

/// The tensors of a model, by name.
pub(super) struct Layout<'a> {
    pub arch: &'static Arch,
    pub by_name: HashMap<&'a str, &'a TensorLoc>,
}

impl Layout<'_> {
    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    fn has_role(&self, role: Role) -> bool {
        self.has(&GGUF_NAMES.of(role))
    }

    /// Where a weight lies, if it is no tensor of its own with the usual name.
    pub fn fused(&self, spec: &ModelSpec, role: Role) -> Option<Fused> {
        let l = role.layer()?;
        let layer = spec.layers.get(l)?;
        match role {
            Role::ExpertGate(..) | Role::ExpertUp(..) | Role::ExpertDown(..) => self.expert(spec, role),
            Role::Q(_) | Role::K(_) | Role::V(_) | Role::QBias(_) | Role::KBias(_) | Role::VBias(_) => {
                self.query_key_value(spec.hidden_size, &layer.attn, role)
            }
            Role::KvB(_) => self.split_up_projection(layer.attn.n_heads, layer.attn.mla.as_ref()?, l),
            Role::FfnNorm(_) if layer.norms == NormPlacement::Before && !self.has_role(role) => {
                renamed(format!("blk.{l}.post_attention_norm.weight"), vec![spec.hidden_size])
            }
            Role::DenseGate(_) | Role::DenseUp(_) if !self.has_role(Role::DenseGate(l)) => {
                let FfnSpec::Dense { intermediate_size: i, plain: false, .. } = layer.ffn else { return None };
                let first = if matches!(role, Role::DenseGate(_)) { 0 } else { i };
                rows(GGUF_NAMES.of(Role::DenseUp(l)), vec![2 * i, spec.hidden_size], first, i)
            }
            Role::SelectionBias(_) if !self.has_role(role) => {
                renamed(format!("blk.{l}.exp_probs_b"), vec![spec.moe(l)?.n_experts])
            }
            Role::DeltaALog(_) => {
                let shape = vec![layer.delta.as_ref()?.n_value_heads];
                Some(Fused { tensor: GGUF_NAMES.of(role), shape, part: Part::LogOfNegative })
            }
            Role::DeltaQkv(_) | Role::DeltaBa(_) | Role::DeltaA(_) => self.delta(spec, role),
            _ => None,
        }
    }

    /// One matrix of an expert: a part of a stack, of a stack of gates and ups, or (old files) a tensor of its own.
    fn expert(&self, spec: &ModelSpec, role: Role) -> Option<Fused> {
        let (l, e, name, down) = match role {
            Role::ExpertGate(l, e) => (l, e, "gate", false),
            Role::ExpertUp(l, e) => (l, e, "up", false),
            Role::ExpertDown(l, e) => (l, e, "down", true),
            _ => return None,
        };
        let (d, moe) = (spec.hidden_size, spec.moe(l)?);
        let (n, i) = (moe.n_experts, moe.intermediate_size);
        let [out, inner] = if down { [d, i] } else { [i, d] };
        let both = format!("blk.{l}.ffn_gate_up_exps.weight");
        if !down && self.has(&both) {
            return rows(both, vec![n, 2 * i, d], e * 2 * i + if name == "up" { i } else { 0 }, i);
        }
        let stack = GGUF_NAMES.of(role);
        if let Some(single) = single_expert(role).filter(|single| !self.has(&stack) && self.has(single)) {
            return renamed(single, vec![out, inner]);
        }
        rows(stack, vec![n, out, inner], e * out, out)
    }

    /// q, k and v in one tensor, the rows of q and k perhaps in another order.
    fn query_key_value(&self, d: usize, attn: &AttnSpec, role: Role) -> Option<Fused> {
        let l = role.layer()?;
        if let (Role::Q(_), Some(MlaSpec { q_lora_rank: Some(rank), .. })) = (role, &attn.mla) {
            return renamed(format!("blk.{l}.attn_q_b.weight"), vec![attn.n_heads * attn.head_dim, *rank]);
        }
        if attn.mla.is_some() {
            return None;
        }
        let (q, kv) = (attn.n_heads * attn.head_dim, attn.n_kv_heads * attn.head_dim);
        let q_out = if attn.extra.gated { 2 * q } else { q };
        let (heads, before, count) = match role {
            Role::Q(_) | Role::QBias(_) => (attn.n_heads, 0, q_out),
            Role::K(_) | Role::KBias(_) => (attn.n_kv_heads, q_out, kv),
            _ => (0, q_out + kv, kv),
        };
        let bias = matches!(role, Role::QBias(_) | Role::KBias(_) | Role::VBias(_));
        let both = format!("blk.{l}.attn_qkv.{}", if bias { "bias" } else { "weight" });
        let (tensor, first, all) = match self.has_role(role) || !self.has(&both) {
            true => (GGUF_NAMES.of(role), 0, count),
            false => (both, before, q_out + 2 * kv),
        };
        let shape = if bias { vec![all] } else { vec![all, d] };
        if self.arch.permuted && heads > 0 {
            // Stored per head `[hd / 2, 2]`, wanted `[2, hd / 2]`.
            let half = attn.head_dim / 2;
            let order = RowOrder { first, counts: [heads, 2, half], strides: [attn.head_dim, 1, 2] };
            return Some(Fused { tensor, shape, part: Part::Reordered(order) });
        }
        rows(tensor, shape, first, count)
    }

    /// The up projection of latent attention in two tensors, the keys' transposed.
    fn split_up_projection(&self, heads: usize, mla: &MlaSpec, l: usize) -> Option<Fused> {
        let tensor = format!("blk.{l}.attn_k_b.weight");
        let part = Part::KeysValues { values: mla.v_head_dim };
        self.has(&tensor).then(|| Fused { tensor, shape: vec![heads, mla.kv_lora_rank, mla.nope_dim], part })
    }

    /// Input projections of a delta layer.
    fn delta(&self, spec: &ModelSpec, role: Role) -> Option<Fused> {
        let l = role.layer()?;
        let (d, delta) = (spec.hidden_size, spec.layers.get(l)?.delta.as_ref()?);
        let (keys, values) = (delta.n_key_heads * delta.key_dim, delta.n_value_heads * delta.value_dim);
        let ba = format!("blk.{l}.ssm_ba.weight");
        match (role, delta.layout) {
            (Role::DeltaQkv(_), DeltaLayout::Grouped) => {
                renamed(format!("blk.{l}.ssm_in.weight"), vec![2 * keys + 2 * values, d])
            }
            (Role::DeltaBa(_), DeltaLayout::Grouped) => renamed(ba, vec![2 * delta.n_value_heads, d]),
            // Grouped by key head: steps, then decays.
            (Role::DeltaBa(_) | Role::DeltaA(_), _) if self.has(&ba) => {
                let each = delta.n_value_heads / delta.n_key_heads;
                let first = if matches!(role, Role::DeltaA(_)) { each } else { 0 };
                let order = RowOrder { first, counts: [1, delta.n_key_heads, each], strides: [0, 2 * each, 1] };
                Some(Fused { tensor: ba, shape: vec![2 * delta.n_value_heads, d], part: Part::Reordered(order) })
            }
            _ => None,
        }
    }
}

/// The tensor of one matrix of an expert in old files, which have one for each.
pub(crate) fn single_expert(role: Role) -> Option<String> {
    let (l, e, name) = match role {
        Role::ExpertGate(l, e) => (l, e, "gate"),
        Role::ExpertUp(l, e) => (l, e, "up"),
        Role::ExpertDown(l, e) => (l, e, "down"),
        _ => return None,
    };
    Some(format!("blk.{l}.ffn_{name}.{e}.weight"))
}

/// A whole tensor under another name.
fn renamed(tensor: String, shape: Vec<usize>) -> Option<Fused> {
    let count = shape[0];
    rows(tensor, shape, 0, count)
}

fn rows(tensor: String, shape: Vec<usize>, first: usize, rows: usize) -> Option<Fused> {
    Some(Fused { tensor, shape, part: Part::Rows { first, rows } })
}
