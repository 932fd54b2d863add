//! Where each expert is, and what goes when room is needed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use quorate_formats::Checkpoint;

use super::reader::Job;
use super::{CachePolicy, PINNED_SHARE, StreamStats};
use crate::buffer::Buffer;
use crate::error::{ResidencyError, Result};
use crate::load::{Layout, Way};
use crate::matrix::Expert;

/// Weight of one token in the running rate of use: about the last 64 tokens count.
const MEMORY: f32 = 1.0 / 64.0;

/// Chance of use below which experts are not told apart.
const CHANCE_MIN: f32 = 1e-3;

/// Where an expert is.
pub(super) enum Content {
    /// Not in memory.
    Absent,
    /// To be read.
    Queued,
    /// Being read.
    Reading,
    /// In memory.
    Here(Arc<Expert>),
    /// It was wanted and could not be read.
    Failed(ResidencyError),
}

/// One expert.
pub(super) struct Slot {
    pub content: Content,
    /// Bytes of its buffer.
    pub len: usize,
    pub pinned: bool,
    /// Visits that want it and have not received it.
    pub wanted: u32,
    /// Leases that hold it.
    pub users: u32,
    /// Predicted, and its layer not visited since.
    expected: bool,
    /// Read because of a prediction, and its layer not visited since.
    ahead: bool,
    /// When it was used last, in visits.
    used: u64,
    /// Share of tokens that use it, of late.
    rate: f32,
    /// How likely the next pass over its layer is to use it.
    chance: f32,
}

impl Slot {
    /// The error of a failed read; then it may be tried again.
    pub fn take_error(&mut self) -> Option<ResidencyError> {
        match std::mem::replace(&mut self.content, Content::Absent) {
            Content::Failed(error) => Some(error),
            other => {
                self.content = other;
                None
            }
        }
    }

    fn may_go(&self) -> bool {
        matches!(self.content, Content::Here(_)) && !self.pinned && self.wanted == 0 && self.users == 0
    }

    fn is_queued(&self) -> bool {
        matches!(self.content, Content::Queued)
    }
}

pub(super) struct State {
    /// By decoder layer, then expert.
    pub slots: Vec<Vec<Slot>>,
    policy: CachePolicy,
    room: u64,
    /// Bytes of all buffers: of experts in memory, of those being read, and spare ones.
    pub allocated: u64,
    pinned_bytes: u64,
    spare: Vec<Buffer>,
    /// Experts that someone waits for, and those that someone may want.
    urgent: VecDeque<(usize, usize)>,
    ahead: VecDeque<(usize, usize)>,
    /// Number of visits so far, and the layer of the last.
    clock: u64,
    at: usize,
    pub stop: bool,
    stats: StreamStats,
    readers_busy: usize,
    busy_since: Option<Instant>,
}

impl State {
    pub fn new(checkpoint: &Checkpoint, room: u64, policy: CachePolicy) -> Result<Self> {
        let spec = checkpoint.spec();
        let slot = |l: usize, e: usize, rate: f32| -> Result<Slot> {
            Ok(Slot {
                content: Content::Absent,
                len: Layout::of(checkpoint, l, e, Way::Uncached)?.len,
                pinned: false,
                wanted: 0,
                users: 0,
                expected: false,
                ahead: false,
                used: 0,
                rate,
                chance: rate,
            })
        };
        let slots = (0..spec.layers.len()).map(|l| {
            let (n, k) = spec.moe(l).map_or((0, 0), |moe| (moe.n_experts, moe.top_k));
            (0..n).map(|e| slot(l, e, k as f32 / n as f32)).collect()
        });
        Ok(Self {
            slots: slots.collect::<Result<_>>()?,
            policy,
            room,
            allocated: 0,
            pinned_bytes: 0,
            spare: Vec::new(),
            urgent: VecDeque::new(),
            ahead: VecDeque::new(),
            clock: 0,
            at: 0,
            stop: false,
            stats: StreamStats::default(),
            readers_busy: 0,
            busy_since: None,
        })
    }

    pub fn stats(&self) -> StreamStats {
        let mut stats = self.stats;
        stats.busy_s += self.busy_since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        stats
    }

    /// A pass that had to wait goes on.
    pub fn waited(&mut self, since: Option<Instant>) {
        self.stats.wait_s += since.map_or(0.0, |since| since.elapsed().as_secs_f64());
    }

    /// A reader begins or ends a read.
    pub fn reading(&mut self, begins: bool) {
        if begins {
            self.readers_busy += 1;
            self.busy_since.get_or_insert_with(Instant::now);
            return;
        }
        self.readers_busy -= 1;
        if self.readers_busy == 0 {
            self.stats.busy_s += self.busy_since.take().map_or(0.0, |since| since.elapsed().as_secs_f64());
        }
    }

    /// Pins as many of these as may be, and queues those that are not in memory; returns all that are pinned now.
    pub fn set_pinned(&mut self, best_first: &[(usize, usize)], rates: Option<&[Vec<f32>]>) -> Vec<(usize, usize)> {
        for (slots, rates) in self.slots.iter_mut().zip(rates.unwrap_or_default()) {
            for (slot, &rate) in slots.iter_mut().zip(rates) {
                (slot.rate, slot.chance) = (rate, rate.max(CHANCE_MIN));
            }
        }
        self.slots.iter_mut().flatten().for_each(|slot| slot.pinned = false);
        self.pinned_bytes = 0;
        let most = (self.room as f64 * PINNED_SHARE) as u64;
        let mut pinned = Vec::new();
        for &(l, e) in best_first {
            let len = self.slots[l][e].len as u64;
            if self.pinned_bytes + len > most || self.policy == CachePolicy::Lru {
                break;
            }
            let slot = &mut self.slots[l][e];
            if !slot.pinned {
                slot.pinned = true;
                self.pinned_bytes += len;
                self.queue(l, e);
                pinned.push((l, e));
            }
        }
        pinned
    }

    /// Sees to it that an expert is read soon.
    fn queue(&mut self, layer: usize, expert: usize) {
        let slot = &mut self.slots[layer][expert];
        match slot.content {
            Content::Absent => slot.content = Content::Queued,
            Content::Queued => {} // ahead of its time; now it is urgent
            Content::Reading | Content::Here(_) | Content::Failed(_) => return,
        }
        self.urgent.push_back((layer, expert));
    }

    /// Notes a wish: counts it, protects what is there, queues what is not.
    pub fn visit(&mut self, layer: usize, wanted: &[(usize, usize)], tokens: usize) {
        self.clock += 1;
        self.at = layer;
        self.count(layer, wanted);
        self.learn(layer, wanted, tokens);
        for &(e, _) in wanted {
            let slot = &mut self.slots[layer][e];
            slot.wanted += 1;
            slot.used = self.clock;
            self.queue(layer, e);
        }
        for slot in &mut self.slots[layer] {
            (slot.expected, slot.ahead) = (false, false);
        }
    }

    fn count(&mut self, layer: usize, wanted: &[(usize, usize)]) {
        let (slots, stats) = (&self.slots[layer], &mut self.stats);
        stats.wanted += wanted.len() as u64;
        let predicted = slots.iter().filter(|slot| slot.expected).count() as u64;
        if predicted > 0 {
            stats.predicted += predicted;
            stats.predictable += wanted.len() as u64;
        }
        for slot in wanted.iter().map(|&(e, _)| &slots[e]) {
            let here = matches!(slot.content, Content::Here(_));
            stats.predicted_right += u64::from(slot.expected);
            stats.hits += u64::from(here);
            stats.hits_ahead += u64::from(here && slot.ahead);
        }
    }

    /// Updates how often each expert of a layer is used.
    fn learn(&mut self, layer: usize, wanted: &[(usize, usize)], tokens: usize) {
        let tokens = tokens.max(1) as f32;
        let weight = 1.0 - (1.0 - MEMORY).powf(tokens);
        for slot in &mut self.slots[layer] {
            slot.rate *= 1.0 - weight;
        }
        for &(e, uses) in wanted {
            self.slots[layer][e].rate += weight * uses as f32 / tokens;
        }
        for slot in &mut self.slots[layer] {
            let chance = if tokens > 1.0 { 1.0 - (1.0 - slot.rate.min(1.0)).powf(tokens) } else { slot.rate };
            slot.chance = chance.max(CHANCE_MIN);
        }
    }

    /// Notes a prediction, and queues what is not in memory.
    pub fn expect(&mut self, layer: usize, experts: &[usize]) {
        for &e in experts {
            let slot = &mut self.slots[layer][e];
            slot.expected = true;
            if matches!(slot.content, Content::Absent) {
                slot.content = Content::Queued;
                self.ahead.push_back((layer, e));
            }
        }
    }

    /// Takes out of `waiting` what is in memory, up to half of the room that is not pinned.
    pub fn lease(&mut self, layer: usize, waiting: &mut Vec<usize>) -> Result<Vec<(usize, Arc<Expert>)>> {
        let most = (self.room - self.pinned_bytes) / 2;
        let (mut leased, mut bytes) = (Vec::new(), 0);
        let mut failed = None;
        waiting.retain(|&e| {
            let slot = &mut self.slots[layer][e];
            failed = failed.take().or_else(|| slot.take_error());
            let Content::Here(expert) = &slot.content else { return true };
            let own = if slot.pinned { 0 } else { slot.len as u64 };
            if bytes + own > most && !leased.is_empty() {
                return true;
            }
            bytes += own;
            leased.push((e, expert.clone()));
            slot.wanted -= 1;
            slot.users += 1;
            false
        });
        match failed {
            None => Ok(leased),
            Some(error) => {
                // They are still wanted, by someone who will try again or drop the visit.
                for (e, expert) in leased {
                    drop(expert);
                    let slot = &mut self.slots[layer][e];
                    (slot.wanted, slot.users) = (slot.wanted + 1, slot.users - 1);
                    waiting.push(e);
                }
                Err(error)
            }
        }
    }

    /// Queues what is wanted and neither there nor under way, since an error took it away; whether there was any.
    pub fn want_again(&mut self, layer: usize, waiting: &[usize]) -> bool {
        let mut any = false;
        for &e in waiting {
            if matches!(self.slots[layer][e].content, Content::Absent) {
                self.queue(layer, e);
                any = true;
            }
        }
        any
    }

    /// A visit ends without these.
    pub fn give_up(&mut self, layer: usize, waiting: &[usize]) {
        for &e in waiting {
            let slot = &mut self.slots[layer][e];
            slot.wanted -= 1;
            if slot.wanted == 0 {
                drop(slot.take_error());
            }
        }
    }

    /// The next expert to read, if there is one and room for it.
    pub fn next_job(&mut self) -> Option<Job> {
        while let Some(&(layer, expert)) = self.urgent.front() {
            let slot = &mut self.slots[layer][expert];
            if !slot.is_queued() || (slot.wanted == 0 && !slot.pinned) {
                // Read already, or nobody waits for it any more.
                if slot.is_queued() {
                    slot.content = Content::Absent;
                }
                self.urgent.pop_front();
                continue;
            }
            let job = self.job(layer, expert, false)?;
            self.urgent.pop_front();
            return Some(job);
        }
        while let Some((layer, expert)) = self.ahead.pop_front() {
            let slot = &mut self.slots[layer][expert];
            if !slot.is_queued() {
                continue;
            }
            let job = if slot.expected { self.job(layer, expert, true) } else { None };
            let slot = &mut self.slots[layer][expert];
            match job {
                Some(job) => {
                    slot.ahead = true;
                    return Some(job);
                }
                None => slot.content = Content::Absent,
            }
        }
        None
    }

    /// Makes room for an expert.
    fn job(&mut self, layer: usize, expert: usize, ahead: bool) -> Option<Job> {
        let len = self.slots[layer][expert].len;
        let buffer = loop {
            if let Some(i) = self.spare.iter().rposition(|buffer| buffer.len() == len) {
                break Some(self.spare.swap_remove(i));
            }
            if self.allocated + len as u64 <= self.room {
                self.allocated += len as u64;
                break None;
            }
            // Spare memory of another length goes back to the system, and if there is none an expert goes.
            match self.spare.pop() {
                Some(buffer) => self.allocated -= buffer.len() as u64,
                None => self.evict(ahead)?,
            }
        };
        self.slots[layer][expert].content = Content::Reading;
        Some(Job { layer, expert, buffer })
    }

    /// Takes the least useful expert out of memory; `None` if all are needed.
    fn evict(&mut self, for_ahead: bool) -> Option<()> {
        let mut worst: Option<(f32, usize, usize)> = None;
        for (l, slots) in self.slots.iter().enumerate() {
            // In layers, from the one at work; its own experts are wanted again only in the next pass.
            let layers = self.slots.len();
            let away = (l + layers - self.at - 1) % layers + 1;
            for (e, slot) in slots.iter().enumerate().filter(|(_, slot)| slot.may_go()) {
                let remoteness = match (self.policy, slot.ahead || slot.expected) {
                    (CachePolicy::Lru, _) => (self.clock - slot.used) as f32,
                    (_, true) if for_ahead => continue,
                    (_, true) => 0.0,
                    // In passes until it is used, as far as one can expect.
                    (_, false) => away as f32 / layers as f32 + 1.0 / slot.chance,
                };
                if worst.is_none_or(|(most, ..)| remoteness > most) {
                    worst = Some((remoteness, l, e));
                }
            }
        }
        let (_, l, e) = worst?;
        let content = std::mem::replace(&mut self.slots[l][e].content, Content::Absent);
        if let Content::Here(expert) = content {
            match Arc::into_inner(expert).and_then(Expert::into_buffer) {
                Some(buffer) => self.spare.push(buffer),
                // Somebody keeps a handle on its matrices; the memory is theirs now.
                None => self.allocated -= self.slots[l][e].len as u64,
            }
        }
        Some(())
    }

    /// A read has ended, after so many seconds.
    pub fn arrived(&mut self, layer: usize, expert: usize, result: Result<Expert>, seconds: f64) {
        self.stats.read_s += seconds;
        let slot = &mut self.slots[layer][expert];
        match result {
            Ok(expert) => {
                self.stats.reads += 1;
                self.stats.read_bytes += expert.bytes();
                slot.content = Content::Here(Arc::new(expert));
            }
            Err(error) => {
                self.allocated -= slot.len as u64;
                let waited_for = slot.wanted > 0 || slot.pinned;
                slot.content = if waited_for { Content::Failed(error) } else { Content::Absent };
            }
        }
    }
}
