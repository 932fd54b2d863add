use std::collections::BTreeMap;
use std::path::Path;

use quorate_formats::GgufValue;
use serde_json::Value as Json;

use crate::text::{TextError, Tokenizer};

type Metadata = BTreeMap<String, GgufValue>;

fn text(text: &str) -> GgufValue {
    GgufValue::Text(text.to_owned())
}

fn texts<'a>(list: impl IntoIterator<Item = &'a str>) -> GgufValue {
    GgufValue::list(list.into_iter().map(text))
}

fn json(name: &str, file: &str) -> Json {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tokenizers").join(name).join(file);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A fixture's vocabulary by id, added tokens included, and the type of each token.
fn vocabulary(tokenizer: &Json) -> (Vec<String>, Vec<GgufValue>) {
    let mut by_id: BTreeMap<u64, (String, u64)> = BTreeMap::new();
    match &tokenizer["model"]["vocab"] {
        Json::Object(vocab) => {
            let kind = |token: &str| if token.starts_with("<0x") { 6 } else { 1 };
            by_id.extend(vocab.iter().map(|(token, id)| (id.as_u64().unwrap(), (token.clone(), kind(token)))));
        }
        list => {
            let tokens = list.as_array().unwrap().iter().map(|entry| (entry[0].as_str().unwrap().to_owned(), 1));
            by_id.extend((0..).zip(tokens));
        }
    }
    for token in tokenizer["added_tokens"].as_array().unwrap() {
        let kind = if token["special"] == true { 3 } else { 4 };
        by_id.insert(token["id"].as_u64().unwrap(), (token["content"].as_str().unwrap().to_owned(), kind));
    }
    assert!(by_id.keys().copied().eq(0..by_id.len() as u64));
    by_id.into_values().map(|(token, kind)| (token, GgufValue::Unsigned(kind))).unzip()
}

/// What a converter would write for a fixture.
fn metadata(name: &str, model: &str, pre: &str) -> Metadata {
    let tokenizer = json(name, "tokenizer.json");
    let (tokens, kinds) = vocabulary(&tokenizer);
    let mut metadata = Metadata::new();
    let mut set = |key: &str, value| metadata.insert(format!("tokenizer.ggml.{key}"), value);
    if let Some(merges) = tokenizer["model"]["merges"].as_array() {
        let pair = |merge: &Json| [0, 1].map(|side| merge[side].as_str().unwrap().to_owned());
        let merges: Vec<[String; 2]> = merges.iter().map(pair).collect();
        let mut scores = vec![GgufValue::Float(-1e6); tokens.len()];
        for (rank, merge) in merges.iter().enumerate() {
            let id = tokens.iter().position(|token| *token == merge.concat()).unwrap();
            scores[id] = GgufValue::Float(-(rank as f64));
        }
        set("scores", GgufValue::list(scores));
        let merges: Vec<String> = merges.iter().map(|merge| merge.join(" ")).collect();
        set("merges", texts(merges.iter().map(String::as_str)));
    } else {
        let score = |entry: &Json| GgufValue::Float(entry[1].as_f64().unwrap());
        set("scores", GgufValue::list(tokenizer["model"]["vocab"].as_array().unwrap().iter().map(score)));
    }
    set("model", text(model));
    set("pre", text(pre));
    set("tokens", texts(tokens.iter().map(String::as_str)));
    set("token_type", GgufValue::list(kinds));
    metadata
}

fn set(metadata: &mut Metadata, key: &str, value: GgufValue) {
    metadata.insert(format!("tokenizer.ggml.{key}"), value);
}

fn open(metadata: &Metadata) -> Result<Tokenizer, TextError> {
    Tokenizer::from_gguf(metadata, Path::new("model.gguf"))
}

fn ids(json: &Json) -> Vec<u32> {
    serde_json::from_value(json.clone()).unwrap()
}

/// Ids, places and decoded text of all cases of a fixture for which `holds`.
fn agrees(name: &str, tokenizer: &Tokenizer, holds: impl Fn(&str) -> bool) -> usize {
    let cases = json(name, "cases.json");
    let mut compared = 0;
    for case in cases.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        if !holds(text) {
            continue;
        }
        compared += 1;
        let got = tokenizer.encode(text, true).unwrap();
        assert_eq!(got, ids(&case["ids"]), "{name}: {text:?}");
        let bare = tokenizer.encode_with_offsets(text, false).unwrap();
        assert!(bare.iter().map(|token| token.id).eq(ids(&case["ids_without_special"])), "{name}: {text:?}");
        let places: Vec<_> = bare.iter().map(|token| [token.chars.start, token.chars.end]).collect();
        assert_eq!(serde_json::json!(places), case["offsets"], "{name}: places in {text:?}");
        assert_eq!(tokenizer.decode(&got, true).unwrap(), case["decoded_skip_special"], "{name}: {text:?}");
    }
    compared
}

#[test]
fn byte_level_bpe_as_transformers() {
    let mut metadata = metadata("byte_bpe_digits", "gpt2", "llama-bpe");
    set(&mut metadata, "bos_token_id", GgufValue::Unsigned(500));
    let tokenizer = open(&metadata).unwrap();
    assert_eq!(tokenizer.bos_token(), Some("<|begin_of_text|>"));
    assert!(agrees("byte_bpe_digits", &tokenizer, |_| true) > 50);
}

#[test]
fn sentence_piece_as_transformers() {
    let metadata = metadata("spm_bpe_fallback", "llama", "default");
    let tokenizer = open(&metadata).unwrap();
    assert_eq!((tokenizer.bos_token(), tokenizer.eos_token()), (Some("<s>"), Some("</s>")));
    assert!(agrees("spm_bpe_fallback", &tokenizer, |_| true) > 50);
}

#[test]
fn added_tokens_as_transformers_where_a_file_can_say_how() {
    // GGUF says nothing of the NFC form, of tokens that take spaces from the text, or that must be whole words.
    let holds = |text: &str| {
        !["<mask>", "<pad>", "quorate", "tok"].iter().any(|token| text.contains(token))
            && !text.contains(|c| matches!(c, '\u{300}'..='\u{36f}' | '\u{1100}'..='\u{11ff}' | '\u{212b}'))
    };
    let metadata = metadata("added_tokens", "gpt2", "qwen2");
    assert!(agrees("added_tokens", &open(&metadata).unwrap(), holds) > 20);
}

#[test]
fn merges_follow_scores_then_places() {
    // All pairs are tokens; `bc` is better than `ab`, and of `aaa` the first two letters merge.
    let mut metadata = Metadata::new();
    set(&mut metadata, "model", text("llama"));
    set(&mut metadata, "tokens", texts(["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "ab", "bc", "aa", "▁a"]));
    let scores = [0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -4.0].map(GgufValue::Float);
    set(&mut metadata, "scores", GgufValue::list(scores));
    set(&mut metadata, "add_bos_token", GgufValue::Bool(false));
    set(&mut metadata, "add_space_prefix", GgufValue::Bool(false));
    let tokenizer = open(&metadata).unwrap();
    let encode = |text: &str| tokenizer.encode(text, true).unwrap();
    assert_eq!(encode("abc"), [4, 8]);
    assert_eq!(encode("aaa"), [9, 4]);
    assert_eq!(encode("aaaa a"), [9, 9, 10]);
    assert_eq!(encode("aéb"), [4, 0, 5], "an unknown character, without tokens for bytes");
    assert_eq!(tokenizer.decode(&[10, 3, 4], false).unwrap(), " a a");
    let prefix = GgufValue::Bool(true);
    set(&mut metadata, "add_space_prefix", prefix);
    let tokenizer = open(&metadata).unwrap();
    assert_eq!(tokenizer.encode("a<s>a", false).unwrap(), [10, 0, 0, 0, 4], "no token says that <s> is special");
}

#[test]
fn unigram_takes_the_most_probable_tokens() {
    let mut metadata = Metadata::new();
    set(&mut metadata, "model", text("t5"));
    set(&mut metadata, "tokens", texts(["<pad>", "</s>", "<unk>", "▁", "a", "b", "ab", "▁ab", "▁a"]));
    let scores = [0.0, 0.0, 0.0, -4.0, -3.0, -3.0, -4.0, -9.0, -5.0].map(GgufValue::Float);
    set(&mut metadata, "scores", GgufValue::list(scores));
    let tokenizer = open(&metadata).unwrap();
    assert_eq!(tokenizer.encode("ab a", true).unwrap(), [3, 6, 8, 1]);
    assert_eq!(tokenizer.decode(&[3, 6, 8, 1], false).unwrap(), "ab a</s>");
}

#[test]
fn wrong_metadata_are_refused_in_words() {
    let good = metadata("byte_bpe_digits", "gpt2", "gpt-2");
    assert!(open(&good).is_ok());
    let wrong = |key: &str, value: Option<GgufValue>, says: &str| {
        let mut bad = good.clone();
        match value {
            Some(value) => set(&mut bad, key, value),
            None => drop(bad.remove(&format!("tokenizer.ggml.{key}"))),
        }
        let message = open(&bad).err().unwrap().to_string();
        assert!(message.contains(says) && message.contains("--tokenizer FOLDER"), "{key}: {message}");
    };
    wrong("pre", Some(text("never-heard")), "`never-heard`, which is not known");
    wrong("pre", None, "no key tokenizer.ggml.pre");
    wrong("model", Some(text("bert")), "`bert`; gpt2, llama and t5");
    wrong("model", None, "no key tokenizer.ggml.model");
    wrong("tokens", None, "no key tokenizer.ggml.tokens");
    wrong("tokens", Some(texts(["a", "b", "a"])), "\"a\" twice");
    wrong("tokens", Some(texts([])), "empty");
    wrong("token_type", Some(GgufValue::list([GgufValue::Unsigned(1)])), "1 values for");
    wrong("token_type", Some(text("x")), "is not a list");
    wrong("merges", Some(texts(["ab"])), "\"ab\" in its key");
    wrong("merges", Some(texts(["q zzz"])), "zzz");
    wrong("merges", None, "no key tokenizer.ggml.merges");
    wrong("bos_token_id", Some(GgufValue::Unsigned(506)), "is not the id of one of its 506 tokens");
    wrong("add_bos_token", Some(GgufValue::Bool(true)), "its bos token, but it has none");
    wrong("add_eos_token", Some(GgufValue::Unsigned(1)), "is not true or false");
    let mut bad = metadata("spm_bpe_fallback", "llama", "default");
    let scores = vec![GgufValue::Float(f64::NAN); 525];
    set(&mut bad, "scores", GgufValue::list(scores));
    assert!(open(&bad).err().unwrap().to_string().contains("finite"));
}

#[test]
fn chat_templates_come_from_the_file() {
    let mut metadata = metadata("byte_bpe_digits", "gpt2", "gpt-2");
    let tokenizer = open(&metadata).unwrap();
    let missing = tokenizer.chat_template(false).err().unwrap().to_string();
    assert!(
        missing.contains("model.gguf has no chat template: looked for the key tokenizer.chat_template"),
        "{missing}"
    );
    set(&mut metadata, "bos_token_id", GgufValue::Unsigned(500));
    set(&mut metadata, "eos_token_id", GgufValue::Unsigned(502));
    let source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}";
    metadata.insert("tokenizer.chat_template".to_owned(), text(source));
    metadata.insert("tokenizer.chat_template.tool_use".to_owned(), text("tools"));
    let tokenizer = open(&metadata).unwrap();
    let messages = [crate::text::Message::new("user", "hi")];
    let render = |tools| tokenizer.chat_template(tools).unwrap().render(&messages, None, &Default::default(), true);
    assert_eq!(render(false).unwrap(), "<|begin_of_text|>hi<|eot_id|>");
    assert_eq!(render(true).unwrap(), "tools");
}

/// The same vocabulary, as folder and as file.
#[test]
fn files_of_the_fixtures_tokenize_as_their_folders() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    let texts: Vec<String> = json("added_tokens", "cases.json")
        .as_array()
        .unwrap()
        .iter()
        .map(|case| case["text"].as_str().unwrap().to_owned() + "<|im_start|>user\nIt's 1234<|im_end|>\n\n  x")
        .collect();
    for file in ["qwen2/gguf/qwen2-f16.gguf", "olmoe/gguf/olmoe-q8_0.gguf", "gpt_oss/gguf/gpt_oss-f16.gguf"] {
        let file = fixtures.join(file);
        let folder = Tokenizer::open(file.parent().unwrap().parent().unwrap()).unwrap();
        let found = Tokenizer::open(&file).unwrap();
        assert_eq!(found.vocab_size(), folder.vocab_size());
        assert_eq!(found.special_tokens().get("eos_token"), folder.special_tokens().get("eos_token"));
        assert_eq!(found.chat_template_source("default"), folder.chat_template_source("default"));
        for text in &texts {
            let tokens = found.encode(text, true).unwrap();
            assert_eq!(tokens, folder.encode(text, true).unwrap(), "{}: {text:?}", file.display());
            assert_eq!(found.decode(&tokens, true).unwrap(), folder.decode(&tokens, true).unwrap());
        }
    }
    // A folder with one model in it.
    assert!(Tokenizer::open(&fixtures.join("qwen2/gguf")).is_ok());
}

/// Every kind compiles, and splits as its authors' tokenizer does.
#[test]
fn words_are_split_by_kind() {
    let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
    let mut alphabet: Vec<String> = alphabet.into_iter().map(String::from).collect();
    alphabet.sort();
    let mut metadata = Metadata::new();
    set(&mut metadata, "model", text("gpt2"));
    set(&mut metadata, "tokens", texts(alphabet.iter().map(String::as_str)));
    set(&mut metadata, "merges", texts([]));
    set(&mut metadata, "add_bos_token", GgufValue::Bool(false));
    let words = |metadata: &mut Metadata, pre: &str, source: &str| {
        set(metadata, "pre", text(pre));
        let tokenizer = super::read(metadata, Path::new("model.gguf")).unwrap().pipeline;
        let mut pieces = tokenizers::PreTokenizedString::from(source);
        let splits = tokenizer.get_pre_tokenizer().unwrap();
        tokenizers::PreTokenizer::pre_tokenize(splits, &mut pieces).unwrap();
        let places = pieces.get_splits(tokenizers::OffsetReferential::Original, tokenizers::OffsetType::Byte);
        places.into_iter().map(|(_, (start, end), _)| source[start..end].to_owned()).collect::<Vec<_>>()
    };
    for name in super::pre::names() {
        let source = "It's 12345 x2, Café\u{301} 你好 \r\n\n\t fin  ";
        assert_eq!(words(&mut metadata, name, source).concat(), source, "{name}");
    }
    let cases: [(&str, &str, &[&str]); 12] = [
        ("gpt-2", "We'll 1234  go", &["We", "'ll", " 1234", " ", " go"]),
        ("starcoder", "a 12", &["a", " ", "1", "2"]),
        ("llama-bpe", "WE'LL 12345\n\n x", &["WE", "'LL", " ", "123", "45", "\n\n", " x"]),
        ("qwen2", "'S 12 \n x", &["'S", " ", "1", "2", " \n", " x"]),
        (
            "deepseek-v3",
            "1234 你好a (x) .b y.b",
            &["123", "4", " ", "你好", "a", " (", "x", ")", " .", "b", " y", ".b"],
        ),
        ("deepseek-llm", "a\nb 12 c你", &["a", "\n", "b", " ", "12", " c", "你"]),
        ("deepseek-coder", "a 12 ++c", &["a", " ", "1", "2", " ++", "c"]),
        ("kimi-k2", "ab你好cd's 1234", &["ab", "你好", "cd's", " ", "123", "4"]),
        ("gpt-4o", "HelloWorld's ABC 1234/\n", &["Hello", "World's", " ABC", " ", "123", "4", "/\n"]),
        ("tekken", "HelloWorld's 12", &["Hello", "World", "'s", " ", "1", "2"]),
        ("default", "a+b 1234", &["a", "+", "b", " ", "123", "4"]),
        ("bailingmoe", "a\n\n b", &["a", "\n\n", " b"]),
    ];
    for (name, source, expected) in cases {
        assert_eq!(words(&mut metadata, name, source), expected, "{name}: {source:?}");
    }
}
