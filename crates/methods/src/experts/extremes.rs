//! Recorders of what is extreme: the largest values that experts read and write, the largest of the residual stream, and
//! how much attention the first token gets.

use candle_core::Tensor;
use quorate_formats::spec::ModelSpec;
use quorate_lens::ExpertMap;
use quorate_model::{At, Flow, Lens, ModelError, NO_EXPERT, Rows, Site, SiteSet, ops};
use serde::Serialize;

/// The value of largest magnitude that passed a place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Peak {
    /// Its magnitude.
    pub value: f32,
    /// Coordinate of the vector.
    pub channel: usize,
    /// Position in its text.
    pub position: usize,
    /// Token there.
    pub token: u32,
}

impl Peak {
    /// Takes in one token's vector; the first of equal values stays.
    fn see(&mut self, vector: &[f32], rows: &Rows, row: usize) {
        for (channel, value) in vector.iter().map(|v| v.abs()).enumerate() {
            if value > self.value {
                *self = Peak { value, channel, position: rows.position[row], token: rows.token[row] };
            }
        }
    }
}

/// The peaks of one expert.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Peaks {
    /// Of the output of its down projection, before the gate.
    pub output: Peak,
    /// Of the input of its down projection.
    pub input: Peak,
    /// Tokens that it saw.
    pub tokens: u64,
}

/// The lens that finds the peaks of every expert over all rows of all texts: not only over the first row that each expert
/// gets, where the paper's code looks.
#[derive(Debug)]
pub struct PeakRecorder {
    map: ExpertMap,
    /// Per MoE layer, whether it has a shared expert.
    has_shared: Vec<bool>,
    width: usize,
    routed: Vec<Peaks>,
    shared: Vec<Peaks>,
    /// Sum of the routed experts of the layer under way, where a shared one is to be told from it.
    routed_sum: Vec<f32>,
}

impl PeakRecorder {
    /// A recorder that has seen nothing.
    pub fn new(spec: &ModelSpec) -> PeakRecorder {
        let map = ExpertMap::of(spec);
        let has_shared: Vec<bool> =
            map.layers.iter().map(|&l| spec.moe(l).is_some_and(|m| m.shared.is_some())).collect();
        PeakRecorder {
            routed: vec![Peaks::default(); map.total()],
            shared: vec![Peaks::default(); map.n_layers()],
            has_shared,
            width: spec.hidden_size,
            routed_sum: Vec::new(),
            map,
        }
    }

    /// Peaks of the routed experts, numbered by [`ExpertMap`].
    pub fn routed(&self) -> &[Peaks] {
        &self.routed
    }

    /// Peaks of the shared expert of each MoE layer, as it is added (after its own gate, where it has one); `None` where
    /// there is none.
    pub fn shared(&self) -> impl Iterator<Item = Option<&Peaks>> {
        self.shared.iter().zip(&self.has_shared).map(|(peaks, &has)| has.then_some(peaks))
    }

    fn experts(&mut self, at: &At<'_>, moe: usize, values: &[f32]) {
        let Some(routing) = at.routing.filter(|r| !r.ids.is_empty()) else { return };
        let (start, width) = (self.map.range(moe).start, values.len() / routing.ids.len());
        for (slot, (&id, vector)) in routing.ids.iter().zip(values.chunks_exact(width)).enumerate() {
            if id == NO_EXPERT {
                continue;
            }
            let peaks = &mut self.routed[start + id as usize];
            if at.site == Site::ExpertHidden {
                peaks.tokens += 1;
                peaks.input.see(vector, at.rows, slot / routing.k);
            } else {
                peaks.output.see(vector, at.rows, slot / routing.k);
            }
        }
    }
}

impl Lens for PeakRecorder {
    fn sites(&self, layer: usize) -> SiteSet {
        match self.map.moe_index(layer) {
            None => SiteSet::NONE,
            Some(moe) if self.has_shared[moe] => {
                SiteSet::of(&[Site::ExpertHidden, Site::ExpertOut, Site::MoeOut, Site::MlpHidden, Site::MlpOut])
            }
            Some(_) => SiteSet::of(&[Site::ExpertHidden, Site::ExpertOut]),
        }
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        let Some(moe) = self.map.moe_index(at.layer) else { return Ok(Flow::Continue) };
        let values = ops::values(value)?;
        match at.site {
            Site::ExpertHidden | Site::ExpertOut => self.experts(at, moe, &values),
            Site::MoeOut => self.routed_sum = values.to_vec(),
            Site::MlpHidden => {
                let (peaks, rows) = (&mut self.shared[moe], at.rows.len());
                peaks.tokens += rows as u64;
                let vectors = values.chunks_exact(values.len() / rows.max(1)).enumerate();
                vectors.for_each(|(row, vector)| peaks.input.see(vector, at.rows, row));
            }
            Site::MlpOut => {
                let difference: Vec<f32> =
                    values.iter().zip(&self.routed_sum).map(|(all, routed)| all - routed).collect();
                let vectors = difference.chunks_exact(self.width).enumerate();
                vectors.for_each(|(row, vector)| self.shared[moe].output.see(vector, at.rows, row));
            }
            _ => {}
        }
        Ok(Flow::Continue)
    }
}

/// The lens that finds the largest values of the residual stream and sums the attention to the first token.
#[derive(Clone, Debug)]
pub struct SinkRecorder {
    layers: usize,
    width: usize,
    /// Largest magnitude per channel: entering the first layer, then after each layer, `[1 + L][d]`.
    residual: Vec<Vec<f32>>,
    /// Attention to the first token, summed over the queries after it, `[L][H]`.
    attention: Vec<Vec<f64>>,
    queries: u64,
}

impl SinkRecorder {
    /// A recorder that has seen nothing.
    pub fn new(spec: &ModelSpec) -> SinkRecorder {
        let (layers, width) = (spec.layers.len(), spec.hidden_size);
        let attention = spec.layers.iter().map(|l| vec![0.0; l.attn.n_heads]).collect();
        SinkRecorder { layers, width, residual: vec![vec![0.0; width]; layers + 1], attention, queries: 0 }
    }

    /// Largest magnitude of each channel: entering the first layer, then after each layer, `[1 + L][d]`.
    pub fn residual(&self) -> &[Vec<f32>] {
        &self.residual
    }

    /// Share of the attention of the later tokens that the first token gets, `[L][H]`; zeros if no text has two tokens.
    pub fn attention(&self) -> Vec<Vec<f64>> {
        let queries = self.queries.max(1) as f64;
        self.attention.iter().map(|heads| heads.iter().map(|sum| sum / queries).collect()).collect()
    }
}

impl Lens for SinkRecorder {
    fn sites(&self, layer: usize) -> SiteSet {
        match layer {
            0 => SiteSet::of(&[Site::ResidPre, Site::AttnPattern, Site::ResidPost]),
            l if l < self.layers => SiteSet::of(&[Site::AttnPattern, Site::ResidPost]),
            _ => SiteSet::NONE,
        }
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        let values = ops::values(value)?;
        if at.site != Site::AttnPattern {
            let largest = &mut self.residual[at.layer + usize::from(at.site == Site::ResidPost)];
            for row in values.chunks_exact(self.width) {
                largest.iter_mut().zip(row).for_each(|(most, v)| *most = most.max(v.abs()));
            }
            return Ok(Flow::Continue);
        }
        let (_, heads, keys) = value.dims3()?;
        for (row, _) in at.rows.position.iter().enumerate().filter(|(_, p)| **p > 0) {
            self.queries += u64::from(at.layer == 0);
            for (head, sum) in self.attention[at.layer].iter_mut().enumerate() {
                *sum += f64::from(values[(row * heads + head) * keys]);
            }
        }
        Ok(Flow::Continue)
    }
}

/// The lens that takes the shared expert's output away in some decoder layers.
pub struct WithoutShared {
    /// The layers.
    pub layers: Vec<usize>,
    routed: Option<Tensor>,
}

impl WithoutShared {
    /// In these decoder layers.
    pub fn new(layers: Vec<usize>) -> WithoutShared {
        WithoutShared { layers, routed: None }
    }
}

impl Lens for WithoutShared {
    fn sites(&self, layer: usize) -> SiteSet {
        if self.layers.contains(&layer) { SiteSet::of(&[Site::MoeOut, Site::MlpOut]) } else { SiteSet::NONE }
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        if at.site == Site::MoeOut {
            self.routed = Some(value.clone());
        } else if let Some(routed) = self.routed.take() {
            *value = routed;
        }
        Ok(Flow::Continue)
    }
}
