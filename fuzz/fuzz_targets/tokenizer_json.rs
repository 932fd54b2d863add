//! A tokenizer.json: an error, or a tokenizer that encodes and decodes without a panic.
#![no_main]

mod common;

use std::sync::Once;

use libfuzzer_sys::fuzz_target;
use quorate_model::text::Tokenizer;

/// The tokenizers crate panics on some files, which `Tokenizer::open` catches; the fuzzer's own hook would end the process
/// before. What is not caught still does.
static QUIET: Once = Once::new();

fuzz_target!(|bytes: &[u8]| {
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    let path = common::file("tokenizer.json", bytes);
    if let Ok(tokenizer) = Tokenizer::open(path.parent().expect("it lies in a folder")) {
        if let Ok(ids) = tokenizer.encode("Hello, Wörld! 12 345\n\tüñ 漢字", true) {
            let _ = tokenizer.decode(&ids, false);
        }
    }
});
