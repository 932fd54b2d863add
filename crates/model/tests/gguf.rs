//! GGUF files beyond what the fixtures of the families show: weights in blocks, models that converters lay out otherwise, and
//! architectures whose files say less than a configuration does.
#![allow(missing_docs, reason = "tests")]

mod support;

use std::fs;
use std::path::Path;

use quorate_formats::{Checkpoint, GgufFile, Role, SafetensorsFile, StoredDType};
use quorate_kernels::DType;
use quorate_model::{Model, NoLens};
use quorate_residency::{Expert, Matrix};
use serde_json::{Value, json};
use support::{assert_close, assert_same, fixture, logits, open, open_gguf, prompts};
use tempfile::TempDir;

/// Mean and largest distance.
fn distance(a: &[f32], b: &[f32]) -> (f32, f32) {
    assert_eq!(a.len(), b.len());
    let gaps = || a.iter().zip(b).map(|(a, b)| (a - b).abs());
    (gaps().sum::<f32>() / a.len() as f32, gaps().fold(0.0, f32::max))
}

/// All matrices as F32: products without rounding of what they are multiplied with.
fn widen(model: &mut Model) {
    let wide = |m: &Matrix| Matrix::from_f32(m.rows, m.cols, &m.to_f32()).unwrap();
    let checkpoint = model.checkpoint().clone();
    for role in checkpoint.roles().filter(|role| !role.is_expert() && !role.is_vector()) {
        let new = wide(model.weights().matrix(role).unwrap());
        model.replace_matrix(role, new).unwrap();
    }
    for layer in model.spec().moe_layers() {
        for e in 0..model.spec().moe(layer).unwrap().n_experts {
            let old = model.weights().expert(layer, e).unwrap();
            let new = Expert { gate: wide(&old.gate), up: wide(&old.up), down: wide(&old.down) };
            model.replace_expert(layer, e, new).unwrap();
        }
    }
}

/// The logits of both prompts with the file's weights as they are, and widened.
fn both_ways(name: &str, kind: &str) -> [Vec<f32>; 2] {
    let mut model = open_gguf(name, kind);
    let texts = prompts(name);
    let all = |model: &Model| texts.iter().flat_map(|text| logits(model, text, &mut NoLens)).collect::<Vec<f32>>();
    let rounded = all(&model);
    widen(&mut model);
    [rounded, all(&model)]
}

/// Weights in blocks are those that ggml decodes: with them widened the logits are those that transformers computes with the
/// weights that gguf-py decodes. As they are, with activations rounded to bytes, they are no further from that than llama.cpp's,
/// which rounds them too.
#[test]
fn weights_in_blocks_are_exact_and_rounding_costs_no_more_than_in_llama_cpp() {
    let cases = [
        ("olmoe", "q8_0", true),
        ("olmoe", "q4_0", true),
        ("olmoe_256", "q4_k_m", true),
        ("olmoe_256", "q2_k", true),
        // llama.cpp rounds the bounds of YaRN's ramp, which this model does not.
        ("gpt_oss", "mxfp4_moe", false),
    ];
    for (name, kind, compare) in cases {
        let reference = SafetensorsFile::open(&fixture(name).join("gguf/logits.safetensors")).unwrap();
        let exact = reference.read_f32(&format!("logits_dequant.{kind}")).unwrap();
        let [rounded, widened] = both_ways(name, kind);
        assert_close(&format!("{name} {kind}, widened"), &widened, &exact, 1e-3);
        let ours = distance(&rounded, &exact);
        assert!(ours.0 > 0.0, "{name} {kind}: products were not rounded, so the test shows nothing");
        if compare {
            let theirs = distance(&reference.read_f32(&format!("logits.{kind}")).unwrap(), &exact);
            assert!(ours.0 <= 1.25 * theirs.0, "{name} {kind}: {ours:?}, llama.cpp {theirs:?}");
        }
    }
}

#[test]
fn experts_are_read_alone_and_stay_in_their_blocks() {
    let model = open_gguf("olmoe_256", "q4_k_m");
    let checkpoint = model.checkpoint();
    let moe = model.spec().moe(0).unwrap();
    let (d, i) = (model.spec().hidden_size, moe.intermediate_size);
    let before = checkpoint.bytes_read();
    let expert = model.weights().read_expert(0, 2).unwrap();
    assert_eq!(expert.gate.dtype, DType::Q4_K);
    assert!(expert.down.dtype.is_quantized());
    assert_eq!([expert.gate.rows, expert.gate.cols, expert.down.rows, expert.down.cols], [i, d, d, i]);
    let bytes = checkpoint.expert_bytes(0, 2);
    assert_eq!((checkpoint.bytes_read() - before, expert.bytes()), (bytes, bytes));
    // The weights of expert 2 lie behind those of two others.
    let stack = checkpoint.tensors().iter().find(|t| t.name == "blk.0.ffn_gate_exps.weight").unwrap();
    let gate = checkpoint.tensor(Role::ExpertGate(0, 2)).unwrap();
    assert_eq!(gate.offset, stack.offset + 2 * gate.len);
    assert_eq!(stack.len, moe.n_experts as u64 * gate.len);
    assert!(matches!(gate.dtype, StoredDType::Blocks(_)));
}

/// A fixture's folder whose configuration says something else.
fn reconfigured(name: &str, changes: &[(&str, Value)]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for file in ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        fs::copy(fixture(name).join(file), dir.path().join(file)).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&fs::read(fixture(name).join("config.json")).unwrap()).unwrap();
    for (key, value) in changes {
        config[key] = value.clone();
    }
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

/// Files of some architectures do not hold all that a configuration says; then what all released models have is meant.
#[test]
fn what_a_file_cannot_say_is_what_the_released_models_have() {
    let cases: Vec<(&str, Vec<(&str, Value)>)> = vec![
        (
            "llama4_text",
            vec![
                ("attention_chunk_size", json!(8192)),
                ("floor_scale", json!(8192)),
                ("attn_scale", json!(0.1)),
                ("no_rope_layers", Value::Null),
            ],
        ),
        (
            "phimoe",
            vec![
                ("router_jitter_noise", json!(0.01)),
                (
                    "rope_scaling",
                    json!({"type": "longrope", "long_factor": [1.5, 2.1, 2.7, 3.3], "short_factor": [1.0, 1.05, 1.1, 1.15],
                           "original_max_position_embeddings": 256}),
                ),
            ],
        ),
        // The converter computes the base from hidden_size / heads, which here is not the width of a head.
        ("hunyuan_v1_moe", vec![("rope_theta", json!(1e8)), ("rope_scaling", Value::Null)]),
    ];
    for (name, changes) in cases {
        let folder = reconfigured(name, &changes);
        let (ours, twin) = (open_gguf(name, "f32"), open(folder.path()));
        for text in prompts(name) {
            let expected = logits(&twin, &text, &mut NoLens);
            assert_close(name, &logits(&ours, &text, &mut NoLens), &expected, 1e-4);
            let original = logits(&open(&fixture(name)), &text, &mut NoLens);
            assert!(distance(&expected, &original).1 > 1e-3, "{name}: the changes do not matter");
        }
    }
}

/// A tensor of a GGUF file, to be written to another.
#[derive(Clone)]
struct Raw {
    name: String,
    /// Innermost first.
    dims: Vec<u64>,
    kind: u32,
    bytes: Vec<u8>,
}

/// A GGUF file taken apart: the bytes of its key-value pairs, how many there are, and its tensors.
struct Parts {
    pairs: Vec<u8>,
    count: u64,
    tensors: Vec<Raw>,
}

impl Parts {
    fn of(name: &str) -> Self {
        let path = fixture(name).join("gguf").join(format!("{name}-f16.gguf"));
        let (file, bytes) = (GgufFile::open(&path).unwrap(), fs::read(&path).unwrap());
        let info = |name: &str| {
            let entry = [&(name.len() as u64).to_le_bytes(), name.as_bytes()].concat();
            bytes.windows(entry.len()).position(|window| window == entry).unwrap()
        };
        let infos = file.tensors().map(|t| info(&t.name)).min().unwrap();
        let tensors = file.tensors().map(|t| Raw {
            name: t.name.clone(),
            dims: t.shape.clone(),
            kind: t.dtype.id(),
            bytes: bytes[t.offset as usize..(t.offset + t.len) as usize].to_vec(),
        });
        let count = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
        Self { pairs: bytes[24..infos].to_vec(), count, tensors: tensors.collect() }
    }

    fn take(&mut self, name: &str) -> Raw {
        let at = self.tensors.iter().position(|t| t.name == name).unwrap_or_else(|| panic!("no {name}"));
        self.tensors.remove(at)
    }

    /// Adds a 32-bit number to the metadata.
    fn set(&mut self, key: &str, value: u32) {
        self.pairs.extend((key.len() as u64).to_le_bytes());
        self.pairs.extend(key.as_bytes());
        self.pairs.extend(4u32.to_le_bytes());
        self.pairs.extend(value.to_le_bytes());
        self.count += 1;
    }

    fn write(&self, path: &Path) {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend(self.count.to_le_bytes());
        out.extend(&self.pairs);
        let (mut offset, mut data) = (0, Vec::new());
        for t in &self.tensors {
            out.extend((t.name.len() as u64).to_le_bytes());
            out.extend(t.name.as_bytes());
            out.extend((t.dims.len() as u32).to_le_bytes());
            t.dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(t.kind.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            data.extend(&t.bytes);
            data.resize(data.len().next_multiple_of(32), 0);
            offset = data.len();
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        fs::write(path, out).unwrap();
    }
}

/// A folder with the tokenizer of a fixture.
fn folder_of(name: &str) -> TempDir {
    let dir = TempDir::new().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixture(name).join(file), dir.path().join(file)).unwrap();
    }
    dir
}

/// The same weights in another arrangement give the same logits, bit for bit.
#[track_caller]
fn assert_same_model(name: &str, path: &Path) {
    let (ours, original) = (open(path), open_gguf(name, "f16"));
    for text in prompts(name) {
        assert_same(name, &logits(&ours, &text, &mut NoLens), &logits(&original, &text, &mut NoLens));
    }
}

#[test]
fn split_files_are_one_model() {
    let dir = folder_of("mixtral");
    let all = Parts::of("mixtral");
    let name = |part: usize| dir.path().join(format!("m-{part:05}-of-00003.gguf"));
    let n = all.tensors.len();
    for (part, range) in [0..5, 5..12, 12..n].into_iter().enumerate() {
        let mut file = Parts { pairs: Vec::new(), count: 0, tensors: all.tensors[range].to_vec() };
        if part == 0 {
            (file.pairs, file.count) = (all.pairs.clone(), all.count);
        }
        file.set("split.no", part as u32);
        file.set("split.count", 3);
        file.set("split.tensors.count", n as u32);
        file.write(&name(part + 1));
    }
    assert_same_model("mixtral", &name(1));
    assert_same_model("mixtral", dir.path());
    let refused = |path: &Path| Checkpoint::open(path).map(drop).unwrap_err().to_string();
    assert!(refused(&name(2)).contains("it is part 2 of 3; name the first part"), "{}", refused(&name(2)));
    fs::rename(name(3), dir.path().join("gone")).unwrap();
    assert!(refused(&name(1)).contains("m-00003-of-00003.gguf"), "{}", refused(&name(1)));
    fs::copy(name(2), name(3)).unwrap();
    assert!(refused(&name(1)).contains("it is not part 3 of 3"), "{}", refused(&name(1)));
    fs::rename(name(1), dir.path().join("m.gguf")).unwrap();
    let message = refused(&dir.path().join("m.gguf"));
    assert!(message.contains("should end in -00001-of-00003.gguf"), "{message}");
}

#[test]
fn a_folder_with_several_models_is_not_guessed() {
    let message = Checkpoint::open(&fixture("olmoe").join("gguf")).map(drop).unwrap_err().to_string();
    assert!(message.contains("it holds 4 GGUF models") && message.contains("help: name one"), "{message}");
}

#[test]
fn old_files_with_a_tensor_for_each_expert() {
    let dir = folder_of("mixtral");
    let mut parts = Parts::of("mixtral");
    for (l, what) in [0, 1].into_iter().flat_map(|l| ["gate", "up", "down"].map(|what| (l, what))) {
        let stack = parts.take(&format!("blk.{l}.ffn_{what}_exps.weight"));
        let experts = stack.dims[2];
        for (e, bytes) in stack.bytes.chunks(stack.bytes.len() / experts as usize).enumerate() {
            let name = format!("blk.{l}.ffn_{what}.{e}.weight");
            parts.tensors.push(Raw { name, dims: stack.dims[..2].to_vec(), kind: stack.kind, bytes: bytes.to_vec() });
        }
    }
    parts.write(&dir.path().join("m.gguf"));
    assert_same_model("mixtral", &dir.path().join("m.gguf"));
}

#[test]
fn gates_and_ups_in_one_tensor() {
    let dir = folder_of("qwen3_moe");
    let mut parts = Parts::of("qwen3_moe");
    for l in 0..2 {
        let [gate, up] = ["gate", "up"].map(|what| parts.take(&format!("blk.{l}.ffn_{what}_exps.weight")));
        let one = gate.bytes.len() / gate.dims[2] as usize;
        let bytes = gate.bytes.chunks(one).zip(up.bytes.chunks(one)).flat_map(|(g, u)| [g, u].concat()).collect();
        let dims = vec![gate.dims[0], 2 * gate.dims[1], gate.dims[2]];
        parts.tensors.push(Raw { name: format!("blk.{l}.ffn_gate_up_exps.weight"), dims, kind: gate.kind, bytes });
    }
    parts.write(&dir.path().join("m.gguf"));
    assert_same_model("qwen3_moe", &dir.path().join("m.gguf"));
}

#[test]
fn queries_keys_and_values_in_one_tensor() {
    for name in ["llama", "qwen2"] {
        let dir = folder_of(name);
        let mut parts = Parts::of(name);
        let kinds = if name == "llama" { vec!["weight"] } else { vec!["weight", "bias"] };
        for (l, kind) in [0, 1].into_iter().flat_map(|l| kinds.iter().map(move |kind| (l, kind))) {
            let qkv = ["q", "k", "v"].map(|what| parts.take(&format!("blk.{l}.attn_{what}.{kind}")));
            let mut dims = qkv[0].dims.clone();
            *dims.last_mut().unwrap() = qkv.iter().map(|t| t.dims.last().unwrap()).sum();
            let bytes = qkv.iter().flat_map(|t| t.bytes.clone()).collect();
            parts.tensors.push(Raw { name: format!("blk.{l}.attn_qkv.{kind}"), dims, kind: qkv[0].kind, bytes });
        }
        parts.write(&dir.path().join("m.gguf"));
        assert_same_model(name, &dir.path().join("m.gguf"));
    }
}

#[test]
fn old_files_with_latent_attentions_projection_in_one() {
    let name = "deepseek_v2_greedy";
    let (dir, original) = (folder_of(name), Checkpoint::open(&fixture(name)).unwrap());
    let mut parts = Parts::of(name);
    for l in 0..2 {
        let split = ["k", "v"].map(|what| parts.take(&format!("blk.{l}.attn_{what}_b.weight")));
        let loc = original.tensor(Role::KvB(l)).unwrap();
        let mut bytes = vec![0; loc.len as usize];
        original.read_into(loc, &mut bytes).unwrap();
        assert_eq!(loc.dtype, StoredDType::F32);
        assert_eq!(loc.elements(), split.iter().map(|t| t.dims.iter().product::<u64>()).sum::<u64>());
        let dims = loc.shape.iter().rev().map(|&d| d as u64).collect();
        parts.tensors.push(Raw { name: format!("blk.{l}.attn_kv_b.weight"), dims, kind: 0, bytes });
    }
    parts.write(&dir.path().join("m.gguf"));
    assert_same_model(name, &dir.path().join("m.gguf"));
}

#[test]
fn what_is_not_understood_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("m.gguf");
    let refused = |edit: &dyn Fn(&mut Parts)| {
        let mut parts = Parts::of("olmoe");
        edit(&mut parts);
        parts.write(&path);
        Checkpoint::open(&path).map(drop).unwrap_err().to_string()
    };
    let surplus = refused(&|parts| {
        let norm = Raw { name: "blk.1.attn_norm_2.weight".to_owned(), ..parts.tensors[0].clone() };
        parts.tensors.push(norm);
    });
    assert!(surplus.contains("blk.1.attn_norm_2.weight: architecture olmoe is not known"), "{surplus}");
    let gone = refused(&|parts| drop(parts.take("blk.0.ffn_gate_inp.weight")));
    assert!(gone.contains("blk.0.ffn_gate_inp.weight with shape [6, 64] is missing"), "{gone}");
    let narrow = refused(&|parts| parts.tensors.iter_mut().for_each(|t| t.dims.reverse()));
    assert!(narrow.contains("shape"), "{narrow}");
    let gating = refused(&|parts| parts.set("olmoe.expert_gating_func", 2));
    assert!(gating.contains("key \"olmoe.expert_gating_func\" is 2"), "{gating}");
    let without = refused(&|parts| {
        let key = b"olmoe.attention.head_count";
        let at = parts.pairs.windows(key.len()).position(|w| w == key).unwrap();
        parts.pairs[at + 6] = b'A';
    });
    assert!(without.contains("key \"olmoe.attention.head_count\" is missing"), "{without}");
    let other = refused(&|parts| {
        let at = parts.pairs.windows(13).position(|w| w == b"\x05\0\0\0\0\0\0\0olmoe").unwrap();
        parts.pairs[at + 8..at + 13].copy_from_slice(b"oooo.");
    });
    assert!(other.contains("architecture \"oooo.\" is not supported; known: olmoe, llama"), "{other}");
}
