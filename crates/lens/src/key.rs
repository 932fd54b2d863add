//! Retrieval keys: how a task's prompts look to the first router, and which task a new prompt is nearest to.
//!
//! A prompt's key needs no expert: the forward pass ends at the first MoE layer's router. It has two parts. `hidden` is
//! the mean over the prompt's tokens of the router's input, sketched to at most 256 numbers; a task keeps several typical
//! ones. `router` is the mean over tokens of `max(s, sigmoid(s))` of the `top_k` logits `s`, 0 elsewhere, `[E]`: the key of the public method, of which
//! a task keeps the mean.

use candle_core::Tensor;
use quorate_formats::spec::ModelSpec;
use quorate_kernels::{dot, norm_sq};
use quorate_model::{At, Flow, Lens, LogitRows, Model, ModelError, RoutingMode, Segment, Site, SiteSet, ops};
use serde::{Deserialize, Serialize};

use crate::LensError;

/// Most typical keys of a task.
const PROTOTYPES: usize = 8;
/// Numbers of a key's hidden part; wider models are sketched to it, so that search takes the same time for all.
const WIDTH: usize = 256;
/// A prompt is familiar within this many times the largest distance of the task's own held-out prompts.
const RADIUS_SLACK: f32 = 1.25;

/// How distances are measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyMetric {
    /// L2 distance of the router's mean input to the nearest typical one.
    #[default]
    Hidden,
    /// The same with cosine distance.
    HiddenCosine,
    /// L2 distance of mean router scores: the public method.
    Router,
    /// The same with cosine distance.
    RouterCosine,
}

/// The key of one prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PromptKey {
    /// Mean router input, `[min(d, 256)]`.
    pub hidden: Vec<f32>,
    /// Mean router scores, `[E]`.
    pub router: Vec<f32>,
}

/// How the prompts of a task look.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Key {
    /// Mean of the prompts' keys.
    pub mean: PromptKey,
    /// Typical mean router inputs; none for a generalist, which is not retrieved.
    pub prototypes: Vec<Vec<f32>>,
    /// Distance ([`KeyMetric::Hidden`]) within which a prompt is familiar.
    pub radius: f32,
    /// MoE layer whose router sees the prompt; beyond the first, the experts of the layers before it are needed.
    pub moe_layer: usize,
}

/// What retrieval found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Nearest {
    /// Task of the nearest pattern.
    pub name: String,
    /// Distance to it.
    pub distance: f32,
    /// Whether the prompt lies within what the task's profile saw; always true for metrics other than `hidden`.
    pub familiar: bool,
}

impl Key {
    /// The key of a task from those of its prompts; `held_out` prompts tell how far its own prompts may lie.
    ///
    /// The result does not depend on the order of the prompts.
    pub fn of(prompts: &[PromptKey], held_out: &[PromptKey], moe_layer: usize) -> Key {
        let Some(first) = prompts.first() else { return Key::default() };
        let mean = |part: fn(&PromptKey) -> &Vec<f32>| {
            let mut rows: Vec<&[f32]> = prompts.iter().map(|p| part(p).as_slice()).collect();
            rows.sort_by(|a, b| order(a, b));
            mean_of(&rows, part(first).len())
        };
        let mut rows: Vec<&[f32]> = prompts.iter().map(|p| p.hidden.as_slice()).collect();
        rows.sort_by(|a, b| order(a, b));
        let prototypes = k_means(&rows, PROTOTYPES.min(prompts.len().div_ceil(8)));
        let own = if held_out.is_empty() { prompts } else { held_out };
        let mean = PromptKey { hidden: mean(|p| &p.hidden), router: mean(|p| &p.router) };
        let mut key = Key { mean, prototypes, radius: 0.0, moe_layer };
        key.radius = RADIUS_SLACK * own.iter().map(|p| key.distance(p, KeyMetric::Hidden)).fold(0.0, f32::max);
        key
    }

    /// Distance of a prompt.
    pub fn distance(&self, prompt: &PromptKey, metric: KeyMetric) -> f32 {
        let nearest = |distance: fn(&[f32], &[f32]) -> f32| {
            self.prototypes.iter().map(|p| distance(p, &prompt.hidden)).fold(f32::INFINITY, f32::min)
        };
        match metric {
            KeyMetric::Hidden => nearest(l2),
            KeyMetric::HiddenCosine => nearest(cosine),
            KeyMetric::Router => l2(&self.mean.router, &prompt.router),
            KeyMetric::RouterCosine => cosine(&self.mean.router, &prompt.router),
        }
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        let d = self.mean.hidden.len();
        if self.prototypes.iter().any(|p| p.len() != d) {
            return Err(format!("the key's parts have different lengths, {d} expected"));
        }
        Ok(())
    }

    /// Layout: `d`, `E`, MoE layer as u32, radius, then mean hidden, mean router and the prototypes as f32.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((self.mean.hidden.len() as u32).to_le_bytes());
        bytes.extend((self.mean.router.len() as u32).to_le_bytes());
        bytes.extend((self.moe_layer as u32).to_le_bytes());
        bytes.extend(self.radius.to_le_bytes());
        let values = self.mean.hidden.iter().chain(&self.mean.router).chain(self.prototypes.iter().flatten());
        values.for_each(|v| bytes.extend(v.to_le_bytes()));
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Key, String> {
        let bad = || "the key is damaged; help: profile the task again".to_string();
        let (words, rest) = bytes.as_chunks::<4>();
        let [d, e, moe_layer, radius, values @ ..] = words else { return Err(bad()) };
        let (d, e) = (u32::from_le_bytes(*d) as usize, u32::from_le_bytes(*e) as usize);
        let values: Vec<f32> = values.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let prototypes = values.get(d.saturating_add(e)..).ok_or_else(bad)?;
        if !rest.is_empty() || !prototypes.len().is_multiple_of(d.max(1)) {
            return Err(bad());
        }
        Ok(Key {
            mean: PromptKey { hidden: values[..d].to_vec(), router: values[d..d + e].to_vec() },
            prototypes: prototypes.chunks(d.max(1)).map(<[f32]>::to_vec).collect(),
            radius: f32::from_le_bytes(*radius),
            moe_layer: u32::from_le_bytes(*moe_layer) as usize,
        })
    }
}

/// The keys of many tasks, ready to be searched: one scan over all typical keys.
#[derive(Clone, Debug, Default)]
pub struct KeyIndex {
    keys: Vec<(String, Key)>,
    /// Squared norms of each key's prototypes.
    norms: Vec<Vec<f32>>,
}

impl KeyIndex {
    /// An index of named keys.
    pub fn new(keys: Vec<(String, Key)>) -> KeyIndex {
        let norms = keys.iter().map(|(_, key)| key.prototypes.iter().map(|p| norm_sq(p)).collect()).collect();
        KeyIndex { keys, norms }
    }

    /// Number of tasks.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The task nearest to a prompt among those that it is familiar to; if there is none, the nearest of all, not
    /// familiar. `None` if the index is empty.
    pub fn nearest(&self, prompt: &PromptKey, metric: KeyMetric) -> Option<Nearest> {
        let own = norm_sq(&prompt.hidden);
        let scored = self.keys.iter().zip(&self.norms).map(|((name, key), norms)| {
            let distance = match metric {
                KeyMetric::Hidden => {
                    let squared = |(p, n): (&Vec<f32>, &f32)| n + own - 2.0 * dot(p, &prompt.hidden);
                    key.prototypes.iter().zip(norms).map(squared).fold(f32::INFINITY, f32::min).max(0.0).sqrt()
                }
                _ => key.distance(prompt, metric),
            };
            (metric != KeyMetric::Hidden || distance <= key.radius, distance, name)
        });
        let (familiar, distance, name) = scored.min_by(|a, b| b.0.cmp(&a.0).then(a.1.total_cmp(&b.1)))?;
        Some(Nearest { name: name.clone(), distance, familiar })
    }
}

/// Computes the keys of prompts at the router of MoE layer `moe_layer`. For the first, the non-expert weights suffice;
/// for a later one the experts of the layers before it are loaded, and all others freed.
///
/// # Errors
/// A model without such a layer, or as [`Model::forward`].
pub fn prompt_keys(model: &mut Model, prompts: &[&[u32]], moe_layer: usize) -> Result<Vec<PromptKey>, LensError> {
    let mut probe = KeyProbe::new(model.spec(), moe_layer, true).ok_or_else(|| {
        LensError::Select(format!("the model has no mixture-of-experts layer number {moe_layer} to compute a key with"))
    })?;
    if moe_layer > 0 {
        let layers = model.spec().moe_layers().len();
        let kept: Vec<_> = (0..layers).map(|l| if l < moe_layer { None } else { Some(Vec::new()) }).collect();
        model.load_experts(&kept, RoutingMode::Drop)?;
    }
    let mut keys = Vec::with_capacity(prompts.len());
    for chunk in prompts.chunks(16) {
        let mut cache = model.new_cache(chunk.len());
        let segments: Vec<Segment> = (chunk.iter().enumerate())
            .map(|(slot, prompt)| Segment { logits: LogitRows::None, ..Segment::prompt(slot, prompt.to_vec()) })
            .collect();
        model.forward(&segments, &mut cache, &mut probe)?;
        keys.extend(probe.take());
    }
    Ok(keys)
}

/// The observer that computes keys, over the prompt rows of each segment.
#[derive(Debug)]
pub struct KeyProbe {
    layer: usize,
    top_k: usize,
    stop: bool,
    keys: Vec<PromptKey>,
}

impl KeyProbe {
    /// Observes the router of MoE layer `moe_layer`; with `stop` the forward pass ends there. `None` if the model has no
    /// such layer.
    pub fn new(spec: &ModelSpec, moe_layer: usize, stop: bool) -> Option<KeyProbe> {
        let layer = *spec.moe_layers().get(moe_layer)?;
        Some(KeyProbe { layer, top_k: spec.moe(layer)?.top_k, stop, keys: Vec::new() })
    }

    /// The keys of the segments seen, in order.
    pub fn take(&mut self) -> Vec<PromptKey> {
        std::mem::take(&mut self.keys)
    }
}

impl Lens for KeyProbe {
    fn sites(&self, layer: usize) -> SiteSet {
        if layer == self.layer { SiteSet::of(&[Site::FfnIn, Site::RouterLogits]) } else { SiteSet::NONE }
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        let width = value.dim(1)?;
        let x = ops::values(value)?;
        let first = self.keys.len().saturating_sub(at.rows.spans.len());
        for (i, span) in at.rows.spans.iter().enumerate() {
            let rows = span.row0..span.row0 + span.len;
            let prompt: Vec<&[f32]> =
                (rows.filter(|&r| at.rows.phase[r].is_prompt())).map(|r| &x[r * width..(r + 1) * width]).collect();
            if at.site == Site::FfnIn {
                self.keys.push(PromptKey { hidden: sketch(mean_of(&prompt, width)), router: Vec::new() });
            } else {
                self.keys[first + i].router = router_scores(&prompt, width, self.top_k);
            }
        }
        let done = self.stop && at.site == Site::RouterLogits;
        Ok(if done { Flow::Stop } else { Flow::Continue })
    }
}

fn router_scores(rows: &[&[f32]], width: usize, top_k: usize) -> Vec<f32> {
    let mut scores = vec![0f32; width];
    let mut order: Vec<usize> = (0..width).collect();
    for row in rows {
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        for &i in &order[..top_k.min(width)] {
            scores[i] += row[i].max(1.0 / (1.0 + (-row[i]).exp()));
        }
    }
    scores.iter_mut().for_each(|s| *s /= rows.len().max(1) as f32);
    scores
}

fn mean_of(rows: &[&[f32]], width: usize) -> Vec<f32> {
    let mut sum = vec![0f64; width];
    for row in rows {
        sum.iter_mut().zip(*row).for_each(|(s, v)| *s += f64::from(*v));
    }
    sum.iter().map(|s| (s / rows.len().max(1) as f64) as f32).collect()
}

/// A vector of at most [`WIDTH`] numbers with nearly the same distances (count sketch): every coordinate is added, with a
/// sign, to one place that a hash of its number gives.
fn sketch(values: Vec<f32>) -> Vec<f32> {
    if values.len() <= WIDTH {
        return values;
    }
    let mut out = vec![0f32; WIDTH];
    for (i, v) in values.iter().enumerate() {
        let hash =
            (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let sign = if hash >> 63 == 0 { 1.0 } else { -1.0 };
        out[(hash >> 40) as usize % WIDTH] += sign * v;
    }
    out
}

fn order(a: &[f32], b: &[f32]) -> std::cmp::Ordering {
    let different = a.iter().zip(b).map(|(a, b)| a.total_cmp(b)).find(|o| o.is_ne());
    different.unwrap_or(std::cmp::Ordering::Equal)
}

fn l2(a: &[f32], b: &[f32]) -> f32 {
    (norm_sq(a) + norm_sq(b) - 2.0 * dot(a, b)).max(0.0).sqrt()
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let norms = (norm_sq(a) * norm_sq(b)).sqrt();
    if norms > 0.0 { 1.0 - dot(a, b) / norms } else { 1.0 }
}

/// Centres of `k` clusters of `rows`: farthest-point start from the row nearest the mean, then Lloyd's iterations.
fn k_means(rows: &[&[f32]], k: usize) -> Vec<Vec<f32>> {
    let Some(width) = rows.first().map(|r| r.len()) else { return Vec::new() };
    let mean = mean_of(rows, width);
    let nearest_row = |centre: &[f32]| rows.iter().min_by(|a, b| l2(a, centre).total_cmp(&l2(b, centre)));
    let mut centres: Vec<Vec<f32>> = nearest_row(&mean).map(|r| r.to_vec()).into_iter().collect();
    let to_centres = |row: &[f32], centres: &[Vec<f32>]| {
        let distances = centres.iter().map(|c| l2(c, row)).enumerate();
        distances.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((0, 0.0))
    };
    while centres.len() < k.min(rows.len()) {
        let farthest = rows.iter().max_by(|a, b| to_centres(a, &centres).1.total_cmp(&to_centres(b, &centres).1));
        centres.extend(farthest.map(|r| r.to_vec()));
    }
    for _ in 0..20 {
        let mut members: Vec<Vec<&[f32]>> = vec![Vec::new(); centres.len()];
        rows.iter().for_each(|row| members[to_centres(row, &centres).0].push(row));
        let moved: Vec<Vec<f32>> = (members.iter().zip(&centres))
            .map(|(rows, old)| if rows.is_empty() { old.clone() } else { mean_of(rows, width) })
            .collect();
        if moved == centres {
            break;
        }
        centres = moved;
    }
    centres
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(x: f32, y: f32) -> PromptKey {
        PromptKey { hidden: vec![x, y], router: vec![y, x, 0.0] }
    }

    /// Two clusters of eight prompts each.
    fn key(shift: f32) -> Key {
        let near = |i: usize| prompt(shift + 0.01 * i as f32, 0.0);
        let far = |i: usize| prompt(shift, 5.0 + 0.01 * i as f32);
        let prompts: Vec<PromptKey> = (0..8).map(near).chain((0..8).map(far)).collect();
        Key::of(&prompts, &prompts, 0)
    }

    #[test]
    fn clusters_are_found_and_order_does_not_matter() {
        let mut prompts: Vec<PromptKey> = (0..8).map(|i| prompt(i as f32, 0.0)).collect();
        let forward = Key::of(&prompts, &[], 0);
        prompts.reverse();
        assert_eq!(Key::of(&prompts, &[], 0), forward);
        let mut centres = key(0.0).prototypes;
        centres.sort_by(|a, b| order(a, b));
        assert_eq!(centres.len(), 2);
        assert!((centres[0][1] - 5.035).abs() < 1e-5 && (centres[1][0] - 0.035).abs() < 1e-5, "{centres:?}");
    }

    #[test]
    fn nearest_and_familiar() {
        let keys = vec![("a".to_string(), key(0.0)), ("b".to_string(), key(10.0))];
        let index = KeyIndex::new(keys);
        let found = index.nearest(&prompt(9.99, 5.0), KeyMetric::Hidden).unwrap();
        assert_eq!((found.name.as_str(), found.familiar), ("b", true));
        assert!(!index.nearest(&prompt(5.0, 2.0), KeyMetric::Hidden).unwrap().familiar);
        assert!(KeyIndex::default().nearest(&prompt(0.0, 0.0), KeyMetric::Hidden).is_none());
    }

    #[test]
    fn a_wide_task_wins_where_a_nearer_narrow_one_is_not_familiar() {
        let (mut narrow, mut wide) = (key(0.0), key(10.0));
        (narrow.radius, wide.radius) = (0.5, 9.0);
        let index = KeyIndex::new(vec![("narrow".into(), narrow), ("wide".into(), wide)]);
        let found = index.nearest(&prompt(3.0, 0.0), KeyMetric::Hidden).unwrap();
        assert_eq!((found.name.as_str(), found.familiar), ("wide", true));
    }

    #[test]
    fn bytes_round_trip_and_damage_is_noticed() {
        let key = key(1.0);
        let bytes = key.to_bytes();
        assert_eq!(Key::from_bytes(&bytes).unwrap(), key);
        for cut in [0, 3, 15, 17, bytes.len() - 1, bytes.len() - 4] {
            assert!(Key::from_bytes(&bytes[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn sketches_keep_distances() {
        let mut state = 7u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let vectors: Vec<Vec<f32>> = (0..12).map(|_| (0..4096).map(|_| random()).collect()).collect();
        for a in &vectors {
            for b in vectors.iter().filter(|b| *b != a) {
                let ratio = l2(&sketch(a.clone()), &sketch(b.clone())) / l2(a, b);
                assert!((0.75..1.25).contains(&ratio), "{ratio}");
            }
        }
        assert_eq!(sketch(vec![1.0, 2.0]), [1.0, 2.0]);
    }

    #[test]
    fn distances_by_hand() {
        assert_eq!(l2(&[0.0, 3.0], &[4.0, 0.0]), 5.0);
        assert!((cosine(&[1.0, 0.0], &[1.0, 1.0]) - (1.0 - 0.5f32.sqrt())).abs() < 1e-6);
        assert_eq!(router_scores(&[&[2.0, 0.0, 1.0]], 3, 2), [2.0, 0.0, 1.0]);
    }
}
