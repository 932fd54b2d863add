//! Task items as tokens.

use quorate_model::text::EncodedToken;
use quorate_model::{Model, ModelError, Segment};

use crate::tasks::TaskItem;

/// One item, tokenized.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedItem {
    /// Prompt tokens.
    pub prompt: Vec<u32>,
    /// Tokens of the full answer, thinking included.
    pub answer: Vec<u32>,
}

/// Tokens of a text as it is. The tokenizer's own special tokens are added unless the text begins with them.
///
/// # Errors
/// Whatever the tokenizer refuses.
pub fn encode_text(model: &Model, text: &str) -> Result<Vec<u32>, ModelError> {
    Ok(model.tokenizer().encode(text, adds_special(model, text))?)
}

/// The same tokens with the places they stand for.
///
/// # Errors
/// As [`encode_text`].
pub fn encode_text_with_offsets(model: &Model, text: &str) -> Result<Vec<EncodedToken>, ModelError> {
    Ok(model.tokenizer().encode_with_offsets(text, adds_special(model, text))?)
}

fn adds_special(model: &Model, text: &str) -> bool {
    !model.tokenizer().bos_token().is_some_and(|bos| !bos.is_empty() && text.starts_with(bos))
}

impl EncodedItem {
    /// Tokenizes an item and cuts it to the model's context: first the answer's end, then the prompt's beginning.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn new(model: &Model, item: &TaskItem) -> Result<EncodedItem, ModelError> {
        let mut prompt = encode_text(model, &item.prompt)?;
        let mut answer = model.tokenizer().encode(full_answer(item), false)?;
        let context = model.spec().max_position_embeddings;
        answer.truncate(context.saturating_sub(prompt.len()).max(1));
        let room = context.saturating_sub(answer.len());
        if prompt.len() > room {
            prompt.drain(..prompt.len() - room);
        }
        Ok(EncodedItem { prompt, answer })
    }

    /// Tokens in all.
    pub fn len(&self) -> usize {
        self.prompt.len() + self.answer.len()
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The item as one teacher-forced segment.
    pub fn segment(&self, slot: usize) -> Segment {
        Segment::teacher_forced(slot, &self.prompt, &self.answer)
    }
}

/// The answer with its thinking, where the item has one.
pub fn full_answer(item: &TaskItem) -> &str {
    item.meta.get("completion").and_then(|v| v.as_str()).unwrap_or(&item.answer)
}

/// Whether the item is plain text to be predicted, scored by perplexity.
pub fn is_language_modelling(item: &TaskItem) -> bool {
    item.meta.get("lm").and_then(|v| v.as_bool()).unwrap_or(false)
}

/// Splits items into runs of at most `tokens` tokens and `most` items; every run has at least one item.
pub fn batches(items: &[EncodedItem], tokens: usize, most: usize) -> Vec<std::ops::Range<usize>> {
    let mut runs = Vec::new();
    let (mut start, mut sum) = (0, 0);
    for (i, item) in items.iter().enumerate() {
        if i > start && (sum + item.len() > tokens || i - start == most) {
            runs.push(start..i);
            (start, sum) = (i, 0);
        }
        sum += item.len();
    }
    if start < items.len() {
        runs.push(start..items.len());
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_everything_once() {
        let item = |n: usize| EncodedItem { prompt: vec![0; n], answer: vec![] };
        let items: Vec<_> = [3, 4, 9, 1, 1, 1].map(item).into();
        assert_eq!(batches(&items, 7, 2), [0..2, 2..3, 3..5, 5..6]);
        assert!(batches(&[], 7, 2).is_empty());
    }
}
