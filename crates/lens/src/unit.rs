//! One routed expert by name, and sets of them.

use std::fmt;
use std::str::FromStr;

use quorate_model::Site;
use serde::{Deserialize, Serialize};

use crate::{ExpertMap, Indices, Intervention, LensError, Op, PhaseSelector};

/// A routed expert: decoder layer and global id within the layer. Written `LAYER:EXPERT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExpertId {
    /// Decoder layer.
    pub layer: usize,
    /// Global expert id.
    pub expert: usize,
}

impl fmt::Display for ExpertId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.layer, self.expert)
    }
}

impl FromStr for ExpertId {
    type Err = String;
    fn from_str(text: &str) -> Result<ExpertId, String> {
        let bad = || format!("`{text}` is no LAYER:EXPERT pair");
        let (layer, expert) = text.split_once(':').ok_or_else(bad)?;
        Ok(ExpertId { layer: layer.parse().map_err(|_| bad())?, expert: expert.parse().map_err(|_| bad())? })
    }
}

impl ExpertMap {
    /// The expert with number `unit` (see [`ExpertMap`]).
    ///
    /// # Panics
    /// If there are not so many experts.
    pub fn id(&self, unit: usize) -> ExpertId {
        let moe = (0..self.n_layers()).find(|&m| self.range(m).contains(&unit));
        let moe = moe.expect("a unit's number is below `total`");
        ExpertId { layer: self.layers[moe], expert: unit - self.range(moe).start }
    }

    /// The number of an expert; `None` if the model does not have it.
    pub fn unit(&self, id: ExpertId) -> Option<usize> {
        let range = self.range(self.moe_index(id.layer)?);
        (id.expert < range.len()).then_some(range.start + id.expert)
    }

    /// The experts with these numbers, sorted.
    pub fn ids(&self, units: &[usize]) -> Vec<ExpertId> {
        let mut ids: Vec<ExpertId> = units.iter().map(|&u| self.id(u)).collect();
        ids.sort_unstable();
        ids
    }

    /// Values of all experts, `[MoE layer][expert]`.
    pub fn rows<T: Clone>(&self, values: &[T]) -> Vec<Vec<T>> {
        (0..self.n_layers()).map(|m| values[self.range(m)].to_vec()).collect()
    }
}

/// The experts of a JSON list `[{"layer": 1, "expert": 68, ..}, ..]`; what else its objects hold is not read. Expert -1 is a
/// shared expert, in the lists of Super Experts' authors too; it is no routed one, and left out.
///
/// # Errors
/// A text that is no such list; `what` names it.
pub fn read_experts(what: &str, text: &str) -> Result<Vec<ExpertId>, LensError> {
    #[derive(Deserialize)]
    struct Entry {
        layer: usize,
        expert: i64,
    }
    let bad = |problem: String| {
        let help = "help: a list of experts is like [{\"layer\": 1, \"expert\": 68}]";
        LensError::invalid(what, format!("{problem}; {help}"))
    };
    let entries: Vec<Entry> = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
    let routed = entries.iter().filter(|e| e.expert != -1);
    let id = |e: &Entry| {
        let expert = usize::try_from(e.expert).map_err(|_| bad(format!("there is no expert {}", e.expert)))?;
        Ok(ExpertId { layer: e.layer, expert })
    };
    routed.map(id).collect()
}

/// One operation on a set of experts at all positions of `phase`: one intervention for each layer.
pub fn on_experts(ids: &[ExpertId], site: Site, phase: PhaseSelector, op: &Op) -> Vec<Intervention> {
    let mut layers: Vec<usize> = ids.iter().map(|id| id.layer).collect();
    layers.sort_unstable();
    layers.dedup();
    let of_layer = |layer: usize| {
        let mut experts: Vec<usize> = ids.iter().filter(|id| id.layer == layer).map(|id| id.expert).collect();
        experts.sort_unstable();
        experts.dedup();
        let (layers, units) = (Indices::of(&[layer]), Indices::of(&experts));
        Intervention { site, layers, units, positions: Indices::All, phase, op: op.clone() }
    };
    layers.into_iter().map(of_layer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_belong_together() {
        let map = ExpertMap::new(vec![1, 3], vec![4, 2]);
        for unit in 0..map.total() {
            assert_eq!(map.unit(map.id(unit)), Some(unit));
            assert_eq!(map.id(unit).to_string().parse::<ExpertId>().unwrap(), map.id(unit));
        }
        assert_eq!(map.unit(ExpertId { layer: 3, expert: 2 }), None);
        assert_eq!(map.unit(ExpertId { layer: 0, expert: 0 }), None);
        assert!("3-1".parse::<ExpertId>().is_err());
        assert_eq!(map.rows(&[0, 1, 2, 3, 4, 5]), [vec![0, 1, 2, 3], vec![4, 5]]);
    }

    #[test]
    fn lists_of_experts_are_read_and_shared_ones_left_out() {
        let text = r#"[{"layer": 2, "expert": 7, "output_max": 301.5}, {"layer": 1, "expert": -1}]"#;
        assert_eq!(read_experts("x.json", text).unwrap(), [ExpertId { layer: 2, expert: 7 }]);
        assert!(read_experts("x.json", "[]").unwrap().is_empty());
        for wrong in ["{}", r#"[{"layer": 2}]"#, r#"[{"layer": 2, "expert": -7}]"#, "[[2, 7]"] {
            let error = read_experts("x.json", wrong).unwrap_err().to_string();
            assert!(error.starts_with("x.json: ") && error.contains("help: a list of experts"), "{error}");
        }
    }

    #[test]
    fn a_set_becomes_one_intervention_a_layer() {
        let ids = [(3, 1), (1, 2), (3, 0), (3, 1)].map(|(layer, expert)| ExpertId { layer, expert });
        let list = on_experts(&ids, Site::Routing, PhaseSelector::All, &Op::Drop);
        assert_eq!(list.len(), 2);
        assert_eq!((list[1].layers.list(), list[1].units.list()), (Some(vec![3]), Some(vec![0, 1])));
    }
}
