//! Streaming statistics of what experts put out: mean and variance of each expert's output over the tokens that choose it.

use candle_core::Tensor;
use quorate_model::{At, Flow, Lens, ModelError, NO_EXPERT, Site, SiteSet, ops};

use crate::ExpertMap;

/// Sums over the tokens that choose an expert, of its output before the gate. Numbered by an [`ExpertMap`].
#[derive(Clone, Debug, PartialEq)]
pub struct OutputStats {
    /// Which experts.
    pub map: ExpertMap,
    /// Tokens that chose the expert.
    pub count: Vec<u64>,
    /// Width of an output.
    width: usize,
    /// Sums of the outputs, `[experts, d]`.
    sum: Vec<f64>,
    /// Sums of the squared norms.
    sum_sq: Vec<f64>,
}

impl OutputStats {
    /// Nothing seen yet; outputs are `width` wide.
    pub fn new(map: ExpertMap, width: usize) -> OutputStats {
        let total = map.total();
        OutputStats { map, count: vec![0; total], width, sum: vec![0.0; total * width], sum_sq: vec![0.0; total] }
    }

    /// Adds an output of expert `unit`.
    fn add(&mut self, unit: usize, output: &[f32]) {
        self.count[unit] += 1;
        let sum = &mut self.sum[unit * self.width..(unit + 1) * self.width];
        for (sum, &x) in sum.iter_mut().zip(output) {
            *sum += f64::from(x);
            self.sum_sq[unit] += f64::from(x) * f64::from(x);
        }
    }

    /// Adds the statistics of other texts of the same model.
    pub fn merge(&mut self, other: &OutputStats) {
        self.count.iter_mut().zip(&other.count).for_each(|(a, b)| *a += b);
        self.sum.iter_mut().zip(&other.sum).for_each(|(a, b)| *a += b);
        self.sum_sq.iter_mut().zip(&other.sum_sq).for_each(|(a, b)| *a += b);
    }

    /// Mean output of expert `unit`; zeros if no token chose it.
    pub fn mean(&self, unit: usize) -> Vec<f64> {
        let n = self.count[unit].max(1) as f64;
        self.sum[unit * self.width..(unit + 1) * self.width].iter().map(|s| s / n).collect()
    }

    /// Unbiased variance of the output of expert `unit`, summed over its coordinates; 0 if fewer than two tokens chose it.
    pub fn variance(&self, unit: usize) -> f64 {
        let n = self.count[unit] as f64;
        if n < 2.0 {
            return 0.0;
        }
        let mean_sq: f64 = self.mean(unit).iter().map(|m| m * m).sum();
        ((self.sum_sq[unit] - n * mean_sq) / (n - 1.0)).max(0.0)
    }
}

/// The observer that fills [`OutputStats`].
pub struct OutputProfiler {
    stats: OutputStats,
}

impl OutputProfiler {
    /// An observer that starts from `stats`.
    pub fn new(stats: OutputStats) -> OutputProfiler {
        OutputProfiler { stats }
    }

    /// What was gathered.
    pub fn into_stats(self) -> OutputStats {
        self.stats
    }
}

impl Lens for OutputProfiler {
    fn sites(&self, layer: usize) -> SiteSet {
        if self.stats.map.moe_index(layer).is_some() { SiteSet::of(&[Site::ExpertOut]) } else { SiteSet::NONE }
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        if let (Site::ExpertOut, Some(moe), Some(routing)) = (at.site, self.stats.map.moe_index(at.layer), at.routing) {
            let start = self.stats.map.range(moe).start;
            let x = ops::values(value)?;
            for (&id, output) in routing.ids.iter().zip(x.chunks_exact(self.stats.width)) {
                if id != NO_EXPERT {
                    self.stats.add(start + id as usize, output);
                }
            }
        }
        Ok(Flow::Continue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_variance_by_hand_and_in_halves() {
        let map = ExpertMap::new(vec![0], vec![2]);
        let mut all = OutputStats::new(map.clone(), 2);
        let outputs = [[1.0, 2.0], [3.0, 2.0], [5.0, 8.0]];
        outputs.iter().for_each(|o| all.add(1, o));
        assert_eq!((all.mean(1), all.mean(0)), (vec![3.0, 4.0], vec![0.0, 0.0]));
        assert!((all.variance(1) - (4.0 + 12.0)).abs() < 1e-12, "(4+0+4)/2 + (4+4+16)/2");
        let mut halves = [OutputStats::new(map.clone(), 2), OutputStats::new(map, 2)];
        outputs.iter().enumerate().for_each(|(i, o)| halves[i % 2].add(1, o));
        let [mut a, b] = halves;
        a.merge(&b);
        assert_eq!(a, all);
        assert_eq!((b.count[1], b.variance(1)), (1, 0.0));
    }
}
