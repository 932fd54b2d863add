//! `inspect`: of models with and without their weights.

use std::fs;

use serde_json::{Value, json};

use crate::quorate;
use crate::support::{fixture, names_in, numbers, read_safetensors, repository, tempdir};

#[test]
fn inspect_tells_what_fits() {
    let json = quorate!["inspect", "--json"].json();
    for (field, value) in
        [("layers", 6), ("experts", 32), ("top_k", 4), ("hidden_size", 256), ("context", 512), ("files", 3)]
    {
        assert_eq!(json[field], value, "{field}");
    }
    let counted = json["expert_bytes"].as_u64().unwrap() * 192 + json["non_expert_bytes"].as_u64().unwrap();
    assert_eq!(json["model_bytes"], counted);
    // What is said to fit does fit, and fits to the expert.
    for fit in json["fits"].as_array().unwrap() {
        let (memory, keep) =
            (fit["memory_bytes"].to_string(), fit["experts_per_layer"].as_u64().expect("all rows fit"));
        let run =
            quorate!["run", "78+95=", "--scope", "local", "--memory", &memory, "--max-tokens", "600", "--json"].json();
        assert_eq!(numbers(&run["kept_per_layer"]), [keep; 6]);
        assert!(run["resident_bytes"].as_u64() <= fit["memory_bytes"].as_u64());
    }
    let text = quorate!["inspect"].ok();
    for part in [
        "(olmoe), fingerprint ",
        "22.6 million in all",
        "32 per layer, 4 per token",
        "what fits into --memory",
        "all 32 experts",
    ] {
        assert!(text.contains(part), "no {part:?}: {text}");
    }
}

#[test]
fn inspect_needs_no_weights() {
    let json =
        quorate!["inspect", "-m", "DeepSeek-R1", "--quant", "q2_k", "--ctx", "8192", "--kv", "compact", "--json"]
            .json();
    assert_eq!((&json["source"], &json["fingerprint"]), (&json!("deepseek-ai/DeepSeek-R1"), &Value::Null));
    assert_eq!((&json["experts"], &json["latent_width"]), (&json!(256), &json!(576)));
    assert_eq!(json["fits_cache_bytes"], 61 * 576 * 2 * 8192);
    let row = |name: &str| {
        let rows = json["quantisations"].as_array().unwrap();
        rows.iter().find(|r| r["type"] == name).unwrap_or_else(|| panic!("no row {name}")).clone()
    };
    // Three matrices of 7168 x 2048 in blocks of 256 numbers.
    let expert = 3 * 7168 * 2048 / 256;
    assert_eq!(row("Q2_K")["expert_bytes"], expert * 84);
    assert_eq!(row("Q4_K")["expert_bytes"], expert * 144);
    assert_eq!(row("BF16")["experts_of_layer_bytes"], expert * 512 * 256);
    // What is said to fit does, and one expert more of every layer does not.
    for fit in json["fits"].as_array().unwrap() {
        let (memory, needed) = (fit["memory_bytes"].as_u64().unwrap(), fit["needed_bytes"].as_u64().unwrap());
        assert_eq!(fit["experts_per_layer"].is_u64(), needed <= memory, "{fit}");
        if fit["all"] == false {
            assert!(needed + 58 * expert * 84 > memory, "{fit}");
        }
    }
    let kept: Vec<Option<u64>> =
        json["fits"].as_array().unwrap().iter().map(|f| f["experts_per_layer"].as_u64()).collect();
    assert!(kept.is_sorted() && kept[0].is_none() && kept[1].is_some() && kept[7] == Some(256), "{kept:?}");

    let text = quorate!["inspect", "-m", "deepseek-r1"].ok();
    for part in ["671.03 billion in all", "no weights here", "Q4_K", "too small: 8 experts of every layer need"] {
        assert!(text.contains(part), "no {part:?}: {text}");
    }
    assert!(quorate!["inspect", "--presets"].ok().lines().count() > 12);
    quorate!["inspect", "--quant", "Q9_K"].fails(2, &["`Q9_K`", "Q4_K"]);
    quorate!["run", "hi", "-m", "deepseek-r1"].fails(3, &["deepseek-r1", "quorate inspect"]);
    quorate!["inspect", "-m", "deepseek-r7"].fails(3, &["deepseek-r7", "--presets"]);

    // A folder with nothing but its configuration, and the configuration by itself, say what the whole model says.
    let folder = tempdir();
    let whole = quorate!["inspect", "-m", &fixture("qwen3_next"), "--quant", "Q8_0", "--json"].json();
    fs::copy(fixture("qwen3_next").join("config.json"), folder.path().join("config.json")).unwrap();
    for path in [folder.path().to_owned(), folder.path().join("config.json")] {
        let bare = quorate!["inspect", "-m", &path, "--quant", "Q8_0", "--json"].json();
        for field in ["parameters", "kv_state_bytes", "quantisations", "fits", "family"] {
            assert_eq!(bare[field], whole[field], "{field}");
        }
    }
    // Nor does a GGUF file need more than its header.
    let (gguf, cut) = (fixture("qwen3_moe").join("gguf/qwen3_moe-f16.gguf"), folder.path().join("cut.gguf"));
    let bytes = fs::read(&gguf).unwrap();
    let whole = quorate!["inspect", "-m", &gguf, "--quant", "Q8_0", "--json"].json();
    let header = bytes.len() - whole["model_bytes"].as_u64().unwrap() as usize;
    fs::write(&cut, &bytes[..header + 1000]).unwrap();
    let told = quorate!["inspect", "-m", &cut, "--quant", "Q8_0", "--json"];
    assert!(told.err.contains("truncated") && told.err.contains("only its header"), "{}", told.err);
    let bare = told.json();
    for field in ["parameters", "quantisations", "fits", "experts"] {
        assert_eq!(bare[field], whole[field], "{field}");
    }
    quorate!["run", "x", "-m", &cut].fails(3, &["truncated"]);
    fs::write(&cut, &bytes[..header / 2]).unwrap();
    quorate!["inspect", "-m", &cut].fails(3, &["cut.gguf"]);
    fs::remove_file(&cut).unwrap();
    // An index whose shards are missing is a broken model, no configuration.
    fs::write(folder.path().join("model.safetensors.index.json"), "{\"weight_map\":{\"x\":\"m.safetensors\"}}")
        .unwrap();
    quorate!["inspect", "-m", folder.path()].fails(3, &["m.safetensors"]);
}

#[test]
fn inspect_reads_every_fixture() {
    let mut seen = 0;
    for name in names_in(&repository("tests/fixtures")) {
        let folder = fixture(&name);
        if !folder.join("config.json").is_file() || name == "tokenizers" {
            continue;
        }
        let json = quorate!["inspect", "-m", &folder, "--json"].json();
        let config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        let text = if config["text_config"].is_object() { &config["text_config"] } else { &config };
        let layers = if text["n_layer"].is_u64() { &text["n_layer"] } else { &text["num_hidden_layers"] };
        assert_eq!(&json["layers"], layers, "{name}");
        let family = json["family"].as_str().unwrap();
        let model_type = text["model_type"].as_str().unwrap().to_lowercase();
        assert!(model_type.starts_with(family.split('_').next().unwrap()), "{name}: {family} for {model_type}");
        assert_eq!(json["fingerprint"].as_str().map(str::len), Some(16));
        let whole: u64 = (names_in(&folder).iter().filter(|n| n.starts_with("model") && n.ends_with(".safetensors")))
            .map(|n| read_safetensors(&folder.join(n)).1.len() as u64)
            .sum();
        // Packed types grow in memory; layers that predict further tokens and other senses are left out.
        let packed = config["quantization_config"].is_object() || matches!(model_type.as_str(), "gpt2" | "gpt_oss");
        if !packed && json["unused_tensors"] == json!(0) {
            assert_eq!(&json["model_bytes"], &json!(whole), "{name}");
        }
        let text = quorate!["inspect", "-m", &folder].ok();
        assert!(text.contains(json["fingerprint"].as_str().unwrap()) && text.contains(" in all"), "{text}");
        assert_eq!(json["experts"].is_null(), text.contains("experts      none (dense model)"), "{text}");
        seen += 1;
    }
    assert!(seen >= 13, "{seen} fixtures");
    // A single file beside its config.json is a model as well.
    let file = fixture("olmoe").join("model.safetensors");
    assert_eq!(quorate!["inspect", "-m", &file, "--json"].json()["experts"], 6);
}
