//! Perplexity of a long text.

use quorate_model::{Lens, Model, ModelError};

use crate::encode::EncodedItem;
use crate::evaluate::{ItemScore, TaskScore, teacher_forced};

/// Perplexity of a text by windows of `context` tokens that follow each other. Of each window the tokens behind the first half
/// are scored, so that each has at least half a window before it; and the first token of each is the one that the
/// tokenizer puts before whole texts, if it does. The rest of the text is left out. `llama-perplexity` measures in
/// the same way, so the numbers can be compared.
#[derive(Clone, Debug)]
pub struct Windows {
    items: Vec<EncodedItem>,
}

impl Windows {
    /// Cuts the tokens of a whole text, as [`crate::encode::encode_text`] gives them. `bos` is what the tokenizer puts before it.
    pub fn new(tokens: &[u32], bos: Option<u32>, context: usize) -> Windows {
        let cut = |window: &[u32]| {
            let (mut prompt, answer) = (window[..context / 2 + 1].to_vec(), window[context / 2 + 1..].to_vec());
            if let Some(bos) = bos {
                prompt[0] = bos;
            }
            EncodedItem { prompt, answer }
        };
        // A window needs a token before and one behind the cut.
        let items = if context < 3 { Vec::new() } else { tokens.chunks_exact(context).map(cut).collect() };
        Windows { items }
    }

    /// How many windows there are.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether the text is shorter than a window.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Scores the windows one by one; `on_done(windows, so far)` returning false stops.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn score(
        &self,
        model: &Model,
        lens: &mut dyn Lens,
        on_done: &mut dyn FnMut(usize, &TaskScore) -> bool,
    ) -> Result<TaskScore, ModelError> {
        let mut score = TaskScore::default();
        for (i, item) in self.items.iter().enumerate() {
            let scores: Vec<ItemScore> = teacher_forced(model, std::slice::from_ref(item), lens)?;
            scores.iter().for_each(|window| score.add(window));
            if !on_done(i + 1, &score) {
                break;
            }
        }
        Ok(score)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_cut_in_half() {
        let tokens: Vec<u32> = (0..22).collect();
        let windows = Windows::new(&tokens, Some(99), 8);
        assert_eq!(windows.len(), 2);
        assert_eq!(windows.items[0].prompt, [99, 1, 2, 3, 4]);
        assert_eq!(windows.items[0].answer, [5, 6, 7]);
        assert_eq!(windows.items[1].prompt, [99, 9, 10, 11, 12]);
        assert_eq!(Windows::new(&tokens, None, 8).items[1].prompt[0], 8);
        assert!(Windows::new(&tokens, None, 23).is_empty());
        assert!(Windows::new(&tokens, None, 0).is_empty());
    }
}
