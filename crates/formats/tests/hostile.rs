//! Damaged and malicious files: each gives an error that names the trouble, never a panic or a large allocation.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use quorate_formats::{Checkpoint, SafetensorsFile};
use serde_json::{Value, json};
use support::{Copy, chain, entry, fixture, join, split};
use tempfile::TempDir;

/// Writes bytes as a safetensors file and returns why it is refused.
fn refusal(bytes: &[u8]) -> String {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.safetensors");
    fs::write(&path, bytes).unwrap();
    chain(&SafetensorsFile::open(&path).expect_err("it must be refused"))
}

fn header_with(tensors: Value, data: &[u8]) -> Vec<u8> {
    join(&tensors.to_string(), data)
}

#[test]
fn malformed_files_are_refused_by_name() {
    let deep = format!("{{\"a\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let twice =
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    let not_utf8 = {
        let mut bytes = join(r#"{"abc":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, &[0]);
        bytes[11] = 0xff;
        bytes
    };
    let huge = u64::MAX;
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "truncated: the header length needs a file of 8 bytes, found 0"),
        ("five bytes", vec![1; 5], "found 5"),
        ("length 2^63", (1u64 << 63).to_le_bytes().to_vec(), "a header of 9223372036854775808 bytes"),
        ("length 2^64 - 1", u64::MAX.to_le_bytes().to_vec(), "at most 100000000 are allowed"),
        ("length beyond the file", [50u64.to_le_bytes().as_slice(), b"{}"].concat(), "the header of 50 bytes"),
        ("no JSON", join("hello", &[]), "bad safetensors header: expected value"),
        ("empty header", join("", &[]), "bad safetensors header: EOF"),
        ("a list", join("[]", &[]), "expected an object of tensors"),
        ("cut JSON", join(r#"{"a":{"dtype":"U8""#, &[]), "bad safetensors header"),
        ("deep JSON", join(&deep, &[]), "bad safetensors header"),
        ("text behind the JSON", join("{} x", &[]), "trailing characters"),
        ("not UTF-8", not_utf8, "invalid unicode"),
        ("name twice", join(twice, &[0, 0]), "tensor a: the name occurs twice"),
        ("no dtype", header_with(json!({"a": {"shape": [1], "data_offsets": [0, 4]}}), &[0; 4]), "tensor a: missing"),
        (
            "unknown dtype",
            header_with(json!({"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}), &[0; 4]),
            "unknown dtype \"F33\"",
        ),
        (
            "negative offset",
            header_with(json!({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}), &[]),
            "tensor a: invalid value: integer `-4`",
        ),
        (
            "negative shape",
            header_with(json!({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}), &[0; 4]),
            "tensor a: invalid value: integer `-1`",
        ),
        (
            "fractional shape",
            header_with(json!({"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}), &[0; 4]),
            "tensor a: invalid type",
        ),
        ("ends before it begins", header_with(json!({"a": entry(&[1], 4, 0)}), &[0; 4]), "its bytes end at 0"),
        ("wrong product", header_with(json!({"a": entry(&[3], 0, 8)}), &[0; 8]), "needs 12 bytes, the offsets span 8"),
        ("overflowing product", header_with(json!({"a": entry(&[huge, huge], 0, 0)}), &[]), "has no possible size"),
        ("overflowing bytes", header_with(json!({"a": entry(&[huge / 8], 0, 0)}), &[]), "has no possible size"),
        (
            "half a byte",
            header_with(json!({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 0]}}), &[]),
            "has no possible size",
        ),
        ("beyond the end", header_with(json!({"a": entry(&[4], 0, 16)}), &[0; 15]), "truncated: tensor a needs"),
        (
            "far beyond the end",
            header_with(json!({"a": entry(&[1], huge - 4, huge)}), &[0; 4]),
            "truncated: tensor a needs a file of 18446744073709551615 bytes",
        ),
        (
            "overlap",
            header_with(json!({"a": entry(&[2], 0, 8), "b": entry(&[2], 4, 12)}), &[0; 12]),
            "tensor b: its bytes overlap",
        ),
        (
            "the same bytes twice",
            header_with(json!({"a": entry(&[2], 0, 8), "b": entry(&[2], 0, 8)}), &[0; 8]),
            "its bytes overlap",
        ),
        (
            "gap",
            header_with(json!({"a": entry(&[1], 0, 4), "b": entry(&[1], 8, 12)}), &[0; 12]),
            "tensor b: its bytes leave a gap",
        ),
        (
            "bytes behind the end",
            header_with(json!({"a": entry(&[1], 0, 4)}), &[0; 9]),
            "5 bytes follow the last tensor",
        ),
        (
            "metadata of numbers",
            header_with(json!({"__metadata__": {"a": 1}}), &[]),
            "invalid type: integer `1`, expected a string",
        ),
    ];
    for (name, bytes, expected) in cases {
        let message = refusal(&bytes);
        assert!(message.contains(expected), "{name}: {message}");
        assert!(message.contains("x.safetensors"), "{name}: {message}");
    }
}

#[test]
fn a_truncated_file_is_refused_wherever_it_is_cut() {
    let bytes = fs::read(fixture("olmoe").join("model.safetensors")).unwrap();
    let mut copy = Copy::of("olmoe");
    for i in 0..50 {
        // Half of the cuts lie in the header, and the last one a byte before the end.
        let (_, data) = split(&bytes);
        let header = bytes.len() - data.len();
        let cut = if i < 25 { header * i / 25 } else { header + (data.len() - 1) * (i - 25) / 24 };
        copy = copy.write("model.safetensors", &bytes[..cut]);
        let message = chain(&Checkpoint::open(copy.path()).expect_err("it must be refused"));
        let told = message.contains("model.safetensors is truncated") && message.contains(&format!("found {cut};"));
        assert!(told, "cut at {cut}: {message}");
    }
}

/// Opens a damaged copy and checks the message.
fn expect(copy: Copy, expected: &[&str]) {
    let message = chain(
        &Checkpoint::open(copy.path())
            .map(|c| c.fingerprint().to_owned())
            .expect_err(&format!("refused: {expected:?}")),
    );
    for part in expected {
        assert!(message.contains(part), "{part:?} not in: {message}");
    }
}

#[test]
fn configurations_that_cannot_be_are_refused() {
    let cases: Vec<(&str, &str, Value, &[&str])> = vec![
        ("olmoe", "num_attention_heads", json!(0), &["config.json", "\"num_attention_heads\" is 0", "from 1 to"]),
        ("olmoe", "num_attention_heads", json!(12), &["no multiple"]),
        ("olmoe", "num_key_value_heads", json!(3), &["must divide num_attention_heads, which is 4"]),
        ("olmoe", "num_experts_per_tok", json!(7), &["is 7: 7 experts per token, but a layer has only 6"]),
        ("olmoe", "num_experts_per_tok", json!(0), &["from 1 to"]),
        ("olmoe", "num_experts", json!(0), &["from 1 to"]),
        ("olmoe", "num_experts", json!(1u64 << 40), &["from 1 to", "65536"]),
        ("olmoe", "num_experts", json!(65_536), &["mlp.gate.weight: shape [65536, 64] expected, [6, 64] found"]),
        ("olmoe", "num_experts", json!(5), &["mlp.gate.weight: shape [5, 64] expected, [6, 64] found"]),
        ("olmoe", "num_experts", Value::Null, &["\"num_experts\" is missing"]),
        ("olmoe", "hidden_size", json!(-1), &["\"hidden_size\" is -1"]),
        ("olmoe", "hidden_size", json!(1.5), &["\"hidden_size\" is 1.5"]),
        ("olmoe", "hidden_size", json!("64"), &["\"hidden_size\" is \"64\""]),
        ("olmoe", "hidden_size", json!(1u64 << 60), &["to 1048576"]),
        (
            "olmoe",
            "hidden_size",
            json!(128),
            &["model.embed_tokens.weight: shape [288, 128] expected, [288, 64] found"],
        ),
        ("olmoe", "num_hidden_layers", json!(100_000), &["to 4096"]),
        ("olmoe", "num_hidden_layers", json!(4096), &["there are only 57 tensors"]),
        ("olmoe", "num_hidden_layers", json!(3), &["model.layers.2.input_layernorm.weight", "is missing"]),
        ("olmoe", "vocab_size", json!(0), &["vocab_size"]),
        ("olmoe", "vocab_size", Value::Null, &["\"vocab_size\" is missing"]),
        ("olmoe", "rms_norm_eps", json!(0), &["above 0"]),
        ("olmoe", "rms_norm_eps", json!(3), &["small number"]),
        ("olmoe", "rope_theta", json!(0.5), &["above 1"]),
        ("olmoe", "norm_topk_prob", json!(1), &["true or false"]),
        ("olmoe", "hidden_act", json!("relu"), &["\"relu\"", "known: silu"]),
        ("olmoe", "eos_token_id", json!("</s>"), &["a token id or a list"]),
        ("olmoe", "eos_token_id", json!([1, -2]), &["a token id or a list"]),
        ("olmoe", "rope_scaling", json!({"rope_type": "longrope"}), &["\"rope_scaling.short_factor\" is missing"]),
        ("olmoe", "rope_scaling", json!({"rope_type": "spiral"}), &["\"rope_scaling.rope_type\"", "known: default"]),
        ("olmoe", "rope_scaling", json!({"rope_type": "linear"}), &["\"rope_scaling.factor\" is missing"]),
        ("olmoe", "rope_scaling", json!({"type": "linear", "factor": 0}), &["\"rope_scaling.factor\" is 0"]),
        ("olmoe", "rope_scaling", json!([1]), &["an object expected"]),
        ("olmoe", "partial_rotary_factor", json!(0.1), &["an even number"]),
        (
            "olmoe",
            "quantization_config",
            json!({"quant_method": "aqlm"}),
            &["\"quantization_config.quant_method\"", "known: fp8, mxfp4"],
        ),
        ("olmoe", "model_type", Value::Null, &["\"model_type\" is missing"]),
        ("olmoe", "model_type", json!("olmoes"), &["known: olmoe, ", "the most similar is \"olmoe\""]),
        ("olmoe", "model_type", json!("qwen3-moe"), &["the most similar is \"qwen3_moe\""]),
        ("olmoe", "model_type", json!("x".repeat(1_000_000)), &["not supported", "a new family"]),
        ("llama", "mlp_bias", json!(true), &["biases in the feed-forward"]),
        ("llama", "head_dim", json!(25), &["an even number"]),
        ("llama", "head_dim", json!(1 << 20), &["to 4096"]),
        ("qwen2", "layer_types", json!(["full_attention"]), &["one entry per layer", "2"]),
        ("qwen2", "layer_types", json!(["full_attention", "linear_attention"]), &["\"linear_attention\" is not"]),
        ("qwen2_moe", "decoder_sparse_step", json!(0), &["from 1 to"]),
        ("qwen2_moe", "mlp_only_layers", json!("none"), &["a list of whole numbers"]),
        ("qwen2_moe", "shared_expert_intermediate_size", Value::Null, &["is missing"]),
        ("mixtral", "sliding_window", json!(0), &["from 1 to"]),
    ];
    for (fixture, key, value, expected) in cases {
        let mut parts = vec!["config.json"];
        if expected.iter().any(|e| e.contains("tensor") || e.contains("weight")) {
            parts.clear();
        }
        parts.extend(expected);
        expect(Copy::of(fixture).set(key, value), &parts);
    }
}

#[test]
fn broken_files_around_the_weights_are_refused() {
    let copy = || Copy::of("olmoe");
    expect(copy().write("config.json", "{"), &["config.json is not valid JSON"]);
    expect(copy().write("config.json", "[]"), &["config.json is not valid JSON"]);
    expect(copy().write("config.json", "{\"a\":".repeat(1_000_000)), &["config.json is not valid JSON", "recursion"]);
    expect(copy().write("config.json", vec![b' '; 16_000_001]), &["config.json has 16000001 bytes"]);
    expect(copy().write("config.json", b"{\"a\": \"\xff\"}"), &["config.json is not valid JSON"]);
    expect(copy().write("generation_config.json", "null"), &["generation_config.json is not valid JSON"]);
    let bad_eos = copy().write("generation_config.json", "{\"eos_token_id\": {}}");
    expect(bad_eos, &["generation_config.json", "\"eos_token_id\" is {}"]);

    let without = |name: &str| {
        let copy = copy();
        fs::remove_file(copy.file(name)).unwrap();
        copy
    };
    expect(without("config.json"), &["there is no config.json"]);
    expect(without("model.safetensors"), &["neither model.safetensors nor", "help: download"]);
    fs::create_dir(without("config.json").file("config.json")).unwrap();

    let open = |path: &Path| chain(&Checkpoint::open(path).unwrap_err());
    assert!(open(Path::new("/no/such/model")).contains("cannot open /no/such/model"));
    assert!(open(&fixture("olmoe").join("config.json")).contains("it is no .safetensors or .gguf file"));
    let folder = without("config.json");
    fs::create_dir(folder.file("config.json")).unwrap();
    expect(folder, &["config.json is not a regular file"]);
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let name = "model.layers.1.mlp.experts.3.up_proj.weight";
    let renamed = Copy::of("olmoe").edit_header(|h| {
        let tensor = h.as_object_mut().unwrap().remove(name).unwrap();
        h["something_else"] = tensor;
    });
    expect(renamed, &[name, "with shape [32, 64] is missing", "help:"]);
    let turned = Copy::of("olmoe").edit_header(|h| h[name]["shape"] = json!([64, 32]));
    expect(turned, &["model.safetensors: tensor", name, "shape [32, 64] expected, [64, 32] found"]);
    let flat = Copy::of("olmoe").edit_header(|h| h[name]["shape"] = json!([2048]));
    expect(flat, &["[2048] found"]);
    let integers = Copy::of("olmoe").edit_header(|h| h[name]["dtype"] = json!("I32"));
    expect(integers, &[name, "is stored as I32; expected F32, F16 or BF16"]);
}

#[test]
fn an_index_may_not_leave_its_folder_or_lie() {
    let index = "model.safetensors.index.json";
    let with_map = |change: &dyn Fn(&mut BTreeMap<String, String>)| {
        let copy = Copy::of("qwen2_moe_mixed");
        let mut json = copy.json(index);
        let mut map: BTreeMap<String, String> = serde_json::from_value(json["weight_map"].take()).unwrap();
        change(&mut map);
        json["weight_map"] = json!(map);
        copy.write(index, json.to_string())
    };
    let embed = "model.embed_tokens.weight";
    let elsewhere = |name: &str| with_map(&|map| drop(map.insert(embed.to_owned(), name.to_owned())));
    let names = [
        "../model-00001-of-00002.safetensors",
        "/etc/passwd.safetensors",
        "a/b.safetensors",
        "..\\b.safetensors",
        "C:b.safetensors",
        ".hidden.safetensors",
        "..",
        "",
    ];
    for name in names {
        expect(elsewhere(name), &[index, "is refused: it must be the name of a file in the same folder"]);
    }
    expect(elsewhere("pytorch_model.bin"), &["only .safetensors files are read"]);
    expect(elsewhere("gone.safetensors"), &["cannot open", "gone.safetensors"]);
    expect(elsewhere("model-00002-of-00002.safetensors"), &["model-00002-of-00002.safetensors has no tensor", embed]);
    let invented = with_map(&|map| {
        let shard = map[embed].clone();
        map.insert("invented".to_owned(), shard);
    });
    expect(invented, &["has no tensor invented"]);
    expect(with_map(&|map| map.clear()), &["is missing"]);
    expect(Copy::of("qwen2_moe_mixed").write(index, "{}"), &[index, "missing field `weight_map`"]);

    // Both shards hold the same tensors.
    let copy = Copy::of("qwen2_moe_mixed");
    fs::copy(copy.file("model-00001-of-00002.safetensors"), copy.file("third.safetensors")).unwrap();
    let mut json = copy.json(index);
    json["weight_map"][embed] = json!("third.safetensors");
    expect(copy.write(index, json.to_string()), &["third.safetensors", "it is in", "too"]);
}

#[test]
fn a_header_claims_nothing_before_it_is_checked() {
    // 2^60 bytes in a file of a few bytes: refused at once, by the file's size.
    let message = refusal(&header_with(json!({"a": entry(&[1 << 58], 0, 1 << 60)}), &[]));
    assert!(message.contains("truncated: tensor a"), "{message}");
    // Zero-sized tensors take no place and are no overlap.
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.safetensors");
    let zeros = json!({"a": entry(&[0], 0, 0), "b": entry(&[1], 0, 4), "c": entry(&[0, 1 << 50], 4, 4)});
    fs::write(&path, header_with(zeros, &[0; 4])).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!(file.read_f32("b").unwrap(), [0.0]);
    assert!(file.read_f32("c").unwrap().is_empty());
    assert!(chain(&file.read_f32("d").unwrap_err()).contains("has no tensor d"));
    assert!(chain(&file.read_i64("b").unwrap_err()).contains("tensor b is stored as F32; expected I64 or I32"));
}

#[cfg(unix)]
#[test]
fn links_may_lead_out_of_the_folder_as_in_hub_caches() {
    let copy = Copy::of("olmoe");
    let blobs = TempDir::new().unwrap();
    let blob = blobs.path().join("0123abcd");
    fs::rename(copy.file("model.safetensors"), &blob).unwrap();
    std::os::unix::fs::symlink(&blob, copy.file("model.safetensors")).unwrap();
    assert!(Checkpoint::open(copy.path()).is_ok());
}

#[test]
fn damaged_bytes_never_panic() {
    let mut state = 7u64;
    let mut random = |n: usize| {
        // Knuth's generator; the upper bits are the good ones.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let mut copy = Copy::of("qwen3_moe_nonorm");
    let original = ["config.json", "model.safetensors"].map(|name| (name, fs::read(copy.file(name)).unwrap()));
    let mut refused = 0;
    for i in 0..400 {
        let (name, bytes) = &original[i % 2];
        // In the weights' file only the header is damaged: any byte of a weight is a weight.
        let end = if i % 2 == 0 { bytes.len() } else { bytes.len() - split(bytes).1.len() };
        let mut damaged = bytes.clone();
        for _ in 0..=random(3) {
            let bytes = b"0123456789-.e\"{}[],:\xff";
            damaged[random(end)] = bytes[random(bytes.len())];
        }
        copy = copy.write(name, damaged);
        refused += usize::from(Checkpoint::open(copy.path()).is_err());
        copy = copy.write(name, bytes);
    }
    assert!(refused > 200, "{refused}");
}
