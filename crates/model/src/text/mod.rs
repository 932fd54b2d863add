//! Text to tokens and back, and conversations to prompts.
//!
//! [`Tokenizer`] reads the tokenizer of a model folder or a GGUF file, [`StreamDecoder`] turns generated tokens
//! into text that can be shown at once, [`ChatTemplate`] writes a conversation in the form that the
//! model was trained on. Nothing here knows of weights.

mod chat;
mod gguf;
mod spm;
mod stream;
mod template;
mod token_model;
mod tokenizer;
mod tokenizer_config;

use std::path::PathBuf;

pub use chat::{ChatTemplate, Message};
pub use gguf::{GPT2_SPLIT, gguf_pre_name};
pub use stream::StreamDecoder;
pub use tokenizer::{EncodedToken, Tokenizer};
pub use tokenizer_config::SpecialTokens;

/// What can go wrong between text and tokens.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The folder has no `tokenizer.json`.
    #[error(
        "no tokenizer in {}: looked for tokenizer.json{found}; help: transformers writes it with \
         AutoTokenizer.from_pretrained(..).save_pretrained(..)", .dir.display()
    )]
    NoTokenizer {
        /// The folder that was looked into.
        dir: PathBuf,
        /// Files of other tokenizer formats that are there, as text.
        found: String,
    },
    /// A file could not be read.
    #[error("cannot read {}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is larger than any real one.
    #[error("{} has {bytes} bytes, but at most {limit} are read; help: is it the right file?", .path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The most that is read.
        limit: u64,
    },
    /// A file is not the JSON that it should be.
    #[error("{} is not valid: {message}; help: download it again", .path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        message: String,
    },
    /// A GGUF file's metadata have no tokenizer that can be used.
    #[error(
        "the tokenizer in {} cannot be used: {message}; help: --tokenizer FOLDER takes another one, from the model's \
         tokenizer.json", .path.display()
    )]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The file's header could not be read.
    #[error(transparent)]
    Format(#[from] quorate_formats::FormatError),
    /// The tokenizer failed to encode a text.
    #[error("cannot tokenize the text: {message}")]
    Encode {
        /// What the tokenizer said.
        message: String,
    },
    /// The tokenizer failed to decode tokens.
    #[error("cannot decode the tokens: {message}")]
    Decode {
        /// What the tokenizer said.
        message: String,
    },
    /// The model has no chat template.
    #[error("{} has no chat template: {looked_for}; help: use the text as it is (--raw)", .place.display())]
    NoChatTemplate {
        /// The model's folder or file.
        place: PathBuf,
        /// Where one would be.
        looked_for: &'static str,
    },
    /// The chat template is not a template that can be run.
    #[error("the chat template is broken{}: {message}", in_line(*.line))]
    TemplateSyntax {
        /// Line in the template, from 1; 0 if unknown.
        line: u32,
        /// What is wrong.
        message: String,
    },
    /// The chat template refused the conversation, in its own words.
    #[error("the chat template refuses the conversation: {message}")]
    TemplateRaised {
        /// What the template said.
        message: String,
    },
    /// The chat template failed.
    #[error("the chat template failed{}: {message}", in_line(*.line))]
    TemplateFailed {
        /// Line in the template, from 1; 0 if unknown.
        line: u32,
        /// What failed.
        message: String,
    },
    /// The chat template wanted more time or memory than it may have.
    #[error("the chat template was stopped{}: {message}", in_line(*.line))]
    TemplateLimit {
        /// Line in the template, from 1; 0 if unknown.
        line: u32,
        /// What it wanted too much of.
        message: String,
    },
    /// The conversation has not the form of one.
    #[error("the conversation is not valid: {message}")]
    Conversation {
        /// What is wrong.
        message: String,
    },
}

fn in_line(line: u32) -> String {
    if line == 0 { String::new() } else { format!(" in line {line}") }
}
