//! What the relatives need to know of a task's texts, recorded in one pass.

use std::cell::OnceCell;

use candle_core::Tensor;
use quorate_eval::encode::EncodedItem;
use quorate_lens::{ExpertMap, OutputProfiler, OutputStats, Profiler, RouterStats, ScoreTable};
use quorate_model::{At, Chain, Flow, Lens, Model, ModelError, Site, SiteSet, ops};

use super::LayerFit;
use crate::{Lab, MethodError, Phases};

/// What was recorded of the calibration texts.
pub struct Calibration {
    /// Sums of the routing, all tokens.
    pub stats: RouterStats,
    /// Means and variances of the experts' outputs, all tokens.
    pub outputs: OutputStats,
    /// Some tokens of each MoE layer.
    pub sample: Vec<LayerSample>,
    fits: OnceCell<Vec<LayerFit>>,
}

/// Some tokens of one MoE layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerSample {
    /// Decoder layer.
    pub layer: usize,
    /// Inputs of the router and the experts, `[T, d]`.
    pub inputs: Vec<f32>,
    /// Router logits, `[T, E]`.
    pub logits: Vec<f32>,
}

impl Calibration {
    /// Records texts, and of their tokens about `tokens` evenly spread ones in full.
    ///
    /// # Errors
    /// A dense model, no texts, or as [`Lab::observe`].
    pub fn record(lab: &mut Lab<'_>, items: &[EncodedItem], tokens: usize) -> Result<Calibration, MethodError> {
        let map = lab.experts()?;
        let mut profiler = Profiler::new(RouterStats::new(map.clone()));
        let mut outputs = OutputProfiler::new(OutputStats::new(map.clone(), lab.model.spec().hidden_size));
        let mut sampler = Sampler::new(&map, items, tokens)?;
        let mut lenses = Chain(vec![&mut profiler, &mut outputs, &mut sampler]);
        lab.observe("recording the calibration texts", items, &mut lenses, |_, _| {})?;
        profiler.count_items(items.len() as u64);
        let (stats, outputs) = (profiler.into_stats(), outputs.into_stats());
        Ok(Calibration { stats, outputs, sample: sampler.layers, fits: OnceCell::new() })
    }

    /// Records anew only the sampled tokens, with the model as it is now.
    ///
    /// # Errors
    /// As [`Calibration::record`].
    pub fn sample(lab: &mut Lab<'_>, items: &[EncodedItem], tokens: usize) -> Result<Vec<LayerSample>, MethodError> {
        let mut sampler = Sampler::new(&lab.experts()?, items, tokens)?;
        lab.observe("recording the layers' inputs anew", items, &mut sampler, |_, _| {})?;
        Ok(sampler.layers)
    }

    /// Which experts.
    pub fn map(&self) -> &ExpertMap {
        &self.stats.map
    }

    /// The table of a metric, prompt and answer weighing alike.
    ///
    /// # Errors
    /// An unknown metric.
    pub fn table(&self, metric: &str) -> Result<ScoreTable, MethodError> {
        Ok(crate::metric(metric)?.table(&self.stats, Phases::Balanced))
    }

    /// All experts' outputs on the sampled tokens of every MoE layer, computed when first asked for.
    ///
    /// # Errors
    /// Experts that are not in memory.
    pub fn fits(&self, model: &Model) -> Result<&[LayerFit], MethodError> {
        if self.fits.get().is_none() {
            let fits = self.sample.iter().map(|s| LayerFit::new(model, s)).collect::<Result<Vec<_>, _>>()?;
            return Ok(self.fits.get_or_init(|| fits));
        }
        Ok(self.fits.get().map_or(&[], Vec::as_slice))
    }
}

/// Keeps every so-many-th token of each MoE layer.
struct Sampler {
    map: ExpertMap,
    stride: usize,
    /// Tokens seen, per MoE layer.
    seen: Vec<usize>,
    layers: Vec<LayerSample>,
}

impl Sampler {
    fn new(map: &ExpertMap, items: &[EncodedItem], tokens: usize) -> Result<Sampler, MethodError> {
        let all: usize = items.iter().map(EncodedItem::len).sum();
        if all == 0 || tokens == 0 {
            return Err(MethodError::needs(
                "there are no calibration texts",
                "give a task with items and --tokens above 0",
            ));
        }
        let layers = map.layers.iter().map(|&layer| LayerSample { layer, ..LayerSample::default() }).collect();
        Ok(Sampler { map: map.clone(), stride: all.div_ceil(tokens), seen: vec![0; map.n_layers()], layers })
    }
}

impl Lens for Sampler {
    fn sites(&self, layer: usize) -> SiteSet {
        match self.map.moe_index(layer) {
            Some(_) => SiteSet::of(&[Site::FfnIn, Site::RouterLogits]),
            None => SiteSet::NONE,
        }
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        let Some(moe) = self.map.moe_index(at.layer) else { return Ok(Flow::Continue) };
        let layer = &mut self.layers[moe];
        let (n, width) = value.dims2()?;
        let x = ops::values(value)?;
        let kept = if at.site == Site::FfnIn { &mut layer.inputs } else { &mut layer.logits };
        let rows = (0..n).filter(|row| (self.seen[moe] + row).is_multiple_of(self.stride));
        rows.for_each(|row| kept.extend_from_slice(&x[row * width..(row + 1) * width]));
        if at.site == Site::RouterLogits {
            self.seen[moe] += n; // the later of the two sites
        }
        Ok(Flow::Continue)
    }
}
