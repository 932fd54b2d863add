//! The threads that read experts.

use std::sync::PoisonError;
use std::time::Instant;

use super::Shared;
use crate::buffer::Buffer;
use crate::error::Result;
use crate::load::{Layout, Way, fill_expert};
use crate::matrix::Expert;

/// One expert to be read, with room for it.
pub(super) struct Job {
    pub layer: usize,
    pub expert: usize,
    /// Memory of one that was dropped; else there is room for new memory.
    pub buffer: Option<Buffer>,
}

impl Shared {
    /// The life of a reader.
    pub(super) fn serve(&self) {
        let mut state = self.lock();
        while !state.stop {
            let Some(job) = state.next_job() else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.reading(true);
            drop(state);
            let (layer, expert, start) = (job.layer, job.expert, Instant::now());
            let result = self.read(job);
            state = self.lock();
            state.reading(false);
            state.arrived(layer, expert, result, start.elapsed().as_secs_f64());
            self.ready.notify_all();
            // What came may be in the way of nobody, and make room for what waits.
            self.work.notify_all();
        }
    }

    fn read(&self, job: Job) -> Result<Expert> {
        let layout = Layout::of(&self.checkpoint, job.layer, job.expert, Way::Uncached)?;
        let buffer = match job.buffer {
            Some(buffer) => buffer,
            None => Buffer::pages(layout.len)?,
        };
        fill_expert(&self.checkpoint, job.layer, job.expert, layout, buffer, Way::Uncached)
    }
}
