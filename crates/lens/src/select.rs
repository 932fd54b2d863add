//! From scores to the experts that are kept.

use quorate_formats::spec::ModelSpec;

use crate::{ExpertMap, LensError, ScoreTable};

/// How many experts to keep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Keep {
    /// So many in every layer.
    PerLayer(usize),
    /// So many in all layers together.
    Total(usize),
    /// In every layer the fewest that hold this share of the layer's positive scores, whatever the scope.
    Share(f64),
}

impl Keep {
    /// `k` experts in every layer, or as many on average if layers compete.
    ///
    /// # Errors
    /// Fewer than a token uses, or more than a layer has.
    pub fn per_layer(spec: &ModelSpec, scope: Scope, k: usize) -> Result<Keep, LensError> {
        let layers: Vec<_> = spec.moe_layers().into_iter().filter_map(|l| spec.moe(l)).collect();
        let least = layers.iter().map(|m| m.top_k).max().unwrap_or(0);
        let most = layers.iter().map(|m| m.n_experts).min().unwrap_or(0);
        if !(least..=most).contains(&k) {
            return Err(LensError::Select(format!(
                "cannot keep {k} experts per layer: a token uses {least} and a layer has {most}; help: --keep {least} to --keep {most}"
            )));
        }
        Ok(if scope == Scope::Local { Keep::PerLayer(k) } else { Keep::Total(k * layers.len()) })
    }
}

/// How the places are shared between layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// Every layer keeps the same number.
    #[default]
    Local,
    /// The best of the whole model, scores compared as they are.
    Global,
    /// The best of the whole model, each score divided by the sum of its layer's positive scores.
    GlobalShare,
    /// Every layer keeps the same share of its positive scores, as large as the places allow.
    EqualShare,
}

impl Scope {
    /// All of them.
    pub const ALL: [Scope; 4] = [Scope::Local, Scope::Global, Scope::GlobalShare, Scope::EqualShare];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Scope::Local => "local",
            Scope::Global => "global",
            Scope::GlobalShare => "global-share",
            Scope::EqualShare => "equal-share",
        }
    }
}

/// What to keep besides the best.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// How the places are shared between layers.
    pub scope: Scope,
    /// Experts `(MoE layer, expert)` that are kept whatever their score; they count towards the number.
    pub protect: Vec<(usize, usize)>,
    /// Fewest experts of each MoE layer: its `top_k`.
    pub floor: Vec<usize>,
    /// Groups of consecutive experts in each layer that keep equally many; 0 and 1 are none.
    pub groups: usize,
}

impl Selection {
    /// The kept experts of every MoE layer, ascending.
    ///
    /// # Errors
    /// Fewer places than the floors and the protected experts need, more than there are experts, or a protected expert
    /// that does not exist.
    pub fn select(&self, scores: &ScoreTable, keep: Keep) -> Result<Vec<Vec<usize>>, LensError> {
        let map = &scores.map;
        let mut protected = vec![Vec::new(); map.n_layers()];
        for &(moe, expert) in &self.protect {
            if map.experts.get(moe).is_none_or(|&e| expert >= e) {
                let (layer, experts) = (map.layers.get(moe).unwrap_or(&moe), map.experts.get(moe).unwrap_or(&0));
                return Err(LensError::Select(format!(
                    "expert {expert} of layer {layer} cannot be protected; help: the layer has {experts}, from 0"
                )));
            }
            if !protected[moe].contains(&expert) {
                protected[moe].push(expert);
            }
        }
        let counts = match (self.scope, keep) {
            (_, Keep::Share(p)) => self.cover(scores, &protected, p)?,
            (Scope::Local, Keep::PerLayer(k)) => vec![k; map.n_layers()],
            (Scope::Local, Keep::Total(total)) => spread(total, map.n_layers()),
            (_, Keep::PerLayer(k)) => self.share(scores, &protected, k * map.n_layers())?,
            (_, Keep::Total(total)) => self.share(scores, &protected, total)?,
        };
        let mut kept = Vec::with_capacity(map.n_layers());
        for (moe, &count) in counts.iter().enumerate() {
            let (floor, experts) = (self.floor[moe].max(protected[moe].len()), map.experts[moe]);
            if count < floor || count > experts {
                return Err(LensError::Select(format!(
                    "cannot keep {count} experts in layer {}: it has {experts} and needs at least {floor}; help: keep between {floor} and {experts}",
                    map.layers[moe]
                )));
            }
            let order = order(scores, moe, &protected[moe]);
            let mut layer = if self.groups > 1 { self.of_groups(map, moe, &order, count)? } else { order };
            layer.truncate(count);
            layer.sort_unstable();
            kept.push(layer);
        }
        Ok(kept)
    }

    /// The first experts of that order, equally many of each group.
    fn of_groups(&self, map: &ExpertMap, moe: usize, order: &[usize], count: usize) -> Result<Vec<usize>, LensError> {
        let (groups, experts) = (self.groups, map.experts[moe]);
        if !experts.is_multiple_of(groups) || !count.is_multiple_of(groups) {
            return Err(LensError::Select(format!(
                "cannot keep {count} experts in layer {}: its router chooses among {groups} groups of experts, which must keep equally many; help: keep a multiple of {groups}",
                map.layers[moe]
            )));
        }
        let (size, each) = (experts / groups, count / groups);
        let of_group = |g: usize| order.iter().copied().filter(move |e| e / size == g).take(each);
        Ok((0..groups).flat_map(of_group).collect())
    }

    /// The fewest experts of each layer.
    fn floors(&self, map: &ExpertMap, protected: &[Vec<usize>]) -> Vec<usize> {
        (0..map.n_layers()).map(|m| self.floor[m].max(protected[m].len()).min(map.experts[m])).collect()
    }

    /// The fewest experts of each layer that hold the share `p` of its positive scores.
    fn cover(&self, scores: &ScoreTable, protected: &[Vec<usize>], p: f64) -> Result<Vec<usize>, LensError> {
        if !(0.0..=1.0).contains(&p) {
            return Err(LensError::Select(format!("cannot keep the share {p} of the scores; help: a share is 0 to 1")));
        }
        let mut counts = self.floors(&scores.map, protected);
        for (moe, count) in counts.iter_mut().enumerate() {
            let covered = covered(scores, moe, &protected[moe]);
            // A sum of shares falls short of 1 by rounding.
            *count = (*count).max(covered.iter().position(|&c| c >= p - 1e-12).unwrap_or(covered.len() - 1));
        }
        Ok(counts)
    }

    /// How many experts each layer keeps when all compete: first the floors, then the best of the rest; or, for equal
    /// shares, always the next of the layer that has least.
    fn share(&self, scores: &ScoreTable, protected: &[Vec<usize>], total: usize) -> Result<Vec<usize>, LensError> {
        let map = &scores.map;
        let mut counts = self.floors(map, protected);
        let least: usize = counts.iter().sum();
        if total < least || total > map.total() {
            return Err(LensError::Select(format!(
                "cannot keep {total} experts in all layers together; help: keep between {least} (what the layers need at least) and {}",
                map.total()
            )));
        }
        if self.scope == Scope::EqualShare {
            let covered: Vec<Vec<f64>> = (0..map.n_layers()).map(|m| covered(scores, m, &protected[m])).collect();
            for _ in least..total {
                let open = (0..map.n_layers()).filter(|&m| counts[m] < map.experts[m]);
                let Some(moe) = open.min_by(|&a, &b| covered[a][counts[a]].total_cmp(&covered[b][counts[b]])) else {
                    break;
                };
                counts[moe] += 1;
            }
            return Ok(counts);
        }
        let scaled = self.scaled(scores);
        let mut rest: Vec<(usize, usize)> = Vec::new(); // (layer, unit), beyond each layer's floor
        for (moe, &count) in counts.iter().enumerate() {
            let start = map.range(moe).start;
            let ranking = scores.ranking(moe).into_iter().filter(|e| !protected[moe].contains(e));
            rest.extend(ranking.skip(count - protected[moe].len()).map(|e| (moe, start + e)));
        }
        rest.sort_by(|a, b| scaled[b.1].total_cmp(&scaled[a.1]).then_with(|| scores.compare(a.1, b.1)));
        rest.iter().take(total - least).for_each(|&(moe, _)| counts[moe] += 1);
        Ok(counts)
    }

    fn scaled(&self, scores: &ScoreTable) -> Vec<f64> {
        let mut scaled = scores.values.clone();
        if self.scope == Scope::GlobalShare {
            for moe in 0..scores.map.n_layers() {
                let layer = &mut scaled[scores.map.range(moe)];
                let sum: f64 = layer.iter().filter(|v| **v > 0.0).sum();
                layer.iter_mut().for_each(|v| *v /= sum.max(f64::MIN_POSITIVE));
            }
        }
        scaled
    }
}

/// Experts of a layer in the order in which they are kept: the protected, then the best.
fn order(scores: &ScoreTable, moe: usize, protected: &[usize]) -> Vec<usize> {
    let rest = scores.ranking(moe).into_iter().filter(|e| !protected.contains(e));
    protected.iter().copied().chain(rest).collect()
}

/// The share of a layer's positive scores that its first 0, 1, 2, .. experts in that order hold; 1 if there are none.
fn covered(scores: &ScoreTable, moe: usize, protected: &[usize]) -> Vec<f64> {
    let values = &scores.values[scores.map.range(moe)];
    let sum: f64 = values.iter().filter(|v| **v > 0.0).sum();
    let mut held = 0.0;
    let mut covered = vec![if sum > 0.0 { 0.0 } else { 1.0 }];
    for expert in order(scores, moe, protected) {
        held += values[expert].max(0.0);
        covered.push(if sum > 0.0 { held / sum } else { 1.0 });
    }
    covered
}

/// `total` places shared evenly, the first layers getting what is left over.
fn spread(total: usize, layers: usize) -> Vec<usize> {
    (0..layers).map(|l| total / layers + usize::from(l < total % layers)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MetricInfo;

    fn table(values: &[f64]) -> ScoreTable {
        ScoreTable {
            map: ExpertMap::new(vec![0, 2], vec![4, 4]),
            metric: MetricInfo { name: "m".into(), gauge_dependent: false },
            values: values.to_vec(),
            counts: vec![0; 8],
        }
    }

    #[test]
    fn local_global_and_protected() {
        let t = table(&[0.1, 0.9, 0.8, 0.7, 0.2, 0.1, 0.05, 0.0]);
        let mut s = Selection { floor: vec![1, 1], ..Selection::default() };
        assert_eq!(s.select(&t, Keep::PerLayer(2)).unwrap(), [vec![1, 2], vec![0, 1]]);
        assert_eq!(s.select(&t, Keep::Total(5)).unwrap(), [vec![1, 2, 3], vec![0, 1]]);
        s.protect = vec![(0, 0)];
        assert_eq!(s.select(&t, Keep::PerLayer(2)).unwrap(), [vec![0, 1], vec![0, 1]]);
        s.scope = Scope::Global;
        assert_eq!(s.select(&t, Keep::PerLayer(2)).unwrap(), [vec![0, 1, 2], vec![0]]);
        s.protect.clear();
        s.scope = Scope::GlobalShare; // shares .04 .36 .32 .28 | .57 .29 .14 0
        assert_eq!(s.select(&t, Keep::PerLayer(2)).unwrap(), [vec![1, 2], vec![0, 1]]);
    }

    /// ESFT's rule by hand: shares of layer 0 are .4 .3 .2 .1, of layer 1 .9 .1 0 0.
    #[test]
    fn shares_are_covered_by_the_fewest() {
        let t = table(&[2.0, 4.0, 3.0, 1.0, 0.9, 0.1, 0.0, -5.0]);
        let mut s = Selection { floor: vec![1, 1], ..Selection::default() };
        assert_eq!(s.select(&t, Keep::Share(0.7)).unwrap(), [vec![1, 2], vec![0]]);
        assert_eq!(s.select(&t, Keep::Share(0.71)).unwrap(), [vec![0, 1, 2], vec![0]]);
        assert_eq!(s.select(&t, Keep::Share(1.0)).unwrap(), [vec![0, 1, 2, 3], vec![0, 1]]);
        assert_eq!(s.select(&t, Keep::Share(0.0)).unwrap(), [vec![1], vec![0]], "the floor stays");
        assert!(s.select(&t, Keep::Share(1.5)).is_err());
        s.scope = Scope::EqualShare;
        assert_eq!(s.select(&t, Keep::Total(4)).unwrap(), [vec![0, 1, 2], vec![0]]);
        assert_eq!(s.select(&t, Keep::Total(8)).unwrap().concat().len(), 8);
        s.protect = vec![(0, 3)];
        assert_eq!(s.select(&t, Keep::Total(3)).unwrap(), [vec![1, 3], vec![0]], "the protected one counts");
    }

    #[test]
    fn groups_keep_equally_many() {
        let t = table(&[0.1, 0.2, 0.8, 0.7, 0.2, 0.1, 0.05, 0.0]);
        let mut s = Selection { floor: vec![1, 1], groups: 2, ..Selection::default() };
        assert_eq!(s.select(&t, Keep::PerLayer(2)).unwrap(), [vec![1, 2], vec![0, 2]]);
        s.protect = vec![(0, 0)];
        assert_eq!(s.select(&t, Keep::PerLayer(2)).unwrap(), [vec![0, 2], vec![0, 2]]);
        let error = s.select(&t, Keep::PerLayer(3)).unwrap_err().to_string();
        assert!(error.contains("cannot keep 3 experts in layer 0") && error.contains("a multiple of 2"), "{error}");
    }

    #[test]
    fn impossible_numbers_are_errors() {
        let t = table(&[0.0; 8]);
        let s = Selection { floor: vec![2, 2], ..Selection::default() };
        assert!(s.select(&t, Keep::PerLayer(1)).is_err());
        assert!(s.select(&t, Keep::PerLayer(5)).is_err());
        let s = Selection { scope: Scope::Global, ..s };
        assert!(s.select(&t, Keep::Total(3)).is_err());
        assert!(s.select(&t, Keep::Total(9)).is_err());
        assert_eq!(s.select(&t, Keep::Total(8)).unwrap().concat().len(), 8);
    }
}
