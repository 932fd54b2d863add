//! The KV cache: keys (after RoPE) and values of every layer, for several sequences.

use quorate_formats::spec::ModelSpec;

/// Keys and values of a set of sequences, each in its own slot. Values are f32.
#[derive(Clone, Debug)]
pub struct KvCache {
    widths: Vec<usize>,
    slots: Vec<Slot>,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    tokens: Vec<u32>,
    layers: Vec<LayerCache>,
}

#[derive(Clone, Debug, Default)]
struct LayerCache {
    k: Vec<f32>,
    v: Vec<f32>,
}

impl KvCache {
    /// An empty cache with `slots` sequences.
    pub fn new(spec: &ModelSpec, slots: usize) -> KvCache {
        let widths: Vec<usize> = spec.layers.iter().map(|l| l.attn.n_kv_heads * l.attn.head_dim).collect();
        let slot = Slot { tokens: Vec::new(), layers: vec![LayerCache::default(); widths.len()] };
        KvCache { widths, slots: vec![slot; slots] }
    }

    /// Bytes that one token of one sequence takes.
    pub fn bytes_per_token(spec: &ModelSpec) -> u64 {
        spec.layers.iter().map(|l| 8 * (l.attn.n_kv_heads * l.attn.head_dim) as u64).sum()
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Number of tokens that a slot holds.
    pub fn len(&self, slot: usize) -> usize {
        self.slots[slot].tokens.len()
    }

    /// The tokens that a slot holds.
    pub fn tokens(&self, slot: usize) -> &[u32] {
        &self.slots[slot].tokens
    }

    /// Whether a slot holds no tokens.
    pub fn is_empty(&self, slot: usize) -> bool {
        self.slots[slot].tokens.is_empty()
    }

    /// Number of tokens that each slot holds.
    pub fn lengths(&self) -> Vec<usize> {
        self.slots.iter().map(|s| s.tokens.len()).collect()
    }

    /// Forgets all but the first `len` tokens of a slot; its memory is kept for re-use.
    pub fn truncate(&mut self, slot: usize, len: usize) {
        let slot = &mut self.slots[slot];
        slot.tokens.truncate(len);
        for (layer, &width) in slot.layers.iter_mut().zip(&self.widths) {
            layer.k.truncate(slot.tokens.len() * width);
            layer.v.truncate(slot.tokens.len() * width);
        }
    }

    /// Appends rows to one layer of a slot, dropping what an abandoned forward left behind the slot's length.
    pub(crate) fn append(&mut self, slot: usize, layer: usize, k: &[f32], v: &[f32]) {
        let slot = &mut self.slots[slot];
        let kept = slot.tokens.len() * self.widths[layer];
        let cache = &mut slot.layers[layer];
        cache.k.truncate(kept);
        cache.v.truncate(kept);
        cache.k.extend_from_slice(k);
        cache.v.extend_from_slice(v);
    }

    /// Keys and values of one layer of a slot, `[tokens, n_kv_heads * head_dim]` each.
    pub(crate) fn layer(&self, slot: usize, layer: usize) -> (&[f32], &[f32]) {
        let cache = &self.slots[slot].layers[layer];
        (&cache.k, &cache.v)
    }

    /// Makes appended tokens of a slot permanent, after all layers have appended their rows.
    pub(crate) fn advance(&mut self, slot: usize, tokens: &[u32]) {
        self.slots[slot].tokens.extend_from_slice(tokens);
    }
}
