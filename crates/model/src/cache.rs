//! The KV cache: keys (after RoPE) and values of every layer, for several sequences.
//!
//! Of latent attention it keeps the latent vector and the rotated key that all heads share, from which keys and values
//! follow: 576 numbers a token and layer of DeepSeek-V3 in place of 40,960. Where a lens has changed keys or
//! values, or a gradient goes through them, they are kept in full.

use quorate_formats::spec::{LayerSpec, ModelSpec};
use quorate_kernels::{DType, KvPages};

/// Type of the numbers of a [`KvCache`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    /// As they were computed.
    #[default]
    F32,
    /// Rounded to 11 bits: half the memory, and half the reading for every further token.
    F16,
    /// Signed bytes, every 32 with a scale: about a quarter of the memory. A head's keys and values must be multiples of 32 wide.
    Q8_0,
}

impl KvType {
    /// The same among the types of weights.
    pub fn dtype(self) -> DType {
        match self {
            KvType::F32 => DType::F32,
            KvType::F16 => DType::F16,
            KvType::Q8_0 => DType::Q8_0,
        }
    }

    /// Bytes of so many numbers of a position.
    pub(crate) fn bytes(self, numbers: usize) -> u64 {
        let dtype = self.dtype();
        (numbers.div_ceil(dtype.block_len()) * dtype.block_bytes()) as u64
    }
}

/// Keys and values of a set of sequences, each in its own slot.
#[derive(Clone, Debug)]
pub struct KvCache {
    kv_type: KvType,
    kept: Vec<Kept>,
    /// Whether some layer has a state that cannot be taken back.
    recurrent: bool,
    slots: Vec<Slot>,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    tokens: Vec<u32>,
    layers: Vec<LayerCache>,
}

#[derive(Clone, Debug)]
struct LayerCache {
    /// Keys; or, unless `full`, latent vectors and shared keys.
    k: KvPages,
    v: KvPages,
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
pub(crate) struct Kept {
    /// Heads of keys and values, and numbers of each; nothing if the layer has a recurrent state.
    heads: usize,
    dims: [usize; 2],
    /// Latent vector and shared key.
    latent: Option<usize>,
}

impl Kept {
    pub(crate) fn new(layer: &LayerSpec) -> Kept {
        let attn = &layer.attn;
        let (heads, dims) = match layer.delta {
            Some(_) => (0, [0, 0]),
            None => (attn.n_kv_heads, [attn.head_dim, attn.v_head_dim()]),
        };
        Kept { heads, dims, latent: attn.mla.map(|mla| mla.kv_lora_rank + attn.rope.dim) }
    }

    /// Empty pages, for keys and values or for as little as will do.
    fn pages(self, kv_type: KvType, full: bool) -> [KvPages; 2] {
        let (heads, dims) = match self.latent {
            Some(latent) if !full => (1, [latent, 0]),
            _ => (self.heads, self.dims),
        };
        dims.map(|dim| KvPages::new(kv_type.dtype(), heads, dim))
    }

    /// Whether rows of heads can be kept in this type.
    pub(crate) fn allow(layer: &LayerSpec, kv_type: KvType) -> bool {
        let (attn, block) = (&layer.attn, kv_type.dtype().block_len());
        let latent = attn.mla.map_or(0, |mla| mla.kv_lora_rank + attn.rope.dim);
        layer.delta.is_some() || [attn.head_dim, attn.v_head_dim(), latent].iter().all(|n| n.is_multiple_of(block))
    }

    /// Numbers that are kept as long as nothing needs to be kept in full.
    pub(crate) fn least(self) -> usize {
        self.latent.unwrap_or(self.heads * self.dims.iter().sum::<usize>())
    }
}

impl KvCache {
    /// An empty cache with `slots` sequences, of f32.
    pub fn new(spec: &ModelSpec, slots: usize) -> KvCache {
        KvCache::of_type(spec, slots, KvType::F32)
    }

    /// An empty cache with `slots` sequences. Recurrent states are f32 in any case.
    pub fn of_type(spec: &ModelSpec, slots: usize, kv_type: KvType) -> KvCache {
        let kept: Vec<Kept> = spec.layers.iter().map(Kept::new).collect();
        let recurrent = spec.layers.iter().any(|l| l.delta.is_some());
        let layer = |kept: &Kept| {
            let [k, v] = kept.pages(kv_type, false);
            LayerCache { k, v, full: false, state: State::default(), next: None }
        };
        let slot = Slot { tokens: Vec::new(), layers: kept.iter().map(layer).collect() };
        KvCache { kv_type, kept, recurrent, slots: vec![slot; slots] }
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
        let empty = slot.tokens.is_empty();
        for (layer, kept) in slot.layers.iter_mut().zip(&self.kept) {
            layer.k.truncate(slot.tokens.len());
            layer.v.truncate(slot.tokens.len());
            if empty {
                layer.state = State::default();
            }
            if empty && layer.full {
                layer.full = false;
                [layer.k, layer.v] = kept.pages(self.kv_type, false);
            }
        }
    }

    /// Appends rows to one layer of a slot.
    pub(crate) fn append(&mut self, slot: usize, layer: usize, k: &[f32], v: &[f32]) {
        for (pages, rows) in self.layer_mut(slot, layer).into_iter().zip([k, v]) {
            pages.extend(rows);
        }
    }

    /// Keys and values of one layer of a slot, to append the next token's, without what an abandoned forward left behind the slot's length.
    pub(crate) fn layer_mut(&mut self, slot: usize, layer: usize) -> [&mut KvPages; 2] {
        let slot = &mut self.slots[slot];
        let LayerCache { k, v, .. } = &mut slot.layers[layer];
        [k, v].map(|pages| {
            pages.truncate(slot.tokens.len());
            pages
        })
    }

    /// Keys and values of one layer of a slot; of one that is latent twice the same, which are keys and values at once.
    pub(crate) fn layer(&self, slot: usize, layer: usize) -> (&KvPages, &KvPages) {
        let cache = &self.slots[slot].layers[layer];
        (&cache.k, if self.is_latent(slot, layer) { &cache.k } else { &cache.v })
    }

    /// The same as plain values, `[tokens, n_kv_heads, head_dim]` and `[tokens, n_kv_heads, v_head_dim]`.
    pub(crate) fn layer_values(&self, slot: usize, layer: usize) -> (Vec<f32>, Vec<f32>) {
        let (k, v) = self.layer(slot, layer);
        (k.values(), v.values())
    }

    /// Whether latent vectors are kept of this layer.
    pub(crate) fn is_latent(&self, slot: usize, layer: usize) -> bool {
        self.kept[layer].latent.is_some() && !self.slots[slot].layers[layer].full
    }

    /// Replaces the latent rows of a slot's tokens by their keys and values.
    pub(crate) fn keep_in_full(&mut self, slot: usize, layer: usize, k: &[f32], v: &[f32]) {
        let cache = &mut self.slots[slot].layers[layer];
        cache.full = true;
        [cache.k, cache.v] = self.kept[layer].pages(self.kv_type, true);
        cache.k.extend(k);
        cache.v.extend(v);
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
