//! Pathways over pretraining: how alike the routes of different texts are, and how smooth each one is, from routing alone.
//!
//! *What it measures*, on texts of the training data, for each checkpoint:
//! - the *pathway* of a text: in each MoE layer the fewest experts that hold 0.7 of the mean routing weight of its tokens, the
//!   heaviest first;
//! - `D`: mean Levenshtein distance of pathways over pairs of texts, drawn with the seed, the same pairs for every checkpoint;
//! - `C = 1 - mean_l c[l] / max_l c[l]`, `c[l] = cos(e[l], e[l+1])`, `e[l] = sum_i w[l][i] v[l][i]` of router rows `v`; low is smooth.
//!
//! With several checkpoints, their correlation with accuracy and loss.
//! *Control.* The same pathways with each text's experts renumbered at random in every layer: what `D` is between texts that
//! share nothing but the number of experts; and `D` of pairs of one task.
//! *Agreement with the paper.* One edit is an expert; the paper's is a character of the experts' numbers, so that experts of two
//! digits weigh more (`--unit char`; both are in the tables). Routers that take sigmoids are normalised, not given a softmax. The
//! paper's table correlates consistency with accuracy, that is `1 - C`; here `C` itself. It measures accuracy after tuning each
//! checkpoint on instructions; here it is the checkpoint's own. `--memorised` takes only texts with a low loss in all
//! checkpoints; the paper groups texts by when they were memorised, which is not done here.
//! *Limits.* `C` compares router rows of different layers, as if these had one basis. A correlation takes three checkpoints.
//! *Reference.* arXiv 2506.21551.

use std::path::PathBuf;

use clap::Args;
use quorate_eval::encode::{EncodedItem, is_language_modelling};
use quorate_eval::evaluate::{ItemScore, TaskScore};
use quorate_eval::statistics::{mean, pearson, spearman};
use quorate_eval::tasks::TaskItem;
use quorate_lens::ExpertMap;
use quorate_model::sampling::SplitMix64;
use quorate_model::{Model, NoLens};
use serde::Serialize;
use serde_json::{Value, json};

use super::Rows;
use super::pathway::{Unit, WeightRecorder, consistency, cosines, distance, pathway, text};
use crate::{Card, Kind, Lab, MethodError, Report, Run};

/// The card of pathways.
pub const CARD: Card = Card {
    id: "pathways",
    title: "Pathways over pretraining: edit distance and consistency of routes",
    paper: "arXiv 2506.21551",
    year: 2025,
    kind: Kind::Analysis,
    needs: "a MoE model and texts of its training data; best several checkpoints",
    cost: "two forward passes over the texts for each checkpoint, and answering the test items",
    metrics: &[],
    run: "quorate pathways\nquorate pathways --unit char\nquorate pathways -m step-9000 --checkpoints step-1000 step-3000 --tasks texts/ -o out/",
    about: "How far the routes of two training texts are apart (edit distance over experts) and how smoothly one goes from \
            layer to layer, for one or several checkpoints; with accuracy and loss, and their correlation. Beside the same \
            routes with experts renumbered at random.",
};

/// Parameters of pathways.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Pathways {
    /// Other checkpoints of the model, oldest first; the model itself comes last
    #[arg(long, value_name = "MODEL", num_args = 1..)]
    pub checkpoints: Vec<PathBuf>,
    /// What one edit changes
    #[arg(long, value_enum, default_value_t = Unit::Expert)]
    pub unit: Unit,
    /// Share of a layer's routing weight that a pathway's experts hold
    #[arg(long, default_value_t = 0.7, value_name = "SHARE")]
    pub mass: f64,
    /// Pairs of texts, and as many of one task
    #[arg(long, default_value_t = 1000, value_name = "N")]
    pub pairs: usize,
    /// Texts of each task
    #[arg(long, default_value_t = 50, value_name = "N")]
    pub texts: usize,
    /// Which tokens count
    #[arg(long, value_enum, default_value_t = Rows::All)]
    pub rows: Rows,
    /// Only texts whose loss per token of the answer is at most this in every checkpoint, in nats
    #[arg(long, value_name = "NATS")]
    pub memorised: Option<f64>,
    /// Test items of each task on which accuracy is measured (0: none)
    #[arg(long, default_value_t = 10, value_name = "N")]
    pub items: usize,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 96, value_name = "N")]
    pub max_tokens: usize,
}

/// Fewest texts from which a distance is told.
const TEXTS_MIN: usize = 5;

/// What is known of the texts in one checkpoint.
struct Checkpoint {
    name: String,
    /// `[text][MoE layer][expert]`
    weights: Vec<Vec<Vec<f64>>>,
    /// Cosines between layers, `[text][MoE layers - 1]`.
    cosines: Vec<Vec<f64>>,
    /// Nats per token of the answer, `[text]`.
    losses: Vec<f64>,
    /// Percent of the test questions.
    accuracy: Option<f64>,
}

/// Pairs of texts: of any two, and of one task.
struct Pairs {
    any: Vec<(usize, usize)>,
    same: Vec<(usize, usize)>,
}

/// The numbers of one checkpoint.
struct Numbers {
    d: Option<f64>,
    d_same: Option<f64>,
    d_random: Option<f64>,
    d_other_unit: Option<f64>,
    c: Option<f64>,
    c_undefined: usize,
    /// Experts of a pathway.
    length: Option<f64>,
    loss: Option<f64>,
    layers: Vec<[Option<f64>; 3]>,
}

impl Run for Pathways {
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        let map = lab.experts()?;
        self.check()?;
        let take = |tasks: Vec<quorate_eval::tasks::Task>, n: usize| -> Vec<TaskItem> {
            tasks.into_iter().flat_map(|t| t.items.into_iter().take(n)).collect()
        };
        let texts = take(lab.tasks("train-sample")?, self.texts);
        let questions = take(lab.tasks("test")?, self.items);
        let encoded = lab.encode(&texts)?;
        let mut checkpoints = Vec::with_capacity(self.checkpoints.len() + 1);
        for (i, path) in self.checkpoints.iter().enumerate() {
            lab.part = (i, self.checkpoints.len() + 1);
            let other = lab.world().open_model(path)?;
            same_shape(&lab.model, &other, path)?;
            let own = std::mem::replace(&mut lab.model, other);
            let found = self.measure(lab, &path.display().to_string(), &texts, &encoded, &questions);
            lab.model = own;
            checkpoints.push(found?);
        }
        lab.part = (self.checkpoints.len(), self.checkpoints.len() + 1);
        checkpoints.push(self.measure(lab, "model", &texts, &encoded, &questions)?);
        lab.part = (0, 1);

        let kept = self.kept(&checkpoints)?;
        let tasks: Vec<&str> = kept.iter().map(|&t| texts[t].task.as_str()).collect();
        let pairs = Pairs::draw(&tasks, self.pairs, lab.seed);
        let numbers: Vec<Numbers> =
            checkpoints.iter().map(|c| self.numbers(&map, &c.of(&kept), &pairs, lab.seed)).collect();
        self.report(&map, &checkpoints, &kept, &texts, &numbers)
    }
}

/// Checkpoints of one model have the same layers and experts.
fn same_shape(own: &Model, other: &Model, path: &std::path::Path) -> Result<(), MethodError> {
    let (a, b) = (ExpertMap::of(own.spec()), ExpertMap::of(other.spec()));
    if a == b {
        return Ok(());
    }
    let what = format!("{} has other layers or experts", path.display());
    Err(MethodError::needs(what, "give checkpoints of one model"))
}

impl Checkpoint {
    /// With these texts only.
    fn of(&self, texts: &[usize]) -> Checkpoint {
        Checkpoint {
            name: self.name.clone(),
            weights: texts.iter().map(|&t| self.weights[t].clone()).collect(),
            cosines: texts.iter().map(|&t| self.cosines[t].clone()).collect(),
            losses: texts.iter().map(|&t| self.losses[t]).collect(),
            accuracy: self.accuracy,
        }
    }
}

impl Pairs {
    /// Pairs of different texts; `tasks` names the task of each.
    fn draw(tasks: &[&str], count: usize, seed: u64) -> Pairs {
        let mut random = SplitMix64::new(seed);
        let mut pair = |group: &[usize]| {
            let (i, j) = (random.below(group.len()), random.below(group.len() - 1));
            (group[i], group[if j >= i { j + 1 } else { j }])
        };
        let all: Vec<usize> = (0..tasks.len()).collect();
        let mates = |t: usize| all.iter().copied().filter(|&o| tasks[o] == tasks[t]).collect::<Vec<_>>();
        let groups: Vec<Vec<usize>> = all.iter().map(|&t| mates(t)).filter(|g| g.len() > 1).collect();
        let any = (0..count).map(|_| pair(&all)).collect();
        let same =
            if groups.is_empty() { Vec::new() } else { (0..count).map(|i| pair(&groups[i % groups.len()])).collect() };
        Pairs { any, same }
    }
}

impl Pathways {
    fn check(&self) -> Result<(), MethodError> {
        if !(self.mass > 0.0 && self.mass <= 1.0) {
            return Err(MethodError::needs(format!("--mass is {}", self.mass), "a share is above 0 and at most 1"));
        }
        if self.pairs == 0 {
            return Err(MethodError::needs("--pairs is 0", "give at least 1 pair"));
        }
        Ok(())
    }

    /// Routing, losses and accuracy of the model in the lab.
    fn measure(
        &self,
        lab: &mut Lab<'_>,
        name: &str,
        texts: &[TaskItem],
        encoded: &[EncodedItem],
        questions: &[TaskItem],
    ) -> Result<Checkpoint, MethodError> {
        if lab.encode(texts)? != encoded {
            let what = format!("{name} has other tokens for the same texts");
            return Err(MethodError::needs(what, "give checkpoints of one model"));
        }
        let mut recorder = WeightRecorder::new(lab.model.spec(), self.rows, encoded.len());
        lab.observe("recording the routing", encoded, &mut recorder, |r, first| r.begin(first))?;
        let weights = recorder.weights().into_iter().collect::<Option<Vec<_>>>();
        let weights = weights.ok_or_else(|| {
            MethodError::needs("a text has no token that counts", "give texts with the --rows wanted, or --rows all")
        })?;
        let layers = lab.model.spec().moe_layers();
        let routers = layers.iter().map(|&l| Ok(lab.model.router_weight(l)?.to_f32()));
        let routers = routers.collect::<Result<Vec<_>, MethodError>>()?;
        let per_token = |s: ItemScore| match s {
            ItemScore::Text { nll, tokens, .. } => nll / tokens.max(1) as f64,
            ItemScore::Exact { .. } => f64::NAN,
        };
        let losses = lab.losses("measuring the loss", encoded, &mut NoLens)?.into_iter().map(per_token).collect();
        let questions: Vec<&TaskItem> = questions.iter().filter(|i| !is_language_modelling(i)).collect();
        let mut score = TaskScore::default();
        lab.answer("answering the test items", &questions, self.max_tokens, &mut NoLens)?
            .iter()
            .for_each(|s| score.add(s));
        let cosines = weights.iter().map(|w| cosines(w, &routers)).collect();
        Ok(Checkpoint { name: name.to_string(), weights, cosines, losses, accuracy: score.exact_match() })
    }

    /// The texts that count: all, or those memorised in every checkpoint.
    fn kept(&self, checkpoints: &[Checkpoint]) -> Result<Vec<usize>, MethodError> {
        let low = |t: &usize| self.memorised.is_none_or(|most| checkpoints.iter().all(|c| c.losses[*t] <= most));
        let kept: Vec<usize> = (0..checkpoints[0].losses.len()).filter(low).collect();
        if kept.len() < TEXTS_MIN {
            let what = format!("{} texts are left, {TEXTS_MIN} are needed", kept.len());
            return Err(MethodError::needs(what, "give more texts, or a larger --memorised"));
        }
        Ok(kept)
    }

    fn numbers(&self, map: &ExpertMap, checkpoint: &Checkpoint, pairs: &Pairs, seed: u64) -> Numbers {
        let of = |weights: &[Vec<Vec<f64>>]| -> Vec<Vec<Vec<usize>>> {
            weights.iter().map(|w| pathway(w, self.mass)).collect()
        };
        let routes = of(&checkpoint.weights);
        let random = of(&renumbered(&checkpoint.weights, seed));
        let other = if self.unit == Unit::Expert { Unit::Char } else { Unit::Expert };
        let over = |routes: &[Vec<Vec<usize>>], pairs: &[(usize, usize)], unit| {
            mean(&pairs.iter().map(|&(i, j)| distance(&routes[i], &routes[j], unit) as f64).collect::<Vec<_>>())
        };
        let layer = |moe: usize| {
            let of_layer = |routes: &[Vec<Vec<usize>>]| {
                let one = routes.iter().map(|r| vec![r[moe].clone()]).collect::<Vec<_>>();
                over(&one, &pairs.any, self.unit)
            };
            let cosine: Vec<f64> = checkpoint.cosines.iter().filter_map(|c| c.get(moe).copied()).collect();
            [of_layer(&routes), of_layer(&random), mean(&cosine)]
        };
        let c: Vec<f64> = checkpoint.cosines.iter().filter_map(|c| consistency(c)).collect();
        let lengths: Vec<f64> = routes.iter().map(|r| r.iter().map(Vec::len).sum::<usize>() as f64).collect();
        Numbers {
            d: over(&routes, &pairs.any, self.unit),
            d_same: over(&routes, &pairs.same, self.unit),
            d_random: over(&random, &pairs.any, self.unit),
            d_other_unit: over(&routes, &pairs.any, other),
            c_undefined: checkpoint.cosines.len() - c.len(),
            c: mean(&c),
            length: mean(&lengths),
            loss: mean(&checkpoint.losses),
            layers: (0..map.n_layers()).map(layer).collect(),
        }
    }

    fn report(
        &self,
        map: &ExpertMap,
        checkpoints: &[Checkpoint],
        kept: &[usize],
        texts: &[TaskItem],
        numbers: &[Numbers],
    ) -> Result<Report, MethodError> {
        let mut report = Report::default();
        let Some((last, checkpoint)) = numbers.last().zip(checkpoints.last()) else { return Ok(report) };
        report.headline("texts", kept.len());
        report.headline("distance", json!({ "any": last.d, "same_task": last.d_same, "random": last.d_random }));
        report.headline("consistency_c", last.c);
        report.headline("experts_of_a_pathway", last.length);
        checkpoints_table(self.unit, checkpoints, numbers, &mut report);
        let about =
            "mean distance in each layer, of the last checkpoint; cosine of routing embeddings with the next layer";
        let table = report.table("layers", about, &["layer", "D", "D random", "cosine"]);
        for (layer, row) in map.layers.iter().zip(&last.layers) {
            table.row([&[json!(layer)][..], &row.map(|v| json!(v))].concat());
        }
        correlations(checkpoints, numbers, &mut report);
        let undefined: usize = numbers.iter().map(|n| n.c_undefined).sum();
        if undefined > 0 {
            report.note(format!(
                "C is left out for {undefined} texts: no layer's routing goes along with the next one's"
            ));
        }
        report.note("random: each text's experts renumbered at random in every layer");
        let line = |&t: &usize| {
            let route = pathway(&checkpoint.weights[t], self.mass);
            json!({ "task": texts[t].task, "loss": checkpoint.losses[t], "pathway": text(&route) }).to_string() + "\n"
        };
        let lines: String = kept.iter().map(line).collect();
        report.file("pathways.jsonl", "the pathway of each text in the last checkpoint", lines);
        Ok(report)
    }
}

/// Each text's experts renumbered at random in every layer.
fn renumbered(weights: &[Vec<Vec<f64>>], seed: u64) -> Vec<Vec<Vec<f64>>> {
    let mut random = SplitMix64::new(seed);
    let mut all = weights.to_vec();
    all.iter_mut().flatten().for_each(|layer| random.shuffle(layer));
    all
}

fn checkpoints_table(unit: Unit, checkpoints: &[Checkpoint], numbers: &[Numbers], report: &mut Report) {
    let other = if unit == Unit::Expert { "D by character" } else { "D by expert" };
    let columns = ["checkpoint", "loss", "accuracy", "D", "D same task", "D random", other, "C", "experts"];
    let about = "D: edit distance of two texts' pathways; C: low is smooth; loss in nats per token of the answers; accuracy in \
                 percent of the test questions";
    let table = report.table("checkpoints", about, &columns);
    for (c, n) in checkpoints.iter().zip(numbers) {
        let cells = [n.loss, c.accuracy, n.d, n.d_same, n.d_random, n.d_other_unit, n.c, n.length].map(|v| json!(v));
        table.row([&[json!(c.name)][..], &cells].concat());
    }
}

/// Fewest checkpoints of a correlation: two are always in line.
const CHECKPOINTS_MIN: usize = 3;

fn correlations(checkpoints: &[Checkpoint], numbers: &[Numbers], report: &mut Report) {
    if checkpoints.len() < CHECKPOINTS_MIN {
        report.note(format!("no correlations: they take {CHECKPOINTS_MIN} checkpoints; help: give --checkpoints"));
        return;
    }
    let accuracy: Option<Vec<f64>> = checkpoints.iter().map(|c| c.accuracy).collect();
    let of = |f: &dyn Fn(&Numbers) -> Option<f64>| numbers.iter().map(f).collect::<Option<Vec<f64>>>();
    let metrics = [("D", of(&|n| n.d)), ("C", of(&|n| n.c)), ("loss", of(&|n| n.loss))];
    let about = "over the checkpoints; a number is missing where one of the two does not vary";
    let table = report.table("correlations", about, &["of", "with", "Pearson", "Spearman"]);
    let against = [("accuracy", accuracy), ("loss", metrics[2].1.clone())];
    let mut rows: Vec<[Value; 4]> = Vec::new();
    for (name, values) in &metrics {
        for (with, others) in against.iter().filter(|(with, _)| with != name) {
            let both = values.as_ref().zip(others.as_ref());
            let (p, s) = both.map_or((None, None), |(x, y)| (pearson(x, y), spearman(x, y)));
            rows.push([json!(name), json!(with), json!(p), json!(s)]);
        }
    }
    rows.into_iter().for_each(|row| table.row(row));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_of_two_texts_and_of_one_task() {
        let tasks = ["a", "b", "a", "b", "c", "a"];
        let pairs = Pairs::draw(&tasks, 200, 1);
        assert!(pairs.any.iter().all(|(i, j)| i != j) && pairs.any.len() == 200);
        assert!(pairs.same.iter().all(|&(i, j)| i != j && tasks[i] == tasks[j]));
        assert_eq!(pairs.any, Pairs::draw(&tasks, 200, 1).any);
        assert_ne!(pairs.any, Pairs::draw(&tasks, 200, 2).any);
        assert!(Pairs::draw(&["a", "b"], 3, 0).same.is_empty());
    }
}
