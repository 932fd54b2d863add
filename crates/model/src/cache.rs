//! The KV cache: keys (after RoPE) and values of every layer, for several sequences.

use quorate_formats::spec::ModelSpec;

use crate::cache_layout::widths;

/// Keys and values of a set of sequences, each in its own slot. Values are f32.
#[derive(Clone, Debug)]
pub struct KvCache {
    /// Widths of a key row and of a value row of each layer.
    widths: Vec<[usize; 2]>,
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
    k: Vec<f32>,
    v: Vec<f32>,
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

impl KvCache {
    /// An empty cache with `slots` sequences.
    pub fn new(spec: &ModelSpec, slots: usize) -> KvCache {
        let widths: Vec<[usize; 2]> = spec.layers.iter().map(widths).collect();
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
            slot.layers.iter_mut().for_each(|layer| layer.state = State::default());
        }
        for (layer, &width) in slot.layers.iter_mut().zip(&self.widths) {
            layer.k.truncate(slot.tokens.len() * width[0]);
            layer.v.truncate(slot.tokens.len() * width[1]);
        }
    }

    /// Appends rows to one layer of a slot, dropping what an abandoned forward left behind the slot's length.
    pub(crate) fn append(&mut self, slot: usize, layer: usize, k: &[f32], v: &[f32]) {
        let slot = &mut self.slots[slot];
        let kept = self.widths[layer].map(|width| slot.tokens.len() * width);
        let cache = &mut slot.layers[layer];
        cache.k.truncate(kept[0]);
        cache.v.truncate(kept[1]);
        cache.k.extend_from_slice(k);
        cache.v.extend_from_slice(v);
    }

    /// Keys `[tokens, n_kv_heads * head_dim]` and values `[tokens, n_kv_heads * v_head_dim]` of one layer of a slot.
    pub(crate) fn layer(&self, slot: usize, layer: usize) -> (&[f32], &[f32]) {
        let cache = &self.slots[slot].layers[layer];
        (&cache.k, &cache.v)
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
