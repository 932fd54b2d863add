//! The one transformer: from a [`ModelSpec`](quorate_formats::spec::ModelSpec) and weights to logits, with every inner
//! value addressable as a [`Site`]; KV cache, tokenizer, chat template, sampling and generation.
//!
//! This crate must never read a clock, print, or know a paper.

mod access;
mod attention;
mod batch;
mod cache;
mod cache_layout;
mod delta;
mod error;
mod ffn;
mod forward;
mod generate;
mod grad;
mod latent;
mod lens;
mod mixer;
mod model;
mod moe;
pub mod ops;
mod overlay;
mod routing;
pub mod sampling;
mod site;
mod taps;
pub mod text;

pub use batch::{LogitRows, Phase, Rows, Segment, Span};
pub use cache::{KvCache, KvType};
pub use cache_layout::CacheLayout;
pub use error::ModelError;
pub use forward::{Forward, buffer_bytes};
pub use generate::{Event, Finish, GenerateOptions, Generation, Guide, PREFILL_CHUNK};
pub use lens::{At, Chain, Flow, Lens, NoLens};
pub use model::{KeptExperts, LoadProgress, Model, OpenOptions};
pub use overlay::{LowRank, Overlay, Patch};
pub use quorate_kernels::NO_EXPERT;
pub use routing::{Routing, RoutingMode, drop_slots, route_logits, softmax};
pub use site::{Site, SiteSet, Units};
pub use taps::{Tap, Taps};
