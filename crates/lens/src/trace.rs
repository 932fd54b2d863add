//! Routing traces: which experts every token of a set of texts chose, with its context. The recorder that most expert
//! methods read.

use candle_core::Tensor;
use quorate_model::{At, Flow, Lens, ModelError, NO_EXPERT, Phase, Routing, Site, SiteSet, ops};

use crate::ExpertMap;

/// The routing of a set of texts, in memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoutingTrace {
    /// The texts, in the order of recording.
    pub items: Vec<ItemTrace>,
}

/// The routing of one text of `T` tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ItemTrace {
    /// Token ids, `[T]`.
    pub tokens: Vec<u32>,
    /// Phases, `[T]`.
    pub phases: Vec<Phase>,
    /// One entry for each MoE layer.
    pub layers: Vec<LayerTrace>,
}

/// The routing of one text in one MoE layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerTrace {
    /// Experts per token.
    pub k: usize,
    /// Chosen experts in rank order, `[T, k]`; [`NO_EXPERT`] is an empty slot.
    pub ids: Vec<u32>,
    /// Their gates, `[T, k]`.
    pub gates: Vec<f32>,
    /// Raw router logits, `[T, E]`; empty unless asked for.
    pub logits: Vec<f32>,
}

impl LayerTrace {
    /// Experts that token `t` chose, in rank order.
    pub fn chosen(&self, t: usize) -> impl Iterator<Item = usize> + '_ {
        self.ids[t * self.k..(t + 1) * self.k].iter().filter(|&&id| id != NO_EXPERT).map(|&id| id as usize)
    }

    /// Router logits of token `t`; empty if they were not recorded.
    pub fn logits_of(&self, t: usize, experts: usize) -> &[f32] {
        self.logits.get(t * experts..(t + 1) * experts).unwrap_or_default()
    }
}

impl ItemTrace {
    /// Tokens for which each expert was chosen, over the rows that `counts` picks (row, phase); numbered by `map`.
    pub fn counts(&self, map: &ExpertMap, counts: impl Fn(usize, Phase) -> bool) -> Vec<u64> {
        let mut totals = vec![0; map.total()];
        for (moe, layer) in self.layers.iter().enumerate() {
            let start = map.range(moe).start;
            for t in (0..self.tokens.len()).filter(|&t| counts(t, self.phases[t])) {
                layer.chosen(t).for_each(|e| totals[start + e] += 1);
            }
        }
        totals
    }

    /// Number of prompt tokens.
    pub fn prompt_len(&self) -> usize {
        self.phases.iter().filter(|p| p.is_prompt()).count()
    }
}

impl RoutingTrace {
    /// Tokens for which each expert was chosen, over all texts and rows; numbered by `map`.
    pub fn counts(&self, map: &ExpertMap) -> Vec<u64> {
        let mut totals = vec![0; map.total()];
        for item in &self.items {
            totals.iter_mut().zip(item.counts(map, |_, _| true)).for_each(|(a, b)| *a += b);
        }
        totals
    }

    /// Tokens of all texts.
    pub fn tokens(&self) -> u64 {
        self.items.iter().map(|i| i.tokens.len() as u64).sum()
    }
}

/// The lens that fills a [`RoutingTrace`]. Each segment of each forward pass is a text of its own.
#[derive(Debug)]
pub struct TraceRecorder {
    map: ExpertMap,
    with_logits: bool,
    trace: RoutingTrace,
    /// Text of the first segment of the pass under way.
    first: usize,
}

impl TraceRecorder {
    /// Records the routing, and the raw router logits if `with_logits`.
    pub fn new(map: ExpertMap, with_logits: bool) -> TraceRecorder {
        TraceRecorder { map, with_logits, trace: RoutingTrace::default(), first: 0 }
    }

    /// What was recorded.
    pub fn into_trace(self) -> RoutingTrace {
        self.trace
    }

    /// Begins new texts at the first site that a pass reaches.
    fn begin(&mut self, at: &At<'_>, moe: usize) {
        let first = if self.with_logits { Site::RouterLogits } else { Site::Routing };
        if moe > 0 || at.site != first {
            return;
        }
        self.first = self.trace.items.len();
        for span in &at.rows.spans {
            let rows = span.row0..span.row0 + span.len;
            self.trace.items.push(ItemTrace {
                tokens: at.rows.token[rows.clone()].to_vec(),
                phases: at.rows.phase[rows].to_vec(),
                layers: vec![LayerTrace::default(); self.map.n_layers()],
            });
        }
    }
}

impl Lens for TraceRecorder {
    fn sites(&self, layer: usize) -> SiteSet {
        match (self.map.moe_index(layer), self.with_logits) {
            (None, _) => SiteSet::NONE,
            (Some(_), false) => SiteSet::of(&[Site::Routing]),
            (Some(_), true) => SiteSet::of(&[Site::Routing, Site::RouterLogits]),
        }
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        if let Some(moe) = self.map.moe_index(at.layer) {
            self.begin(at, moe);
            let (x, e) = (ops::values(value)?, self.map.experts[moe]);
            for (i, span) in at.rows.spans.iter().enumerate() {
                let rows = &x[span.row0 * e..(span.row0 + span.len) * e];
                self.trace.items[self.first + i].layers[moe].logits.extend_from_slice(rows);
            }
        }
        Ok(Flow::Continue)
    }

    fn routing(&mut self, at: &At<'_>, routing: &mut Routing) -> Result<Flow, ModelError> {
        if let Some(moe) = self.map.moe_index(at.layer) {
            self.begin(at, moe);
            let (k, gates) = (routing.k, ops::values(&routing.gates)?);
            for (i, span) in at.rows.spans.iter().enumerate() {
                let slots = span.row0 * k..(span.row0 + span.len) * k;
                let layer = &mut self.trace.items[self.first + i].layers[moe];
                layer.k = k;
                layer.ids = routing.ids[slots.clone()].to_vec();
                layer.gates = gates[slots].to_vec();
            }
        }
        Ok(Flow::Continue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_follow_tokens_and_phases() {
        let layer = LayerTrace { k: 2, ids: vec![0, 2, 1, NO_EXPERT, 2, 0], gates: vec![0.5; 6], logits: vec![] };
        let item = ItemTrace {
            tokens: vec![7, 8, 9],
            phases: vec![Phase::Prompt, Phase::PromptLast, Phase::Answer],
            layers: vec![layer],
        };
        let map = ExpertMap::new(vec![0], vec![3]);
        assert_eq!(item.counts(&map, |_, _| true), [2, 1, 2]);
        assert_eq!(item.counts(&map, |_, p| p.is_prompt()), [1, 1, 1]);
        assert_eq!(item.layers[0].chosen(1).collect::<Vec<_>>(), [1]);
        assert_eq!(item.prompt_len(), 2);
        let trace = RoutingTrace { items: vec![item.clone(), item] };
        assert_eq!((trace.counts(&map), trace.tokens()), (vec![4, 2, 4], 6));
    }
}
