//! vLLM's pruned-experts profile: JSON with the pairs `[decoder layer, expert]` to *remove*. Version 1 masks before top-k;
//! version 2 names the routing mode. The kept lists that its converter takes are read too.

use quorate_model::RoutingMode;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{all_of, check_some_kept, expert_ids, moe_of};
use crate::{ExpertMap, LensError, Plan};

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
        (1, None) | (1 | 2, Some("pre_topk_mask")) => RoutingMode::Mask,
        (2, Some("post_topk_drop")) => RoutingMode::Drop,
        (1 | 2, mode) => return Err(bad(format!("routing mode {mode:?} is unknown for version {}", profile.version))),
        (version, _) => return Err(bad(format!("version {version} is unknown; help: versions 1 and 2 are read"))),
    };
    let most = map.experts.iter().max().copied().unwrap_or(0);
    let meant = profile.metadata.as_ref().and_then(|m| m.get("num_experts")?.as_u64());
    if let Some(meant) = meant.filter(|&n| n != most as u64) {
        return Err(bad(format!("it is for a model with {meant} experts per layer, this one has {most}")));
    }
    let mut kept = all_of(map);
    for [layer, expert] in profile.pruned_experts {
        let moe = map.moe_index(layer).filter(|&m| expert < map.experts[m]);
        let moe = moe.ok_or_else(|| bad(format!("the model has no expert {expert} in layer {layer}")))?;
        kept[moe].retain(|&e| e != expert);
    }
    check_some_kept(map, &kept).map_err(bad)?;
    let mut plan = Plan::keeping("", map, &kept, mode);
    plan.task = profile.workload;
    Ok(plan)
}

fn from_kept_lists(value: &serde_json::Value, map: &ExpertMap) -> Result<Plan, String> {
    let object = value.as_object().ok_or("it is no JSON object")?;
    let mut kept = all_of(map);
    for (layer, ids) in object.iter().filter(|(k, _)| !k.starts_with('_')) {
        let moe = moe_of(layer, map)?;
        kept[moe] = expert_ids(ids, map.experts[moe]).map_err(|e| format!("layer {layer}: {e}"))?;
        kept[moe].sort_unstable();
    }
    check_some_kept(map, &kept)?;
    Ok(Plan::keeping("", map, &kept, RoutingMode::Mask))
}

#[cfg(test)]
mod tests {
    use super::*;

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
            (r#"{"version":1,"pruned_experts":[[1,0],[1,1],[1,2],[1,3]]}"#, "layer 1 keeps nothing"),
            (r#"{"version":1,"pruned_experts":[],"_metadata":{"num_experts":8}}"#, "8 experts per layer"),
            (r#"{"1":[0,0]}"#, "twice"),
            (r#"{"1":[]}"#, "layer 1 keeps nothing"),
            (r#"{"x":[1]}"#, "`x` is no layer"),
            ("[]", "object"),
        ] {
            let error = from_vllm(text, &map()).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        let kept = from_vllm(r#"{"1":[3,0],"_metadata":{}}"#, &map()).unwrap();
        assert_eq!(kept, Plan::keeping("", &map(), &[vec![0, 3], vec![0, 1, 2, 3]], RoutingMode::Mask));
    }
}
