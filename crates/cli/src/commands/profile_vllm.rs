//! `quorate profile --from-vllm`: the tasks' texts are routed by a running vLLM server.

use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use quorate_eval::encode::EncodedItem;
use quorate_lens::interchange::TraceShape;
use quorate_lens::{ProfileData, RouterStats, Seen, prompt_keys};
use quorate_model::Model;

use super::profile::SAVE_AFTER;
use crate::common::{Common, interrupted};
use crate::vllm::Server;

/// Which of a task's items are profiled and which are held out, by number.
pub struct Order {
    pub train: Vec<usize>,
    pub held: Vec<usize>,
}

/// What is gathered for one task.
pub struct Job<'a> {
    pub server: &'a Server,
    pub shape: TraceShape,
    pub task: &'a str,
    pub items: &'a [EncodedItem],
    pub order: Order,
}

impl Job<'_> {
    /// Gathers the task's routing from where `data` stopped (`done_batches` counts items). What is gathered is given to `save`
    /// now and then, on interruption, and if the server fails. `None` if interrupted.
    pub fn gather(
        &self,
        common: &Common,
        mut data: ProfileData,
        save: &dyn Fn(&ProfileData) -> Result<()>,
    ) -> Result<Option<ProfileData>> {
        let all: Vec<usize> = self.order.train.iter().chain(&self.order.held).copied().collect();
        let done = data.done_batches.min(all.len());
        if done > 0 {
            common.note(&format!("{}: going on at {done} of {} items", self.task, all.len()));
        }
        data.stats.see_only(Seen::Counts);
        data.heldout.see_only(Seen::Counts);
        let mut progress = common.progress(self.task, all.len() as u64, "items");
        let mut saved = Instant::now();
        for (number, &item) in all.iter().enumerate().skip(done) {
            if interrupted() {
                save(&data)?;
                return Ok(None);
            }
            let stats = if number < self.order.train.len() { &mut data.stats } else { &mut data.heldout };
            if let Err(error) = self.add(&self.items[item], stats) {
                save(&data)?;
                let (task, of) = (self.task, all.len());
                return Err(error).with_context(|| {
                    format!("{task}: stopped at item {number} of {of}; help: the same command goes on from there")
                });
            }
            data.done_batches += 1;
            progress.set(data.done_batches as u64);
            if saved.elapsed() > SAVE_AFTER {
                save(&data)?;
                saved = Instant::now();
            }
        }
        progress.finish();
        save(&data)?;
        Ok(Some(data))
    }

    /// Counts one item: all of it or, on an error, nothing, so that what is saved can be gone on with.
    fn add(&self, item: &EncodedItem, stats: &mut RouterStats) -> Result<()> {
        let experts = self.server.routed_experts(&[item.prompt.as_slice(), &item.answer].concat())?;
        let mut counted = stats.clone();
        let added = experts.add_to(&mut counted, &self.shape, item.prompt.len());
        added.map_err(|e| {
            anyhow!(
                "the server's routing does not fit the model: {e}; help: -m must be the model that the server serves"
            )
        })?;
        *stats = counted;
        Ok(())
    }

    /// Adds the keys of the prompts, so that they are recognised: computed here, with the weights before the first router (or
    /// before that of `key_layer`).
    pub fn add_keys(&self, model: &mut Model, key_layer: usize, data: &mut ProfileData) -> Result<()> {
        let prompts = |numbers: &[usize]| numbers.iter().map(|&i| self.items[i].prompt.as_slice()).collect::<Vec<_>>();
        data.keys = prompt_keys(model, &prompts(&self.order.train), key_layer)?;
        data.heldout_keys = prompt_keys(model, &prompts(&self.order.held), key_layer)?;
        Ok(())
    }
}
