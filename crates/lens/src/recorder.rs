//! The standard observer: keeps chosen sites of chosen layers as tensors.

use std::collections::BTreeMap;

use candle_core::Tensor;
use quorate_model::{At, Flow, Lens, ModelError, NO_EXPERT, Routing, Site, SiteSet, ops};

/// Keeps every value of the chosen sites that passes by, rows of successive forwards one after the other.
#[derive(Debug, Default)]
pub struct Recorder {
    sites: SiteSet,
    layers: Option<Vec<usize>>,
    floats: BTreeMap<String, Recorded<f32>>,
    ids: BTreeMap<String, Recorded<i64>>,
}

/// A recorded value, rows (positions) first.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded<T> {
    /// Shape.
    pub shape: Vec<usize>,
    /// Values, row-major.
    pub values: Vec<T>,
}

impl Recorder {
    /// Records `sites` in all layers, or in the given decoder layers only.
    pub fn new(sites: &[Site], layers: Option<Vec<usize>>) -> Recorder {
        Recorder { sites: SiteSet::of(sites), layers, ..Recorder::default() }
    }

    /// What was recorded in floating point, by name `SITE` or `SITE.LAYER`; `topk_weights.LAYER` for `routing`.
    pub fn floats(&self) -> &BTreeMap<String, Recorded<f32>> {
        &self.floats
    }

    /// Chosen experts, `topk_ids.LAYER`, -1 for an empty slot.
    pub fn ids(&self) -> &BTreeMap<String, Recorded<i64>> {
        &self.ids
    }

    fn keep(&mut self, name: String, tensor: &Tensor) -> Result<(), ModelError> {
        let values = ops::values(tensor)?;
        let pad = if name.starts_with(Site::AttnScores.name()) { f32::NEG_INFINITY } else { 0.0 };
        append(&mut self.floats, name, tensor.dims(), &values, pad)
    }
}

/// Appends rows. The last axis may grow (attention over a longer context): shorter rows are filled with `pad`.
fn append<T: Copy>(
    map: &mut BTreeMap<String, Recorded<T>>,
    name: String,
    shape: &[usize],
    values: &[T],
    pad: T,
) -> Result<(), ModelError> {
    let entry = map.entry(name.clone()).or_insert_with(|| {
        let mut empty = shape.to_vec();
        empty[0] = 0;
        Recorded { shape: empty, values: Vec::new() }
    });
    let last = shape.len() - 1;
    if entry.shape.len() != shape.len() || entry.shape[1..last.max(1)] != shape[1..last.max(1)] {
        return Err(ModelError::Lens(format!("{name}: shape changed from {:?} to {shape:?}", entry.shape)));
    }
    let width = entry.shape[last].max(shape[last]);
    if last > 0 && width > entry.shape[last] {
        entry.values = widen(&entry.values, entry.shape[last], width, pad);
        entry.shape[last] = width;
    }
    entry.values.extend(if last > 0 { widen(values, shape[last], width, pad) } else { values.to_vec() });
    entry.shape[0] += shape[0];
    Ok(())
}

fn widen<T: Copy>(values: &[T], from: usize, to: usize, pad: T) -> Vec<T> {
    if from == to {
        return values.to_vec();
    }
    let mut out = Vec::with_capacity(values.len() / from.max(1) * to);
    for row in values.chunks(from.max(1)) {
        out.extend_from_slice(row);
        out.resize(out.len() + to - from, pad);
    }
    out
}

impl Lens for Recorder {
    fn sites(&self, layer: usize) -> SiteSet {
        match &self.layers {
            Some(layers) if !layers.contains(&layer) => {
                let last = [Site::FinalNorm, Site::Logits].into_iter().filter(|&s| self.sites.contains(s));
                SiteSet::of(&last.collect::<Vec<_>>())
            }
            _ => self.sites,
        }
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        let name = if at.site.per_layer() { format!("{}.{}", at.site, at.layer) } else { at.site.to_string() };
        self.keep(name, value)?;
        Ok(Flow::Continue)
    }

    fn routing(&mut self, at: &At<'_>, routing: &mut Routing) -> Result<Flow, ModelError> {
        let ids: Vec<i64> = routing.ids.iter().map(|&id| if id == NO_EXPERT { -1 } else { i64::from(id) }).collect();
        append(&mut self.ids, format!("topk_ids.{}", at.layer), &[at.rows.len(), routing.k], &ids, -1)?;
        self.keep(format!("topk_weights.{}", at.layer), &routing.gates)?;
        Ok(Flow::Continue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_appended_and_short_rows_padded() {
        let mut map = BTreeMap::new();
        append(&mut map, "a".into(), &[1, 2], &[1.0, 2.0], 0.0).unwrap();
        append(&mut map, "a".into(), &[1, 3], &[3.0, 4.0, 5.0], 0.0).unwrap();
        append(&mut map, "a".into(), &[1, 1], &[6.0], 0.0).unwrap();
        assert_eq!(map["a"], Recorded { shape: vec![3, 3], values: vec![1., 2., 0., 3., 4., 5., 6., 0., 0.] });
        assert!(append(&mut map, "a".into(), &[1, 2, 3], &[0.0; 6], 0.0).is_err());
    }
}
