//! An opened model: its specification, what of its weights is in memory, its tokenizer.

use std::path::Path;
use std::sync::Arc;

use quorate_formats::spec::ModelSpec;
use quorate_formats::{Checkpoint, Role, StoredDType};
use quorate_kernels::Pool;
pub use quorate_residency::Progress as LoadProgress;
use quorate_residency::{Expert, StreamOptions, Weights};

use crate::cache::Kept;
use crate::ffn::{Gated, is_clamped};
use crate::overlay::{Installed, Linear, Overlay, Vector};
use crate::text::Tokenizer;
use crate::{CacheLayout, KvCache, KvType, ModelError, RoutingMode};

/// A model, open for use.
///
/// Opening reads everything but the routed experts; [`Model::load_experts`] reads those that are to be kept.
pub struct Model {
    checkpoint: Arc<Checkpoint>,
    weights: Weights,
    tokenizer: Tokenizer,
    pool: Arc<Pool>,
    kept: Vec<Option<Vec<bool>>>,
    mode: RoutingMode,
    overlay: Installed,
    kv_type: KvType,
}

/// How a model is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions<'a> {
    /// Compute threads, at least one.
    pub threads: usize,
    /// Bytes of weights in memory at most.
    pub memory_limit: Option<u64>,
    /// Folder whose tokenizer is used in place of the model's own.
    pub tokenizer: Option<&'a Path>,
    /// Type of the KV cache; left out, F16 for a model that has weights in blocks, whose activations are rounded more than
    /// that, and F32 for others.
    pub kv_type: Option<KvType>,
}

/// Kept experts of one MoE layer: `None` keeps all.
pub type KeptExperts = Option<Vec<usize>>;

impl Model {
    /// Opens a model folder (or file) with `threads` compute threads and loads all but its experts.
    ///
    /// `memory_limit` bounds the bytes of weights in memory.
    ///
    /// # Errors
    /// Whatever is wrong with the folder: missing or broken files, an unknown family, weights that are not numbers, or
    /// non-expert weights above the limit.
    pub fn open(path: &Path, threads: usize, memory_limit: Option<u64>) -> Result<Model, ModelError> {
        Model::open_with(path, &OpenOptions { threads, memory_limit, ..OpenOptions::default() }, &mut |_, _| true)
    }

    /// [`Model::open`] with a progress in bytes, `(done, total)`, that returns false to cancel.
    ///
    /// # Errors
    /// As there, or a cancel.
    pub fn open_with(
        path: &Path,
        options: &OpenOptions<'_>,
        progress: &mut LoadProgress<'_>,
    ) -> Result<Model, ModelError> {
        let OpenOptions { threads, memory_limit, tokenizer, kv_type } = *options;
        let checkpoint = Arc::new(Checkpoint::open(path)?);
        let rounded = checkpoint
            .roles()
            .any(|role| checkpoint.tensor(role).is_ok_and(|t| matches!(t.dtype, StoredDType::Blocks(_))));
        let kv_type = kv_type.unwrap_or(if rounded { KvType::F16 } else { KvType::F32 });
        if let Some(layer) = checkpoint.spec().layers.iter().position(|l| !Kept::allow(l, kv_type)) {
            return Err(ModelError::KvType { layer, dtype: kv_type.dtype().name() });
        }
        // As `Tokenizer::of_model` has it, but a file's metadata are read already.
        let tokenizer = match (tokenizer, checkpoint.gguf()) {
            (Some(folder), _) => Tokenizer::open(folder)?,
            (None, Some(metadata)) => Tokenizer::from_gguf(metadata, path)?,
            (None, None) => Tokenizer::open(path)?,
        };
        let mut weights = Weights::open(checkpoint.clone(), memory_limit);
        weights.load_skeleton_with(progress)?;
        let kept = vec![None; checkpoint.spec().layers.len()];
        let (pool, overlay) = (Arc::new(Pool::new(threads)), Installed::default());
        Ok(Model { checkpoint, weights, tokenizer, pool, kept, mode: RoutingMode::Mask, overlay, kv_type })
    }

    /// An empty KV cache for `slots` sequences, of this model's type.
    pub fn new_cache(&self, slots: usize) -> KvCache {
        KvCache::of_type(self.spec(), slots, self.kv_type)
    }

    /// What contexts take in caches that [`Model::new_cache`] makes.
    pub fn cache_layout(&self) -> CacheLayout {
        CacheLayout::own(self.spec(), self.kv_type)
    }

    /// Loads exactly these experts, given per MoE layer by global id, and frees all others. Tokens are routed by `mode`.
    ///
    /// # Errors
    /// A list that does not fit the model (wrong number of layers, an id out of range, or, with the modes that refill,
    /// fewer experts than `top_k`), a read error, or the memory limit.
    pub fn load_experts(&mut self, kept: &[KeptExperts], mode: RoutingMode) -> Result<(), ModelError> {
        self.load_experts_with(kept, mode, &mut |_, _| true)
    }

    /// [`Model::load_experts`] with a progress in bytes that returns false to cancel.
    ///
    /// # Errors
    /// As there, or a cancel.
    pub fn load_experts_with(
        &mut self,
        kept: &[KeptExperts],
        mode: RoutingMode,
        progress: &mut LoadProgress<'_>,
    ) -> Result<(), ModelError> {
        let flags = self.check_keep(kept, mode)?;
        self.weights.load_experts_with(kept, progress)?;
        self.kept = flags;
        self.mode = mode;
        Ok(())
    }

    /// From now on experts are read when a token needs them, so that all of the model is computed in few bytes; see
    /// [`Weights::stream_experts`]. Nothing is masked, and all values are what they are with every expert loaded.
    ///
    /// # Errors
    /// As there.
    pub fn stream_experts(
        &mut self,
        options: &StreamOptions,
        best_first: &[(usize, usize)],
        rates: Option<&[Vec<f32>]>,
        progress: &mut LoadProgress<'_>,
    ) -> Result<(), ModelError> {
        let done = self.weights.stream_experts(options, best_first, rates, progress);
        if self.weights.stream().is_some() {
            self.kept = vec![None; self.spec().layers.len()];
            self.mode = RoutingMode::Mask;
        }
        Ok(done?)
    }

    /// Loads every expert.
    ///
    /// # Errors
    /// As [`Model::load_experts`].
    pub fn load_all_experts(&mut self) -> Result<(), ModelError> {
        self.load_experts(&vec![None; self.spec().moe_layers().len()], RoutingMode::Mask)
    }

    /// Restricts routing to these experts without loading or freeing any: the masked run of a fully loaded model.
    ///
    /// # Errors
    /// A list that does not fit the model.
    pub fn mask_experts(&mut self, kept: &[KeptExperts], mode: RoutingMode) -> Result<(), ModelError> {
        self.kept = self.check_keep(kept, mode)?;
        self.mode = mode;
        Ok(())
    }

    /// Checks a keep list and turns it into flags per decoder layer.
    fn check_keep(&self, kept: &[KeptExperts], mode: RoutingMode) -> Result<Vec<Option<Vec<bool>>>, ModelError> {
        let layers = self.spec().moe_layers();
        if kept.len() != layers.len() {
            let message = format!("keep list has {} layers, the model has {} MoE layers", kept.len(), layers.len());
            return Err(ModelError::Keep(message));
        }
        let mut flags = vec![None; self.spec().layers.len()];
        for (&layer, kept) in layers.iter().zip(kept) {
            let (Some(moe), Some(kept)) = (self.spec().moe(layer), kept) else { continue };
            let mut flag = vec![false; moe.n_experts];
            for &e in kept {
                *flag.get_mut(e).ok_or_else(|| {
                    ModelError::Keep(format!("layer {layer} has no expert {e}, it has {}", moe.n_experts))
                })? = true;
            }
            let count = flag.iter().filter(|&&f| f).count();
            let refills = matches!(mode, RoutingMode::Mask | RoutingMode::MaskFullGates);
            if refills && count < moe.top_k {
                return Err(ModelError::Keep(format!(
                    "layer {layer} keeps {count} experts but each token uses {}; help: keep at least {}",
                    moe.top_k, moe.top_k
                )));
            }
            flags[layer] = Some(flag);
        }
        Ok(flags)
    }

    /// The architecture.
    pub fn spec(&self) -> &ModelSpec {
        self.checkpoint.spec()
    }

    /// The files behind it.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    /// What of it is in memory.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Its tokenizer and chat template.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The compute threads.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// How tokens are routed around experts that are not kept.
    pub fn routing_mode(&self) -> RoutingMode {
        self.mode
    }

    /// Flags of the kept experts of a decoder layer; `None` if all are.
    pub fn kept(&self, layer: usize) -> Option<&[bool]> {
        self.kept[layer].as_deref()
    }

    pub(crate) fn weights_mut(&mut self) -> &mut Weights {
        &mut self.weights
    }

    /// Puts changed weights over the model's own; an overlay that was there before is replaced. Everything that runs the
    /// model then computes with them.
    ///
    /// # Errors
    /// A weight that the model does not have, a tensor of another shape or type, values that are not numbers, or a low-rank
    /// term where there is no product. The overlay that was there stays.
    pub fn set_overlay(&mut self, overlay: Overlay) -> Result<(), ModelError> {
        self.overlay = Installed::new(self.spec(), overlay)?;
        Ok(())
    }

    /// Takes the overlay off and gives the model its own weights back.
    pub fn take_overlay(&mut self) -> Overlay {
        std::mem::take(&mut self.overlay).overlay
    }

    /// The overlay; empty if there is none.
    pub fn overlay(&self) -> &Overlay {
        &self.overlay.overlay
    }

    pub(crate) fn matrix(&self, role: Role) -> Result<Linear<'_>, ModelError> {
        Ok(self.overlay.matrix(role, self.weights.matrix(role)?))
    }

    pub(crate) fn vector(&self, role: Role) -> Result<Vector<'_>, ModelError> {
        Ok(self.overlay.vector(role, self.weights.vector(role)?))
    }

    /// Biases of a routed expert's three matrices, if it has any.
    fn expert_biases(&self, layer: usize, expert: usize) -> Option<[&[f32]; 3]> {
        let moe = self.spec().moe(layer).filter(|moe| moe.expert_bias)?;
        let row = |role: Role, width: usize| self.weights.vector(role).ok()?.get(expert * width..(expert + 1) * width);
        let (i, d) = (moe.intermediate_size, self.spec().hidden_size);
        Some([
            row(Role::ExpertGateBias(layer), i)?,
            row(Role::ExpertUpBias(layer), i)?,
            row(Role::ExpertDownBias(layer), d)?,
        ])
    }

    /// A routed expert with its weights in memory, and what lies over them.
    pub(crate) fn gated<'a>(&'a self, layer: usize, expert: usize, weights: &'a Expert) -> Gated<'a> {
        let [gate, up, down] = Role::of_expert(layer, expert);
        Gated {
            biases: self.expert_biases(layer, expert),
            clamped: self.spec().moe(layer).is_some_and(|moe| is_clamped(moe.act)),
            gate: self.overlay.matrix(gate, &weights.gate),
            up: self.overlay.matrix(up, &weights.up),
            down: self.overlay.matrix(down, &weights.down),
        }
    }
}
