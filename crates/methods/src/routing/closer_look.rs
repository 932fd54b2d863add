//! A Closer Look into MoE: how alike experts are, in weights and in outputs, and whether routers choose large outputs.
//!
//! *What it measures*, for each MoE layer:
//! - norm against score: every token's experts are ranked by the norm of their output (gate not applied) and by the router's
//!   score; `R[norm place][score place]` counts, its diagonal mass against `1/E`, and the share of the top k by score that
//!   are in the top k by norm against `k/E`;
//! - outputs: angular similarity `1 - arccos(cos)/pi` of the outputs of all pairs of experts, mean over tokens;
//! - weights: cosine of flattened matrices, of neuron averages, and after the neurons of one were brought in the order that
//!   suits the other (Hungarian method on cosines of neurons), with Kendall's tau of that order;
//! - router rows against experts: `r^2` of the cosines of all pairs of rows with those of all pairs of neuron averages;
//! - activity: share of `act(gate x)` above a threshold in size.
//!
//! All experts run on the layer's input as normal execution gives it; the hidden stream itself stays normal.
//! *Controls.* Scores in random order among the experts; matrices whose weights are shuffled, reordered likewise (any search
//! for likeness finds some); router rows that belong to other experts.
//! *Agreement with the paper.* Pairs of experts are sampled for the weights, and wide experts not reordered, since the cost
//! grows with the cube of the width. Raw router logits rank as scores do; a selection bias is not part of them. Pictures
//! (PCA of experts, chosen experts of a sentence) are not made.
//! *Limits.* Errors over tokens take tokens as independent, which those of one text are not.
//! *Reference.* arXiv 2406.18219.

mod tables;

use clap::Args;
use quorate_eval::encode::EncodedItem;
use quorate_kernels::{dot, norm_sq};
use quorate_lens::{ExpertMap, Recorder};
use quorate_model::sampling::SplitMix64;
use quorate_model::{Model, ModelError, Site, ops};
use serde::Serialize;

use self::tables::{gate_rows, norm_tables, output_tables, weight_tables};
use super::similarity::{RankCounts, angular, cosine, mean_row, neurons, reorder, unit_rows};
use crate::{Card, Kind, Lab, MethodError, Report, Run};

/// The card of A Closer Look.
pub const CARD: Card = Card {
    id: "closer-look",
    title: "A Closer Look into MoE: likeness of experts, norm against score",
    paper: "arXiv 2406.18219",
    year: 2024,
    kind: Kind::Analysis,
    needs: "a MoE model and a few texts",
    cost: "all experts of the chosen layers on some hundred tokens; reordering grows with pairs and the cube of the experts' width",
    metrics: &[],
    run: "quorate closer-look\nquorate closer-look --layers 0,5 --pairs 200 -o out/\nquorate closer-look -m MODEL --tasks texts.jsonl --tokens 128 --pairs 8",
    about: "Ranks all experts of a token by the norm of their output and by the router's score; compares experts by outputs, by \
            weights as they are, averaged over neurons and with neurons reordered, and router rows with expert weights. Each \
            beside its random control.",
};

/// Parameters of A Closer Look.
#[derive(Args, Clone, Debug, Serialize)]
pub struct CloserLook {
    /// Decoder layers, separated by commas; left out, all with experts
    #[arg(long, value_delimiter = ',', value_name = "LAYERS")]
    pub layers: Vec<usize>,
    /// Tokens on which all experts run, of texts taken from the tasks in turn
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub tokens: usize,
    /// Pairs of experts of each layer whose weights are compared
    #[arg(long, default_value_t = 40, value_name = "N")]
    pub pairs: usize,
    /// Experts wider than this are not reordered
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub reorder_width: usize,
    /// Activations of at least this size count as active
    #[arg(long, default_value_t = 0.1, value_name = "SIZE")]
    pub threshold: f32,
}

/// Tokens whose outputs are held at a time.
const CHUNK: usize = 32;
/// Random orders of the router's rows.
const SHUFFLES: usize = 200;

/// The inputs of one layer.
struct Inputs<'a> {
    layer: usize,
    experts: usize,
    top_k: usize,
    /// `[T, d]`.
    x: &'a [f32],
    /// `[T, E]`.
    logits: &'a [f32],
}

impl<'a> Inputs<'a> {
    /// The first `tokens` rows recorded of a layer.
    fn of(model: &Model, recorder: &'a Recorder, layer: usize, tokens: usize) -> Result<Inputs<'a>, MethodError> {
        let moe = model.spec().moe(layer).ok_or(ModelError::NoExperts { layer })?;
        let values = |site: Site| {
            let found = recorder.floats().get(&format!("{site}.{layer}"));
            let found = found.ok_or_else(|| ModelError::Lens(format!("{site} of layer {layer} was not visited")))?;
            Ok::<_, ModelError>(&found.values[..tokens * found.shape[1]])
        };
        let (x, logits) = (values(Site::FfnIn)?, values(Site::RouterLogits)?);
        Ok(Inputs { layer, experts: moe.n_experts, top_k: moe.top_k, x, logits })
    }
}

/// What running all experts of a layer shows.
struct Outputs {
    /// Places by norm and by score.
    ranks: RankCounts,
    /// The same with the scores of each token in random order.
    random: RankCounts,
    /// Mean norm of each expert's output.
    norms: Vec<f64>,
    /// Mean angular similarity of the outputs of each pair, (1, 0), (2, 0), (2, 1), ..
    alike: Vec<f64>,
    /// Share of each expert's activations that are active.
    active: Vec<f64>,
}

/// Two experts' weights compared, for one matrix.
#[derive(Clone, Copy)]
struct Likeness {
    pair: (usize, usize),
    matrix: usize,
    flattened: f64,
    averaged: f64,
    /// Reordered, its tau, and a shuffled matrix reordered.
    reordered: Option<(f64, f64, f64)>,
}

impl Run for CloserLook {
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        let map = lab.experts()?;
        let layers = self.chosen_layers(&map)?;
        let (items, tokens) = self.texts(lab)?;
        let mut recorder = Recorder::new(&[Site::FfnIn, Site::RouterLogits], Some(layers.clone()));
        lab.observe("recording the inputs of the experts", &items, &mut recorder, |_, _| {})?;
        let (mut outputs, mut weights) = (Vec::new(), Vec::new());
        for (i, &layer) in layers.iter().enumerate() {
            lab.part = (i, layers.len());
            let inputs = Inputs::of(&lab.model, &recorder, layer, tokens)?;
            outputs.push((layer, inputs.top_k, self.outputs(lab, &inputs)?));
        }
        for (i, &layer) in layers.iter().enumerate() {
            lab.part = (i, layers.len());
            let averages = averages(&lab.model, layer)?;
            let compared = self.compare_weights(lab, layer, &averages)?;
            weights.push((layer, averages, compared));
        }
        lab.part = (0, 1);
        let mut report = Report::default();
        report.headline("texts", items.len());
        report.headline("tokens", tokens);
        norm_tables(&outputs, &mut report);
        output_tables(&map, &outputs, self.threshold, &mut report);
        weight_tables(&weights, &mut report);
        gate_rows(lab, &weights, &mut report)?;
        self.notes(lab, &layers, &mut report);
        Ok(report)
    }
}

impl CloserLook {
    fn chosen_layers(&self, map: &ExpertMap) -> Result<Vec<usize>, MethodError> {
        let mut layers = if self.layers.is_empty() { map.layers.clone() } else { self.layers.clone() };
        layers.sort_unstable();
        layers.dedup();
        match layers.iter().find(|l| !map.layers.contains(l)) {
            None => Ok(layers),
            Some(l) => {
                let help = format!("layers with experts are {:?}", map.layers);
                Err(MethodError::needs(format!("layer {l} has no experts"), help))
            }
        }
    }

    /// Texts of all tasks in turn, until there are enough tokens; and how many of these count.
    fn texts(&self, lab: &mut Lab<'_>) -> Result<(Vec<EncodedItem>, usize), MethodError> {
        let tasks = lab.tasks("test")?;
        let longest = tasks.iter().map(|t| t.items.len()).max().unwrap_or(0);
        let (mut items, mut tokens): (Vec<EncodedItem>, usize) = (Vec::new(), 0);
        for item in (0..longest).flat_map(|i| tasks.iter().filter_map(move |t| t.items.get(i))) {
            if tokens >= self.tokens {
                break;
            }
            items.extend(lab.encode(std::slice::from_ref(item))?);
            tokens += items.last().map_or(0, EncodedItem::len);
        }
        if tokens.min(self.tokens) < 2 {
            let what = "fewer than 2 tokens to run the experts on";
            return Err(MethodError::needs(what, "give texts, and a larger --tokens"));
        }
        Ok((items, tokens.min(self.tokens)))
    }

    /// Runs all experts of a layer on its inputs.
    fn outputs(&self, lab: &mut Lab<'_>, of: &Inputs<'_>) -> Result<Outputs, MethodError> {
        let (e, tokens) = (of.experts, of.logits.len() / of.experts);
        let d = of.x.len() / tokens;
        let (ranks, random) = (RankCounts::new(e), RankCounts::new(e));
        let mut found =
            Outputs { ranks, random, norms: vec![0.0; e], alike: vec![0.0; e * (e - 1) / 2], active: vec![0.0; e] };
        let mut draw = SplitMix64::new(lab.seed ^ of.layer as u64);
        for start in (0..tokens).step_by(CHUNK) {
            lab.progress("running all experts", start, tokens)?;
            let rows = start..(start + CHUNK).min(tokens);
            let x = ops::tensor(of.x[rows.start * d..rows.end * d].to_vec(), &[rows.len(), d])?;
            let y = lab.model.all_expert_outputs(of.layer, &x)?;
            for (t, y) in rows.clone().zip(ops::values(&y)?.chunks_exact(e * d)) {
                self.add_token(&mut found, y, &of.logits[t * e..(t + 1) * e], of.top_k, &mut draw);
            }
            let hidden = lab.model.all_expert_activations(of.layer, &x)?;
            let hidden = ops::values(&hidden)?;
            let width = hidden.len() / (rows.len() * e);
            for (i, values) in hidden.chunks_exact(width).enumerate() {
                let active = values.iter().filter(|v| v.abs() >= self.threshold).count();
                found.active[i % e] += active as f64 / width as f64;
            }
        }
        for sums in [&mut found.norms, &mut found.alike, &mut found.active] {
            sums.iter_mut().for_each(|s| *s /= tokens as f64);
        }
        Ok(found)
    }

    /// Adds one token: outputs `y [E, d]` and logits `[E]`.
    fn add_token(&self, to: &mut Outputs, y: &[f32], logits: &[f32], k: usize, draw: &mut SplitMix64) {
        let (e, d) = (logits.len(), y.len() / logits.len());
        let norms: Vec<f32> = y.chunks_exact(d).map(|y| norm_sq(y).sqrt()).collect();
        to.ranks.add(&norms, logits, k);
        let mut shuffled = logits.to_vec();
        draw.shuffle(&mut shuffled);
        to.random.add(&norms, &shuffled, k);
        to.norms.iter_mut().zip(&norms).for_each(|(s, &n)| *s += f64::from(n));
        let unit = unit_rows(y, d);
        let rows: Vec<&[f32]> = unit.chunks_exact(d).collect();
        let pairs = (0..e).flat_map(|i| (0..i).map(move |j| (i, j)));
        to.alike.iter_mut().zip(pairs).for_each(|(s, (i, j))| *s += angular(f64::from(dot(rows[i], rows[j]))));
    }

    /// Compares the weights of some pairs of a layer's experts.
    fn compare_weights(
        &self,
        lab: &mut Lab<'_>,
        layer: usize,
        averages: &[Vec<f32>; 3],
    ) -> Result<Vec<Likeness>, MethodError> {
        let experts = lab.model.router_weight(layer)?.rows;
        let mut random = SplitMix64::new(lab.seed ^ layer as u64);
        let mut pairs: Vec<_> = (0..experts).flat_map(|i| (0..i).map(move |j| (i, j))).collect();
        random.shuffle(&mut pairs);
        pairs.truncate(self.pairs);
        pairs.sort_unstable();
        let mut found = Vec::new();
        for (done, &(i, j)) in pairs.iter().enumerate() {
            lab.progress("comparing weights", done, pairs.len())?;
            let (a, b) = (lab.model.expert_weights(layer, i)?, lab.model.expert_weights(layer, j)?);
            let d = a.down.rows;
            let reorders = a.down.cols <= self.reorder_width;
            for (matrix, (a, mut b)) in neurons(a).into_iter().zip(neurons(b)).enumerate() {
                let average = |e: usize| &averages[matrix][e * d..(e + 1) * d];
                let (flattened, averaged) = (cosine(&a, &b), cosine(average(i), average(j)));
                let reordered = reorders.then(|| {
                    let own = reorder(&a, &b, d);
                    random.shuffle(&mut b);
                    (own.cosine, own.tau.unwrap_or(1.0), reorder(&a, &b, d).cosine)
                });
                found.push(Likeness { pair: (i, j), matrix, flattened, averaged, reordered });
            }
        }
        Ok(found)
    }

    fn notes(&self, lab: &Lab<'_>, layers: &[usize], report: &mut Report) {
        let moe = |f: fn(&quorate_formats::spec::MoeSpec) -> usize| {
            layers.iter().filter_map(|&l| lab.model.spec().moe(l).map(f)).max().unwrap_or(0)
        };
        let (width, experts) = (moe(|m| m.intermediate_size), moe(|m| m.n_experts));
        let all = experts * experts.saturating_sub(1) / 2;
        report.note(format!("weights: {} of {all} pairs of experts a layer", self.pairs.min(all)));
        if width > self.reorder_width {
            report.note(format!(
                "not reordered: experts are {width} wide, above --reorder-width {}; the cost grows with the cube",
                self.reorder_width
            ));
        }
        report.note("random: scores in random order; shuffled weights, reordered; router rows of other experts");
    }
}

/// Decoder layer, neuron averages, pairs compared.
type LayerWeights = (usize, [Vec<f32>; 3], Vec<Likeness>);

/// Means over the neurons of each expert, `[E, d]` for each matrix.
fn averages(model: &Model, layer: usize) -> Result<[Vec<f32>; 3], MethodError> {
    let mut averages = [Vec::new(), Vec::new(), Vec::new()];
    for e in 0..model.router_weight(layer)?.rows {
        let expert = model.expert_weights(layer, e)?;
        for (to, matrix) in averages.iter_mut().zip(neurons(expert)) {
            to.extend(mean_row(&matrix, expert.down.rows));
        }
    }
    Ok(averages)
}
