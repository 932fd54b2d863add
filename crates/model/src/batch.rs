//! What one forward pass computes: token rows of one or several sequences, without padding.

use crate::ModelError;

/// What a token row is to its text. Interventions and statistics select by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// A prompt token but the last.
    Prompt,
    /// The last prompt token, which predicts the first token of the answer.
    PromptLast,
    /// A token of a given answer, fed as input (teacher forcing).
    Answer,
    /// A token that the model has generated.
    Decode,
}

impl Phase {
    /// Whether the row belongs to the prompt.
    pub fn is_prompt(self) -> bool {
        matches!(self, Phase::Prompt | Phase::PromptLast)
    }
}

/// Which rows of a segment get logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// None.
    None,
    /// The last row.
    Last,
    /// Every row.
    All,
    /// Every row from this one on (index within the segment).
    From(usize),
}

/// New tokens of one sequence. They continue what its cache slot holds.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Slot in the KV cache.
    pub slot: usize,
    /// Token ids.
    pub tokens: Vec<u32>,
    /// One phase per token.
    pub phases: Vec<Phase>,
    /// Rows whose logits are wanted.
    pub logits: LogitRows,
}

impl Segment {
    /// A prompt: all rows are `Prompt`, the last is `PromptLast`; logits of the last row.
    pub fn prompt(slot: usize, tokens: Vec<u32>) -> Segment {
        let n = tokens.len();
        let phases = (0..n).map(|i| if i + 1 == n { Phase::PromptLast } else { Phase::Prompt }).collect();
        Segment { slot, tokens, phases, logits: LogitRows::Last }
    }

    /// A prompt and its given answer; logits of the rows that predict the answer and of the last one.
    pub fn teacher_forced(slot: usize, prompt: &[u32], answer: &[u32]) -> Segment {
        let mut segment = Segment::prompt(slot, prompt.to_vec());
        segment.logits = LogitRows::From(prompt.len().saturating_sub(1));
        segment.tokens.extend_from_slice(answer);
        segment.phases.extend(std::iter::repeat_n(Phase::Answer, answer.len()));
        segment
    }

    /// One generated token.
    pub fn decode(slot: usize, token: u32) -> Segment {
        Segment { slot, tokens: vec![token], phases: vec![Phase::Decode], logits: LogitRows::Last }
    }

    fn wants_logits(&self, row: usize) -> bool {
        match self.logits {
            LogitRows::None => false,
            LogitRows::Last => row + 1 == self.tokens.len(),
            LogitRows::All => true,
            LogitRows::From(first) => row >= first,
        }
    }
}

/// The context of every token row of a batch; it travels with each site's value.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// Index of the row's segment in the batch.
    pub segment: Vec<usize>,
    /// Absolute position in its sequence.
    pub position: Vec<usize>,
    /// Token id.
    pub token: Vec<u32>,
    /// Phase.
    pub phase: Vec<Phase>,
    /// Rows whose logits are computed, ascending: row `m` of `logits` belongs to token row `logit_rows[m]`.
    pub logit_rows: Vec<usize>,
    /// For each segment: first row, number of rows, first position.
    pub spans: Vec<Span>,
}

/// The rows of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Slot in the KV cache.
    pub slot: usize,
    /// First row in the batch.
    pub row0: usize,
    /// Number of rows.
    pub len: usize,
    /// Position of the first row.
    pub pos0: usize,
}

impl Rows {
    /// Number of token rows `N`.
    pub fn len(&self) -> usize {
        self.token.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.token.is_empty()
    }

    /// Lays out segments; `lengths` gives the tokens that each cache slot already holds.
    ///
    /// # Errors
    /// An empty segment, one with more or fewer phases than tokens, a slot that is used twice or does not exist, or a token
    /// outside the vocabulary.
    pub fn of(segments: &[Segment], lengths: &[usize], vocab_size: usize) -> Result<Rows, ModelError> {
        let mut rows = Rows::default();
        for (index, segment) in segments.iter().enumerate() {
            let Some(&pos0) = lengths.get(segment.slot) else {
                return Err(ModelError::CacheSlot { slot: segment.slot, slots: lengths.len() });
            };
            if segment.tokens.is_empty() || rows.spans.iter().any(|s| s.slot == segment.slot) {
                return Err(ModelError::EmptyOrDoubleSegment { slot: segment.slot });
            }
            let (tokens, phases) = (segment.tokens.len(), segment.phases.len());
            if tokens != phases {
                return Err(ModelError::SegmentPhases { slot: segment.slot, tokens, phases });
            }
            let row0 = rows.len();
            rows.spans.push(Span { slot: segment.slot, row0, len: segment.tokens.len(), pos0 });
            for (i, (&token, &phase)) in segment.tokens.iter().zip(&segment.phases).enumerate() {
                if token as usize >= vocab_size {
                    return Err(ModelError::TokenOutOfRange { token, vocab_size });
                }
                if segment.wants_logits(i) {
                    rows.logit_rows.push(row0 + i);
                }
                rows.segment.push(index);
                rows.position.push(pos0 + i);
                rows.token.push(token);
                rows.phase.push(phase);
            }
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_carry_positions_phases_and_logit_rows() {
        let segments = [Segment::teacher_forced(1, &[5, 6, 7], &[8, 9]), Segment::decode(0, 3)];
        let rows = Rows::of(&segments, &[4, 0], 10).unwrap();
        assert_eq!(rows.position, [0, 1, 2, 3, 4, 4]);
        assert_eq!(rows.logit_rows, [2, 3, 4, 5]);
        assert_eq!(rows.phase[2], Phase::PromptLast);
        assert_eq!(rows.phase[3], Phase::Answer);
        assert_eq!(rows.spans[1], Span { slot: 0, row0: 5, len: 1, pos0: 4 });
    }

    #[test]
    fn bad_segments_are_refused() {
        assert!(Rows::of(&[Segment::decode(0, 10)], &[0], 10).is_err());
        assert!(Rows::of(&[Segment::decode(2, 1)], &[0], 10).is_err());
        assert!(Rows::of(&[Segment::prompt(0, vec![])], &[0], 10).is_err());
        assert!(Rows::of(&[Segment::decode(0, 1), Segment::decode(0, 1)], &[0], 10).is_err());
    }
}
