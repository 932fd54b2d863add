//! The store of weights in memory.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use quorate_formats::{Checkpoint, Role};

use crate::buffer::Slabs;
use crate::cache::{ExpertCache, StreamOptions};
use crate::error::{ResidencyError, Result};
use crate::load::{Loaded, Spare, expert_len, in_parallel, read_expert, read_weight};
use crate::matrix::{Expert, Matrix};
use crate::plan::{self, Budget, MemoryPlan};

/// How many experts ahead of the one that is read the system is told of.
const READ_AHEAD: usize = 6;

/// Called with bytes done and bytes in all; `false` cancels.
pub type Progress<'a> = dyn FnMut(u64, u64) -> bool + 'a;

/// A model's weights, as far as they are in memory.
#[derive(Debug)]
pub struct Weights {
    checkpoint: Arc<Checkpoint>,
    budget: Budget,
    matrices: HashMap<Role, Matrix>,
    vectors: HashMap<Role, Vec<f32>>,
    /// By decoder layer, then expert.
    experts: Vec<Vec<Option<Expert>>>,
    /// If experts are streamed, they are all here, and none above.
    stream: Option<ExpertCache>,
    read_before: u64,
}

impl Weights {
    /// A store with nothing in memory, which will hold no more than `budget` (`None` is no limit).
    pub fn open(checkpoint: Arc<Checkpoint>, budget: impl Into<Budget>) -> Self {
        let spec = checkpoint.spec();
        let none = |l| vec![None; spec.moe(l).map_or(0, |moe| moe.n_experts)];
        Self {
            experts: (0..spec.layers.len()).map(none).collect(),
            budget: budget.into(),
            matrices: HashMap::new(),
            vectors: HashMap::new(),
            stream: None,
            read_before: checkpoint.bytes_read(),
            checkpoint,
        }
    }

    /// The model.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    /// Bytes that [`Weights::resident_bytes`] may reach.
    pub fn budget(&self) -> Budget {
        self.budget
    }

    /// Sets the budget for later loads; what is in memory stays.
    pub fn set_budget(&mut self, budget: Budget) {
        self.budget = budget;
    }

    /// Reads all weights but routed experts, unless that was done.
    ///
    /// # Errors
    /// The budget is too small, a file cannot be read, or a value is not a number; then nothing changes.
    pub fn load_skeleton(&mut self) -> Result<()> {
        self.load_skeleton_with(&mut |_, _| true)
    }

    /// [`Weights::load_skeleton`] with a progress that can cancel.
    ///
    /// # Errors
    /// As there, or a cancel.
    pub fn load_skeleton_with(&mut self, progress: &mut Progress<'_>) -> Result<()> {
        if self.skeleton_loaded() {
            return Ok(());
        }
        let checkpoint = &self.checkpoint;
        self.budget.check(plan::skeleton_bytes(checkpoint) + self.expert_bytes_resident())?;
        let mut roles: Vec<Role> = checkpoint.roles().filter(|role| !role.is_expert()).collect();
        let place = |role: Role| checkpoint.tensor(role).map_or((0, 0, 0), |t| (t.file, t.offset, t.len));
        roles.sort_by_key(|&role| place(role));
        let slabs = Slabs::of_all(roles.iter().map(|&role| place(role).2 as usize));
        let loaded = in_parallel(&roles, |r| place(r).2, |r| read_weight(checkpoint, r, &slabs), progress)?;
        for (role, weight) in loaded {
            match weight {
                Loaded::Vector(vector) => drop(self.vectors.insert(role, vector)),
                Loaded::Matrix(matrix) => drop(self.matrices.insert(role, matrix)),
            }
        }
        self.forget_cached(&roles);
        Ok(())
    }

    /// Inside a budget, what was read does not stay in the system's cache too.
    fn forget_cached(&self, roles: &[Role]) {
        let within_budget = roles.iter().filter(|_| self.budget.limit.is_some());
        for loc in within_budget.filter_map(|&role| self.checkpoint.tensor(role).ok()) {
            self.checkpoint.files()[loc.file].forget_range(loc.offset, loc.len);
        }
    }

    fn skeleton_loaded(&self) -> bool {
        self.vectors.contains_key(&Role::FinalNorm)
    }

    /// Makes exactly these experts resident: one entry per MoE layer in their order, a list of expert ids, or `None`
    /// for all. Experts that are in memory already are not read again; those no longer kept are dropped. Only bytes of
    /// experts that are new are read.
    ///
    /// New experts are read before old ones are dropped where the budget has room for both; then an error leaves the
    /// store as it was. Else those no longer kept are dropped first and the new ones take their memory, which is also
    /// faster; an error then leaves the common ones. Experts that were streamed are dropped.
    ///
    /// # Errors
    /// Unknown experts, a budget too small, a file that cannot be read, or a value that is not a number.
    pub fn load_experts(&mut self, kept: &[Option<Vec<usize>>]) -> Result<()> {
        self.load_experts_with(kept, &mut |_, _| true)
    }

    /// [`Weights::load_experts`] with a progress that can cancel.
    ///
    /// # Errors
    /// As there, or a cancel.
    pub fn load_experts_with(&mut self, kept: &[Option<Vec<usize>>], progress: &mut Progress<'_>) -> Result<()> {
        let wanted = self.wanted(kept)?;
        self.stream = None;
        let mut new: Vec<_> = wanted.iter().copied().filter(|&(l, e)| self.expert(l, e).is_none()).collect();
        let bytes = |&(l, e): &(usize, usize)| self.checkpoint.expert_bytes(l, e);
        let skeleton = self.resident_bytes() - self.expert_bytes_resident();
        self.budget.check(skeleton + wanted.iter().map(bytes).sum::<u64>())?;

        let both = self.resident_bytes() + new.iter().map(bytes).sum::<u64>();
        let spare = match self.budget.check(both) {
            Ok(()) => Vec::new(),
            Err(_) => self.keep_only(&wanted),
        };
        let lens = new.iter().map(|&(l, e)| expert_len(&self.checkpoint, l, e)).collect::<Result<Vec<_>>>()?;
        let spare = Spare::of(spare, Slabs::of_all(lens));
        let checkpoint = &self.checkpoint;
        let place = |&(l, e): &(usize, usize)| {
            let first = Role::of_expert(l, e).into_iter().filter_map(|r| checkpoint.tensor(r).ok());
            first.map(|t| (t.file, t.offset)).min()
        };
        new.sort_by_cached_key(place);
        let size = |(l, e)| checkpoint.expert_bytes(l, e);
        // The disk reads on while memory is cleared, copied and checked.
        let expect = |(l, e): (usize, usize)| {
            for loc in Role::of_expert(l, e).into_iter().filter_map(|role| checkpoint.tensor(role).ok()) {
                checkpoint.files()[loc.file].expect_range(loc.offset, loc.len);
            }
        };
        let ahead: HashMap<_, _> = new.iter().copied().zip(new.iter().copied().skip(READ_AHEAD)).collect();
        new.iter().take(READ_AHEAD).copied().for_each(expect);
        let read = |(l, e)| {
            ahead.get(&(l, e)).copied().into_iter().for_each(expect);
            read_expert(checkpoint, l, e, &spare)
        };
        let loaded = in_parallel(&new, size, read, progress)?;
        drop(self.keep_only(&wanted));
        for ((l, e), expert) in loaded {
            self.experts[l][e] = Some(expert);
            self.forget_cached(&Role::of_expert(l, e));
        }
        Ok(())
    }

    /// From now on any expert is read when it is wanted, into a bounded number of bytes; experts loaded before are dropped.
    /// `best_first` are pinned as far as they fit, as decoder layer and expert; `rates` says for each decoder layer how
    /// likely each expert is to be used by a token, if that is known. With the same options as before, what is in memory
    /// stays.
    ///
    /// # Errors
    /// Too little room, a budget too small for room and skeleton, experts that the model does not have, a read that
    /// failed, or a cancel; after the latter two the others are streamed all the same.
    pub fn stream_experts(
        &mut self,
        options: &StreamOptions,
        best_first: &[(usize, usize)],
        rates: Option<&[Vec<f32>]>,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        for &(l, e) in best_first {
            if self.experts.get(l).is_none_or(|layer| e >= layer.len()) {
                let problem = format!("layer {l} has no expert {e}");
                return Err(ResidencyError::Kept { problem, help: "is the plan or pattern of another model?" });
            }
        }
        if self.stream.as_ref().is_none_or(|cache| cache.options() != options) {
            let skeleton = plan::skeleton_bytes(&self.checkpoint);
            self.budget.check(skeleton.saturating_add(options.room_bytes))?;
            self.stream = None;
            drop(self.keep_only(&BTreeSet::new()));
            self.stream = Some(ExpertCache::new(self.checkpoint.clone(), options.clone())?);
        }
        match &self.stream {
            Some(cache) => cache.pin(best_first, rates, progress),
            None => Ok(()),
        }
    }

    /// The streamed experts, if they are streamed.
    pub fn stream(&self) -> Option<&ExpertCache> {
        self.stream.as_ref()
    }

    /// The experts meant by `kept`, as decoder layer and expert.
    fn wanted(&self, kept: &[Option<Vec<usize>>]) -> Result<BTreeSet<(usize, usize)>> {
        let layers = self.checkpoint.spec().moe_layers();
        if kept.len() != layers.len() {
            return Err(ResidencyError::Kept {
                problem: format!("{} lists of experts for {} MoE layers", kept.len(), layers.len()),
                help: "give one list for each MoE layer",
            });
        }
        let mut wanted = BTreeSet::new();
        for (&l, kept) in layers.iter().zip(kept) {
            let n = self.experts[l].len();
            match kept {
                None => wanted.extend((0..n).map(|e| (l, e))),
                Some(ids) => {
                    if let Some(e) = ids.iter().find(|&&e| e >= n) {
                        return Err(ResidencyError::Kept {
                            problem: format!("layer {l} has no expert {e}, only {n}"),
                            help: "is the plan or pattern of another model?",
                        });
                    }
                    wanted.extend(ids.iter().map(|&e| (l, e)));
                }
            }
        }
        Ok(wanted)
    }

    /// Takes all other experts out.
    fn keep_only(&mut self, wanted: &BTreeSet<(usize, usize)>) -> Vec<Expert> {
        let mut dropped = Vec::new();
        for (l, layer) in self.experts.iter_mut().enumerate() {
            for (e, slot) in layer.iter_mut().enumerate() {
                if !wanted.contains(&(l, e)) {
                    dropped.extend(slot.take());
                }
            }
        }
        dropped
    }

    /// Reads an expert without keeping it.
    ///
    /// # Errors
    /// There is no such expert, a file cannot be read, or a value is not a number.
    pub fn read_expert(&self, layer: usize, expert: usize) -> Result<Expert> {
        let slabs = Slabs::of_all([expert_len(&self.checkpoint, layer, expert)?]);
        read_expert(&self.checkpoint, layer, expert, &Spare::of(Vec::new(), slabs))
    }

    /// A routed expert of a DECODER layer, if it is loaded; one that is streamed is given out by the cache only.
    pub fn expert(&self, layer: usize, expert: usize) -> Option<&Expert> {
        self.experts.get(layer)?.get(expert)?.as_ref()
    }

    /// Puts another expert in the place of one in memory; returns that one.
    ///
    /// # Errors
    /// It is not in memory, or the shapes differ.
    pub fn replace_expert(&mut self, layer: usize, expert: usize, new: Expert) -> Result<Expert> {
        let slot = self.experts.get_mut(layer).and_then(|l| l.get_mut(expert)).and_then(Option::as_mut);
        let role = Role::ExpertGate(layer, expert);
        let old = slot.ok_or(ResidencyError::NotResident { role, form: "expert" })?;
        let pairs = [(&old.gate, &new.gate), (&old.up, &new.up), (&old.down, &new.down)];
        pairs.iter().try_for_each(|(old, new)| same_shape(role, old, new))?;
        Ok(std::mem::replace(old, new))
    }

    /// Puts another matrix in the place of one outside the routed experts; returns that one.
    ///
    /// # Errors
    /// It is not in memory, or the shapes differ.
    pub fn replace_matrix(&mut self, role: Role, new: Matrix) -> Result<Matrix> {
        let old = self.matrices.get_mut(&role).ok_or(ResidencyError::NotResident { role, form: "matrix" })?;
        same_shape(role, old, &new)?;
        Ok(std::mem::replace(old, new))
    }

    /// A matrix outside the routed experts, the router (in f32) among them. The output matrix of a model with tied
    /// embeddings is the embedding.
    ///
    /// # Errors
    /// It is not in memory, the model has none, or it is a vector.
    pub fn matrix(&self, role: Role) -> Result<&Matrix> {
        let tied = role == Role::LmHead && self.checkpoint.spec().tie_word_embeddings;
        let role = if tied { Role::Embed } else { role };
        self.matrices.get(&role).ok_or_else(|| self.absent(role, "matrix"))
    }

    /// A norm or bias, in f32.
    ///
    /// # Errors
    /// It is not in memory, the model has none, or it is a matrix.
    pub fn vector(&self, role: Role) -> Result<&[f32]> {
        self.vectors.get(&role).map(Vec::as_slice).ok_or_else(|| self.absent(role, "vector"))
    }

    fn absent(&self, role: Role, form: &'static str) -> ResidencyError {
        match self.checkpoint.tensor(role) {
            Ok(_) => ResidencyError::NotResident { role, form },
            Err(error) => error.into(),
        }
    }

    /// Bytes read from the files since this store was opened.
    pub fn bytes_read(&self) -> u64 {
        self.checkpoint.bytes_read() - self.read_before
    }

    /// Bytes of all weights in memory (their values; an allocation's alignment, below 256 bytes, is not counted).
    pub fn resident_bytes(&self) -> u64 {
        let vectors: u64 = self.vectors.values().map(|v| size_of_val(v.as_slice()) as u64).sum();
        let matrices: u64 = self.matrices.values().map(Matrix::bytes).sum();
        vectors + matrices + self.expert_bytes_resident()
    }

    /// Bytes of the routed experts in memory.
    pub fn expert_bytes_resident(&self) -> u64 {
        let streamed = self.stream.as_ref().map_or(0, ExpertCache::resident_bytes);
        self.resident_experts().map(Expert::bytes).sum::<u64>() + streamed
    }

    /// Number of routed experts in memory, of all layers.
    pub fn experts_resident(&self) -> usize {
        (0..self.experts.len()).map(|l| self.experts_resident_in(l)).sum()
    }

    /// Number of routed experts of a decoder layer in memory.
    pub fn experts_resident_in(&self, layer: usize) -> usize {
        let loaded = self.experts.get(layer).map_or(0, |layer| layer.iter().flatten().count());
        loaded + self.stream.as_ref().map_or(0, |cache| cache.resident_in(layer))
    }

    /// All matrices that stay in memory: those outside the routed experts, and then those of the experts that are loaded (of
    /// streamed ones none).
    pub fn resident_matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.matrices.values().chain(self.resident_experts().flat_map(|e| [&e.gate, &e.up, &e.down]))
    }

    fn resident_experts(&self) -> impl Iterator<Item = &Expert> {
        self.experts.iter().flatten().flatten()
    }

    /// Bytes that all weights of the model would take in memory.
    pub fn model_bytes(&self) -> u64 {
        let c = &self.checkpoint;
        plan::skeleton_bytes(c) + (c.total_bytes() - c.non_expert_bytes())
    }

    /// The largest equal number of experts per MoE layer that fits; see [`crate::memory_plan`].
    ///
    /// # Errors
    /// Not even as many experts fit as one token uses.
    pub fn memory_plan(&self, budget_bytes: u64, kv_bytes: u64, overhead_bytes: u64) -> Result<MemoryPlan> {
        plan::memory_plan(&self.checkpoint, budget_bytes, kv_bytes, overhead_bytes)
    }
}

fn same_shape(role: Role, old: &Matrix, new: &Matrix) -> Result<()> {
    let (old, new) = ((old.rows, old.cols), (new.rows, new.cols));
    if old == new { Ok(()) } else { Err(ResidencyError::OtherShape { role, old, new }) }
}
