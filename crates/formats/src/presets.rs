//! Public configuration values of well-known mixtures of experts, so that a model can be looked at before it is fetched.
//!
//! Each is a file in `presets/`: where the values come from (a repository of the Hugging Face hub), the number of parameters
//! that its authors publish, and those keys of its `config.json` that shapes follow from.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{Config, FormatError, Outline, Result};

/// A preset as it is compiled in.
#[derive(Debug)]
pub struct Preset {
    /// Its name, as `-m` takes it.
    pub name: &'static str,
    json: &'static str,
}

/// What a preset's file says.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PresetFile {
    /// Repository of the hub from which the values are.
    pub source: String,
    /// Number of parameters as published, e.g. `46.7B`.
    pub parameters: String,
    /// What the published number counts besides the language model.
    #[serde(default)]
    pub besides: Option<String>,
    /// Keys of its `config.json`.
    pub config: Map<String, Value>,
}

macro_rules! presets {
    ($($name:literal),* $(,)?) => {
        /// All presets.
        pub static PRESETS: &[Preset] =
            &[$(Preset { name: $name, json: include_str!(concat!("../presets/", $name, ".json")) }),*];
    };
}

presets![
    "mixtral-8x7b",
    "mixtral-8x22b",
    "olmoe-1b-7b",
    "qwen1.5-moe-a2.7b",
    "qwen2-57b-a14b",
    "qwen3-30b-a3b",
    "qwen3-235b-a22b",
    "qwen3-coder-480b-a35b",
    "qwen3-next-80b-a3b",
    "qwen3.5-35b-a3b",
    "deepseek-moe-16b",
    "deepseek-v2-lite",
    "deepseek-v2",
    "deepseek-v3",
    "deepseek-r1",
    "kimi-k2",
    "gpt-oss-20b",
    "gpt-oss-120b",
    "glm-4.5-air",
    "glm-4.5",
    "phi-3.5-moe",
    "granite-3.1-3b-a800m",
    "llama-4-scout",
    "llama-4-maverick",
    "hunyuan-a13b",
    "ernie-4.5-21b-a3b",
];

impl Preset {
    /// The preset of a name; capitals do not count.
    pub fn find(name: &str) -> Option<&'static Preset> {
        PRESETS.iter().find(|preset| preset.name.eq_ignore_ascii_case(name))
    }

    /// What its file says.
    ///
    /// # Errors
    /// The file is not of that form; a test opens all of them.
    pub fn read(&self) -> Result<PresetFile> {
        serde_json::from_str(self.json).map_err(|source| FormatError::Json { path: self.name.into(), source })
    }

    /// Its architecture.
    ///
    /// # Errors
    /// As [`Preset::read`], or a family refuses the values.
    pub fn outline(&self) -> Result<Outline> {
        Outline::new(&Config::of(Path::new(self.name), self.read()?.config)?)
    }
}
