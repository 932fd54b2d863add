//! Rerouting: vectors on the router logits, fitted while a text is generated to what there is of it.
//!
//! *What it changes.* Each MoE layer `l` has a vector `delta_l [E]`, zero at the start of every text; `s_l(x) + delta_l` takes
//! the place of the router logits `s_l(x)` for all tokens. Before the first token and after every `m` generated ones, `n`
//! steps of Adam lower the mean next-token loss of the text so far (prompt and own output, all positions), from where the
//! vectors are. The choice of experts is a constant of each step and is made anew in the next.
//! *Layers.* By routing uncertainty `C_l = -(1/k) sum_j log p_lj` over the chosen experts, averaged over tokens: the share of
//! layers with the highest (what the formula does; the paper calls it confidence), with the lowest, or all.
//! *Agreement with the paper.* The optimiser and the learning rate are not known: Adam, 0.01, begun anew with each fit. `soft`
//! weighs each layer's learning rate, not its gradient, of which Adam would take the weight away again.
//! *Limits.* Under a softmax over all experts one that is not chosen feels only that all others' gates shrink when it grows;
//! under the other routers it feels nothing. A fit holds the activations of the whole text.
//! *Reference.* arXiv 2510.14853.

mod fit;

use clap::Args;
use quorate_eval::answer::exact_match;
use quorate_eval::encode::{EncodedItem, is_language_modelling};
use quorate_eval::evaluate::{ItemScore, teacher_forced};
use quorate_eval::statistics::mean;
use quorate_eval::tasks::Task;
use quorate_lens::ExpertMap;
use quorate_model::{GenerateOptions, Lens, Model, ModelError, NoLens};
use serde::Serialize;
use serde_json::{Value, json};

pub use fit::{By, Fit, FitOptions, Rerouter, Rerouting, Shift, Vectors};

use super::controls;
use crate::{Card, Kind, Lab, MethodError, Report, Run};

/// The card of rerouting.
pub const CARD: Card = Card {
    id: "rerouting",
    title: "Rewiring Experts on the Fly: router logits fitted to the text so far",
    paper: "arXiv 2510.14853",
    year: 2025,
    kind: Kind::Steer,
    needs: "a MoE model; any text",
    cost: "for each fit, as many forward and backward passes over the text so far as it has steps",
    metrics: &[],
    run: "quorate run \"78+95=\" --reroute\nquorate rerouting\nquorate rerouting --damage 2 --shots 4 --fit-steps 40 --fit-rate 0.2 --fit-share 1 --task prose",
    about: "Fits a vector on every router's logits to a prompt, or to examples before it, and measures what becomes of its loss \
            and of that of the unseen continuation, beside random vectors of the same norms; with --damage, how much of a planted damage \
            to the routers is undone. Nothing is kept from one text to the next.",
};

/// Parameters of rerouting.
#[derive(Args, Clone, Debug, Serialize)]
pub struct RerouteTasks {
    #[command(flatten)]
    #[serde(flatten)]
    options: FitOptions,
    /// Only this task; left out, all
    #[arg(long)]
    pub task: Option<String>,
    /// Texts per task
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub texts: usize,
    /// Examples of the training split to fit to, before each text (0: fit to its own prompt)
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub shots: usize,
    /// Standard deviation of a random vector added to each router's logits beforehand
    #[arg(long, default_value_t = 0.0, value_name = "STD")]
    pub damage: f64,
    /// Most tokens of an answer (0: no answers)
    #[arg(long, default_value_t = 48, value_name = "N")]
    pub max_tokens: usize,
}

/// What vectors are fitted to, and what follows it.
struct Sample {
    context: Vec<u32>,
    text: EncodedItem,
    /// The wanted answer; `None` of plain text.
    answer: Option<String>,
}

/// Mean losses of a token, in nats.
#[derive(Clone, Copy, Debug, Default)]
struct Losses {
    context: f64,
    continuation: f64,
}

/// What one text showed.
struct Outcome {
    whole: Losses,
    plain: Losses,
    fitted: Losses,
    random: Losses,
    fit: Fit,
    /// Whether the answer was right without and with rerouting.
    right: Option<[bool; 2]>,
}

impl Run for RerouteTasks {
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        let map = lab.experts()?;
        if !(self.damage >= 0.0 && self.damage.is_finite()) {
            let what = format!("{} is no standard deviation", self.damage);
            return Err(MethodError::needs(what, "give a --damage of 0 or more"));
        }
        let samples = self.samples(lab)?;
        let damage = gaussian(lab.seed, &map, self.damage);
        let mut outcomes = Vec::with_capacity(samples.len());
        for (i, (_, sample)) in samples.iter().enumerate() {
            lab.progress("rerouting", i, samples.len())?;
            let seed = lab.seed.wrapping_add(1 + i as u64);
            outcomes.push(self.measure(&lab.model, sample, &damage, seed)?);
        }
        lab.progress("rerouting", samples.len(), samples.len())?;
        let names: Vec<&str> = samples.iter().map(|(name, _)| name.as_str()).collect();
        Ok(self.report(&map, &names, &outcomes))
    }
}

impl RerouteTasks {
    fn samples(&self, lab: &mut Lab<'_>) -> Result<Vec<(String, Sample)>, MethodError> {
        let named = |tasks: Vec<Task>| match &self.task {
            Some(name) => tasks.into_iter().filter(|t| t.name == *name).collect(),
            None => tasks,
        };
        // An unknown name is an error that lists the known ones.
        if let Some(name) = &self.task {
            lab.task("test", name)?;
        }
        let tests = named(lab.tasks("test")?);
        let mut samples = Vec::new();
        for task in tests {
            let examples = if self.shots > 0 { lab.task("train-sample", &task.name)?.items } else { Vec::new() };
            if self.shots > 0 && examples.is_empty() {
                let what = format!("task `{}` has no training items to take examples from", task.name);
                return Err(MethodError::needs(what, "give items of the split `train-sample`, or --shots 0"));
            }
            let examples = lab.encode(&examples)?;
            let items: Vec<_> = task.items.into_iter().take(self.texts).collect();
            for (i, (item, mut text)) in items.iter().zip(lab.encode(&items)?).enumerate() {
                let shots = examples.iter().cycle().skip(i * self.shots).take(self.shots.min(examples.len()));
                let mut context = context_of(&lab.model, shots, text.len());
                if self.shots == 0 {
                    std::mem::swap(&mut context, &mut text.prompt);
                }
                let answer = (!is_language_modelling(item)).then(|| item.answer.clone());
                samples.push((task.name.clone(), Sample { context, text, answer }));
            }
        }
        if samples.is_empty() {
            return Err(MethodError::needs("there are no test items", "give task files with --tasks"));
        }
        Ok(samples)
    }

    fn measure(&self, model: &Model, sample: &Sample, damage: &Vectors, seed: u64) -> Result<Outcome, MethodError> {
        let new = || Ok::<_, MethodError>(Rerouting::new(model.spec(), &self.options)?.damaged(damage.clone()));
        let mut rerouting = new()?;
        let plain = losses(model, sample, &mut rerouting.lens()?)?;
        let fit = rerouting.fit(model, &sample.context)?;
        let fitted = losses(model, sample, &mut rerouting.lens()?)?;
        let chance = fit::sum(&of_norms(seed, &ExpertMap::of(model.spec()), &fit.norms), damage);
        let random = losses(model, sample, &mut Shift::new(&chance)?)?;
        let whole = if damage.is_empty() { plain } else { losses(model, sample, &mut NoLens)? };
        let right = match &sample.answer {
            Some(answer) if self.max_tokens > 0 => {
                let still = FitOptions { fit_steps: 0, ..self.options.clone() };
                let still = Rerouting::new(model.spec(), &still)?.damaged(damage.clone());
                let texts = [self.answer(model, sample, still)?, self.answer(model, sample, new()?)?];
                Some(texts.map(|text| exact_match(&text, answer)))
            }
            _ => None,
        };
        Ok(Outcome { whole, plain, fitted, random, fit, right })
    }

    /// The greedy answer, refitted on the way.
    fn answer(&self, model: &Model, sample: &Sample, rerouting: Rerouting) -> Result<String, ModelError> {
        let prompt = [sample.context.as_slice(), &sample.text.prompt].concat();
        let options = GenerateOptions { max_tokens: self.max_tokens, keep_special: true, ..GenerateOptions::default() };
        let mut cache = model.new_cache(1);
        let mut rerouter = Rerouter::new(model, rerouting)?;
        Ok(model.generate_guided(&prompt, 0, &mut cache, &options, &mut rerouter, &mut |_| true)?.text)
    }

    fn report(&self, map: &ExpertMap, names: &[&str], outcomes: &[Outcome]) -> Report {
        let mut report = Report::default();
        let all: Vec<&Outcome> = outcomes.iter().collect();
        let total = Means::of(&all);
        report.headline("texts", all.len());
        report.headline("context_loss", total.json(|l| l.context, self.damage > 0.0));
        report.headline("continuation_loss", total.json(|l| l.continuation, self.damage > 0.0));
        if self.damage > 0.0 {
            report.headline("recovered_of_context_loss", total.recovered(|l| l.context));
            report.headline("recovered_of_continuation_loss", total.recovered(|l| l.continuation));
        }
        report.headline("rerouted_share", mean(&all.iter().map(|o| o.fit.rerouted).collect::<Vec<_>>()));
        if let Some(right) = right(&all) {
            report.headline("exact_match", json!({ "plain": right[0], "rerouted": right[1] }));
        }
        let about = "mean loss of a token of the unseen continuation, in nats; exact match in percent";
        let columns =
            ["task", "plain", "fitted", "random", "context before", "context after", "right", "rerouted right"];
        let table = report.table("tasks", about, &columns);
        let mut tasks = names.to_vec();
        tasks.dedup();
        for task in tasks {
            let of: Vec<&Outcome> = all.iter().zip(names).filter(|(_, n)| **n == task).map(|(o, _)| *o).collect();
            let m = Means::of(&of);
            let right = right(&of).map_or([Value::Null, Value::Null], |r| r.map(|r| json!(r)));
            let [plain, rerouted] = right;
            let losses = [m.plain.continuation, m.fitted.continuation, m.random.continuation];
            let [a, b, c] = losses.map(|l| json!(l));
            table.row([json!(task), a, b, c, json!(m.plain.context), json!(m.fitted.context), plain, rerouted]);
        }
        let about =
            "means over the texts: routing uncertainty, share of fits that changed the layer, norm of its vector";
        let table = report.table("layers", about, &["layer", "uncertainty", "fitted", "norm"]);
        for (moe, layer) in map.layers.iter().enumerate() {
            let over = |f: &dyn Fn(&Fit) -> f64| mean(&all.iter().map(|o| f(&o.fit)).collect::<Vec<_>>());
            let fitted = over(&|f| f64::from(u8::from(f.weights[moe] > 0.0)));
            let (c, norm) = (over(&|f| f.uncertainty[moe]), over(&|f| f.norms[moe]));
            table.row([json!(layer), json!(c), json!(fitted), json!(norm)]);
        }
        report
    }
}

/// Means over texts.
struct Means {
    whole: Losses,
    plain: Losses,
    fitted: Losses,
    random: Losses,
}

impl Means {
    fn of(outcomes: &[&Outcome]) -> Means {
        let over = |of: fn(&Outcome) -> Losses| {
            let n = outcomes.len().max(1) as f64;
            let sum = |f: fn(&Losses) -> f64| outcomes.iter().map(|o| f(&of(o))).sum::<f64>() / n;
            Losses { context: sum(|l| l.context), continuation: sum(|l| l.continuation) }
        };
        Means {
            whole: over(|o| o.whole),
            plain: over(|o| o.plain),
            fitted: over(|o| o.fitted),
            random: over(|o| o.random),
        }
    }

    fn json(&self, of: fn(&Losses) -> f64, damaged: bool) -> Value {
        let mut value = json!({ "plain": of(&self.plain), "fitted": of(&self.fitted), "random": of(&self.random) });
        if damaged {
            value["undamaged"] = json!(of(&self.whole));
        }
        value
    }

    /// Shares of the damage that the fit and random vectors undid; null if the loss rose by less than a hundredth.
    fn recovered(&self, of: fn(&Losses) -> f64) -> Value {
        if of(&self.plain) < 1.01 * of(&self.whole) {
            return Value::Null;
        }
        let share = |to: &Losses| (of(&self.plain) - of(to)) / (of(&self.plain) - of(&self.whole));
        json!({ "fitted": share(&self.fitted), "random": share(&self.random) })
    }
}

/// Percent of right answers without and with rerouting.
fn right(outcomes: &[&Outcome]) -> Option<[f64; 2]> {
    let right: Vec<[bool; 2]> = outcomes.iter().filter_map(|o| o.right).collect();
    let percent = |i: usize| 100.0 * right.iter().filter(|r| r[i]).count() as f64 / right.len() as f64;
    (!right.is_empty()).then(|| [percent(0), percent(1)])
}

/// Examples one after the other, each ended as the model ends an answer; fewer if the context is too small for all.
fn context_of<'a>(model: &Model, shots: impl Iterator<Item = &'a EncodedItem>, beside: usize) -> Vec<u32> {
    let room = model.spec().max_position_embeddings.saturating_sub(beside);
    let mut context = Vec::new();
    for shot in shots {
        let end = model.spec().eos_token_ids.first();
        let tokens = [&shot.prompt[..], &shot.answer, end.map_or(&[], std::slice::from_ref)].concat();
        if !context.is_empty() && context.len() + tokens.len() > room {
            break;
        }
        context.extend(tokens);
    }
    context.truncate(room);
    context
}

/// Losses of the examples, and of the answer after them.
fn losses(model: &Model, sample: &Sample, lens: &mut dyn Lens) -> Result<Losses, MethodError> {
    let (first, rest) = sample.context.split_at(1.min(sample.context.len()));
    let prompt = [sample.context.as_slice(), &sample.text.prompt].concat();
    let items = [
        EncodedItem { prompt: first.to_vec(), answer: rest.to_vec() },
        EncodedItem { prompt, answer: sample.text.answer.clone() },
    ];
    let scores = teacher_forced(model, &items, lens)?;
    let mean = |score: &ItemScore| match score {
        ItemScore::Text { nll, tokens, .. } => nll / (*tokens).max(1) as f64,
        ItemScore::Exact { .. } => f64::NAN,
    };
    Ok(Losses { context: mean(&scores[0]), continuation: mean(&scores[1]) })
}

/// Normal numbers of a standard deviation for every expert (Box and Muller); none at all if it is 0.
pub fn gaussian(seed: u64, map: &ExpertMap, std: f64) -> Vectors {
    if std == 0.0 {
        return Vectors::new();
    }
    let draw = |i: u64| controls::random(seed.wrapping_mul(2).wrapping_add(i) ^ 0x5eed_0000_0000, map);
    let normal = |(u, v): (f64, f64)| (std * (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32;
    let values: Vec<f32> = draw(0).into_iter().zip(draw(1)).map(normal).collect();
    map.layers.iter().enumerate().map(|(moe, &layer)| (layer, values[map.range(moe)].to_vec())).collect()
}

/// Random vectors of these norms.
fn of_norms(seed: u64, map: &ExpertMap, norms: &[f64]) -> Vectors {
    let mut vectors = gaussian(seed ^ 0xc0_ffee, map, 1.0);
    for (vector, norm) in vectors.values_mut().zip(norms) {
        let own = vector.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        vector.iter_mut().for_each(|v| *v = (f64::from(*v) * norm / own) as f32);
    }
    vectors
}
