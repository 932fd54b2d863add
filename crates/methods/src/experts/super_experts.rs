//! Super experts: the few whose outputs have extreme values, and with them the massive activations of the residual stream
//! and the attention sinks.
//!
//! *What it measures.* `a[l, e] = max |down_proj output|` of each expert over all tokens and channels, before the gate. A super
//! expert has `a` above the 99.5th percentile of all experts, above a tenth of the largest, above 50 times the median, and
//! lies in a layer where massive activations form: one after which the largest value of the residual stream is more than
//! ten times that before, or the massive channel grew by more than half of its largest value. Experts that pass all but the
//! last are *outliers*.
//! *Validation.* The found experts are dropped after the choice. Of layer `l`, `D_sink = 1 - (1/H) sum_h p'[h] / p[h]`, `p` the
//! mean attention of all later tokens to the first one, `p'` the same with the experts dropped; perplexity beside it.
//! *Control.* Random experts of the same layers and use. *Identity.* `D_sink = 0` if nothing is dropped.
//! *Agreement with the paper.* The authors' hook sees only the first row that each expert gets; here all rows count. The paper's
//! two thresholds are relative and always find something: the third, absolute one is added. Its code takes the first 75 % of
//! the layers for those with massive activations; `--layer-fraction 0.75` does. The division of `p'` by `p` is of their means
//! over queries, since single probabilities may be 0. Experts that no token chose are left out of percentile and median.
//! *Limits.* At most one expert in 200 can be above the percentile (one, in a model with fewer). A shared expert is measured
//! as it is added, after its own gate; it cannot be pruned and so needs no protection.
//! *Reference.* arXiv 2507.23279.

use clap::Args;
use quorate_eval::encode::EncodedItem;
use quorate_eval::evaluate::TaskScore;
use quorate_eval::statistics::{mean, quantile};
use quorate_formats::spec::ModelSpec;
use quorate_lens::{ExpertId, ExpertMap, Op, PhaseSelector, matched_sets, on_experts};
use quorate_model::{Chain, Site};
use serde::Serialize;
use serde_json::{Value, json};

use super::extremes::{Peak, PeakRecorder, Peaks, SinkRecorder, WithoutShared};
use crate::{Card, Kind, Lab, MethodError, Report, Run};

/// The card of super experts.
pub const CARD: Card = Card {
    id: "super-experts",
    title: "Super experts: the few that make massive activations and attention sinks",
    paper: "arXiv 2507.23279",
    year: 2025,
    kind: Kind::Analysis,
    needs: "a MoE model and texts",
    cost: "one forward pass over the texts; one more for each set of experts that is dropped",
    metrics: &[],
    run: "quorate super-experts\nquorate super-experts -o out/\nquorate prune --task bios --keep 16 --protect-file out/super_experts.json -o bios.toml",
    about: "Finds experts whose output has extreme values, in layers where the residual stream gets its massive activations, \
            and measures what the model loses without them: attention to the first token, perplexity, beside random \
            experts. What is found is a list for --protect-file.",
};

/// The percentile of all experts' outputs that one exceeds, unless told otherwise.
pub const PERCENTILE: f64 = 99.5;

/// How often one exceeds the median, unless told otherwise: our own guard, since a percentile finds someone in every model.
pub const GUARD: f64 = 50.0;

/// Parameters of super experts.
#[derive(Args, Clone, Debug, Serialize)]
pub struct SuperExperts {
    /// Texts of each task
    #[arg(long, default_value_t = 30, value_name = "N")]
    pub texts: usize,
    /// Take the first layers, this share of all, for those where massive activations form (the authors' code: 0.75)
    #[arg(long, value_name = "SHARE")]
    pub layer_fraction: Option<f64>,
    /// Percentile of all experts that a super expert exceeds
    #[arg(long, default_value_t = PERCENTILE, value_name = "P")]
    pub percentile: f64,
    /// How often the median expert's largest output a super expert exceeds
    #[arg(long, default_value_t = GUARD, value_name = "TIMES")]
    pub guard: f64,
    /// Random sets of experts to compare with
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub sets: usize,
}

/// One expert, routed or shared, with its peaks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Decoder layer.
    pub layer: usize,
    /// Routed expert; `None` for the layer's shared expert.
    pub expert: Option<usize>,
    /// What it read and wrote.
    pub peaks: Peaks,
}

impl Candidate {
    fn name(&self) -> String {
        self.expert.map_or_else(|| format!("{}:shared", self.layer), |e| format!("{}:{e}", self.layer))
    }
}

/// The values that an expert's output must exceed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Thresholds {
    /// Largest output of all experts.
    pub largest: f64,
    /// Median over the experts of each one's largest output.
    pub median: f64,
    /// The percentile over the experts.
    pub percentile: f64,
    /// All three: the percentile, a tenth of the largest, `guard` times the median.
    pub least: f64,
}

impl Thresholds {
    /// Of the largest output of each expert; `None` if there are none.
    pub fn of(outputs: &[f64], percentile: f64, guard: f64) -> Option<Thresholds> {
        let largest = quantile(outputs, 1.0)?;
        let median = quantile(outputs, 0.5)?;
        let percentile = quantile(outputs, percentile / 100.0)?;
        Some(Thresholds { largest, median, percentile, least: percentile.max(largest / 10.0).max(guard * median) })
    }
}

/// Layers after which massive activations are there that were not before: of the largest value of each channel of the
/// residual stream, `residual [1 + L][d]`, the largest grows more than tenfold, or the massive channel (the one with the
/// largest value anywhere) by more than half of its largest value.
pub fn massive_layers(residual: &[Vec<f32>]) -> Vec<usize> {
    let largest = |channels: &Vec<f32>| channels.iter().copied().fold(0.0, f32::max);
    let Some(channel) = massive_channel(residual) else { return Vec::new() };
    let most = residual.iter().map(|r| r[channel]).fold(0.0, f32::max);
    let forms = |l: &usize| {
        let (before, after) = (&residual[*l], &residual[l + 1]);
        largest(after) > 10.0 * largest(before) || after[channel] - before[channel] > 0.5 * most
    };
    (0..residual.len() - 1).filter(forms).collect()
}

/// The channel with the largest value anywhere.
fn massive_channel(residual: &[Vec<f32>]) -> Option<usize> {
    let all = residual.iter().flat_map(|r| r.iter().copied().enumerate());
    Some(all.max_by(|a, b| a.1.total_cmp(&b.1))?.0)
}

/// `1 - (1/H) sum_h p'[h] / p[h]`; heads that never look at the first token are left out, `None` if all are.
pub fn sink_decay(before: &[f64], after: &[f64]) -> Option<f64> {
    let heads = before.iter().zip(after).filter(|(p, _)| **p > 0.0);
    mean(&heads.map(|(p, q)| q / p).collect::<Vec<_>>()).map(|kept| 1.0 - kept)
}

/// What one set of dropped experts did.
struct Outcome {
    perplexity: Option<f64>,
    sinks: SinkRecorder,
}

impl Outcome {
    /// `D_sink` of each layer.
    fn decay(&self, base: &Outcome) -> Vec<Option<f64>> {
        base.sinks.attention().iter().zip(self.sinks.attention()).map(|(p, q)| sink_decay(p, &q)).collect()
    }
}

impl Run for SuperExperts {
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        let map = lab.experts()?;
        self.check()?;
        let texts = self.encoded(lab)?;
        let (mut peaks, mut sinks) = (PeakRecorder::new(lab.model.spec()), SinkRecorder::new(lab.model.spec()));
        let mut both = Chain(vec![&mut peaks, &mut sinks]);
        lab.observe("looking for extreme values", &texts, &mut both, |_, _| {})?;

        let ranked = ranked(&map, &peaks);
        let used: Vec<f64> = ranked.iter().map(|c| f64::from(c.peaks.output.value)).collect();
        let thresholds = Thresholds::of(&used, self.percentile, self.guard);
        let thresholds = thresholds
            .ok_or_else(|| MethodError::needs("the texts have no tokens", "give texts that are not empty"))?;
        let layers = self.massive_layers(lab.model.spec(), sinks.residual());
        let extreme: Vec<Candidate> =
            ranked.iter().copied().filter(|c| f64::from(c.peaks.output.value) > thresholds.least).collect();
        let (found, outliers): (Vec<Candidate>, Vec<Candidate>) =
            extreme.into_iter().partition(|c| layers.contains(&c.layer));

        let mut report = Report::default();
        headlines(&thresholds, &found, &outliers, &layers, &mut report);
        experts_table(lab, &ranked, &found, &outliers, &mut report)?;
        let most: Vec<f64> = peaks.routed().iter().map(|p| f64::from(p.output.value)).collect();
        report.map("output maximum", "largest magnitude that the expert wrote, before its gate", &map, &most, false);
        let list = serde_json::to_vec_pretty(&written(&found)).map_err(|e| MethodError::Outside(e.into()))?;
        report.file("super_experts.json", "the found experts, for --protect-file", list);
        let counts: Vec<u64> = peaks.routed().iter().map(|p| p.tokens).collect();
        self.validate(lab, &map, &counts, &found, &ranked, &layers, &mut report)?;
        Ok(report)
    }
}

impl SuperExperts {
    fn check(&self) -> Result<(), MethodError> {
        let bad = |what: String, help: &str| Err(MethodError::needs(what, help));
        match self.layer_fraction {
            Some(f) if !(0.0..=1.0).contains(&f) => bad(format!("--layer-fraction is {f}"), "a share is 0 to 1"),
            _ if !(0.0..=100.0).contains(&self.percentile) => {
                bad(format!("--percentile is {}", self.percentile), "a percentile is 0 to 100")
            }
            _ if self.guard.is_nan() || self.guard < 0.0 => bad(format!("--guard is {}", self.guard), "give 0 or more"),
            _ if self.texts == 0 => bad("--texts is 0".into(), "give at least 1 text of each task"),
            _ => Ok(()),
        }
    }

    fn encoded(&self, lab: &mut Lab<'_>) -> Result<Vec<EncodedItem>, MethodError> {
        let tasks = lab.tasks("test")?;
        let items: Vec<_> = tasks.into_iter().flat_map(|t| t.items.into_iter().take(self.texts)).collect();
        lab.encode(&items)
    }

    fn massive_layers(&self, spec: &ModelSpec, residual: &[Vec<f32>]) -> Vec<usize> {
        match self.layer_fraction {
            Some(share) => (0..(share * spec.layers.len() as f64).floor() as usize).collect(),
            None => massive_layers(residual),
        }
    }

    /// Drops the found experts (or, if none was found, the one with the largest output), then random ones.
    #[allow(clippy::too_many_arguments, reason = "what was found, from several angles")]
    fn validate(
        &self,
        lab: &mut Lab<'_>,
        map: &ExpertMap,
        counts: &[u64],
        found: &[Candidate],
        ranked: &[Candidate],
        layers: &[usize],
        report: &mut Report,
    ) -> Result<(), MethodError> {
        let texts = self.encoded(lab)?;
        let name = if found.is_empty() { "largest output" } else { "super experts" };
        let dropped = if found.is_empty() { &ranked[..ranked.len().min(1)] } else { found };
        let units: Vec<usize> = dropped.iter().filter_map(|c| map.unit(routed_id(c)?)).collect();
        let sets = matched_sets(map, counts, &units, 8, self.sets, lab.seed)?;

        let base = outcome(lab, "perplexity of the model", &texts, &[])?;
        let own = outcome(lab, "without the found experts", &texts, dropped)?;
        let mut random = Vec::with_capacity(sets.len());
        for (i, set) in sets.iter().enumerate() {
            lab.part = (i, sets.len());
            let of = |id: ExpertId| Candidate { layer: id.layer, expert: Some(id.expert), peaks: Peaks::default() };
            let set: Vec<Candidate> = map.ids(set).into_iter().map(of).collect();
            random.push(outcome(lab, "without random experts", &texts, &set)?);
        }
        lab.part = (0, 1);
        perplexities(name, dropped, &base, &own, &random, report);
        layers_table(layers, &base, &own, &random, report);
        if found.is_empty() {
            report.note("no super expert: what is dropped in the tables is the expert with the largest output");
        }
        report.note("random: as many experts of the same layers, with nearly the same use");
        Ok(())
    }
}

fn routed_id(candidate: &Candidate) -> Option<ExpertId> {
    Some(ExpertId { layer: candidate.layer, expert: candidate.expert? })
}

/// Every expert that saw a token, the largest output first.
fn ranked(map: &ExpertMap, peaks: &PeakRecorder) -> Vec<Candidate> {
    let routed = peaks.routed().iter().enumerate().map(|(unit, peaks)| {
        let id = map.id(unit);
        Candidate { layer: id.layer, expert: Some(id.expert), peaks: *peaks }
    });
    let shared = map.layers.iter().zip(peaks.shared());
    let shared = shared.filter_map(|(&layer, peaks)| Some(Candidate { layer, expert: None, peaks: *peaks? }));
    let mut all: Vec<Candidate> = routed.chain(shared).filter(|c| c.peaks.tokens > 0).collect();
    all.sort_by(|a, b| b.peaks.output.value.total_cmp(&a.peaks.output.value));
    all
}

/// Perplexity of the texts' answers, attention to the first token and residual stream, with experts dropped.
fn outcome(
    lab: &mut Lab<'_>,
    stage: &str,
    texts: &[EncodedItem],
    dropped: &[Candidate],
) -> Result<Outcome, MethodError> {
    let routed: Vec<ExpertId> = dropped.iter().filter_map(routed_id).collect();
    let shared = dropped.iter().filter(|c| c.expert.is_none()).map(|c| c.layer).collect();
    let mut drop = lab.prepare(&on_experts(&routed, Site::Routing, PhaseSelector::All, &Op::Drop))?;
    let (mut without, mut sinks) = (WithoutShared::new(shared), SinkRecorder::new(lab.model.spec()));
    let mut lens = Chain(vec![&mut drop, &mut without, &mut sinks]);
    let mut score = TaskScore::default();
    lab.losses(stage, texts, &mut lens)?.iter().for_each(|s| score.add(s));
    Ok(Outcome { perplexity: score.perplexity(), sinks })
}

/// The list for `--protect-file`. As in the authors' lists, expert -1 is the shared one.
fn written(found: &[Candidate]) -> Vec<Value> {
    let line = |(rank, c): (usize, &Candidate)| {
        let Peak { value, channel, position, token } = c.peaks.output;
        json!({
            "layer": c.layer, "expert": c.expert.map_or(json!(-1), |e| json!(e)), "rank": rank + 1, "output_max": value,
            "channel": channel, "position": position, "token": token, "input_max": c.peaks.input.value,
        })
    };
    found.iter().enumerate().map(line).collect()
}

fn headlines(
    thresholds: &Thresholds,
    found: &[Candidate],
    outliers: &[Candidate],
    layers: &[usize],
    report: &mut Report,
) {
    let names = |list: &[Candidate]| match list {
        [] => "none".to_string(),
        some => some.iter().map(Candidate::name).collect::<Vec<_>>().join(" "),
    };
    report.headline("super_experts", names(found));
    report.headline("outlier_experts", names(outliers));
    report.headline("massive_layers", layers);
    report.headline("largest_output", thresholds.largest);
    report.headline("percentile_output", thresholds.percentile);
    report.headline("largest_over_median", thresholds.largest / thresholds.median.max(f64::MIN_POSITIVE));
    report.headline("threshold", thresholds.least);
}

/// Experts in the table.
const SHOWN: usize = 10;

fn experts_table(
    lab: &Lab<'_>,
    ranked: &[Candidate],
    found: &[Candidate],
    outliers: &[Candidate],
    report: &mut Report,
) -> Result<(), MethodError> {
    let about = "largest outputs before the gate, where they were written, and largest input of the down projection";
    let columns = ["rank", "expert", "kind", "output", "channel", "position", "token", "input", "tokens"];
    let table = report.table("experts", about, &columns);
    for (rank, c) in ranked.iter().take(SHOWN.max(found.len())).enumerate() {
        let kind = match c {
            c if found.contains(c) => "super",
            c if outliers.contains(c) => "outlier",
            _ => "",
        };
        let Peak { value, channel, position, token } = c.peaks.output;
        let token = lab.model.tokenizer().decode(&[token], false).map_err(quorate_model::ModelError::from)?;
        let head = [json!(rank + 1), json!(c.name()), json!(kind), json!(value), json!(channel), json!(position)];
        let tail = [json!(format!("{token:?}")), json!(c.peaks.input.value), json!(c.peaks.tokens)];
        table.row([&head[..], &tail].concat());
    }
    Ok(())
}

fn perplexities(
    name: &str,
    dropped: &[Candidate],
    base: &Outcome,
    own: &Outcome,
    random: &[Outcome],
    report: &mut Report,
) {
    let randoms: Vec<f64> = random.iter().filter_map(|o| o.perplexity).collect();
    let dropped: Vec<String> = dropped.iter().map(Candidate::name).collect();
    let table =
        report.table("perplexity", "of the answers, with experts dropped", &["dropped", "experts", "perplexity"]);
    table.row([json!("nothing"), json!(""), json!(base.perplexity)]);
    table.row([json!(name), json!(dropped.join(" ")), json!(own.perplexity)]);
    table.row([json!("random, mean"), json!(""), json!(mean(&randoms))]);
    table.row([json!("random, worst"), json!(""), json!(quantile(&randoms, 1.0))]);
    report
        .headline("perplexity", json!({ "all": base.perplexity, "dropped": own.perplexity, "random": mean(&randoms) }));
}

fn layers_table(massive: &[usize], base: &Outcome, own: &Outcome, random: &[Outcome], report: &mut Report) {
    let Some(channel) = massive_channel(base.sinks.residual()) else { return };
    let (decay, randoms): (_, Vec<_>) = (own.decay(base), random.iter().map(|o| o.decay(base)).collect());
    let about = format!(
        "residual: largest magnitude in channel {channel} after the layer; sink: attention of later tokens to the first, mean \
         over heads; D_sink: share of it that is lost"
    );
    let columns =
        ["layer", "massive", "residual", "residual dropped", "sink", "sink dropped", "D_sink", "D_sink random"];
    let table = report.table("layers", &about, &columns);
    let (before, after) = (base.sinks.attention(), own.sinks.attention());
    for layer in 0..before.len() {
        let of_random = mean(&randoms.iter().filter_map(|d| d[layer]).collect::<Vec<_>>());
        let residual = [base, own].map(|o| json!(o.sinks.residual()[layer + 1][channel]));
        let massive = if massive.contains(&layer) { "yes" } else { "" };
        let sinks = [mean(&before[layer]), mean(&after[layer]), decay[layer], of_random].map(|v| json!(v));
        table.row([&[json!(layer), json!(massive)][..], &residual, &sinks].concat());
    }
    let over_layers = |d: &[Option<f64>]| mean(&d.iter().filter_map(|v| *v).collect::<Vec<_>>());
    let of_random = mean(&randoms.iter().filter_map(|d| over_layers(d)).collect::<Vec<_>>());
    report.headline("sink_decay", json!({ "dropped": over_layers(&decay), "random": of_random }));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 399 ordinary experts and one: all three thresholds by hand.
    #[test]
    fn relative_thresholds_always_find_something_and_the_guard_does_not() {
        let mut outputs: Vec<f64> = (0..399).map(|i| 1.0 + f64::from(i) / 399.0).collect();
        outputs.push(300.0);
        let with = Thresholds::of(&outputs, 99.5, 50.0).unwrap();
        assert_eq!(outputs.iter().filter(|a| **a > with.least).count(), 1);
        assert!((with.least - 50.0 * with.median).abs() < 1e-12 && with.median < 1.51, "{with:?}");
        outputs[399] = 2.0;
        let none = Thresholds::of(&outputs, 99.5, 50.0).unwrap();
        assert_eq!(outputs.iter().filter(|a| **a > none.least).count(), 0);
        let relative = Thresholds::of(&outputs, 99.5, 0.0).unwrap();
        assert_eq!(outputs.iter().filter(|a| **a > relative.least).count(), 2, "half a percent, whatever they are");
        assert!(Thresholds::of(&[], 99.5, 50.0).is_none());
    }

    #[test]
    fn massive_layers_by_hand() {
        // Channel 1 jumps in layer 1, stays, and is taken back in layer 3.
        let residual = [[1.0, 1.0], [2.0, 1.0], [2.0, 90.0], [3.0, 100.0], [3.0, 2.0]].map(Vec::from);
        assert_eq!(massive_layers(&residual), [1]);
        // Two steps of more than half each cannot be, but a tenfold jump of another channel counts too.
        let residual = [[0.1, 1.0], [0.1, 60.0], [700.0, 60.0]].map(Vec::from);
        assert_eq!(massive_layers(&residual), [0, 1]);
        assert!(massive_layers(&[[1.0, 1.0], [1.4, 1.2], [1.8, 1.5]].map(Vec::from)).is_empty());
    }

    #[test]
    fn decay_is_zero_without_change_and_one_without_attention() {
        assert_eq!(sink_decay(&[0.3, 0.7], &[0.3, 0.7]), Some(0.0));
        assert_eq!(sink_decay(&[0.3, 0.7], &[0.0, 0.0]), Some(1.0));
        assert_eq!(sink_decay(&[0.5, 0.0], &[0.25, 0.1]), Some(0.5), "a head without sink says nothing");
        assert_eq!(sink_decay(&[0.0], &[0.1]), None);
    }
}
