//! How well kept experts serve texts that were not profiled, and how much two patterns have in common.

use serde::Serialize;

use crate::{ExpertMap, RouterStats};

/// The part of a set of texts that kept experts would serve, were no slot refilled.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Coverage {
    /// Share of the selections, mean over MoE layers.
    pub selections: f64,
    /// Share of the gate mass, mean over MoE layers.
    pub gate_mass: f64,
}

/// Coverage of texts with statistics `count` (selections) and `gate` (gate sums) per expert by the experts `kept` of
/// every MoE layer. `None` if there are no selections.
pub fn coverage(map: &ExpertMap, count: &[u64], gate: &[f64], kept: &[Vec<usize>]) -> Option<Coverage> {
    let mut sum = Coverage { selections: 0.0, gate_mass: 0.0 };
    for (moe, kept) in kept.iter().enumerate() {
        let range = map.range(moe);
        let all: u64 = count[range.clone()].iter().sum();
        let mass: f64 = gate[range.clone()].iter().sum();
        if all == 0 || mass <= 0.0 {
            return None;
        }
        sum.selections += kept.iter().map(|e| count[range.start + e]).sum::<u64>() as f64 / all as f64;
        sum.gate_mass += kept.iter().map(|e| gate[range.start + e]).sum::<f64>() / mass;
    }
    let layers = kept.len() as f64;
    (!kept.is_empty()).then(|| Coverage { selections: sum.selections / layers, gate_mass: sum.gate_mass / layers })
}

/// Selections and gate sums of all tokens of a set of texts.
pub fn uses(stats: &RouterStats) -> (Vec<u64>, Vec<f64>) {
    let all = stats.pooled();
    (all.count.clone(), all.sum(crate::Sum::Gate).to_vec())
}

/// Share of the experts kept by `a` that `b` keeps too, over all MoE layers.
pub fn overlap(a: &[Vec<usize>], b: &[Vec<usize>]) -> f64 {
    let common: usize = a.iter().zip(b).map(|(a, b)| a.iter().filter(|e| b.contains(e)).count()).sum();
    common as f64 / a.iter().map(Vec::len).sum::<usize>().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_by_hand() {
        let map = ExpertMap::new(vec![0, 1], vec![2, 2]);
        let c = coverage(&map, &[3, 1, 2, 2], &[1.0, 1.0, 3.0, 1.0], &[vec![0], vec![0]]).unwrap();
        assert_eq!(c, Coverage { selections: 0.625, gate_mass: 0.625 });
        assert!(coverage(&map, &[0, 0, 1, 1], &[0.0; 4], &[vec![0], vec![0]]).is_none());
        assert_eq!(overlap(&[vec![0, 1], vec![0]], &[vec![1], vec![1]]), 1.0 / 3.0);
    }
}
