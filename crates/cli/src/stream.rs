//! `--on-miss stream`: experts read as tokens need them, inside `--memory`.

use std::sync::OnceLock;

use anyhow::{Result, bail};
use clap::ValueEnum;
use quorate_lens::{ExpertMap, Pattern};
use quorate_model::{KeptExperts, Model, PREFILL_CHUNK, buffer_bytes};
use quorate_residency::{
    CachePolicy, READERS, ResidencyError, StreamIo, StreamOptions, StreamStats, least_stream_bytes, most_stream_bytes,
};
use serde_json::{Value, json};

use crate::common::{Common, human_bytes, rss_bytes};
use crate::experts::Beside;

/// [`CachePolicy`] on the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum CacheArg {
    /// The experts used last
    Lru,
    /// The task's best experts are pinned; of the others those that are likely to be used soon
    Pinned,
    /// The same, and the next layer's experts are read ahead
    #[default]
    Prefetch,
}

impl From<CacheArg> for CachePolicy {
    fn from(cache: CacheArg) -> CachePolicy {
        match cache {
            CacheArg::Lru => CachePolicy::Lru,
            CacheArg::Pinned => CachePolicy::Pinned,
            CacheArg::Prefetch => CachePolicy::Prefetch,
        }
    }
}

/// [`StreamIo`] on the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum StreamIoArg {
    /// io_uring where the system has it, else threads
    #[default]
    Auto,
    /// Threads that wait for their reads
    Threads,
}

impl From<StreamIoArg> for StreamIo {
    fn from(io: StreamIoArg) -> StreamIo {
        match io {
            StreamIoArg::Auto => StreamIo::Auto,
            StreamIoArg::Threads => StreamIo::Threads,
        }
    }
}

/// How experts are to be streamed.
#[derive(Clone, Copy, Debug)]
pub struct Streaming {
    pub policy: CachePolicy,
    pub io: StreamIo,
    /// Bytes of the whole process, if they are bounded.
    pub memory: Option<u64>,
}

/// What is known of the experts that will be used.
#[derive(Default)]
pub struct Favourites {
    /// Decoder layer and expert.
    best_first: Vec<(usize, usize)>,
    /// By decoder layer: the share of tokens that use each expert.
    rates: Option<Vec<Vec<f32>>>,
}

impl Favourites {
    /// By how often the task's tokens chose each expert.
    pub fn of_pattern(pattern: &Pattern, model: &Model) -> Result<Favourites> {
        let spec = model.spec();
        pattern.check_model(model.checkpoint().fingerprint())?;
        let map = &pattern.map;
        let Some(table) = pattern.scores.first().filter(|_| *map == ExpertMap::of(spec)) else {
            bail!("pattern `{}` does not fit the model; help: profile the task again", pattern.info.name);
        };
        let mut rates = vec![Vec::new(); spec.layers.len()];
        let mut ranked = Vec::new();
        for (moe, &layer) in map.layers.iter().enumerate() {
            let counts = &table.counts[map.range(moe)];
            let top_k = spec.moe(layer).map_or(0, |moe| moe.top_k) as f64;
            // An expert that was never seen is a little likely all the same.
            let total: f64 = counts.iter().map(|&c| c as f64 + 1.0).sum();
            rates[layer] = counts.iter().map(|&c| (top_k * (c as f64 + 1.0) / total).min(1.0) as f32).collect();
            ranked.extend(rates[layer].iter().enumerate().map(|(e, &rate)| (rate, layer, e)));
        }
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let best_first = ranked.into_iter().map(|(_, layer, expert)| (layer, expert)).collect();
        Ok(Favourites { best_first, rates: Some(rates) })
    }

    /// The experts that a plan keeps, layer by layer in turn.
    pub fn of_plan(kept: &[KeptExperts], model: &Model) -> Favourites {
        let layers = model.spec().moe_layers();
        let longest = kept.iter().flatten().map(Vec::len).max().unwrap_or(0);
        let ith = |i: usize| layers.iter().zip(kept).filter_map(move |(&l, ids)| Some((l, *ids.as_ref()?.get(i)?)));
        Favourites { best_first: (0..longest).flat_map(ith).collect(), rates: None }
    }
}

/// What the process held besides weights when the model was open: program, tokenizer, index of the file.
static BASE: OnceLock<u64> = OnceLock::new();

/// The least that is reckoned with; systems that do not tell what a process holds are taken to be so.
pub const BASE_BYTES: u64 = 16 << 20;

/// Notes what the process holds, before any pass.
pub fn note_base(model: &Model) {
    let rss = rss_bytes().unwrap_or(0);
    BASE.get_or_init(|| rss.saturating_sub(model.weights().resident_bytes()).max(BASE_BYTES));
}

/// Bytes that the process will hold besides weights and context.
pub fn overhead_bytes(model: &Model, beside: Beside) -> u64 {
    BASE.get().copied().unwrap_or(BASE_BYTES) + buffer_bytes(model.spec(), beside.logit_rows)
}

/// Bytes of the rows that streamed experts gather for their slots and put back, at most.
fn gathered_bytes(model: &Model) -> u64 {
    let spec = model.spec();
    let slots = spec.moe_layers().iter().filter_map(|&l| spec.moe(l)).map(|moe| moe.top_k).max().unwrap_or(0);
    (PREFILL_CHUNK * slots * 2 * spec.hidden_size * size_of::<f32>()) as u64
}

/// By how much what is measured may differ from run to run.
pub const SLACK_BYTES: u64 = 2 << 20;

/// Makes the model stream its experts, as many bytes of them in memory as the bound leaves.
pub fn stream(
    common: &Common,
    model: &mut Model,
    favourites: &Favourites,
    streaming: Streaming,
    beside: Beside,
) -> Result<()> {
    let Streaming { policy, io, memory } = streaming;
    let checkpoint = model.checkpoint().clone();
    let most = most_stream_bytes(&checkpoint)?;
    // Once there is a room it stays: what passes allocated meanwhile was counted when it was measured.
    let same = model.weights().stream().map(|cache| cache.options()).filter(|o| o.policy == policy && o.io == io);
    let room_bytes = match (same, memory) {
        (Some(options), _) => options.room_bytes,
        (None, None) => most,
        (None, Some(memory)) => {
            let skeleton = model.weights().resident_bytes();
            let kv = model.cache_layout().bytes(beside.cache_tokens);
            let fixed = skeleton + kv + overhead_bytes(model, beside) + gathered_bytes(model);
            let least = least_stream_bytes(&checkpoint)?;
            if memory < fixed + least {
                let needed_bytes = fixed + least + SLACK_BYTES;
                return Err(ResidencyError::NoRoomToStream { budget_bytes: memory, needed_bytes }.into());
            }
            (memory - fixed).min(most)
        }
    };
    let options = StreamOptions { room_bytes, policy, io, readers: READERS };
    common.stream_experts(model, &options, &favourites.best_first, favourites.rates.as_deref())
}

/// How a model streams, in words; `None` if it does not.
pub fn described(model: &Model) -> Option<String> {
    let cache = model.weights().stream()?;
    let (room, all) = (cache.options().room_bytes, most_stream_bytes(model.checkpoint()).unwrap_or(0));
    Some(format!(
        "streaming all experts through {} of {}, {} pinned",
        human_bytes(room),
        human_bytes(all),
        cache.pinned()
    ))
}

/// What streaming did, in words.
pub fn summary(stats: &StreamStats) -> String {
    let percent = |rate: Option<f64>| rate.map_or("-".to_string(), |r| format!("{:.1} %", 100.0 * r));
    format!(
        "experts in memory when wanted {}, predicted {}, {} read at {}/s, waited {:.2} s",
        percent(stats.hit_rate()),
        percent(stats.prediction_rate()),
        human_bytes(stats.read_bytes),
        human_bytes(stats.bandwidth().unwrap_or(0.0) as u64),
        stats.wait_s
    )
}

/// The same as JSON, with how the cache was set up; null if the model does not stream.
pub fn report(model: &Model, stats: &StreamStats) -> Value {
    let Some(cache) = model.weights().stream() else { return Value::Null };
    json!({
        "policy": format!("{:?}", cache.options().policy).to_lowercase(), "room_bytes": cache.options().room_bytes,
        "io": if cache.reads_by_ring() { "io_uring" } else { "threads" },
        "pinned": cache.pinned(), "wanted": stats.wanted, "hits": stats.hits, "hit_rate": stats.hit_rate(),
        "hits_ahead": stats.hits_ahead, "predicted": stats.predicted, "predicted_right": stats.predicted_right,
        "predictable": stats.predictable, "prediction_rate": stats.prediction_rate(), "reads": stats.reads,
        "read_bytes": stats.read_bytes, "read_s": stats.read_s, "busy_s": stats.busy_s, "wait_s": stats.wait_s,
        "bytes_per_s": stats.bandwidth(),
    })
}

/// What a model's streaming did so far; zeros if it does not stream.
pub fn stats(model: &Model) -> StreamStats {
    model.weights().stream().map(|cache| cache.stats()).unwrap_or_default()
}
