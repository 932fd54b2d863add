//! Models, reference values, lenses made of closures, and comparisons. The tests of other crates that run the engine
//! use this module too.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use quorate_formats::safetensors::{read_tensor_bytes, read_tensor_f32};
use quorate_formats::{Checkpoint, Role, SafetensorsFile, TensorOut, write_safetensors};
use quorate_model::{
    At, Flow, Forward, KeptExperts, KvCache, Lens, LogitRows, Model, ModelError, NoLens, Phase, Routing, Segment, Site,
    SiteSet, ops,
};
use tempfile::TempDir;

/// The fixtures with experts that stand for the router families: gates as they are, renormalised, with a shared expert,
/// softmax of the chosen.
pub const ROUTERS: [&str; 4] = ["olmoe", "qwen3_moe", "qwen2_moe", "mixtral"];

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

pub fn embedded() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../embedded/model")
}

/// A model with its skeleton only.
pub fn open_empty(path: &Path) -> Model {
    Model::open(path, 2, None).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A model with all its experts.
pub fn open(path: &Path) -> Model {
    let mut model = open_empty(path);
    model.load_all_experts().unwrap();
    model
}

/// A fixture in GGUF, of one type of weights, with the tokenizer of its folder.
pub fn open_gguf(name: &str, kind: &str) -> Model {
    let dir = TempDir::new().unwrap();
    let file = format!("{name}-{kind}.gguf");
    fs::copy(fixture(name).join("gguf").join(&file), dir.path().join(&file)).unwrap();
    for beside in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixture(name).join(beside), dir.path().join(beside)).unwrap();
    }
    open(&dir.path().join(file))
}

/// The two prompts of a fixture, of 24 tokens each.
pub fn prompts(name: &str) -> [Vec<u32>; 2] {
    let reference = SafetensorsFile::open(&fixture(name).join("reference.safetensors")).unwrap();
    let ids: Vec<u32> = reference.read_i64("input_ids").unwrap().iter().map(|&id| id as u32).collect();
    [ids[..24].to_vec(), ids[24..].to_vec()]
}

/// The models and prompts on which equivalences are tested: the four routers, and the embedded model.
pub fn moe_cases() -> Vec<(&'static str, PathBuf, Vec<Vec<u32>>)> {
    let mut cases: Vec<_> = ROUTERS.iter().map(|&name| (name, fixture(name), prompts(name).to_vec())).collect();
    let texts = ["<|user|>78+95=<|assistant|>173", "<|user|>swap(tail(p l a x m))<|assistant|>m a x l"];
    let tokenizer = quorate_model::text::Tokenizer::open(&embedded()).unwrap();
    let tokens = texts.iter().map(|text| tokenizer.encode(text, false).unwrap()).collect();
    cases.push(("embedded", embedded(), tokens));
    cases
}

/// New tokens of a sequence whose every row gets logits; prompt rows.
pub fn rows(slot: usize, tokens: &[u32]) -> Segment {
    Segment { logits: LogitRows::All, ..Segment::prompt(slot, tokens.to_vec()) }
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    ops::values(tensor).unwrap().to_vec()
}

/// The logits of a pass, as they stand.
pub fn logits_of(forward: Forward) -> Vec<f32> {
    values(&forward.logits.expect("logits were wanted"))
}

/// The logits of every row of a text, `[T, V]`, computed in one pass.
pub fn logits(model: &Model, tokens: &[u32], lens: &mut dyn Lens) -> Vec<f32> {
    logits_in_turn(model, &[rows(0, tokens)], lens)
}

/// The logits of one sequence that is fed piece by piece.
pub fn logits_in_turn(model: &Model, pieces: &[Segment], lens: &mut dyn Lens) -> Vec<f32> {
    let mut cache = KvCache::new(model.spec(), 1);
    let forward = |piece: &Segment| logits_of(model.forward(std::slice::from_ref(piece), &mut cache, lens).unwrap());
    pieces.iter().flat_map(forward).collect()
}

/// The logits of every row of several texts, one after the other.
pub fn logits_of_all(model: &Model, texts: &[Vec<u32>], lens: &mut dyn Lens) -> Vec<f32> {
    texts.iter().flat_map(|text| logits(model, text, lens)).collect()
}

/// The first place where two lists differ by more than `tolerance`, in words; NaN is always a difference.
pub fn difference(found: &[f32], expected: &[f32], tolerance: f32) -> Option<String> {
    if found.len() != expected.len() {
        return Some(format!("{} values, {} expected", found.len(), expected.len()));
    }
    let wrong = |(a, b): &(&f32, &f32)| *a != *b && ((*a - *b).abs() > tolerance || a.is_nan() || b.is_nan());
    let first = found.iter().zip(expected).position(|pair| wrong(&pair))?;
    let most = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    Some(format!("value {first} is {}, not {}; the largest difference is {most}", found[first], expected[first]))
}

#[track_caller]
pub fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    if let Some(difference) = difference(found, expected, tolerance) {
        panic!("{what}: {difference}");
    }
}

/// Equal as numbers, which is bit for bit but for the sign of zero.
#[track_caller]
pub fn assert_same(what: &str, found: &[f32], expected: &[f32]) {
    assert_close(what, found, expected, 0.0);
}

/// A tolerance relative to the largest value.
pub fn relative(tolerance: f32, values: &[f32]) -> f32 {
    tolerance * largest(values)
}

pub fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most: f32, v| most.max(v.abs()))
}

/// The largest difference of two lists, relative to the largest expected value.
pub fn change(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let most = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    most / largest(expected)
}

/// Numbers between -1 and 1 that look random, the same for the same seed.
pub fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// What a [`Visit`] shows.
pub enum Seen<'a> {
    Tensor(&'a mut Tensor),
    Routing(&'a mut Routing),
}

/// A lens made of a closure, at the same sites in all layers.
pub struct Visit<F> {
    sites: SiteSet,
    visit: F,
}

impl<F: FnMut(&At<'_>, Seen<'_>) -> Result<Flow, ModelError>> Visit<F> {
    pub fn new(sites: &[Site], visit: F) -> Self {
        Self { sites: SiteSet::of(sites), visit }
    }
}

impl<F: FnMut(&At<'_>, Seen<'_>) -> Result<Flow, ModelError>> Lens for Visit<F> {
    fn sites(&self, _layer: usize) -> SiteSet {
        self.sites
    }
    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        (self.visit)(at, Seen::Tensor(value))
    }
    fn routing(&mut self, at: &At<'_>, routing: &mut Routing) -> Result<Flow, ModelError> {
        (self.visit)(at, Seen::Routing(routing))
    }
}

/// What was seen of one site in one layer: rows of later passes follow those of earlier ones.
#[derive(Default)]
pub struct Kept {
    /// Of the last pass.
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
    /// At `routing`, where `values` are the gates.
    pub ids: Vec<u32>,
}

/// Keeps everything that passes by, and asks for all of it or for some.
pub struct Capture {
    sites: SiteSet,
    pub kept: BTreeMap<(usize, Site), Kept>,
}

impl Capture {
    pub fn new(sites: &[Site]) -> Self {
        Self { sites: SiteSet::of(sites), kept: BTreeMap::new() }
    }

    pub fn get(&self, layer: usize, site: Site) -> &Kept {
        self.kept.get(&(layer, site)).unwrap_or_else(|| panic!("{site} of layer {layer} was not visited"))
    }

    fn keep(&mut self, at: &At<'_>, tensor: &Tensor, ids: &[u32]) {
        let kept = self.kept.entry((at.layer, at.site)).or_default();
        kept.shape = tensor.dims().to_vec();
        kept.values.extend(values(tensor));
        kept.ids.extend(ids);
    }
}

impl Lens for Capture {
    fn sites(&self, _layer: usize) -> SiteSet {
        self.sites
    }
    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        self.keep(at, value, &[]);
        Ok(Flow::Continue)
    }
    fn routing(&mut self, at: &At<'_>, routing: &mut Routing) -> Result<Flow, ModelError> {
        self.keep(at, &routing.gates, &routing.ids);
        Ok(Flow::Continue)
    }
}

/// A copy of a model whose weights `edit` may change; what it changes is stored as F32.
pub fn edited(source: &Path, mut edit: impl FnMut(Role, &[usize], &mut [f32])) -> TempDir {
    let dir = TempDir::new().unwrap();
    for entry in fs::read_dir(source).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "json") && !path.ends_with("model.safetensors.index.json") {
            fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let checkpoint = Checkpoint::open(source).unwrap();
    let tensors = checkpoint.roles().map(|role| {
        let loc = checkpoint.tensor(role).unwrap();
        let file = &checkpoint.files()[loc.file];
        let original = read_tensor_f32(file, loc).unwrap();
        let mut values = original.clone();
        edit(role, &loc.shape, &mut values);
        if values == original {
            TensorOut::bytes(loc.name.clone(), loc.dtype, &loc.shape, read_tensor_bytes(file, loc).unwrap())
        } else {
            TensorOut::f32(loc.name.clone(), &loc.shape, values)
        }
    });
    write_safetensors(&dir.path().join("model.safetensors"), None, tensors).unwrap();
    dir
}

/// `count(i)` experts of the `i`-th MoE layer, ascending, that look randomly chosen.
pub fn choose(model: &Model, seed: u64, count: impl Fn(usize) -> usize) -> Vec<Vec<usize>> {
    let spec = model.spec();
    let layer = |(i, l): (usize, usize)| {
        let order = noise(seed + i as u64, spec.moe(l).unwrap().n_experts);
        let mut experts: Vec<usize> = (0..order.len()).collect();
        experts.sort_by(|&a, &b| order[a].total_cmp(&order[b]));
        experts.truncate(count(i));
        experts.sort_unstable();
        experts
    };
    spec.moe_layers().into_iter().enumerate().map(layer).collect()
}

/// Keep lists as [`Model::load_experts`] takes them.
pub fn keep(kept: &[Vec<usize>]) -> Vec<KeptExperts> {
    kept.iter().cloned().map(Some).collect()
}

/// Experts and experts per token of the first MoE layer.
pub fn sizes(model: &Model) -> (usize, usize) {
    let spec = model.spec();
    let moe = spec.moe(spec.moe_layers()[0]).unwrap();
    (moe.n_experts, moe.top_k)
}

/// An error with all its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}

/// Logits without any lens.
pub fn plain(model: &Model, tokens: &[u32]) -> Vec<f32> {
    logits(model, tokens, &mut NoLens)
}

/// A prompt, then tokens as if they had been generated one by one; every row gets logits.
pub fn as_generated(prompt: &[u32], answer: &[u32]) -> Vec<Segment> {
    let decode = answer.iter().map(|&token| Segment { phases: vec![Phase::Decode], ..rows(0, &[token]) });
    std::iter::once(rows(0, prompt)).chain(decode).collect()
}
