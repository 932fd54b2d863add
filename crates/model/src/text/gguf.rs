//! The tokenizer that a GGUF file carries in its metadata.
//!
//! Texts get the tokens that llama.cpp gives them, and spell special tokens out as it does. Two differences are meant: words
//! of the kinds `gpt-4o` and `tekken` are split as the models' authors do (llama.cpp takes upper and lower case outside
//! of ASCII for one), and where special tokens overlap in a text, the first one counts, as in transformers.
//! A file says nothing of normalization (NFC and the like), so there is none.

mod keys;
mod pre;

use std::collections::BTreeMap;
use std::path::Path;

use quorate_formats::GgufValue;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::{Precompiled, Replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence as Splits;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::processors::template::{SpecialToken, TemplateProcessing};
use tokenizers::{AddedToken, DecoderWrapper, ModelWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

pub use self::pre::GPT2 as GPT2_SPLIT;
use super::spm::{SPACE, Spm};
use super::token_model::{Pipeline, TokenModel};
use super::tokenizer_config::TokenizerConfig;
use super::{SpecialTokens, TextError};
use keys::{Keys, Kind};
use pre::Pre;

/// Roles of special tokens: what templates call them, and their keys.
const SPECIAL_KEYS: [(&str, &str); 7] = [
    ("bos_token", "tokenizer.ggml.bos_token_id"),
    ("eos_token", "tokenizer.ggml.eos_token_id"),
    ("unk_token", "tokenizer.ggml.unknown_token_id"),
    ("sep_token", "tokenizer.ggml.seperator_token_id"), // so it is spelt
    ("pad_token", "tokenizer.ggml.padding_token_id"),
    ("cls_token", "tokenizer.ggml.cls_token_id"),
    ("mask_token", "tokenizer.ggml.mask_token_id"),
];

/// What a file says of its tokenizer.
pub(super) struct GgufTokenizer {
    pub pipeline: Pipeline,
    pub config: TokenizerConfig,
}

/// The parts that depend on the kind of tokenizer.
struct Parts {
    pipeline: Pipeline,
    adds_bos: bool,
    adds_eos: bool,
}

/// What `tokenizer.ggml.pre` calls a way of splitting texts: these expressions, one after the other, and whether a piece that is
/// a token is that token whatever the merges would make of it. `None` if it has no name.
pub fn gguf_pre_name(splits: &[&str], ignore_merges: bool) -> Option<&'static str> {
    pre::name_of(splits, ignore_merges)
}

/// Builds the tokenizer of a file's metadata. `path` is the file's, for messages.
pub(super) fn read(metadata: &BTreeMap<String, GgufValue>, path: &Path) -> Result<GgufTokenizer, TextError> {
    let keys = Keys { metadata, path };
    let model = keys.text("tokenizer.ggml.model")?.ok_or_else(|| keys.wrong("it has no key tokenizer.ggml.model"))?;
    let tokens = keys.tokens()?;
    let kinds = keys.kinds(tokens.len())?;
    let specials = special_ids(&keys, model, tokens.len())?;
    let id_of = |role: &str| specials.get(role).copied();
    let mut parts = match model {
        "gpt2" => byte_level(&keys, &tokens)?,
        "llama" => sentence_piece(&keys, &tokens, id_of("unk_token"))?,
        "t5" => unigram(&keys, &tokens, id_of("unk_token"))?,
        other => {
            let message = format!("its kind (tokenizer.ggml.model) is `{other}`; gpt2, llama and t5 are read");
            return Err(keys.wrong(message));
        }
    };
    add_tokens(&keys, &mut parts.pipeline, &tokens, &kinds)?;
    add_template(&keys, &mut parts, &tokens, id_of("bos_token"), id_of("eos_token"))?;
    let mut roles = SpecialTokens::default();
    for (&role, &id) in &specials {
        roles.set(role, tokens[id as usize].clone());
    }
    let config = TokenizerConfig { specials: roles, templates: templates(&keys)? };
    Ok(GgufTokenizer { pipeline: parts.pipeline, config })
}

/// Special tokens by role. SentencePiece has ids of its own for the first three where a file does not say.
fn special_ids(keys: &Keys<'_>, model: &str, count: usize) -> Result<BTreeMap<&'static str, u32>, TextError> {
    let usual: &[(&str, u32)] = match model {
        "llama" => &[("bos_token", 1), ("eos_token", 2), ("unk_token", 0)],
        "t5" => &[("eos_token", 1), ("unk_token", 2), ("pad_token", 0)],
        _ => &[],
    };
    let mut ids: BTreeMap<&'static str, u32> = BTreeMap::new();
    for (role, key) in SPECIAL_KEYS {
        let usual = usual.iter().find(|(name, id)| *name == role && (*id as usize) < count).map(|&(_, id)| id);
        let usual = usual.filter(|_| !keys.metadata.contains_key(key));
        if let Some(id) = keys.id(key, count)?.or(usual) {
            ids.insert(role, id);
        }
    }
    Ok(ids)
}

/// Byte-pair encoding of bytes, with the splits that `tokenizer.ggml.pre` names.
fn byte_level(keys: &Keys<'_>, tokens: &[String]) -> Result<Parts, TextError> {
    let key = "tokenizer.ggml.pre";
    let name = keys.text(key)?.ok_or_else(|| {
        keys.wrong(format!("it has no key {key}, so it is not known how the model's authors split texts into words"))
    })?;
    let Some(pre) = Pre::of(name) else {
        let known = pre::names().collect::<Vec<_>>().join(", ");
        return Err(
            keys.wrong(format!("the way it splits texts ({key}) is `{name}`, which is not known; known are {known}"))
        );
    };
    let library = |error: tokenizers::Error| keys.wrong(error.to_string());
    let merges_key = "tokenizer.ggml.merges";
    let merges = keys.texts(merges_key)?.ok_or_else(|| keys.wrong(format!("it has no key {merges_key}")))?;
    // A token may begin with a space, but not be one.
    let pair = |merge: &str| {
        let space = merge.bytes().skip(1).position(|byte| byte == b' ')? + 1;
        Some((merge[..space].to_owned(), merge[space + 1..].to_owned()))
    };
    let pairs = merges.into_iter().map(|merge| pair(merge).ok_or(merge)).collect::<Result<Vec<_>, _>>();
    let pairs = pairs.map_err(|merge| keys.wrong(format!("{merge:?} in its key {merges_key} is not two tokens")))?;
    let vocab = tokens.iter().cloned().zip(0..);
    let vocab: tokenizers::models::bpe::Vocab = vocab.collect();
    let builder = BPE::builder().vocab_and_merges(vocab, pairs).ignore_merges(pre.ignore_merges);
    let mut pipeline = pipeline(builder.build().map_err(library)?);
    let mut splits: Vec<PreTokenizerWrapper> = Vec::new();
    for expression in pre.splits {
        let pattern = SplitPattern::Regex((*expression).to_owned());
        splits.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(library)?.into());
    }
    let bytes = ByteLevel::new(false, false, false);
    splits.push(bytes.into());
    pipeline.with_pre_tokenizer(Some(Splits::new(splits)));
    pipeline.with_decoder(Some(bytes));
    Ok(Parts { pipeline, adds_bos: pre.adds_bos, adds_eos: false })
}

/// Merges by score, as SentencePiece does.
fn sentence_piece(keys: &Keys<'_>, tokens: &[String], unknown: Option<u32>) -> Result<Parts, TextError> {
    let scores = keys.scores(tokens.len())?;
    let space_prefix = keys.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let spm = Spm::new(tokens.to_vec(), scores, unknown, space_prefix);
    let mut pipeline = Pipeline::new(TokenModel::Spm(Box::new(spm)));
    let space = Replace::new(SPACE.to_string(), " ").map_err(|error| keys.wrong(error.to_string()))?;
    let mut decoders: Vec<DecoderWrapper> = vec![space.into(), ByteFallback::new().into(), Fuse::new().into()];
    if space_prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    pipeline.with_decoder(Some(Decoders::new(decoders)));
    Ok(Parts { pipeline, adds_bos: true, adds_eos: false })
}

/// The most probable tokens, as SentencePiece's unigram model finds them.
fn unigram(keys: &Keys<'_>, tokens: &[String], unknown: Option<u32>) -> Result<Parts, TextError> {
    let library = |error: tokenizers::Error| keys.wrong(error.to_string());
    let scores = keys.scores(tokens.len())?.into_iter().map(f64::from);
    let vocab = tokens.iter().cloned().zip(scores).collect();
    let unknown = unknown.map(|id| id as usize);
    let mut pipeline = pipeline(Unigram::from(vocab, unknown, false).map_err(library)?);
    if let Some(map) = keys.bytes("tokenizer.ggml.precompiled_charsmap")?.filter(|map| !map.is_empty()) {
        let map = Precompiled::from(&map).map_err(|error| keys.wrong(error.to_string()))?;
        pipeline.with_normalizer(Some(map)).map_err(library)?;
    }
    let prefix = match keys.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true) {
        true => PrependScheme::Always,
        false => PrependScheme::Never,
    };
    let mut splits: Vec<PreTokenizerWrapper> = Vec::new();
    if keys.flag("tokenizer.ggml.remove_extra_whitespaces")?.unwrap_or(false) {
        splits.push(WhitespaceSplit.into());
    }
    let spaces = Metaspace::new(SPACE, prefix, true);
    splits.push(spaces.clone().into());
    pipeline.with_pre_tokenizer(Some(Splits::new(splits)));
    pipeline.with_decoder(Some(spaces));
    Ok(Parts { pipeline, adds_bos: false, adds_eos: true })
}

fn pipeline(model: impl Into<ModelWrapper>) -> Pipeline {
    Pipeline::new(TokenModel::Library(Box::new(model.into())))
}

/// Tokens that texts spell out, whatever is around them. White space behind those of Phi-3 belongs to them.
fn add_tokens(keys: &Keys<'_>, pipeline: &mut Pipeline, tokens: &[String], kinds: &[Kind]) -> Result<(), TextError> {
    let name = keys.text("general.name")?.unwrap_or_default().to_lowercase();
    let strips = ["phi-3", "phi3"].iter().any(|phi| name.contains(phi));
    let added = tokens.iter().zip(kinds).filter_map(|(token, kind)| {
        let special = match kind {
            Kind::Control | Kind::Unknown => true,
            Kind::UserDefined => false,
            Kind::Normal | Kind::Unused | Kind::Byte => return None,
        };
        let strips = strips && !["<unk>", "<s>", "<|endoftext|>"].contains(&token.as_str());
        Some(AddedToken::from(token.as_str(), special).normalized(false).rstrip(strips))
    });
    pipeline.add_tokens(added).map(drop).map_err(|error| keys.wrong(error.to_string()))
}

/// What whole texts get before and behind them.
fn add_template(
    keys: &Keys<'_>,
    parts: &mut Parts,
    tokens: &[String],
    bos: Option<u32>,
    eos: Option<u32>,
) -> Result<(), TextError> {
    let (mut template, mut named) = (vec!["$A"], Vec::new());
    let mut token = |key: &str, usual: bool, name: &'static str, id: Option<u32>| -> Result<bool, TextError> {
        if !keys.flag(key)?.unwrap_or(usual) {
            return Ok(false);
        }
        let id = id.ok_or_else(|| keys.wrong(format!("texts get its {name} token, but it has none")))?;
        let token = SpecialToken::new(name.to_owned(), vec![id], vec![tokens[id as usize].clone()]);
        named.push(token.map_err(|error| keys.wrong(error.to_string()))?);
        Ok(true)
    };
    if token("tokenizer.ggml.add_bos_token", parts.adds_bos, "bos", bos)? {
        template.insert(0, "bos");
    }
    if token("tokenizer.ggml.add_eos_token", parts.adds_eos, "eos", eos)? {
        template.push("eos");
    }
    if named.is_empty() {
        return Ok(());
    }
    let wrong = |message: String| keys.wrong(message);
    let processor = TemplateProcessing::builder()
        .try_single(template)
        .map_err(wrong)?
        .special_tokens(named)
        .build()
        .map_err(|error| keys.wrong(error.to_string()))?;
    parts.pipeline.with_post_processor(Some(processor));
    Ok(())
}

/// Chat templates: the usual one, and those that have a name.
fn templates(keys: &Keys<'_>) -> Result<BTreeMap<String, String>, TextError> {
    let mut templates = BTreeMap::new();
    for key in keys.metadata.keys() {
        let name = match key.strip_prefix("tokenizer.chat_template") {
            Some("") => "default",
            Some(name) => name.strip_prefix('.').unwrap_or_default(),
            None => "",
        };
        if !name.is_empty()
            && let Some(source) = keys.text(key)?
        {
            templates.insert(name.to_owned(), source.to_owned());
        }
    }
    Ok(templates)
}

#[cfg(test)]
mod tests;
