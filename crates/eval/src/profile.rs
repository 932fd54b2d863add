//! Profiling a task: one streaming pass over its items, in steps that can be saved and resumed.

use quorate_lens::{ExpertMap, KeyProbe, ProfileData, Profiler, RouterStats};
use quorate_model::{Chain, KvCache, Lens, Model, ModelError};

use crate::encode::{EncodedItem, batches};

/// Tokens of one forward pass, about.
const BATCH_TOKENS: usize = 512;
/// Items of one forward pass at most.
const BATCH_ITEMS: usize = 64;

/// Which items are profiled, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// Every so-many-th item is held out: it is not profiled but tells how well the profile serves. 0 holds out none.
    pub holdout_every: usize,
    /// MoE layer at whose router retrieval keys are taken.
    pub key_layer: usize,
    /// Shard `0.0` of `0.1`: items whose number modulo `0.1` is `0.0`.
    pub shard: (usize, usize),
}

impl Default for Split {
    fn default() -> Split {
        Split { holdout_every: 5, key_layer: 0, shard: (0, 1) }
    }
}

impl Split {
    fn held_out(&self, item: usize) -> bool {
        self.holdout_every > 0 && item % self.holdout_every == self.holdout_every - 1
    }

    /// Numbers of the shard's items: first those to profile, then those held out.
    pub fn order(&self, items: usize) -> (Vec<usize>, Vec<usize>) {
        let (index, of) = self.shard;
        (0..items).filter(|i| i % of == index).partition(|&i| !self.held_out(i))
    }
}

/// A profile under way.
pub struct ProfileRun<'a> {
    model: &'a Model,
    cache: KvCache,
    items: Vec<EncodedItem>,
    /// Runs of `items`; those from `first_heldout` on are held out.
    runs: Vec<std::ops::Range<usize>>,
    first_heldout: usize,
    key_layer: usize,
    profile: ProfileData,
}

impl<'a> ProfileRun<'a> {
    /// Prepares a pass over the items of `split`, going on where `profile` stopped.
    pub fn new(model: &'a Model, items: &[EncodedItem], split: Split, profile: ProfileData) -> ProfileRun<'a> {
        let (train, held) = split.order(items.len());
        let pick = |numbers: &[usize]| numbers.iter().map(|&i| items[i].clone()).collect::<Vec<_>>();
        let (mut all, held) = (pick(&train), pick(&held));
        let mut runs = batches(&all, BATCH_TOKENS, BATCH_ITEMS);
        let first_heldout = runs.len();
        let shift = |r: std::ops::Range<usize>| r.start + train.len()..r.end + train.len();
        runs.extend(batches(&held, BATCH_TOKENS, BATCH_ITEMS).into_iter().map(shift));
        all.extend(held);
        let (cache, key_layer) = (model.new_cache(BATCH_ITEMS), split.key_layer);
        ProfileRun { model, cache, items: all, runs, first_heldout, key_layer, profile }
    }

    /// Tokens of all items.
    pub fn total_tokens(&self) -> usize {
        self.items.iter().map(EncodedItem::len).sum()
    }

    /// Tokens of the batches done.
    pub fn done_tokens(&self) -> usize {
        let done = self.runs.get(..self.profile.done_batches).and_then(<[_]>::last).map_or(0, |r| r.end);
        self.items[..done].iter().map(EncodedItem::len).sum()
    }

    /// What is gathered so far.
    pub fn profile(&self) -> &ProfileData {
        &self.profile
    }

    /// What was gathered.
    pub fn into_profile(self) -> ProfileData {
        self.profile
    }

    /// Does one batch; `false` when all are done.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn step(&mut self) -> Result<bool, ModelError> {
        let Some(run) = self.runs.get(self.profile.done_batches).cloned() else { return Ok(false) };
        let held = self.profile.done_batches >= self.first_heldout;
        let stats = if held { &mut self.profile.heldout } else { &mut self.profile.stats };
        let taken = std::mem::replace(stats, RouterStats::new(ExpertMap::new(Vec::new(), Vec::new())));
        let mut profiler = Profiler::new(taken);
        let mut probe = KeyProbe::new(self.model.spec(), self.key_layer, false);
        let mut segments = Vec::with_capacity(run.len());
        for (slot, item) in self.items[run.clone()].iter().enumerate() {
            self.cache.truncate(slot, 0);
            let mut segment = item.segment(slot);
            segment.logits = quorate_model::LogitRows::None;
            segments.push(segment);
        }
        let mut lenses: Vec<&mut dyn Lens> = vec![&mut profiler];
        lenses.extend(probe.as_mut().map(|p| p as &mut dyn Lens));
        let outcome = self.model.forward(&segments, &mut self.cache, &mut Chain(lenses));
        profiler.count_items(run.len() as u64);
        *stats = profiler.into_stats();
        outcome?;
        let keys = if held { &mut self.profile.heldout_keys } else { &mut self.profile.keys };
        keys.extend(probe.map(|mut p| p.take()).unwrap_or_default());
        self.profile.done_batches += 1;
        Ok(true)
    }
}
