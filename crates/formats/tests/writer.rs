//! What is written can be read again, by this crate and by the reference implementation of the format.

mod support;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use quorate_formats::{
    Checkpoint, FormatError, Role, SafetensorsFile, StoredDType, TensorLoc, TensorOut, safetensors_bytes,
    write_edited_hf, write_pruned_hf, write_safetensors,
};
use serde_json::{Value, json};
use support::{Copy, chain, fixture};
use tempfile::TempDir;

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_written_file_is_read_back() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("t.safetensors");
    let metadata = HashMap::from([("b".to_owned(), "2".to_owned()), ("a".to_owned(), "{\"x\":1}".to_owned())]);
    let long: Vec<f32> = (0..20_000).map(|i| i as f32).collect();
    let tensors = vec![
        TensorOut::bytes("bytes", StoredDType::U8, &[3], &[1u8, 2, 3][..]),
        TensorOut::f32("long", &[100, 200], &long),
        TensorOut::i64("ids", &[2, 2], vec![1, -2, i64::MAX, i64::MIN]),
        TensorOut::f64("sums", &[1], vec![0.1]),
        TensorOut::f32("scalar", &[], vec![7.5]),
        TensorOut::f32("none", &[0, 4], vec![]),
    ];
    write_safetensors(&path, Some(metadata), tensors).unwrap();
    assert_eq!(names_in(dir.path()), ["t.safetensors"], "no temporary file is left");

    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!(file.metadata()["a"], "{\"x\":1}");
    assert_eq!(file.read_f32("long").unwrap(), long);
    assert_eq!(file.tensor("long").unwrap().shape, [100, 200]);
    assert_eq!(file.read_i64("ids").unwrap(), [1, -2, i64::MAX, i64::MIN]);
    assert_eq!(file.read_f64("sums").unwrap(), [0.1]);
    assert_eq!(file.read_f32("scalar").unwrap(), [7.5]);
    assert!(file.read_f32("none").unwrap().is_empty());
    for t in file.tensors() {
        assert!(t.offset.is_multiple_of(t.dtype.bits() / 8), "{} is aligned", t.name);
    }
    assert_eq!(file.tensors()[0].offset % 64, 0);

    let bytes = fs::read(&path).unwrap();
    let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(reference.len(), 6);
    assert_eq!(reference.tensor("bytes").unwrap().data(), [1, 2, 3]);
    assert_eq!(reference.tensor("scalar").unwrap().data(), 7.5f32.to_le_bytes());
}

#[test]
fn every_float_type_reads_as_f32() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("t.safetensors");
    let f16 = half::f16::from_f32(1.5).to_le_bytes();
    let bf16 = half::bf16::from_f32(-2.0).to_le_bytes();
    let tensors = vec![
        TensorOut::bytes("f16", StoredDType::F16, &[1], f16.to_vec()),
        TensorOut::bytes("bf16", StoredDType::Bf16, &[1], bf16.to_vec()),
        TensorOut::f64("f64", &[1], vec![0.25]),
        TensorOut::bytes("i32", StoredDType::I32, &[1], (-5i32).to_le_bytes().to_vec()),
    ];
    write_safetensors(&path, None, tensors).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!(file.read_f32("f16").unwrap(), [1.5]);
    assert_eq!(file.read_f32("bf16").unwrap(), [-2.0]);
    assert_eq!(file.read_f32("f64").unwrap(), [0.25]);
    assert_eq!(file.read_i64("i32").unwrap(), [-5]);
}

#[test]
fn a_failed_write_leaves_the_old_file_and_no_other() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("t.safetensors");
    fs::write(&path, "old").unwrap();
    let fails: Vec<(Vec<TensorOut<'_>>, &str)> = vec![
        (vec![TensorOut::f32("a", &[2], vec![1.0])], "tensor a: 4 bytes written, its shape needs 8"),
        (vec![TensorOut::f32("a", &[0], vec![]), TensorOut::f32("a", &[0], vec![])], "tensor a: the name is taken"),
        (vec![TensorOut::f32("__metadata__", &[0], vec![])], "the name is taken"),
        (vec![TensorOut::f32("a", &[usize::MAX, 2], vec![])], "its shape has no possible size"),
        (
            vec![TensorOut::streamed("a", StoredDType::U8, &[1], |_| {
                Err(FormatError::Cancelled { path: PathBuf::from("x") })
            })],
            "cancelled",
        ),
    ];
    for (tensors, expected) in fails {
        let message = chain(&write_safetensors(&path, None, tensors).unwrap_err());
        assert!(message.contains(expected), "{message}");
        assert_eq!(names_in(dir.path()), ["t.safetensors"]);
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }
    let nowhere = dir.path().join("no/such/folder.safetensors");
    assert!(chain(&write_safetensors(&nowhere, None, []).unwrap_err()).contains("cannot write"));
}

fn bytes_of(checkpoint: &Checkpoint, loc: &TensorLoc) -> Vec<u8> {
    let mut bytes = vec![0; loc.len as usize];
    checkpoint.read_into(loc, &mut bytes).unwrap();
    bytes
}

/// Prunes a fixture and compares every tensor of the result with its source.
fn prune_and_compare(name: &str, kept: &[Vec<usize>], shard_bytes_max: u64) -> (TempDir, Checkpoint) {
    let source = Checkpoint::open(&fixture(name)).unwrap();
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("pruned");
    let (mut last, mut calls) = ((0, 0), 0);
    write_pruned_hf(&source, kept, &out, shard_bytes_max, &mut |done, total| {
        assert!(done >= last.0 && done <= total);
        (last, calls) = ((done, total), calls + 1);
        true
    })
    .unwrap_or_else(|e| panic!("{name}: {}", chain(&e)));
    assert_eq!(last.0, last.1, "progress ends at the total");
    assert!(calls > 1);
    assert_eq!(names_in(dir.path()), ["pruned"]);

    let pruned = Checkpoint::open(&out).unwrap_or_else(|e| panic!("{name}: {}", chain(&e)));
    assert_eq!(pruned.unused_tensors().len(), source.unused_tensors().len());
    assert_eq!(last.1, pruned.total_bytes());
    let layers = source.spec().moe_layers();
    assert_eq!(pruned.spec().moe_layers(), layers);
    for role in pruned.roles() {
        let of_layer = |l: usize| &kept[layers.iter().position(|&m| m == l).unwrap()];
        let original = match role {
            Role::ExpertGate(l, e) => Role::ExpertGate(l, of_layer(l)[e]),
            Role::ExpertUp(l, e) => Role::ExpertUp(l, of_layer(l)[e]),
            Role::ExpertDown(l, e) => Role::ExpertDown(l, of_layer(l)[e]),
            other => other,
        };
        let (new, old) = (pruned.tensor(role).unwrap(), source.tensor(original).unwrap());
        let mut expected = bytes_of(&source, old);
        if let Role::Router(l) = role {
            let row = expected.len() / old.shape[0];
            expected = of_layer(l).iter().flat_map(|&e| expected[e * row..(e + 1) * row].to_vec()).collect();
        }
        assert_eq!(new.dtype, old.dtype);
        assert_eq!(bytes_of(&pruned, new), expected, "{name}: {role}");
    }
    (dir, pruned)
}

#[test]
fn a_pruned_checkpoint_holds_exactly_the_kept_experts() {
    prune_and_compare("olmoe", &[vec![0, 2, 5], vec![1, 3, 4]], u64::MAX);
    prune_and_compare("olmoe", &[vec![0, 1, 2, 3, 4, 5], vec![0, 1, 2, 3, 4, 5]], u64::MAX);
    prune_and_compare("olmoe_256", &[vec![1, 2]], u64::MAX);
    prune_and_compare("mixtral", &[vec![6, 7], vec![0, 4]], u64::MAX);
    prune_and_compare("mixtral_swa_bf16", &[vec![0, 1, 5], vec![1, 2, 3]], u64::MAX);
    prune_and_compare("qwen2_moe", &[vec![1, 3, 5], vec![0, 2, 7]], u64::MAX);
    prune_and_compare("qwen2_moe_mixed", &[vec![0, 5], vec![2, 3]], u64::MAX);
    prune_and_compare("qwen3_moe", &[vec![1, 2, 3, 4], vec![4, 5, 6, 7]], u64::MAX);
    prune_and_compare("qwen3_moe_nonorm", &[vec![3, 6]], u64::MAX);
}

#[test]
fn the_configuration_changes_in_the_number_of_experts_only() {
    for (name, key, kept) in
        [("olmoe", "num_experts", vec![vec![0, 2, 5]; 2]), ("qwen3_moe_nonorm", "num_local_experts", vec![vec![3, 6]])]
    {
        let (dir, pruned) = prune_and_compare(name, &kept, u64::MAX);
        let read = |path: &Path| serde_json::from_slice::<Value>(&fs::read(path).unwrap()).unwrap();
        let source = Checkpoint::open(&fixture(name)).unwrap();
        let mut old = read(&fixture(name).join("config.json"));
        let new = read(&dir.path().join("pruned/config.json"));
        old[key] = json!(kept[0].len());
        let layers = source.spec().moe_layers();
        let ids: Value = layers.iter().zip(&kept).map(|(l, ids)| (l.to_string(), json!(ids))).collect();
        old["quorate"] = json!({"source_fingerprint": source.fingerprint(), "kept_experts": ids});
        assert_eq!(new, old);
        let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&new), keys(&old), "the order of keys stays");
        for sidecar in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            let copied = fs::read(pruned.sidecar(sidecar).unwrap()).unwrap();
            assert_eq!(copied, fs::read(fixture(name).join(sidecar)).unwrap());
        }
        assert_eq!(pruned.sidecar("reference.safetensors"), None);
        let bytes = fs::read(dir.path().join("pruned/model.safetensors")).unwrap();
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    }
}

#[test]
fn large_checkpoints_are_sharded() {
    let (dir, pruned) = prune_and_compare("olmoe", &[vec![0, 2, 5], vec![1, 3, 4]], 100_000);
    assert!(pruned.files().len() > 3);
    for file in pruned.files() {
        assert!(file.size() < 100_000 + 10_000);
    }
    let index = fs::read(dir.path().join("pruned/model.safetensors.index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    assert_eq!(index["metadata"]["total_size"], json!(pruned.total_bytes()));
    assert_eq!(index["weight_map"].as_object().unwrap().len(), pruned.tensors().len());
    // One tensor a file, since none is smaller.
    let (_, pruned) = prune_and_compare("olmoe", &[vec![0, 2, 5], vec![1, 3, 4]], 1);
    assert_eq!(pruned.files().len(), pruned.tensors().len());
}

#[test]
fn a_model_pruned_twice_keeps_its_history() {
    let (dir, once) = prune_and_compare("olmoe", &[vec![0, 2, 4, 5], vec![1, 2, 3, 4]], u64::MAX);
    let out = dir.path().join("twice");
    write_pruned_hf(&once, &[vec![1, 2, 3], vec![0, 1, 3]], &out, u64::MAX, &mut |_, _| true).unwrap();
    let twice = Checkpoint::open(&out).unwrap();
    let note = twice.config().json()["quorate"].clone();
    assert_eq!(note["kept_experts"]["0"], json!([1, 2, 3]));
    assert_eq!(note["source_fingerprint"], json!(once.fingerprint()));
    assert_eq!(note["source"]["kept_experts"]["1"], json!([1, 2, 3, 4]));
}

#[test]
fn what_cannot_be_written_is_refused_and_nothing_is_left() {
    let olmoe = Checkpoint::open(&fixture("olmoe")).unwrap();
    let llama = Checkpoint::open(&fixture("llama")).unwrap();
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("out");
    let cases: Vec<(&Checkpoint, Vec<Vec<usize>>, &str)> = vec![
        (&olmoe, vec![vec![0, 1, 2]], "1 lists of experts for 2 MoE layers"),
        (&olmoe, vec![vec![0, 1], vec![0, 1]], "layer 0: 2 experts kept, each token needs 3"),
        (&olmoe, vec![vec![], vec![]], "0 experts kept"),
        (&olmoe, vec![vec![0, 1, 2], vec![0, 1, 2, 3]], "4 experts kept in layer 1, 3 in layer 0"),
        (&olmoe, vec![vec![0, 1, 6], vec![0, 1, 2]], "layer 0: the expert ids [0, 1, 6] are not ascending below 6"),
        (&olmoe, vec![vec![0, 1, 1], vec![0, 1, 2]], "not ascending"),
        (&olmoe, vec![vec![2, 1, 0], vec![0, 1, 2]], "not ascending"),
        (&llama, vec![], "the model has no experts"),
    ];
    for (checkpoint, kept, expected) in cases {
        let message = chain(&write_pruned_hf(checkpoint, &kept, &out, u64::MAX, &mut |_, _| true).unwrap_err());
        assert!(message.contains(expected) && message.contains("help: "), "{message}");
        assert!(names_in(dir.path()).is_empty());
    }

    let kept = vec![vec![0, 1, 2], vec![3, 4, 5]];
    // A cancel at the start, in the middle, and with the last bytes.
    let total = olmoe.total_bytes() - 6 * olmoe.expert_bytes(0, 0) - 2 * 3 * 64 * 4;
    for stop_at in [0, total / 2, total] {
        let error = write_pruned_hf(&olmoe, &kept, &out, 1000, &mut |done, _| done < stop_at).unwrap_err();
        assert!(matches!(error, FormatError::Cancelled { .. }), "{error}");
        assert!(names_in(dir.path()).is_empty());
    }

    fs::create_dir(&out).unwrap();
    fs::write(out.join("mine"), "").unwrap();
    let error = write_pruned_hf(&olmoe, &kept, &out, u64::MAX, &mut |_, _| true).unwrap_err();
    assert!(matches!(error, FormatError::OutputExists { .. }), "{error}");
    assert_eq!(names_in(&out), ["mine"]);
    fs::remove_file(out.join("mine")).unwrap();
    write_pruned_hf(&olmoe, &kept, &out, u64::MAX, &mut |_, _| true).unwrap();
    assert!(Checkpoint::open(&out).is_ok(), "an empty folder is taken");
    fs::write(dir.path().join("file"), "").unwrap();
    let error = write_pruned_hf(&olmoe, &kept, &dir.path().join("file"), u64::MAX, &mut |_, _| true).unwrap_err();
    assert!(matches!(error, FormatError::OutputExists { .. }), "{error}");
}

#[test]
fn a_source_that_shrinks_while_it_is_copied_is_an_error() {
    let copy = Copy::of("olmoe");
    let source = Checkpoint::open(copy.path()).unwrap();
    let file = fs::OpenOptions::new().write(true).open(copy.file("model.safetensors")).unwrap();
    file.set_len(100_000).unwrap();
    let dir = TempDir::new().unwrap();
    let kept = [vec![0, 1, 2], vec![3, 4, 5]];
    let error = write_pruned_hf(&source, &kept, &dir.path().join("out"), 1000, &mut |_, _| true).unwrap_err();
    assert!(chain(&error).contains("is truncated") && chain(&error).contains("found 100000"), "{error}");
    assert!(names_in(dir.path()).is_empty());
}

#[test]
fn edited_weights_are_written_and_all_else_is_copied() {
    let source = Checkpoint::open(&fixture("mixtral_swa_bf16")).unwrap();
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("edited");
    let layer = source.spec().moe_layers()[0];
    let role = Role::ExpertDown(layer, 2);
    let count: usize = source.tensor(role).unwrap().shape.iter().product();
    let values: Vec<f32> = (0..count).map(|i| i as f32 / 7.0).collect();
    let mut last = (0, 0);
    let edits = HashMap::from([(role, values.clone())]);
    write_edited_hf(&source, &edits, &out, u64::MAX, &mut |done, total| {
        last = (done, total);
        true
    })
    .unwrap();
    let edited = Checkpoint::open(&out).unwrap();
    assert_eq!((last.0, last.1), (edited.total_bytes(), edited.total_bytes()));
    assert_ne!(edited.fingerprint(), source.fingerprint());
    for other in source.roles() {
        let (old, new) = (source.tensor(other).unwrap(), edited.tensor(other).unwrap());
        assert_eq!((&old.name, &old.shape), (&new.name, &new.shape));
        if other == role {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            assert_eq!((new.dtype, bytes_of(&edited, new)), (StoredDType::F32, bytes));
        } else {
            assert_eq!((old.dtype, bytes_of(&source, old)), (new.dtype, bytes_of(&edited, new)), "{other}");
        }
    }
    let wrong = HashMap::from([(role, vec![0.0; 3])]);
    let error = write_edited_hf(&source, &wrong, &dir.path().join("b"), u64::MAX, &mut |_, _| true).unwrap_err();
    assert!(chain(&error).contains("3 new values for"), "{error}");
    assert_eq!(names_in(dir.path()), ["edited"]);
}

#[test]
fn bytes_in_memory_are_those_of_the_file() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("t.safetensors");
    let tensors = || vec![TensorOut::f32("a", &[2], vec![1.0, 2.0]), TensorOut::f64("b", &[1], vec![3.0])];
    write_safetensors(&path, None, tensors()).unwrap();
    assert_eq!(safetensors_bytes(None, tensors()).unwrap(), fs::read(&path).unwrap());
}
