//! The KV cache: keys (after RoPE) and values of every layer, for several sequences.
//!
//! Of latent attention it keeps the latent vector and the rotated key that all heads share, from which keys and values
//! follow: 576 numbers a token and layer of DeepSeek-V3 in place of 40,960. Where a lens has changed keys or
//! values, or a gradient goes through them, they are kept in full.

use quorate_formats::spec::{LayerSpec, ModelSpec};

/// Keys and values of a set of sequences, each in its own slot. Values are f32.
#[derive(Clone, Debug)]
pub struct KvCache {
    widths: Vec<Widths>,
    /// Whether some layer has a state that cannot be taken back.
    recurrent: bool,
    slots: Vec<Slot>,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    tokens: Vec<u32>,
    layers: Vec<LayerCache>,
}

#[derive(Clone, Debug, Default)]
struct LayerCache {
    /// Keys; or, unless `full`, latent vectors and shared keys.
    k: Vec<f32>,
    v: Vec<f32>,
    /// Whether a layer with latent attention has keys and values all the same.
    full: bool,
    state: State,
    /// The state after the pass under way.
    next: Option<State>,
}

/// State of a layer with linear attention.
#[derive(Clone, Debug, Default)]
pub(crate) struct State {
    /// The last columns that the convolution saw, oldest first, `[kernel - 1, channels]`; empty at the beginning.
    pub window: Vec<f32>,
    /// One matrix `[key_dim, value_dim]` for each value head; empty at the beginning.
    pub matrices: Vec<f32>,
}

/// What a layer keeps of a token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Widths {
    /// A row of keys and one of values; nothing if the layer has a recurrent state.
    full: [usize; 2],
    /// Latent vector and shared key.
    latent: Option<usize>,
}

impl Widths {
    pub(crate) fn new(layer: &LayerSpec) -> Widths {
        let attn = &layer.attn;
        let full = match layer.delta {
            Some(_) => [0, 0],
            None => [attn.n_kv_heads * attn.head_dim, attn.n_kv_heads * attn.v_head_dim()],
        };
        Widths { full, latent: attn.mla.map(|mla| mla.kv_lora_rank + attn.rope.dim) }
    }

    fn of(self, cache: &LayerCache) -> [usize; 2] {
        if cache.full { self.full } else { self.least() }
    }

    /// What is kept as long as nothing needs to be kept in full.
    pub(crate) fn least(self) -> [usize; 2] {
        self.latent.map_or(self.full, |latent| [latent, 0])
    }
}

impl KvCache {
    /// An empty cache with `slots` sequences.
    pub fn new(spec: &ModelSpec, slots: usize) -> KvCache {
        let widths: Vec<Widths> = spec.layers.iter().map(Widths::new).collect();
        let recurrent = spec.layers.iter().any(|l| l.delta.is_some());
        let slot = Slot { tokens: Vec::new(), layers: vec![LayerCache::default(); widths.len()] };
        KvCache { widths, recurrent, slots: vec![slot; slots] }
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

    /// Forgets all but the first `len` tokens of a slot; its memory is kept for re-use. Where a layer has a recurrent
    /// state, which cannot be taken back, all are forgotten: [`KvCache::len`] tells what is left.
    pub fn truncate(&mut self, slot: usize, len: usize) {
        let slot = &mut self.slots[slot];
        let len = if self.recurrent && len < slot.tokens.len() { 0 } else { len };
        slot.tokens.truncate(len);
        if slot.tokens.is_empty() {
            for layer in &mut slot.layers {
                (layer.state, layer.full) = (State::default(), false);
            }
        }
        for (layer, widths) in slot.layers.iter_mut().zip(&self.widths) {
            let width = widths.of(layer);
            layer.k.truncate(slot.tokens.len() * width[0]);
            layer.v.truncate(slot.tokens.len() * width[1]);
        }
    }

    /// Appends rows to one layer of a slot, dropping what an abandoned forward left behind the slot's length.
    pub(crate) fn append(&mut self, slot: usize, layer: usize, k: &[f32], v: &[f32]) {
        let slot = &mut self.slots[slot];
        let cache = &mut slot.layers[layer];
        let kept = self.widths[layer].of(cache).map(|width| slot.tokens.len() * width);
        cache.k.truncate(kept[0]);
        cache.v.truncate(kept[1]);
        cache.k.extend_from_slice(k);
        cache.v.extend_from_slice(v);
    }

    /// Keys `[tokens, n_kv_heads * head_dim]` and values `[tokens, n_kv_heads * v_head_dim]` of one layer of a slot; of one
    /// that is latent twice the same rows, which are keys and values at once.
    pub(crate) fn layer(&self, slot: usize, layer: usize) -> (&[f32], &[f32]) {
        let cache = &self.slots[slot].layers[layer];
        (&cache.k, if self.is_latent(slot, layer) { &cache.k } else { &cache.v })
    }

    /// Whether latent vectors are kept of this layer.
    pub(crate) fn is_latent(&self, slot: usize, layer: usize) -> bool {
        self.widths[layer].latent.is_some() && !self.slots[slot].layers[layer].full
    }

    /// Replaces the latent rows of a slot's tokens by their keys and values.
    pub(crate) fn keep_in_full(&mut self, slot: usize, layer: usize, k: Vec<f32>, v: Vec<f32>) {
        let cache = &mut self.slots[slot].layers[layer];
        (cache.k, cache.v, cache.full) = (k, v, true);
    }

    /// The recurrent state of one layer of a slot.
    pub(crate) fn state(&self, slot: usize, layer: usize) -> &State {
        &self.slots[slot].layers[layer].state
    }

    /// What the state will be once the pass is done.
    pub(crate) fn set_next_state(&mut self, slot: usize, layer: usize, state: State) {
        self.slots[slot].layers[layer].next = Some(state);
    }

    /// Makes appended tokens of a slot permanent, after all layers have appended their rows.
    pub(crate) fn advance(&mut self, slot: usize, tokens: &[u32]) {
        let slot = &mut self.slots[slot];
        slot.tokens.extend_from_slice(tokens);
        for layer in &mut slot.layers {
            if let Some(state) = layer.next.take() {
                layer.state = state;
            }
        }
    }
}
