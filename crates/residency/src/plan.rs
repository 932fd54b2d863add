//! How much fits.

use quorate_formats::{Checkpoint, Role, TensorLoc};

use crate::error::{ResidencyError, Result};

/// Bytes that weights may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// The most; `None` is no limit.
    pub limit: Option<u64>,
}

impl From<Option<u64>> for Budget {
    fn from(limit: Option<u64>) -> Self {
        Self { limit }
    }
}

impl Budget {
    /// At most `bytes`.
    pub fn of(bytes: u64) -> Self {
        Self { limit: Some(bytes) }
    }

    /// Whether `needed_bytes` fit.
    ///
    /// # Errors
    /// They do not.
    pub fn check(self, needed_bytes: u64) -> Result<()> {
        match self.limit {
            Some(limit_bytes) if needed_bytes > limit_bytes => {
                Err(ResidencyError::OverBudget { needed_bytes, limit_bytes })
            }
            _ => Ok(()),
        }
    }
}

/// What fits into a number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Experts of each MoE layer (a layer with fewer keeps all); 0 for a model without experts.
    pub experts_per_layer: usize,
    /// Whether that is all of them.
    pub all: bool,
    /// Bytes of weights then.
    pub weight_bytes: u64,
    /// Bytes with context and buffers.
    pub total_bytes: u64,
}

/// Bytes in memory of a weight outside the routed experts: vectors and routers are held as f32, all else as stored.
pub(crate) fn resident_size(role: Role, loc: &TensorLoc) -> u64 {
    if role.is_vector() || matches!(role, Role::Router(_)) { 4 * loc.elements() } else { loc.len }
}

/// Bytes in memory of all weights outside the routed experts.
pub fn skeleton_bytes(checkpoint: &Checkpoint) -> u64 {
    let skeleton = checkpoint.roles().filter(|role| !role.is_expert());
    skeleton.filter_map(|role| Some(resident_size(role, checkpoint.tensor(role).ok()?))).sum()
}

/// The largest equal number of experts per MoE layer that fits `budget_bytes` together with the rest of the weights, the
/// keys and values of the context, and `overhead_bytes` of buffers.
///
/// # Errors
/// Not even as many experts fit as one token uses; the error says what is needed.
pub fn memory_plan(
    checkpoint: &Checkpoint,
    budget_bytes: u64,
    kv_bytes: u64,
    overhead_bytes: u64,
) -> Result<MemoryPlan> {
    let spec = checkpoint.spec();
    // Per MoE layer: number of experts, bytes of the largest, experts of a token.
    let layers: Vec<(usize, u64, usize)> = spec
        .moe_layers()
        .into_iter()
        .filter_map(|l| {
            let moe = spec.moe(l)?;
            let largest = (0..moe.n_experts).map(|e| checkpoint.expert_bytes(l, e)).max()?;
            Some((moe.n_experts, largest, moe.top_k))
        })
        .collect();
    let expert_bytes = |keep: usize| layers.iter().map(|&(n, one, _)| one * keep.min(n) as u64).sum::<u64>();
    let skeleton_bytes = skeleton_bytes(checkpoint);
    let fixed = skeleton_bytes.saturating_add(kv_bytes).saturating_add(overhead_bytes);
    let (most, least) =
        (layers.iter().map(|&(n, ..)| n).max().unwrap_or(0), layers.iter().map(|&(.., k)| k).max().unwrap_or(0));
    let fits = |keep: usize| fixed.saturating_add(expert_bytes(keep)) <= budget_bytes;
    let Some(keep) = (least..=most).rev().find(|&keep| fits(keep)) else {
        return Err(ResidencyError::DoesNotFit {
            budget_bytes,
            needed_bytes: fixed.saturating_add(expert_bytes(least)),
            skeleton_bytes,
            expert_bytes: expert_bytes(least),
            experts: least,
            kv_bytes,
            overhead_bytes,
        });
    };
    Ok(MemoryPlan {
        experts_per_layer: keep,
        all: keep == most,
        weight_bytes: skeleton_bytes + expert_bytes(keep),
        total_bytes: fixed.saturating_add(expert_bytes(keep)),
    })
}
