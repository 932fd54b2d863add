//! Model folders that are not what they should be: an error that names the file and what to do, and never a panic.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::quorate;
use crate::support::{copy_of, edit_json, fixture, items, names_in, read_safetensors, tempdir, write_safetensors};

/// No command opens this model; each says `parts`.
#[track_caller]
fn refused(model: &Path, parts: &[&str]) {
    let out = tempdir();
    let tasks = out.path().join("t.jsonl");
    fs::write(&tasks, items("bios.test", 2)).unwrap();
    let file = out.path().join("r.safetensors");
    quorate!["run", "x", "-m", model].fails(3, parts);
    quorate!["eval", "-m", model, "--tasks", &tasks].fails(3, parts);
    quorate!["profile", "-m", model, "--tasks", &tasks].fails(3, parts);
    quorate!["record", "-m", model, "--tokens", "1", "--sites", "z", "-o", &file].fails(3, parts);
    quorate!["bench", "-m", model, "--prefill", "1", "--decode", "1"].fails(3, parts);
    assert_eq!(names_in(out.path()), ["t.jsonl"]);
}

/// As [`refused`], and nor can it be inspected, which needs no more than headers.
#[track_caller]
fn not_opened(model: &Path, parts: &[&str]) {
    refused(model, parts);
    quorate!["inspect", "-m", model].fails(3, parts);
    quorate!["library", "list", "-m", model].fails(3, parts);
}

fn weights(model: &TempDir) -> std::path::PathBuf {
    model.path().join("model.safetensors")
}

/// A copy of the fixture `olmoe` whose header or data were changed.
fn with_weights(change: impl FnOnce(&mut serde_json::Map<String, Value>, &mut Vec<u8>)) -> TempDir {
    let model = copy_of("olmoe");
    let (mut header, mut data) = read_safetensors(&weights(&model));
    change(&mut header, &mut data);
    write_safetensors(&weights(&model), &header, &data);
    model
}

fn with_config(key: &str, value: Value) -> TempDir {
    let model = copy_of("olmoe");
    edit_json(&model.path().join("config.json"), |config| config[key] = value);
    model
}

#[test]
fn missing_parts() {
    not_opened(Path::new("/no/such/model"), &["there is no model at /no/such/model", "help: give a folder"]);
    not_opened(tempdir().path(), &["no model at ", "neither model.safetensors nor", "help: download"]);
    let model = copy_of("olmoe");
    fs::remove_file(model.path().join("config.json")).unwrap();
    not_opened(model.path(), &["no model at ", "no config.json", "help:"]);
    let model = copy_of("olmoe");
    fs::remove_file(model.path().join("model.safetensors")).unwrap();
    refused(model.path(), &["no model at ", "model.safetensors", "help: download"]);
    quorate!["inspect", "-m", model.path()].ok(); // a configuration alone is enough
    let model = copy_of("olmoe");
    fs::remove_file(model.path().join("tokenizer.json")).unwrap();
    refused(model.path(), &["no tokenizer in ", "tokenizer.json", "help:"]);
    quorate!["inspect", "-m", model.path()].ok(); // which needs none

    let file = model.path().join("config.json");
    refused(&file, &["config.json", "no .safetensors or .gguf file", "help: name a folder"]);
    quorate!["inspect", "-m", &file].ok();
    let sharded = copy_of("qwen2_moe_mixed");
    fs::remove_file(sharded.path().join("model-00002-of-00002.safetensors")).unwrap();
    not_opened(sharded.path(), &["model-00002-of-00002.safetensors", "No such file"]);
}

#[test]
fn headers_of_weights() {
    let model = copy_of("olmoe");
    let whole = fs::read(weights(&model)).unwrap();
    for (bytes, part) in [
        (&b""[..], "is truncated"),
        (&whole[..5], "is truncated"),
        (&whole[..1000], "is truncated"),
        (&whole[..whole.len() - 1], "is truncated"),
        (b"<html>404 Not Found</html>", "bad safetensors header"),
        (&[u8::MAX; 64], "bad safetensors header"),
        (b"\x02\0\0\0\0\0\0\0[]", "bad safetensors header"),
    ] {
        fs::write(weights(&model), bytes).unwrap();
        not_opened(model.path(), &["model.safetensors", part, "help: download"]);
    }
    fs::write(weights(&model), [&whole[..], b"more"].concat()).unwrap();
    not_opened(model.path(), &["model.safetensors", "4 bytes follow the last tensor", "help:"]);
    // A header of a terabyte, or a tensor of one, is refused before anything of that size is made.
    fs::write(weights(&model), [&(1u64 << 40).to_le_bytes()[..], &whole[8..]].concat()).unwrap();
    not_opened(model.path(), &["model.safetensors", "1099511627776 bytes", "help:"]);
    for shape in [json!([1u64 << 62, 64]), json!([1u64 << 38, 1]), json!([-1, 64]), json!([288, 63])] {
        let model = with_weights(|header, _| header["lm_head.weight"]["shape"] = shape);
        not_opened(model.path(), &["model.safetensors", "lm_head.weight", "help:"]);
    }
    for offsets in [json!([0, 1u64 << 60]), json!([8, 0]), json!([0, u64::MAX])] {
        let model = with_weights(|header, _| header["lm_head.weight"]["data_offsets"] = offsets);
        not_opened(model.path(), &["model.safetensors", "lm_head.weight", "help:"]);
    }
}

#[test]
fn tensors() {
    let norm = "model.norm.weight";
    let expert = "model.layers.1.mlp.experts.2.up_proj.weight";
    for name in [norm, expert] {
        let model = with_weights(|header, _| {
            let entry = header.remove(name).expect("it is there");
            header.insert("something.else".into(), entry);
        });
        not_opened(model.path(), &[name, "is missing", "help:"]);
    }
    let model = with_weights(|header, _| header[expert]["shape"] = json!([64, 32]));
    not_opened(model.path(), &["model.safetensors", expert, "[64, 32] found", "help:"]);
    let model = with_weights(|header, _| header[norm]["dtype"] = json!("I32"));
    not_opened(model.path(), &["model.safetensors", norm, "I32", "F32"]);
    let model = with_config("hidden_size", json!(128));
    not_opened(model.path(), &["model.safetensors", "expected, [", "found", "help: does config.json belong"]);
}

#[test]
fn weights_that_are_no_numbers() {
    for (name, value) in [
        ("model.norm.weight", f32::NAN),
        ("model.layers.0.mlp.gate.weight", f32::INFINITY),
        ("model.layers.0.mlp.experts.1.down_proj.weight", f32::NAN),
    ] {
        let model = with_weights(|header, data| {
            let at = header[name]["data_offsets"][0].as_u64().unwrap() as usize + 12;
            data[at..at + 4].copy_from_slice(&value.to_le_bytes());
        });
        refused(model.path(), &["model.safetensors", name, "(element 3)", "help: the file is damaged"]);
    }
}

#[test]
fn configurations() {
    for (key, value, parts) in [
        (
            "num_experts_per_tok",
            json!(7),
            ["config.json", "\"num_experts_per_tok\" is 7", "7 experts per token, but a layer has only 6"],
        ),
        ("num_experts_per_tok", json!(0), ["config.json", "\"num_experts_per_tok\" is 0", ""]),
        ("model_type", json!("olmo_moe"), ["config.json", "\"olmo_moe\" is not supported", "help: "]),
        ("model_type", json!("olmoee"), ["config.json", "known: olmoe, ", "the most similar is \"olmoe\""]),
        ("num_hidden_layers", json!(1u64 << 60), ["config.json", "num_hidden_layers", ""]),
        ("num_experts", json!(4_000_000_000u64), ["config.json", "num_experts", ""]),
        ("num_attention_heads", json!(0), ["config.json", "num_attention_heads", ""]),
        ("vocab_size", json!("many"), ["config.json", "vocab_size", ""]),
    ] {
        not_opened(with_config(key, value).path(), &parts);
    }
    let model = copy_of("olmoe");
    for text in ["", "{", "[1, 2]", "null", "\u{1}"] {
        fs::write(model.path().join("config.json"), text).unwrap();
        not_opened(model.path(), &["config.json"]);
    }
    fs::write(model.path().join("config.json"), b"{\"model_type\": \"\xff\"}").unwrap();
    not_opened(model.path(), &["config.json"]);
}

#[test]
fn tokenizers() {
    let model = copy_of("olmoe");
    for text in [&b""[..], b"{", b"{\"model\": 7}", b"\xff\xfe"] {
        fs::write(model.path().join("tokenizer.json"), text).unwrap();
        refused(model.path(), &["tokenizer.json", "help:"]);
    }
    // Tokens that the model has no rows for.
    quorate!["record", "-m", &fixture("olmoe"), "--tokens", "288", "--sites", "z", "-o", &model.path().join("r")]
        .fails(3, &["token 288", "vocabulary of 288"]);
}

/// Any byte of the header may be wrong.
#[test]
fn damaged_bytes_never_panic() {
    let model = copy_of("olmoe");
    let whole = fs::read(weights(&model)).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize + 8;
    let mut state = 1u64;
    for _ in 0..60 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut bytes = whole.clone();
        bytes[(state >> 33) as usize % header] ^= 1 << (state >> 20 & 7);
        fs::write(weights(&model), bytes).unwrap();
        let run = quorate!["run", "x", "-m", model.path(), "--max-tokens", "1"];
        assert!(run.code == Some(0) || run.code == Some(3), "{run:?}");
    }
}
