//! Plans: what is kept of a model and what is changed in it, as readable TOML.

use std::path::Path;

use quorate_formats::spec::ModelSpec;
use quorate_model::{KeptExperts, RoutingMode};
use serde::{Deserialize, Serialize};

use crate::{ExpertMap, Indices, Intervention, LensError};

/// The version of the plan format that this program writes.
pub const PLAN_VERSION: u32 = 1;

/// What to keep and what to change.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Version of the format.
    pub version: u32,
    /// Fingerprint of the model that it is for; an empty one fits any model of the same shape.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub model: String,
    /// Task whose experts are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
    /// Metric that chose them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<String>,
    /// What happens to tokens whose expert is not kept.
    #[serde(default)]
    pub routing_mode: RoutingMode,
    /// Kept experts of each MoE layer; a layer that is not named keeps all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keep: Vec<KeepLayer>,
    /// Interventions, applied in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub intervene: Vec<Intervention>,
}

/// Kept experts of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeepLayer {
    /// Decoder layer.
    pub layer: usize,
    /// Global expert ids.
    pub experts: Indices,
}

impl Plan {
    /// A plan that keeps these experts, given per MoE layer.
    pub fn keeping(model: &str, map: &ExpertMap, kept: &[Vec<usize>], mode: RoutingMode) -> Plan {
        let keep = (map.layers.iter().zip(kept))
            .map(|(&layer, experts)| KeepLayer { layer, experts: Indices::of(experts) })
            .collect();
        Plan { version: PLAN_VERSION, model: model.to_string(), routing_mode: mode, keep, ..Plan::default() }
    }

    /// Reads a plan.
    ///
    /// # Errors
    /// A file that cannot be read or is no plan of a version that this program knows.
    pub fn read(path: &Path) -> Result<Plan, LensError> {
        let text = std::fs::read_to_string(path).map_err(|source| LensError::Io { path: path.into(), source })?;
        Plan::parse(&text).map_err(|problem| LensError::invalid(path.display().to_string(), problem))
    }

    pub(crate) fn parse(text: &str) -> Result<Plan, String> {
        let plan: Plan = toml::from_str(text).map_err(|e| e.to_string())?;
        if plan.version != PLAN_VERSION {
            return Err(format!(
                "plan version {} is unknown; help: this program reads version {PLAN_VERSION}",
                plan.version
            ));
        }
        Ok(plan)
    }

    /// The plan as TOML.
    ///
    /// # Errors
    /// Numbers that TOML cannot hold.
    pub fn to_toml(&self) -> Result<String, LensError> {
        toml::to_string(self).map_err(|e| LensError::invalid("plan", e.to_string()))
    }

    /// The kept experts of every MoE layer, for [`quorate_model::Model::load_experts`].
    ///
    /// # Errors
    /// A plan of another model, a layer named twice or without experts, or an expert that does not exist.
    pub fn kept(&self, spec: &ModelSpec, fingerprint: &str) -> Result<Vec<KeptExperts>, LensError> {
        if !self.model.is_empty() && self.model != fingerprint {
            let (theirs, ours) = (self.model.clone(), fingerprint.to_string());
            return Err(LensError::OtherModel { what: "plan".into(), theirs, ours });
        }
        let map = ExpertMap::of(spec);
        let mut kept = vec![None; map.n_layers()];
        for KeepLayer { layer, experts } in &self.keep {
            let bad = |problem: &str| LensError::invalid("plan", format!("layer {layer} {problem}"));
            let moe = map.moe_index(*layer).ok_or_else(|| bad("has no experts in this model"))?;
            if kept[moe].is_some() {
                return Err(bad("is named twice; help: name each layer once"));
            }
            if experts.max().is_some_and(|e| e >= map.experts[moe]) {
                return Err(bad(&format!("has only {} experts", map.experts[moe])));
            }
            kept[moe] = experts.list();
        }
        Ok(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Op, PhaseSelector};
    use quorate_model::Site;

    #[test]
    fn toml_round_trip() {
        let map = ExpertMap::new(vec![1], vec![8]);
        let mut plan = Plan::keeping("abc", &map, &[vec![0, 3, 5]], RoutingMode::Drop);
        plan.intervene.push(Intervention {
            site: Site::ResidPost,
            layers: "2-3".parse().unwrap(),
            units: Indices::All,
            positions: Indices::All,
            phase: PhaseSelector::Decode,
            op: Op::Add { value: crate::Value::Inline(vec![1.0, 2.0]), scale: 0.5 },
        });
        let skip = Op::SkipRenormalise { by: 0.25 };
        plan.intervene.push(Intervention { site: Site::Routing, op: skip, ..plan.intervene[0].clone() });
        let text = plan.to_toml().unwrap();
        assert_eq!(Plan::parse(&text).unwrap(), plan, "{text}");
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("version = 7", "version 7"),
            ("version = 1\nkeap = []", "keap"),
            ("version = 1\n[[intervene]]\nsite = \"resid\"\nop = \"zero\"", "resid_pre"),
            ("version = 1\n[[intervene]]\nsite = \"z\"\nop = \"zer\"", "zero"),
            ("version = 1\n[[intervene]]\nsite = \"z\"\nop = \"scale\"", "by"),
            ("version = 1\n[[intervene]]\nsite = \"routing\"\nop = \"skip\"", "by"),
            ("version = 1\n[[intervene]]\nsite = \"z\"\nop = \"zero\"\nby = 2.0", "by"),
        ] {
            let error = Plan::parse(text).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
