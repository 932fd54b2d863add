//! An opened model: its specification, what of its weights is in memory, its tokenizer.

use std::path::Path;
use std::sync::Arc;

use quorate_formats::spec::ModelSpec;
use quorate_formats::{Checkpoint, Role};
use quorate_kernels::{ExpertRef, Pool};
pub use quorate_residency::Progress as LoadProgress;
use quorate_residency::{Matrix, Weights};

use crate::text::Tokenizer;
use crate::{ModelError, RoutingMode};

/// A model, open for use.
///
/// Opening reads everything but the routed experts; [`Model::load_experts`] reads those that are to be kept.
pub struct Model {
    checkpoint: Arc<Checkpoint>,
    weights: Weights,
    tokenizer: Tokenizer,
    pool: Pool,
    kept: Vec<Option<Vec<bool>>>,
    mode: RoutingMode,
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
        Model::open_with(path, threads, memory_limit, &mut |_, _| true)
    }

    /// [`Model::open`] with a progress in bytes, `(done, total)`, that returns false to cancel.
    ///
    /// # Errors
    /// As there, or a cancel.
    pub fn open_with(
        path: &Path,
        threads: usize,
        memory_limit: Option<u64>,
        progress: &mut LoadProgress<'_>,
    ) -> Result<Model, ModelError> {
        let checkpoint = Arc::new(Checkpoint::open(path)?);
        let tokenizer = Tokenizer::open(path)?;
        let mut weights = Weights::open(checkpoint.clone(), memory_limit);
        weights.load_skeleton_with(progress)?;
        let kept = vec![None; checkpoint.spec().layers.len()];
        Ok(Model { checkpoint, weights, tokenizer, pool: Pool::new(threads), kept, mode: RoutingMode::Mask })
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
    pub fn pool(&self) -> &Pool {
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

    pub(crate) fn matrix(&self, role: Role) -> Result<&Matrix, ModelError> {
        Ok(self.weights.matrix(role)?)
    }

    pub(crate) fn vector(&self, role: Role) -> Result<&[f32], ModelError> {
        Ok(self.weights.vector(role)?)
    }

    pub(crate) fn expert(&self, layer: usize, expert: usize) -> Option<ExpertRef<'_>> {
        let weights = self.weights.expert(layer, expert)?;
        Some(ExpertRef { gate: weights.gate.as_ref(), up: weights.up.as_ref(), down: weights.down.as_ref() })
    }
}
