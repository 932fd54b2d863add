//! What the machine can do, measured in the same run, and the share of it that the model reaches.

use std::hint::black_box;
use std::time::Instant;

use quorate_formats::Role;
use quorate_kernels::{Pool, read_through, split};
use quorate_model::Model;
use quorate_residency::skeleton_bytes;
use serde_json::{Value, json};

use super::median;

/// Bytes that are read to measure the memory, if there are so many: more than caches hold.
const BYTES: usize = 1 << 30;

/// Fewer would measure the cache.
const BYTES_LEAST: usize = 128 << 20;

/// Bytes of these that are read at a time.
const SAMPLE: usize = 256 << 20;

/// How fast the machine reads the model's own weights from memory, measured between tokens: other users of the machine, and where
/// its host lets it run, change that from one second to the next.
pub struct Bandwidth<'a> {
    weights: Vec<&'a [u8]>,
    bytes: usize,
    /// Where the next sample begins.
    at: usize,
    sampled: usize,
    seconds: f64,
}

impl<'a> Bandwidth<'a> {
    /// Nothing to be read of models that are streamed, whose readers would use the time, or that caches hold.
    pub fn of(model: &'a Model) -> Bandwidth<'a> {
        let (mut weights, mut bytes) = (Vec::new(), 0);
        for matrix in model.weights().resident_matrices() {
            if bytes >= BYTES {
                break;
            }
            weights.push(&matrix.data()[..]);
            bytes += matrix.data().len();
        }
        if bytes < BYTES_LEAST || model.weights().stream().is_some() {
            (weights, bytes) = (Vec::new(), 0);
        }
        Bandwidth { weights, bytes, at: 0, sampled: 0, seconds: 0.0 }
    }

    /// All threads read some of the weights, each its own part in order; those that come next the next time.
    pub fn sample(&mut self, pool: &Pool) {
        if self.bytes == 0 {
            return;
        }
        let len = SAMPLE.min(self.bytes - self.at);
        let start = Instant::now();
        pool.run(|worker, workers| {
            let own = split(len, worker, workers, 4096);
            let mut passed = 0;
            for w in &self.weights {
                let within = |at: usize| (self.at + at).saturating_sub(passed).min(w.len());
                black_box(read_through(&w[within(own.start)..within(own.end)]));
                passed += w.len();
            }
        });
        self.seconds += start.elapsed().as_secs_f64();
        self.sampled += len;
        self.at = if self.at + len < self.bytes { self.at + len } else { 0 };
    }

    /// Bytes a second of all samples since the last time, if there were any.
    pub fn take(&mut self) -> Option<f64> {
        let rate = (self.sampled > 0).then(|| self.sampled as f64 / self.seconds);
        (self.sampled, self.seconds) = (0, 0.0);
        rate
    }
}

/// What passes need at least.
pub struct Need {
    /// Bytes of weights that a decoded token reads, without the KV cache.
    pub token_bytes: u64,
    /// Multiplications and additions of a prompt's token in weights' products, without attention and output matrix.
    pub token_operations: f64,
}

impl Need {
    pub fn of(model: &Model) -> Need {
        let (spec, checkpoint) = (model.spec(), model.checkpoint());
        let elements = |role| checkpoint.tensor(role).map_or(0, |loc| loc.elements());
        let len = |role| checkpoint.tensor(role).map_or(0, |loc| loc.len);
        let (mut token_bytes, mut weights) = (skeleton_bytes(checkpoint), 0);
        if !spec.tie_word_embeddings {
            // Of the embedding a token reads one row.
            token_bytes -= len(Role::Embed);
        }
        for role in checkpoint.roles().filter(|r| !r.is_expert() && !matches!(r, Role::Embed | Role::LmHead)) {
            weights += elements(role);
        }
        for &l in &spec.moe_layers() {
            let (Some(moe), roles) = (spec.moe(l), Role::of_expert(l, 0)) else { continue };
            token_bytes += moe.top_k as u64 * checkpoint.expert_bytes(l, 0);
            weights += moe.top_k as u64 * roles.into_iter().map(elements).sum::<u64>();
        }
        Need { token_bytes, token_operations: 2.0 * weights as f64 }
    }

    /// What speeds are in bytes and operations a second. `runs` has of each run how many tokens were decoded a second, and what the
    /// memory gave meanwhile, of which a run has a share. `context` is the mean number of positions that a decoded token sees.
    pub fn report(&self, model: &Model, prefill: f64, runs: &[(f64, Option<f64>)], context: usize) -> Value {
        // What is read: of the last page of positions only those that there are.
        let layout = model.cache_layout();
        let kv = layout.state_bytes + layout.bytes_per_token() * context as u64;
        let read = |decode: f64| (self.token_bytes + kv) as f64 * decode;
        let rates: Vec<f64> = runs.iter().filter_map(|run| run.1).collect();
        let shares: Vec<f64> = runs.iter().filter_map(|&(decode, rate)| Some(read(decode) / rate?)).collect();
        let known = |values: &[f64]| (!values.is_empty()).then(|| median(values.to_vec()));
        json!({
            "read_bandwidth_bytes_per_s": known(&rates), "read_bandwidths_bytes_per_s": rates,
            "decode_token_weight_bytes": self.token_bytes, "decode_token_kv_bytes": kv,
            "decode_bytes_per_s": read(median(runs.iter().map(|run| run.0).collect())),
            "decode_share_of_bandwidth": known(&shares), "decode_shares_of_bandwidth": shares,
            "prefill_operations_per_s": self.token_operations * prefill,
        })
    }
}
