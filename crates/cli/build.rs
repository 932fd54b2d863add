//! Lists the files of the embedded model, its tasks and its patterns, so that the program can carry them.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

fn main() {
    let root = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../../embedded");
    println!("cargo::rerun-if-changed={}", root.display());
    let mut files = Vec::new();
    collect(&root, &mut files);
    files.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325u64; // FNV-1a over names and contents
    let mut code = String::from("pub static FILES: &[(&str, &[u8])] = &[\n");
    for file in &files {
        println!("cargo::rerun-if-changed={}", file.display());
        let name = file.strip_prefix(&root).expect("collected below it").to_string_lossy().replace('\\', "/");
        let bytes = std::fs::read(file).expect("listed file can be read");
        for &byte in name.as_bytes().iter().chain(&bytes) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        let path = file.canonicalize().expect("listed file exists");
        writeln!(code, "    ({name:?}, include_bytes!({path:?})),").expect("strings can be written to");
    }
    writeln!(code, "];\npub const HASH: &str = \"{hash:016x}\";").expect("strings can be written to");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it")).join("embedded_files.rs");
    std::fs::write(out, code).expect("cargo's folder is writable");
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("folder can be listed").flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|e| ["json", "jsonl", "safetensors", "pattern"].iter().any(|x| e == *x))
        {
            files.push(path);
        }
    }
}
