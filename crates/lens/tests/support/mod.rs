//! Interventions and recordings in few words. Models and comparisons are those of the engine's own tests.
#![allow(dead_code, unused_imports, reason = "each test file uses its own part")]

#[path = "../../../model/tests/support/mod.rs"]
mod engine;

use std::path::Path;

use quorate_formats::{TensorOut, write_safetensors};
use quorate_lens::{Indices, Intervention, Interventions, Op, PhaseSelector, Recorded, Recorder, Value};
use quorate_model::{KvCache, Model, Segment, Site};
use tempfile::TempDir;

pub use engine::*;

/// An operation everywhere at a site.
pub fn at(site: Site, op: Op) -> Intervention {
    let (layers, units, positions) = (Indices::All, Indices::All, Indices::All);
    Intervention { site, layers, units, positions, phase: PhaseSelector::All, op }
}

/// An operation at a site of one layer.
pub fn in_layer(layer: usize, site: Site, op: Op) -> Intervention {
    Intervention { layers: Indices::of(&[layer]), ..at(site, op) }
}

/// The same on some units.
pub fn on_units(units: &[usize], intervention: Intervention) -> Intervention {
    Intervention { units: Indices::of(units), ..intervention }
}

pub fn inline(values: impl Into<Vec<f32>>) -> Value {
    Value::Inline(values.into())
}

pub fn prepare(model: &Model, list: &[Intervention]) -> Interventions {
    Interventions::prepare(list, model.spec(), Path::new("")).unwrap()
}

/// Logits of every row with interventions.
pub fn logits_with(model: &Model, tokens: &[u32], list: &[Intervention]) -> Vec<f32> {
    logits(model, tokens, &mut prepare(model, list))
}

/// What a text's pass leaves at some sites.
pub fn record(model: &Model, tokens: &[u32], sites: &[Site]) -> Recorder {
    record_in_turn(model, &[rows(0, tokens)], sites)
}

pub fn record_in_turn(model: &Model, pieces: &[Segment], sites: &[Site]) -> Recorder {
    let mut recorder = Recorder::new(sites, None);
    logits_in_turn(model, pieces, &mut recorder);
    recorder
}

/// A recorded value, by site and layer.
pub fn at_site(recorder: &Recorder, site: Site, layer: usize) -> &Recorded<f32> {
    let name = if site.per_layer() { format!("{site}.{layer}") } else { site.to_string() };
    recorder.floats().get(&name).unwrap_or_else(|| panic!("{name} was not recorded"))
}

/// Whether a decoder layer has a site: all layers have the others.
pub fn has(model: &Model, layer: usize, site: Site) -> bool {
    use Site::{ExpertHidden, ExpertOut, MlpHidden, MoeOut, RouterLogits, Routing, Selection};
    match (site, model.spec().moe(layer)) {
        (RouterLogits | Selection | Routing | ExpertHidden | ExpertOut | MoeOut, moe) => moe.is_some(),
        (MlpHidden, Some(moe)) => moe.shared.is_some(),
        _ => true,
    }
}

/// The sites that hold tensors.
pub fn tensor_sites() -> impl Iterator<Item = Site> {
    Site::ALL.iter().copied().filter(|&site| site != Site::Routing)
}

/// Those of them that any layer of the model has.
pub fn sites_of(model: &Model) -> impl Iterator<Item = Site> {
    tensor_sites().filter(|&site| (0..model.spec().layers.len()).any(|l| has(model, l, site)))
}

/// A folder with the recordings `SITE.LAYER` as a safetensors file, for interventions that read it.
pub fn saved(recorder: &Recorder) -> TempDir {
    let dir = TempDir::new().unwrap();
    let floats = recorder.floats().iter();
    let tensors = floats.map(|(name, recorded)| TensorOut::f32(name, &recorded.shape, recorded.values.as_slice()));
    write_safetensors(&dir.path().join("run.safetensors"), None, tensors).unwrap();
    dir
}

/// The tensors of a site in that file.
pub fn from_file(site: Site) -> Value {
    let tensor = if site.per_layer() { format!("{site}.{{layer}}") } else { site.to_string() };
    Value::File { file: "run.safetensors".into(), tensor }
}
