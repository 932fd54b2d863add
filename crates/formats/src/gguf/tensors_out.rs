//! The tensors of a GGUF file, and of which weights each is made: what the converters stack, merge, split and reorder.

use super::arch::Arch;
use super::meta_out;
use super::names::GGUF_NAMES;
use crate::prune::slots;
use crate::role::Role;
use crate::spec::{AttnSpec, DeltaLayout, DeltaSpec, MlaSpec, ModelSpec, NormKind};
use crate::{Checkpoint, FormatError, Result, StoredDType};

/// A tensor to be made.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufMade {
    /// Its name.
    pub name: String,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// What is in it.
    pub content: Content,
}

/// What is in a tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// Weights behind each other.
    Weights(Vec<(Role, Change)>),
    /// Numbers of the configuration.
    Values(Vec<f32>),
    /// Bytes of a GGUF file: offsets and lengths in one of its parts.
    Stored {
        /// Index into [`Checkpoint::files`].
        file: usize,
        /// Offsets and lengths.
        ranges: Vec<(u64, u64)>,
        /// Their type.
        dtype: StoredDType,
    },
}

/// How a weight is changed on its way into the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Not at all.
    None,
    /// These rows, in this order; of a vector, elements.
    Rows(Vec<usize>),
    /// 1 is added.
    PlusOne,
    /// These columns of each row, in this order.
    Columns(Vec<usize>),
    /// `-exp(x)` of these elements of a vector, in this order.
    MinusExp(Vec<usize>),
    /// Of latent attention's up projection, each head's rows of keys as columns: `[heads, rank, keys]`.
    Keys {
        /// Heads.
        heads: usize,
        /// Rows of a head's keys, which come first.
        keys: usize,
        /// Rows of a head.
        rows: usize,
    },
}

/// The architectures that call the norm before the feed-forward block after the attention.
const NORM_BEHIND_ATTENTION: [&str; 4] = ["gpt-oss", "glm4moe", "qwen3next", "qwen35moe"];
/// The architectures with q, k and v in one tensor.
const MERGED_QKV: [&str; 2] = ["gpt2", "phi3"];

/// The tensors of a checkpoint from safetensors, with only the experts `kept` (one ascending list per MoE layer; `None` is
/// all), in the order of the layers.
///
/// # Errors
/// An architecture that cannot hold one of the weights.
pub fn tensors_for_gguf(checkpoint: &Checkpoint, arch: &Arch, kept: Option<&[Vec<usize>]>) -> Result<Vec<GgufMade>> {
    let maker = Maker { checkpoint, spec: checkpoint.spec(), arch, kept };
    let mut made = Vec::new();
    for (name, factors) in meta_out::factors(checkpoint)? {
        made.push(GgufMade { name: name.to_owned(), shape: vec![factors.len()], content: Content::Values(factors) });
    }
    for role in checkpoint.roles() {
        maker.of_role(role, &mut made)?;
    }
    Ok(made)
}

struct Maker<'a> {
    checkpoint: &'a Checkpoint,
    spec: &'a ModelSpec,
    arch: &'a Arch,
    kept: Option<&'a [Vec<usize>]>,
}

impl Maker<'_> {
    fn of_role(&self, role: Role, made: &mut Vec<GgufMade>) -> Result<()> {
        let shape = self.checkpoint.expected_shape(role).ok_or(FormatError::NoRole { role })?;
        let mut push = |name: String, shape: Vec<usize>, weights: Vec<(Role, Change)>| {
            made.push(GgufMade { name, shape, content: Content::Weights(weights) });
        };
        let name = GGUF_NAMES.of(role);
        let merged = MERGED_QKV.contains(&self.arch.name);
        let change = self.change(role);
        match role {
            Role::ExpertGate(_, 0) | Role::ExpertUp(_, 0) | Role::ExpertDown(_, 0) => {
                let experts = self.kept_of(role);
                let shape = [vec![experts.len()], shape].concat();
                push(name, shape, experts.iter().map(|&e| (role.renumbered(e), Change::None)).collect());
            }
            Role::ExpertGate(..) | Role::ExpertUp(..) | Role::ExpertDown(..) => {}
            Role::ExpertScale(_) => return Err(self.cannot(role)),
            Role::FfnNorm(l) if NORM_BEHIND_ATTENTION.contains(&self.arch.name) => {
                push(format!("blk.{l}.post_attention_norm.weight"), shape, vec![(role, change)]);
            }
            Role::KvB(l) => {
                let attn = &self.spec.layers[l].attn;
                let Some(mla) = &attn.mla else { return Err(self.cannot(role)) };
                for (name, shape, change) in latent(l, attn, mla) {
                    push(name, shape, vec![(role, change)]);
                }
            }
            Role::Q(l) if self.spec.layers[l].attn.mla.as_ref().is_some_and(|m| m.q_lora_rank.is_some()) => {
                push(format!("blk.{l}.attn_q_b.weight"), shape, vec![(role, change)]);
            }
            Role::Q(l) if merged => self.merge(&[role, Role::K(l), Role::V(l)], "attn_qkv.weight", l, made)?,
            Role::QBias(l) if merged => {
                self.merge(&[role, Role::KBias(l), Role::VBias(l)], "attn_qkv.bias", l, made)?;
            }
            Role::DenseGate(l) if self.arch.name == "phi3" => {
                self.merge(&[role, Role::DenseUp(l)], "ffn_up.weight", l, made)?;
            }
            Role::DenseUp(_) if self.arch.name == "phi3" => {}
            Role::K(_) | Role::V(_) | Role::KBias(_) | Role::VBias(_) if merged => {}
            Role::DeltaQkv(l) | Role::DeltaBa(l) if !self.tiles() => {
                let delta = self.spec.layers[l].delta.as_ref().filter(|d| d.layout == DeltaLayout::Grouped);
                let delta = delta.ok_or_else(|| self.cannot(role))?;
                if matches!(role, Role::DeltaBa(_)) {
                    push(format!("blk.{l}.ssm_ba.weight"), shape, vec![(role, Change::None)]);
                } else {
                    let (qkv, z) = ungrouped(delta);
                    for (what, rows) in [("attn_qkv", qkv), ("attn_gate", z)] {
                        let shape = vec![rows.len(), self.spec.hidden_size];
                        push(format!("blk.{l}.{what}.weight"), shape, vec![(role, Change::Rows(rows))]);
                    }
                }
            }
            _ => {
                let shape = match &change {
                    Change::Rows(rows) => [vec![rows.len()], shape[1..].to_vec()].concat(),
                    _ => shape,
                };
                push(name, shape, vec![(role, change)]);
            }
        }
        Ok(())
    }

    fn cannot(&self, role: Role) -> FormatError {
        let arch = self.arch.name;
        FormatError::NotInGguf { problem: format!("its {role} has no place in the architecture {arch}") }
    }

    /// One tensor of several weights.
    fn merge(&self, roles: &[Role], what: &str, l: usize, made: &mut Vec<GgufMade>) -> Result<()> {
        let shapes: Option<Vec<Vec<usize>>> = roles.iter().map(|&r| self.checkpoint.expected_shape(r)).collect();
        let shapes = shapes.ok_or(FormatError::NoRole { role: roles[0] })?;
        let mut shape = shapes[0].clone();
        shape[0] = shapes.iter().map(|s| s[0]).sum();
        let weights = roles.iter().map(|&role| (role, self.change(role))).collect();
        made.push(GgufMade { name: format!("blk.{l}.{what}"), shape, content: Content::Weights(weights) });
        Ok(())
    }

    /// The experts of a weight's layer that are kept.
    fn kept_of(&self, role: Role) -> Vec<usize> {
        let layer = role.layer().unwrap_or_default();
        match self.kept {
            Some(kept) => slots(self.spec, kept, layer).to_vec(),
            None => (0..self.spec.moe(layer).map_or(0, |moe| moe.n_experts)).collect(),
        }
    }

    fn change(&self, role: Role) -> Change {
        let of_delta = role.layer().and_then(|l| self.of_delta(role, self.spec.layers.get(l)?.delta.as_ref()?));
        if let Some(change) = of_delta {
            return change;
        }
        match role {
            Role::Q(l) | Role::QBias(l) if self.arch.permuted => self.interleaved(l, |attn| attn.n_heads),
            Role::K(l) | Role::KBias(l) if self.arch.permuted => self.interleaved(l, |attn| attn.n_kv_heads),
            _ if self.spec.norm == NormKind::RmsPlusOne && role.is_plain_norm() => Change::PlusOne,
            _ if role.of_experts() == Some(None) && self.kept.is_some() => Change::Rows(self.kept_of(role)),
            _ => Change::None,
        }
    }

    /// Whether value heads of delta layers are put into tiles (Qwen3.5): each in turn of all key heads.
    fn tiles(&self) -> bool {
        self.arch.name == "qwen35moe"
    }

    /// The change of a delta layer's weight, if there is one.
    fn of_delta(&self, role: Role, delta: &DeltaSpec) -> Option<Change> {
        if !self.tiles() {
            let order = || (0..delta.n_value_heads).collect();
            return matches!(role, Role::DeltaALog(_)).then(|| Change::MinusExp(order()));
        }
        let keys = 2 * delta.n_key_heads * delta.key_dim;
        Some(match role {
            Role::DeltaQkv(_) | Role::DeltaConv(_) => {
                Change::Rows((0..keys).chain(tiled(delta, delta.value_dim).into_iter().map(|row| keys + row)).collect())
            }
            Role::DeltaZ(_) => Change::Rows(tiled(delta, delta.value_dim)),
            Role::DeltaBa(_) | Role::DeltaA(_) | Role::DeltaDtBias(_) => Change::Rows(tiled(delta, 1)),
            Role::DeltaALog(_) => Change::MinusExp(tiled(delta, 1)),
            Role::DeltaOut(_) => Change::Columns(tiled(delta, delta.value_dim)),
            _ => return None,
        })
    }

    /// Rows such that interleaved rotation does what rotation of halves did.
    fn interleaved(&self, l: usize, heads: impl Fn(&AttnSpec) -> usize) -> Change {
        let attn = &self.spec.layers[l].attn;
        let half = attn.head_dim / 2;
        let row = |h: usize, i: usize| h * attn.head_dim + i / 2 + i % 2 * half;
        Change::Rows((0..heads(attn)).flat_map(|h| (0..attn.head_dim).map(move |i| row(h, i))).collect())
    }
}

/// Latent attention's up projection, in two.
fn latent(l: usize, attn: &AttnSpec, mla: &MlaSpec) -> [(String, Vec<usize>, Change); 2] {
    let (heads, keys, rows) = (attn.n_heads, mla.nope_dim, mla.nope_dim + mla.v_head_dim);
    let values = (0..heads).flat_map(|h| h * rows + keys..(h + 1) * rows).collect();
    [
        (format!("blk.{l}.attn_k_b.weight"), vec![heads, mla.kv_lora_rank, keys], Change::Keys { heads, keys, rows }),
        (format!("blk.{l}.attn_v_b.weight"), vec![heads, mla.v_head_dim, mla.kv_lora_rank], Change::Rows(values)),
    ]
}

/// Where the rows of value heads in tiles come from, each head `width` of them: head `k + t * keys` is the `t`-th of key head `k`.
fn tiled(delta: &DeltaSpec, width: usize) -> Vec<usize> {
    let (keys, each) = (delta.n_key_heads, delta.n_value_heads / delta.n_key_heads);
    let heads = (0..each).flat_map(|t| (0..keys).map(move |k| k * each + t));
    heads.flat_map(|head| head * width..(head + 1) * width).collect()
}

/// The rows of all q, all k and all v, and those of z, in a projection that is grouped by key head.
fn ungrouped(delta: &DeltaSpec) -> (Vec<usize>, Vec<usize>) {
    let (k, v) = (delta.key_dim, delta.n_value_heads / delta.n_key_heads * delta.value_dim);
    let of = |from: usize, count: usize| {
        (0..delta.n_key_heads).flat_map(move |h| {
            let start = h * (2 * k + 2 * v) + from;
            start..start + count
        })
    };
    (of(0, k).chain(of(k, k)).chain(of(2 * k, v)).collect(), of(2 * k + v, v).collect())
}
