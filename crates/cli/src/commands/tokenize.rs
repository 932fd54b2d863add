//! `quorate tokenize`: text to tokens and back.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use quorate_model::text::EncodedToken;
use serde_json::json;

use crate::common::{Common, read_text_file, say};

/// Arguments of `tokenize`.
#[derive(Args)]
#[command(after_help = "\
One line a token: its id, the characters of the text that it stands for, the token as the vocabulary writes it.
The tokenizer is the one that `run` uses: of a folder with a GGUF file and no safetensors, the file's; --tokenizer takes another.

Examples:
  quorate tokenize \"78+95=\"
  quorate tokenize -m model.gguf --file notes.txt --json
  quorate tokenize -m model.gguf --ids 9707,1879")]
pub struct Tokenize {
    /// The text as it is
    #[arg(value_name = "TEXT", conflicts_with_all = ["file", "ids"], required_unless_present_any = ["file", "ids"])]
    text: Option<String>,
    /// File with the text
    #[arg(long, value_name = "FILE", conflicts_with = "ids")]
    file: Option<PathBuf>,
    /// Ids to write as text
    #[arg(long, value_name = "ID,..", value_delimiter = ',')]
    ids: Option<Vec<u32>>,
    /// Do not add what the tokenizer adds to whole texts, such as a token at the beginning
    #[arg(long, conflicts_with = "ids")]
    no_special: bool,
}

impl Tokenize {
    pub fn run(&self, common: &Common) -> Result<()> {
        let tokenizer = common.open_tokenizer()?;
        if let Some(ids) = &self.ids {
            if let Some(id) = ids.iter().find(|&&id| tokenizer.id_to_token(id).is_none()) {
                bail!("there is no token {id}; help: the tokenizer has {}, from 0", tokenizer.vocab_size());
            }
            let text = tokenizer.decode(ids, false)?;
            return if common.json { common.print_json(&json!({ "text": text })) } else { Ok(say!("{text}")?) };
        }
        let text = match (&self.file, &self.text) {
            (Some(path), _) => read_text_file(path)?,
            (None, text) => text.clone().context("no text; help: give one, or --file FILE")?,
        };
        if common.json {
            let ids = tokenizer.encode(&text, !self.no_special)?;
            return common.print_json(&json!({ "n": ids.len(), "ids": ids }));
        }
        let tokens = tokenizer.encode_with_offsets(&text, !self.no_special)?;
        for EncodedToken { id, token, chars } in &tokens {
            say!("{id:>7}  {:>11}  {token:?}", format!("{}-{}", chars.start, chars.end))?;
        }
        common.note(&format!("{} tokens, {} characters", tokens.len(), text.chars().count()));
        Ok(())
    }
}
