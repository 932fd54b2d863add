//! A model's tokenizer.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use quorate_formats::{GgufFile, GgufValue};

use super::gguf::{self, GgufTokenizer};
use super::token_model::Pipeline;
use super::tokenizer_config::{TokenizerConfig, read_limited};
use super::{ChatTemplate, SpecialTokens, StreamDecoder, TextError};

/// The largest `tokenizer.json` that is read, in bytes. Released ones have up to 40 million.
const TOKENIZER_BYTES_MAX: u64 = 1 << 30;

/// Files of tokenizer formats that are not read, named when `tokenizer.json` is missing.
const OTHER_FORMATS: [&str; 5] = ["tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "tiktoken.model"];

/// Where chat templates are looked for.
const FOLDER_TEMPLATES: &str = "looked for chat_template.jinja and the key chat_template in tokenizer_config.json";
const GGUF_TEMPLATES: &str = "looked for the key tokenizer.chat_template";

/// Text to token ids and back, as transformers does it with the same folder and llama.cpp with the same file.
pub struct Tokenizer {
    inner: Pipeline,
    config: TokenizerConfig,
    place: PathBuf,
    looked_for: &'static str,
}

/// A token with its place in the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedToken {
    /// The token's id.
    pub id: u32,
    /// The token in the vocabulary's spelling; an added token with the spaces that it took from the text.
    pub token: String,
    /// The CHARACTERS (not bytes) of the text it stands for; empty for tokens that were added.
    pub chars: Range<usize>,
}

impl Tokenizer {
    /// Reads the tokenizer that belongs to the model at `path`: of a model that is opened from a GGUF file the one in that file,
    /// also if `tokenizer.json` lies beside it; of others, or where there are no weights, that of the folder.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn of_model(path: &Path) -> Result<Self, TextError> {
        let file = quorate_formats::gguf_of(path)?;
        Self::open(file.as_deref().unwrap_or(path))
    }

    /// Reads the tokenizer of a GGUF file, or of a folder: `tokenizer.json` and, where present, `tokenizer_config.json`,
    /// `special_tokens_map.json` and the chat template's files. The path of another file of a model stands for its folder;
    /// without `tokenizer.json` the GGUF file in it counts.
    ///
    /// Truncation and padding that `tokenizer.json` may ask for are left out, as in transformers.
    ///
    /// # Errors
    /// A missing, broken or oversized file, or a GGUF file with a tokenizer of an unknown kind.
    pub fn open(path: &Path) -> Result<Self, TextError> {
        if path.is_file() && path.extension().is_some_and(|name| name == "gguf") {
            return Self::from_gguf(GgufFile::open(path)?.metadata(), path);
        }
        let dir = if path.is_file() { path.parent().unwrap_or(path) } else { path };
        let path = dir.join("tokenizer.json");
        let Some(bytes) = read_limited(&path, TOKENIZER_BYTES_MAX)? else {
            let file = if dir.is_dir() { quorate_formats::gguf::in_folder(dir)? } else { None };
            return file.map_or_else(|| Err(no_tokenizer(dir)), |file| Self::open(&file));
        };
        let invalid = |message: String| TextError::Invalid { path: path.clone(), message };
        let mut inner = guarded(|| Pipeline::from_bytes(&bytes)).map_err(invalid)?;
        inner.with_truncation(None).map_err(|error| invalid(error.to_string()))?;
        inner.with_padding(None);
        let (config, place) = (TokenizerConfig::read(dir)?, dir.to_owned());
        Ok(Self { inner, config, place, looked_for: FOLDER_TEMPLATES })
    }

    /// Builds the tokenizer that a GGUF file's metadata describe; `path` is the file's.
    ///
    /// # Errors
    /// A vocabulary that is missing, contradicts itself or is of an unknown kind.
    pub fn from_gguf(metadata: &BTreeMap<String, GgufValue>, path: &Path) -> Result<Self, TextError> {
        let place = path.to_owned();
        let read = catch_unwind(AssertUnwindSafe(|| gguf::read(metadata, path)));
        let broken = |_| TextError::Gguf { path: place.clone(), message: "its parts contradict each other".to_owned() };
        let GgufTokenizer { pipeline, config } = read.map_err(broken)??;
        Ok(Self { inner: pipeline, config, place, looked_for: GGUF_TEMPLATES })
    }

    /// The ids of a text. `add_special` lets the tokenizer add what it adds to whole texts, such as
    /// a beginning-of-text token; special tokens written in the text count in both cases.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let encoding = guarded(|| self.inner.encode_fast(text, add_special)).map_err(encode_error)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of a text with the places they stand for.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_offsets(&self, text: &str, add_special: bool) -> Result<Vec<EncodedToken>, TextError> {
        let encoding = guarded(|| self.inner.encode_char_offsets(text, add_special)).map_err(encode_error)?;
        let ids = encoding.get_ids().iter().zip(encoding.get_tokens()).zip(encoding.get_offsets());
        let token = |((&id, token), &(start, end)): ((&u32, &String), &(usize, usize))| EncodedToken {
            id,
            token: token.clone(),
            chars: start..end,
        };
        Ok(ids.map(token).collect())
    }

    /// The text of ids. Ids without a token give nothing; bytes that are no text give U+FFFD.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        guarded(|| self.inner.decode(ids, skip_special)).map_err(|message| TextError::Decode { message })
    }

    /// A decoder for ids that come one by one.
    pub fn stream_decoder(&self, skip_special: bool) -> StreamDecoder {
        StreamDecoder::new(skip_special)
    }

    /// The id of a token.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, in the vocabulary's own spelling.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// How many tokens there are, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The special tokens that the configuration names.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.config.specials
    }

    /// The token at the beginning of a text.
    pub fn bos_token(&self) -> Option<&str> {
        self.config.specials.get("bos_token")
    }

    /// The token at the end of a text.
    pub fn eos_token(&self) -> Option<&str> {
        self.config.specials.get("eos_token")
    }

    /// The token that fills up rows of a batch.
    pub fn pad_token(&self) -> Option<&str> {
        self.config.specials.get("pad_token")
    }

    /// The source of a chat template by name; the usual one is `default`.
    pub fn chat_template_source(&self, name: &str) -> Option<&str> {
        self.config.templates.get(name).map(String::as_str)
    }

    /// The model's chat template, with its special tokens. Models that have one of their own for
    /// conversations with tools get that if `with_tools`.
    ///
    /// # Errors
    /// No template, or one that cannot be parsed.
    pub fn chat_template(&self, with_tools: bool) -> Result<ChatTemplate, TextError> {
        let for_tools = self.chat_template_source("tool_use").filter(|_| with_tools);
        let source = for_tools.or_else(|| self.chat_template_source("default"));
        let source = source
            .ok_or_else(|| TextError::NoChatTemplate { place: self.place.clone(), looked_for: self.looked_for })?;
        ChatTemplate::new(source, self.config.specials.clone())
    }
}

/// Runs a part of the tokenizer. The library panics on some files whose parts contradict each other (a template that
/// names a token without definition, a decoder that strips more than there is); here that is an error of the file.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the parts of the tokenizer contradict each other".to_owned()),
    }
}

fn encode_error(message: String) -> TextError {
    TextError::Encode { message }
}

fn no_tokenizer(dir: &Path) -> TextError {
    let others = OTHER_FORMATS.into_iter().filter(|name| dir.join(name).exists());
    let others: Vec<_> = others.collect();
    let found = match others.is_empty() {
        true => String::new(),
        false => format!(", found only {}, which is not read", others.join(", ")),
    };
    TextError::NoTokenizer { dir: dir.to_owned(), found }
}

#[cfg(test)]
mod tests;
