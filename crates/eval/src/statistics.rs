//! Statistics of results: intervals, rank correlations, separations, permutation tests.

use quorate_model::sampling::SplitMix64;

/// Mean; `None` of nothing.
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Standard deviation of a sample (divided by `n - 1`); `None` below two values.
pub fn deviation(values: &[f64]) -> Option<f64> {
    let mean = mean(values).filter(|_| values.len() > 1)?;
    let sum: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    Some((sum / (values.len() - 1) as f64).sqrt())
}

/// Standard error of the mean; `None` below two values.
pub fn standard_error(values: &[f64]) -> Option<f64> {
    deviation(values).map(|d| d / (values.len() as f64).sqrt())
}

/// The value below which a share `q` (0 to 1) of the values lies, linear between neighbours; `None` of nothing.
pub fn quantile(values: &[f64], q: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = q.clamp(0.0, 1.0) * sorted.len().checked_sub(1)? as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    Some(low + (high - low) * at.fract())
}

/// Wilson's interval of a share: `hits` of `n`, at `z` standard deviations (1.96 for 95 %). `(0, 1)` of nothing.
pub fn wilson(hits: f64, n: f64, z: f64) -> (f64, f64) {
    if n <= 0.0 {
        return (0.0, 1.0);
    }
    let (p, z2) = (hits / n, z * z);
    let middle = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = z / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    ((middle - half).max(0.0), (middle + half).min(1.0))
}

/// Ranks from 1, ties sharing their mean.
pub fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    while start < order.len() {
        let same = order[start..].iter().take_while(|&&i| values[i] == values[order[start]]).count();
        let rank = start as f64 + (same as f64 + 1.0) / 2.0;
        order[start..start + same].iter().for_each(|&i| ranks[i] = rank);
        start += same;
    }
    ranks
}

/// Share of pairs in which a positive is above a negative, ties counting half: the area under the ROC curve. `None` if a
/// class is empty.
pub fn auc(positive: &[f64], negative: &[f64]) -> Option<f64> {
    let (p, n) = (positive.len() as f64, negative.len() as f64);
    let all = [positive, negative].concat();
    let sum: f64 = ranks(&all)[..positive.len()].iter().sum();
    (p > 0.0 && n > 0.0).then(|| (sum - p * (p + 1.0) / 2.0) / (p * n))
}

/// Pearson's correlation; `None` below two pairs or without variation.
pub fn pearson(x: &[f64], y: &[f64]) -> Option<f64> {
    let (mx, my) = (mean(x)?, mean(y)?);
    let sum = |f: &dyn Fn(f64, f64) -> f64| x.iter().zip(y).map(|(&x, &y)| f(x - mx, y - my)).sum::<f64>();
    let (xy, xx, yy) = (sum(&|x, y| x * y), sum(&|x, _| x * x), sum(&|_, y| y * y));
    (xx > 0.0 && yy > 0.0).then(|| xy / (xx * yy).sqrt())
}

/// Spearman's rank correlation; `None` below two pairs or without variation.
pub fn spearman(x: &[f64], y: &[f64]) -> Option<f64> {
    pearson(&ranks(x), &ranks(y))
}

/// Kendall's tau of pairs without ties: share of pairs in the same order minus share in the opposite; `None` below two.
pub fn kendall(x: &[f64], y: &[f64]) -> Option<f64> {
    let n = x.len().min(y.len());
    let mut sum = 0.0;
    for i in 0..n {
        for j in 0..i {
            let product = (x[i] - x[j]) * (y[i] - y[j]);
            sum += if product == 0.0 { 0.0 } else { product.signum() };
        }
    }
    (n > 1).then(|| sum / (n * (n - 1) / 2) as f64)
}

/// Share of `times` random orders of `values` whose `statistic` is at least as large as that of the order given, the given
/// one counted in (so never 0).
pub fn permutation_p<T: Clone>(values: &[T], times: usize, seed: u64, statistic: impl Fn(&[T]) -> f64) -> f64 {
    let observed = statistic(values);
    let mut random = SplitMix64::new(seed);
    let mut shuffled = values.to_vec();
    let mut reached = 1;
    for _ in 0..times {
        random.shuffle(&mut shuffled);
        reached += usize::from(statistic(&shuffled) >= observed);
    }
    reached as f64 / (times + 1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: Option<f64>, b: f64) {
        assert!((a.unwrap() - b).abs() < 1e-9, "{a:?} {b}");
    }

    #[test]
    fn simple_numbers() {
        near(mean(&[1.0, 2.0, 6.0]), 3.0);
        near(deviation(&[1.0, 2.0, 6.0]), 7f64.sqrt());
        near(quantile(&[3.0, 1.0, 2.0], 0.25), 1.5);
        assert_eq!((mean(&[]), deviation(&[1.0]), quantile(&[], 0.5)), (None, None, None));
    }

    #[test]
    fn wilson_by_hand() {
        let (low, high) = wilson(8.0, 10.0, 1.96);
        assert!((low - 0.4902).abs() < 1e-4 && (high - 0.9433).abs() < 1e-4, "{low} {high}");
        assert_eq!(wilson(0.0, 0.0, 1.96), (0.0, 1.0));
    }

    #[test]
    fn ranks_share_ties_and_auc_counts_them_half() {
        assert_eq!(ranks(&[5.0, 1.0, 5.0]), [2.5, 1.0, 2.5]);
        near(auc(&[2.0, 3.0], &[1.0, 2.0]), 3.5 / 4.0);
        near(auc(&[1.0], &[1.0]), 0.5);
        assert_eq!(auc(&[], &[1.0]), None);
    }

    #[test]
    fn correlations() {
        near(pearson(&[1.0, 2.0, 3.0], &[2.0, 4.0, 6.0]), 1.0);
        near(spearman(&[1.0, 2.0, 3.0], &[9.0, 4.0, 1.0]), -1.0);
        near(kendall(&[1.0, 2.0, 3.0], &[1.0, 3.0, 2.0]), 1.0 / 3.0);
        assert_eq!(pearson(&[1.0, 1.0], &[1.0, 2.0]), None);
    }

    #[test]
    fn an_order_that_matters_is_rarely_reached_by_chance() {
        let values: Vec<f64> = (0..12).map(f64::from).collect();
        let rising = |v: &[f64]| v.windows(2).filter(|w| w[0] < w[1]).count() as f64;
        assert!(permutation_p(&values, 200, 1, rising) < 0.01);
        assert!((permutation_p(&values, 200, 1, |_| 0.0) - 1.0).abs() < 1e-12);
    }
}
