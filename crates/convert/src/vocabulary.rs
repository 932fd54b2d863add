//! A tokenizer folder in the words of GGUF: byte-level BPE (`gpt2`), or SentencePiece's BPE (`llama`).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use quorate_formats::{Checkpoint, FormatError, GgufValue};
use quorate_model::text::{GPT2_SPLIT, Tokenizer, gguf_pre_name};
use serde_json::Value;

use crate::error::{ConvertError, Result};
use crate::sentence_piece::{self, Piece};

/// Largest tokenizer file that is read.
const BYTES_MAX: u64 = 1 << 28;

/// What tokens are for, in numbers of the format.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5;
const BYTE: i64 = 6;

/// Score of tokens that are never merged.
const APART: f64 = -1000.0;
/// A space, as SentencePiece writes it.
const SPACE: char = '\u{2581}';

/// The metadata of a checkpoint's tokenizer. `pre` names the kind of splitting where it is not known by its expressions.
pub(crate) fn metadata(checkpoint: &Checkpoint, pre: Option<&str>) -> Result<Vec<(String, GgufValue)>> {
    let folder = checkpoint.folder();
    let path = folder.join("tokenizer.json");
    let size = checkpoint.spec().vocab_size;
    let tokenizer = Tokenizer::open(folder)
        .map_err(|e| refuse(&path, e.to_string(), "put the model's tokenizer files beside its weights"))?;
    let json = read(&path)?;
    let mut words = Words { path: &path, json: &json, size, pairs: Vec::new() };
    let model = folder.join("tokenizer.model");
    let kind = json["model"]["type"].as_str().unwrap_or_default();
    match (kind, words.is_byte_level()) {
        ("BPE", true) => words.byte_level(pre)?,
        ("BPE" | "Unigram", false) if model.is_file() => words.sentence_piece(&model)?,
        ("BPE", false) if json["model"]["byte_fallback"] == true => words.ranked()?,
        _ => {
            let problem = format!("a tokenizer of the kind {kind:?} cannot be written as GGUF");
            return Err(refuse(&path, problem, "byte-level BPE and SentencePiece BPE can"));
        }
    }
    words.special(&tokenizer)?;
    Ok(words.pairs)
}

fn refuse(path: &Path, problem: impl Into<String>, help: impl Into<String>) -> ConvertError {
    ConvertError::Tokenizer { path: path.to_owned(), problem: problem.into(), help: help.into() }
}

fn read(path: &Path) -> Result<Value> {
    let bytes = read_bytes(path)?;
    serde_json::from_slice(&bytes).map_err(|e| refuse(path, format!("not valid JSON: {e}"), "download it again"))
}

fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let io = |source| FormatError::Io { action: "read", path: PathBuf::from(path), source };
    let size = std::fs::metadata(path).map_err(io)?.len();
    if size > BYTES_MAX {
        return Err(refuse(path, format!("{size} bytes are too many"), "is it the right file?"));
    }
    Ok(std::fs::read(path).map_err(io)?)
}

/// A token that is not merged from others.
struct Added {
    id: usize,
    content: String,
    special: bool,
}

struct Words<'a> {
    path: &'a Path,
    json: &'a Value,
    /// Rows of the embedding.
    size: usize,
    pairs: Vec<(String, GgufValue)>,
}

impl Words<'_> {
    fn set(&mut self, key: &str, value: GgufValue) {
        self.pairs.push((format!("tokenizer.{key}"), value));
    }

    fn text(&mut self, key: &str, value: &str) {
        self.set(key, GgufValue::Text(value.to_owned()));
    }

    fn list<T>(&mut self, key: &str, values: impl IntoIterator<Item = T>, value: impl Fn(T) -> GgufValue) {
        self.set(key, GgufValue::list(values.into_iter().map(value)));
    }

    fn added(&self) -> Vec<Added> {
        let added = self.json["added_tokens"].as_array().map_or(&[][..], Vec::as_slice);
        let token = |t: &Value| {
            Some(Added {
                id: usize::try_from(t["id"].as_u64()?).ok()?,
                content: t["content"].as_str()?.to_owned(),
                special: t["special"] == true,
            })
        };
        added.iter().filter_map(token).collect()
    }

    fn vocabulary(&self) -> Result<HashMap<usize, &str>> {
        let vocab = self.json["model"]["vocab"].as_object();
        let vocab = vocab.ok_or_else(|| refuse(self.path, "it has no vocabulary", "download it again"))?;
        let token = |(token, id): (_, &Value)| Some((usize::try_from(id.as_u64()?).ok()?, String::as_str(token)));
        Ok(vocab.iter().filter_map(token).collect())
    }

    /// Each merge as its two parts.
    fn merges(&self) -> Result<Vec<(&str, &str)>> {
        let bad = || refuse(self.path, "its merges are no pairs of tokens", "download it again");
        let merges = self.json["model"]["merges"].as_array().ok_or_else(bad)?;
        merges.iter().map(|merge| pair(merge).ok_or_else(bad)).collect()
    }

    /// The parts of a pre-tokenizer or decoder: itself, or those of a sequence.
    fn parts(&self, of: &str, list: &str) -> Vec<&Value> {
        match &self.json[of] {
            Value::Null => Vec::new(),
            sequence if sequence["type"] == "Sequence" => sequence[list].as_array().into_iter().flatten().collect(),
            one => vec![one],
        }
    }

    fn is_byte_level(&self) -> bool {
        let of = [self.parts("pre_tokenizer", "pretokenizers"), self.parts("decoder", "decoders")];
        of.concat().iter().any(|part| part["type"] == "ByteLevel")
    }

    /// Tokens and types: the vocabulary, what was added, and names for rows of the embedding that have no token.
    fn tokens(&mut self, normal: impl Fn(&str) -> i64) -> Result<(Vec<String>, Vec<i64>)> {
        let vocabulary = self.vocabulary()?;
        let (mut tokens, mut types) = (Vec::with_capacity(self.size), Vec::with_capacity(self.size));
        for id in 0..self.size {
            let token = vocabulary.get(&id);
            tokens.push(token.map_or_else(|| format!("[PAD{id}]"), |t| (*t).to_owned()));
            types.push(token.map_or(UNUSED, |t| normal(t)));
        }
        if let Some(id) = vocabulary.keys().find(|&&id| id >= self.size) {
            return Err(self.beyond(*id));
        }
        for added in self.added() {
            if added.id >= self.size {
                return Err(self.beyond(added.id));
            }
            let id = added.id;
            (tokens[id], types[id]) = settled(added);
        }
        Ok((tokens, types))
    }

    fn beyond(&self, id: usize) -> ConvertError {
        let problem = format!("token {id} has no row in the embedding of {}", self.size);
        refuse(self.path, problem, "is it this model's tokenizer?")
    }

    fn byte_level(&mut self, pre: Option<&str>) -> Result<()> {
        let kind = match pre {
            Some(kind) => kind.to_owned(),
            None => self.kind_of_splitting()?,
        };
        let (tokens, types) = self.tokens(|_| NORMAL)?;
        // Spaces within a part would end it; they become the characters that llama.cpp expects.
        let shift = |part: &str| part.replace(' ', "\u{120}");
        let merges: Vec<String> =
            self.merges()?.into_iter().map(|(a, b)| format!("{} {}", shift(a), shift(b))).collect();
        self.text("ggml.model", "gpt2");
        self.text("ggml.pre", &kind);
        self.list("ggml.tokens", tokens, GgufValue::Text);
        self.list("ggml.token_type", types, GgufValue::Signed);
        self.list("ggml.merges", merges, GgufValue::Text);
        Ok(())
    }

    /// The name of the expressions by which texts are split.
    fn kind_of_splitting(&self) -> Result<String> {
        let mut splits = Vec::new();
        for part in self.parts("pre_tokenizer", "pretokenizers") {
            match part["type"].as_str().unwrap_or_default() {
                "Split" => {
                    let pattern = &part["pattern"];
                    let text = pattern["Regex"].as_str().or_else(|| pattern["String"].as_str());
                    splits.push(text.unwrap_or_default());
                }
                "Digits" => splits.push(r"\p{N}"),
                "ByteLevel" if part["use_regex"] != false => splits.push(GPT2_SPLIT),
                _ => {}
            }
        }
        let ignore_merges = self.json["model"]["ignore_merges"] == true;
        let name = gguf_pre_name(&splits, ignore_merges);
        name.map(str::to_owned).ok_or_else(|| {
            refuse(
                self.path,
                format!("llama.cpp has no name for the way in which it splits texts: {splits:?}"),
                "name the kind that is right with --pre, e.g. --pre llama-bpe",
            )
        })
    }

    /// From SentencePiece's own file.
    fn sentence_piece(&mut self, model: &Path) -> Result<()> {
        let pieces = sentence_piece::pieces(&read_bytes(model)?)
            .map_err(|problem| refuse(model, problem, "download it again"))?;
        if pieces.len() > self.size {
            return Err(self.beyond(pieces.len() - 1));
        }
        let unused = |id: usize| Piece { text: format!("[PAD{id}]"), score: APART as f32, kind: UNUSED };
        let pieces: Vec<Piece> = pieces.iter().cloned().chain((pieces.len()..self.size).map(unused)).collect();
        self.pieces(pieces)
    }

    /// From merges alone: a token's score says how early it is merged.
    fn ranked(&mut self) -> Result<()> {
        let mut ranks: HashMap<String, usize> = HashMap::new();
        for (rank, (a, b)) in self.merges()?.into_iter().enumerate() {
            ranks.entry(format!("{a}{b}")).or_insert(rank);
        }
        let is_byte = |t: &str| t.len() == 6 && t.starts_with("<0x") && t.ends_with('>');
        let kind = |t: &str| if is_byte(t) { BYTE } else { NORMAL };
        let (tokens, types) = self.tokens(kind)?;
        let unknown = self.json["model"]["unk_token"].as_str().map(str::to_owned);
        let none = ranks.len() as f64 + 1.0;
        let pieces = tokens.into_iter().zip(types).map(|(text, kind)| {
            let kind = if kind == CONTROL && Some(&text) == unknown.as_ref() { UNKNOWN } else { kind };
            let score = match (kind, ranks.get(&text)) {
                (NORMAL, Some(&rank)) => -(rank as f64) - 1.0,
                // Single characters are there before any merge.
                (NORMAL, None) => -none,
                (BYTE, _) => 0.0,
                _ => APART,
            };
            Piece { text, score: score as f32, kind }
        });
        let pieces: Vec<Piece> = pieces.collect();
        self.pieces(pieces)
    }

    fn pieces(&mut self, mut pieces: Vec<Piece>) -> Result<()> {
        for added in self.added() {
            let id = added.id;
            let Some(piece) = pieces.get_mut(id) else { return Err(self.beyond(id)) };
            if piece.kind == UNKNOWN || (piece.kind == BYTE && piece.text == added.content) {
                continue;
            }
            let (text, kind) = settled(added);
            *piece = Piece { text, score: APART as f32, kind };
        }
        self.text("ggml.model", "llama");
        self.text("ggml.pre", "default");
        self.list("ggml.scores", pieces.iter().map(|p| p.score), |s| GgufValue::Float(f64::from(s)));
        self.list("ggml.token_type", pieces.iter().map(|p| p.kind), GgufValue::Signed);
        self.list("ggml.tokens", pieces, |p| GgufValue::Text(p.text));
        Ok(())
    }

    /// Special tokens, what is put around texts, and templates: as the tokenizer itself does it.
    fn special(&mut self, tokenizer: &Tokenizer) -> Result<()> {
        let keys = [
            ("bos_token", "ggml.bos_token_id"),
            ("eos_token", "ggml.eos_token_id"),
            ("unk_token", "ggml.unknown_token_id"),
            ("sep_token", "ggml.seperator_token_id"), // so it is spelt
            ("pad_token", "ggml.padding_token_id"),
            ("cls_token", "ggml.cls_token_id"),
            ("mask_token", "ggml.mask_token_id"),
        ];
        let mut ids = HashMap::new();
        for (role, key) in keys {
            let id = tokenizer.special_tokens().get(role).and_then(|token| tokenizer.token_to_id(token));
            if let Some(id) = id {
                self.set(key, GgufValue::Unsigned(u64::from(id)));
                ids.insert(role, id);
            }
        }
        let encode = |special| {
            let encoded = tokenizer.encode("a", special);
            encoded.map_err(|e| refuse(self.path, e.to_string(), "is the file whole?"))
        };
        let (with, without) = (encode(true)?, encode(false)?);
        let first =
            with.first() == ids.get("bos_token") && with.len() > without.len() && with.first() != without.first();
        let last = with.last() == ids.get("eos_token") && with.len() > without.len() && with.last() != without.last();
        let spaced = without.first().and_then(|&id| tokenizer.id_to_token(id)).is_some_and(|t| t.starts_with(SPACE));
        self.set("ggml.add_bos_token", GgufValue::Bool(first && ids.contains_key("bos_token")));
        if last && ids.contains_key("eos_token") {
            self.set("ggml.add_eos_token", GgufValue::Bool(true));
        }
        if self.pairs.iter().any(|(key, value)| key == "tokenizer.ggml.model" && value.as_str() == Some("llama")) {
            self.set("ggml.add_space_prefix", GgufValue::Bool(spaced));
        }
        if let Some(template) = tokenizer.chat_template_source("default") {
            self.text("chat_template", template);
        }
        for name in ["tool_use", "rag"] {
            if let Some(template) = tokenizer.chat_template_source(name) {
                self.text(&format!("chat_template.{name}"), template);
            }
        }
        Ok(())
    }
}

/// A merge, in the old form or the new.
fn pair(merge: &Value) -> Option<(&str, &str)> {
    match merge {
        Value::String(text) => text.split_once(' '),
        Value::Array(parts) => Some((parts.first()?.as_str()?, parts.get(1)?.as_str()?)),
        _ => None,
    }
}

/// An added token's text and type. Some look special without being called so.
fn settled(added: Added) -> (String, i64) {
    let Added { content, special, .. } = added;
    let framed = |begin: &str, end: &str| content.starts_with(begin) && content.ends_with(end);
    let looks = ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&content.as_str())
        || framed("<|", "|>")
        || framed("<｜", "｜>")
        || framed("<unused", ">");
    match special || looks {
        true => (content, CONTROL),
        // Their text is compared before spaces are rewritten.
        false => (content.replace(SPACE, " "), USER_DEFINED),
    }
}
