//! Which tokens begin and end a text, by a file's metadata.

use std::collections::BTreeMap;

use super::GgufValue;

/// Keys that name tokens which end a text or a turn.
const KEYS: [&str; 3] = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// Tokens that end a text or a turn wherever they are in a vocabulary, as llama.cpp has them: many files name only one.
const TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
];

/// The token that begins a text, and those that end it, ascending.
pub(super) fn tokens(metadata: &BTreeMap<String, GgufValue>) -> (Option<u32>, Vec<u32>) {
    let id = |key: &str| metadata.get(key).and_then(GgufValue::as_u64).and_then(|id| u32::try_from(id).ok());
    let mut ends: Vec<u32> = KEYS.iter().filter_map(|key| id(key)).collect();
    if let Some(GgufValue::Array(texts)) = metadata.get("tokenizer.ggml.tokens") {
        let place =
            |text: &str| texts.iter().position(|t| t.as_str() == Some(text)).and_then(|i| u32::try_from(i).ok());
        let mut found: Vec<(&str, u32)> = TEXTS.iter().filter_map(|text| Some((*text, place(text)?))).collect();
        // In the harmony format `<|end|>` only ends a message.
        if found.iter().any(|(text, _)| matches!(*text, "<|return|>" | "<|call|>")) {
            found.retain(|(text, id)| *text != "<|end|>" || ends.contains(id));
        }
        ends.extend(found.into_iter().map(|(_, id)| id));
    }
    ends.sort_unstable();
    ends.dedup();
    (id("tokenizer.ggml.bos_token_id"), ends)
}
