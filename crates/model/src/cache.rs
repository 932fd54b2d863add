//! The KV cache: keys (after RoPE) and values of every layer, for several sequences.
//!
//! Of latent attention it keeps the latent vector and the rotated key that all heads share, from which keys and values
//! follow: 576 numbers a token and layer of DeepSeek-V3 in place of 40,960. Where a lens has changed keys or
//! values, or a gradient goes through them, they are kept in full.

use std::borrow::Cow;

use quorate_formats::spec::{LayerSpec, ModelSpec};
use quorate_kernels::{DType, MatRef, dequantize, quantize};

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

    /// Bytes of so many numbers.
    pub(crate) fn bytes(self, numbers: usize) -> u64 {
        let dtype = self.dtype();
        row_len(dtype, numbers.next_multiple_of(dtype.block_len())) as u64
    }
}

/// Keys and values of a set of sequences, each in its own slot.
#[derive(Clone, Debug)]
pub struct KvCache {
    kv_type: KvType,
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
    k: Numbers,
    v: Numbers,
    /// Whether a layer with latent attention has keys and values all the same.
    full: bool,
    state: State,
    /// The state after the pass under way.
    next: Option<State>,
}

/// Rows of numbers of one type.
#[derive(Clone, Debug)]
enum Numbers {
    F32(Vec<f32>),
    /// Of another type, as bytes.
    Packed(DType, Vec<u8>),
}

impl Default for Numbers {
    fn default() -> Self {
        Numbers::F32(Vec::new())
    }
}

/// Bytes of so many numbers, which are whole blocks: models with others are refused when they are opened.
fn row_len(dtype: DType, numbers: usize) -> usize {
    dtype.row_bytes(numbers).expect("rows of heads are whole blocks")
}

impl Numbers {
    fn new(kv_type: KvType) -> Self {
        match kv_type {
            KvType::F32 => Numbers::F32(Vec::new()),
            other => Numbers::Packed(other.dtype(), Vec::new()),
        }
    }

    fn truncate(&mut self, len: usize) {
        match self {
            Numbers::F32(values) => values.truncate(len),
            Numbers::Packed(dtype, bytes) => bytes.truncate(row_len(*dtype, len)),
        }
    }

    fn extend(&mut self, new: &[f32]) {
        match self {
            Numbers::F32(values) => values.extend_from_slice(new),
            Numbers::Packed(dtype, bytes) => {
                let start = bytes.len();
                bytes.resize(start + row_len(*dtype, new.len()), 0);
                quantize(*dtype, new, &mut bytes[start..]);
            }
        }
    }

    /// As rows of `width` numbers.
    fn rows(&self, width: usize) -> MatRef<'_> {
        let rows = |len: usize, row: usize| len.checked_div(row).unwrap_or(0);
        match self {
            Numbers::F32(values) => MatRef::of_f32(rows(values.len(), width), width, values),
            Numbers::Packed(dtype, data) => {
                let rows = rows(data.len(), row_len(*dtype, width));
                MatRef { dtype: *dtype, rows, cols: width, data }
            }
        }
    }

    fn values(&self) -> Cow<'_, [f32]> {
        match self {
            Numbers::F32(values) => Cow::Borrowed(values),
            Numbers::Packed(dtype, bytes) => {
                let mut values = vec![0.0; bytes.len() / dtype.block_bytes() * dtype.block_len()];
                dequantize(*dtype, bytes, &mut values);
                Cow::Owned(values)
            }
        }
    }
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

    /// Whether rows of heads can be kept in this type.
    pub(crate) fn allow(layer: &LayerSpec, kv_type: KvType) -> bool {
        let (attn, block) = (&layer.attn, kv_type.dtype().block_len());
        let latent = attn.mla.map_or(0, |mla| mla.kv_lora_rank + attn.rope.dim);
        layer.delta.is_some() || [attn.head_dim, attn.v_head_dim(), latent].iter().all(|n| n.is_multiple_of(block))
    }

    /// What is kept as long as nothing needs to be kept in full.
    pub(crate) fn least(self) -> [usize; 2] {
        self.latent.map_or(self.full, |latent| [latent, 0])
    }
}

impl KvCache {
    /// An empty cache with `slots` sequences, of f32.
    pub fn new(spec: &ModelSpec, slots: usize) -> KvCache {
        KvCache::of_type(spec, slots, KvType::F32)
    }

    /// An empty cache with `slots` sequences. Recurrent states are f32 in any case.
    pub fn of_type(spec: &ModelSpec, slots: usize, kv_type: KvType) -> KvCache {
        let widths: Vec<Widths> = spec.layers.iter().map(Widths::new).collect();
        let recurrent = spec.layers.iter().any(|l| l.delta.is_some());
        let layer = LayerCache { k: Numbers::new(kv_type), v: Numbers::new(kv_type), ..LayerCache::default() };
        let slot = Slot { tokens: Vec::new(), layers: vec![layer; widths.len()] };
        KvCache { kv_type, widths, recurrent, slots: vec![slot; slots] }
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
        cache.k.extend(k);
        cache.v.extend(v);
    }

    /// Keys `[tokens, n_kv_heads * head_dim]` and values `[tokens, n_kv_heads * v_head_dim]` of one layer of a slot; of one
    /// that is latent twice the same rows, which are keys and values at once.
    pub(crate) fn layer(&self, slot: usize, layer: usize) -> (MatRef<'_>, MatRef<'_>) {
        let cache = &self.slots[slot].layers[layer];
        let [k, v] = self.widths[layer].of(cache);
        let keys = cache.k.rows(k);
        (keys, if self.is_latent(slot, layer) { keys } else { cache.v.rows(v) })
    }

    /// The same as plain values.
    pub(crate) fn layer_values(&self, slot: usize, layer: usize) -> (Cow<'_, [f32]>, Cow<'_, [f32]>) {
        let cache = &self.slots[slot].layers[layer];
        let latent = self.is_latent(slot, layer);
        (cache.k.values(), if latent { cache.k.values() } else { cache.v.values() })
    }

    /// Whether latent vectors are kept of this layer.
    pub(crate) fn is_latent(&self, slot: usize, layer: usize) -> bool {
        self.widths[layer].latent.is_some() && !self.slots[slot].layers[layer].full
    }

    /// Replaces the latent rows of a slot's tokens by their keys and values.
    pub(crate) fn keep_in_full(&mut self, slot: usize, layer: usize, k: &[f32], v: &[f32]) {
        let cache = &mut self.slots[slot].layers[layer];
        (cache.k, cache.v, cache.full) = (Numbers::new(self.kv_type), Numbers::new(self.kv_type), true);
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
