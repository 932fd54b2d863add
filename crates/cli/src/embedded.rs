//! The model, tasks and patterns that the program carries in itself. On first use they are unpacked into the home folder,
//! and from then on are files like any other model's.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use quorate_lens::{Library, Pattern, PatternInfo};

include!(concat!(env!("OUT_DIR"), "/embedded_files.rs"));

/// Folder of Quorate's own files: `$QUORATE_HOME`, else the user's data folder.
pub fn home() -> Result<PathBuf> {
    if let Some(home) = std::env::var_os("QUORATE_HOME").filter(|v| !v.is_empty()) {
        return Ok(PathBuf::from(home));
    }
    let data = std::env::var_os("XDG_DATA_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    let user = || std::env::var_os("HOME").or_else(|| std::env::var_os("LOCALAPPDATA")).map(PathBuf::from);
    let data = data.or_else(|| user().map(|home| home.join(".local/share")));
    data.map(|d| d.join("quorate")).context("neither QUORATE_HOME nor HOME is set; help: set QUORATE_HOME to a folder")
}

/// The unpacked folder; it has `model`, `tasks` and `patterns`.
pub fn unpacked() -> Result<PathBuf> {
    let home = home()?;
    let folder = home.join(format!("embedded-{HASH}"));
    if folder.is_dir() {
        return Ok(folder);
    }
    unpack(&home, &folder).with_context(|| {
        format!("cannot unpack the embedded model into {}; help: free 60 MB there, or set QUORATE_HOME", home.display())
    })?;
    remove_older(&home, &folder);
    Ok(folder)
}

/// Stores the embedded model's patterns in a library that does not have those of this version. What the user has
/// profiled or merged under one of their names stays.
pub fn store_patterns(library: &mut Library) -> Result<()> {
    if library.note("embedded")?.as_deref() == Some(HASH) {
        return Ok(());
    }
    let ours: Option<Vec<PatternInfo>> = library.note("embedded-patterns")?.and_then(|t| serde_json::from_str(&t).ok());
    let stored = library.list(None)?;
    let mut patterns = Vec::new();
    for (name, bytes) in FILES.iter().filter(|(name, _)| name.starts_with("patterns/")) {
        patterns.push(Pattern::from_bytes(bytes, name)?);
    }
    let infos: Vec<PatternInfo> = patterns.iter().map(|p| p.info.clone()).collect();
    patterns.retain(|p| {
        let same = stored.iter().find(|i| (&i.fingerprint, &i.name) == (&p.info.fingerprint, &p.info.name));
        same.is_none_or(|info| ours.as_ref().is_none_or(|ours| ours.contains(info)))
    });
    library.put(&patterns)?;
    library.set_note("embedded-patterns", &serde_json::to_string(&infos)?)?;
    Ok(library.set_note("embedded", HASH)?)
}

/// Removes what other versions of the program have unpacked. That is only tidiness: what cannot be removed stays.
fn remove_older(home: &Path, current: &Path) {
    let entries = std::fs::read_dir(home).into_iter().flatten().flatten();
    let older = entries.map(|e| e.path()).filter(|p| {
        let name = p.file_name().unwrap_or_default().to_string_lossy();
        p != current && name.strip_prefix("embedded-").is_some_and(|hash| hash.len() == HASH.len())
    });
    older.for_each(|p| drop(std::fs::remove_dir_all(p)));
}

/// Unpacks under a temporary name and renames, so that a killed process leaves no half of it behind.
fn unpack(home: &Path, folder: &Path) -> Result<()> {
    let temporary = home.join(format!("embedded-{HASH}.{}.tmp", std::process::id()));
    let outcome = (|| -> Result<()> {
        for (name, bytes) in FILES {
            let path = temporary.join(name);
            std::fs::create_dir_all(path.parent().context("every file lies in the folder")?)?;
            std::fs::write(path, bytes)?;
        }
        match std::fs::rename(&temporary, folder) {
            Err(_) if folder.is_dir() => Ok(()), // another process was first
            other => Ok(other?),
        }
    })();
    let _ = std::fs::remove_dir_all(&temporary); // gone already unless something failed
    outcome
}
