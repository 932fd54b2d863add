//! What can go wrong between a model folder and its tokens.

use crate::Site;

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file of the model.
    #[error(transparent)]
    Format(#[from] quorate_formats::FormatError),
    /// Loading weights.
    #[error(transparent)]
    Residency(#[from] quorate_residency::ResidencyError),
    /// Tokenizer or chat template.
    #[error(transparent)]
    Text(#[from] crate::text::TextError),
    /// Sampling.
    #[error(transparent)]
    Sampling(#[from] crate::sampling::SamplingError),
    /// A kernel refused its input.
    #[error(transparent)]
    Kernel(#[from] quorate_kernels::KernelError),
    /// A tensor operation failed.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A gradient through something that has none.
    #[error("layer {layer}: gradients do not go through {what}; help: change only what comes after it")]
    NoGradient {
        /// Decoder layer.
        layer: usize,
        /// The part of the model.
        what: &'static str,
    },
    /// A KV cache of a type in blocks, with heads that are no whole blocks.
    #[error("keys or values of layer {layer} are not multiples of 32 wide, as {dtype} wants them; help: --kv-type f16")]
    KvType {
        /// Decoder layer.
        layer: usize,
        /// Type of the cache.
        dtype: &'static str,
    },
    /// A layer without routed experts.
    #[error("layer {layer} has no routed experts; help: choose a MoE layer (`quorate inspect` lists them)")]
    NoExperts {
        /// Decoder layer.
        layer: usize,
    },
    /// A name that is no site.
    #[error("there is no site `{name}`; help: the sites are {}", site_names())]
    UnknownSite {
        /// What was asked for.
        name: String,
    },
    /// A token id at or above the vocabulary size.
    #[error("token {token} is outside the vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The id.
        token: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// A segment names a slot that the KV cache does not have.
    #[error("cache slot {slot} does not exist, the cache has {slots}")]
    CacheSlot {
        /// The slot.
        slot: usize,
        /// Number of slots.
        slots: usize,
    },
    /// A segment without tokens, or two segments for one slot.
    #[error("segment for cache slot {slot} is empty, or its slot occurs twice in the batch")]
    EmptyOrDoubleSegment {
        /// The slot.
        slot: usize,
    },
    /// A segment without one phase per token.
    #[error("segment for cache slot {slot} has {tokens} tokens and {phases} phases; help: give each token its phase")]
    SegmentPhases {
        /// The slot.
        slot: usize,
        /// Number of tokens.
        tokens: usize,
        /// Number of phases.
        phases: usize,
    },
    /// A prompt that leaves no room in the model's context.
    #[error(
        "the prompt has {tokens} tokens, the model's context is {context}; help: shorten the prompt to at most {} tokens",
        context.saturating_sub(1)
    )]
    PromptTooLong {
        /// Tokens of the prompt, with what the cache holds already.
        tokens: usize,
        /// `max_position_embeddings`.
        context: usize,
    },
    /// A prompt without tokens.
    #[error("the prompt is empty; help: give at least one token of text")]
    EmptyPrompt,
    /// NaN or plus infinity among router logits, or NaN at `selection`.
    #[error("router logits of layer {layer} are not numbers; the weights or an intervention overflow")]
    NanRouter {
        /// Decoder layer.
        layer: usize,
    },
    /// Routing names an expert whose weights are not in memory.
    #[error(
        "expert {expert} of layer {layer} is not loaded; help: keep it in the plan, or choose a routing mode that masks it"
    )]
    ExpertNotLoaded {
        /// Decoder layer.
        layer: usize,
        /// Global expert id.
        expert: u32,
    },
    /// A lens left a value of another shape.
    #[error("a lens changed the shape of {site} in layer {layer} from {expected:?} to {found:?}")]
    LensShape {
        /// The site.
        site: Site,
        /// Decoder layer.
        layer: usize,
        /// Shape before.
        expected: Vec<usize>,
        /// Shape after.
        found: Vec<usize>,
    },
    /// A lens left a value of another type.
    #[error("a lens left {site} in layer {layer} as a tensor of {dtype}; help: it must be f32 on the CPU")]
    LensType {
        /// The site.
        site: Site,
        /// Decoder layer.
        layer: usize,
        /// Element type found.
        dtype: &'static str,
    },
    /// A lens left a routing that does not fit.
    #[error(
        "a lens left a routing in layer {layer} with {ids} ids and {gates} gates for {slots} slots (id out of range: {bad_id:?})"
    )]
    LensRouting {
        /// Decoder layer.
        layer: usize,
        /// Slots expected.
        slots: usize,
        /// Ids found.
        ids: usize,
        /// Gates found.
        gates: usize,
        /// An id that no expert has.
        bad_id: Option<u32>,
    },
    /// A tensor that the kernels cannot read.
    #[error("expected a contiguous f32 tensor on the CPU, found shape {shape:?} of {dtype}")]
    NotPlainTensor {
        /// Its shape.
        shape: Vec<usize>,
        /// Its element type.
        dtype: &'static str,
    },
    /// A keep list that does not fit the model.
    #[error("{0}")]
    Keep(String),
    /// An overlay that does not fit the model.
    #[error("overlay of {role}: {problem}")]
    Overlay {
        /// The weight.
        role: quorate_formats::Role,
        /// What is wrong, and what would help.
        problem: String,
    },
    /// An error of a lens.
    #[error("{0}")]
    Lens(String),
}

fn site_names() -> String {
    Site::ALL.iter().map(|s| s.name()).collect::<Vec<_>>().join(", ")
}
