//! One open data file with positioned reads.

use std::fs::{self, File, Metadata};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use crate::{FormatError, Result};

/// What an uncached read is aligned to, in the file and in memory: no disk in use has larger sectors.
pub const UNCACHED_ALIGNMENT: usize = 4096;

/// Bytes that a buffer for [`DataFile::read_uncached`] must have.
pub fn uncached_len(offset: u64, len: usize) -> usize {
    (uncached_start(offset) + len).next_multiple_of(UNCACHED_ALIGNMENT)
}

/// Where the bytes at `offset` lie in that buffer.
fn uncached_start(offset: u64) -> usize {
    (offset % UNCACHED_ALIGNMENT as u64) as usize
}

/// A regular file, open for positioned reads from any number of threads. It counts the bytes read.
#[derive(Debug)]
pub struct DataFile {
    path: PathBuf,
    file: File,
    /// A second handle that goes past the system's cache; `None` where the file system has no such thing.
    uncached: OnceLock<Option<File>>,
    size: u64,
    identity: Identity,
    bytes_read: AtomicU64,
}

/// Tells a file from another, and from itself after it was written to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    size: u64,
    modified: Option<SystemTime>,
    /// Device and number on it; zeros where the system has none.
    place: (u64, u64),
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self { size: metadata.len(), modified: metadata.modified().ok(), place: place(metadata) }
    }
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
        let metadata = file.metadata().map_err(|e| FormatError::io("open", path, e))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            uncached: OnceLock::new(),
            size: metadata.len(),
            identity: Identity::of(&metadata),
            bytes_read: AtomicU64::new(0),
        })
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

    /// Asks the system to forget a part of what it has cached of the file (Linux only).
    pub fn forget_range(&self, offset: u64, len: u64) {
        forget(&self.file, offset, len);
    }

    /// Has the system begin to read `len` bytes from `offset` on into its cache, where it can be told so, as they will be
    /// read soon.
    pub fn expect_range(&self, offset: u64, len: u64) {
        advise_needed(&self.file, offset, len);
    }

    /// Whether this is still the file that was opened.
    ///
    /// # Errors
    /// It was written to, cut, or another took its place.
    pub fn check_unchanged(&self) -> Result<()> {
        let same = |m: io::Result<Metadata>| m.is_ok_and(|m| Identity::of(&m) == self.identity);
        if same(self.file.metadata()) && same(fs::metadata(&self.path)) {
            return Ok(());
        }
        Err(FormatError::Changed { path: self.path.clone() })
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

    /// Reads `len` bytes from `offset` on past the system's cache, so that nothing else is pushed out of it, and checks
    /// that the file is the one that was opened. `buf` must begin at a multiple of [`UNCACHED_ALIGNMENT`] and have
    /// [`uncached_len`] bytes; where the bytes lie in it is returned. On file systems that cannot do this, what the
    /// read left in the cache is forgotten.
    ///
    /// # Errors
    /// The range reaches beyond the end, the system cannot read, or the file has changed.
    ///
    /// # Panics
    /// If `buf` has another length.
    pub fn read_uncached(&self, offset: u64, len: usize, buf: &mut [u8]) -> Result<Range<usize>> {
        assert_eq!(buf.len(), uncached_len(offset, len), "a buffer for {len} bytes at {offset}");
        let start = uncached_start(offset);
        let direct = match self.uncached_handle() {
            Some(file) => read_until(file, offset - start as u64, buf, start + len),
            None => Err(io::ErrorKind::InvalidInput.into()),
        };
        // If it was refused, the other way tells what is wrong.
        self.settle_uncached(offset, len, buf, direct.unwrap_or(0))
    }

    /// The handle that goes past the system's cache, for those who read by other means; `None` where there is none. A read
    /// must begin at a multiple of [`UNCACHED_ALIGNMENT`], in the file and in memory, and be a multiple long;
    /// [`DataFile::settle_uncached`] ends it.
    pub fn uncached_handle(&self) -> Option<&File> {
        self.uncached.get_or_init(|| open_uncached(&self.path)).as_ref()
    }

    /// What [`DataFile::read_uncached`] does once `read` bytes of `buf` are there: if those are too few, they are read in
    /// another way, and in any case the file must be the one that was opened.
    ///
    /// # Errors
    /// As [`DataFile::read_uncached`].
    ///
    /// # Panics
    /// If `buf` has another length.
    pub fn settle_uncached(&self, offset: u64, len: usize, buf: &mut [u8], read: usize) -> Result<Range<usize>> {
        let start = uncached_start(offset);
        let wanted = start..start + len;
        if read >= wanted.end {
            self.bytes_read.fetch_add(read as u64, Ordering::Relaxed);
        } else {
            self.read_at(offset, &mut buf[wanted.clone()])?;
            self.forget_range(offset, len as u64);
        }
        self.check_unchanged()?;
        Ok(wanted)
    }
}

/// Reads until `needed` bytes are there or the file ends; returns how many came.
#[cfg(target_os = "linux")]
fn read_until(file: &File, offset: u64, buf: &mut [u8], needed: usize) -> io::Result<usize> {
    let mut read = 0;
    while read < needed {
        match std::os::unix::fs::FileExt::read_at(file, &mut buf[read..], offset + read as u64) {
            Ok(0) => break,
            Ok(n) => read += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(read)
}

#[cfg(not(target_os = "linux"))]
fn read_until(_: &File, _: u64, _: &mut [u8], _: usize) -> io::Result<usize> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(target_os = "linux")]
fn open_uncached(path: &Path) -> Option<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).ok()?;
    fs::OpenOptions::new().read(true).custom_flags(flags).open(path).ok()
}

#[cfg(not(target_os = "linux"))]
fn open_uncached(_path: &Path) -> Option<File> {
    None
}

#[cfg(unix)]
fn place(metadata: &Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    (metadata.dev(), metadata.ino())
}

#[cfg(not(unix))]
fn place(_metadata: &Metadata) -> (u64, u64) {
    (0, 0)
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
fn forget(file: &File, offset: u64, len: u64) {
    // Only advice, as above.
    let _ = rustix::fs::fadvise(file, offset, std::num::NonZeroU64::new(len), rustix::fs::Advice::DontNeed);
}

#[cfg(not(target_os = "linux"))]
fn forget(_file: &File, _offset: u64, _len: u64) {}

#[cfg(target_os = "linux")]
fn advise_random(file: &File) {
    // Only advice: a file system that knows none of it reads correctly all the same.
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::Random);
}

#[cfg(not(target_os = "linux"))]
fn advise_random(_file: &File) {}

#[cfg(target_os = "linux")]
fn advise_needed(file: &File, offset: u64, len: u64) {
    // As above; what is not read ahead is read when it is wanted.
    let _ = rustix::fs::fadvise(file, offset, std::num::NonZeroU64::new(len), rustix::fs::Advice::WillNeed);
}

#[cfg(not(target_os = "linux"))]
fn advise_needed(_file: &File, _offset: u64, _len: u64) {}

/// Adds to a list that is as long as a file says, in which no count is believed. It grows by a quarter, not to the double: so
/// lists of what a header describes stay below twice the header.
pub(crate) fn push_sparingly<T>(list: &mut Vec<T>, item: T) {
    if list.len() == list.capacity() {
        list.reserve_exact(list.len() / 4 + 16);
    }
    list.push(item);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A buffer whose bytes from some place on are aligned.
    fn aligned(len: usize) -> (Vec<u8>, usize) {
        let bytes = vec![0u8; len + UNCACHED_ALIGNMENT];
        let start = bytes.as_ptr().addr().next_multiple_of(UNCACHED_ALIGNMENT) - bytes.as_ptr().addr();
        (bytes, start)
    }

    fn read(file: &DataFile, offset: u64, len: usize) -> Result<Vec<u8>> {
        let size = uncached_len(offset, len);
        let (mut bytes, start) = aligned(size);
        let buf = &mut bytes[start..start + size];
        let range = file.read_uncached(offset, len, buf)?;
        Ok(buf[range].to_vec())
    }

    /// In the folder of temporary files and in that of the sources, which are often on different file systems.
    #[test]
    fn uncached_reads_give_the_same_bytes_and_notice_changes() {
        for folder in [tempfile::tempdir(), tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR"))] {
            let folder = folder.unwrap();
            let path = folder.path().join("data");
            let content: Vec<u8> = (0..20_001u32).map(|i| (i * 7 % 251) as u8).collect();
            fs::write(&path, &content).unwrap();
            let file = DataFile::open(&path).unwrap();
            for (offset, len) in [(0, 1), (1, 4096), (4095, 2), (8192, 4096), (100, 19_901), (20_000, 1), (5, 0)] {
                let expected = &content[offset as usize..offset as usize + len];
                assert_eq!(read(&file, offset, len).unwrap(), expected, "{len} bytes at {offset}");
            }
            assert!(file.bytes_read() >= 20_001);
            assert!(matches!(read(&file, 20_000, 2), Err(FormatError::Truncated { .. })));

            // Written to: the bytes may be right, but nobody knows.
            std::thread::sleep(std::time::Duration::from_millis(20));
            fs::OpenOptions::new().write(true).open(&path).unwrap().write_all(b"x").unwrap();
            assert!(matches!(read(&file, 4096, 10), Err(FormatError::Changed { .. })));

            let file = DataFile::open(&path).unwrap();
            fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(10_000).unwrap();
            let error = read(&file, 9000, 2000).unwrap_err();
            assert!(matches!(error, FormatError::Truncated { found: 10_000, .. }), "{error}");

            // Another file under its name.
            let file = DataFile::open(&path).unwrap();
            fs::copy(&path, folder.path().join("new")).unwrap();
            fs::rename(folder.path().join("new"), &path).unwrap();
            assert!(matches!(read(&file, 0, 10), Err(FormatError::Changed { .. })));
        }
    }
}
