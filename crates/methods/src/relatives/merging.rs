//! Merging experts: groups, the alignment of neurons, the weighted mean.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use pathfinding::kuhn_munkres::kuhn_munkres;
use pathfinding::matrix::Matrix as Table;
use quorate_kernels::dot;
use quorate_lens::ExpertId;
use quorate_model::Model;
use quorate_residency::{Expert, Matrix};

use crate::MethodError;

/// M-SMoE's groups: every expert joins the most similar leader. Each group begins with its leader; ties go to the earlier
/// leader.
pub fn groups_around(leaders: &[usize], experts: usize, similarity: impl Fn(usize, usize) -> f64) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = leaders.iter().map(|&l| vec![l]).collect();
    for expert in (0..experts).filter(|e| !leaders.contains(e)) {
        let near = |&a: &usize, &b: &usize| {
            let order = similarity(leaders[a], expert).total_cmp(&similarity(leaders[b], expert));
            order.then(b.cmp(&a))
        };
        if let Some(nearest) = (0..leaders.len()).max_by(near) {
            groups[nearest].push(expert);
        }
    }
    groups
}

/// REAM's groups: the first leader takes the experts most similar to it until its group has `size`, then the next one.
///
/// # Errors
/// Groups too small to hold all experts.
pub fn pseudo_groups(
    leaders: &[usize],
    experts: usize,
    size: usize,
    similarity: impl Fn(usize, usize) -> f64,
) -> Result<Vec<Vec<usize>>, MethodError> {
    if leaders.len().saturating_mul(size) < experts {
        let what = format!("{} groups of {size} do not hold {experts} experts", leaders.len());
        return Err(MethodError::needs(what, "give a larger --group-size or --keep"));
    }
    let mut free: Vec<usize> = (0..experts).filter(|e| !leaders.contains(e)).collect();
    let mut groups = Vec::with_capacity(leaders.len());
    for &leader in leaders {
        free.sort_by(|&a, &b| similarity(leader, b).total_cmp(&similarity(leader, a)).then(a.cmp(&b)));
        let mut group = vec![leader];
        group.extend(free.drain(..free.len().min(size.saturating_sub(1))));
        groups.push(group);
    }
    Ok(groups)
}

/// HC-SMoE's groups: the two clusters of least mean distance between their members are joined until `count` remain. Groups
/// are ascending, by their first member.
pub fn average_linkage(experts: usize, count: usize, distance: impl Fn(usize, usize) -> f64) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = (0..experts).map(|e| vec![e]).collect();
    while groups.len() > count.max(1) {
        let mean = |a: &[usize], b: &[usize]| {
            let sum: f64 = a.iter().flat_map(|&i| b.iter().map(move |&j| (i, j))).map(|(i, j)| distance(i, j)).sum();
            sum / (a.len() * b.len()) as f64
        };
        let mut nearest = (0, 1, f64::INFINITY);
        for i in 0..groups.len() {
            for j in i + 1..groups.len() {
                let found = mean(&groups[i], &groups[j]);
                if found < nearest.2 {
                    nearest = (i, j, found);
                }
            }
        }
        let joined = groups.remove(nearest.1);
        groups[nearest.0].extend(joined);
        groups[nearest.0].sort_unstable();
    }
    groups
}

/// An expert's weights in f32: gate and up `[I, d]`, down transposed to `[I, d]`, so that row `n` of each is neuron `n`.
#[derive(Clone, Debug, PartialEq)]
struct Neurons {
    width: usize,
    rows: [Vec<f32>; 3],
}

impl Neurons {
    fn of(expert: &Expert) -> Neurons {
        let (d, inner) = (expert.down.rows, expert.down.cols);
        let down = expert.down.to_f32();
        let transposed = (0..inner * d).map(|i| down[(i % d) * inner + i / d]).collect();
        Neurons { width: d, rows: [expert.gate.to_f32(), expert.up.to_f32(), transposed] }
    }

    fn count(&self) -> usize {
        self.rows[0].len() / self.width
    }

    fn row(&self, matrix: usize, neuron: usize) -> &[f32] {
        &self.rows[matrix][neuron * self.width..(neuron + 1) * self.width]
    }

    fn likeness(&self, neuron: usize, other: &Neurons, theirs: usize) -> f64 {
        (0..3).map(|m| f64::from(dot(self.row(m, neuron), other.row(m, theirs)))).sum()
    }
}

/// For each neuron of `to` the neuron of `expert` that takes its place: the assignment with the largest sum of inner
/// products over gate, up and down weights (Hungarian method).
pub fn aligned(to: &Expert, expert: &Expert) -> Vec<usize> {
    let (a, b) = (Neurons::of(to), Neurons::of(expert));
    let n = a.count();
    let likeness: Vec<f64> = (0..n * n).map(|i| a.likeness(i / n, &b, i % n)).collect();
    let largest = likeness.iter().fold(f64::MIN_POSITIVE, |m, v| m.max(v.abs()));
    // Whole numbers, so that sums are exact: 2^40 for the largest leaves room for sums over 2^22 neurons.
    let scale = (1u64 << 40) as f64 / largest;
    let weights = Table::from_fn(n, n, |(i, j)| (likeness[i * n + j] * scale).round() as i64);
    kuhn_munkres(&weights).1
}

/// Permutations of neurons that were found, since the search is the costly part of a merge.
#[derive(Clone, Debug, Default)]
pub struct Aligner {
    found: HashMap<(usize, usize, usize), Vec<usize>>,
}

impl Aligner {
    /// The permutation that brings an expert's neurons in the order of another one of its layer; see [`aligned`].
    ///
    /// # Errors
    /// Experts that are not in memory.
    pub fn get(&mut self, model: &Model, to: ExpertId, expert: usize) -> Result<&[usize], MethodError> {
        let key = (to.layer, to.expert, expert);
        Ok(match self.found.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let (a, b) = (model.expert_weights(to.layer, to.expert)?, model.expert_weights(to.layer, expert)?);
                place.insert(aligned(a, b))
            }
        })
    }
}

/// The weighted mean of experts, the neurons of each in the order that its permutation says. Weights that are all zero
/// count alike.
///
/// # Errors
/// Experts of different shapes, or no memory.
pub fn merged(parts: &[(&Expert, Vec<usize>, f64)]) -> Result<Expert, MethodError> {
    let Some((first, ..)) = parts.first() else {
        return Err(MethodError::needs("there are no experts to merge", "give each group one at least"));
    };
    let shape = |e: &Expert| (e.gate.rows, e.gate.cols, e.up.rows, e.up.cols, e.down.rows, e.down.cols);
    if parts.iter().any(|(e, order, _)| shape(e) != shape(first) || order.len() != first.gate.rows) {
        return Err(MethodError::needs("experts of different shapes cannot be merged", "merge experts of one layer"));
    }
    let total: f64 = parts.iter().map(|p| p.2).sum();
    let share = |weight: f64| if total > 0.0 { weight / total } else { 1.0 / parts.len() as f64 };
    let (inner, d) = (first.gate.rows, first.gate.cols);
    let mut sums = [vec![0f64; inner * d], vec![0f64; inner * d], vec![0f64; inner * d]];
    for (expert, order, weight) in parts {
        let (neurons, share) = (Neurons::of(expert), share(*weight));
        for (matrix, sum) in sums.iter_mut().enumerate() {
            for (row, &from) in sum.chunks_exact_mut(d).zip(order) {
                row.iter_mut().zip(neurons.row(matrix, from)).for_each(|(s, &w)| *s += share * f64::from(w));
            }
        }
    }
    let [gate, up, down] = sums.map(|sum| sum.into_iter().map(|v| v as f32).collect::<Vec<f32>>());
    let down: Vec<f32> = (0..d * inner).map(|i| down[(i % inner) * d + i / inner]).collect();
    Ok(Expert {
        gate: Matrix::from_f32(inner, d, &gate)?,
        up: Matrix::from_f32(inner, d, &up)?,
        down: Matrix::from_f32(d, inner, &down)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_model::sampling::SplitMix64;

    fn expert(seed: u64, inner: usize, d: usize) -> Expert {
        let mut random = SplitMix64::new(seed);
        let mut matrix = |rows, cols| {
            let values: Vec<f32> = (0..rows * cols).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect();
            Matrix::from_f32(rows, cols, &values).unwrap()
        };
        Expert { gate: matrix(inner, d), up: matrix(inner, d), down: matrix(d, inner) }
    }

    fn permuted(e: &Expert, order: &[usize]) -> Expert {
        merged(&[(e, order.to_vec(), 1.0)]).unwrap()
    }

    fn same(a: &Expert, b: &Expert) -> bool {
        [(&a.gate, &b.gate), (&a.up, &b.up), (&a.down, &b.down)].iter().all(|(a, b)| a.to_f32() == b.to_f32())
    }

    #[test]
    fn a_known_permutation_is_found_and_merged_away() {
        let (inner, d) = (12, 7);
        let a = expert(1, inner, d);
        let order: Vec<usize> = (0..inner).map(|i| (5 * i + 3) % inner).collect();
        let b = permuted(&a, &order);
        assert!(!same(&a, &b));
        let found = aligned(&a, &b);
        assert!((0..inner).all(|n| order[found[n]] == n), "{found:?}");
        let identity: Vec<usize> = (0..inner).collect();
        let both = merged(&[(&a, identity.clone(), 3.0), (&b, found, 1.7)]).unwrap();
        assert!(same(&a, &both), "equal up to the order of neurons: the merge is the expert itself, bit for bit");
        let unaligned = merged(&[(&a, identity.clone(), 3.0), (&b, identity, 1.7)]).unwrap();
        assert!(!same(&a, &unaligned));
        assert!(merged(&[(&a, vec![0; 3], 1.0)]).is_err() && merged(&[]).is_err());
    }

    #[test]
    fn weights_are_shares_by_hand() {
        let (a, b) = (expert(1, 2, 2), expert(2, 2, 2));
        let mean = merged(&[(&a, vec![0, 1], 3.0), (&b, vec![1, 0], 1.0)]).unwrap();
        let (ga, gb) = (a.gate.to_f32(), b.gate.to_f32());
        let (da, db) = (a.down.to_f32(), b.down.to_f32());
        assert!((mean.gate.to_f32()[0] - (0.75 * ga[0] + 0.25 * gb[2])).abs() < 1e-7, "row 0 and row 1");
        assert!((mean.down.to_f32()[0] - (0.75 * da[0] + 0.25 * db[1])).abs() < 1e-7, "column 0 and column 1");
        let equal = merged(&[(&a, vec![0, 1], 0.0), (&b, vec![0, 1], 0.0)]).unwrap();
        assert!((equal.up.to_f32()[3] - 0.5 * (a.up.to_f32()[3] + b.up.to_f32()[3])).abs() < 1e-7);
    }

    #[test]
    fn groups_by_hand() {
        let place = [0.0, 1.0, 2.1, 10.0, 10.5, 30.0f64];
        let near = |i: usize, j: usize| -(place[i] - place[j]).abs();
        assert_eq!(groups_around(&[3, 1], 6, near), [vec![3, 4, 5], vec![1, 0, 2]]);
        assert_eq!(pseudo_groups(&[3, 1], 6, 4, near).unwrap(), [vec![3, 4, 2, 0], vec![1, 5]]);
        assert!(pseudo_groups(&[3, 1], 6, 2, near).is_err());
        let far = |i: usize, j: usize| (place[i] - place[j]).abs();
        assert_eq!(average_linkage(6, 3, far), [vec![0, 1, 2], vec![3, 4], vec![5]]);
        assert_eq!(average_linkage(6, 1, far), [vec![0, 1, 2, 3, 4, 5]]);
        assert_eq!(average_linkage(6, 6, far).len(), 6);
        // Average, not single linkage: 2.1 joins 0 and 1 (mean 1.6) rather than 3.5 (1.4) would chain on; by hand:
        let place = [0.0, 1.0, 2.6, 4.4f64];
        let far = |i: usize, j: usize| (place[i] - place[j]).abs();
        assert_eq!(average_linkage(4, 2, far), [vec![0, 1], vec![2, 3]]);
    }
}
