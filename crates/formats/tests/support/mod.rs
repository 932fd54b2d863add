//! Fixtures, and copies of them to be damaged.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

/// All fixtures: tiny checkpoints of every family.
pub const FIXTURES: &[&str] = &[
    "olmoe",
    "olmoe_256",
    "olmoe_norm_clip",
    "qwen3_moe",
    "qwen3_moe_nonorm",
    "llama",
    "mixtral",
    "mixtral_swa_bf16",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen2_moe",
    "qwen2_moe_mixed",
    "deepseek_moe",
    "deepseek_v2",
    "deepseek_v2_greedy",
    "deepseek_v2_lite",
    "deepseek_v3",
    "deepseek_v3_flat_mtp",
    "deepseek_v3_fp8",
    "ernie4_5_moe",
    "gemma2",
    "gemma3_text",
    "gemma3_text_softcap",
    "glm4_moe",
    "gpt2",
    "gpt_oss",
    "gpt_oss_mxfp4",
    "granitemoe",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "llama4_nested",
    "llama4_text",
    "olmo2",
    "pangu_pro_moe",
    "phi3_long",
    "phi3_short_partial",
    "phimoe",
    "phimoe_long",
    "qwen3_next",
    "qwen3_5_moe",
];

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

/// A copy of a fixture in a folder of its own.
pub struct Copy {
    pub dir: TempDir,
}

impl Copy {
    pub fn of(name: &str) -> Self {
        let dir = TempDir::new().unwrap();
        for entry in fs::read_dir(fixture(name)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() && path.file_name().unwrap() != "reference.safetensors" {
                fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
            }
        }
        Self { dir }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.file(name)).unwrap()).unwrap()
    }

    /// Sets a key of `config.json`; null removes it.
    pub fn set(self, key: &str, value: Value) -> Self {
        let mut config = self.json("config.json");
        match value {
            Value::Null => config.as_object_mut().unwrap().remove(key),
            value => config.as_object_mut().unwrap().insert(key.to_owned(), value),
        };
        self.write("config.json", config.to_string())
    }

    pub fn write(self, name: &str, bytes: impl AsRef<[u8]>) -> Self {
        fs::write(self.file(name), bytes).unwrap();
        self
    }

    /// Changes the header of `model.safetensors`.
    pub fn edit_header(self, edit: impl FnOnce(&mut Value)) -> Self {
        let (mut header, data) = split(&fs::read(self.file("model.safetensors")).unwrap());
        edit(&mut header);
        self.write("model.safetensors", join(&header.to_string(), &data))
    }
}

/// Header and data of a safetensors file.
pub fn split(bytes: &[u8]) -> (Value, Vec<u8>) {
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + len]).unwrap(), bytes[8 + len..].to_vec())
}

/// A safetensors file of any header and data.
pub fn join(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// An F32 entry of a header.
pub fn entry(shape: &[u64], begin: u64, end: u64) -> Value {
    json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]})
}

/// An error with all its causes, as a person sees it.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}
