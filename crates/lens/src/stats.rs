//! Streaming statistics of routing: what every expert score needs, in one pass, mergeable.

use std::collections::BTreeMap;

use candle_core::Tensor;
use quorate_formats::spec::ModelSpec;
use quorate_kernels::{dot, norm_sq};
use quorate_model::{At, Flow, Lens, ModelError, NO_EXPERT, Phase, Site, SiteSet, ops};

use crate::{LensError, PromptKey};

/// Width of the bins in which confidences are counted is `1 / CONFIDENCE_BINS`; thresholds are rounded to it.
pub const CONFIDENCE_BINS: usize = 64;

macro_rules! sums {
    ($($(#[$doc:meta])* $variant:ident = $name:literal;)*) => {
        /// What is summed per expert over the tokens of a phase. `s` router logit, `g` gate, `n` norm of the expert's
        /// output before its gate; over the tokens for which the expert is selected.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Sum { $($(#[$doc])* $variant,)* }
        impl Sum {
            /// Every sum.
            pub const ALL: &'static [Sum] = &[$(Sum::$variant,)*];
            /// Its name in files.
            pub fn name(self) -> &'static str { match self { $(Sum::$variant => $name,)* } }
        }
    };
}

sums! {
    /// `g`.
    Gate = "gate";
    /// `g^2`.
    GateSq = "gate_sq";
    /// `n`.
    Norm = "norm";
    /// `n^2`.
    NormSq = "norm_sq";
    /// `g n`.
    GateNorm = "gate_norm";
    /// `g^2 n^2`.
    GateNormSq = "gate_norm_sq";
    /// `g n max(0, 1 - cos(h, h + r))`: `h` residual before the MoE block, `r` sum of the routed experts (EASY-EP).
    Easy = "easy";
    /// `s` where the expert ranks first.
    TopLogit = "top_logit";
}

/// What is summed per expert and confidence bin. `p` is the softmax over the selected experts' logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BinSum {
    /// `s`.
    Logit,
    /// `sigmoid(s)`.
    Sigmoid,
    /// `max(s, sigmoid(s))`.
    Max,
    /// `p`.
    Confidence,
}

impl BinSum {
    /// Every sum.
    pub const ALL: [BinSum; 4] = [BinSum::Logit, BinSum::Sigmoid, BinSum::Max, BinSum::Confidence];
    const NAMES: [&'static str; 4] = ["bin_logit", "bin_sigmoid", "bin_max", "bin_confidence"];
}

/// The routed experts of a model, numbered through: MoE layer by MoE layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertMap {
    /// Decoder layer of each MoE layer.
    pub layers: Vec<usize>,
    /// Experts of each MoE layer.
    pub experts: Vec<usize>,
    offsets: Vec<usize>,
}

impl ExpertMap {
    /// From decoder layers and expert counts.
    pub fn new(layers: Vec<usize>, experts: Vec<usize>) -> ExpertMap {
        let mut offsets = vec![0];
        offsets.extend(experts.iter().scan(0, |sum, e| {
            *sum += e;
            Some(*sum)
        }));
        ExpertMap { layers, experts, offsets }
    }

    /// The experts of a model.
    pub fn of(spec: &ModelSpec) -> ExpertMap {
        let layers = spec.moe_layers();
        let experts = layers.iter().filter_map(|&l| spec.moe(l)).map(|m| m.n_experts).collect();
        ExpertMap::new(layers, experts)
    }

    /// Number of MoE layers.
    pub fn n_layers(&self) -> usize {
        self.layers.len()
    }

    /// Number of experts in all layers.
    pub fn total(&self) -> usize {
        self.offsets[self.layers.len()]
    }

    /// Numbers of the experts of MoE layer `moe`.
    pub fn range(&self, moe: usize) -> std::ops::Range<usize> {
        self.offsets[moe]..self.offsets[moe + 1]
    }

    /// MoE layer of decoder layer `layer`.
    pub fn moe_index(&self, layer: usize) -> Option<usize> {
        self.layers.iter().position(|&l| l == layer)
    }
}

/// The statistics of one phase (prompt or answer). All vectors over experts are numbered by an [`ExpertMap`].
#[derive(Clone, Debug, PartialEq)]
pub struct PhaseStats {
    /// Tokens seen.
    pub tokens: u64,
    /// Tokens for which the expert was selected.
    pub count: Vec<u64>,
    /// Tokens for which the expert ranked first.
    pub top_count: Vec<u64>,
    /// Per MoE layer, the sum over tokens of the largest confidence.
    pub max_confidence: Vec<f64>,
    sums: Vec<Vec<f64>>,
    bins: Vec<Vec<f64>>,
}

impl PhaseStats {
    fn new(map: &ExpertMap) -> PhaseStats {
        let total = map.total();
        PhaseStats {
            tokens: 0,
            count: vec![0; total],
            top_count: vec![0; total],
            max_confidence: vec![0.0; map.n_layers()],
            sums: vec![vec![0.0; total]; Sum::ALL.len()],
            bins: vec![vec![0.0; total * CONFIDENCE_BINS]; BinSum::ALL.len()],
        }
    }

    /// One sum, per expert.
    pub fn sum(&self, sum: Sum) -> &[f64] {
        &self.sums[sum as usize]
    }

    /// One sum over the bins from `first` on, of expert `unit`.
    pub fn bins_from(&self, sum: BinSum, unit: usize, first: usize) -> f64 {
        self.bins[sum as usize][unit * CONFIDENCE_BINS..(unit + 1) * CONFIDENCE_BINS][first.min(CONFIDENCE_BINS)..]
            .iter()
            .sum()
    }

    fn each_f64(&mut self) -> Vec<(String, &mut Vec<f64>)> {
        let mut all = vec![("max_confidence".to_string(), &mut self.max_confidence)];
        all.extend(Sum::ALL.iter().zip(&mut self.sums).map(|(s, v)| (s.name().to_string(), v)));
        all.extend(BinSum::NAMES.iter().zip(&mut self.bins).map(|(s, v)| (s.to_string(), v)));
        all
    }

    fn each_u64(&mut self) -> Vec<(String, &mut Vec<u64>)> {
        vec![("count".into(), &mut self.count), ("top_count".into(), &mut self.top_count)]
    }

    /// Adds what the router alone tells of one token in MoE layer `moe`, whose experts are numbered from `start` on:
    /// `logits [E]`, `ids [k]` in rank order, `gates [k]`. `confidence [k]` is room to work in.
    pub(crate) fn add_routing(
        &mut self,
        moe: usize,
        start: usize,
        logits: &[f32],
        ids: &[u32],
        gates: &[f32],
        confidence: &mut [f32],
    ) {
        self.tokens += u64::from(moe == 0);
        confidences(logits, ids, confidence);
        self.max_confidence[moe] += f64::from(confidence.iter().copied().fold(0.0, f32::max));
        for (j, &id) in ids.iter().enumerate().filter(|(_, id)| **id != NO_EXPERT) {
            let unit = start + id as usize;
            self.count[unit] += 1;
            self.top_count[unit] += u64::from(j == 0);
            let (s, g) = (f64::from(logits[id as usize]), f64::from(gates[j]));
            for (sum, value) in [(Sum::Gate, g), (Sum::GateSq, g * g), (Sum::TopLogit, if j == 0 { s } else { 0.0 })] {
                self.sums[sum as usize][unit] += value;
            }
            let bin = unit * CONFIDENCE_BINS + confidence_bin(confidence[j]);
            let sigmoid = 1.0 / (1.0 + (-s).exp());
            for (sum, value) in [
                (BinSum::Logit, s),
                (BinSum::Sigmoid, sigmoid),
                (BinSum::Max, s.max(sigmoid)),
                (BinSum::Confidence, f64::from(confidence[j])),
            ] {
                self.bins[sum as usize][bin] += value;
            }
        }
    }

    /// Marks what was not seen as unknown: its sums become NaN.
    fn see_only(&mut self, seen: Seen) {
        for &sum in Sum::ALL.iter().filter(|s| !seen.tells(**s)) {
            self.sums[sum as usize].fill(f64::NAN);
        }
        for &sum in BinSum::ALL.iter().filter(|s| !seen.tells_bins(**s)) {
            self.bins[sum as usize].fill(f64::NAN);
        }
        if seen == Seen::Counts {
            self.max_confidence.fill(f64::NAN);
        }
    }

    /// Adds the statistics of other tokens.
    pub fn merge(&mut self, other: &PhaseStats) {
        self.tokens += other.tokens;
        let mut other = other.clone();
        for ((_, mine), (_, theirs)) in self.each_u64().into_iter().zip(other.each_u64()) {
            mine.iter_mut().zip(theirs.iter()).for_each(|(a, b)| *a += b);
        }
        for ((_, mine), (_, theirs)) in self.each_f64().into_iter().zip(other.each_f64()) {
            mine.iter_mut().zip(theirs.iter()).for_each(|(a, b)| *a += b);
        }
    }
}

/// What was seen of a routing that another engine recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Which experts were chosen, or only how often.
    Counts,
    /// The router's probabilities: logits up to a constant for each token.
    Probabilities,
    /// The router's logits.
    Logits,
}

impl Seen {
    fn tells(self, sum: Sum) -> bool {
        match sum {
            Sum::Gate | Sum::GateSq => self != Seen::Counts,
            Sum::TopLogit => self == Seen::Logits,
            Sum::Norm | Sum::NormSq | Sum::GateNorm | Sum::GateNormSq | Sum::Easy => false,
        }
    }

    fn tells_bins(self, sum: BinSum) -> bool {
        self == Seen::Logits || (self == Seen::Probabilities && sum == BinSum::Confidence)
    }
}

/// Statistics of a set of texts. A sum that was not observed is NaN, and so is every score that needs it, also after
/// merging: what is unknown of a part is unknown of the whole.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterStats {
    /// Which experts.
    pub map: ExpertMap,
    /// Texts seen.
    pub items: u64,
    /// Prompt tokens.
    pub prompt: PhaseStats,
    /// Answer tokens.
    pub answer: PhaseStats,
}

impl RouterStats {
    /// Nothing seen yet.
    pub fn new(map: ExpertMap) -> RouterStats {
        RouterStats { items: 0, prompt: PhaseStats::new(&map), answer: PhaseStats::new(&map), map }
    }

    /// Marks as unknown (NaN) whatever cannot be known from what was seen. First ranks are not counted where only the
    /// chosen experts are known.
    pub fn see_only(&mut self, seen: Seen) {
        self.prompt.see_only(seen);
        self.answer.see_only(seen);
    }

    /// Adds the statistics of other texts of the same model.
    pub fn merge(&mut self, other: &RouterStats) {
        self.items += other.items;
        self.prompt.merge(&other.prompt);
        self.answer.merge(&other.answer);
    }

    /// Prompt and answer tokens pooled.
    pub fn pooled(&self) -> PhaseStats {
        let mut all = self.prompt.clone();
        all.merge(&self.answer);
        all
    }

    /// Tensors for a file, by name.
    pub(crate) fn to_tensors(&self) -> (BTreeMap<String, Vec<f64>>, BTreeMap<String, Vec<u64>>) {
        let mut stats = self.clone();
        let (mut floats, mut counts) = (BTreeMap::new(), BTreeMap::new());
        counts.insert("items".to_string(), vec![self.items]);
        for (phase, stats) in [("prompt", &mut stats.prompt), ("answer", &mut stats.answer)] {
            counts.insert(format!("{phase}.tokens"), vec![stats.tokens]);
            counts.extend(stats.each_u64().into_iter().map(|(n, v)| (format!("{phase}.{n}"), std::mem::take(v))));
            floats.extend(stats.each_f64().into_iter().map(|(n, v)| (format!("{phase}.{n}"), std::mem::take(v))));
        }
        (floats, counts)
    }

    /// Reads what [`RouterStats::to_tensors`] gave.
    pub(crate) fn from_tensors(
        map: ExpertMap,
        mut float: impl FnMut(&str) -> Result<Vec<f64>, LensError>,
        mut count: impl FnMut(&str) -> Result<Vec<u64>, LensError>,
    ) -> Result<RouterStats, LensError> {
        let mut stats = RouterStats::new(map);
        let one = |v: Vec<u64>, name: &str| {
            v.first().copied().ok_or_else(|| LensError::invalid("statistics", format!("`{name}` is empty")))
        };
        stats.items = one(count("items")?, "items")?;
        for (phase, stats) in [("prompt", &mut stats.prompt), ("answer", &mut stats.answer)] {
            let name = format!("{phase}.tokens");
            stats.tokens = one(count(&name)?, &name)?;
            for (n, v) in stats.each_u64() {
                replace(&format!("{phase}.{n}"), v, count(&format!("{phase}.{n}"))?)?;
            }
            for (n, v) in stats.each_f64() {
                replace(&format!("{phase}.{n}"), v, float(&format!("{phase}.{n}"))?)?;
            }
        }
        Ok(stats)
    }
}

fn replace<T>(name: &str, old: &mut Vec<T>, new: Vec<T>) -> Result<(), LensError> {
    if old.len() != new.len() {
        let problem = format!("`{name}` has {} values, the model needs {}", new.len(), old.len());
        return Err(LensError::invalid("statistics", problem));
    }
    *old = new;
    Ok(())
}

/// All that profiling a task gathers.
#[derive(Clone, Debug, PartialEq)]
pub struct ProfileData {
    /// Statistics of the profiled texts.
    pub stats: RouterStats,
    /// Statistics of the held-out texts.
    pub heldout: RouterStats,
    /// Retrieval keys of the profiled prompts.
    pub keys: Vec<PromptKey>,
    /// Retrieval keys of the held-out prompts.
    pub heldout_keys: Vec<PromptKey>,
    /// Batches done, while the profile is under way.
    pub done_batches: usize,
}

impl ProfileData {
    /// Nothing gathered yet.
    pub fn new(map: &ExpertMap) -> ProfileData {
        let stats = RouterStats::new(map.clone());
        ProfileData { heldout: stats.clone(), stats, keys: Vec::new(), heldout_keys: Vec::new(), done_batches: 0 }
    }

    /// Adds what was gathered from other texts with the same model.
    pub fn merge(&mut self, other: &ProfileData) {
        self.stats.merge(&other.stats);
        self.heldout.merge(&other.heldout);
        self.keys.extend_from_slice(&other.keys);
        self.heldout_keys.extend_from_slice(&other.heldout_keys);
    }
}

/// The observer that fills [`RouterStats`].
pub struct Profiler {
    stats: RouterStats,
    /// Values of the layer under way.
    logits: Vec<f32>,
    resid: Vec<f32>,
    norms: Vec<f32>,
}

impl Profiler {
    /// An observer that starts from `stats`.
    pub fn new(stats: RouterStats) -> Profiler {
        Profiler { stats, logits: Vec::new(), resid: Vec::new(), norms: Vec::new() }
    }

    /// What was gathered.
    pub fn stats(&self) -> &RouterStats {
        &self.stats
    }

    /// Counts texts; the forward pass does not know where one ends.
    pub fn count_items(&mut self, items: u64) {
        self.stats.items += items;
    }

    /// What was gathered.
    pub fn into_stats(self) -> RouterStats {
        self.stats
    }

    /// Adds one layer's rows. `moe_out [N, d]` is the sum of the routed experts.
    fn add_layer(&mut self, at: &At<'_>, moe_out: &[f32]) -> Result<(), ModelError> {
        let (Some(moe), Some(routing)) = (self.stats.map.moe_index(at.layer), at.routing) else { return Ok(()) };
        let units = self.stats.map.range(moe);
        let (e, k, n) = (units.len(), routing.k, at.rows.len());
        let d = moe_out.len() / n;
        let gates = ops::values(&routing.gates)?;
        let mut confidence = vec![0f32; k];
        for row in 0..n {
            let stats = match at.rows.phase[row] {
                Phase::Prompt | Phase::PromptLast => &mut self.stats.prompt,
                Phase::Answer | Phase::Decode => &mut self.stats.answer,
            };
            let logits = &self.logits[row * e..(row + 1) * e];
            let ids = &routing.ids[row * k..(row + 1) * k];
            stats.add_routing(moe, units.start, logits, ids, &gates[row * k..(row + 1) * k], &mut confidence);
            let (h, r) = (&self.resid[row * d..(row + 1) * d], &moe_out[row * d..(row + 1) * d]);
            let turn = turn(h, r);
            for (j, &id) in ids.iter().enumerate().filter(|(_, id)| **id != NO_EXPERT) {
                let slot = row * k + j;
                let unit = units.start + id as usize;
                let (g, norm) = (f64::from(gates[slot]), f64::from(self.norms[slot]));
                for (sum, value) in [
                    (Sum::Norm, norm),
                    (Sum::NormSq, norm * norm),
                    (Sum::GateNorm, g * norm),
                    (Sum::GateNormSq, g * g * norm * norm),
                    (Sum::Easy, g * norm * turn),
                ] {
                    stats.sums[sum as usize][unit] += value;
                }
            }
        }
        Ok(())
    }
}

/// Bin of a confidence.
pub fn confidence_bin(p: f32) -> usize {
    ((p * CONFIDENCE_BINS as f32) as usize).min(CONFIDENCE_BINS - 1)
}

/// Softmax of the selected experts' logits among themselves.
fn confidences(logits: &[f32], ids: &[u32], out: &mut [f32]) {
    for (c, &id) in out.iter_mut().zip(ids) {
        *c = if id == NO_EXPERT { f32::NEG_INFINITY } else { logits[id as usize] };
    }
    quorate_model::softmax(out);
}

/// `max(0, 1 - cos(h, h + r))`, in f64.
fn turn(h: &[f32], r: &[f32]) -> f64 {
    let (hh, hr, rr) = (f64::from(norm_sq(h)), f64::from(dot(h, r)), f64::from(norm_sq(r)));
    let sum = (hh + 2.0 * hr + rr).max(0.0);
    if hh == 0.0 || sum == 0.0 { 0.0 } else { (1.0 - (hh + hr) / (hh.sqrt() * sum.sqrt())).max(0.0) }
}

impl Lens for Profiler {
    fn sites(&self, layer: usize) -> SiteSet {
        match self.stats.map.moe_index(layer) {
            Some(_) => SiteSet::of(&[Site::ResidMid, Site::RouterLogits, Site::ExpertOut, Site::MoeOut]),
            None => SiteSet::NONE,
        }
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        let x = ops::values(value)?;
        match at.site {
            Site::ResidMid => self.resid.clone_from_slice_of(&x),
            Site::RouterLogits => self.logits.clone_from_slice_of(&x),
            Site::ExpertOut => {
                let d = value.dim(2)?;
                self.norms.clear();
                self.norms.extend(x.chunks_exact(d).map(|f| norm_sq(f).sqrt()));
            }
            Site::MoeOut => self.add_layer(at, &x)?,
            _ => {}
        }
        Ok(Flow::Continue)
    }
}

trait Refill {
    fn clone_from_slice_of(&mut self, values: &[f32]);
}

impl Refill for Vec<f32> {
    fn clone_from_slice_of(&mut self, values: &[f32]) {
        self.clear();
        self.extend_from_slice(values);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_turn_of_a_token() {
        assert!(turn(&[1.0, 0.0], &[1.0, 0.0]).abs() < 1e-12);
        assert!((turn(&[1.0, 0.0], &[-1.0, 1.0]) - 1.0).abs() < 1e-12);
        assert_eq!(turn(&[0.0, 0.0], &[1.0, 0.0]), 0.0);
    }

    #[test]
    fn confidence_is_the_softmax_over_the_selected() {
        let mut c = [0.0; 3];
        confidences(&[0.0, 3f32.ln(), 9.0], &[1, NO_EXPERT, 0], &mut c);
        assert!((c[0] - 0.75).abs() < 1e-6 && c[1] == 0.0 && (c[2] - 0.25).abs() < 1e-6);
        assert_eq!((confidence_bin(0.0), confidence_bin(1.0), confidence_bin(0.5)), (0, 63, 32));
    }

    #[test]
    fn experts_are_numbered_layer_by_layer() {
        let map = ExpertMap::new(vec![1, 3], vec![4, 2]);
        assert_eq!((map.total(), map.range(1), map.moe_index(3), map.moe_index(0)), (6, 4..6, Some(1), None));
    }
}
