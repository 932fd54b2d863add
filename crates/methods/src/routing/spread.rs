//! How much a number of items differs between the experts that fired on them, against the same numbers shuffled.

use quorate_eval::statistics::quantile;
use quorate_lens::ExpertMap;
use quorate_model::sampling::SplitMix64;

/// For each item, experts that fired, numbered by an [`ExpertMap`], with their gates (the largest of those that count).
pub type Fired = Vec<Vec<(usize, f64)>>;

/// Spreads of layers beside shuffled ones; `None` where fewer than two experts count.
pub struct SpreadTest {
    /// Experts that count, numbered by the map.
    pub counted: Vec<bool>,
    /// Largest minus smallest mean of a layer's experts.
    pub spread: Vec<Option<f64>>,
    /// 95th percentile of the shuffled spreads.
    pub p95: Vec<Option<f64>>,
    /// Share of spreads, the own one counted in, that reach the own one.
    pub p: Vec<Option<f64>>,
}

/// How spreads are tested.
#[derive(Clone, Copy, Debug)]
pub struct Shuffling {
    /// Fewest items of an expert that counts.
    pub least: usize,
    /// How often values are shuffled.
    pub times: usize,
    /// Seed.
    pub seed: u64,
}

/// Sums over the items on which an expert fired.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sums {
    /// Items.
    pub items: f64,
    /// Sum of the items' values.
    pub values: f64,
    /// Sum of the gates.
    pub gates: f64,
    /// Sum of gate times value.
    pub gate_values: f64,
}

/// The sums of all experts.
pub fn sums(experts: usize, fired: &Fired, values: &[f64]) -> Vec<Sums> {
    let mut sums = vec![Sums::default(); experts];
    for (fired, value) in fired.iter().zip(values) {
        for &(unit, gate) in fired {
            let s = &mut sums[unit];
            s.items += 1.0;
            s.values += value;
            s.gates += gate;
            s.gate_values += gate * value;
        }
    }
    sums
}

/// Largest minus smallest mean of `values` in each layer, over the experts that count.
fn layer_spreads(map: &ExpertMap, fired: &Fired, values: &[f64], counted: &[bool]) -> Vec<Option<f64>> {
    let sums = sums(map.total(), fired, values);
    let spread = |moe| {
        let means = || map.range(moe).filter(|&u| counted[u]).map(|u| sums[u].values / sums[u].items);
        (means().count() > 1).then(|| means().fold(f64::MIN, f64::max) - means().fold(f64::MAX, f64::min))
    };
    (0..map.n_layers()).map(spread).collect()
}

/// Values minus the mean of their group.
pub fn centred(values: &[f64], groups: &[usize]) -> Vec<f64> {
    let mut sums = vec![(0.0, 0.0); groups.iter().max().map_or(0, |g| g + 1)];
    values.iter().zip(groups).for_each(|(v, &g)| sums[g] = (sums[g].0 + v, sums[g].1 + 1.0));
    values.iter().zip(groups).map(|(v, &g)| v - sums[g].0 / sums[g].1).collect()
}

/// Puts the values of each group in a random order.
fn shuffle_within(values: &mut [f64], groups: &[usize], random: &mut SplitMix64) {
    let count = groups.iter().max().map_or(0, |g| g + 1);
    let mut of_group: Vec<Vec<f64>> = vec![Vec::new(); count];
    values.iter().zip(groups).for_each(|(&v, &g)| of_group[g].push(v));
    of_group.iter_mut().for_each(|g| random.shuffle(g));
    values.iter_mut().zip(groups).for_each(|(v, &g)| *v = of_group[g].pop().unwrap_or(*v));
}

impl Shuffling {
    /// The spread of each layer, beside those with `values` shuffled within groups.
    pub fn test(&self, map: &ExpertMap, fired: &Fired, values: &[f64], groups: &[usize]) -> SpreadTest {
        let counts = |s: &Sums| s.items >= self.least.max(1) as f64;
        let counted: Vec<bool> = sums(map.total(), fired, values).iter().map(counts).collect();
        let own = layer_spreads(map, fired, values, &counted);
        let times = if own.iter().any(Option::is_some) { self.times } else { 0 };
        let (mut random, mut values) = (SplitMix64::new(self.seed), values.to_vec());
        let mut shuffled: Vec<Vec<f64>> = vec![Vec::new(); map.n_layers()];
        for _ in 0..times {
            shuffle_within(&mut values, groups, &mut random);
            let spreads = layer_spreads(map, fired, &values, &counted);
            shuffled.iter_mut().zip(spreads).for_each(|(all, s)| all.extend(s));
        }
        let p = |(own, random): (&Option<f64>, &Vec<f64>)| {
            // Sums in another order differ in the last bits.
            let least = (*own)? - 1e-12;
            let reached = random.iter().filter(|&&r| r >= least).count();
            Some((reached + 1) as f64 / (random.len() + 1) as f64)
        };
        SpreadTest {
            p: own.iter().zip(&shuffled).map(p).collect(),
            p95: shuffled.iter().map(|s| quantile(s, 0.95)).collect(),
            spread: own,
            counted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_eval::statistics::wilson;

    fn shuffling(least: usize) -> Shuffling {
        Shuffling { least, times: 200, seed: 1 }
    }

    /// 400 items in one layer of 8 experts, two experts each; correct iff expert 3 was chosen.
    #[test]
    fn the_expert_that_decides_is_found() {
        let (map, mut random) = (ExpertMap::new(vec![0], vec![8]), SplitMix64::new(5));
        let mut order: Vec<usize> = (0..8).collect();
        let fired: Fired = (0..400)
            .map(|_| {
                random.shuffle(&mut order);
                order[..2].iter().map(|&e| (e, 0.5)).collect()
            })
            .collect();
        let correct: Vec<f64> = fired.iter().map(|f| f64::from(u8::from(f.iter().any(|f| f.0 == 3)))).collect();
        let sums = sums(8, &fired, &correct);
        assert_eq!(sums[3].values, sums[3].items);
        // Beside the others expert 3 is one of seven equally likely partners.
        for (e, s) in sums.iter().enumerate().filter(|(e, _)| *e != 3) {
            let (low, high) = wilson(s.values, s.items, 3.0);
            assert!(low < 1.0 / 7.0 && 1.0 / 7.0 < high, "{e}: {s:?}");
        }
        let test = shuffling(30).test(&map, &fired, &correct, &[0; 400]);
        assert!(test.spread[0] > test.p95[0] && test.p[0] < Some(0.01), "{:?} {:?}", test.spread, test.p);
        // Correctness that nothing decides has no such spread.
        let coin: Vec<f64> = (0..400).map(|_| random.below(2) as f64).collect();
        let test = shuffling(30).test(&map, &fired, &coin, &[0; 400]);
        assert!(test.spread[0] < test.p95[0] && test.p[0] > Some(0.05), "{:?} {:?}", test.spread, test.p95);
        let test = shuffling(300).test(&map, &fired, &correct, &[0; 400]);
        assert_eq!((test.spread[0], test.p[0]), (None, None), "too few items of each expert");
    }

    /// Two tasks, one easy and one hard, each with experts of its own; within a task correctness is a coin.
    #[test]
    fn a_spread_between_tasks_vanishes_within_them() {
        let (map, mut random) = (ExpertMap::new(vec![0], vec![8]), SplitMix64::new(6));
        let groups: Vec<usize> = (0..600).map(|i| i % 2).collect();
        let fired: Fired = groups.iter().map(|g| vec![(4 * g + random.below(4), 1.0)]).collect();
        let correct: Vec<f64> = groups.iter().map(|&g| f64::from(u8::from(random.unit() < [0.9, 0.4][g]))).collect();
        let all = shuffling(30).test(&map, &fired, &correct, &[0; 600]);
        assert!(all.p[0] < Some(0.01));
        let within = shuffling(30).test(&map, &fired, &centred(&correct, &groups), &groups);
        assert!(within.p[0] > Some(0.05) && within.spread[0] < all.spread[0], "{:?} {:?}", within.p, within.spread);
    }

    #[test]
    fn shuffling_keeps_groups() {
        let (mut values, groups) = ((0..12).map(f64::from).collect::<Vec<_>>(), [0, 1, 2].repeat(4));
        let before = values.clone();
        shuffle_within(&mut values, &groups, &mut SplitMix64::new(3));
        assert_ne!(values, before);
        for g in 0..3 {
            let of = |v: &[f64]| {
                let mut of: Vec<f64> = v.iter().zip(&groups).filter(|x| *x.1 == g).map(|x| *x.0).collect();
                of.sort_by(f64::total_cmp);
                of
            };
            assert_eq!(of(&values), of(&before));
        }
        let centred = centred(&[1.0, 0.0, 1.0, 1.0], &[0, 0, 1, 1]);
        assert_eq!(centred, [0.5, -0.5, 0.0, 0.0]);
    }
}
