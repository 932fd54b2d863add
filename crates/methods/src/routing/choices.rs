//! Formulas on the experts that a set of tokens chose, layer by layer: specialisation, co-activation, saturation. And their
//! control, a router that does not look at the token.

use std::collections::HashMap;

use quorate_lens::{ExpertMap, RoutingTrace};
use quorate_model::NO_EXPERT;
use quorate_model::sampling::SplitMix64;

use super::{Rows, entropy};

/// What `T` tokens chose.
#[derive(Clone, Debug, PartialEq)]
pub struct Choices {
    /// Token ids, `[T]`.
    pub tokens: Vec<u32>,
    /// One for each MoE layer.
    pub layers: Vec<LayerChoices>,
}

/// What the tokens chose in one MoE layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerChoices {
    /// Experts of the layer.
    pub experts: usize,
    /// Experts per token.
    pub k: usize,
    /// Chosen experts in rank order, `[T, k]`; [`NO_EXPERT`] is an empty slot.
    pub ids: Vec<u32>,
}

/// What an expert's tokens have in common.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Speciality {
    /// Mean of `spec` over the expert's top tokens; `None` of an expert that no counted token chose.
    pub score: Option<f64>,
    /// Top tokens and their `spec`, best first.
    pub top: Vec<(u32, f64)>,
}

impl Choices {
    /// The tokens of a trace that `rows` picks.
    pub fn of(trace: &RoutingTrace, map: &ExpertMap, rows: Rows) -> Choices {
        let mut choices = Choices { tokens: Vec::new(), layers: Vec::new() };
        for (moe, &experts) in map.experts.iter().enumerate() {
            let k = trace.items.first().map_or(0, |item| item.layers[moe].k);
            choices.layers.push(LayerChoices { experts, k, ids: Vec::new() });
        }
        for item in &trace.items {
            for t in (0..item.tokens.len()).filter(|&t| rows.contains(item.phases[t])) {
                choices.tokens.push(item.tokens[t]);
                for (to, from) in choices.layers.iter_mut().zip(&item.layers) {
                    to.ids.extend_from_slice(&from.ids[t * from.k..(t + 1) * from.k]);
                }
            }
        }
        choices
    }

    /// The same tokens through a router that does not look at them: each token draws as many distinct experts as before,
    /// with the load of the own router as weights.
    pub fn blind(&self, seed: u64) -> Choices {
        let mut random = SplitMix64::new(seed);
        let layers = self.layers.iter().map(|layer| layer.blind(&mut random)).collect();
        Choices { tokens: self.tokens.clone(), layers }
    }
}

impl LayerChoices {
    /// The chosen experts of each token, best first.
    fn each(&self) -> impl Iterator<Item = impl Iterator<Item = usize> + Clone + '_> + '_ {
        self.ids.chunks_exact(self.k.max(1)).map(|ids| ids.iter().filter(|&&id| id != NO_EXPERT).map(|&id| id as usize))
    }

    /// Tokens that chose each expert.
    pub fn counts(&self) -> Vec<u64> {
        let mut counts = vec![0; self.experts];
        self.each().flatten().for_each(|e| counts[e] += 1);
        counts
    }

    /// Weighted draws without replacement: the `k` largest of `ln(u) / weight` (Efraimidis and Spirakis 2006).
    fn blind(&self, random: &mut SplitMix64) -> LayerChoices {
        let weights: Vec<f64> = self.counts().iter().map(|&c| c as f64).collect();
        let mut ids = Vec::with_capacity(self.ids.len());
        for chosen in self.each() {
            let chosen = chosen.count();
            let mut keys: Vec<(f64, u32)> = Vec::with_capacity(self.experts);
            for (e, &weight) in weights.iter().enumerate() {
                let draw = (1.0 - random.unit()).ln();
                if weight > 0.0 {
                    keys.push((draw / weight, e as u32));
                }
            }
            keys.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
            ids.extend(keys.iter().take(chosen).map(|k| k.1));
            ids.resize(ids.len() + self.k - chosen, NO_EXPERT);
        }
        LayerChoices { experts: self.experts, k: self.k, ids }
    }

    /// For each expert its `top` tokens by `spec(i, v) = n(token v chose i) / n(token v)`, of tokens that occur `least`
    /// times or more, and the mean of these.
    pub fn specialities(&self, tokens: &[u32], least: u64, top: usize) -> Vec<Speciality> {
        let mut seen: HashMap<u32, u64> = HashMap::new();
        let mut chose: Vec<HashMap<u32, u64>> = vec![HashMap::new(); self.experts];
        for (&token, chosen) in tokens.iter().zip(self.each()) {
            *seen.entry(token).or_default() += 1;
            chosen.for_each(|e| *chose[e].entry(token).or_default() += 1);
        }
        let speciality = |chose: HashMap<u32, u64>| {
            let spec =
                |(token, n): (u32, u64)| (seen[&token] >= least).then(|| (token, n as f64 / seen[&token] as f64));
            let mut all: Vec<(u32, f64)> = chose.into_iter().filter_map(spec).collect();
            // Of tokens that are equally special, the frequent one first.
            all.sort_by(|a, b| b.1.total_cmp(&a.1).then(seen[&b.0].cmp(&seen[&a.0])).then(a.0.cmp(&b.0)));
            all.truncate(top);
            let mean = all.iter().map(|t| t.1).sum::<f64>() / all.len().max(1) as f64;
            Speciality { score: (!all.is_empty()).then_some(mean), top: all }
        };
        chose.into_iter().map(speciality).collect()
    }

    /// Entropy in nats of the tokens that chose each expert; `None` of an expert that nothing chose. The fewer tokens an
    /// expert has, the lower it comes out.
    pub fn token_entropies(&self, tokens: &[u32]) -> Vec<Option<f64>> {
        let mut chose: Vec<HashMap<u32, u64>> = vec![HashMap::new(); self.experts];
        for (&token, chosen) in tokens.iter().zip(self.each()) {
            chosen.for_each(|e| *chose[e].entry(token).or_default() += 1);
        }
        let entropy_of = |chose: HashMap<u32, u64>| {
            // Sorted, so that the sum does not depend on the order of the table.
            let mut counts: Vec<u64> = chose.into_values().collect();
            counts.sort_unstable();
            let sum = counts.iter().sum::<u64>() as f64;
            (sum > 0.0).then(|| entropy(&counts.iter().map(|&c| c as f64 / sum).collect::<Vec<_>>()))
        };
        chose.into_iter().map(entropy_of).collect()
    }

    /// `B[i][j] = n(i and j chosen together) / n(i chosen)` with `B[i][i] = 0`; zeros for an expert that nothing chose.
    /// Each row of a used expert sums to `k - 1` if no slot is empty.
    pub fn co_activation(&self) -> Vec<Vec<f64>> {
        let mut together = vec![vec![0.0; self.experts]; self.experts];
        for chosen in self.each() {
            for i in chosen.clone() {
                chosen.clone().filter(|&j| j != i).for_each(|j| together[i][j] += 1.0);
            }
        }
        for (row, n) in together.iter_mut().zip(self.counts()) {
            row.iter_mut().for_each(|v| *v /= n.max(1) as f64);
        }
        together
    }

    /// `mean_t |S(t) and S'(t)| / prefix` for the first `prefix` experts of each ranked list: the share of its choice that
    /// a token shares with another router's choice for it.
    pub fn saturation(&self, other: &LayerChoices, prefix: usize) -> f64 {
        let (mut common, mut tokens) = (0, 0);
        for (own, theirs) in self.each().zip(other.each()) {
            common += own.take(prefix).filter(|e| theirs.clone().take(prefix).any(|o| o == *e)).count();
            tokens += 1;
        }
        common as f64 / (prefix * tokens).max(1) as f64
    }
}

/// 1, 2, 4, .. below `k`, and `k`.
pub fn prefixes(k: usize) -> Vec<usize> {
    let powers = std::iter::successors(Some(1), |p| Some(2 * p));
    powers.take_while(|&p| p < k).chain([k]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_eval::statistics::mean;

    /// `tokens` uniform draws of `k` of `experts`, by a router that does not look at the token.
    fn random(experts: usize, k: usize, tokens: usize, seed: u64) -> Choices {
        let mut order: Vec<u32> = (0..experts as u32).collect();
        let mut random = SplitMix64::new(seed);
        let mut ids = Vec::new();
        for _ in 0..tokens {
            random.shuffle(&mut order);
            ids.extend_from_slice(&order[..k]);
        }
        let tokens = (0..tokens as u32).map(|t| t % 40).collect();
        Choices { tokens, layers: vec![LayerChoices { experts, k, ids }] }
    }

    #[test]
    fn specialisation_by_hand_counts_occurrences_and_leaves_rare_tokens_out() {
        // Token 5 chooses 0 in three of four occurrences, 7 always chooses 1, 9 occurs once.
        let layer = LayerChoices { experts: 3, k: 1, ids: vec![0, 1, 0, 1, 0, 1, 1] };
        let tokens = [5, 7, 5, 7, 5, 5, 9];
        let found = layer.specialities(&tokens, 2, 10);
        assert_eq!(found[0], Speciality { score: Some(0.75), top: vec![(5, 0.75)] });
        assert_eq!(found[1], Speciality { score: Some(0.625), top: vec![(7, 1.0), (5, 0.25)] });
        assert_eq!(found[2], Speciality::default());
        assert_eq!(layer.specialities(&tokens, 1, 2)[1].top, [(7, 1.0), (9, 1.0)], "the frequent one first");
    }

    #[test]
    fn token_entropy_by_hand() {
        let layer = LayerChoices { experts: 3, k: 1, ids: vec![0, 0, 0, 0, 1, 1] };
        let found = layer.token_entropies(&[5, 5, 6, 7, 8, 8]);
        assert!((found[0].unwrap() - 1.5 * 2f64.ln()).abs() < 1e-12, "1/2, 1/4, 1/4");
        assert_eq!((found[1], found[2]), (Some(0.0), None));
    }

    #[test]
    fn rows_of_co_activation_sum_to_the_other_choices() {
        let Choices { layers, .. } = random(16, 4, 3000, 1);
        let b = layers[0].co_activation();
        for (i, row) in b.iter().enumerate() {
            assert!((row.iter().sum::<f64>() - 3.0).abs() < 1e-9 && row[i] == 0.0);
        }
        let (chance, n) = (3.0 / 15.0, layers[0].counts()[0] as f64);
        let error = (chance * (1.0 - chance) / n).sqrt();
        assert!(b[0][1..].iter().all(|v| (v - chance).abs() < 5.0 * error), "{:?}", b[0]);
        // A pair that is always chosen together, an expert that is never chosen, an empty slot.
        let layer = LayerChoices { experts: 5, k: 2, ids: vec![0, 1, 1, 0, 2, 3, 2, NO_EXPERT] };
        let b = layer.co_activation();
        assert_eq!((b[0][1], b[1][0], b[2][3], b[3][2]), (1.0, 1.0, 0.5, 1.0));
        assert_eq!(b[4], [0.0; 5]);
    }

    #[test]
    fn saturation_is_one_with_itself_and_chance_with_a_random_router() {
        let (a, b) = (random(32, 4, 4000, 2), random(32, 4, 4000, 3));
        for prefix in prefixes(4) {
            assert_eq!(a.layers[0].saturation(&a.layers[0], prefix), 1.0);
            let chance = prefix as f64 / 32.0;
            // Hypergeometric: the share that two independent choices of one token have in common.
            let variance = chance * (1.0 - chance) * (32.0 - prefix as f64) / 31.0 / prefix as f64;
            let found = a.layers[0].saturation(&b.layers[0], prefix);
            assert!((found - chance).abs() < 3.0 * (variance / 4000.0).sqrt(), "{prefix}: {found} {chance}");
        }
        // By rank: the first agrees, the first two agree in another order.
        let layer = |ids: &[u32]| LayerChoices { experts: 8, k: 2, ids: ids.to_vec() };
        let (a, b) = (layer(&[0, 1, 2, 3]), layer(&[0, 4, 3, 2]));
        assert_eq!((a.saturation(&b, 1), a.saturation(&b, 2)), (0.5, 0.75));
        assert_eq!([prefixes(1), prefixes(4), prefixes(6)], [vec![1], vec![1, 2, 4], vec![1, 2, 4, 6]]);
    }

    #[test]
    fn the_blind_router_keeps_load_and_forgets_tokens() {
        // Token v chooses expert v % 8 and expert 8: a specialised router with one busy expert.
        let tokens: Vec<u32> = (0..8000).map(|t| t % 40).collect();
        let ids = tokens.iter().flat_map(|v| [v % 8, 8]).collect();
        let own = Choices { tokens, layers: vec![LayerChoices { experts: 12, k: 2, ids }] };
        let blind = own.blind(4);
        assert_eq!(blind, own.blind(4));
        let counts = blind.layers[0].counts();
        assert_eq!(counts.iter().sum::<u64>(), 16000);
        assert!(counts[9..].iter().all(|&c| c == 0) && counts[8] > 4 * counts[0], "{counts:?}");
        assert!(blind.layers[0].ids.chunks(2).all(|c| c[0] != c[1]), "distinct");
        let score = |c: &Choices| {
            let all = c.layers[0].specialities(&c.tokens, 10, 5);
            mean(&all[..8].iter().filter_map(|s| s.score).collect::<Vec<_>>()).unwrap()
        };
        assert_eq!(score(&own), 1.0);
        assert!(score(&blind) < 0.3, "{}", score(&blind));
    }
}
