//! Routing that other engines recorded, as statistics: what a recording tells is filled in, all else is marked unknown.

use std::path::Path;

use quorate_formats::spec::{ModelSpec, MoeSpec};

use super::{imatrix, routed_experts, router_logits, sglang};
use crate::{ExpertMap, LensError, PhaseStats, RouterStats, Seen};

/// What a recording is read against.
#[derive(Clone, Debug)]
pub struct TraceShape {
    /// Which experts.
    pub map: ExpertMap,
    /// The router of each MoE layer.
    pub moe: Vec<MoeSpec>,
    /// Decoder layers, with and without experts.
    pub decoder_layers: usize,
}

impl TraceShape {
    /// The shape of a model.
    pub fn of(spec: &ModelSpec) -> TraceShape {
        let map = ExpertMap::of(spec);
        let moe = map.layers.iter().filter_map(|&l| spec.moe(l).cloned()).collect();
        TraceShape { map, moe, decoder_layers: spec.layers.len() }
    }

    /// MoE layer of each of `rows` rows, which are the MoE layers or all decoder layers.
    pub(super) fn rows(&self, rows: usize) -> Result<Vec<Option<usize>>, String> {
        if rows == self.map.n_layers() {
            return Ok((0..rows).map(Some).collect());
        }
        if rows == self.decoder_layers {
            return Ok((0..rows).map(|layer| self.map.moe_index(layer)).collect());
        }
        let (moe, all) = (self.map.n_layers(), self.decoder_layers);
        Err(format!("it has {rows} layers, the model has {all}, {moe} of them with experts"))
    }
}

/// Formats of recordings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceFormat {
    /// Ids of the chosen experts, `[T][L][k]`, as JSON or `.npy` (vLLM's `routed_experts`).
    RoutedExperts,
    /// Router logits in safetensors: `router_logits.LAYER [T, E]`, or `router_logits [L, T, E]`.
    RouterLogits,
    /// SGLang's old counts: CSV `layer_id,expert_id,count`.
    SglangCsv,
    /// SGLang's expert distribution recorder: a torch file (`.pt`).
    SglangRecorder,
    /// llama.cpp's importance matrix: GGUF.
    Imatrix,
}

impl TraceFormat {
    /// All of them.
    pub const ALL: [TraceFormat; 5] = [
        TraceFormat::RoutedExperts,
        TraceFormat::RouterLogits,
        TraceFormat::SglangCsv,
        TraceFormat::SglangRecorder,
        TraceFormat::Imatrix,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            TraceFormat::RoutedExperts => "routed-experts",
            TraceFormat::RouterLogits => "router-logits",
            TraceFormat::SglangCsv => "sglang-csv",
            TraceFormat::SglangRecorder => "sglang-recorder",
            TraceFormat::Imatrix => "imatrix",
        }
    }

    /// The format that a file's first bytes look like.
    pub fn of(start: &[u8]) -> Option<TraceFormat> {
        let text = start.trim_ascii_start();
        match start {
            [b'G', b'G', b'U', b'F', ..] => Some(TraceFormat::Imatrix),
            [b'P', b'K', 3, 4, ..] => Some(TraceFormat::SglangRecorder),
            [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => Some(TraceFormat::RoutedExperts),
            [_, _, _, _, _, 0, 0, 0, b'{', ..] => Some(TraceFormat::RouterLogits),
            _ if text.starts_with(b"[") => Some(TraceFormat::RoutedExperts),
            _ if text.starts_with(b"layer_id") => Some(TraceFormat::SglangCsv),
            _ => None,
        }
    }
}

/// Reads a recording of a model's routing. Tokens of which it is not known whether they are of a prompt or an answer count as
/// prompt tokens. `format` is told by the file's first bytes if it is not given.
///
/// # Errors
/// A file that cannot be read, is in none of the formats, is damaged, or does not fit the model.
pub fn read_trace(path: &Path, format: Option<TraceFormat>, shape: &TraceShape) -> Result<RouterStats, LensError> {
    let what = || path.display().to_string();
    let read = || std::fs::read(path).map_err(|source| LensError::Io { path: path.into(), source });
    let format = match format {
        Some(format) => format,
        None => TraceFormat::of(&first_bytes(path)?).ok_or_else(|| {
            let names = TraceFormat::ALL.map(TraceFormat::name).join(", ");
            let legacy = if path.extension().is_some_and(|e| e == "dat") { imatrix::LEGACY } else { "" };
            LensError::invalid(what(), format!("its format is not known; help: name it with --format: {names}{legacy}"))
        })?,
    };
    let bad = |problem: String| LensError::invalid(what(), problem);
    let mut stats = match format {
        TraceFormat::RoutedExperts => routed_experts::read(&read()?, shape).map_err(bad)?,
        TraceFormat::RouterLogits => router_logits::read(path, shape)?,
        TraceFormat::SglangCsv => sglang::read_csv(&read()?, shape).map_err(bad)?,
        TraceFormat::SglangRecorder => sglang::read_recorder(&read()?, shape).map_err(bad)?,
        TraceFormat::Imatrix => imatrix::read(path)?.stats(shape).map_err(bad)?,
    };
    if stats.prompt.tokens + stats.answer.tokens == 0 {
        return Err(bad("it has no tokens in it".into()));
    }
    if format != TraceFormat::RouterLogits {
        stats.see_only(Seen::Counts);
    }
    Ok(stats)
}

fn first_bytes(path: &Path) -> Result<Vec<u8>, LensError> {
    use std::io::Read as _;
    let io = |source| LensError::Io { path: path.into(), source };
    let mut start = Vec::new();
    std::fs::File::open(path).map_err(io)?.take(64).read_to_end(&mut start).map_err(io)?;
    Ok(start)
}

/// Adds the experts of one token in one MoE layer; negative ids are empty slots. Tells whether there were any.
pub(super) fn add_ids(
    stats: &mut PhaseStats,
    shape: &TraceShape,
    moe: usize,
    ids: impl Iterator<Item = i64> + Clone,
) -> Result<bool, String> {
    let (range, layer) = (shape.map.range(moe), shape.map.layers[moe]);
    let mut number = 0;
    for (j, id) in ids.clone().enumerate().filter(|(_, id)| *id >= 0) {
        let expert = usize::try_from(id).ok().filter(|&e| e < range.len());
        let expert = expert.ok_or_else(|| format!("layer {layer} has no expert {id}, only {}", range.len()))?;
        if ids.clone().take(j).any(|other| other == id) {
            return Err(format!("a token names expert {id} of layer {layer} twice; help: padding must be -1"));
        }
        stats.count[range.start + expert] += 1;
        number += 1;
    }
    let top_k = shape.moe[moe].top_k;
    if number > top_k {
        return Err(format!("a token has {number} experts in layer {layer}, the model chooses {top_k}"));
    }
    Ok(number > 0)
}

/// Fills counts `[L][E]` of prompt tokens, of `rows` rows; the tokens are the choices of the layer with most, divided by `k`.
pub(super) fn add_counts(stats: &mut RouterStats, shape: &TraceShape, rows: &[Vec<u64>]) -> Result<(), String> {
    let mut tokens = 0;
    for (moe, row) in shape.rows(rows.len())?.into_iter().zip(rows) {
        let Some(moe) = moe else { continue };
        let (range, layer) = (shape.map.range(moe), shape.map.layers[moe]);
        if row.len() != range.len() {
            return Err(format!("layer {layer} has {} experts in it, {} in the model", row.len(), range.len()));
        }
        let overflow = || format!("the counts of layer {layer} are too large");
        let mut sum = 0u64;
        for (total, &count) in stats.prompt.count[range].iter_mut().zip(row) {
            *total = total.checked_add(count).ok_or_else(overflow)?;
            sum = sum.checked_add(count).ok_or_else(overflow)?;
        }
        tokens = tokens.max(sum.div_ceil(shape.moe[moe].top_k.max(1) as u64));
    }
    stats.prompt.tokens = stats.prompt.tokens.saturating_add(tokens);
    Ok(())
}
