//! vllm-ascend's expert list: JSON Lines, per MoE layer the full ranking, best expert first. One share of the experts is
//! kept in every layer.

use std::collections::BTreeMap;

use quorate_model::RoutingMode;
use serde_json::json;

use super::{check_some_kept, expert_ids, moe_of};
use crate::{ExpertMap, LensError, Plan};

/// How many experts of a ranking are kept in every layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RankedKeep {
    /// `floor(E (1 - ratio))`, the engine's `expert_prune_ratio`.
    PruneRatio(f64),
    /// So many.
    Experts(usize),
}

/// Rankings of each MoE layer, best expert first, as a list: one line per layer, keyed by decoder layer.
pub fn to_ascend(map: &ExpertMap, rankings: &[Vec<usize>]) -> String {
    let line = |(layer, ranking): (&usize, &Vec<usize>)| json!({ layer.to_string(): ranking }).to_string() + "\n";
    map.layers.iter().zip(rankings).map(line).collect()
}

/// Reads a list: per MoE layer the ranking of all its experts.
///
/// # Errors
/// A line that is no ranking of all experts of a layer of the model, or layers that are missing or named twice.
pub fn read_rankings(text: &str, map: &ExpertMap) -> Result<Vec<Vec<usize>>, LensError> {
    let mut rankings: Vec<Vec<usize>> = vec![Vec::new(); map.n_layers()];
    for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let at = |problem: String| bad(format!("line {}: {problem}", number + 1));
        let layers: BTreeMap<String, serde_json::Value> = serde_json::from_str(line).map_err(|e| at(e.to_string()))?;
        for (layer, ids) in layers {
            let moe = moe_of(&layer, map).map_err(at)?;
            let ranking = expert_ids(&ids, map.experts[moe]).map_err(at)?;
            if ranking.len() != map.experts[moe] {
                return Err(at(format!("ranks {} experts, the layer has {}", ranking.len(), map.experts[moe])));
            }
            if !std::mem::replace(&mut rankings[moe], ranking).is_empty() {
                return Err(at(format!("layer {layer} is ranked twice")));
            }
        }
    }
    match rankings.iter().position(Vec::is_empty) {
        Some(moe) => Err(bad(format!("layer {} is missing", map.layers[moe]))),
        None => Ok(rankings),
    }
}

/// Reads a list; a plan that keeps the best experts of each layer.
///
/// # Errors
/// As [`read_rankings`]; a ratio outside [0, 1), or a number of experts that a layer does not have.
pub fn from_ascend(text: &str, keep: RankedKeep, map: &ExpertMap) -> Result<Plan, LensError> {
    let mut kept = read_rankings(text, map)?;
    for (ranking, &layer) in kept.iter_mut().zip(&map.layers) {
        let number = match keep {
            RankedKeep::PruneRatio(ratio) if !(0.0..1.0).contains(&ratio) => {
                return Err(bad(format!("prune ratio {ratio} is not in [0, 1)")));
            }
            RankedKeep::PruneRatio(ratio) => (ranking.len() as f64 * (1.0 - ratio)).floor() as usize,
            RankedKeep::Experts(k) => k,
        };
        if number > ranking.len() {
            return Err(bad(format!("layer {layer} has {} experts, {number} cannot be kept", ranking.len())));
        }
        ranking.truncate(number);
        ranking.sort_unstable();
    }
    check_some_kept(map, &kept).map_err(bad)?;
    Ok(Plan::keeping("", map, &kept, RoutingMode::Mask))
}

fn bad(problem: String) -> LensError {
    LensError::invalid("vllm-ascend expert list", problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let map = ExpertMap::new(vec![1, 2], vec![4, 4]);
        let rankings = vec![vec![1, 2, 3, 0], vec![0, 1, 2, 3]];
        let text = to_ascend(&map, &rankings);
        assert_eq!(text, "{\"1\":[1,2,3,0]}\n{\"2\":[0,1,2,3]}\n");
        assert_eq!(read_rankings(&text, &map).unwrap(), rankings);
        let half = Plan::keeping("", &map, &[vec![1, 2], vec![0, 1]], RoutingMode::Mask);
        for keep in [RankedKeep::PruneRatio(0.5), RankedKeep::Experts(2)] {
            assert_eq!(from_ascend(&text, keep, &map).unwrap(), half);
        }
        for (text, keep, part) in [
            ("{\"1\":[1,2]}", RankedKeep::PruneRatio(0.5), "ranks 2"),
            ("{\"1\":[1,2,3,0]}", RankedKeep::PruneRatio(0.5), "layer 2 is missing"),
            ("{\"1\":[1,2,3,0]}\n{\"1\":[1,2,3,0]}", RankedKeep::Experts(1), "twice"),
            (&text, RankedKeep::PruneRatio(1.0), "not in"),
            (&text, RankedKeep::PruneRatio(f64::NAN), "not in"),
            (&text, RankedKeep::Experts(5), "cannot be kept"),
            (&text, RankedKeep::Experts(0), "keeps nothing"),
        ] {
            let error = from_ascend(text, keep, &map).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
