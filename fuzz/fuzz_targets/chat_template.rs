//! A chat template: it renders or fails, and soon.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quorate_model::text::{ChatTemplate, Message, SpecialTokens};
use serde_json::Map;

fuzz_target!(|source: &str| {
    if let Ok(template) = ChatTemplate::new(source, SpecialTokens::default()) {
        let messages = [Message::new("user", "Hello"), Message::new("assistant", "Yes?")];
        let _ = template.render(&messages, None, &Map::new(), true);
    }
});
