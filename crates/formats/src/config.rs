//! `config.json` and `generation_config.json`: typed access whose errors name file and key.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::ops::{Deref, RangeInclusive};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{FormatError, Result};

/// Largest configuration file that is read.
const CONFIG_BYTES_MAX: u64 = 16_000_000;

/// Largest width (hidden, intermediate) that a configuration may name.
pub const WIDTH_MAX: usize = 1 << 20;
/// Largest width of one head.
pub const HEAD_DIM_MAX: usize = 1 << 12;
/// Largest number of heads.
pub const HEADS_MAX: usize = 1 << 14;
/// Largest number of decoder layers.
pub const LAYERS_MAX: usize = 1 << 12;
/// Largest number of experts of a layer.
pub const EXPERTS_MAX: usize = 1 << 16;
/// Largest vocabulary.
pub const VOCAB_MAX: usize = 1 << 24;
/// Longest context.
pub const POSITIONS_MAX: usize = 1 << 31;

/// A model's configuration: the keys of `config.json`, and what `generation_config.json` adds to them.
#[derive(Clone, Debug)]
pub struct Config {
    root: Section,
    generation: Option<Section>,
}

/// One object of a configuration file.
#[derive(Clone, Debug)]
pub struct Section {
    path: PathBuf,
    /// Names of the objects around this one, each with a dot behind it.
    prefix: String,
    map: Map<String, Value>,
    /// What a key is called in the file, if it is another name.
    called: BTreeMap<String, String>,
}

impl Deref for Config {
    type Target = Section;
    fn deref(&self) -> &Section {
        &self.root
    }
}

impl Config {
    /// A configuration that stands in one object.
    pub fn new(root: Section) -> Self {
        Self { root, generation: None }
    }

    /// Reads both files of a model's folder; the second may be absent. In place of a folder `config.json` may be named, under
    /// whatever name.
    ///
    /// # Errors
    /// `config.json` is absent, or a file is unreadable or no JSON object.
    pub fn read(path: &Path) -> Result<Self> {
        let (file, folder) = match path.is_file() {
            true => (path.to_owned(), path.parent().unwrap_or(Path::new("")).to_owned()),
            false => (path.join("config.json"), path.to_owned()),
        };
        let Some(root) = read_section(&file)? else {
            return Err(FormatError::NoModel {
                path: path.to_owned(),
                problem: "there is no config.json".to_owned(),
                help: "name a folder with config.json and *.safetensors files",
            });
        };
        let generation = read_section(&folder.join("generation_config.json"))?;
        Ok(Self { root: root.language_model()?, generation })
    }

    /// A configuration given as a value; `path` names it in errors.
    ///
    /// # Errors
    /// `text_config` is no object.
    pub fn of(path: &Path, map: Map<String, Value>) -> Result<Self> {
        Ok(Self { root: Section::new(path, map).language_model()?, generation: None })
    }

    /// Tokens that end a text: those of both files, ascending.
    ///
    /// # Errors
    /// A value is neither a token id nor a list of them.
    pub fn eos_token_ids(&self) -> Result<Vec<u32>> {
        let mut ids = self.root.token_ids("eos_token_id")?;
        if let Some(generation) = &self.generation {
            ids.extend(generation.token_ids("eos_token_id")?);
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// Token that begins a text.
    ///
    /// # Errors
    /// The value is no token id.
    pub fn bos_token_id(&self) -> Result<Option<u32>> {
        let mut ids = self.root.token_ids("bos_token_id")?;
        if let (true, Some(generation)) = (ids.is_empty(), &self.generation) {
            ids = generation.token_ids("bos_token_id")?;
        }
        Ok(ids.first().copied())
    }
}

impl Section {
    /// An object given as a value; `path` names it in errors.
    pub fn new(path: &Path, map: Map<String, Value>) -> Self {
        Self::translated(path, map, BTreeMap::new())
    }

    /// An object whose keys have other names in the file: errors give those of `called`.
    pub fn translated(path: &Path, map: Map<String, Value>, called: BTreeMap<String, String>) -> Self {
        Self { path: path.to_owned(), prefix: String::new(), map, called }
    }

    /// A key as it stands in the file, with the names of the objects around it.
    fn full_name(&self, key: &str) -> String {
        self.called.get(key).cloned().unwrap_or_else(|| format!("{}{key}", self.prefix))
    }

    /// Models with other senses keep the language model's part in an object of its own.
    fn language_model(self) -> Result<Section> {
        match self.opt_section("text_config")? {
            Some(text) if text.get("model_type").is_some() => Ok(text),
            _ => Ok(self),
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The object as it is in the file.
    pub fn json(&self) -> &Map<String, Value> {
        &self.map
    }

    /// The value of a key, unless it is absent or null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Error for a key that must be there.
    pub fn missing(&self, key: &str) -> FormatError {
        FormatError::ConfigMissing { path: self.path.clone(), key: self.full_name(key) }
    }

    /// Error for a value that cannot be.
    pub fn refuse(&self, key: &str, problem: impl Into<String>) -> FormatError {
        let mut value = self.map.get(key).unwrap_or(&Value::Null).to_string();
        if let Some((cut, _)) = value.char_indices().nth(60) {
            value.truncate(cut);
            value.push_str("...");
        }
        FormatError::ConfigValue {
            path: self.path.clone(),
            key: self.full_name(key),
            value: value.into(),
            problem: problem.into(),
        }
    }

    /// A whole number from 1 to `max`.
    ///
    /// # Errors
    /// Absent, another type, or out of range.
    pub fn count(&self, key: &str, max: usize) -> Result<usize> {
        self.opt_count(key, max)?.ok_or_else(|| self.missing(key))
    }

    /// A whole number from 1 to `max`; `None` if absent or null.
    ///
    /// # Errors
    /// Another type, or out of range.
    pub fn opt_count(&self, key: &str, max: usize) -> Result<Option<usize>> {
        self.opt_within(key, 1..=max)
    }

    /// A whole number from 0 to `max`; `None` if absent or null.
    ///
    /// # Errors
    /// Another type, or out of range.
    pub fn opt_index(&self, key: &str, max: usize) -> Result<Option<usize>> {
        self.opt_within(key, 0..=max)
    }

    fn opt_within(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match whole(value).and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n)) {
            Some(n) => Ok(Some(n)),
            None => {
                let (min, max) = range.into_inner();
                Err(self.refuse(key, format!("a whole number from {min} to {max} expected")))
            }
        }
    }

    /// A finite number; `None` if absent or null.
    ///
    /// # Errors
    /// Another type.
    pub fn opt_number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64().filter(|v| v.is_finite()) {
            Some(v) => Ok(Some(v)),
            None => Err(self.refuse(key, "a number expected")),
        }
    }

    /// A finite number above 0; `None` if absent or null.
    ///
    /// # Errors
    /// Another type, zero or negative.
    pub fn opt_positive(&self, key: &str) -> Result<Option<f64>> {
        match self.opt_number(key)? {
            Some(v) if v <= 0.0 => Err(self.refuse(key, "a number above 0 expected")),
            other => Ok(other),
        }
    }

    /// A finite number above 0.
    ///
    /// # Errors
    /// Absent, another type, zero or negative.
    pub fn positive(&self, key: &str) -> Result<f64> {
        self.opt_positive(key)?.ok_or_else(|| self.missing(key))
    }

    /// A truth value, or `default` if absent or null.
    ///
    /// # Errors
    /// Another type.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(_) => Err(self.refuse(key, "true or false expected")),
        }
    }

    /// A text; `None` if absent or null.
    ///
    /// # Errors
    /// Another type.
    pub fn opt_text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.refuse(key, "a text expected")),
        }
    }

    /// A list of whole numbers; `None` if absent or null.
    ///
    /// # Errors
    /// Another type.
    pub fn opt_indices(&self, key: &str) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let list = value.as_array().and_then(|list| {
            list.iter().map(|v| whole(v).and_then(|n| usize::try_from(n).ok())).collect::<Option<Vec<_>>>()
        });
        list.map(Some).ok_or_else(|| self.refuse(key, "a list of whole numbers expected"))
    }

    /// A list of finite numbers; `None` if absent or null.
    ///
    /// # Errors
    /// Another type.
    pub fn opt_numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let number = |v: &Value| v.as_f64().filter(|v| v.is_finite());
        let list = value.as_array().and_then(|list| list.iter().map(number).collect::<Option<Vec<_>>>());
        list.map(Some).ok_or_else(|| self.refuse(key, "a list of numbers expected"))
    }

    /// A list of texts; `None` if absent or null.
    ///
    /// # Errors
    /// Another type.
    pub fn opt_texts(&self, key: &str) -> Result<Option<Vec<&str>>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let list = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
        list.map(Some).ok_or_else(|| self.refuse(key, "a list of texts expected"))
    }

    /// An object; `None` if absent or null.
    ///
    /// # Errors
    /// Another type.
    pub fn opt_section(&self, key: &str) -> Result<Option<Section>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Section {
                path: self.path.clone(),
                prefix: format!("{}{key}.", self.prefix),
                map: map.clone(),
                called: BTreeMap::new(),
            })),
            Some(_) => Err(self.refuse(key, "an object expected")),
        }
    }

    /// One token id, a list of them, or none.
    fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let list = match self.get(key) {
            None => return Ok(Vec::new()),
            Some(Value::Array(list)) => list.as_slice(),
            Some(single) => std::slice::from_ref(single),
        };
        let ids = list.iter().map(|v| whole(v).and_then(|n| u32::try_from(n).ok())).collect::<Option<Vec<_>>>();
        ids.ok_or_else(|| self.refuse(key, "a token id or a list of token ids expected"))
    }
}

/// A whole number, also if written like `4096.0`.
fn whole(value: &Value) -> Option<u64> {
    const EXACT_MAX: f64 = 9_007_199_254_740_992.0; // 2^53
    value.as_u64().or_else(|| {
        let float = value.as_f64()?;
        (float.fract() == 0.0 && (0.0..=EXACT_MAX).contains(&float)).then_some(float as u64)
    })
}

/// The object in a file; `None` if there is no such file.
fn read_section(path: &Path) -> Result<Option<Section>> {
    match read_json(path, CONFIG_BYTES_MAX) {
        Ok(map) => Ok(Some(Section::new(path, map))),
        Err(FormatError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Reads a JSON file of at most `limit` bytes.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path, limit: u64) -> Result<T> {
    let metadata = fs::metadata(path).map_err(|e| FormatError::io("open", path, e))?;
    if !metadata.is_file() {
        return Err(FormatError::NotAFile { path: path.to_owned() });
    }
    if metadata.len() > limit {
        return Err(FormatError::TooLarge { path: path.to_owned(), size: metadata.len(), limit });
    }
    let text = fs::read(path).map_err(|e| FormatError::io("read", path, e))?;
    serde_json::from_slice(&text).map_err(|source| FormatError::Json { path: path.to_owned(), source })
}
