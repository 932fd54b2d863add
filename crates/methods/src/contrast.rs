//! Contrasts: how the use of experts differs between labelled sets of texts.

use quorate_lens::{ExpertMap, RoutingTrace};
use quorate_model::Phase;

use crate::MethodError;

/// Fewest texts of a class from which a contrast is made.
pub const CLASS_ITEMS_MIN: usize = 5;

/// For each text the share of its tokens (those that `rows` picks by row and phase) that chose each expert, numbered by
/// `map`. A text without such tokens gives zeros.
pub fn shares(trace: &RoutingTrace, map: &ExpertMap, rows: impl Fn(usize, Phase) -> bool) -> Vec<Vec<f64>> {
    let share = |item: &quorate_lens::ItemTrace| {
        let tokens = item.phases.iter().enumerate().filter(|&(t, &p)| rows(t, p)).count().max(1) as f64;
        item.counts(map, &rows).into_iter().map(|c| c as f64 / tokens).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_lens::{ItemTrace, LayerTrace};

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
}
