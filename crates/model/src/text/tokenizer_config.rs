//! What a model folder says about its tokenizer beside `tokenizer.json`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::TextError;

/// The largest side file that is read, in bytes.
const SIDE_FILE_BYTES_MAX: u64 = 64 << 20;

/// The names of special tokens, as configurations and templates use them.
const SPECIAL_NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Special tokens by role, as text: `bos_token` is `<s>`, and so on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens(BTreeMap<String, String>);

impl SpecialTokens {
    /// Sets a role's token. `role` is a template's name for it, such as `bos_token`.
    pub fn set(&mut self, role: impl Into<String>, token: impl Into<String>) {
        self.0.insert(role.into(), token.into());
    }

    /// The token of a role.
    pub fn get(&self, role: &str) -> Option<&str> {
        self.0.get(role).map(String::as_str)
    }

    /// All roles and tokens.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(role, token)| (role.as_str(), token.as_str()))
    }
}

/// Reads a file whole, if it is there and not larger than `limit`.
pub(super) fn read_limited(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, TextError> {
    let failed = |source| TextError::Read { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let bytes = file.metadata().map_err(failed)?.len();
    if bytes > limit {
        return Err(TextError::TooLarge { path: path.to_owned(), bytes, limit });
    }
    let mut content = Vec::new();
    file.take(limit).read_to_end(&mut content).map_err(failed)?;
    Ok(Some(content))
}

fn read_text(path: &Path) -> Result<Option<String>, TextError> {
    let Some(bytes) = read_limited(path, SIDE_FILE_BYTES_MAX)? else { return Ok(None) };
    let text = String::from_utf8(bytes)
        .map_err(|error| TextError::Invalid { path: path.to_owned(), message: error.to_string() })?;
    Ok(Some(text))
}

fn read_json(path: &Path) -> Result<Option<Json>, TextError> {
    let Some(text) = read_text(path)? else { return Ok(None) };
    let json = serde_json::from_str(&text)
        .map_err(|error| TextError::Invalid { path: path.to_owned(), message: error.to_string() })?;
    Ok(Some(json))
}

/// What the side files say.
pub(super) struct TokenizerConfig {
    pub(super) specials: SpecialTokens,
    /// Chat templates by name; the usual one is `default`.
    pub(super) templates: BTreeMap<String, String>,
}

impl TokenizerConfig {
    /// Reads `tokenizer_config.json`, `special_tokens_map.json` and the template files of a folder;
    /// all may be absent.
    pub(super) fn read(dir: &Path) -> Result<Self, TextError> {
        let config_path = dir.join("tokenizer_config.json");
        let config = read_json(&config_path)?.unwrap_or(Json::Null);
        let map = read_json(&dir.join("special_tokens_map.json"))?.unwrap_or(Json::Null);
        let mut specials = SpecialTokens::default();
        for name in SPECIAL_NAMES {
            if let Some(token) = token_text(&config[name]).or_else(|| token_text(&map[name])) {
                specials.set(name, token);
            }
        }
        let mut templates = BTreeMap::new();
        if let Some(json) = read_json(&dir.join("chat_template.json"))? {
            add_templates(&mut templates, &json["chat_template"]);
        }
        if !add_templates(&mut templates, &config["chat_template"]) {
            let message = "chat_template is neither text nor a list of named texts".to_owned();
            return Err(TextError::Invalid { path: config_path, message });
        }
        if let Some(source) = read_text(&dir.join("chat_template.jinja"))? {
            templates.insert("default".to_owned(), source);
        }
        for (name, path) in named_template_files(dir)? {
            if let Some(source) = read_text(&path)? {
                templates.insert(name, source);
            }
        }
        Ok(Self { specials, templates })
    }
}

/// A token is written as text or as an object with its text.
fn token_text(json: &Json) -> Option<&str> {
    json.as_str().or_else(|| json["content"].as_str())
}

/// Adds a template, or several with names. False if it is neither.
fn add_templates(templates: &mut BTreeMap<String, String>, json: &Json) -> bool {
    match json {
        Json::Null => true,
        Json::String(source) => {
            templates.insert("default".to_owned(), source.clone());
            true
        }
        Json::Array(list) => list.iter().all(|entry| match (entry["name"].as_str(), entry["template"].as_str()) {
            (Some(name), Some(source)) => {
                templates.insert(name.to_owned(), source.to_owned());
                true
            }
            _ => false,
        }),
        _ => false,
    }
}

/// The files of `additional_chat_templates/`, in order of their names.
fn named_template_files(dir: &Path) -> Result<Vec<(String, PathBuf)>, TextError> {
    let folder = dir.join("additional_chat_templates");
    let Ok(entries) = folder.read_dir() else { return Ok(Vec::new()) };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|source| TextError::Read { path: folder.clone(), source })?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if let Some(name) = name.and_then(|name| name.strip_suffix(".jinja")) {
            files.push((name.to_owned(), path.clone()));
        }
    }
    files.sort();
    Ok(files)
}
