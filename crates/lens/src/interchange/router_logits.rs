//! Dumps of router logits, as transformers' `output_router_logits=True` gives them, in safetensors: `router_logits.LAYER`
//! `[T, E]` or `[B, T, E]`, numbered by decoder layers or by MoE layers, or one `router_logits` `[L, T, E]` or `[L, B, T, E]`.
//! This program's own recordings of the site `router_logits` are of the first kind.
//!
//! Some versions of transformers return probabilities: rows that are nowhere negative and sum to 1. They are logits up to a
//! constant, and scores that feel that constant stay unknown. An integer tensor `attention_mask` (`[T]` or `[B, T]`) leaves out
//! padding.

use std::path::Path;

use quorate_formats::SafetensorsFile;
use quorate_model::route_logits;

use super::traces::TraceShape;
use crate::{LensError, RouterStats, Seen};

/// How far from 1 a row of rounded probabilities may sum.
const SUM_SLACK: f32 = 0.02;

/// Reads a dump.
pub(super) fn read(path: &Path, shape: &TraceShape) -> Result<RouterStats, LensError> {
    let bad = |problem: String| LensError::invalid(path.display().to_string(), problem);
    let file = SafetensorsFile::open(path)?;
    let (mut layers, items) = layers_of(&file, shape, &bad)?;
    let tokens = layers.iter().zip(&shape.map.experts).map(|(logits, e)| logits.len() / e).next().unwrap_or(0);
    let masked = file.tensors().iter().any(|t| t.name == "attention_mask");
    let keep =
        if masked { file.read_i64("attention_mask")?.iter().map(|&v| v != 0).collect() } else { vec![true; tokens] };
    for (moe, logits) in layers.iter().enumerate() {
        let found = logits.len() / shape.map.experts[moe];
        if found != keep.len() {
            let layer = shape.map.layers[moe];
            return Err(bad(format!("layer {layer} has {found} tokens, {} expected", keep.len())));
        }
    }
    let seen = if are_probabilities(&layers, shape, &keep) { Seen::Probabilities } else { Seen::Logits };
    if seen == Seen::Probabilities {
        layers.iter_mut().flatten().for_each(|v| *v = v.ln());
    }
    let mut stats = RouterStats::new(shape.map.clone());
    stats.items = items as u64;
    for (moe, logits) in layers.iter().enumerate() {
        let (spec, start) = (&shape.moe[moe], shape.map.range(moe).start);
        let (e, k) = (spec.n_experts, spec.top_k);
        let kept: Vec<&[f32]> =
            logits.chunks_exact(e).zip(&keep).filter(|(_, keep)| **keep).map(|(row, _)| row).collect();
        let (ids, gates) = route_logits(spec, shape.map.layers[moe], &kept.concat())?;
        let mut confidence = vec![0f32; k];
        for ((row, ids), gates) in kept.iter().zip(ids.chunks_exact(k)).zip(gates.chunks_exact(k)) {
            stats.prompt.add_routing(moe, start, row, ids, gates, &mut confidence);
        }
    }
    stats.see_only(seen);
    Ok(stats)
}

/// Logits `[T, E]` of each MoE layer, and the number of texts.
fn layers_of(
    file: &SafetensorsFile,
    shape: &TraceShape,
    bad: &dyn Fn(String) -> LensError,
) -> Result<(Vec<Vec<f32>>, usize), LensError> {
    let texts = |inner: &[usize]| if inner.len() == 3 { inner[0] } else { 1 };
    let fits = |name: &str, dims: &[usize], experts: usize| match dims {
        [.., e] if *e == experts && (2..=3).contains(&dims.len()) => Ok(()),
        _ => Err(bad(format!("`{name}` has the shape {dims:?}, [tokens, {experts}] is needed"))),
    };
    if let Some(whole) = file.tensors().iter().find(|t| t.name == "router_logits") {
        let [rows, inner @ ..] = whole.shape.as_slice() else {
            return Err(bad("`router_logits` is a single number".into()));
        };
        let rows = shape.rows(*rows).map_err(bad)?;
        shape.map.experts.iter().try_for_each(|&e| fits("router_logits", inner, e))?;
        let (values, len) = (file.read_f32("router_logits")?, inner.iter().product::<usize>());
        let layer = |(i, moe): (usize, &Option<usize>)| moe.map(|_| values[i * len..(i + 1) * len].to_vec());
        return Ok((rows.iter().enumerate().filter_map(layer).collect(), texts(inner)));
    }
    let number = |name: &str| name.strip_prefix("router_logits.").and_then(|n| n.parse::<usize>().ok());
    let mut found: Vec<usize> = file.tensors().iter().filter_map(|t| number(&t.name)).collect();
    found.sort_unstable();
    let by_moe: Vec<usize> = (0..shape.map.n_layers()).collect();
    if found != shape.map.layers && found != by_moe {
        return Err(bad(format!(
            "it has `router_logits` of the layers {found:?}; help: give router_logits.LAYER for the layers {:?}, or one \
             router_logits [L, T, E]",
            shape.map.layers
        )));
    }
    let mut layers = Vec::with_capacity(found.len());
    let mut items = 1;
    for (moe, layer) in found.iter().enumerate() {
        let name = format!("router_logits.{layer}");
        let tensor = file.tensor(&name)?;
        fits(&name, &tensor.shape, shape.map.experts[moe])?;
        items = texts(&tensor.shape);
        layers.push(file.read_f32(&name)?);
    }
    Ok((layers, items))
}

fn are_probabilities(layers: &[Vec<f32>], shape: &TraceShape, keep: &[bool]) -> bool {
    layers.iter().zip(&shape.map.experts).all(|(logits, &e)| {
        let rows = logits.chunks_exact(e).zip(keep).filter(|(_, keep)| **keep);
        rows.map(|(row, _)| row)
            .all(|row| row.iter().all(|&v| v >= 0.0) && (row.iter().sum::<f32>() - 1.0).abs() < SUM_SLACK)
    })
}
