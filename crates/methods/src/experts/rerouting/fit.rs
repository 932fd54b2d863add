//! The fit: vectors on router logits that lower the loss of the text so far, and a text generated with them.

use std::collections::BTreeMap;

use candle_core::{Tensor, Var};
use clap::{Args, ValueEnum};
use quorate_formats::spec::{ModelSpec, RouterScore};
use quorate_lens::{ExpertMap, ItemTrace, TraceRecorder};
use quorate_model::{At, Chain, Flow, Guide, Lens, Model, ModelError, Site, SiteSet, ops};
use quorate_train::{AdamW, AdamWOptions, AnswerLoss, Example, Objective};
use serde::Serialize;

use crate::MethodError;

/// How vectors are fitted, and when.
#[derive(Args, Clone, Debug, Serialize)]
pub struct FitOptions {
    /// Steps of each fit (0: no fit, plain decoding)
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub fit_steps: usize,
    /// Tokens generated between fits
    #[arg(long, default_value_t = 128, value_name = "M", value_parser = clap::value_parser!(u32).range(1..))]
    pub fit_every: u32,
    /// Learning rate (Adam)
    #[arg(long, default_value_t = 0.01, value_name = "RATE")]
    pub fit_rate: f64,
    /// Layers whose vectors a fit changes, by routing uncertainty
    #[arg(long, value_enum, default_value_t = By::Highest)]
    pub fit_by: By,
    /// Share of the layers that `highest` and `lowest` choose
    #[arg(long, default_value_t = 0.5, value_name = "SHARE")]
    pub fit_share: f64,
    /// Keep the KV cache that was made before a fit; left out, the text so far is computed anew
    #[arg(long)]
    pub stale_cache: bool,
}

/// Which layers' vectors a fit changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum By {
    /// Those that route with the least probability on the chosen experts
    Highest,
    /// Those that route with the most
    Lowest,
    /// All, each with a rate in proportion to its uncertainty
    Soft,
}

impl Default for FitOptions {
    fn default() -> FitOptions {
        FitOptions {
            fit_steps: 5,
            fit_every: 128,
            fit_rate: 0.01,
            fit_by: By::Highest,
            fit_share: 0.5,
            stale_cache: false,
        }
    }
}

/// What a fit did.
#[derive(Clone, Debug, Serialize)]
pub struct Fit {
    /// Tokens of the text it was fitted to.
    pub tokens: usize,
    /// Mean loss of the text's tokens before it, in nats.
    pub before: f64,
    /// The same after it.
    pub after: f64,
    /// Routing uncertainty of each MoE layer before it.
    pub uncertainty: Vec<f64>,
    /// Each layer's part of the learning rate; 0 was not changed.
    pub weights: Vec<f64>,
    /// Norm of each layer's vector after it.
    pub norms: Vec<f64>,
    /// Share of the chosen experts, over tokens and layers, that others replaced.
    pub rerouted: f64,
}

impl std::fmt::Display for Fit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Fit { tokens, before, after, rerouted, .. } = self;
        let norm = self.norms.iter().map(|n| n * n).sum::<f64>().sqrt();
        let share = 100.0 * rerouted;
        write!(
            f,
            "fitted to {tokens} tokens: loss {before:.3} -> {after:.3}, norm {norm:.3}, {share:.1}% of experts rerouted"
        )
    }
}

/// Vectors by decoder layer, each with a value per expert.
pub type Vectors = BTreeMap<usize, Vec<f32>>;

/// Vectors added to the router logits of every token, one per MoE layer; zero at first.
pub struct Rerouting {
    options: FitOptions,
    layers: Vec<usize>,
    deltas: Vec<Var>,
    /// Added besides, and never fitted: damage to be repaired.
    damage: Vectors,
}

impl Rerouting {
    /// Zero vectors for the layers of a model. A new text needs new ones.
    ///
    /// # Errors
    /// A dense model, or options that make no sense.
    pub fn new(spec: &ModelSpec, options: &FitOptions) -> Result<Rerouting, MethodError> {
        let map = ExpertMap::of(spec);
        if map.layers.is_empty() {
            let help = "rerouting needs a mixture-of-experts model";
            return Err(MethodError::needs("the model has no experts", help));
        }
        if !(options.fit_rate > 0.0 && options.fit_rate.is_finite()) {
            let what = format!("a learning rate of {} cannot fit anything", options.fit_rate);
            return Err(MethodError::needs(what, "give a --fit-rate above 0"));
        }
        if !(options.fit_share > 0.0 && options.fit_share <= 1.0) {
            let what = format!("{} is no share of the layers", options.fit_share);
            return Err(MethodError::needs(what, "give a --fit-share above 0, up to 1"));
        }
        let zeros = |&e: &usize| Var::zeros(e, candle_core::DType::F32, &candle_core::Device::Cpu);
        let deltas = map.experts.iter().map(zeros).collect::<Result<_, _>>()?;
        Ok(Rerouting { options: options.clone(), layers: map.layers, deltas, damage: Vectors::new() })
    }

    /// For a model that other vectors damage.
    pub fn damaged(mut self, damage: Vectors) -> Rerouting {
        self.damage = damage;
        self
    }

    /// The fitted vectors as they are.
    ///
    /// # Errors
    /// None that is expected: the vectors are plain f32.
    pub fn values(&self) -> Result<Vectors, ModelError> {
        let values = |(layer, delta): (&usize, &Var)| Ok((*layer, ops::values(delta.as_tensor())?.to_vec()));
        self.layers.iter().zip(&self.deltas).map(values).collect()
    }

    /// The lens that adds the vectors. At zero it visits nothing: the pass is the plain one, bit for bit.
    ///
    /// # Errors
    /// As [`Rerouting::values`].
    pub fn lens(&self) -> Result<Shift, ModelError> {
        Shift::new(&sum(&self.values()?, &self.damage))
    }

    /// Fits the vectors to a text, from where they are: `fit_steps` steps of Adam on the cross entropy of its tokens, the
    /// choice of experts a constant of each step.
    ///
    /// # Errors
    /// A text with fewer than two tokens, a loss that is not a number, and as [`Model::forward`].
    pub fn fit(&mut self, model: &Model, text: &[u32]) -> Result<Fit, ModelError> {
        let (Some((first, rest)), true) = (text.split_first(), text.len() > 1) else {
            let message = "a text of one token predicts nothing to fit to; help: give a longer prompt";
            return Err(ModelError::Lens(message.to_string()));
        };
        let text = Example { prompt: vec![*first], answer: rest.to_vec() };
        let (before, trace) = self.measure(model, &text)?;
        let uncertainty = uncertainty(model.spec(), &trace);
        let weights = layer_weights(&uncertainty, self.options.fit_by, self.options.fit_share);
        let mut states: Vec<AdamW> = self.deltas.iter().map(|d| AdamW::new(d.elem_count())).collect();
        for _ in 0..self.options.fit_steps {
            self.step(model, &text, &weights, &mut states)?;
        }
        let (after, new) =
            if self.options.fit_steps == 0 { (before, trace.clone()) } else { self.measure(model, &text)? };
        let norm = |v: &Vec<f32>| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let norms = self.values()?.values().map(norm).collect();
        let (tokens, rerouted) = (rest.len() + 1, rerouted(&trace, &new));
        Ok(Fit { tokens, before, after, uncertainty, weights, norms, rerouted })
    }

    /// Mean loss, and the routing behind it.
    fn measure(&self, model: &Model, text: &Example) -> Result<(f64, ItemTrace), ModelError> {
        let mut recorder = TraceRecorder::new(ExpertMap::of(model.spec()), true);
        let loss = {
            let mut shift = self.lens()?;
            let mut lens = Chain(vec![&mut shift, &mut recorder]);
            AnswerLoss::with_lens(&mut lens).loss(model, &[text])?
        };
        let mean = f64::from(loss.sum.to_scalar::<f32>()?) / loss.terms as f64;
        let trace = recorder.into_trace().items.pop();
        Ok((mean, trace.ok_or_else(|| ModelError::Lens("a lens stopped a pass".to_string()))?))
    }

    /// One step of Adam.
    fn step(&mut self, model: &Model, text: &Example, weights: &[f64], states: &mut [AdamW]) -> Result<(), ModelError> {
        let mut shift = self.tracked(weights)?;
        let loss = AnswerLoss::with_lens(&mut shift).loss(model, &[text])?;
        let value = loss.sum.to_scalar::<f32>()?;
        if !value.is_finite() {
            let message = format!("the loss is {value}; help: use a smaller learning rate");
            return Err(ModelError::Lens(message));
        }
        let grads = loss.sum.backward()?;
        for ((delta, weight), state) in self.deltas.iter().zip(weights).zip(states) {
            let Some(gradient) = grads.get(delta).filter(|_| *weight > 0.0) else { continue };
            let gradient: Vec<f32> = ops::values(gradient)?.iter().map(|g| g / loss.terms as f32).collect();
            let mut values = ops::values(delta.as_tensor())?.to_vec();
            let rate = self.options.fit_rate * weight;
            let whole = std::iter::once(0..values.len()).collect::<Vec<_>>();
            state.step(&AdamWOptions::default(), rate, &mut values, &gradient, &whole);
            delta.set(&ops::tensor(values, delta.dims())?)?;
        }
        Ok(())
    }

    /// The lens, with gradient in layers that are to change.
    fn tracked(&self, weights: &[f64]) -> Result<Shift, ModelError> {
        let mut deltas = BTreeMap::new();
        for ((layer, delta), weight) in self.layers.iter().zip(&self.deltas).zip(weights) {
            let mut tensor = delta.as_tensor().clone();
            if *weight == 0.0 {
                tensor = tensor.detach();
            }
            if let Some(damage) = self.damage.get(layer) {
                tensor = (tensor + ops::tensor(damage.clone(), &[damage.len()])?)?;
            }
            deltas.insert(*layer, tensor);
        }
        Ok(Shift { deltas })
    }
}

/// The sum of vectors; those that one has not are zero in it.
pub(super) fn sum(a: &Vectors, b: &Vectors) -> Vectors {
    let mut sum = a.clone();
    for (layer, b) in b {
        let a = sum.entry(*layer).or_insert_with(|| vec![0.0; b.len()]);
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    }
    sum
}

/// Adds a vector to the router logits of every token.
pub struct Shift {
    deltas: BTreeMap<usize, Tensor>,
}

impl Shift {
    /// Vectors `[E]` by decoder layer; layers whose vector is zero are not visited.
    ///
    /// # Errors
    /// None that is expected.
    pub fn new(vectors: &Vectors) -> Result<Shift, ModelError> {
        let moved = vectors.iter().filter(|(_, d)| d.iter().any(|v| *v != 0.0));
        let tensor = |(layer, d): (&usize, &Vec<f32>)| Ok((*layer, ops::tensor(d.clone(), &[d.len()])?));
        Ok(Shift { deltas: moved.map(tensor).collect::<Result<_, ModelError>>()? })
    }
}

impl Lens for Shift {
    fn sites(&self, layer: usize) -> SiteSet {
        if self.deltas.contains_key(&layer) { SiteSet::of(&[Site::RouterLogits]) } else { SiteSet::NONE }
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        if let Some(delta) = self.deltas.get(&at.layer) {
            *value = value.broadcast_add(delta)?;
        }
        Ok(Flow::Continue)
    }
}

/// Refits while a text is generated: before its first token, and after every `fit_every` of them.
pub struct Rerouter<'a> {
    rerouting: Rerouting,
    /// Every fit so far.
    pub fits: Vec<Fit>,
    model: &'a Model,
    shift: Shift,
    /// Length of the text at the last fit.
    fitted: Option<usize>,
}

impl<'a> Rerouter<'a> {
    /// For one text, with new vectors.
    ///
    /// # Errors
    /// As [`Rerouting::lens`].
    pub fn new(model: &'a Model, rerouting: Rerouting) -> Result<Rerouter<'a>, ModelError> {
        let shift = rerouting.lens()?;
        Ok(Rerouter { rerouting, fits: Vec::new(), model, shift, fitted: None })
    }
}

impl Guide for Rerouter<'_> {
    fn lens(&mut self) -> &mut dyn Lens {
        &mut self.shift
    }

    fn revise(&mut self, text: &[u32]) -> Result<bool, ModelError> {
        let options = &self.rerouting.options;
        let due = self.fitted.is_none_or(|at| text.len() - at >= options.fit_every as usize);
        if options.fit_steps == 0 || !due {
            return Ok(false);
        }
        let anew = !options.stale_cache;
        self.fitted = Some(text.len());
        self.fits.push(self.rerouting.fit(self.model, text)?);
        self.shift = self.rerouting.lens()?;
        Ok(anew)
    }
}

/// `C_l = -(1/k) sum_j log p_lj` over the chosen experts, averaged over tokens; `p` from the router's own scores of all
/// experts.
pub(super) fn uncertainty(spec: &ModelSpec, trace: &ItemTrace) -> Vec<f64> {
    let map = ExpertMap::of(spec);
    let of_layer = |(moe, layer): (usize, &quorate_lens::LayerTrace)| {
        let sigmoid = spec.moe(map.layers[moe]).is_some_and(|m| m.router.score == RouterScore::Sigmoid);
        let (mut sum, mut count) = (0.0, 0usize);
        for t in 0..trace.tokens.len() {
            let z = layer.logits_of(t, map.experts[moe]);
            let max = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let all = f64::from(max) + z.iter().map(|v| f64::from(v - max).exp()).sum::<f64>().ln();
            for e in layer.chosen(t) {
                let z = f64::from(z[e]);
                sum += if sigmoid { (-z).exp().ln_1p() } else { all - z };
                count += 1;
            }
        }
        sum / count.max(1) as f64
    };
    trace.layers.iter().enumerate().map(of_layer).collect()
}

/// Each layer's part of the learning rate.
pub(super) fn layer_weights(uncertainty: &[f64], by: By, share: f64) -> Vec<f64> {
    let sign = if by == By::Lowest { -1.0 } else { 1.0 };
    if by == By::Soft {
        let most = uncertainty.iter().copied().fold(0.0, f64::max);
        return uncertainty.iter().map(|c| if most > 0.0 { c / most } else { 1.0 }).collect();
    }
    let count = ((share * uncertainty.len() as f64).ceil() as usize).max(1);
    let mut order: Vec<usize> = (0..uncertainty.len()).collect();
    order.sort_by(|&a, &b| (sign * uncertainty[b]).total_cmp(&(sign * uncertainty[a])));
    let mut weights = vec![0.0; uncertainty.len()];
    order.iter().take(count).for_each(|&l| weights[l] = 1.0);
    weights
}

/// Share of the chosen experts that are not among those chosen at the same token and layer in the other pass.
pub(super) fn rerouted(before: &ItemTrace, after: &ItemTrace) -> f64 {
    let (mut gone, mut all) = (0usize, 0usize);
    for (a, b) in before.layers.iter().zip(&after.layers) {
        for t in 0..before.tokens.len() {
            let new: Vec<usize> = b.chosen(t).collect();
            gone += a.chosen(t).filter(|e| !new.contains(e)).count();
            all += a.chosen(t).count();
        }
    }
    gone as f64 / all.max(1) as f64
}

#[cfg(test)]
mod tests {
    use quorate_lens::LayerTrace;

    use super::*;

    #[test]
    fn layers_are_chosen_by_uncertainty() {
        let c = [1.0, 4.0, 2.0, 3.0];
        assert_eq!(layer_weights(&c, By::Highest, 0.5), [0.0, 1.0, 0.0, 1.0]);
        assert_eq!(layer_weights(&c, By::Lowest, 0.5), [1.0, 0.0, 1.0, 0.0]);
        assert_eq!(layer_weights(&c, By::Highest, 0.1), [0.0, 1.0, 0.0, 0.0]);
        assert_eq!(layer_weights(&c, By::Soft, 0.5), [0.25, 1.0, 0.5, 0.75]);
    }

    #[test]
    fn rerouted_ignores_the_order_of_slots() {
        let trace = |ids: &[u32]| ItemTrace {
            tokens: vec![0; 2],
            layers: vec![LayerTrace { k: 2, ids: ids.to_vec(), ..LayerTrace::default() }],
            ..ItemTrace::default()
        };
        assert_eq!(rerouted(&trace(&[0, 1, 2, 3]), &trace(&[1, 0, 2, 4])), 0.25);
        assert_eq!(rerouted(&trace(&[0, 1, 2, 3]), &trace(&[0, 1, 2, 3])), 0.0);
    }
}
