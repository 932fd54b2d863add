//! Gradients against central differences, at every site and of every weight, for every family and way of routing; and
//! that a tracked pass computes the very numbers of an untracked one.

mod support;

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use quorate_formats::Role;
use quorate_formats::safetensors::read_tensor_f32;
use quorate_formats::shape::roles;
use quorate_model::{
    At, Chain, Flow, KvCache, Lens, LowRank, Model, ModelError, NoLens, Overlay, Patch, Phase, Routing, RoutingMode,
    Segment, Site, SiteSet, Taps, ops,
};
use support::{
    ROUTERS, assert_close, assert_same, chain, choose, fixture, keep, noise, open, plain, prompts, relative, rows,
    sizes, values,
};

const FIXTURES: [&str; 12] = [
    "olmoe",
    "olmoe_256",
    "olmoe_norm_clip",
    "qwen3_moe",
    "qwen3_moe_nonorm",
    "qwen2_moe",
    "qwen2_moe_mixed",
    "mixtral",
    "mixtral_swa_bf16",
    "llama",
    "mistral",
    "qwen3",
];

/// Every site through which a gradient goes.
fn tapped() -> Vec<Site> {
    Site::ALL.iter().copied().filter(|&site| site != Site::Selection).collect()
}

/// Two sequences, one of which continues what the cache holds, and a single token.
struct Batch {
    cache: KvCache,
    segments: Vec<Segment>,
}

impl Batch {
    fn new(model: &Model, name: &str) -> Self {
        let [a, b] = prompts(name);
        let mut cache = KvCache::new(model.spec(), 3);
        model.forward(&[rows(1, &b[..9]), rows(2, &a[3..8])], &mut cache, &mut NoLens).unwrap();
        let single = Segment { phases: vec![Phase::Decode], ..rows(2, &a[8..9]) };
        Self { cache, segments: vec![rows(0, &a[..15]), rows(1, &b[9..20]), single] }
    }

    fn logits(&self, model: &Model, lens: &mut dyn Lens) -> Tensor {
        let forward = model.forward(&self.segments, &mut self.cache.clone(), lens).unwrap();
        forward.logits.unwrap()
    }

    /// What is differentiated: a fixed random sum of the logits.
    fn loss(&self, logits: &Tensor) -> Tensor {
        let weights = Tensor::from_vec(noise(77, logits.elem_count()), logits.shape(), &Device::Cpu).unwrap();
        (logits * weights).unwrap().sum_all().unwrap()
    }

    /// The same in `f64`.
    fn loss_value(&self, model: &Model, lens: &mut dyn Lens) -> f64 {
        let logits = values(&self.logits(model, lens));
        logits.iter().zip(noise(77, logits.len())).map(|(a, b)| f64::from(*a) * f64::from(b)).sum()
    }
}

/// The experts of every MoE layer as an undisturbed pass chooses them (before slots are dropped), forced in other passes.
#[derive(Clone)]
struct Choice<'a> {
    model: &'a Model,
    /// What is added to the scores, by layer.
    bias: BTreeMap<usize, Tensor>,
    forcing: bool,
}

impl<'a> Choice<'a> {
    fn of(model: &'a Model, batch: &Batch) -> BTreeMap<usize, Tensor> {
        let mut choice = Choice { model, bias: BTreeMap::new(), forcing: false };
        batch.logits(model, &mut choice);
        choice.bias
    }

    fn forced(model: &'a Model, bias: &BTreeMap<usize, Tensor>) -> Self {
        Choice { model, bias: bias.clone(), forcing: true }
    }
}

impl Lens for Choice<'_> {
    fn sites(&self, _layer: usize) -> SiteSet {
        SiteSet::of(if self.forcing { &[Site::Selection] } else { &[Site::RouterLogits] })
    }
    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        if self.forcing {
            *value = self.bias[&at.layer].clone();
            return Ok(Flow::Continue);
        }
        let (model, e, k) = (self.model, value.dim(1)?, self.model.spec().moe(at.layer).unwrap().top_k);
        let refills = matches!(model.routing_mode(), RoutingMode::Mask | RoutingMode::MaskFullGates);
        let may = |i: &usize| !refills || model.kept(at.layer).is_none_or(|kept| kept[*i]);
        let mut bias = Vec::new();
        for z in values(value).chunks(e) {
            let mut order: Vec<usize> = (0..e).filter(may).collect();
            order.sort_by(|&a, &b| z[b].total_cmp(&z[a]));
            bias.extend((0..e).map(|i| if order[..k].contains(&i) { 1e6 } else { 0.0 }));
        }
        self.bias.insert(at.layer, ops::tensor(bias, value.dims())?);
        Ok(Flow::Continue)
    }
}

/// Adds a multiple of a direction to one site of one layer.
struct Nudge {
    layer: usize,
    site: Site,
    direction: Tensor,
    step: f64,
}

impl Lens for Nudge {
    fn sites(&self, layer: usize) -> SiteSet {
        if layer == self.layer { SiteSet::of(&[self.site]) } else { SiteSet::NONE }
    }
    fn tensor(&mut self, _: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        *value = (&*value + (&self.direction * self.step)?)?;
        Ok(Flow::Continue)
    }
    fn routing(&mut self, _: &At<'_>, routing: &mut Routing) -> Result<Flow, ModelError> {
        routing.gates = (&routing.gates + (&self.direction * self.step)?)?;
        Ok(Flow::Continue)
    }
}

/// Compares a gradient with central differences along a random direction. The measure is what a sum of so many terms of
/// random sign typically comes to, since the sum itself may be small by chance.
#[track_caller]
fn compare(what: &str, gradient: &Tensor, direction: &[f32], step: f64, mut loss: impl FnMut(f64) -> f64) {
    let terms: Vec<f64> = values(gradient).iter().zip(direction).map(|(g, v)| f64::from(*g) * f64::from(*v)).collect();
    let (found, size) = (terms.iter().sum::<f64>(), terms.iter().map(|t| t * t).sum::<f64>().sqrt());
    let mut central = |step: f64| (loss(step) - loss(-step)) / (2.0 * step);
    // Richardson's extrapolation takes the cubic term away.
    let numeric = (4.0 * central(step / 2.0) - central(step)) / 3.0;
    let rounding = 4e-6 * (1.0 + loss(0.0).abs()) / step;
    assert!(
        (found - numeric).abs() <= 4e-3 * size.max(numeric.abs()) + rounding,
        "{what}: gradient {found}, difference {numeric}, size {size}, rounding {rounding}"
    );
}

/// Where q, k and v are clamped, long steps would cross the bounds.
fn step(name: &str, usual: f64) -> f64 {
    if name == "olmoe_norm_clip" { 3e-4 } else { usual }
}

fn check_sites(what: &str, model: &Model, name: &str, layers: &[usize]) -> usize {
    let batch = Batch::new(model, name);
    let choice = Choice::of(model, &batch);
    let mut checked = 0;
    for &site in &tapped() {
        // One site at a time: with no tap at the scores, attention goes back by its own way.
        let mut taps = Taps::new(&[site]).in_layers(layers);
        let logits = batch.logits(model, &mut Chain(vec![&mut taps]));
        let grads = batch.loss(&logits).backward().unwrap();
        for (i, tap) in taps.all().iter().enumerate() {
            let what = format!("{what}, {site} of layer {}", tap.layer);
            let gradient = tap.gradient(&grads).unwrap_or_else(|| panic!("{what}: no gradient"));
            let count = gradient.elem_count();
            let direction = noise(i as u64 + 5, count);
            let tensor = Tensor::from_vec(direction.clone(), gradient.shape(), &Device::Cpu).unwrap();
            compare(&what, gradient, &direction, step(name, 8e-3), |step| {
                let mut nudge = Nudge { layer: tap.layer, site, direction: tensor.clone(), step };
                let mut choice = Choice::forced(model, &choice);
                batch.loss_value(model, &mut Chain(vec![&mut choice, &mut nudge]))
            });
            checked += 1;
        }
    }
    checked
}

#[test]
fn at_every_site_of_every_family() {
    for name in FIXTURES {
        let model = open(&fixture(name));
        let layers: Vec<usize> = (0..=model.spec().layers.len()).collect();
        assert!(check_sites(name, &model, name, &layers) > 20, "{name}");
    }
}

#[test]
fn in_every_way_of_removing_experts() {
    for name in ROUTERS {
        let mut model = open(&fixture(name));
        let (e, k) = sizes(&model);
        for mode in RoutingMode::ALL {
            model.mask_experts(&keep(&choose(&model, 4, |_| (e + k) / 2)), mode).unwrap();
            check_sites(&format!("{name}, {}", mode.name()), &model, name, &[0]);
        }
    }
}

#[test]
fn what_is_tracked_computes_the_same() {
    for name in FIXTURES {
        let model = open(&fixture(name));
        let batch = Batch::new(&model, name);
        let expected = values(&batch.logits(&model, &mut NoLens));
        let closed: Vec<Site> =
            tapped().into_iter().filter(|s| !matches!(s, Site::AttnScores | Site::AttnPattern)).collect();
        let found = batch.logits(&model, &mut Taps::new(&closed));
        assert!(found.track_op());
        assert_same(name, &values(&found), &expected);
        let found = values(&batch.logits(&model, &mut Taps::new(&tapped())));
        assert_close(name, &found, &expected, relative(1e-5, &expected));
    }
}

/// The two ways back through attention agree: the one by blocks, and the one through scores and pattern.
#[test]
fn both_ways_through_attention_agree() {
    for name in ["olmoe", "mixtral_swa_bf16", "mistral", "qwen3_moe"] {
        let model = open(&fixture(name));
        let batch = Batch::new(&model, name);
        let sites = [Site::AttnQRot, Site::AttnKRot, Site::AttnV];
        let (mut closed, mut open) = (Taps::new(&sites), Taps::new(&[&sites[..], &[Site::AttnPattern]].concat()));
        let grads = [&mut closed, &mut open].map(|taps| batch.loss(&batch.logits(&model, taps)).backward().unwrap());
        for tap in closed.all() {
            let what = format!("{name}, {} of layer {}", tap.site, tap.layer);
            let other = open.get(tap.layer, tap.site).unwrap().gradient(&grads[1]).unwrap();
            let (found, expected) = (values(tap.gradient(&grads[0]).unwrap()), values(other));
            assert_close(&what, &found, &expected, relative(1e-5, &expected));
        }
    }
}

/// The model's own weights, by role.
fn own(model: &Model) -> Vec<(Role, Tensor)> {
    let checkpoint = model.checkpoint();
    let read = |role| {
        let loc = checkpoint.tensor(role).unwrap();
        let values = read_tensor_f32(&checkpoint.files()[loc.file], loc).unwrap();
        (role, ops::tensor(values, &loc.shape).unwrap())
    };
    roles(model.spec()).map(read).collect()
}

fn one(role: Role, patch: Patch) -> Overlay {
    [(role, patch)].into_iter().collect()
}

/// Compares the gradient of one tensor of an overlay, at steps of `step`; `patch` makes the overlay of the tensor moved.
fn check_weight(
    what: &str,
    model: &mut Model,
    batch: &Batch,
    choice: &BTreeMap<usize, Tensor>,
    step: f64,
    (gradient, var): (&Tensor, &Tensor),
    patch: impl Fn(Tensor) -> Overlay,
) {
    let direction = noise(what.len() as u64, gradient.elem_count());
    let tensor = Tensor::from_vec(direction.clone(), gradient.shape(), &Device::Cpu).unwrap();
    compare(what, gradient, &direction, step, |step| {
        let moved = (var.detach() + (&tensor * step).unwrap()).unwrap();
        model.set_overlay(patch(moved)).unwrap();
        batch.loss_value(model, &mut Choice::forced(model, choice))
    });
    model.take_overlay();
}

#[test]
fn of_every_weight_of_every_family() {
    for name in FIXTURES {
        let mut model = open(&fixture(name));
        let batch = Batch::new(&model, name);
        let expected = values(&batch.logits(&model, &mut NoLens));
        let choice = Choice::of(&model, &batch);
        let vars: Vec<_> = own(&model).into_iter().map(|(r, t)| (r, Var::from_tensor(&t).unwrap())).collect();
        let overlay = vars.iter().map(|(role, var)| (*role, Patch::Replace(var.as_tensor().clone()))).collect();
        model.set_overlay(overlay).unwrap();
        let logits = batch.logits(&model, &mut NoLens);
        assert_same(name, &values(&logits), &expected);
        let grads = batch.loss(&logits).backward().unwrap();
        model.take_overlay();
        let step = step(name, 2e-3);
        for (role, var) in &vars {
            let what = format!("{name}, {role}");
            let Some(gradient) = grads.get(var) else {
                assert!(role.is_expert(), "{what}: no gradient");
                continue;
            };
            let patch = |moved| one(*role, Patch::Replace(moved));
            check_weight(&what, &mut model, &batch, &choice, step, (gradient, var), patch);
        }
        assert_same(name, &values(&batch.logits(&model, &mut NoLens)), &expected);
    }
}

/// A low-rank term over a matrix, with some values.
fn low_rank(shape: &[usize], seed: u64) -> LowRank {
    let tensor = |seed, shape: &[usize]| ops::tensor(noise(seed, shape[0] * shape[1]), shape).unwrap();
    LowRank { a: tensor(seed, &[2, shape[1]]), b: tensor(seed + 1, &[shape[0], 2]), scale: 0.03 }
}

#[test]
fn of_low_rank_terms() {
    for name in ["olmoe", "qwen2_moe_mixed", "mixtral", "llama"] {
        let mut model = open(&fixture(name));
        let batch = Batch::new(&model, name);
        let own: Vec<_> =
            own(&model).into_iter().filter(|(role, _)| !role.is_vector() && *role != Role::Embed).collect();
        let terms: Vec<_> = (1..).zip(&own).map(|(i, (role, w))| (*role, low_rank(w.dims(), 10 * i))).collect();
        // The same as the product added to the weights.
        let sum = |(w, term): (&Tensor, &LowRank)| {
            let delta = (term.b.matmul(&term.a).unwrap() * f64::from(term.scale)).unwrap();
            Patch::Replace((w + delta).unwrap())
        };
        let merged = own.iter().zip(&terms).map(|((role, w), (_, term))| (*role, sum((w, term)))).collect();
        model.set_overlay(merged).unwrap();
        let choice = Choice::of(&model, &batch);
        let expected = values(&batch.logits(&model, &mut NoLens));
        let plain: Overlay = terms.iter().map(|(role, term)| (*role, Patch::LowRank(term.clone()))).collect();
        model.set_overlay(plain.clone()).unwrap();
        let untracked = batch.logits(&model, &mut NoLens);
        assert!(!untracked.track_op());
        assert_close(name, &values(&untracked), &expected, relative(2e-5, &expected));
        // Tracked, with the same values.
        let var = |t: &Tensor| Var::from_tensor(t).unwrap().as_tensor().clone();
        let open = |t: &LowRank| LowRank { a: var(&t.a), b: var(&t.b), scale: t.scale };
        let vars: Vec<_> = terms.iter().map(|(role, term)| (*role, open(term))).collect();
        model.set_overlay(vars.iter().map(|(role, term)| (*role, Patch::LowRank(term.clone()))).collect()).unwrap();
        let logits = batch.logits(&model, &mut NoLens);
        assert_same(name, &values(&logits), &values(&untracked));
        assert_same(name, &values(&logits), &{
            let detached = model.overlay().detached().unwrap();
            model.set_overlay(detached).unwrap();
            values(&batch.logits(&model, &mut NoLens))
        });
        let grads = batch.loss(&logits).backward().unwrap();
        for (role, term) in &vars {
            let moved = |term: LowRank| {
                let mut overlay = plain.clone();
                overlay.insert(*role, Patch::LowRank(term));
                overlay
            };
            for (which, var) in [("A", &term.a), ("B", &term.b)] {
                let what = format!("{name}, {which} of {role}");
                let Some(gradient) = grads.get(var) else {
                    assert!(role.is_expert(), "{what}: no gradient");
                    continue;
                };
                let patch = |t| match which {
                    "A" => moved(LowRank { a: t, ..term.clone() }),
                    _ => moved(LowRank { b: t, ..term.clone() }),
                };
                check_weight(&what, &mut model, &batch, &choice, 3e-2, (gradient, var), patch);
            }
        }
    }
}

#[test]
fn an_overlay_that_does_not_fit_is_refused() {
    let mut model = open(&fixture("qwen2_moe_mixed"));
    let tokens = &prompts("qwen2_moe_mixed")[0];
    let expected = plain(&model, tokens);
    let d = model.spec().hidden_size;
    let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
    let term = |a: &[usize], b: &[usize], scale| Patch::LowRank(LowRank { a: zeros(a), b: zeros(b), scale });
    let nan = Tensor::full(f32::NAN, d, &Device::Cpu).unwrap();
    let cases = [
        (Role::Router(1), Patch::Replace(zeros(&[6, d])), "the model has no such weight"),
        (Role::Q(9), Patch::Replace(zeros(&[d, d])), "the model has no such weight"),
        (Role::Router(0), Patch::Replace(zeros(&[6, d + 1])), "the tensor is [6, "),
        (Role::FinalNorm, Patch::Replace(nan), "values that are not numbers"),
        (Role::FinalNorm, Patch::Replace(zeros(&[d]).to_dtype(candle_core::DType::F64).unwrap()), "cannot be used"),
        (Role::FinalNorm, term(&[1, d], &[d, 1], 1.0), "over matrices only; help: replace the vector"),
        (Role::Embed, term(&[1, d], &[1, 1], 1.0), "cannot lie over the embedding"),
        (Role::Router(0), term(&[2, d], &[6, 3], 1.0), "B is [6, 3], [6, 2] expected"),
        (Role::Router(0), term(&[2, d], &[6, 2], f32::NAN), "the factor of the low-rank term is NaN"),
    ];
    for (role, patch, message) in cases {
        let error = chain(&model.set_overlay(one(role, patch)).unwrap_err());
        assert!(error.contains(message) && error.contains(&role.to_string()), "{error}");
        assert!(model.overlay().is_empty());
    }
    let mut tied = open(&fixture("qwen3"));
    let error = chain(&tied.set_overlay(one(Role::LmHead, Patch::Replace(zeros(&[1, 1])))).unwrap_err());
    assert!(error.contains("tied to the token embedding; help: change that"), "{error}");
    assert_same("no overlay", &plain(&model, tokens), &expected);
}
