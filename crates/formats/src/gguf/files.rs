//! The files of a model in GGUF: one, or the parts of a split one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::{GgufFile, GgufValue};
use crate::checkpoint::homes;
use crate::{DataFile, FormatError, Result, TensorLoc};

/// Parts that a split model may have.
const PARTS_MAX: u64 = 99_999;

/// The open files of a model.
pub(super) struct Files {
    pub metadata: BTreeMap<String, GgufValue>,
    pub files: Vec<DataFile>,
    /// By file, then offset.
    pub tensors: Vec<TensorLoc>,
}

/// Opens a file, and the others if it is the first part of a split model; unless `whole`, headers are enough.
pub(super) fn open(path: &Path, whole: bool) -> Result<Files> {
    let first = GgufFile::open_part(path, whole)?;
    let bad = |problem: String| FormatError::Gguf { path: path.to_owned(), problem };
    let (part, parts) = (split(&first, "split.no")?.unwrap_or(0), split(&first, "split.count")?.unwrap_or(1));
    let expected = split(&first, "split.tensors.count")?;
    if part != 0 {
        return Err(bad(format!("it is part {} of {parts}; name the first part", part + 1)));
    }
    let stem = if parts > 1 { stem(path, parts)? } else { String::new() };
    let (metadata, file, tensors) = first.into_parts(0);
    let mut all = Files { metadata, files: vec![file], tensors };
    for i in 1..parts {
        let path = path.with_file_name(format!("{stem}{}", suffix(i + 1, parts)));
        let next = GgufFile::open_part(&path, whole)?;
        if (split(&next, "split.no")?, split(&next, "split.count")?) != (Some(i), Some(parts)) {
            return Err(FormatError::Gguf { path, problem: format!("it is not part {} of {parts}", i + 1) });
        }
        let (_, file, mut tensors) = next.into_parts(all.files.len());
        all.files.push(file);
        all.tensors.append(&mut tensors);
    }
    match expected {
        Some(n) if parts > 1 && n != all.tensors.len() as u64 => {
            Err(bad(format!("its parts hold {} tensors, {n} expected", all.tensors.len())))
        }
        _ => {
            homes(&all.files, &all.tensors)?;
            Ok(all)
        }
    }
}

fn split(file: &GgufFile, key: &str) -> Result<Option<u64>> {
    let Some(value) = file.metadata().get(key) else { return Ok(None) };
    let known = value.as_u64().filter(|&n| n <= PARTS_MAX || key == "split.tensors.count");
    known.map(Some).ok_or_else(|| FormatError::Gguf {
        path: file.data().path().to_owned(),
        problem: format!("key `{key}` is no number of parts"),
    })
}

/// How the name of a part ends.
fn suffix(part: u64, parts: u64) -> String {
    format!("-{part:05}-of-{parts:05}.gguf")
}

/// What the names of all parts begin with.
fn stem(first: &Path, parts: u64) -> Result<String> {
    let name = first.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let stem = name.strip_suffix(&suffix(1, parts)).map(str::to_owned);
    stem.ok_or_else(|| {
        let problem = format!("it is the first of {parts} parts, so its name should end in {}", suffix(1, parts));
        FormatError::Gguf { path: first.to_owned(), problem }
    })
}

/// The model in GGUF that lies in a folder, if there is one: the only such file, or the first of its parts.
///
/// # Errors
/// There are several models, or the folder cannot be read.
pub fn in_folder(folder: &Path) -> Result<Option<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| FormatError::io("read", folder, e))? {
        let path = entry.map_err(|e| FormatError::io("read", folder, e))?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let part = name.rsplit_once("-of-").and_then(|(before, _)| before.rsplit_once('-')).map(|(_, part)| part);
        let later_part = part.is_some_and(|n| n.len() == 5 && n != "00001" && n.bytes().all(|b| b.is_ascii_digit()));
        // Beside a model may lie its projector for images.
        if name.ends_with(".gguf") && !later_part && !name.starts_with("mmproj") && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    match found.len() {
        0 | 1 => Ok(found.pop()),
        n => Err(FormatError::NoModel {
            path: folder.to_owned(),
            problem: format!("it holds {n} GGUF models, {} among them", found[0].display()),
            help: "name one of the files",
        }),
    }
}
