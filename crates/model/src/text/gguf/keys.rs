//! Tokenizer keys of GGUF metadata, checked as they are read.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use quorate_formats::{GgufArray, GgufValue};

use crate::text::TextError;

/// The metadata of a file.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    pub metadata: &'a BTreeMap<String, GgufValue>,
    pub path: &'a Path,
}

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Unknown,
    /// Steers the model, and is no text.
    Control,
    /// Text that is always one token.
    UserDefined,
    Unused,
    /// One byte, `<0x0A>`.
    Byte,
}

impl<'a> Keys<'a> {
    pub fn wrong(&self, message: impl Into<String>) -> TextError {
        TextError::Gguf { path: self.path.to_owned(), message: message.into() }
    }

    fn not(&self, key: &str, what: &str) -> TextError {
        self.wrong(format!("the value of its key {key} is not {what}"))
    }

    /// A text.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>, TextError> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.not(key, "a text"))
    }

    /// A truth value.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, TextError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(GgufValue::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.not(key, "true or false")),
        }
    }

    /// The id of a token, one of `count`. -1 and its unsigned form stand for none.
    pub fn id(&self, key: &str, count: usize) -> Result<Option<u32>, TextError> {
        let none = [GgufValue::Unsigned(u64::from(u32::MAX)), GgufValue::Signed(-1)];
        match self.metadata.get(key) {
            None => Ok(None),
            Some(value) if none.contains(value) => Ok(None),
            Some(value) => {
                let id = value.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|&id| (id as usize) < count);
                let what = || format!("the id of one of its {count} tokens");
                id.map(Some).ok_or_else(|| self.not(key, &what()))
            }
        }
    }

    fn list(&self, key: &str) -> Result<Option<&'a GgufArray>, TextError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(GgufValue::Array(values)) => Ok(Some(values)),
            Some(_) => Err(self.not(key, "a list")),
        }
    }

    /// A list that has something of each token.
    fn of_tokens(&self, key: &str, count: usize) -> Result<Option<&'a GgufArray>, TextError> {
        let Some(values) = self.list(key)? else { return Ok(None) };
        if values.len() != count {
            return Err(self.wrong(format!("its key {key} has {} values for {count} tokens", values.len())));
        }
        Ok(Some(values))
    }

    /// A list of texts.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>, TextError> {
        let Some(values) = self.list(key)? else { return Ok(None) };
        values.texts().map(Some).ok_or_else(|| self.not(key, "a list of texts"))
    }

    /// A list of bytes, signed or not.
    pub fn bytes(&self, key: &str) -> Result<Option<Vec<u8>>, TextError> {
        let Some(values) = self.list(key)? else { return Ok(None) };
        let byte = |value| match value {
            GgufValue::Unsigned(byte) => u8::try_from(byte).ok(),
            GgufValue::Signed(byte) => i8::try_from(byte).ok().map(i8::cast_unsigned),
            _ => None,
        };
        let bytes = values.iter().map(byte).collect::<Option<Vec<_>>>();
        bytes.map(Some).ok_or_else(|| self.not(key, "a list of bytes"))
    }

    /// The vocabulary. All tokens are different; an empty one, which no text can be, is `[EMPTY_ID]`.
    pub fn tokens(&self) -> Result<Vec<String>, TextError> {
        let key = "tokenizer.ggml.tokens";
        let texts = self.texts(key)?.ok_or_else(|| self.wrong(format!("it has no key {key}")))?;
        let name = |(id, text): (usize, &str)| match text {
            "" => format!("[EMPTY_{id}]"),
            text => text.to_owned(),
        };
        let tokens: Vec<_> = texts.into_iter().enumerate().map(name).collect();
        let mut seen = HashSet::with_capacity(tokens.len());
        match tokens.iter().find(|token| !seen.insert(token.as_str())) {
            Some(twice) => Err(self.wrong(format!("its vocabulary has the token {twice:?} twice"))),
            None if tokens.is_empty() => Err(self.wrong("its vocabulary is empty")),
            None => Ok(tokens),
        }
    }

    /// What each token is for; without the key all are text.
    pub fn kinds(&self, count: usize) -> Result<Vec<Kind>, TextError> {
        let key = "tokenizer.ggml.token_type";
        let Some(values) = self.of_tokens(key, count)? else { return Ok(vec![Kind::Normal; count]) };
        let kind = |value: GgufValue| match value.as_u64()? {
            0 | 1 => Some(Kind::Normal),
            2 => Some(Kind::Unknown),
            3 => Some(Kind::Control),
            4 => Some(Kind::UserDefined),
            5 => Some(Kind::Unused),
            6 => Some(Kind::Byte),
            _ => None,
        };
        values.iter().map(kind).collect::<Option<Vec<_>>>().ok_or_else(|| self.not(key, "a list of types 0 to 6"))
    }

    /// The score of each token.
    pub fn scores(&self, count: usize) -> Result<Vec<f32>, TextError> {
        let key = "tokenizer.ggml.scores";
        let values = self.of_tokens(key, count)?.ok_or_else(|| self.wrong(format!("it has no key {key}")))?;
        let score = |value| match value {
            GgufValue::Float(score) if score.is_finite() => Some(score as f32),
            GgufValue::Signed(score) => Some(score as f32),
            _ => None,
        };
        values.iter().map(score).collect::<Option<Vec<_>>>().ok_or_else(|| self.not(key, "a list of finite numbers"))
    }
}
