//! What the machine can do, measured in the same run, and the share of it that the model reaches.

use std::hint::black_box;
use std::time::Instant;

use quorate_formats::Role;
use quorate_kernels::{Pool, read_through, split};
use quorate_model::Model;
use quorate_residency::skeleton_bytes;
use serde_json::{Value, json};

use super::median;

/// Bytes that are read to measure the memory, if there are so many.
const BYTES: usize = 1 << 30;

/// Fewer would measure the cache.
const BYTES_LEAST: usize = 128 << 20;

/// Rounds of reading at a time; the median counts.
const ROUNDS: usize = 3;

/// How fast the machine reads the model's own weights from memory, measured before and after every run: other users of the
/// machine change it from one second to the next.
pub struct Bandwidth<'a> {
    weights: Vec<&'a [u8]>,
    bytes: usize,
    /// Bytes a second, of each time.
    rates: Vec<f64>,
}

impl<'a> Bandwidth<'a> {
    pub fn of(model: &'a Model) -> Bandwidth<'a> {
        let (mut weights, mut bytes) = (Vec::new(), 0);
        for matrix in model.weights().resident_matrices() {
            if bytes >= BYTES {
                break;
            }
            weights.push(&matrix.data()[..]);
            bytes += matrix.data().len();
        }
        Bandwidth { weights, bytes, rates: Vec::new() }
    }

    /// All threads read the weights, each its own part in order.
    pub fn measure(&mut self, pool: &Pool) {
        if self.bytes < BYTES_LEAST {
            return;
        }
        let rates = (0..ROUNDS).map(|_| {
            let start = Instant::now();
            pool.run(|worker, workers| {
                let own = split(self.bytes, worker, workers, 4096);
                let mut passed = 0;
                for w in &self.weights {
                    let within = |at: usize| at.saturating_sub(passed).min(w.len());
                    black_box(read_through(&w[within(own.start)..within(own.end)]));
                    passed += w.len();
                }
            });
            self.bytes as f64 / start.elapsed().as_secs_f64()
        });
        let rate = median(rates.collect());
        self.rates.push(rate);
    }

    /// Bytes a second around run `i`: the mean of what was measured before and after it. `None` if the weights are too few to
    /// tell memory from caches.
    fn around(&self, i: usize) -> Option<f64> {
        Some((self.rates.get(i)? + self.rates.get(i + 1)?) / 2.0)
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

    /// What speeds (tokens a second; those of decoding run by run) are in bytes and operations a second, and as shares of what
    /// the memory gave around each run. `context` is the mean number of positions that a decoded token sees.
    pub fn report(
        &self,
        model: &Model,
        prefill: f64,
        decode: &[f64],
        context: usize,
        bandwidth: &Bandwidth<'_>,
    ) -> Value {
        // What is read: of the last page of positions only those that there are.
        let layout = model.cache_layout();
        let kv = layout.state_bytes + layout.bytes_per_token() * context as u64;
        let read = |decode: f64| (self.token_bytes + kv) as f64 * decode;
        let shares: Vec<f64> =
            decode.iter().enumerate().filter_map(|(i, &d)| Some(read(d) / bandwidth.around(i)?)).collect();
        let known = |values: &[f64]| (!values.is_empty()).then(|| median(values.to_vec()));
        json!({
            "read_bandwidth_bytes_per_s": known(&bandwidth.rates),
            "decode_token_weight_bytes": self.token_bytes, "decode_token_kv_bytes": kv,
            "decode_bytes_per_s": read(median(decode.to_vec())),
            "decode_share_of_bandwidth": known(&shares), "decode_shares_of_bandwidth": shares,
            "prefill_operations_per_s": self.token_operations * prefill,
        })
    }
}
