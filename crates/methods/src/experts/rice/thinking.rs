//! Thinking in a text: where it begins and ends, and how a change of the model changes it.

use std::ops::Range;

use quorate_eval::statistics::{mean, standard_error};
use quorate_model::ModelError;
use quorate_model::text::Tokenizer;

use crate::MethodError;

/// The id of a text that is one token.
///
/// # Errors
/// A text that the tokenizer splits.
pub(super) fn one_token(tokenizer: &Tokenizer, text: &str) -> Result<u32, MethodError> {
    let tokens = tokenizer.encode_with_offsets(text, false).map_err(ModelError::from)?;
    if let [one] = tokens.as_slice() {
        return Ok(one.id);
    }
    let pieces: Vec<String> = tokens.iter().map(|t| format!("`{}`", t.token)).collect();
    Err(MethodError::needs(
        format!("`{text}` is no token of the model, it is split into {}", pieces.join(" ")),
        "give a marker that is one token",
    ))
}

/// The two tokens between which a model thinks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) begin: u32,
    pub(super) end: u32,
}

impl Bounds {
    /// The rows of a text that are its thinking, begin and end included; to the text's end if it does not end, `None` if it
    /// does not begin. A template may begin it in the prompt.
    pub(super) fn of(self, tokens: &[u32]) -> Option<Range<usize>> {
        let begin = tokens.iter().position(|&t| t == self.begin)?;
        let end = tokens[begin..].iter().position(|&t| t == self.end);
        Some(begin..end.map_or(tokens.len(), |e| begin + e + 1))
    }
}

/// How one answer thinks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Thought {
    /// Tokens between begin and end.
    pub(super) length: f64,
    /// Whether it begins.
    pub(super) begun: bool,
    /// Whether it ends.
    pub(super) ended: bool,
    /// Whether the answer is right.
    pub(super) right: bool,
}

impl Thought {
    /// Of a prompt and its answer.
    pub(super) fn of(tokens: &[u32], bounds: Bounds, right: bool) -> Thought {
        let rows = bounds.of(tokens).unwrap_or(0..0);
        let ended = rows.len() > 1 && tokens[rows.end - 1] == bounds.end;
        let length = rows.len().saturating_sub(1 + usize::from(ended)) as f64;
        Thought { length, begun: !rows.is_empty(), ended, right }
    }
}

/// What a change of the model does to the answers to the same prompts.
pub(super) struct Change {
    /// Mean tokens of thinking after it.
    pub(super) length: f64,
    /// Mean change of these tokens, and its standard error over prompts.
    pub(super) change: f64,
    pub(super) error: f64,
    /// Shares of answers that are right, that think, and whose thinking ends, of those that think.
    pub(super) right: f64,
    pub(super) begun: f64,
    pub(super) ended: Option<f64>,
}

impl Change {
    /// From the answers before and after, in the same order.
    pub(super) fn between(before: &[Thought], after: &[Thought]) -> Change {
        let changes: Vec<f64> = before.iter().zip(after).map(|(b, a)| a.length - b.length).collect();
        let lengths: Vec<f64> = after.iter().map(|t| t.length).collect();
        let count = |f: &dyn Fn(&Thought) -> bool| after.iter().filter(|t| f(t)).count() as f64;
        let (n, begun) = (after.len().max(1) as f64, count(&|t| t.begun));
        Change {
            length: mean(&lengths).unwrap_or(0.0),
            change: mean(&changes).unwrap_or(0.0),
            error: standard_error(&changes).unwrap_or(0.0),
            right: count(&|t| t.right) / n,
            begun: begun / n,
            ended: (begun > 0.0).then(|| count(&|t| t.ended) / begun),
        }
    }

    /// The change in standard errors; `None` if nothing varies.
    pub(super) fn errors(&self) -> Option<f64> {
        (self.error > 0.0).then(|| self.change / self.error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { begin: 5, end: 6 };

    #[test]
    fn thinking_is_found_in_prompt_and_answer() {
        assert_eq!(BOUNDS.of(&[1, 5, 7, 8, 6, 9]), Some(1..5));
        assert_eq!(BOUNDS.of(&[1, 5, 7]), Some(1..3));
        assert_eq!(BOUNDS.of(&[1, 6, 7]), None);
        let thought = |tokens: &[u32]| Thought::of(tokens, BOUNDS, true);
        let ended = Thought { length: 2.0, begun: true, ended: true, right: true };
        assert_eq!(thought(&[1, 5, 7, 8, 6, 9]), ended);
        assert_eq!(thought(&[5, 7, 8]), Thought { ended: false, ..ended });
        assert_eq!(thought(&[1, 9]), Thought { length: 0.0, begun: false, ended: false, right: true });
        assert_eq!((thought(&[5, 6]).length, thought(&[5]).length), (0.0, 0.0));
    }

    #[test]
    fn changes_are_paired() {
        let thought = |length, right| Thought { length, begun: length > 0.0, ended: length > 0.0, right };
        let before = [thought(1.0, true), thought(2.0, true), thought(9.0, false)];
        let after = [thought(2.0, true), thought(4.0, false), thought(12.0, false)];
        let change = Change::between(&before, &after);
        assert_eq!((change.length, change.change, change.begun, change.ended), (6.0, 2.0, 1.0, Some(1.0)));
        assert!((change.errors().unwrap() - 2.0 * 3f64.sqrt()).abs() < 1e-12, "deviation 1 over three prompts");
        assert!((change.right - 1.0 / 3.0).abs() < 1e-12);
        let none = Change::between(&before, &before);
        assert_eq!((none.change, none.errors()), (0.0, None));
    }
}
