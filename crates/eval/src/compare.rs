//! How well tasks are answered with few experts, over sources of the experts, metrics and numbers kept.

use quorate_lens::{LensError, Plan};
use quorate_model::{Model, NoLens, RoutingMode};
use serde::{Deserialize, Serialize};

use crate::evaluate::{TaskScore, evaluate};
use crate::tasks::{Task, TaskItem};

/// One cell of the comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Where the experts come from: `all`, `own`, `auto`, `other`, `generalist` or `random`.
    pub source: String,
    /// Metric that ranked them.
    pub metric: String,
    /// Routing mode.
    pub mode: String,
    /// How layers share the places.
    pub scope: String,
    /// Experts kept per layer, on average.
    pub keep: usize,
    /// Task.
    pub task: String,
    /// Percent answered exactly; `None` for plain text.
    pub exact_match: Option<f64>,
    /// Perplexity of plain text.
    pub perplexity: Option<f64>,
    /// Percent of next tokens predicted rightly in plain text.
    pub top1: Option<f64>,
}

/// Answers the first `limit` items of a task with each of several plans and returns the score over all of them.
///
/// `plan_of` names the plan of an item; items with the same plan are answered together. The model must hold all experts:
/// plans only mask.
///
/// # Errors
/// A plan that does not fit the model, or as [`evaluate`]. `Ok(None)` if `go_on` returned false.
pub fn score_task(
    model: &mut Model,
    task: &Task,
    limit: usize,
    plans: &[(Option<Plan>, Vec<usize>)],
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Option<TaskScore>, LensError> {
    let mut score = TaskScore::default();
    let fingerprint = model.checkpoint().fingerprint().to_string();
    for (plan, numbers) in plans {
        let layers = model.spec().moe_layers().len();
        let (kept, mode) = match plan {
            Some(plan) => (plan.kept(model.spec(), &fingerprint)?, plan.routing_mode),
            None => (vec![None; layers], RoutingMode::Mask),
        };
        model.mask_experts(&kept, mode)?;
        let items: Vec<&TaskItem> =
            numbers.iter().filter(|&&i| i < limit).filter_map(|&i| task.items.get(i)).collect();
        for answer in evaluate(model, &items, 96, &mut NoLens, &mut |_| go_on())? {
            let Some(answer) = answer else { return Ok(None) };
            score.add(&answer);
        }
    }
    Ok(Some(score))
}

/// Mean exact match over the tasks of the cells that `fits` picks; `None` without any.
pub fn mean<'a>(cells: impl IntoIterator<Item = &'a Cell>, fits: impl Fn(&Cell) -> bool) -> Option<f64> {
    let values: Vec<f64> = cells.into_iter().filter(|c| fits(c)).filter_map(|c| c.exact_match).collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}
