//! Generated tokens to text, as they come.

use super::{TextError, Tokenizer};

/// What stands for bytes that are no text (yet).
const INCOMPLETE: char = '\u{fffd}';

/// Tokens that may be held back before they are shown as they are. A character has at most four
/// bytes; more is held only where tokens give no text or bytes that never become text.
const HELD_MAX: usize = 64;

/// Decodes tokens one by one and yields complete characters only.
///
/// All pieces and the rest from [`StreamDecoder::flush`] together are the text that
/// [`Tokenizer::decode`] gives of all the tokens (but where bytes turn out to be no text only after
/// characters before them were shown). A token's text depends on the tokens before it, so each is
/// decoded together with those of the piece before.
#[derive(Debug, Clone, Default)]
pub struct StreamDecoder {
    skip_special: bool,
    /// The tokens of the last shown piece, then those not shown yet.
    ids: Vec<u32>,
    /// How many of `ids` are of the last piece.
    context: usize,
    /// What the tokens of the last piece give by themselves.
    prefix: String,
    /// What is already shown of the tokens after them.
    shown: String,
}

impl StreamDecoder {
    pub(super) fn new(skip_special: bool) -> Self {
        Self { skip_special, ..Self::default() }
    }

    /// Takes a token and gives the text that can be shown now.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<Option<String>, TextError> {
        self.ids.push(id);
        let text = self.pending(tokenizer, false)?;
        let complete = text.trim_end_matches(INCOMPLETE);
        if self.ids.len() - self.context > HELD_MAX {
            return self.settle(tokenizer, &text);
        }
        if complete.len() == text.len() {
            return if text.is_empty() { Ok(None) } else { self.settle(tokenizer, &text) };
        }
        let Some(new) = complete.strip_prefix(&self.shown).filter(|new| !new.is_empty()) else {
            return Ok(None);
        };
        let new = new.to_owned();
        self.shown.push_str(&new);
        Ok(Some(new))
    }

    /// Gives what was held back. Bytes that never became a character are U+FFFD.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn flush(&mut self, tokenizer: &Tokenizer) -> Result<Option<String>, TextError> {
        let text = self.pending(tokenizer, true)?;
        self.settle(tokenizer, &text)
    }

    /// The text of the tokens after the last piece.
    fn pending(&self, tokenizer: &Tokenizer, last: bool) -> Result<String, TextError> {
        let whole = tokenizer.decode(&self.ids, self.skip_special)?;
        match whole.strip_prefix(&self.prefix) {
            Some(text) => Ok(text.to_owned()),
            // A byte after complete characters can make a decoder doubt all of them for a moment.
            None if whole.ends_with(INCOMPLETE) && !last => Ok(format!("{}{INCOMPLETE}", self.shown)),
            None => tokenizer.decode(&self.ids[self.context..], self.skip_special),
        }
    }

    /// Shows the rest of `text` and begins the next piece.
    fn settle(&mut self, tokenizer: &Tokenizer, text: &str) -> Result<Option<String>, TextError> {
        let new = text.strip_prefix(&self.shown).unwrap_or(text).to_owned();
        self.ids.drain(..self.context);
        self.context = self.ids.len();
        self.prefix = tokenizer.decode(&self.ids, self.skip_special)?;
        self.shown.clear();
        Ok(Some(new).filter(|new| !new.is_empty()))
    }
}
