//! The pathway of a text through the experts: the weights that routers gave, the experts that hold most of them, how far
//! two pathways are apart, and how smoothly one goes from layer to layer.

use candle_core::Tensor;
use quorate_formats::spec::{ModelSpec, RouterScore};
use quorate_lens::ExpertMap;
use quorate_model::{At, Flow, Lens, ModelError, Site, SiteSet, ops};

use super::{Rows, distribution};
use crate::contrast::top;

/// The lens that sums the router's distribution over the tokens of each text.
#[derive(Debug)]
pub struct WeightRecorder {
    map: ExpertMap,
    scores: Vec<RouterScore>,
    rows: Rows,
    /// `[text][MoE layer][expert]`
    sums: Vec<Vec<Vec<f64>>>,
    /// Tokens that counted, per text.
    tokens: Vec<u64>,
    /// Text of the first segment of the pass under way.
    first: usize,
}

impl WeightRecorder {
    /// A recorder for so many texts.
    pub fn new(spec: &ModelSpec, rows: Rows, texts: usize) -> WeightRecorder {
        let map = ExpertMap::of(spec);
        let scores = map.layers.iter().filter_map(|&l| Some(spec.moe(l)?.router.score)).collect();
        let zeros: Vec<Vec<f64>> = map.experts.iter().map(|&e| vec![0.0; e]).collect();
        WeightRecorder { map, scores, rows, sums: vec![zeros; texts], tokens: vec![0; texts], first: 0 }
    }

    /// The next pass begins with this text.
    pub fn begin(&mut self, first: usize) {
        self.first = first;
    }

    /// Mean weight of each expert over each text's tokens, `[text][MoE layer][expert]`, every layer's sum is 1; `None` for a
    /// text of which no token counts.
    pub fn weights(self) -> Vec<Option<Vec<Vec<f64>>>> {
        let mean = |(mut layers, tokens): (Vec<Vec<f64>>, u64)| {
            layers.iter_mut().flatten().for_each(|w| *w /= tokens as f64);
            (tokens > 0).then_some(layers)
        };
        self.sums.into_iter().zip(self.tokens).map(mean).collect()
    }
}

impl Lens for WeightRecorder {
    fn sites(&self, layer: usize) -> SiteSet {
        self.map.moe_index(layer).map_or(SiteSet::NONE, |_| SiteSet::of(&[Site::RouterLogits]))
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        let Some(moe) = self.map.moe_index(at.layer) else { return Ok(Flow::Continue) };
        let logits = ops::values(value)?;
        for (row, logits) in logits.chunks_exact(self.map.experts[moe]).enumerate() {
            if !self.rows.contains(at.rows.phase[row]) {
                continue;
            }
            let text = self.first + at.rows.segment[row];
            self.tokens[text] += u64::from(moe == 0);
            let weights = distribution(self.scores[moe], logits);
            self.sums[text][moe].iter_mut().zip(weights).for_each(|(sum, w)| *sum += w);
        }
        Ok(Flow::Continue)
    }
}

/// The experts of a text in every MoE layer, the one with the largest weight first: in each layer the fewest that hold the
/// share `mass` of its weights. Equal weights go to the lower number.
pub fn pathway(weights: &[Vec<f64>], mass: f64) -> Vec<Vec<usize>> {
    let prefix = |layer: &Vec<f64>| {
        let mut order = top(layer, layer.len());
        let (mut held, wanted) = (0.0, mass * layer.iter().sum::<f64>());
        // A sum of shares falls short of the whole by rounding.
        let enough = |&e: &usize| {
            held += layer[e];
            held >= wanted - 1e-12
        };
        let count = order.iter().position(enough).map_or(order.len(), |i| i + 1);
        order.truncate(count);
        order
    };
    weights.iter().map(prefix).collect()
}

/// What one edit changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// An expert of a layer
    Expert,
    /// A character of the experts' numbers, as the paper has it: two digits weigh more than one
    Char,
}

/// The Levenshtein distance of two pathways, layers being parted by a mark.
pub fn distance(a: &[Vec<usize>], b: &[Vec<usize>], unit: Unit) -> usize {
    match unit {
        Unit::Expert => strsim::generic_levenshtein(&marked(a), &marked(b)),
        Unit::Char => strsim::generic_levenshtein(&text(a).into_bytes(), &text(b).into_bytes()),
    }
}

/// Experts of all layers, `None` between layers. Experts of two layers with one number are not the same.
fn marked(pathway: &[Vec<usize>]) -> Vec<Option<(usize, usize)>> {
    let layer = |(l, experts): (usize, &Vec<usize>)| {
        let mark = (l > 0).then_some(None);
        mark.into_iter().chain(experts.iter().map(move |&e| Some((l, e)))).collect::<Vec<_>>()
    };
    pathway.iter().enumerate().flat_map(layer).collect()
}

/// `3,1,5-2,7-..`
pub fn text(pathway: &[Vec<usize>]) -> String {
    let layer = |experts: &Vec<usize>| experts.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    pathway.iter().map(layer).collect::<Vec<_>>().join("-")
}

/// The routing embedding of each MoE layer, `e_l = sum_i w[l][i] v[l][i]`, of router rows `v[l] [E, d]`.
fn embeddings(weights: &[Vec<f64>], routers: &[Vec<f32>]) -> Vec<Vec<f64>> {
    let embed = |(weights, router): (&Vec<f64>, &Vec<f32>)| {
        let d = router.len() / weights.len().max(1);
        let mut sum = vec![0.0; d];
        for (w, row) in weights.iter().zip(router.chunks_exact(d.max(1))) {
            sum.iter_mut().zip(row).for_each(|(s, v)| *s += w * f64::from(*v));
        }
        sum
    };
    weights.iter().zip(routers).map(embed).collect()
}

/// Cosines of the routing embeddings of successive MoE layers.
pub fn cosines(weights: &[Vec<f64>], routers: &[Vec<f32>]) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cosine = |pair: &[Vec<f64>]| {
        let [a, b] = [&pair[0], &pair[1]];
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE)
    };
    embeddings(weights, routers).windows(2).map(cosine).collect()
}

/// Largest cosine from which a consistency is computed.
const COSINE_MIN: f64 = 1e-6;

/// `C = 1 - mean_l c[l] / max_l c[l]`: 0 if routing goes on equally in all layers. `None` without cosines, or where none is
/// above zero and the quotient says nothing.
pub fn consistency(cosines: &[f64]) -> Option<f64> {
    let most = cosines.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (most > COSINE_MIN).then(|| 1.0 - cosines.iter().sum::<f64>() / cosines.len() as f64 / (most + 1e-8))
}

#[cfg(test)]
mod tests {
    use quorate_model::Segment;
    use quorate_model::sampling::SplitMix64;

    use super::*;

    fn random(seed: u64, layers: usize, experts: usize) -> Vec<Vec<f64>> {
        let mut random = SplitMix64::new(seed);
        (0..layers).map(|_| (0..experts).map(|_| random.unit().powi(8)).collect()).collect()
    }

    #[test]
    fn the_shortest_prefix_by_hand() {
        let weights = [vec![0.1, 0.5, 0.2, 0.2], vec![0.0, 0.0, 0.0, 1.0]];
        assert_eq!(pathway(&weights, 0.7), [vec![1, 2], vec![3]]);
        assert_eq!(pathway(&weights, 0.71), [vec![1, 2, 3], vec![3]]);
        assert_eq!(text(&pathway(&weights, 0.7)), "1,2-3");
        let sparse = [vec![0.05, 0.25, 0.1, 0.1]];
        assert_eq!(pathway(&sparse, 0.7), [vec![1, 2]], "of what there is");
        assert_eq!(pathway(&weights, 1.0)[0].len(), 4);
    }

    #[test]
    fn a_text_is_not_apart_from_itself_and_numbers_do_not_matter() {
        let (a, b) = (random(1, 6, 32), random(2, 6, 32));
        let order = |w: &[Vec<f64>], shift: usize| -> Vec<Vec<f64>> {
            w.iter().map(|l| (0..32).map(|e| l[(e * 13 + shift) % 32]).collect()).collect()
        };
        let of = |a: &[Vec<f64>], b: &[Vec<f64>], unit| distance(&pathway(a, 0.7), &pathway(b, 0.7), unit);
        for unit in [Unit::Expert, Unit::Char] {
            assert_eq!(of(&a, &a, unit), 0);
            assert!(of(&a, &b, unit) > 10);
        }
        let (mut experts, mut chars) = (Vec::new(), Vec::new());
        for shift in 0..8 {
            experts.push(of(&order(&a, shift), &order(&b, shift), Unit::Expert));
            chars.push(of(&order(&a, shift), &order(&b, shift), Unit::Char));
        }
        assert!(experts.iter().all(|d| *d == of(&a, &b, Unit::Expert)), "{experts:?}");
        assert!(chars.iter().any(|d| *d != chars[0]), "{chars:?}");
    }

    /// Pathways that share `c` of 8 layers are the nearer the larger `c` is.
    #[test]
    fn shared_layers_bring_pathways_nearer() {
        let (a, b) = (random(3, 8, 32), random(4, 8, 32));
        let with = |shared: usize| -> Vec<Vec<f64>> { [&a[..shared], &b[shared..]].concat() };
        let d: Vec<usize> =
            (0..=8).map(|c| distance(&pathway(&a, 0.7), &pathway(&with(c), 0.7), Unit::Expert)).collect();
        assert!(d.windows(2).all(|w| w[0] > w[1]) && d[8] == 0, "{d:?}");
    }

    #[test]
    fn the_same_number_in_another_layer_is_another_expert() {
        let distance = |a: &[Vec<usize>], b: &[Vec<usize>]| distance(a, b, Unit::Expert);
        assert_eq!(distance(&[vec![1], vec![2]], &[vec![2], vec![1]]), 2);
        assert_eq!(distance(&[vec![1, 2]], &[vec![2]]), 1);
        assert_eq!(distance(&[vec![1, 2], vec![3]], &[vec![1], vec![3]]), 1);
        assert_eq!(super::distance(&[vec![1]], &[vec![12]], Unit::Char), 1);
        assert_eq!(super::distance(&[vec![1]], &[vec![23]], Unit::Char), 2, "two digits weigh more");
    }

    #[test]
    fn consistency_by_hand() {
        // Both layers have the rows (1, 0) and (0, 1).
        let routers = vec![vec![1.0, 0.0, 0.0, 1.0]; 3];
        let c = cosines(&[vec![1.0, 0.0], vec![1.0, 0.0], vec![0.0, 1.0]], &routers);
        assert!((c[0] - 1.0).abs() < 1e-12 && c[1].abs() < 1e-12, "{c:?}");
        assert!((consistency(&c).unwrap() - 0.5).abs() < 1e-6);
        assert!(consistency(&[0.3, 0.3, 0.3]).unwrap().abs() < 1e-6, "smooth");
        assert_eq!(consistency(&[-0.3, -0.1]), None, "never along");
        assert_eq!(consistency(&[]), None, "one layer");
    }

    /// Scores 0.9 and 7 times 0.05 of a sigmoid router: normalised, the first holds 0.72. A softmax of the scores would give
    /// 0.25 to it, and take six experts to reach 0.7.
    #[test]
    fn a_sigmoid_router_is_normalised_and_texts_are_kept_apart() {
        let logit = |q: f64| (q / (1.0 - q)).ln() as f32;
        let row = |best: usize| (0..8).map(move |e| logit(if e == best { 0.9 } else { 0.05 }));
        let mut recorder = WeightRecorder {
            map: ExpertMap::new(vec![0], vec![8]),
            scores: vec![RouterScore::Sigmoid],
            rows: Rows::Prompt,
            sums: vec![vec![vec![0.0; 8]]; 3],
            tokens: vec![0; 3],
            first: 0,
        };
        recorder.begin(1);
        let segments = [Segment::teacher_forced(0, &[1], &[2]), Segment::prompt(1, vec![3])];
        let rows = quorate_model::Rows::of(&segments, &[0, 0], 9).unwrap();
        let at = At { site: Site::RouterLogits, layer: 0, rows: &rows, routing: None };
        // The row of the answer does not count.
        let mut logits = ops::tensor(row(2).chain(row(4)).chain(row(7)).collect(), &[3, 8]).unwrap();
        recorder.tensor(&at, &mut logits).unwrap();
        let weights = recorder.weights();
        assert!(weights[0].is_none(), "no token was seen");
        for (text, best) in [(1, 2), (2, 7)] {
            let weights = weights[text].as_ref().unwrap();
            assert!((weights[0][best] - 0.72).abs() < 1e-6, "{weights:?}");
            assert_eq!(pathway(weights, 0.7), [vec![best]]);
        }
        let scores: Vec<f32> = (0..8).map(|e| if e == 2 { 0.9 } else { 0.05 }).collect();
        assert_eq!(pathway(&[distribution(RouterScore::SoftmaxAll, &scores)], 0.7)[0].len(), 6);
    }
}
