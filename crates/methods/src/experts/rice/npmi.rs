//! Normalised pointwise mutual information of tokens and experts.
//!
//! *Formula.* Over `n` token rows, `p(t) = n_t / n`, `p(E) = n_E / n`, `p(t, E) = n_tE / n`, where `n_tE` counts the rows whose
//! token is `t` and whose layer chose the expert `E`: `nPMI = ln(p(t, E) / (p(t) p(E))) / -ln p(t, E)`, from -1 (never
//! together) over 0 (independent) to 1 (each only with the other).
//!
//! *Reference.* Bouma 2009, as used by RICE (arXiv 2505.14681).

use quorate_lens::{ExpertMap, ItemTrace};
use quorate_model::Phase;
use quorate_model::sampling::SplitMix64;

use crate::contrast;

/// nPMI from counts: `n` rows, `n_t` of the token, `n_e` of the expert, `n_te` of both. `None` if the token or the expert
/// does not occur.
pub fn npmi(n: u64, n_t: u64, n_e: u64, n_te: u64) -> Option<f64> {
    let [n, t, e, te] = [n, n_t, n_e, n_te].map(|v| v as f64);
    if t == 0.0 || e == 0.0 {
        return None;
    }
    Some(if te == 0.0 {
        -1.0
    } else if te == n {
        1.0
    } else {
        (te * n / (t * e)).ln() / -(te / n).ln()
    })
}

/// How often markers and experts occur, alone and together, in a set of token rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Joint {
    /// Rows.
    pub rows: u64,
    /// Rows of each marker.
    pub tokens: Vec<u64>,
    /// Rows that chose each expert, numbered by the map.
    pub experts: Vec<u64>,
    /// Rows of each marker that chose each expert, `[marker][expert]`.
    pub both: Vec<Vec<u64>>,
}

impl Joint {
    /// Counts the rows of one text that `rows` picks. A row counts for a marker if its token, or with `ahead` the token
    /// after it, is the marker.
    pub fn of(
        item: &ItemTrace,
        map: &ExpertMap,
        markers: &[u32],
        ahead: bool,
        rows: impl Fn(usize, Phase) -> bool,
    ) -> Joint {
        let picked = || (0..item.tokens.len()).filter(|&t| rows(t, item.phases[t]));
        let is = |t: usize, marker: u32| item.tokens.get(t + usize::from(ahead)) == Some(&marker);
        let of_marker = |m: &u32| item.counts(map, |t, phase| is(t, *m) && rows(t, phase));
        Joint {
            rows: picked().count() as u64,
            tokens: markers.iter().map(|m| picked().filter(|&t| is(t, *m)).count() as u64).collect(),
            experts: item.counts(map, &rows),
            both: markers.iter().map(of_marker).collect(),
        }
    }

    /// The sum of several texts.
    pub fn sum<'a>(parts: impl IntoIterator<Item = &'a Joint>) -> Joint {
        let mut parts = parts.into_iter();
        let mut sum = parts.next().cloned().unwrap_or_default();
        let add = |a: &mut [u64], b: &[u64]| a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        for part in parts {
            sum.rows += part.rows;
            add(&mut sum.tokens, &part.tokens);
            add(&mut sum.experts, &part.experts);
            sum.both.iter_mut().zip(&part.both).for_each(|(a, b)| add(a, b));
        }
        sum
    }

    /// nPMI of a marker and an expert.
    pub fn npmi(&self, marker: usize, expert: usize) -> Option<f64> {
        npmi(self.rows, self.tokens[marker], self.experts[expert], self.both[marker][expert])
    }

    /// Sum of coefficient times nPMI for every expert. `None` for an expert that a marker of positive coefficient has fewer
    /// than `least` times (all of them), or that is chosen fewer than `least` times if there is no such marker.
    pub fn scores(&self, coefficients: &[f64], least: u64) -> Vec<Option<f64>> {
        let positive: Vec<usize> = (0..coefficients.len()).filter(|&m| coefficients[m] > 0.0).collect();
        let known = |e: usize| match positive.as_slice() {
            [] => self.experts[e] >= least,
            some => some.iter().any(|&m| self.both[m][e] >= least),
        };
        let score = |e| coefficients.iter().enumerate().map(|(m, c)| Some(c * self.npmi(m, e)?)).sum::<Option<f64>>();
        (0..self.experts.len()).map(|e| known(e).then(|| score(e)).flatten()).collect()
    }
}

/// The `n` experts of highest score, best first.
pub fn best(scores: &[Option<f64>], n: usize) -> Vec<usize> {
    let values: Vec<f64> = scores.iter().map(|s| s.unwrap_or(f64::NEG_INFINITY)).collect();
    let mut top = contrast::top(&values, n);
    top.retain(|&e| scores[e].is_some());
    top
}

/// Share of `times` resamples of the texts (with replacement) in which each expert is among the best `n`.
pub fn bootstrap(texts: &[Joint], coefficients: &[f64], least: u64, n: usize, times: usize, seed: u64) -> Vec<f64> {
    let mut random = SplitMix64::new(seed);
    let mut shares = vec![0.0; texts.first().map_or(0, |t| t.experts.len())];
    for _ in 0..times {
        let drawn: Vec<&Joint> = texts.iter().map(|_| &texts[random.below(texts.len())]).collect();
        let scores = Joint::sum(drawn).scores(coefficients, least);
        best(&scores, n).into_iter().for_each(|e| shares[e] += 1.0 / times as f64);
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_lens::LayerTrace;

    const BEGIN: u32 = 5;
    const END: u32 = 6;

    #[test]
    fn identities() {
        let near = |a: Option<f64>, b: f64| assert!((a.unwrap() - b).abs() < 1e-12, "{a:?} {b}");
        near(npmi(100, 20, 20, 20), 1.0); // only together
        near(npmi(100, 20, 50, 10), 0.0); // independent
        near(npmi(100, 20, 50, 0), -1.0); // never together
        near(npmi(7, 7, 7, 7), 1.0); // always, both
        near(npmi(100, 10, 20, 5), (0.05f64 / 0.02).ln() / -0.05f64.ln());
        assert_eq!((npmi(100, 0, 20, 0), npmi(100, 20, 0, 0)), (None, None));
        assert_eq!(npmi(1000, 30, 70, 9), npmi(1000, 70, 30, 9));
    }

    /// Texts in which expert 0 fires on BEGIN, 1 on END, 2 everywhere, 3 at random, and 4 on every first token.
    fn planted(texts: usize) -> Vec<ItemTrace> {
        let mut random = SplitMix64::new(3);
        let text = |i: usize| {
            let len = 20 + i % 7;
            let mut tokens: Vec<u32> = (0..len).map(|_| 10 + random.below(9) as u32).collect();
            (tokens[0], tokens[3 + i % 3], tokens[len - 2]) = (1, BEGIN, END);
            let slots = tokens.iter().enumerate().flat_map(|(t, &token)| {
                let first = match token {
                    BEGIN => 0,
                    END => 1,
                    _ if t == 0 => 4,
                    _ => 5 + random.below(3) as u32,
                };
                [first, 2, if random.below(2) == 0 { 3 } else { 8 }]
            });
            let layer = LayerTrace { k: 3, ids: slots.collect(), gates: vec![0.3; 3 * len], logits: vec![] };
            let phases = (0..len).map(|t| if t < 3 { Phase::Prompt } else { Phase::Answer }).collect();
            ItemTrace { tokens, phases, layers: vec![layer] }
        };
        (0..texts).map(text).collect()
    }

    fn joints(markers: &[u32]) -> Vec<Joint> {
        let map = ExpertMap::new(vec![0], vec![9]);
        planted(60).iter().map(|i| Joint::of(i, &map, markers, false, |_, _| true)).collect()
    }

    #[test]
    fn planted_experts_are_ranked() {
        let texts = joints(&[BEGIN, END]);
        let all = Joint::sum(&texts);
        assert_eq!((all.tokens.as_slice(), all.experts[2]), ([60, 60].as_slice(), all.rows));
        let score = |c: &[f64]| all.scores(c, 0);
        let scores = score(&[1.0, -1.0]);
        assert_eq!(best(&scores, 1), [0]);
        assert!((scores[0].unwrap() - 2.0).abs() < 1e-12 && (scores[1].unwrap() + 2.0).abs() < 1e-12);
        assert!(scores[2].unwrap().abs() < 1e-12, "everywhere: no information");
        assert!(score(&[1.0, 0.0])[3].unwrap().abs() < 0.05, "independent within sampling error");
        assert!(scores.iter().flatten().all(|s| *s >= scores[1].unwrap()));
    }

    #[test]
    fn few_meetings_do_not_count_and_a_firm_ranking_survives_resampling() {
        let texts = joints(&[BEGIN, END]);
        let scores = Joint::sum(&texts).scores(&[1.0, -1.0], 5);
        assert!(scores[0].is_some() && scores[2].is_some());
        assert!(scores[1].is_none() && scores[4].is_none(), "never met the positive marker");
        let firm = bootstrap(&texts, &[1.0, -1.0], 5, 1, 50, 1);
        assert_eq!(firm[0], 1.0);
        let loose = bootstrap(&texts, &[1.0, 0.0], 5, 2, 50, 1);
        assert!(loose.iter().sum::<f64>() > 1.9 && loose[0] == 1.0);
        assert_eq!(best(&[None, Some(-2.0), None], 3), [1]);
    }

    /// The prompt's rows change the base rates: conditioning on the answer is another table.
    #[test]
    fn rows_are_those_picked() {
        let map = ExpertMap::new(vec![0], vec![9]);
        let item = &planted(1)[0];
        let answer = Joint::of(item, &map, &[BEGIN], false, |_, phase| !phase.is_prompt());
        assert_eq!(answer.rows, item.tokens.len() as u64 - 3);
        assert_eq!((answer.experts[4], Joint::of(item, &map, &[1], false, |_, _| true).both[0][4]), (0, 1));
    }
}
