//! The header of a safetensors file: an error or a file whose tensors lie inside it.
#![no_main]

mod common;

use libfuzzer_sys::fuzz_target;
use quorate_formats::SafetensorsFile;

fuzz_target!(|bytes: &[u8]| {
    let path = common::file("model.safetensors", bytes);
    if let Ok(file) = SafetensorsFile::open(&path) {
        for tensor in file.tensors() {
            assert!(tensor.offset + tensor.len <= bytes.len() as u64);
            let _ = file.read_f32(&tensor.name);
        }
    }
});
