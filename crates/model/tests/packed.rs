//! Linear layers packed as GPTQ, AWQ and compressed-tensors have them: the values are what `tools/make_packed_fixtures.py`
//! unpacks, and the logits those that transformers computes with these values.

mod support;

use std::fs;

use quorate_formats::{Checkpoint, Role, SafetensorsFile};
use quorate_kernels::{DType, dequantize, quantize};
use quorate_model::NoLens;
use support::{assert_close, assert_same, fixture, largest, logits, open};
use tempfile::TempDir;

/// Each fixture, and the type in which its linear layers are kept.
const KINDS: [(&str, &str); 7] = [
    ("gptq", "Q4_0"),
    ("gptq_act_order", "F16"),
    ("awq", "F16"),
    ("compressed_int4", "BF16"),
    ("compressed_int4_zeros", "BF16"),
    ("compressed_int8", "F32"),
    ("compressed_fp8", "F32"),
];

fn in_f16(values: &[f32]) -> Vec<f32> {
    let (mut bytes, mut rounded) = (vec![0; 2 * values.len()], vec![0.0; values.len()]);
    quantize(DType::F16, values, &mut bytes);
    dequantize(DType::F16, &bytes, &mut rounded);
    rounded
}

#[test]
fn values_and_logits_are_those_of_the_unpacked_model() {
    for (kind, kept_as) in KINDS {
        let folder = fixture("packed").join(kind);
        let expected = SafetensorsFile::open(&folder.join("expected.safetensors")).unwrap();
        let checkpoint = Checkpoint::open(&folder).unwrap();
        assert_eq!(checkpoint.unused_tensors(), [""; 0], "{kind}");
        let model = open(&folder);
        let expert = model.weights().expert(1, 3).unwrap();
        for (role, matrix, sample) in [
            (Role::Q(0), model.weights().matrix(Role::Q(0)).unwrap(), "model.layers.0.self_attn.q_proj"),
            (Role::ExpertGate(1, 3), &expert.gate, "model.layers.1.mlp.experts.3.gate_proj"),
            (Role::ExpertDown(1, 3), &expert.down, "model.layers.1.mlp.experts.3.down_proj"),
        ] {
            assert_eq!(checkpoint.tensor(role).unwrap().dtype.name(), kept_as, "{kind}");
            // Blocks hold the products of number and scale exactly, where the formats' own programs round them to F16.
            let values = if kept_as == "Q4_0" { in_f16(&matrix.to_f32()) } else { matrix.to_f32() };
            assert_same(&format!("{kind} {sample}"), &values, &expected.read_f32(sample).unwrap());
        }
        let tokens: Vec<u32> = expected.read_i64("tokens").unwrap().iter().map(|&id| id as u32).collect();
        let wanted = expected.read_f32("logits").unwrap();
        // Products with blocks round the activations to 8 bits.
        let tolerance = if kept_as == "Q4_0" { 0.03 * largest(&wanted) } else { 1e-4 };
        assert_close(kind, &logits(&model, &tokens, &mut NoLens), &wanted, tolerance);
    }
}

#[test]
fn files_that_do_not_keep_their_word_are_refused() {
    let copy = |kind: &str| {
        let folder = TempDir::new().unwrap();
        for name in
            ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
        {
            fs::copy(fixture("packed").join(kind).join(name), folder.path().join(name)).unwrap();
        }
        folder
    };
    let with_config = |kind: &str, from: &str, to: &str| {
        let folder = copy(kind);
        let path = folder.path().join("config.json");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{kind}: {from}");
        fs::write(&path, text.replace(from, to)).unwrap();
        folder
    };
    let chain = |error: &dyn std::error::Error| {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            text += &format!(": {inner}");
            cause = inner.source();
        }
        text
    };
    // Opened, but the numbers say otherwise when they are read.
    for (kind, from, to, part) in [
        (
            "gptq_act_order",
            "\"desc_act\": true,\n  \"sym\": false",
            "\"desc_act\": false,\n  \"sym\": true",
            "as config.json says",
        ),
        (
            "gptq",
            "\"quant_method\": \"gptq\"",
            "\"quant_method\": \"gptq\", \"checkpoint_format\": \"gptq_v2\"",
            "zero points are not all 8",
        ),
    ] {
        let folder = with_config(kind, from, to);
        let error = quorate_model::Model::open(folder.path(), 1, None).err().expect(kind);
        assert!(chain(&error).contains(part), "{}", chain(&error));
    }
    for (kind, from, to, part) in [
        ("gptq", "\"bits\": 4", "\"bits\": 3", "only 4 bits"),
        ("gptq", "\"group_size\": 32", "\"group_size\": 16", "scales"),
        ("gptq", "\"group_size\": 32", "\"group_size\": 0", "group_size"),
        ("awq", "\"gemm\"", "\"gemv\"", "known: gemm"),
        ("compressed_int4", "pack-quantized", "marlin-24", "known: pack-quantized"),
        ("compressed_int4", "\"group_size\": 32", "\"group_size\": 64", "weight_scale"),
        ("compressed_int8", "\"channel\"", "\"token\"", "known: group, channel, tensor"),
    ] {
        let error = Checkpoint::open(with_config(kind, from, to).path()).expect_err(kind);
        assert!(error.to_string().contains(part), "{error}");
    }
    // A group that is not there.
    let folder = copy("gptq_act_order");
    let path = folder.path().join("model.safetensors");
    let name = "model.layers.0.self_attn.q_proj.g_idx";
    let loc = SafetensorsFile::open(&path).unwrap().tensor(name).unwrap().clone();
    let mut bytes = fs::read(&path).unwrap();
    bytes[loc.offset as usize..][..4].copy_from_slice(&i32::to_le_bytes(-1));
    fs::write(&path, bytes).unwrap();
    let error = quorate_model::Model::open(folder.path(), 1, None).err().expect("a group that is not there");
    assert!(chain(&error).contains("only 2"), "{}", chain(&error));
}
