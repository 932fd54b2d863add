//! Random controls: sets of experts that look like a found set in everything but what it was found for.

use quorate_model::sampling::SplitMix64;

use crate::{ExpertMap, LensError};

/// `sets` random sets of experts, each matched to `target` one by one: for every expert of the target another one of the
/// same layer, drawn from the `window` outside the target whose use is nearest to its own. No set holds an expert twice.
///
/// `counts` is the use of every expert, numbered by `map`, as `target` and the result.
///
/// # Errors
/// A layer with fewer experts outside the target than the target has in it.
pub fn matched_sets(
    map: &ExpertMap,
    counts: &[u64],
    target: &[usize],
    window: usize,
    sets: usize,
    seed: u64,
) -> Result<Vec<Vec<usize>>, LensError> {
    let mut random = SplitMix64::new(seed);
    let mut result = Vec::with_capacity(sets);
    for _ in 0..sets {
        let mut set: Vec<usize> = Vec::with_capacity(target.len());
        for &unit in target {
            let layer = (0..map.n_layers()).map(|m| map.range(m)).find(|r| r.contains(&unit)).unwrap_or(0..0);
            let mut free: Vec<usize> = layer.filter(|u| !target.contains(u) && !set.contains(u)).collect();
            if free.is_empty() {
                return Err(LensError::Select(format!(
                    "no random control for {}: its layer has no expert left outside the set; help: choose fewer experts",
                    map.id(unit)
                )));
            }
            free.sort_by_key(|&u| (counts[u].abs_diff(counts[unit]), u));
            free.truncate(window.max(1));
            set.push(free[random.below(free.len())]);
        }
        result.push(set);
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controls_match_layer_and_use_and_avoid_the_target() {
        let map = ExpertMap::new(vec![0, 1], vec![8, 8]);
        let counts: Vec<u64> = (0..16).map(|u| 10 * (u % 8)).collect();
        let target = [3, 4, 12];
        let sets = matched_sets(&map, &counts, &target, 4, 40, 1).unwrap();
        assert_eq!(sets, matched_sets(&map, &counts, &target, 4, 40, 1).unwrap());
        for set in &sets {
            assert!(set.iter().all(|u| !target.contains(u)) && set[0] != set[1]);
            assert!(set[0] < 8 && set[1] < 8 && set[2] >= 8);
            let far = set.iter().zip(&target).map(|(&a, &b)| counts[a].abs_diff(counts[b])).max().unwrap();
            assert!(far <= 40, "{set:?}");
        }
        assert!(sets.iter().any(|s| s != &sets[0]));
        assert!(matched_sets(&map, &counts, &(0..5).collect::<Vec<_>>(), 2, 1, 0).is_err());
    }
}
