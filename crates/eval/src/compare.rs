//! How well tasks are answered with few experts, over sources of the experts, metrics, scopes, routing modes and numbers
//! kept.

use std::collections::BTreeMap;

use quorate_lens::{Choice, GENERALIST, Keep, KeyMetric, LensError, Library, Plan, Scope, retrieve};
use quorate_model::{Model, NoLens, RoutingMode};
use serde::{Deserialize, Serialize};

use crate::encode::encode_text;
use crate::evaluate::{EvalOptions, TaskScore, evaluate};
use crate::tasks::{Task, TaskItem};

/// Where the experts come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// All experts.
    All,
    /// The task's own pattern.
    Own,
    /// The pattern retrieved for each prompt.
    Auto,
    /// The mean over three other tasks' patterns.
    Other,
    /// The generalist pattern.
    Generalist,
    /// Random experts.
    Random,
}

impl Source {
    /// The sources with few experts.
    pub const FEW: [Source; 5] = [Source::Own, Source::Auto, Source::Other, Source::Generalist, Source::Random];
}

/// What is compared: one row over all tasks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Where the experts come from.
    pub source: Source,
    /// Metric that ranks them.
    pub metric: String,
    /// How layers share the places.
    pub scope: String,
    /// What happens to tokens whose expert is not kept.
    pub mode: RoutingMode,
    /// Experts kept per layer, on average.
    pub keep: usize,
}

impl Row {
    /// A row; random experts are ranked by the metric `random`.
    pub fn new(source: Source, metric: &str, scope: Scope, mode: RoutingMode, keep: usize) -> Row {
        let metric = if source == Source::Random { "random" } else { metric };
        Row { source, metric: metric.to_string(), scope: scope.name().to_string(), mode, keep }
    }
}

/// One row's score of one task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// The row.
    #[serde(flatten)]
    pub row: Row,
    /// Task.
    pub task: String,
    /// Percent answered exactly; `None` for plain text.
    pub exact_match: Option<f64>,
    /// Perplexity of plain text.
    pub perplexity: Option<f64>,
    /// Percent of next tokens predicted rightly in plain text.
    pub top1: Option<f64>,
}

/// A comparison under way. The model holds all experts; plans only mask.
pub struct Comparison {
    model: Model,
    library: Library,
    tasks: Vec<Task>,
    /// Pattern retrieved for every item of every task.
    retrieved: Vec<Vec<String>>,
    /// What is known so far.
    pub cells: Vec<Cell>,
}

impl Comparison {
    /// Loads all experts and finds every prompt's pattern. `cells` are known already.
    ///
    /// # Errors
    /// A library without patterns of the model, or a model that cannot be loaded.
    pub fn new(
        mut model: Model,
        library: Library,
        tasks: Vec<Task>,
        cells: Vec<Cell>,
    ) -> Result<Comparison, LensError> {
        let mut retrieved = Vec::with_capacity(tasks.len());
        for task in &tasks {
            let prompts = task.items.iter().map(|i| encode_text(&model, &i.prompt)).collect::<Result<Vec<_>, _>>()?;
            let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
            let Some(found) = retrieve(&mut model, &library, &prompts, KeyMetric::Hidden)? else {
                let problem = "has no patterns of this model; help: make them with `quorate profile --tasks DIR`";
                return Err(LensError::invalid(format!("pattern library {}", library.path().display()), problem));
            };
            retrieved.push(found.into_iter().map(|f| f.task).collect());
        }
        model.load_all_experts()?;
        Ok(Comparison { model, library, tasks, retrieved, cells })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The tasks.
    pub fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    /// Computes a row's score of a task unless it is known; `false` if `go_on` returned false.
    ///
    /// # Errors
    /// A pattern that the library does not have, a number that cannot be kept, or as [`evaluate`].
    pub fn cell(&mut self, row: &Row, task: usize, go_on: &mut dyn FnMut() -> bool) -> Result<bool, LensError> {
        let name = self.tasks[task].name.clone();
        if self.cells.iter().any(|c| c.row == *row && c.task == name) {
            return Ok(true);
        }
        let mut scores = Vec::new();
        for groups in self.groups(row, task)? {
            let Some(score) = self.score(task, &groups, go_on)? else { return Ok(false) };
            scores.push(score);
        }
        let average = |f: fn(&TaskScore) -> Option<f64>| {
            let values: Vec<f64> = scores.iter().filter_map(f).collect();
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        let (exact_match, perplexity) = (average(TaskScore::exact_match), average(TaskScore::perplexity));
        let top1 = average(TaskScore::top1);
        self.cells.push(Cell { row: row.clone(), task: name, exact_match, perplexity, top1 });
        Ok(true)
    }

    /// The plans under which a task is answered, each with its items; several answers are averaged.
    fn groups(&self, row: &Row, task: usize) -> Result<Vec<Vec<Group>>, LensError> {
        let items: Vec<usize> = (0..self.tasks[task].items.len()).collect();
        let whole = |pattern: &str| Ok(vec![Group { plan: Some(self.plan(pattern, row)?), items: items.clone() }]);
        match row.source {
            Source::All => Ok(vec![vec![Group { plan: None, items }]]),
            Source::Own | Source::Random => Ok(vec![whole(&self.tasks[task].name)?]),
            Source::Generalist => Ok(vec![whole(GENERALIST)?]),
            Source::Other => {
                let other = |shift: usize| &self.tasks[(task + shift) % self.tasks.len()].name;
                [1, 5, 11].into_iter().map(|shift| whole(other(shift))).collect()
            }
            Source::Auto => {
                let mut groups: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
                for (item, name) in self.retrieved[task].iter().enumerate() {
                    groups.entry(name).or_default().push(item);
                }
                let group = |(name, items)| Ok(Group { plan: Some(self.plan(name, row)?), items });
                Ok(vec![groups.into_iter().map(group).collect::<Result<_, LensError>>()?])
            }
        }
    }

    fn plan(&self, pattern: &str, row: &Row) -> Result<Plan, LensError> {
        let (spec, fingerprint) = (self.model.spec(), self.model.checkpoint().fingerprint());
        let scope = Scope::ALL.into_iter().find(|s| s.name() == row.scope);
        let scope = scope.ok_or_else(|| LensError::unknown("scope", &row.scope, []))?;
        let keep = Some(Keep::per_layer(spec, scope, row.keep)?);
        let choice =
            Choice { metric: row.metric.clone(), keep, scope, mode: row.mode, protect: Vec::new(), even_groups: false };
        choice.plan(&self.library.get(fingerprint, pattern)?, spec, fingerprint)
    }

    fn score(
        &mut self,
        task: usize,
        groups: &[Group],
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Option<TaskScore>, LensError> {
        let mut score = TaskScore::default();
        let fingerprint = self.model.checkpoint().fingerprint().to_string();
        for Group { plan, items } in groups {
            let (kept, mode) = match plan {
                Some(plan) => (plan.kept(self.model.spec(), &fingerprint)?, plan.routing_mode),
                None => (vec![None; self.model.spec().moe_layers().len()], RoutingMode::Mask),
            };
            self.model.mask_experts(&kept, mode)?;
            let items: Vec<&TaskItem> = items.iter().map(|&i| &self.tasks[task].items[i]).collect();
            for answer in evaluate(&self.model, &items, &EvalOptions::default(), &mut NoLens, &mut |_| go_on())? {
                let Some(answer) = answer else { return Ok(None) };
                score.add(&answer);
            }
        }
        Ok(Some(score))
    }
}

/// Items that are answered under one plan.
struct Group {
    plan: Option<Plan>,
    items: Vec<usize>,
}
