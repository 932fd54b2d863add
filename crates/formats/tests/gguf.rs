//! GGUF files: what is written is read back; hostile and truncated ones are refused without a panic.
#![allow(missing_docs, reason = "tests")]

use std::path::PathBuf;

use quorate_formats::{GgmlType, GgufFile, GgufValue, gguf_bytes};
use tempfile::TempDir;

fn sample() -> Vec<u8> {
    let metadata = [
        ("general.type", GgufValue::Text("imatrix".into())),
        ("big", GgufValue::Unsigned(1 << 40)),
        ("small", GgufValue::Signed(-3)),
        ("half", GgufValue::Float(0.5)),
        ("yes", GgufValue::Bool(true)),
        ("texts", GgufValue::list([GgufValue::Text("a".into()), GgufValue::Text("bc".into())])),
        ("wide", GgufValue::list([1, 1 << 40].map(GgufValue::Unsigned))),
    ]
    .map(|(k, v)| (k.to_string(), v));
    let tensors =
        [("a".to_string(), vec![3, 2], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), ("b".to_string(), vec![1], vec![7.0])];
    gguf_bytes(&metadata, &tensors)
}

fn open(folder: &TempDir, bytes: &[u8]) -> Result<GgufFile, String> {
    let path: PathBuf = folder.path().join("x.gguf");
    std::fs::write(&path, bytes).unwrap();
    GgufFile::open(&path).map_err(|e| e.to_string())
}

#[test]
fn what_is_written_is_read() {
    let folder = TempDir::new().unwrap();
    let file = open(&folder, &sample()).unwrap();
    assert_eq!(file.version(), 3);
    assert_eq!(file.metadata()["general.type"].as_str(), Some("imatrix"));
    assert_eq!(file.metadata()["big"].as_u64(), Some(1 << 40));
    assert_eq!(file.metadata()["small"], GgufValue::Signed(-3));
    assert_eq!(file.metadata()["wide"], GgufValue::list([1, 1 << 40].map(GgufValue::Unsigned)));
    let GgufValue::Array(texts) = &file.metadata()["texts"] else { panic!("a list of texts") };
    assert_eq!(texts.texts().unwrap(), ["a", "bc"]);
    assert_eq!(file.read_f32("a").unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!((file.tensor("a").unwrap().shape.as_slice(), file.read_f32("b").unwrap()), (&[3, 2][..], vec![7.0]));
    assert_eq!(file.tensors().count(), 2);
    assert!(file.tensor("c").is_err());
}

#[test]
fn every_cut_is_refused() {
    let (folder, bytes) = (TempDir::new().unwrap(), sample());
    let last = bytes.len() - 32 + 4; // behind the last value there is only padding
    for cut in 0..last {
        let error = open(&folder, &bytes[..cut]).expect_err("a cut file");
        assert!(error.contains("truncated") || error.contains("cannot lie"), "{cut}: {error}");
    }
    assert!(open(&folder, &bytes[..last]).is_ok());
}

#[test]
fn no_byte_that_is_changed_makes_a_panic() {
    let (folder, bytes) = (TempDir::new().unwrap(), sample());
    for at in 0..bytes.len() {
        for value in [0, 1, 0x7f, 0xff] {
            let mut changed = bytes.clone();
            changed[at] = value;
            if let Ok(file) = open(&folder, &changed) {
                let names: Vec<_> = file.tensors().map(|t| t.name.clone()).collect();
                names.iter().for_each(|n| drop(file.read_f32(n)));
            }
        }
    }
}

#[test]
fn lies_are_named() {
    let folder = TempDir::new().unwrap();
    let head = |version: u32, tensors: u64, pairs: u64| {
        [b"GGUF".as_slice(), &version.to_le_bytes(), &tensors.to_le_bytes(), &pairs.to_le_bytes()].concat()
    };
    let pair = |key: &str, kind: u32, rest: &[u8]| {
        [&(key.len() as u64).to_le_bytes()[..], key.as_bytes(), &kind.to_le_bytes(), rest].concat()
    };
    let long = |n: u64| [&6u32.to_le_bytes()[..], &n.to_le_bytes()].concat();
    let nest = |n: usize| [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat().repeat(n);
    let tensor = |name: &str, shape: &[u64], kind: u32, offset: u64| {
        let dims: Vec<u8> = shape.iter().flat_map(|d| d.to_le_bytes()).collect();
        let counted = (shape.len() as u32).to_le_bytes();
        [
            &(name.len() as u64).to_le_bytes()[..],
            name.as_bytes(),
            &counted,
            &dims,
            &kind.to_le_bytes(),
            &offset.to_le_bytes(),
        ]
        .concat()
    };
    let with = |head: Vec<u8>, parts: &[Vec<u8>]| {
        let mut bytes = head;
        parts.iter().for_each(|p| bytes.extend(p));
        bytes.extend([0; 256]);
        bytes
    };
    for (bytes, part) in [
        (b"GGML0000".to_vec(), "does not begin"),
        (head(1, 0, 0), "version 1"),
        (head(4, 0, 0), "version 4"),
        (head(3u32.swap_bytes(), 0, 0), "big-endian"),
        (head(3, u64::MAX, 0), "cannot lie"),
        (head(3, 0, u64::MAX), "cannot lie"),
        (with(head(3, 0, 1), &[pair("k", 9, &long(u64::MAX / 4))]), "cannot lie"),
        (with(head(3, 0, 1), &[pair("k", 9, &nest(40))]), "arrays in an array"),
        (with(head(3, 0, 1), &[pair("k", 13, &[])]), "type 13"),
        (with(head(3, 0, 1), &[pair("k", 9, &[&13u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat())]), "type 13"),
        (with(head(3, 0, 1 << 15), &vec![pair("k", 0, &[2]); 1 << 15]), "at most 16384"),
        (with(head(3, 0, 1), &[pair("k", 7, &[2])]), "truth value 2"),
        (with(head(3, 0, 2), &[pair("k", 0, &[2]), pair("k", 0, &[2])]), "twice"),
        (with(head(3, 0, 1), &[pair("general.alignment", 4, &[3, 0, 0, 0])]), "power of two"),
        (with(head(3, 1, 0), &[tensor("t", &[1; 5], 0, 0)]), "5 dimensions"),
        (with(head(3, 1, 0), &[tensor("t", &[1], 99, 0)]), "type 99"),
        (with(head(3, 1, 0), &[tensor("t", &[u64::MAX, 2], 0, 0)]), "no size"),
        (with(head(3, 1, 0), &[tensor("t", &[2, 0], 0, 0)]), "no elements"),
        (with(head(3, 1, 0), &[tensor("t", &[31], GgmlType::Q4_0.id(), 0)]), "no size"),
        (with(head(3, 1, 0), &[tensor("t", &[1], 0, 1)]), "aligned"),
        (with(head(3, 1, 0), &[tensor("t", &[1], 0, u64::MAX - 31)]), "truncated"),
        (with(head(3, 2, 0), &[tensor("t", &[9], 0, 0), tensor("u", &[9], 0, 32)]), "overlap"),
        (with(head(3, 2, 0), &[tensor("t", &[1], 0, 0), tensor("t", &[1], 0, 32)]), "twice"),
    ] {
        let error = open(&folder, &bytes).expect_err(part);
        assert!(error.contains(part), "{part}: {error}");
    }
}
