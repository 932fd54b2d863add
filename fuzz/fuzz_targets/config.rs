//! A config.json: an error, or a specification whose tensors can be listed.
#![no_main]

mod common;

use libfuzzer_sys::fuzz_target;
use quorate_formats::{Config, FAMILIES};

fuzz_target!(|bytes: &[u8]| {
    let path = common::file("config.json", bytes);
    let folder = path.parent().expect("it lies in a folder");
    let Ok(config) = Config::read(folder) else { return };
    let Ok(Some(kind)) = config.opt_text("model_type") else { return };
    for family in FAMILIES.iter().filter(|f| f.model_types.contains(&kind)) {
        drop((family.spec)(&config));
    }
});
