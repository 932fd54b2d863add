//! Score tables: one number per expert, with where it came from.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use crate::ExpertMap;

/// Scores of all routed experts by one metric. Higher is kept first.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreTable {
    /// Which experts.
    pub map: ExpertMap,
    /// Name and settings of the metric.
    pub metric: MetricInfo,
    /// Score per expert, numbered by `map`.
    pub values: Vec<f64>,
    /// Tokens for which each expert was selected: decides between equal scores.
    pub counts: Vec<u64>,
}

/// What a metric is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetricInfo {
    /// Its name, e.g. `peu`.
    pub name: String,
    /// Whether adding one constant to all logits of a token (which changes nothing in a softmax router) changes it.
    pub gauge_dependent: bool,
}

impl ScoreTable {
    /// Which of two experts is kept first: the higher score, then the one selected more often, then the lower number.
    pub fn compare(&self, a: usize, b: usize) -> Ordering {
        self.values[b].total_cmp(&self.values[a]).then(self.counts[b].cmp(&self.counts[a])).then(a.cmp(&b))
    }

    /// Experts of one MoE layer by local id, best first.
    pub fn ranking(&self, moe: usize) -> Vec<usize> {
        let range = self.map.range(moe);
        let mut order: Vec<usize> = range.clone().collect();
        order.sort_by(|&a, &b| self.compare(a, b));
        order.iter().map(|u| u - range.start).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_more_used_then_to_the_lower() {
        let table = ScoreTable {
            map: ExpertMap::new(vec![0], vec![4]),
            metric: MetricInfo { name: "m".into(), gauge_dependent: false },
            values: vec![0.0, 1.0, 0.0, 0.0],
            counts: vec![3, 1, 5, 3],
        };
        assert_eq!(table.ranking(0), [1, 2, 0, 3]);
    }
}
