//! A lens that measures gradients at sites.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use crate::{At, Flow, Lens, ModelError, Routing, Site, SiteSet};

/// Adds a zero variable to every value at its sites, so that `backward` of anything computed from the logits leaves the
/// gradient of each of these values.
///
/// ```
/// use quorate_model::{KvCache, Model, Segment, Site, Taps};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../embedded/model");
/// let mut model = Model::open(&path, 2, None)?;
/// model.load_all_experts()?;
/// let prompt = model.tokenizer().encode("<|user|>78+95=<|assistant|>", false)?;
/// let mut taps = Taps::new(&[Site::RouterLogits]);
/// let forward = model.forward(&[Segment::prompt(0, prompt)], &mut KvCache::new(model.spec(), 1), &mut taps)?;
/// let logits = forward.logits.ok_or("no logits")?;
/// let grads = (logits.max(1)?.sum_all()? - logits.mean_all()?)?.backward()?;
/// for tap in taps.all() {
///     let gradient = tap.gradient(&grads).ok_or("no gradient")?;
///     assert_eq!(gradient.dims(), tap.value.dims()); // [N, E]
/// }
/// # Ok(())
/// # }
/// ```
pub struct Taps {
    sites: SiteSet,
    layers: Option<Vec<usize>>,
    taps: Vec<Tap>,
}

/// One value and its variable.
pub struct Tap {
    /// The site.
    pub site: Site,
    /// Decoder layer; for `final_norm` and `logits` the number of layers.
    pub layer: usize,
    /// The value (at `routing` the gates), without gradient.
    pub value: Tensor,
    /// Ids of the chosen experts at `routing`, and where a routing travels with the value.
    pub ids: Option<Vec<u32>>,
    delta: Var,
}

impl Tap {
    /// The gradient of the value, in its shape; `None` if what was differentiated does not depend on it.
    pub fn gradient<'a>(&self, grads: &'a GradStore) -> Option<&'a Tensor> {
        grads.get(&self.delta)
    }
}

impl Taps {
    /// Taps at these sites in every layer. `selection` has no gradient: it decides the choice of experts only.
    pub fn new(sites: &[Site]) -> Taps {
        Taps { sites: SiteSet::of(sites), layers: None, taps: Vec::new() }
    }

    /// Only in these decoder layers.
    pub fn in_layers(mut self, layers: &[usize]) -> Taps {
        self.layers = Some(layers.to_vec());
        self
    }

    /// All taps of the passes so far, in forward order.
    pub fn all(&self) -> &[Tap] {
        &self.taps
    }

    /// The tap at a site of a layer, of the last pass.
    pub fn get(&self, layer: usize, site: Site) -> Option<&Tap> {
        self.taps.iter().rev().find(|tap| tap.layer == layer && tap.site == site)
    }

    /// Forgets the taps, with what their passes hold in memory.
    pub fn clear(&mut self) {
        self.taps.clear();
    }

    fn tap(&mut self, at: &At<'_>, value: &mut Tensor, ids: Option<&Vec<u32>>) -> Result<Flow, ModelError> {
        let delta = Var::zeros(value.shape(), value.dtype(), value.device())?;
        let tapped = value.add(&delta)?;
        self.taps.push(Tap { site: at.site, layer: at.layer, value: value.detach(), ids: ids.cloned(), delta });
        *value = tapped;
        Ok(Flow::Continue)
    }
}

impl Lens for Taps {
    fn sites(&self, layer: usize) -> SiteSet {
        match &self.layers {
            Some(layers) if !layers.contains(&layer) => SiteSet::NONE,
            _ => self.sites,
        }
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        self.tap(at, value, at.routing.map(|routing| &routing.ids))
    }

    fn routing(&mut self, at: &At<'_>, routing: &mut Routing) -> Result<Flow, ModelError> {
        let ids = routing.ids.clone();
        self.tap(at, &mut routing.gates, Some(&ids))
    }
}
