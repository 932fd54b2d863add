//! EASY-EP's mask: JSON `[L][E]`, MoE layers only, 1.0 for an expert that is kept and 0.0 for one that is not. Experts are
//! masked before top-k.

use quorate_model::RoutingMode;

use super::check_some_kept;
use crate::{ExpertMap, LensError, Plan};

/// Kept experts, given per MoE layer, as a mask.
pub fn to_easy_ep(map: &ExpertMap, kept: &[Vec<usize>]) -> String {
    let row = |(&experts, kept): (&usize, &Vec<usize>)| -> Vec<f64> {
        (0..experts).map(|e| if kept.contains(&e) { 1.0 } else { 0.0 }).collect()
    };
    let rows: Vec<Vec<f64>> = map.experts.iter().zip(kept).map(row).collect();
    serde_json::json!(rows).to_string()
}

/// Reads a mask.
///
/// # Errors
/// Text that is no mask of the model's MoE layers and experts, a number that is neither 0 nor 1, or a layer that keeps
/// nothing.
pub fn from_easy_ep(text: &str, map: &ExpertMap) -> Result<Plan, LensError> {
    let bad = |problem: String| LensError::invalid("EASY-EP mask", problem);
    let rows: Vec<Vec<f64>> = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
    if rows.len() != map.n_layers() {
        return Err(bad(format!("it has {} layers, the model has {} with experts", rows.len(), map.n_layers())));
    }
    let mut kept = Vec::with_capacity(rows.len());
    for ((row, &experts), &layer) in rows.iter().zip(&map.experts).zip(&map.layers) {
        if row.len() != experts {
            return Err(bad(format!("layer {layer} has {} experts in it, {experts} in the model", row.len())));
        }
        if let Some(strange) = row.iter().find(|&&v| v != 0.0 && v != 1.0) {
            return Err(bad(format!("layer {layer} has the number {strange}; help: 1.0 keeps, 0.0 removes")));
        }
        kept.push((0..experts).filter(|&e| row[e] == 1.0).collect());
    }
    check_some_kept(map, &kept).map_err(bad)?;
    Ok(Plan::keeping("", map, &kept, RoutingMode::Mask))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_mistakes() {
        let map = ExpertMap::new(vec![1, 3], vec![3, 2]);
        let kept = [vec![0, 2], vec![1]];
        let text = to_easy_ep(&map, &kept);
        assert_eq!(text, "[[1.0,0.0,1.0],[0.0,1.0]]");
        assert_eq!(from_easy_ep(&text, &map).unwrap(), Plan::keeping("", &map, &kept, RoutingMode::Mask));
        for (text, part) in [
            ("[[1.0,0.0,1.0]]", "1 layers"),
            ("[[1.0,0.0],[0.0,1.0]]", "layer 1 has 2"),
            ("[[1.0,0.5,1.0],[0.0,1.0]]", "0.5"),
            ("[[1,0,1],[0,0]]", "layer 3 keeps nothing"),
            ("{}", "sequence"),
        ] {
            let error = from_easy_ep(text, &map).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
