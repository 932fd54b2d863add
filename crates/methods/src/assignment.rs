//! Assignments one to one: which of `n` things goes with which of `n` others.

use pathfinding::kuhn_munkres::kuhn_munkres;
use pathfinding::matrix::Matrix as Weights;

/// For each row of `likeness [n, n]` the column that goes with it, such that the sum is the largest possible (Hungarian
/// method, `n^3`).
///
/// Numbers are rounded to 2^-40 of the largest, so that sums are exact.
///
/// # Panics
/// If there are not `n * n` numbers, or one is not finite.
pub fn assign(n: usize, likeness: &[f32]) -> Vec<usize> {
    assert_eq!(likeness.len(), n * n, "likeness of {n} with {n}");
    assert!(likeness.iter().all(|v| v.is_finite()), "likeness is finite");
    if n == 0 {
        return Vec::new();
    }
    let largest = likeness.iter().fold(f64::MIN_POSITIVE, |m, v| m.max(f64::from(v.abs())));
    // 2^40 for the largest leaves room for sums over 2^22 rows.
    let scale = (1u64 << 40) as f64 / largest;
    let weights = Weights::from_fn(n, n, |(i, j)| (f64::from(likeness[i * n + j]) * scale).round() as i64);
    kuhn_munkres(&weights).1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_counts_and_not_the_best_of_each_row() {
        // Each row likes column 0 best; greedily the sum is 9 + 1 + 2, at best 7 + 8 + 2.
        assert_eq!(assign(3, &[9.0, 8.0, 1.0, 7.0, 1.0, 0.0, 3.0, 2.9, 2.0]), [1, 0, 2]);
        assert_eq!(assign(2, &[-1.0, -5.0, -1.0, -2.0]), [0, 1]);
        assert!(assign(0, &[]).is_empty());
        assert_eq!(assign(2, &[0.0; 4]).len(), 2);
    }
}
