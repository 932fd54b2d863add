//! Exact streaming: experts that are read when a token needs them, into a bounded number of bytes.
//!
//! A pass announces the experts that it wants of a layer ([`ExpertCache::visit`]) and receives them in leases, as they
//! come: those that are there at once, the others while it computes. Reader threads fetch them past the system's cache.
//! What the next layer may want can be announced too ([`ExpertCache::expect`]); it is read when nothing else is to be.
//! Which experts are there never changes a result, only how long it takes.

mod reader;
#[cfg(target_os = "linux")]
mod ring;
mod state;

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use quorate_formats::Checkpoint;

use crate::error::{ResidencyError, Result};
use crate::load::{Layout, Way};
use crate::matrix::Expert;
use crate::weights::Progress;
use state::{Content, State};

/// Which experts stay when room is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CachePolicy {
    /// Those used last.
    Lru,
    /// The pinned ones, and of the others those that are likely to be used soonest: by how often an expert was used, and
    /// by how far away its layer is.
    Pinned,
    /// The same, and what the next layer is expected to want is read ahead.
    #[default]
    Prefetch,
}

/// Who reads experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StreamIo {
    /// io_uring where it can be had, else threads.
    #[default]
    Auto,
    /// Some threads, each of which waits for its reads.
    Threads,
}

/// How experts are streamed.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamOptions {
    /// Bytes for all experts in memory.
    pub room_bytes: u64,
    /// What stays.
    pub policy: CachePolicy,
    /// Who reads.
    pub io: StreamIo,
    /// Reader threads, if it is threads.
    pub readers: usize,
}

/// Reader threads unless told otherwise: two keep a disk busy, the third works while one of them checks what it read.
pub const READERS: usize = 3;

/// The least room, in experts: some to compute with while others are read.
const LEAST_EXPERTS: u64 = 4;

/// The share of the room that pinned experts may take; the rest adapts.
const PINNED_SHARE: f64 = 0.75;

/// Bytes of one expert's buffer at most.
fn largest(checkpoint: &Checkpoint) -> Result<u64> {
    let spec = checkpoint.spec();
    let mut most = 0;
    for l in spec.moe_layers() {
        for e in 0..spec.moe(l).map_or(0, |moe| moe.n_experts) {
            most = most.max(Layout::of(checkpoint, l, e, Way::Uncached)?.len as u64);
        }
    }
    Ok(most)
}

/// The least bytes of room that streaming needs.
///
/// # Errors
/// The model has no such experts, which an open checkpoint rules out.
pub fn least_stream_bytes(checkpoint: &Checkpoint) -> Result<u64> {
    Ok(LEAST_EXPERTS * largest(checkpoint)?)
}

/// The bytes of room in which all experts stay once they were read.
///
/// # Errors
/// As [`least_stream_bytes`].
pub fn most_stream_bytes(checkpoint: &Checkpoint) -> Result<u64> {
    let spec = checkpoint.spec();
    let mut sum = 0;
    for l in spec.moe_layers() {
        for e in 0..spec.moe(l).map_or(0, |moe| moe.n_experts) {
            sum += Layout::of(checkpoint, l, e, Way::Uncached)?.len as u64;
        }
    }
    Ok(sum)
}

/// What streaming did. Counts of experts are per layer and pass: an expert that many tokens of a batch use counts once.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StreamStats {
    /// Experts that were wanted.
    pub wanted: u64,
    /// Of these, in memory when they were wanted.
    pub hits: u64,
    /// Of these, in memory because they were read ahead.
    pub hits_ahead: u64,
    /// Experts that were predicted for a layer.
    pub predicted: u64,
    /// Of these, wanted.
    pub predicted_right: u64,
    /// Experts that were wanted where there was a prediction.
    pub predictable: u64,
    /// Experts read.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Seconds that readers spent reading, summed over them.
    pub read_s: f64,
    /// Seconds during which at least one of them was reading.
    pub busy_s: f64,
    /// Seconds that passes waited for experts.
    pub wait_s: f64,
}

impl StreamStats {
    /// What happened since `before`.
    pub fn since(&self, before: &Self) -> Self {
        self.with(before, |now, before| now - before, |now, before| now - before)
    }

    /// Both together.
    pub fn plus(&self, other: &Self) -> Self {
        self.with(other, |a, b| a + b, |a, b| a + b)
    }

    fn with(&self, other: &Self, n: fn(u64, u64) -> u64, s: fn(f64, f64) -> f64) -> Self {
        Self {
            wanted: n(self.wanted, other.wanted),
            hits: n(self.hits, other.hits),
            hits_ahead: n(self.hits_ahead, other.hits_ahead),
            predicted: n(self.predicted, other.predicted),
            predicted_right: n(self.predicted_right, other.predicted_right),
            predictable: n(self.predictable, other.predictable),
            reads: n(self.reads, other.reads),
            read_bytes: n(self.read_bytes, other.read_bytes),
            read_s: s(self.read_s, other.read_s),
            busy_s: s(self.busy_s, other.busy_s),
            wait_s: s(self.wait_s, other.wait_s),
        }
    }

    /// Share of wanted experts that were in memory; `None` if none was wanted.
    pub fn hit_rate(&self) -> Option<f64> {
        (self.wanted > 0).then(|| self.hits as f64 / self.wanted as f64)
    }

    /// Share of wanted experts that had been predicted; `None` without predictions.
    pub fn prediction_rate(&self) -> Option<f64> {
        (self.predictable > 0).then(|| self.predicted_right as f64 / self.predictable as f64)
    }

    /// Bytes a second while the disk was read; `None` if it was not.
    pub fn bandwidth(&self) -> Option<f64> {
        (self.busy_s > 0.0).then(|| self.read_bytes as f64 / self.busy_s)
    }
}

/// Experts in a bounded number of bytes. Shared by any number of passes at once.
pub struct ExpertCache {
    options: StreamOptions,
    shared: Arc<Shared>,
    readers: Vec<JoinHandle<()>>,
    /// Whether they are one, with io_uring.
    ring: bool,
}

struct Shared {
    checkpoint: Arc<Checkpoint>,
    state: Mutex<State>,
    /// There may be something to read, or room for it.
    work: Condvar,
    /// An expert came, or failed to.
    ready: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for ExpertCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExpertCache").field("options", &self.options).finish_non_exhaustive()
    }
}

impl ExpertCache {
    /// An empty cache.
    ///
    /// # Errors
    /// Less room than the least that computes, or the system starts no thread.
    pub(crate) fn new(checkpoint: Arc<Checkpoint>, options: StreamOptions) -> Result<Self> {
        let needed_bytes = least_stream_bytes(&checkpoint)?;
        if options.room_bytes < needed_bytes {
            return Err(ResidencyError::NoRoomToStream { budget_bytes: options.room_bytes, needed_bytes });
        }
        let state = Mutex::new(State::new(&checkpoint, options.room_bytes, options.policy)?);
        let shared = Arc::new(Shared { checkpoint, state, work: Condvar::new(), ready: Condvar::new() });
        let mut cache = Self { options, shared, readers: Vec::new(), ring: false };
        if cache.options.io == StreamIo::Auto && cache.start_ring()? {
            cache.ring = true;
            return Ok(cache);
        }
        for i in 0..cache.options.readers.max(1) {
            let shared = cache.shared.clone();
            let reader = thread::Builder::new().name(format!("reader-{i}")).spawn(move || shared.serve());
            cache.readers.push(reader.map_err(ResidencyError::NoThread)?);
        }
        Ok(cache)
    }

    /// Starts the thread that reads through io_uring, where that can be had; whether it can.
    #[cfg(target_os = "linux")]
    fn start_ring(&mut self) -> Result<bool> {
        let Some(ring) = ring::Ring::open(&self.shared.checkpoint) else { return Ok(false) };
        let shared = self.shared.clone();
        let reader = thread::Builder::new().name("reader".to_owned()).spawn(move || ring.serve(&shared));
        self.readers.push(reader.map_err(ResidencyError::NoThread)?);
        Ok(true)
    }

    #[cfg(not(target_os = "linux"))]
    fn start_ring(&mut self) -> Result<bool> {
        Ok(false)
    }

    /// Whether experts are read through io_uring.
    pub fn reads_by_ring(&self) -> bool {
        self.ring
    }

    /// How it was set up.
    pub fn options(&self) -> &StreamOptions {
        &self.options
    }

    /// What was done so far.
    pub fn stats(&self) -> StreamStats {
        self.shared.lock().stats()
    }

    /// Bytes of all buffers now.
    pub fn resident_bytes(&self) -> u64 {
        self.shared.lock().allocated
    }

    /// Experts of a decoder layer in memory now.
    pub fn resident_in(&self, layer: usize) -> usize {
        let state = self.shared.lock();
        let here = |slot: &&state::Slot| matches!(slot.content, Content::Here(_));
        state.slots.get(layer).map_or(0, |slots| slots.iter().filter(here).count())
    }

    /// Experts that were pinned.
    pub fn pinned(&self) -> usize {
        self.shared.lock().slots.iter().flatten().filter(|slot| slot.pinned).count()
    }

    /// Reads experts, given best first as decoder layer and expert, and keeps them whatever happens, as far as they fit
    /// the share of the room that may be pinned. Others that were pinned no longer are.
    ///
    /// `rates` says for each decoder layer how likely each expert is to be used by a token, as far as that is known.
    ///
    /// # Errors
    /// A read that failed, or a cancel by `progress`; what was read stays.
    pub(crate) fn pin(
        &self,
        best_first: &[(usize, usize)],
        rates: Option<&[Vec<f32>]>,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let mut waiting = self.shared.lock().set_pinned(best_first, rates);
        let all = waiting.clone();
        let bytes = |experts: &[(usize, usize)]| -> u64 {
            experts.iter().map(|&(l, e)| self.shared.checkpoint.expert_bytes(l, e)).sum()
        };
        self.shared.work.notify_all();
        let total = bytes(&all);
        let mut state = self.shared.lock();
        loop {
            if !progress(total - bytes(&waiting), total) {
                return Err(ResidencyError::Cancelled);
            }
            let failed = waiting.iter().find_map(|&(l, e)| state.slots[l][e].take_error());
            if let Some(error) = failed {
                return Err(error);
            }
            waiting.retain(|&(l, e)| !matches!(state.slots[l][e].content, Content::Here(_)));
            if waiting.is_empty() {
                return Ok(());
            }
            state = self.shared.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Announces the experts that a pass over `tokens` tokens wants of a decoder layer, each with the number of tokens
    /// that use it, in the order in which they are wanted.
    ///
    /// # Panics
    /// If there is no such expert.
    pub fn visit(&self, layer: usize, wanted: &[(usize, usize)], tokens: usize) -> Visit<'_> {
        self.shared.lock().visit(layer, wanted, tokens);
        self.shared.work.notify_all();
        Visit { cache: self, layer, waiting: wanted.iter().map(|&(e, _)| e).collect() }
    }

    /// Whether [`ExpertCache::expect`] has any use.
    pub fn reads_ahead(&self) -> bool {
        self.options.policy == CachePolicy::Prefetch
    }

    /// Announces experts that a later decoder layer may want, the most likely first. They are read when nothing that is
    /// wanted is to be, and push out neither what is wanted now nor each other.
    ///
    /// # Panics
    /// If there is no such expert.
    pub fn expect(&self, layer: usize, experts: &[usize]) {
        self.shared.lock().expect(layer, experts);
        self.shared.work.notify_all();
    }
}

impl Drop for ExpertCache {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_all();
        for reader in self.readers.drain(..) {
            // A reader that panicked has nothing to hand over.
            let _ = reader.join();
        }
    }
}

/// The wish of a pass for experts of one layer.
pub struct Visit<'c> {
    cache: &'c ExpertCache,
    layer: usize,
    /// Experts not given out yet, in the order of the wish.
    waiting: Vec<usize>,
}

impl Visit<'_> {
    /// Some of the experts, at least one: those that are in memory, but no more than half of the room, so that the
    /// others can be read meanwhile. Waits if there is none. `None` once all were given out.
    ///
    /// # Errors
    /// One of them cannot be read. The visit may go on, and it is tried again.
    pub fn more(&mut self) -> Result<Option<Lease<'_>>> {
        if self.waiting.is_empty() {
            return Ok(None);
        }
        let mut state = self.cache.shared.lock();
        let mut since = None;
        loop {
            let experts = state.lease(self.layer, &mut self.waiting)?;
            if !experts.is_empty() {
                state.waited(since);
                return Ok(Some(Lease { cache: self.cache, layer: self.layer, experts }));
            }
            if state.want_again(self.layer, &self.waiting) {
                self.cache.shared.work.notify_all();
            }
            since.get_or_insert_with(Instant::now);
            state = self.cache.shared.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        self.cache.shared.lock().give_up(self.layer, &self.waiting);
        self.cache.shared.work.notify_all();
    }
}

/// Experts to compute with. While it lives they stay.
pub struct Lease<'v> {
    cache: &'v ExpertCache,
    layer: usize,
    experts: Vec<(usize, Arc<Expert>)>,
}

impl Lease<'_> {
    /// The experts with their numbers.
    pub fn experts(&self) -> impl Iterator<Item = (usize, &Expert)> {
        self.experts.iter().map(|(e, expert)| (*e, expert.as_ref()))
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let mut state = self.cache.shared.lock();
        for (e, expert) in self.experts.drain(..) {
            drop(expert);
            state.slots[self.layer][e].users -= 1;
        }
        drop(state);
        self.cache.shared.work.notify_all();
    }
}
