//! Kept experts and routing in the formats of other engines. One file per format.
//!
//! - Lists of kept experts: vLLM's pruned-experts profile, vllm-ascend's expert list, EASY-EP's mask.
//! - Recorded routing: ids of chosen experts, router logits, SGLang's distributions, llama.cpp's importance matrix.

mod ascend;
mod easy_ep;
mod imatrix;
mod npy;
mod pickle;
mod routed_experts;
mod router_logits;
mod sglang;
mod torch_file;
mod traces;
mod vllm;

pub use ascend::{RankedKeep, from_ascend, read_rankings, to_ascend};
pub use easy_ep::{from_easy_ep, to_easy_ep};
pub use imatrix::{Imatrix, ImatrixEntry};
pub use routed_experts::RoutedExperts;
pub use traces::{TraceFormat, TraceShape, read_trace};
pub use vllm::{from_vllm, to_vllm};

use crate::{ExpertMap, LensError, Plan};

/// Kinds of lists of kept experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListKind {
    /// This program's plan (TOML).
    Plan,
    /// vLLM's profile or kept lists (JSON).
    Vllm,
    /// vllm-ascend's rankings (JSON Lines).
    Ascend,
    /// EASY-EP's mask (JSON).
    EasyEp,
}

impl ListKind {
    /// The kind that a text looks like: a JSON array is a mask; one JSON object is a profile or kept lists; JSON Lines are
    /// rankings, and so is a single line that ranks all experts of a model's only MoE layer; all else is a plan.
    pub fn of(text: &str, map: &ExpertMap) -> ListKind {
        let text = text.trim_start();
        if text.starts_with('{') {
            let rankings = map.n_layers() == 1 && read_rankings(text, map).is_ok();
            let one = serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok();
            let lines = text.lines().filter(|l| !l.trim().is_empty());
            let many =
                || lines.clone().count() > 1 && lines.clone().next().is_some_and(|l| l.trim_end().ends_with('}'));
            return if rankings || (!one && many()) { ListKind::Ascend } else { ListKind::Vllm };
        }
        if text.starts_with('[') && !text.starts_with("[[keep]]") && !text.starts_with("[[intervene]]") {
            return ListKind::EasyEp;
        }
        ListKind::Plan
    }
}

/// Reads a list of kept experts of any kind. `keep` is needed for rankings, which do not say how many experts they keep.
///
/// # Errors
/// A text that is none, does not fit the model, or is a ranking without `keep`.
pub fn read_list(text: &str, keep: Option<RankedKeep>, map: &ExpertMap) -> Result<(ListKind, Plan), LensError> {
    let kind = ListKind::of(text, map);
    let plan = match kind {
        ListKind::Plan => Plan::parse(text).map_err(|e| LensError::invalid("plan", e))?,
        ListKind::Vllm => from_vllm(text, map)?,
        ListKind::EasyEp => from_easy_ep(text, map)?,
        ListKind::Ascend => {
            let problem = "a ranking does not say how many experts are kept; help: give --keep or --prune-ratio";
            let keep = keep.ok_or_else(|| LensError::invalid("vllm-ascend expert list", problem))?;
            from_ascend(text, keep, map)?
        }
    };
    Ok((kind, plan))
}

/// All experts of every MoE layer.
fn all_of(map: &ExpertMap) -> Vec<Vec<usize>> {
    map.experts.iter().map(|&e| (0..e).collect()).collect()
}

/// MoE layer of a decoder layer that is written as a key.
fn moe_of(layer: &str, map: &ExpertMap) -> Result<usize, String> {
    let moe = layer.parse().ok().and_then(|l| map.moe_index(l));
    moe.ok_or_else(|| format!("`{layer}` is no layer with experts"))
}

/// Distinct experts of a layer.
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

fn check_some_kept(map: &ExpertMap, kept: &[Vec<usize>]) -> Result<(), String> {
    match kept.iter().position(Vec::is_empty) {
        Some(moe) => Err(format!("layer {} keeps nothing", map.layers[moe])),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_model::RoutingMode;

    #[test]
    fn kinds_are_told_apart_by_what_is_in_them() {
        let map = ExpertMap::new(vec![1, 2], vec![3, 3]);
        let kept = vec![vec![0, 2], vec![1, 2]];
        let plan = Plan::keeping("", &map, &kept, RoutingMode::Mask);
        let ranked = to_ascend(&map, &[vec![2, 0, 1], vec![1, 2, 0]]);
        for (text, kind) in [
            (plan.to_toml().unwrap(), ListKind::Plan),
            (to_vllm(&plan, &map).unwrap(), ListKind::Vllm),
            ("{\n\"1\": [0, 2],\n\"2\": [1, 2]\n}".to_string(), ListKind::Vllm),
            (to_easy_ep(&map, &kept), ListKind::EasyEp),
            (ranked.clone(), ListKind::Ascend),
        ] {
            let read = read_list(&text, Some(RankedKeep::Experts(2)), &map).unwrap();
            assert_eq!((read.0, &read.1.keep), (kind, &plan.keep), "{text}");
        }
        assert!(read_list(&ranked, None, &map).unwrap_err().to_string().contains("--prune-ratio"));
        let single = ExpertMap::new(vec![0], vec![3]);
        assert_eq!(ListKind::of("{\"0\":[2,0,1]}", &single), ListKind::Ascend);
        assert_eq!(ListKind::of("{\"0\":[2,0]}", &single), ListKind::Vllm);
        for text in ["", "{\"1\":", "{\"1\":[0]}\n{", "[[1.0", "version = 1\nkeep = 3"] {
            assert!(read_list(text, Some(RankedKeep::Experts(2)), &map).is_err(), "{text}");
        }
    }
}
