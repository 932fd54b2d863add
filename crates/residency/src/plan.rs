//! How much fits.

use quorate_formats::spec::ModelSpec;
use quorate_formats::{Checkpoint, Quantisation, Role, TensorLoc, shape};

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
    if held_as_f32(role) { 4 * loc.elements() } else { loc.len }
}

fn held_as_f32(role: Role) -> bool {
    role.is_vector() || matches!(role, Role::Router(_))
}

/// Bytes in memory of all weights outside the routed experts.
pub fn skeleton_bytes(checkpoint: &Checkpoint) -> u64 {
    let skeleton = checkpoint.roles().filter(|role| !role.is_expert());
    skeleton.filter_map(|role| Some(resident_size(role, checkpoint.tensor(role).ok()?))).sum()
}

/// What a model's weights take in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightSizes {
    /// All weights outside the routed experts.
    pub skeleton_bytes: u64,
    /// One entry for each MoE layer.
    pub layers: Vec<LayerExperts>,
}

/// The routed experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerExperts {
    /// How many.
    pub experts: usize,
    /// How many a token uses.
    pub top_k: usize,
    /// Bytes of the largest.
    pub expert_bytes: u64,
}

impl WeightSizes {
    /// Of a model as its files have it.
    pub fn stored(checkpoint: &Checkpoint) -> WeightSizes {
        let largest = |l, experts| (0..experts).map(|e| checkpoint.expert_bytes(l, e)).max().unwrap_or(0);
        WeightSizes { skeleton_bytes: skeleton_bytes(checkpoint), layers: layers(checkpoint.spec(), largest) }
    }

    /// Of an architecture in some quantisation, from shapes alone.
    pub fn quantised(spec: &ModelSpec, quantisation: Quantisation) -> WeightSizes {
        let size = |role: Role| {
            let shape = shape::expected_shape(spec, role).unwrap_or(vec![0]);
            let elements = || shape.iter().map(|&n| n as u64).product::<u64>();
            if held_as_f32(role) { 4 * elements() } else { quantisation.bytes(&shape, role.is_expert()) }
        };
        let skeleton_bytes = shape::roles_outside_experts(spec).map(size).sum();
        WeightSizes { skeleton_bytes, layers: layers(spec, |l, _| Role::of_expert(l, 0).into_iter().map(size).sum()) }
    }

    /// Bytes of as many experts in every MoE layer; a layer with fewer keeps all.
    pub fn expert_bytes(&self, keep: usize) -> u64 {
        self.layers.iter().map(|layer| layer.expert_bytes.saturating_mul(keep.min(layer.experts) as u64)).sum()
    }

    /// Bytes of the whole model.
    pub fn total_bytes(&self) -> u64 {
        self.skeleton_bytes.saturating_add(self.expert_bytes(usize::MAX))
    }

    /// The largest equal number of experts per MoE layer that fits `budget_bytes` together with the rest of the weights, the
    /// keys and values of the context, and `overhead_bytes` of buffers.
    ///
    /// # Errors
    /// Not even as many experts fit as one token uses; the error says what is needed.
    pub fn memory_plan(&self, budget_bytes: u64, kv_bytes: u64, overhead_bytes: u64) -> Result<MemoryPlan> {
        let fixed = self.skeleton_bytes.saturating_add(kv_bytes).saturating_add(overhead_bytes);
        let most = self.layers.iter().map(|layer| layer.experts).max().unwrap_or(0);
        let least = self.layers.iter().map(|layer| layer.top_k).max().unwrap_or(0);
        let needs = |keep: usize| fixed.saturating_add(self.expert_bytes(keep));
        let Some(keep) = (least..=most).rev().find(|&keep| needs(keep) <= budget_bytes) else {
            return Err(ResidencyError::DoesNotFit {
                budget_bytes,
                needed_bytes: needs(least),
                skeleton_bytes: self.skeleton_bytes,
                expert_bytes: self.expert_bytes(least),
                experts: least,
                kv_bytes,
                overhead_bytes,
            });
        };
        Ok(MemoryPlan {
            experts_per_layer: keep,
            all: keep == most,
            weight_bytes: self.skeleton_bytes.saturating_add(self.expert_bytes(keep)),
            total_bytes: needs(keep),
        })
    }
}

fn layers(spec: &ModelSpec, expert_bytes: impl Fn(usize, usize) -> u64) -> Vec<LayerExperts> {
    let of_layer = |l: usize| {
        let moe = spec.moe(l)?;
        let (experts, top_k) = (moe.n_experts, moe.top_k);
        Some(LayerExperts { experts, top_k, expert_bytes: expert_bytes(l, experts) })
    };
    spec.moe_layers().into_iter().filter_map(of_layer).collect()
}

/// [`WeightSizes::memory_plan`] of a model as its files have it.
///
/// # Errors
/// Not even as many experts fit as one token uses; the error says what is needed.
pub fn memory_plan(
    checkpoint: &Checkpoint,
    budget_bytes: u64,
    kv_bytes: u64,
    overhead_bytes: u64,
) -> Result<MemoryPlan> {
    WeightSizes::stored(checkpoint).memory_plan(budget_bytes, kv_bytes, overhead_bytes)
}
