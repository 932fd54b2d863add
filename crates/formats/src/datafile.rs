//! One open data file with positioned reads.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{FormatError, Result};

/// A regular file, open for positioned reads from any number of threads. It counts the bytes read.
#[derive(Debug)]
pub struct DataFile {
    path: PathBuf,
    file: File,
    size: u64,
    bytes_read: AtomicU64,
}

impl DataFile {
    /// Opens a file. The system is told that reads will be scattered, so that it does not read the neighbours of what
    /// is asked for (other experts) ahead.
    ///
    /// # Errors
    /// The file cannot be opened, or is a folder, pipe or device.
    pub fn open(path: &Path) -> Result<Self> {
        // Looked at before opening: opening a pipe would wait for a writer.
        let metadata = fs::metadata(path).map_err(|e| FormatError::io("open", path, e))?;
        if !metadata.is_file() {
            return Err(FormatError::NotAFile { path: path.to_owned() });
        }
        let file = File::open(path).map_err(|e| FormatError::io("open", path, e))?;
        advise_random(&file);
        Ok(Self { path: path.to_owned(), file, size: metadata.len(), bytes_read: AtomicU64::new(0) })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes in the file when it was opened.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Asks the system to forget what it has cached of the file, so that the next read comes from the disk (Linux only).
    pub fn forget_cached(&self) {
        forget_pages(&self.file);
    }

    /// Bytes read through this handle so far.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// The range reaches beyond the end, or the system cannot read.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let bytes = buf.len() as u64;
        let end = offset.saturating_add(bytes);
        let truncated = |found| FormatError::Truncated {
            path: self.path.clone(),
            what: format!("reading {bytes} bytes at {offset}"),
            expected: end,
            found,
        };
        if end > self.size {
            return Err(truncated(self.size));
        }
        match read_exact_at(&self.file, offset, buf) {
            Ok(()) => {
                self.bytes_read.fetch_add(bytes, Ordering::Relaxed);
                Ok(())
            }
            // The file was cut after it had been opened.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                Err(truncated(self.file.metadata().map_or(0, |m| m.len())))
            }
            Err(e) => Err(FormatError::io("read", &self.path, e)),
        }
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buf, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
    while !buf.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buf, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                buf = &mut buf[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn forget_pages(file: &File) {
    // Only advice, see below; pages that others have mapped stay.
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
}

#[cfg(not(target_os = "linux"))]
fn forget_pages(_file: &File) {}

#[cfg(target_os = "linux")]
fn advise_random(file: &File) {
    // Only advice: a file system that knows none of it reads correctly all the same.
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::Random);
}

#[cfg(not(target_os = "linux"))]
fn advise_random(_file: &File) {}
