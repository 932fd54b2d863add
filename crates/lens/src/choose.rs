//! From a prompt or a task's name to a plan.

use quorate_formats::spec::ModelSpec;
use quorate_model::{Model, RoutingMode};
use serde::Serialize;

use crate::{
    ExpertMap, Indices, Keep, KeyIndex, KeyMetric, LensError, Library, Nearest, Pattern, Plan, PromptKey, Scope,
    Selection, prompt_keys,
};

/// Name of the pattern that an unfamiliar prompt falls back to.
pub const GENERALIST: &str = "generalist";

/// How experts are chosen once the pattern is known.
#[derive(Clone, Debug)]
pub struct Choice {
    /// Metric.
    pub metric: String,
    /// How many experts; `None` keeps half of them.
    pub keep: Option<Keep>,
    /// How layers share the places.
    pub scope: Scope,
    /// What happens to tokens whose expert is not kept.
    pub mode: RoutingMode,
    /// Experts `(decoder layer, expert)` that are kept whatever their score.
    pub protect: Vec<(usize, usize)>,
    /// Whether the groups that a router chooses among keep equally many experts, as a checkpoint needs.
    pub even_groups: bool,
}

impl Choice {
    /// The plan that keeps a pattern's best experts.
    ///
    /// # Errors
    /// A pattern of another model, a metric it does not have, or a number that cannot be kept.
    pub fn plan(&self, pattern: &Pattern, spec: &ModelSpec, fingerprint: &str) -> Result<Plan, LensError> {
        pattern.check_model(fingerprint)?;
        let map = &pattern.map;
        if *map != ExpertMap::of(spec) {
            return Err(does_not_fit(&pattern.info.name));
        }
        let half = map.experts.iter().sum::<usize>() / 2;
        let mut protect = Vec::with_capacity(self.protect.len());
        for &(layer, expert) in &self.protect {
            let moe = map.moe_index(layer);
            protect.push((
                moe.ok_or_else(|| {
                    LensError::Select(format!(
                        "layer {layer} has no experts to protect; help: {} have",
                        Indices::of(&map.layers)
                    ))
                })?,
                expert,
            ));
        }
        let floor = map.layers.iter().map(|&l| spec.moe(l).map_or(0, |m| m.top_k)).collect();
        let of_router = |&l: &usize| spec.moe(l)?.router.extra.groups.map(|g| g.n_group);
        let groups = map.layers.iter().find_map(of_router).filter(|_| self.even_groups).unwrap_or(0);
        let selection = Selection { scope: self.scope, protect, floor, groups };
        let kept = selection.select(pattern.scores(&self.metric)?, self.keep.unwrap_or(Keep::Total(half)))?;
        let mut plan = Plan::keeping(fingerprint, map, &kept, self.mode);
        plan.task = Some(pattern.info.name.clone());
        plan.metric = Some(self.metric.clone());
        Ok(plan)
    }
}

fn does_not_fit(name: &str) -> LensError {
    LensError::invalid(format!("pattern `{name}`"), "it does not have this model's shape; help: profile the task again")
}

/// Which pattern a prompt is served with.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Retrieved {
    /// The pattern to use: the nearest, or the generalist if the prompt is unfamiliar and there is one.
    pub task: String,
    /// The nearest pattern.
    pub nearest: Nearest,
}

/// Finds each prompt's pattern. `None` if the library has no patterns of the model. With keys of a later layer, the
/// experts in memory change ([`prompt_keys`]).
///
/// # Errors
/// The library, or the model's forward pass up to its first router.
pub fn retrieve(
    model: &mut Model,
    library: &Library,
    prompts: &[&[u32]],
    metric: KeyMetric,
) -> Result<Option<Vec<Retrieved>>, LensError> {
    let fingerprint = model.checkpoint().fingerprint().to_string();
    let keys = library.keys(&fingerprint)?;
    let Some((first, layer)) = keys.first().map(|(name, key)| (name.clone(), key.moe_layer)) else {
        return Ok(None);
    };
    if let Some((other, key)) = keys.iter().find(|(_, key)| key.moe_layer != layer) {
        let problem = format!(
            "patterns `{first}` and `{other}` have keys of different layers ({layer} and {}); help: profile them with the same --key-layer",
            key.moe_layer
        );
        return Err(LensError::invalid("pattern library", problem));
    }
    let prompts = prompt_keys(model, prompts, layer)?;
    if let Some(prompt) = prompts.first() {
        let widths = |k: &PromptKey| (k.hidden.len(), k.router.len());
        if let Some((name, _)) = keys.iter().find(|(_, key)| widths(&key.mean) != widths(prompt)) {
            return Err(does_not_fit(name));
        }
    }
    let index = KeyIndex::new(keys);
    let has_generalist = library.list(Some(&fingerprint))?.iter().any(|i| i.name == GENERALIST);
    let found = prompts.iter().filter_map(|prompt| index.nearest(prompt, metric));
    let choose = |nearest: Nearest| Retrieved {
        task: if nearest.familiar || !has_generalist { nearest.name.clone() } else { GENERALIST.to_string() },
        nearest,
    };
    Ok(Some(found.map(choose).collect()))
}
