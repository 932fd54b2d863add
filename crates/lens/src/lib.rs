//! What watches and changes a model: recorder, streaming statistics, score tables, selection, interventions, plans,
//! patterns and their library.
//!
//! This crate must never know a paper, open a socket, or print.

mod choose;
mod controls;
mod coverage;
mod error;
pub mod interchange;
mod intervention;
mod key;
mod library;
mod outputs;
mod pattern;
mod plan;
mod recorder;
mod score;
mod select;
mod select_text;
mod stages;
mod stats;
mod trace;
mod unit;

pub use choose::{Choice, GENERALIST, Retrieved, retrieve};
pub use controls::matched_sets;
pub use coverage::{Coverage, coverage, overlap, uses};
pub use error::{LensError, nearest_name};
pub use intervention::{Intervention, Interventions, Op, PhaseSelector, Value};
pub use key::{Key, KeyIndex, KeyMetric, KeyProbe, Nearest, PromptKey, prompt_keys};
pub use library::Library;
pub use outputs::{OutputProfiler, OutputStats};
pub use pattern::{PATTERN_VERSION, Pattern, PatternInfo, safe_file_name};
pub use plan::{KeepLayer, PLAN_VERSION, Plan};
pub use recorder::{Recorded, Recorder};
pub use score::{MetricInfo, ScoreTable};
pub use select::{Keep, Scope, Selection};
pub use select_text::Indices;
pub use stages::StageClock;
pub use stats::{
    BinSum, CONFIDENCE_BINS, ExpertMap, PhaseStats, ProfileData, Profiler, RouterStats, Seen, Sum, confidence_bin,
};
pub use trace::{ItemTrace, LayerTrace, RoutingTrace, TraceRecorder};
pub use unit::{ExpertId, on_experts, read_experts};
