//! What the keys and values of a context take, from the architecture alone.

use quorate_formats::spec::{LayerSpec, ModelSpec};
use quorate_kernels::KvPages;

use crate::KvType;
use crate::cache::Kept;

/// How a context is kept, layer by layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheLayout {
    layers: Vec<LayerLayout>,
    /// Positions come so many at a time.
    unit: usize,
    /// Bytes that do not depend on the length: matrices and windows of layers with linear attention, f32.
    pub state_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LayerLayout {
    token_bytes: u64,
    /// Positions that are kept at most.
    window: Option<usize>,
}

impl CacheLayout {
    /// As [`KvCache`](crate::KvCache) keeps it as long as no lens changes keys or values: all positions in whole pages, of
    /// multi-head latent attention the latent vector and the rotated key.
    pub fn own(spec: &ModelSpec, kv_type: KvType) -> CacheLayout {
        CacheLayout::of(spec, kv_type, KvPages::PAGE, |_| None)
    }

    /// The least that computes the same with numbers of 16 bits: of sliding windows and chunks just the positions that can
    /// still be seen.
    pub fn compact(spec: &ModelSpec) -> CacheLayout {
        CacheLayout::of(spec, KvType::F16, 1, |l| match (l.attn.sliding_window, l.attn.extra.chunk) {
            (Some(window), Some(chunk)) => Some(window.min(chunk)),
            (window, chunk) => window.or(chunk),
        })
    }

    fn of(spec: &ModelSpec, kv_type: KvType, unit: usize, window: impl Fn(&LayerSpec) -> Option<usize>) -> CacheLayout {
        let of_layer =
            |l: &LayerSpec| LayerLayout { token_bytes: kv_type.bytes(Kept::new(l).least()), window: window(l) };
        CacheLayout { layers: spec.layers.iter().map(of_layer).collect(), unit, state_bytes: state_bytes(spec) }
    }

    /// Bytes of a context of `tokens` tokens.
    pub fn bytes(&self, tokens: usize) -> u64 {
        let units = |positions: usize| (positions.div_ceil(self.unit) as u64).saturating_mul(self.unit as u64);
        let kept = |l: &LayerLayout| units(l.window.map_or(tokens, |w| w.min(tokens)));
        self.layers.iter().map(|l| l.token_bytes.saturating_mul(kept(l))).fold(self.state_bytes, u64::saturating_add)
    }

    /// Bytes of one more token while no window is full.
    pub fn bytes_per_token(&self) -> u64 {
        self.layers.iter().map(|l| l.token_bytes).sum()
    }

    /// Bytes of one more token when all windows are full.
    pub fn bytes_per_token_beyond_windows(&self) -> u64 {
        self.layers.iter().filter(|l| l.window.is_none()).map(|l| l.token_bytes).sum()
    }
}

fn state_bytes(spec: &ModelSpec) -> u64 {
    let of_layer = |l: &LayerSpec| {
        let delta = l.delta.as_ref()?;
        let channels = 2 * delta.n_key_heads * delta.key_dim + delta.n_value_heads * delta.value_dim;
        let matrices = delta.n_value_heads * delta.key_dim * delta.value_dim;
        Some(4 * (matrices + (delta.conv_kernel - 1) * channels) as u64)
    };
    spec.layers.iter().filter_map(of_layer).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preset(name: &str) -> ModelSpec {
        quorate_formats::Preset::find(name).unwrap().outline().unwrap().spec
    }

    #[test]
    fn latent_vectors_windows_and_states_are_counted() {
        // 61 layers of 512 + 64 numbers.
        let r1 = preset("deepseek-r1");
        assert_eq!(CacheLayout::compact(&r1).bytes_per_token(), 61 * 576 * 2);
        let own = CacheLayout::own(&r1, KvType::F32);
        assert_eq!(own.bytes_per_token(), 61 * 576 * 4);
        assert_eq!([1, 64, 65].map(|n| own.bytes(n)), [64, 64, 128].map(|n| n * 61 * 576 * 4));
        assert_eq!(own.bytes(usize::MAX), u64::MAX);
        // Every second layer sees 128 positions.
        let oss = CacheLayout::compact(&preset("gpt-oss-20b"));
        let token = 2 * 8 * 64 * 2;
        assert_eq!((oss.bytes_per_token(), oss.bytes_per_token_beyond_windows()), (24 * token, 12 * token));
        assert_eq!(oss.bytes(1000), 12 * token * (1000 + 128));
        assert_eq!(oss.bytes(100), 24 * token * 100);
        // Three of four layers have a state of 32 matrices of 128 x 128 and three columns of 8192 channels.
        let next = CacheLayout::compact(&preset("qwen3-next-80b-a3b"));
        assert_eq!(next.bytes_per_token(), 12 * 2 * 2 * 256 * 2);
        assert_eq!(next.state_bytes, 36 * 4 * (32 * 128 * 128 + 3 * 8192));
        assert_eq!(next.bytes(0), next.state_bytes);
    }
}
