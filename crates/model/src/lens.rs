//! The contract between the forward pass and what watches or changes it.

use candle_core::Tensor;

use crate::{ModelError, Routing, Rows, Site, SiteSet};

/// Whether the forward pass goes on after a visit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    Continue,
    /// Stop here; the forward returns without logits and leaves the KV cache as it was.
    Stop,
}

/// Where in the forward pass a visit takes place.
#[derive(Clone, Copy, Debug)]
pub struct At<'a> {
    /// The site.
    pub site: Site,
    /// Decoder layer; for `final_norm` and `logits` the number of layers.
    pub layer: usize,
    /// Context of the token rows.
    pub rows: &'a Rows,
    /// The routing of this layer, at `expert_hidden`, `expert_out` and `moe_out`.
    pub routing: Option<&'a Routing>,
}

/// What watches (observer) or changes (intervention) sites while a forward runs.
///
/// Sites are declared beforehand: one that no lens names is never materialised nor visited. Visits come in forward order.
/// An observer leaves the value as it is; an intervention may replace it by a value of the same shape.
pub trait Lens {
    /// Sites of decoder layer `layer` that this lens visits (`layer == n_layers` asks for `final_norm` and `logits`).
    fn sites(&self, layer: usize) -> SiteSet;

    /// Visits a tensor site; shapes as documented at [`Site`].
    ///
    /// # Errors
    /// Whatever the lens finds wrong; the forward stops with it.
    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError>;

    /// Visits the site `routing`.
    ///
    /// # Errors
    /// As [`Lens::tensor`].
    fn routing(&mut self, _at: &At<'_>, _routing: &mut Routing) -> Result<Flow, ModelError> {
        Ok(Flow::Continue)
    }
}

/// No lens: nothing is visited.
pub struct NoLens;

impl Lens for NoLens {
    fn sites(&self, _layer: usize) -> SiteSet {
        SiteSet::NONE
    }
    fn tensor(&mut self, _at: &At<'_>, _value: &mut Tensor) -> Result<Flow, ModelError> {
        Ok(Flow::Continue)
    }
}

/// Several lenses in order: at each site the first sees the model's value, the next what the first left.
pub struct Chain<'a>(pub Vec<&'a mut dyn Lens>);

impl Chain<'_> {
    fn each(
        &mut self,
        at: &At<'_>,
        mut visit: impl FnMut(&mut dyn Lens) -> Result<Flow, ModelError>,
    ) -> Result<Flow, ModelError> {
        let mut flow = Flow::Continue;
        for lens in &mut self.0 {
            if lens.sites(at.layer).contains(at.site) && visit(*lens)? == Flow::Stop {
                flow = Flow::Stop;
            }
        }
        Ok(flow)
    }
}

impl Lens for Chain<'_> {
    fn sites(&self, layer: usize) -> SiteSet {
        self.0.iter().fold(SiteSet::NONE, |set, lens| set.union(lens.sites(layer)))
    }
    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        self.each(at, |lens| lens.tensor(at, value))
    }
    fn routing(&mut self, at: &At<'_>, routing: &mut Routing) -> Result<Flow, ModelError> {
        self.each(at, |lens| lens.routing(at, routing))
    }
}
