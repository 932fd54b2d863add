//! Contrasts: how the use of experts differs between labelled sets of texts.

use clap::ValueEnum;
use quorate_lens::{ExpertMap, ItemTrace, RoutingTrace};
use quorate_model::{NO_EXPERT, Phase};
use serde::Serialize;

use crate::MethodError;

/// Fewest texts of a class from which a contrast is made.
pub const CLASS_ITEMS_MIN: usize = 5;

/// Which tokens of a prompt count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Tokens {
    /// All tokens of the prompt
    Prompt,
    /// The last one, after which the answer begins
    Last,
}

impl Tokens {
    /// Whether a token counts.
    pub fn contains(self, phase: Phase) -> bool {
        match self {
            Tokens::Prompt => phase.is_prompt(),
            Tokens::Last => phase == Phase::PromptLast,
        }
    }
}

/// How much a choice counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Weight {
    /// Once
    Count,
    /// As much as its gate
    Gate,
}

/// How much each text uses each expert, `[text][expert]`, numbered by `map`: the mean over the tokens that count.
pub fn uses(trace: &RoutingTrace, map: &ExpertMap, tokens: Tokens, weight: Weight) -> Vec<Vec<f64>> {
    match weight {
        Weight::Count => shares(trace, map, |_, phase| tokens.contains(phase)),
        Weight::Gate => gate_shares(trace, map, |_, phase| tokens.contains(phase)),
    }
}

/// What a use of 1 is in [`totals`].
pub const TOTALS_UNIT: f64 = 1e6;

/// The use of each expert summed over texts, in millionths: what random experts are matched by.
pub fn totals(uses: &[Vec<f64>]) -> Vec<u64> {
    let mut totals = vec![0.0; uses.first().map_or(0, Vec::len)];
    uses.iter().for_each(|of| totals.iter_mut().zip(of).for_each(|(t, u)| *t += u));
    totals.into_iter().map(|t| (t * TOTALS_UNIT).round() as u64).collect()
}

/// For each text the share of its tokens (those that `rows` picks by row and phase) that chose each expert, numbered by
/// `map`. A text without such tokens gives zeros.
pub fn shares(trace: &RoutingTrace, map: &ExpertMap, rows: impl Fn(usize, Phase) -> bool) -> Vec<Vec<f64>> {
    let share = |item: &ItemTrace| {
        let tokens = item.phases.iter().enumerate().filter(|&(t, &p)| rows(t, p)).count().max(1) as f64;
        item.counts(map, &rows).into_iter().map(|c| c as f64 / tokens).collect()
    };
    trace.items.iter().map(share).collect()
}

/// As [`shares`], each choice counted with its gate: the mean gate of each expert, 0 where it is not chosen.
pub fn gate_shares(trace: &RoutingTrace, map: &ExpertMap, rows: impl Fn(usize, Phase) -> bool) -> Vec<Vec<f64>> {
    let share = |item: &ItemTrace| {
        let counted: Vec<usize> = (0..item.tokens.len()).filter(|&t| rows(t, item.phases[t])).collect();
        let mut gates = vec![0.0; map.total()];
        for (moe, layer) in item.layers.iter().enumerate() {
            let start = map.range(moe).start;
            for slot in counted.iter().flat_map(|t| t * layer.k..(t + 1) * layer.k) {
                if layer.ids[slot] != NO_EXPERT {
                    gates[start + layer.ids[slot] as usize] += f64::from(layer.gates[slot]) / counted.len() as f64;
                }
            }
        }
        gates
    };
    trace.items.iter().map(share).collect()
}

/// Mean of the texts in the class minus mean of all others, per expert.
///
/// # Errors
/// A class with fewer than [`CLASS_ITEMS_MIN`] texts.
pub fn difference(shares: &[Vec<f64>], in_class: &[bool]) -> Result<Vec<f64>, MethodError> {
    let inside = in_class.iter().filter(|&&c| c).count();
    let outside = in_class.len() - inside;
    if inside.min(outside) < CLASS_ITEMS_MIN {
        return Err(MethodError::needs(
            format!(
                "{inside} texts are of the class and {outside} are not, at least {CLASS_ITEMS_MIN} of each are needed"
            ),
            "give more texts, or another class",
        ));
    }
    let mut difference = vec![0.0; shares.first().map_or(0, Vec::len)];
    for (share, &class) in shares.iter().zip(in_class) {
        let weight = if class { 1.0 / inside as f64 } else { -1.0 / outside as f64 };
        difference.iter_mut().zip(share).for_each(|(d, s)| *d += weight * s);
    }
    Ok(difference)
}

/// The `n` experts with the largest values, best first; ties go to the lower number.
pub fn top(values: &[f64], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
    order.truncate(n);
    order
}

/// The threshold above which values are taken for those of the first kind, with the best balanced accuracy (mean of the
/// shares of both kinds on their side), and that accuracy. Of several the lowest. `None` if a kind has no value.
pub fn best_threshold(high: &[f64], low: &[f64]) -> Option<(f64, f64)> {
    if high.is_empty() || low.is_empty() {
        return None;
    }
    let mut values: Vec<(f64, f64)> = high.iter().map(|&v| (v, -0.5 / high.len() as f64)).collect();
    values.extend(low.iter().map(|&v| (v, 0.5 / low.len() as f64)));
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    // Below all values everything is taken for the first kind.
    let (mut best, mut accuracy) = ((f64::NEG_INFINITY, 0.5), 0.5);
    for (i, (value, gain)) in values.iter().enumerate() {
        accuracy += gain;
        let next = values.get(i + 1).map_or(f64::INFINITY, |v| v.0);
        if next > *value && accuracy > best.1 + 1e-12 {
            best = (if next.is_finite() { 0.5 * (value + next) } else { *value }, accuracy);
        }
    }
    Some(best)
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_lens::LayerTrace;

    fn item(ids: &[u32], prompt: usize) -> ItemTrace {
        let phase = |t| if t < prompt { Phase::Prompt } else { Phase::Answer };
        ItemTrace {
            tokens: vec![0; ids.len()],
            phases: (0..ids.len()).map(phase).collect(),
            layers: vec![LayerTrace { k: 1, ids: ids.to_vec(), gates: vec![1.0; ids.len()], logits: vec![] }],
        }
    }

    #[test]
    fn the_expert_of_the_class_ranks_first_and_answers_do_not_count() {
        let map = ExpertMap::new(vec![0], vec![4]);
        let of_class = |class: bool| item(if class { &[0, 2, 2, 1] } else { &[0, 3, 0, 2, 2, 2] }, 3);
        let classes: Vec<bool> = (0..12).map(|i| i % 2 == 0).collect();
        let trace = RoutingTrace { items: classes.iter().map(|&c| of_class(c)).collect() };
        let shares = shares(&trace, &map, |_, p| p.is_prompt());
        let d = difference(&shares, &classes).unwrap();
        assert_eq!(top(&d, 1), [2]);
        let wanted = [-1.0 / 3.0, 0.0, 2.0 / 3.0, -1.0 / 3.0];
        assert!(d.iter().zip(wanted).all(|(d, w)| (d - w).abs() < 1e-12), "{d:?}");
        assert!(difference(&shares, &[true; 12]).is_err());
    }

    #[test]
    fn gates_weigh_choices_and_empty_slots_do_not_count() {
        let map = ExpertMap::new(vec![0], vec![3]);
        let mut text = item(&[0, 1, NO_EXPERT, 1], 3);
        text.layers[0].gates = vec![0.2, 0.6, 9.0, 5.0];
        let shares = gate_shares(&RoutingTrace { items: vec![text] }, &map, |_, p| p.is_prompt());
        let wanted = [0.2 / 3.0, 0.6 / 3.0, 0.0];
        assert!(shares[0].iter().zip(wanted).all(|(s, w)| (s - w).abs() < 1e-7), "{shares:?}");
    }

    #[test]
    fn the_threshold_balances_both_kinds() {
        let (threshold, accuracy) = best_threshold(&[3.0, 4.0, 1.0], &[0.0, 2.0]).unwrap();
        assert!(threshold == 2.5 && (accuracy - 0.5 * (2.0 / 3.0 + 1.0)).abs() < 1e-12, "{threshold} {accuracy}");
        assert_eq!(best_threshold(&[1.0, 1.0], &[1.0]), Some((f64::NEG_INFINITY, 0.5)));
        assert_eq!(best_threshold(&[], &[1.0]), None);
    }
}
