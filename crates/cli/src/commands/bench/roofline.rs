//! What the machine can do, measured in the same run, and the share of it that the model reaches.

use std::hint::black_box;
use std::time::Instant;

use quorate_formats::Role;
use quorate_kernels::{Pool, read_through, split};
use quorate_model::Model;
use quorate_residency::{Bytes, skeleton_bytes};
use serde_json::{Value, json};

/// Bytes that are read to measure the memory: far more than any cache holds.
const BYTES: u64 = 1 << 30;

/// Fewer would measure the cache.
const BYTES_LEAST: u64 = 128 << 20;

/// Rounds of reading; the median counts.
const ROUNDS: usize = 9;

/// Bytes a second that all threads read from memory, each its own part in order; `None` if there is no room to measure it.
pub fn read_bandwidth(pool: &Pool, room_bytes: u64) -> Option<f64> {
    let bytes = Some(BYTES.min(room_bytes / 2)).filter(|&bytes| bytes >= BYTES_LEAST)?;
    let memory = Bytes::filled(usize::try_from(bytes).ok()?, 1).ok()?;
    let mut rates: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            pool.run(|worker, workers| {
                black_box(read_through(&memory[split(memory.len(), worker, workers, 4096)]));
            });
            bytes as f64 / start.elapsed().as_secs_f64()
        })
        .collect();
    rates.sort_by(f64::total_cmp);
    Some(rates[ROUNDS / 2])
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

    /// What speeds (tokens a second) are in bytes and operations a second, and as shares of what the memory gives.
    /// `context` is the mean number of positions that a decoded token sees.
    pub fn report(&self, model: &Model, prefill: f64, decode: f64, context: usize, bandwidth: Option<f64>) -> Value {
        let kv = model.cache_layout().bytes(context);
        let read = (self.token_bytes + kv) as f64 * decode;
        json!({
            "read_bandwidth_bytes_per_s": bandwidth,
            "decode_token_weight_bytes": self.token_bytes, "decode_token_kv_bytes": kv,
            "decode_bytes_per_s": read, "decode_share_of_bandwidth": bandwidth.map(|all| read / all),
            "prefill_operations_per_s": self.token_operations * prefill,
        })
    }
}
