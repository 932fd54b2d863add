//! Formulas on experts: how alike their weights and outputs are, how norm and score of an output go together.

use quorate_eval::statistics::{kendall, pearson};
use quorate_kernels::{dot, norm_sq};
use quorate_residency::Expert;

use crate::assignment::assign;

/// The matrices of an expert, in the order of [`neurons`].
pub const MATRICES: [&str; 3] = ["gate", "up", "down"];

/// Neurons of an expert, `[I, d]` for each of gate, up, and down (transposed), so that row `n` of each is neuron `n`.
pub fn neurons(expert: &Expert) -> [Vec<f32>; 3] {
    let (d, inner) = (expert.down.rows, expert.down.cols);
    let down = expert.down.to_f32();
    let mut transposed = vec![0.0; inner * d];
    for (i, row) in down.chunks_exact(inner).enumerate() {
        row.iter().enumerate().for_each(|(n, &v)| transposed[n * d + i] = v);
    }
    [expert.gate.to_f32(), expert.up.to_f32(), transposed]
}

/// Mean of the rows of `matrix [I, d]`.
pub fn mean_row(matrix: &[f32], d: usize) -> Vec<f32> {
    let mut sum = vec![0f64; d];
    for row in matrix.chunks_exact(d) {
        sum.iter_mut().zip(row).for_each(|(s, &v)| *s += f64::from(v));
    }
    let rows = (matrix.len() / d).max(1) as f64;
    sum.iter().map(|s| (s / rows) as f32).collect()
}

/// Inner product, in pieces of `d` whose sums are kept in f64.
fn inner(a: &[f32], b: &[f32], d: usize) -> f64 {
    a.chunks(d).zip(b.chunks(d)).map(|(a, b)| f64::from(dot(a, b))).sum()
}

/// Cosine of two vectors; 0 if one is zero.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    const PIECE: usize = 4096;
    let norms = (inner(a, a, PIECE) * inner(b, b, PIECE)).sqrt();
    if norms > 0.0 { (inner(a, b, PIECE) / norms).clamp(-1.0, 1.0) } else { 0.0 }
}

/// `1 - arccos(cosine) / pi`: 1 same direction, 0.5 orthogonal, 0 opposite.
pub fn angular(cosine: f64) -> f64 {
    1.0 - cosine.clamp(-1.0, 1.0).acos() / std::f64::consts::PI
}

/// Rows scaled to norm 1; a zero row stays.
pub fn unit_rows(matrix: &[f32], d: usize) -> Vec<f32> {
    let mut rows = matrix.to_vec();
    for row in rows.chunks_exact_mut(d) {
        let norm = norm_sq(row).sqrt();
        if norm > 0.0 {
            row.iter_mut().for_each(|v| *v /= norm);
        }
    }
    rows
}

/// A matrix of another expert, its neurons in the order of this one's.
#[derive(Clone, Debug, PartialEq)]
pub struct Reordered {
    /// For each neuron of the one the neuron of the other: the assignment with the largest sum of cosines.
    pub order: Vec<usize>,
    /// Cosine of the flattened matrices after that.
    pub cosine: f64,
    /// Kendall's tau of the order against 0, 1, 2, ..; `None` of a single neuron.
    pub tau: Option<f64>,
}

/// Brings the rows of `b [I, d]` in the order that makes them most like those of `a`.
pub fn reorder(a: &[f32], b: &[f32], d: usize) -> Reordered {
    let (ua, ub) = (unit_rows(a, d), unit_rows(b, d));
    let n = a.len() / d;
    let mut likeness = Vec::with_capacity(n * n);
    for row in ua.chunks_exact(d) {
        likeness.extend(ub.chunks_exact(d).map(|other| dot(row, other)));
    }
    let order = assign(n, &likeness);
    let ordered: Vec<f32> = order.iter().flat_map(|&o| &b[o * d..(o + 1) * d]).copied().collect();
    let (places, found): (Vec<f64>, Vec<f64>) = order.iter().enumerate().map(|(i, &o)| (i as f64, o as f64)).unzip();
    Reordered { cosine: cosine(a, &ordered), tau: kendall(&places, &found), order }
}

/// Cosines of all pairs of rows, lower triangle: (1, 0), (2, 0), (2, 1), ..
pub fn pair_cosines(rows: &[f32], d: usize) -> Vec<f64> {
    let rows: Vec<&[f32]> = rows.chunks_exact(d).collect();
    (0..rows.len()).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| cosine(rows[i], rows[j])).collect()
}

/// `r^2` of the linear regression of one list on the other; `None` without variation.
pub fn r_squared(x: &[f64], y: &[f64]) -> Option<f64> {
    pearson(x, y).map(|r| r * r)
}

/// Place of each value in descending order, from 0; of equal values the first is better.
pub fn places(values: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
    let mut places = vec![0; values.len()];
    order.into_iter().enumerate().for_each(|(place, i)| places[i] = place);
    places
}

/// Counts of (place by norm, place by score) over tokens, `R [E, E]`.
#[derive(Clone, Debug, PartialEq)]
pub struct RankCounts {
    experts: usize,
    /// `[E, E]`, norm first.
    pub counts: Vec<u64>,
    /// For each token the share of its experts that have the same place by norm and by score.
    pub diagonal: Vec<f64>,
    /// For each token the share of its `k` best by score that are among its `k` largest by norm.
    pub top_shared: Vec<f64>,
}

impl RankCounts {
    /// No tokens, of `experts` experts.
    pub fn new(experts: usize) -> RankCounts {
        RankCounts { experts, counts: vec![0; experts * experts], diagonal: Vec::new(), top_shared: Vec::new() }
    }

    /// Adds a token: norms and scores (or logits) of all experts.
    pub fn add(&mut self, norms: &[f32], scores: &[f32], k: usize) {
        let (by_norm, by_score) = (places(norms), places(scores));
        let pairs = || by_norm.iter().zip(&by_score);
        pairs().for_each(|(&n, &s)| self.counts[n * self.experts + s] += 1);
        let same = pairs().filter(|(n, s)| n == s).count();
        self.diagonal.push(same as f64 / self.experts as f64);
        let both = pairs().filter(|&(&n, &s)| n < k && s < k).count();
        self.top_shared.push(both as f64 / k.max(1) as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_eval::statistics::{mean, standard_error};
    use quorate_model::sampling::SplitMix64;
    use quorate_residency::Matrix;

    fn noise(random: &mut SplitMix64, n: usize) -> Vec<f32> {
        (0..n).map(|_| random.unit() as f32 * 2.0 - 1.0).collect()
    }

    #[test]
    fn a_copy_with_permuted_neurons_is_found_again() {
        let (inner, d, mut random) = (48, 64, SplitMix64::new(1));
        let a = noise(&mut random, inner * d);
        let mut planted: Vec<usize> = (0..inner).collect();
        random.shuffle(&mut planted);
        // Neuron n of the copy is neuron planted[n] of the original, so original neuron o is found at planted^-1.
        let b: Vec<f32> = planted.iter().flat_map(|&o| &a[o * d..(o + 1) * d]).copied().collect();
        assert!(cosine(&a, &b).abs() < 0.1, "{}", cosine(&a, &b));
        let found = reorder(&a, &b, d);
        assert!((0..inner).all(|n| planted[found.order[n]] == n));
        assert!((found.cosine - 1.0).abs() < 1e-6, "{}", found.cosine);
        let places: Vec<f64> = (0..inner).map(|i| i as f64).collect();
        let inverse: Vec<f64> = (0..inner).map(|n| planted.iter().position(|&p| p == n).unwrap() as f64).collect();
        assert_eq!(found.tau, kendall(&places, &inverse));
        assert_eq!(reorder(&a, &a, d).tau, Some(1.0));
        // Unrelated matrices gain a little by any search for likeness, and no more.
        let other = reorder(&a, &noise(&mut random, inner * d), d);
        assert!(other.cosine > 0.1 && other.cosine < 0.4 && other.tau.unwrap().abs() < 0.3, "{other:?}");
    }

    #[test]
    fn neurons_are_rows_of_all_three_matrices() {
        let matrix = |rows, cols, v: &[f32]| Matrix::from_f32(rows, cols, v).unwrap();
        let expert = Expert {
            gate: matrix(2, 3, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
            up: matrix(2, 3, &[0.0; 6]),
            down: matrix(3, 2, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        };
        let [gate, _, down] = neurons(&expert);
        assert_eq!(gate, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(down, [1.0, 3.0, 5.0, 2.0, 4.0, 6.0]);
        assert_eq!(mean_row(&down, 3), [1.5, 3.5, 5.5]);
    }

    #[test]
    fn angles_by_hand() {
        for (a, b, wanted) in
            [([1.0, 0.0], [3.0, 0.0], 1.0), ([1.0, 0.0], [0.0, 2.0], 0.5), ([1.0, 1.0], [1.0, 0.0], 0.75)]
        {
            assert!((angular(cosine(&a, &b)) - wanted).abs() < 1e-6);
        }
        assert!((angular(cosine(&[1.0, 2.0], &[-1.0, -2.0]))).abs() < 1e-6);
        assert_eq!(cosine(&[0.0, 0.0], &[1.0, 0.0]), 0.0);
        assert!((r_squared(&[1.0, 2.0, 3.0], &[6.0, 4.0, 2.0]).unwrap() - 1.0).abs() < 1e-12);
        assert_eq!(pair_cosines(&[1.0, 0.0, 0.0, 1.0, 1.0, 0.0], 2), [0.0, 1.0, 0.0]);
    }

    #[test]
    fn ranks_by_hand_and_chance() {
        assert_eq!(places(&[0.5, 2.0, 2.0, -1.0]), [2, 0, 1, 3]);
        let mut same = RankCounts::new(4);
        same.add(&[4.0, 3.0, 2.0, 1.0], &[0.4, 0.3, 0.2, 0.1], 2);
        same.add(&[4.0, 3.0, 2.0, 1.0], &[0.1, 0.2, 0.4, 0.3], 2);
        assert_eq!((same.diagonal.as_slice(), same.top_shared.as_slice()), (&[1.0, 0.0][..], &[1.0, 0.0][..]));
        assert_eq!(same.counts.iter().sum::<u64>(), 8);
        // Norms and scores that know nothing of each other: diagonal 1/E, shared k/E.
        let (mut chance, mut random) = (RankCounts::new(16), SplitMix64::new(2));
        for _ in 0..2000 {
            chance.add(&noise(&mut random, 16), &noise(&mut random, 16), 4);
        }
        for (values, wanted) in [(&chance.diagonal, 1.0 / 16.0), (&chance.top_shared, 0.25)] {
            let (found, error) = (mean(values).unwrap(), standard_error(values).unwrap());
            assert!((found - wanted).abs() < 3.0 * error, "{found} {wanted} {error}");
        }
    }
}
