//! How well a subset of a layer's experts gives the layer's output back, and the search for the best subset.

use candle_core::{Device, Tensor};
use quorate_formats::spec::RouterScore;
use quorate_model::{Model, NO_EXPERT, RoutingMode, ops, softmax};

use super::LayerSample;
use crate::MethodError;

/// All experts of a layer on some tokens: what any subset would put out follows from inner products.
#[derive(Clone, Debug)]
pub struct LayerFit {
    /// Decoder layer.
    pub layer: usize,
    /// Experts.
    pub experts: usize,
    /// Mean output of each expert over the tokens, whether or not they choose it, `[E, d]`.
    pub mean: Vec<Vec<f64>>,
    /// Mean of router probability times output, `[E, d]`.
    pub gated_mean: Vec<Vec<f64>>,
    logits: Vec<f32>,
    /// Inner products of the outputs, `[T, E, E]`.
    gram: Vec<f64>,
}

impl LayerFit {
    /// Runs all experts on the sampled tokens.
    ///
    /// # Errors
    /// A layer without experts, or experts that are not in memory.
    pub fn new(model: &Model, sample: &LayerSample) -> Result<LayerFit, MethodError> {
        let d = model.spec().hidden_size;
        let tokens = sample.inputs.len() / d;
        let inputs = Tensor::from_slice(&sample.inputs, (tokens, d), &Device::Cpu)?;
        let outputs = model.all_expert_outputs(sample.layer, &inputs)?;
        let (e, outputs) = (outputs.dim(1)?, ops::values(&outputs)?.to_vec());
        let sigmoid = model.spec().moe(sample.layer).is_some_and(|m| m.router.score == RouterScore::Sigmoid);
        let mut gram = Vec::with_capacity(tokens * e * e);
        let mut mean = vec![vec![0.0; d]; e];
        let mut gated_mean = mean.clone();
        for (rows, logits) in outputs.chunks_exact(e * d).zip(sample.logits.chunks_exact(e)) {
            let rows: Vec<&[f32]> = rows.chunks_exact(d).collect();
            let mut p = logits.to_vec();
            if sigmoid {
                p.iter_mut().for_each(|v| *v = 1.0 / (1.0 + (-*v).exp()))
            } else {
                softmax(&mut p)
            }
            for i in 0..e {
                gram.extend(rows.iter().map(|other| inner(rows[i], other)));
                for (c, &x) in rows[i].iter().enumerate() {
                    mean[i][c] += f64::from(x) / tokens as f64;
                    gated_mean[i][c] += f64::from(p[i]) * f64::from(x) / tokens as f64;
                }
            }
        }
        Ok(LayerFit { layer: sample.layer, experts: e, mean, gated_mean, logits: sample.logits.clone(), gram })
    }

    /// Squared Frobenius norm of the difference that keeping only these experts makes to the routed sum:
    /// `sum over tokens of |sum_i g'_i f_i - sum_i g_i f_i|^2`, both routed by the model's own rule.
    ///
    /// # Errors
    /// An expert that does not exist, or as [`Model::route`].
    pub fn error(&self, model: &Model, kept: &[usize], mode: RoutingMode) -> Result<f64, MethodError> {
        let mut flags = vec![false; self.experts];
        for &expert in kept {
            *flags.get_mut(expert).ok_or_else(|| {
                MethodError::needs(
                    format!("layer {} has no expert {expert}", self.layer),
                    format!("it has {}", self.experts),
                )
            })? = true;
        }
        self.difference(model, Some(&flags), mode)
    }

    /// The squared Frobenius norm of the routed sum itself.
    ///
    /// # Errors
    /// As [`Model::route`].
    pub fn energy(&self, model: &Model) -> Result<f64, MethodError> {
        self.difference(model, None, RoutingMode::Mask)
    }

    /// With `flags`, the difference to the full layer; without, to nothing.
    fn difference(&self, model: &Model, flags: Option<&[bool]>, mode: RoutingMode) -> Result<f64, MethodError> {
        let full = model.route(self.layer, &self.logits, None, mode)?;
        let few = flags.map(|f| model.route(self.layer, &self.logits, Some(f), mode)).transpose()?;
        let (k, e) = (full.k, self.experts);
        let full_gates = ops::values(&full.gates)?;
        let few_gates = few.as_ref().map(|r| ops::values(&r.gates)).transpose()?;
        let mut sum = 0.0;
        let mut change: Vec<(usize, f64)> = Vec::with_capacity(2 * k);
        for (t, gram) in self.gram.chunks_exact(e * e).enumerate() {
            change.clear();
            let slots = t * k..(t + 1) * k;
            add(&mut change, &full.ids[slots.clone()], &full_gates[slots.clone()], -1.0);
            if let (Some(few), Some(gates)) = (&few, &few_gates) {
                add(&mut change, &few.ids[slots.clone()], &gates[slots], 1.0);
            }
            for &(i, a) in &change {
                sum += a * change.iter().map(|&(j, b)| b * gram[i * e + j]).sum::<f64>();
            }
        }
        Ok(sum.max(0.0))
    }
}

/// Adds signed gates to a sparse vector over experts.
fn add(change: &mut Vec<(usize, f64)>, ids: &[u32], gates: &[f32], sign: f64) {
    for (&id, &gate) in ids.iter().zip(gates).filter(|(id, _)| **id != NO_EXPERT) {
        let (id, gate) = (id as usize, sign * f64::from(gate));
        match change.iter_mut().find(|(e, _)| *e == id) {
            Some((_, g)) => *g += gate,
            None => change.push((id, gate)),
        }
    }
}

fn inner(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// The outcome of a search.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The kept experts, ascending.
    pub kept: Vec<usize>,
    /// Their error.
    pub error: f64,
    /// Subsets that were tried.
    pub tried: usize,
    /// Whether all subsets were.
    pub exhaustive: bool,
}

/// The subset of `keep` of `experts` with the least error: by trying all if there are at most `exhaustive_max`, else by
/// removing one expert after the other, each time the one that costs least, and then swapping a kept for a removed one as
/// long as that helps.
///
/// # Errors
/// As `error`.
pub fn best_subset<E>(
    experts: usize,
    keep: usize,
    exhaustive_max: usize,
    mut error: impl FnMut(&[usize]) -> Result<f64, E>,
) -> Result<Found, E> {
    let mut tried = 0;
    let mut try_one = |kept: &[usize]| {
        tried += 1;
        error(kept)
    };
    let exhaustive = subsets(experts, keep) <= exhaustive_max;
    let (mut kept, least) = if exhaustive {
        try_all(experts, keep, &mut try_one)?
    } else {
        let kept = remove_greedily(experts, keep, &mut try_one)?;
        swap_greedily(experts, kept, &mut try_one)?
    };
    kept.sort_unstable();
    Ok(Found { kept, error: least, tried, exhaustive })
}

type Try<'a, E> = dyn FnMut(&[usize]) -> Result<f64, E> + 'a;

/// Number of subsets, `C(n, k)`; `usize::MAX` if it is larger.
fn subsets(n: usize, k: usize) -> usize {
    (0..k.min(n)).try_fold(1usize, |c, i| Some(c.checked_mul(n - i)? / (i + 1))).unwrap_or(usize::MAX)
}

fn try_all<E>(experts: usize, keep: usize, error: &mut Try<'_, E>) -> Result<(Vec<usize>, f64), E> {
    let mut kept: Vec<usize> = (0..keep).collect();
    let mut best = (kept.clone(), error(&kept)?);
    // The next subset in lexical order: the last place that can move does, the later ones follow it.
    while let Some(place) = (0..keep).rev().find(|&i| kept[i] < experts - keep + i) {
        kept[place] += 1;
        (place + 1..keep).for_each(|i| kept[i] = kept[i - 1] + 1);
        let found = error(&kept)?;
        if found < best.1 {
            best = (kept.clone(), found);
        }
    }
    Ok(best)
}

fn remove_greedily<E>(experts: usize, keep: usize, error: &mut Try<'_, E>) -> Result<Vec<usize>, E> {
    let mut kept: Vec<usize> = (0..experts).collect();
    while kept.len() > keep {
        let mut cheapest = (0, f64::INFINITY);
        for i in 0..kept.len() {
            let gone = kept.remove(i);
            let found = error(&kept)?;
            kept.insert(i, gone);
            if found < cheapest.1 {
                cheapest = (i, found);
            }
        }
        kept.remove(cheapest.0);
    }
    Ok(kept)
}

fn swap_greedily<E>(experts: usize, mut kept: Vec<usize>, error: &mut Try<'_, E>) -> Result<(Vec<usize>, f64), E> {
    let mut least = error(&kept)?;
    loop {
        let mut best = None;
        for i in 0..kept.len() {
            let before = kept[i];
            for other in (0..experts).filter(|e| *e != before) {
                if kept.contains(&other) {
                    continue;
                }
                kept[i] = other;
                let found = error(&kept)?;
                kept[i] = before;
                if found < best.map_or(least, |(_, _, error)| error) {
                    best = Some((i, other, found));
                }
            }
        }
        let Some((i, other, found)) = best else { return Ok((kept, least)) };
        kept[i] = other;
        least = found;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two pairs of experts stand in for each other: greedy removal alone is misled, swaps mend it.
    #[test]
    fn searches_agree_where_they_can() {
        let cost = [5.0, 4.0, 3.0, 3.5, 1.0, 0.5];
        let error = |kept: &[usize]| {
            let gone = (0..6).filter(|e| !kept.contains(e));
            let lone: f64 = gone.clone().map(|e| cost[e]).sum();
            let both = |a, b| gone.clone().any(|e| e == a) && gone.clone().any(|e| e == b);
            Ok::<_, std::convert::Infallible>(
                lone + if both(4, 5) { 9.0 } else { 0.0 } + if both(2, 4) { 7.0 } else { 0.0 },
            )
        };
        for keep in 1..6 {
            let all = best_subset(6, keep, 100, error).unwrap();
            let greedy = best_subset(6, keep, 0, error).unwrap();
            assert!(all.exhaustive && !greedy.exhaustive && all.tried == subsets(6, keep));
            assert!(greedy.error >= all.error && greedy.error <= 1.1 * all.error, "{keep}: {greedy:?} {all:?}");
        }
        assert_eq!((subsets(8, 4), subsets(32, 16), subsets(200, 100)), (70, 601_080_390, usize::MAX));
    }
}
