use serde_json::Value as Json;

use super::*;

const NAMES: [&str; 4] = ["byte_bpe_digits", "unigram_metaspace", "spm_bpe_fallback", "added_tokens"];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

fn open(name: &str) -> Tokenizer {
    Tokenizer::open(&fixtures().join("tokenizers").join(name)).unwrap()
}

fn cases(name: &str) -> Vec<Json> {
    let path = fixtures().join("tokenizers").join(name).join("cases.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(json: &Json) -> Vec<u32> {
    serde_json::from_value(json.clone()).unwrap()
}

/// A small deterministic generator for test data.
fn random(state: &mut u64, below: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % below
}

#[test]
fn encodes_and_decodes_as_transformers() {
    for name in NAMES {
        let tokenizer = open(name);
        for case in cases(name) {
            let text = case["text"].as_str().unwrap();
            let got = tokenizer.encode(text, true).unwrap();
            assert_eq!(got, ids(&case["ids"]), "{name}: ids of {text:?}");
            let bare = tokenizer.encode(text, false).unwrap();
            assert_eq!(bare, ids(&case["ids_without_special"]), "{name}: {text:?}");
            for &id in &bare {
                let token = tokenizer.id_to_token(id).unwrap();
                assert_eq!(tokenizer.token_to_id(&token), Some(id));
            }
            let placed = tokenizer.encode_with_offsets(text, false).unwrap();
            assert!(placed.iter().map(|token| token.id).eq(bare.iter().copied()));
            let tokens: Vec<_> = placed.iter().map(|token| token.token.as_str()).collect();
            assert_eq!(serde_json::json!(tokens), case["tokens"], "{name}: tokens of {text:?}");
            let offsets: Vec<_> = placed.iter().map(|token| [token.chars.start, token.chars.end]).collect();
            assert_eq!(serde_json::json!(offsets), case["offsets"], "{name}: offsets of {text:?}");
            let placed = tokenizer.encode_with_offsets(text, true).unwrap();
            assert!(placed.iter().map(|token| token.id).eq(got.iter().copied()));
            assert_eq!(tokenizer.decode(&bare, false).unwrap(), case["decoded"], "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&got, true).unwrap(), case["decoded_skip_special"], "{name}: {text:?}");
        }
    }
}

/// What a stream may show is what decoding the tokens so far gives, without the characters that are not complete.
#[test]
fn streams_complete_characters_only() {
    let mut compared = 0;
    for name in NAMES {
        let tokenizer = open(name);
        for case in cases(name) {
            let tokens = ids(&case["ids_without_special"]);
            let mut stream = tokenizer.stream_decoder(false);
            let mut shown = String::new();
            for (i, &id) in tokens.iter().enumerate() {
                shown.push_str(&stream.push(&tokenizer, id).unwrap().unwrap_or_default());
                if let Some(prefix) = case["decoded_prefixes"].get(i).and_then(Json::as_str) {
                    // A decoder may doubt complete characters again; what was shown stays.
                    let complete = prefix.trim_end_matches('\u{fffd}');
                    let doubted = complete.len() < shown.len() && prefix.ends_with('\u{fffd}');
                    assert!(
                        shown == complete || doubted && shown.starts_with(complete),
                        "{name}: {shown:?}, {prefix:?}"
                    );
                    compared += 1;
                }
            }
            shown.push_str(&stream.flush(&tokenizer).unwrap().unwrap_or_default());
            assert_eq!(shown, tokenizer.decode(&tokens, false).unwrap(), "{name}");
        }
    }
    assert!(compared > 2000);
}

#[test]
fn streams_of_any_tokens_agree_with_decoding() {
    let mut state = 7;
    for name in NAMES {
        let tokenizer = open(name);
        let size = tokenizer.vocab_size() as u64;
        let invalid = name == "spm_bpe_fallback" || name == "unigram_metaspace";
        for round in 0..300 {
            let skip = round % 2 == 0;
            let tokens: Vec<u32> = (0..random(&mut state, 40)).map(|_| random(&mut state, size + 3) as u32).collect();
            let mut stream = tokenizer.stream_decoder(skip);
            let mut shown = String::new();
            for &id in &tokens {
                shown.push_str(&stream.push(&tokenizer, id).unwrap().unwrap_or_default());
            }
            shown.push_str(&stream.flush(&tokenizer).unwrap().unwrap_or_default());
            let whole = tokenizer.decode(&tokens, skip).unwrap();
            // Runs of bytes that are no text are counted differently by a byte-fallback decoder that sees all of them.
            if !invalid || !whole.contains('\u{fffd}') {
                assert_eq!(shown, whole, "{name}: {tokens:?}");
            }
        }
    }
}

#[test]
fn a_stream_shows_the_characters_before_an_incomplete_one() {
    let tokenizer = open("byte_bpe_digits");
    let tokens = tokenizer.encode("aé→b", false).unwrap();
    let mut stream = tokenizer.stream_decoder(true);
    let mut pieces = Vec::new();
    for &id in &tokens[..tokens.len() - 2] {
        pieces.extend(stream.push(&tokenizer, id).unwrap());
    }
    assert_eq!(pieces.concat(), "aé");
    assert_eq!(stream.flush(&tokenizer).unwrap().as_deref(), Some("\u{fffd}"));
}

#[test]
fn any_text_survives_the_round_trip() {
    let mut state = 11;
    let ranges = [0x20..0x7f, 0..0x20, 0xa0..0x600, 0x3000..0xd800, 0xe000..0x1_0000, 0x1_f300..0x1_f700];
    for round in 0..400 {
        let mut text = String::new();
        for _ in 0..random(&mut state, 30) {
            let range = &ranges[random(&mut state, if round % 4 == 0 { 6 } else { 2 }) as usize];
            let code = range.start + random(&mut state, (range.end - range.start) as u64) as u32;
            text.extend(char::from_u32(code));
        }
        for name in NAMES {
            let tokenizer = open_once(name);
            let tokens = tokenizer.encode(&text, false).unwrap();
            let back = tokenizer.decode(&tokens, false).unwrap();
            // The others normalise the text, or add a space that decoding takes away.
            if name == "byte_bpe_digits" {
                assert_eq!(back, text);
            }
        }
    }
}

fn open_once(name: &str) -> &'static Tokenizer {
    use std::sync::OnceLock;
    static ALL: OnceLock<Vec<Tokenizer>> = OnceLock::new();
    let at = NAMES.iter().position(|have| *have == name).unwrap();
    &ALL.get_or_init(|| NAMES.map(open).into_iter().collect())[at]
}

#[test]
fn knows_the_special_tokens() {
    let tokenizer = open("added_tokens");
    assert_eq!([tokenizer.bos_token(), tokenizer.eos_token()], [None, Some("<|im_end|>")]);
    assert_eq!(tokenizer.pad_token(), Some("<pad>"));
    assert_eq!(tokenizer.special_tokens().get("mask_token"), Some("<mask>"));
    assert!(matches!(tokenizer.chat_template(false), Err(TextError::NoChatTemplate { .. })));
}

#[test]
fn missing_and_broken_files_are_named() {
    let dir = tempdir("missing");
    let error = Tokenizer::open(&dir).err().unwrap().to_string();
    assert!(error.contains("looked for tokenizer.json;"), "{error}");
    std::fs::write(dir.join("tokenizer.model"), b"x").unwrap();
    let error = Tokenizer::open(&dir).err().unwrap().to_string();
    assert!(error.contains("found only tokenizer.model"), "{error}");
    for content in ["", "{", "[]", "{\"model\": {\"type\": \"BPE\"}}", "\u{feff}{}"] {
        std::fs::write(dir.join("tokenizer.json"), content).unwrap();
        let error = Tokenizer::open(&dir).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json is not valid"), "{error}");
    }
    let good = fixtures().join("tokenizers/added_tokens/tokenizer.json");
    std::fs::copy(good, dir.join("tokenizer.json")).unwrap();
    assert!(Tokenizer::open(&dir).is_ok(), "all side files may be missing");
    std::fs::write(dir.join("tokenizer_config.json"), b"{\"chat_template\": 5}").unwrap();
    assert!(Tokenizer::open(&dir).err().unwrap().to_string().contains("chat_template is neither"));
    std::fs::write(dir.join("tokenizer_config.json"), b"\xff").unwrap();
    assert!(Tokenizer::open(&dir).err().unwrap().to_string().contains("tokenizer_config.json"));
}

/// Files that make the library panic.
#[test]
fn contradicting_files_are_errors() {
    let dir = tempdir("contradicting");
    let good = std::fs::read(fixtures().join("tokenizers/spm_bpe_fallback/tokenizer.json")).unwrap();
    let good: Json = serde_json::from_slice(&good).unwrap();
    let broken = [
        ("/post_processor/single/0/SpecialToken/id", serde_json::json!("?")),
        ("/decoder/decoders/3/stop", serde_json::json!(1)),
        ("/model/continuing_subword_prefix", serde_json::json!("é")),
    ];
    for (place, value) in broken {
        let mut json = good.clone();
        *json.pointer_mut(place).unwrap() = value;
        std::fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
        let used = Tokenizer::open(&dir).and_then(|tokenizer| {
            tokenizer.encode("a b", true)?;
            tokenizer.decode(&[], false)
        });
        let error = used.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("contradict each other"), "{place}: {error}");
    }
}

#[test]
fn the_template_file_wins_over_the_configuration() {
    let dir = tempdir("templates");
    std::fs::copy(fixtures().join("tokenizers/added_tokens/tokenizer.json"), dir.join("tokenizer.json")).unwrap();
    let config = r#"{"chat_template": [{"name": "default", "template": "config"}, {"name": "tool_use", "template": "tools"}],
        "bos_token": {"content": "<b>", "lstrip": false}}"#;
    std::fs::write(dir.join("tokenizer_config.json"), config).unwrap();
    std::fs::write(dir.join("special_tokens_map.json"), r#"{"bos_token": "<x>", "eos_token": "<e>"}"#).unwrap();
    let tokenizer = Tokenizer::open(&dir).unwrap();
    assert_eq!(tokenizer.bos_token(), Some("<b>"));
    assert_eq!(tokenizer.eos_token(), Some("<e>"));
    assert_eq!(tokenizer.chat_template_source("default"), Some("config"));
    let text = |tokenizer: &Tokenizer, tools| {
        tokenizer.chat_template(tools).unwrap().render(&[], None, &serde_json::Map::new(), false).unwrap()
    };
    assert_eq!([text(&tokenizer, false), text(&tokenizer, true)], ["config", "tools"]);
    std::fs::write(dir.join("chat_template.jinja"), "{{ bos_token }}file").unwrap();
    assert_eq!(text(&Tokenizer::open(&dir).unwrap(), false), "<b>file");
}

/// An empty folder for one test.
fn tempdir(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("quorate-text-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}
