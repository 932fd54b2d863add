//! The header of a GGUF file, and the model in it: an error, or tensors that lie inside the file.
#![no_main]

mod common;

use libfuzzer_sys::fuzz_target;
use quorate_formats::{Checkpoint, GgufFile};

fuzz_target!(|bytes: &[u8]| {
    let path = common::file("model.gguf", bytes);
    if let Ok(file) = GgufFile::open(&path) {
        for tensor in file.tensors() {
            assert!(tensor.offset + tensor.len <= bytes.len() as u64);
        }
    }
    drop(Checkpoint::open(&path));
});
