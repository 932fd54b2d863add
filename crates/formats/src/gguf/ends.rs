//! Which tokens begin and end a text, by a file's metadata.

use std::collections::BTreeMap;

use super::{GgufArray, GgufValue};

/// Keys that name tokens which end a text, a turn or a message.
const KEYS: [&str; 3] = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// The type of tokens that steer a model and are no text.
const CONTROL: u64 = 3;

/// Control tokens of released models that end an answer, a turn or, in code, a file. Files name only one or two of theirs.
/// In other vocabularies some are plain text, such as `</s>` among HTML in Gemma's, and then end nothing.
const TEXTS: [&str; 23] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "</s>",
    "<eos>",
    "<EOT>",
    "[EOT]",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "<|eot|>",
    "[e~[",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
];

/// The token that begins a text, and those that end it: the one that the file names for this first, the others ascending.
pub(super) fn tokens(metadata: &BTreeMap<String, GgufValue>) -> (Option<u32>, Vec<u32>) {
    let id = |key: &str| metadata.get(key).and_then(GgufValue::as_u64).and_then(|id| u32::try_from(id).ok());
    let list = |key: &str| match metadata.get(key) {
        Some(GgufValue::Array(values)) => Some(values),
        _ => None,
    };
    let named: Vec<u32> = KEYS.iter().filter_map(|key| id(key)).collect();
    let tokens = list("tokenizer.ggml.tokens").and_then(GgufArray::texts).unwrap_or_default();
    let types = list("tokenizer.ggml.token_type").into_iter().flat_map(GgufArray::iter);
    let control = tokens.into_iter().zip(types).zip(0..).filter(|((_, kind), _)| kind.as_u64() == Some(CONTROL));
    let known = control.map(|((token, _), id)| (token, id));
    let mut known: Vec<(&str, u32)> = known.filter(|(token, _)| TEXTS.contains(token)).collect();
    // In the format Harmony `<|end|>` ends a message, of which an answer may have several.
    let has = |token: &str| known.iter().any(|(text, _)| *text == token);
    if has("<|call|>") && has("<|return|>") || has("<|calls|>") && has("<|flush|>") {
        known.retain(|(text, _)| *text != "<|end|>");
    }
    let mut others: Vec<u32> = named.iter().copied().skip(1).chain(known.iter().map(|(_, id)| *id)).collect();
    others.sort_unstable();
    others.dedup();
    let mut ends: Vec<u32> = named.first().copied().into_iter().collect();
    ends.extend(others.into_iter().filter(|id| named.first() != Some(id)));
    (id("tokenizer.ggml.bos_token_id"), ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_end_where_the_model_ends_them() {
        let text = |text: &str| GgufValue::Text(text.to_owned());
        let mut metadata = BTreeMap::new();
        let mut set = |key: &str, value| metadata.insert(format!("tokenizer.ggml.{key}"), value);
        set("tokens", GgufValue::list(["a", "<|return|>", "<|call|>", "<|end|>", "</s>", "x"].map(text)));
        set("token_type", GgufValue::list([1, 3, 3, 3, 4, 1].map(GgufValue::Unsigned)));
        // `<|end|>` ends a message only, and `</s>` is a piece of HTML here.
        assert_eq!(tokens(&metadata), (None, vec![1, 2]));
        let mut set = |key: &str, value| metadata.insert(format!("tokenizer.ggml.{key}"), value);
        set("bos_token_id", GgufValue::Unsigned(0));
        set("eos_token_id", GgufValue::Unsigned(5));
        set("eot_token_id", GgufValue::Unsigned(1));
        set("eom_token_id", GgufValue::Signed(-1));
        assert_eq!(tokens(&metadata), (Some(0), vec![5, 1, 2]));
    }
}
