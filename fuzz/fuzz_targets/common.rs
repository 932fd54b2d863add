//! What the targets share.

use std::path::PathBuf;
use std::sync::OnceLock;

use tempfile::TempDir;

/// A file with these bytes, in a folder of this process.
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let base = PathBuf::from("/dev/shm");
    let made = || if base.is_dir() { tempfile::tempdir_in(&base) } else { tempfile::tempdir() };
    let path = FOLDER.get_or_init(|| made().expect("a temporary folder")).path().join(name);
    std::fs::write(&path, bytes).expect("a temporary file");
    path
}
