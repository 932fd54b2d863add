//! Kept experts in the formats of other engines.
//!
//! - vLLM pruned-experts profile: JSON with the pairs `[decoder layer, expert]` to *remove*. Version 1 masks before top-k;
//!   version 2 names the routing mode.
//! - vllm-ascend expert list: JSON Lines, per MoE layer the full ranking, best expert first.

use std::collections::BTreeMap;

use quorate_model::RoutingMode;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{ExpertMap, LensError, Plan, ScoreTable};

#[derive(Serialize, Deserialize)]
struct VllmProfile {
    version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    workload: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    routing_mode: Option<String>,
    pruned_experts: Vec<[usize; 2]>,
    #[serde(default, rename = "_metadata", skip_serializing_if = "Option::is_none")]
    metadata: Option<serde_json::Value>,
}

/// A plan's kept experts as a vLLM profile: version 1 for the mode `mask`, version 2 for `drop`.
///
/// # Errors
/// A routing mode that the format does not have.
pub fn to_vllm(plan: &Plan, map: &ExpertMap) -> Result<String, LensError> {
    let (version, routing_mode) = match plan.routing_mode {
        RoutingMode::Mask => (1, None),
        RoutingMode::Drop => (2, Some("post_topk_drop".to_string())),
        other => {
            let problem = format!("the format has no routing mode `{}`; help: use mask or drop", other.name());
            return Err(LensError::invalid("vLLM profile", problem));
        }
    };
    let mut pruned_experts = Vec::new();
    for keep in &plan.keep {
        let Some(moe) = map.moe_index(keep.layer) else { continue };
        let gone = (0..map.experts[moe]).filter(|&e| !keep.experts.contains(e));
        pruned_experts.extend(gone.map(|e| [keep.layer, e]));
    }
    let keep_rate = 1.0 - pruned_experts.len() as f64 / map.total().max(1) as f64;
    let most = map.experts.iter().max().copied().unwrap_or(0);
    let layers = map.layers.last().map_or(0, |l| l + 1);
    let profile = VllmProfile {
        version,
        model: Some(plan.model.clone()).filter(|m| !m.is_empty()),
        workload: plan.task.clone(),
        routing_mode,
        pruned_experts,
        metadata: Some(json!({ "num_experts": most, "num_layers": layers, "keep_rate": keep_rate })),
    };
    serde_json::to_string(&profile).map_err(|e| LensError::invalid("vLLM profile", e.to_string()))
}

/// Reads a vLLM profile of version 1 or 2, or the kept lists `{"0": [ids], ..}` of its converter.
///
/// # Errors
/// Text that is neither, an unknown version or routing mode, or experts that the model does not have.
pub fn from_vllm(text: &str, map: &ExpertMap) -> Result<Plan, LensError> {
    let bad = |problem: String| LensError::invalid("vLLM profile", problem);
    let value: serde_json::Value = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
    if value.get("pruned_experts").is_none() {
        return from_kept_lists(&value, map).map_err(bad);
    }
    let profile: VllmProfile = serde_json::from_value(value).map_err(|e| bad(e.to_string()))?;
    let mode = match (profile.version, profile.routing_mode.as_deref()) {
        (1, None) | (2, Some("pre_topk_mask")) => RoutingMode::Mask,
        (2, Some("post_topk_drop")) => RoutingMode::Drop,
        (1 | 2, mode) => return Err(bad(format!("routing mode {mode:?} is unknown for version {}", profile.version))),
        (version, _) => return Err(bad(format!("version {version} is unknown; help: versions 1 and 2 are read"))),
    };
    let mut kept: Vec<Vec<usize>> = map.experts.iter().map(|&e| (0..e).collect()).collect();
    for [layer, expert] in profile.pruned_experts {
        let moe = map.moe_index(layer).filter(|&m| expert < map.experts[m]);
        let moe = moe.ok_or_else(|| bad(format!("the model has no expert {expert} in layer {layer}")))?;
        kept[moe].retain(|&e| e != expert);
    }
    let mut plan = Plan::keeping("", map, &kept, mode);
    plan.task = profile.workload;
    Ok(plan)
}

fn from_kept_lists(value: &serde_json::Value, map: &ExpertMap) -> Result<Plan, String> {
    let object = value.as_object().ok_or("it is no JSON object")?;
    let mut kept: Vec<Vec<usize>> = map.experts.iter().map(|&e| (0..e).collect()).collect();
    for (layer, ids) in object.iter().filter(|(k, _)| !k.starts_with('_')) {
        let moe = layer.parse().ok().and_then(|l| map.moe_index(l));
        let moe = moe.ok_or_else(|| format!("`{layer}` is no layer with experts"))?;
        kept[moe] = expert_ids(ids, map.experts[moe]).map_err(|e| format!("layer {layer}: {e}"))?;
        kept[moe].sort_unstable();
    }
    Ok(Plan::keeping("", map, &kept, RoutingMode::Mask))
}

fn expert_ids(value: &serde_json::Value, experts: usize) -> Result<Vec<usize>, String> {
    let ids: Vec<usize> = serde_json::from_value(value.clone()).map_err(|e| e.to_string())?;
    let mut seen = vec![false; experts];
    for &id in &ids {
        let flag = seen.get_mut(id).ok_or_else(|| format!("there is no expert {id}, only {experts}"))?;
        if std::mem::replace(flag, true) {
            return Err(format!("expert {id} is named twice"));
        }
    }
    Ok(ids)
}

/// A score table as a vllm-ascend expert list: one line per MoE layer, keyed by decoder layer.
pub fn to_ascend(scores: &ScoreTable) -> String {
    let line = |(moe, layer): (usize, &usize)| json!({ layer.to_string(): scores.ranking(moe) }).to_string() + "\n";
    scores.map.layers.iter().enumerate().map(line).collect()
}

/// Reads a vllm-ascend expert list; a plan that keeps `floor(E (1 - prune_ratio))` experts of each layer.
///
/// # Errors
/// A line that is no ranking of all experts of a layer of the model, layers missing, or a ratio outside [0, 1).
pub fn from_ascend(text: &str, prune_ratio: f64, map: &ExpertMap) -> Result<Plan, LensError> {
    let bad = |problem: String| LensError::invalid("vllm-ascend expert list", problem);
    if !(0.0..1.0).contains(&prune_ratio) {
        return Err(bad(format!("prune ratio {prune_ratio} is not in [0, 1)")));
    }
    let mut kept: Vec<Vec<usize>> = vec![Vec::new(); map.n_layers()];
    for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let at = |problem: String| bad(format!("line {}: {problem}", number + 1));
        let layers: BTreeMap<String, serde_json::Value> = serde_json::from_str(line).map_err(|e| at(e.to_string()))?;
        for (layer, ids) in layers {
            let moe = layer.parse().ok().and_then(|l| map.moe_index(l));
            let moe = moe.ok_or_else(|| at(format!("`{layer}` is no layer with experts")))?;
            let ranking = expert_ids(&ids, map.experts[moe]).map_err(at)?;
            if ranking.len() != map.experts[moe] {
                return Err(at(format!("ranks {} experts, the layer has {}", ranking.len(), map.experts[moe])));
            }
            let keep = (map.experts[moe] as f64 * (1.0 - prune_ratio)).floor() as usize;
            kept[moe] = ranking[..keep].to_vec();
            kept[moe].sort_unstable();
        }
    }
    if let Some(moe) = kept.iter().position(Vec::is_empty) {
        return Err(bad(format!("layer {} is missing or keeps nothing", map.layers[moe])));
    }
    Ok(Plan::keeping("", map, &kept, RoutingMode::Mask))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MetricInfo;

    fn map() -> ExpertMap {
        ExpertMap::new(vec![1, 2], vec![4, 4])
    }

    #[test]
    fn vllm_round_trip_in_both_versions() {
        for (mode, version) in [(RoutingMode::Mask, "\"version\":1"), (RoutingMode::Drop, "\"version\":2")] {
            let plan = Plan::keeping("", &map(), &[vec![0, 2], vec![1, 2, 3]], mode);
            let text = to_vllm(&plan, &map()).unwrap();
            assert!(text.contains(version) && text.contains("[1,1],[1,3],[2,0]"), "{text}");
            assert_eq!(from_vllm(&text, &map()).unwrap(), plan);
        }
        let plan = Plan::keeping("", &map(), &[vec![0], vec![0]], RoutingMode::MaskFullGates);
        assert!(to_vllm(&plan, &map()).is_err());
    }

    #[test]
    fn vllm_mistakes_are_refused() {
        for (text, part) in [
            (r#"{"version":3,"pruned_experts":[]}"#, "version 3"),
            (r#"{"version":2,"pruned_experts":[]}"#, "None"),
            (r#"{"version":2,"routing_mode":"x","pruned_experts":[]}"#, "x"),
            (r#"{"version":1,"pruned_experts":[[0,1]]}"#, "layer 0"),
            (r#"{"version":1,"pruned_experts":[[1,4]]}"#, "expert 4"),
            (r#"{"1":[0,0]}"#, "twice"),
            ("[]", "object"),
        ] {
            let error = from_vllm(text, &map()).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        let kept = from_vllm(r#"{"1":[3,0],"_metadata":{}}"#, &map()).unwrap();
        assert_eq!(kept, Plan::keeping("", &map(), &[vec![0, 3], vec![0, 1, 2, 3]], RoutingMode::Mask));
    }

    #[test]
    fn ascend_round_trip() {
        let scores = ScoreTable {
            map: map(),
            metric: MetricInfo { name: "m".into(), gauge_dependent: false },
            values: vec![0.1, 0.4, 0.3, 0.2, 4.0, 3.0, 2.0, 1.0],
            counts: vec![0; 8],
        };
        let text = to_ascend(&scores);
        assert_eq!(text, "{\"1\":[1,2,3,0]}\n{\"2\":[0,1,2,3]}\n");
        let plan = from_ascend(&text, 0.5, &map()).unwrap();
        assert_eq!(plan, Plan::keeping("", &map(), &[vec![1, 2], vec![0, 1]], RoutingMode::Mask));
        assert!(from_ascend("{\"1\":[1,2]}", 0.5, &map()).is_err());
        assert!(from_ascend("{\"1\":[1,2,3,0]}", 0.5, &map()).is_err());
        assert!(from_ascend(&text, 1.0, &map()).is_err());
    }
}
