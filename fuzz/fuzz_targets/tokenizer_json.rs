//! A tokenizer.json: an error, or a tokenizer that encodes and decodes without a panic.
#![no_main]

mod common;

use libfuzzer_sys::fuzz_target;
use quorate_model::text::Tokenizer;

fuzz_target!(|bytes: &[u8]| {
    let path = common::file("tokenizer.json", bytes);
    if let Ok(tokenizer) = Tokenizer::open(path.parent().expect("it lies in a folder")) {
        if let Ok(ids) = tokenizer.encode("Hello, Wörld! 12 345\n\tüñ 漢字", true) {
            let _ = tokenizer.decode(&ids, false);
        }
    }
});
