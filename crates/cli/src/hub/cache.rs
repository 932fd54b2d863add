//! The cache folder: `models--OWNER--REPO/{refs/REVISION, snapshots/COMMIT/FILE -> blobs/ETAG}`, as the Python library has it.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use super::client::{Busy, CHUNK_BYTES, Client, FileInfo, Listing};
use super::repo::Repo;
use super::select::{self, INDEX, SINGLE};
use super::settings::Settings;
use crate::common::{Common, Progress, interrupted};

/// Failed requests in a row, without a byte, after which a download is given up.
const ATTEMPTS: u32 = 4;
const BUFFER_BYTES: usize = 1 << 20;

/// What is in the cache of a repository.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// The snapshot's folder.
    pub folder: PathBuf,
    /// The commit.
    pub commit: String,
    /// The files asked for.
    pub files: Vec<String>,
    /// Their size.
    pub bytes: u64,
    /// Bytes that came over the network.
    pub fetched_bytes: u64,
}

/// Downloads of one repository into the cache.
pub struct Downloads<'a> {
    common: &'a Common,
    client: &'a Client,
    repo: &'a Repo,
    listing: &'a Listing,
    cache: PathBuf,
    root: PathBuf,
    bar: Progress,
    total: u64,
    done: u64,
    fetched: Fetched,
}

impl<'a> Downloads<'a> {
    /// Nothing is written yet.
    pub fn new(
        common: &'a Common,
        settings: &Settings,
        client: &'a Client,
        repo: &'a Repo,
        listing: &'a Listing,
    ) -> Self {
        let root = settings.cache.join(repo.folder_name());
        let folder = root.join("snapshots").join(&listing.commit);
        let bar = common.progress(&repo.id, 0, "bytes");
        let fetched = Fetched { folder, commit: listing.commit.clone(), files: Vec::new(), bytes: 0, fetched_bytes: 0 };
        Downloads {
            common,
            client,
            repo,
            listing,
            cache: settings.cache.clone(),
            root,
            bar,
            total: 0,
            done: 0,
            fetched,
        }
    }

    /// Fetches files that are not there yet.
    pub fn fetch(&mut self, names: &[String]) -> Result<()> {
        let size = |name: &String| self.listing.files.iter().find(|f| f.name == *name).and_then(|f| f.size);
        let sizes: Vec<Option<u64>> = names.iter().map(size).collect();
        self.total += sizes.iter().flatten().sum::<u64>();
        self.bar.set_total(self.total);
        for (name, size) in names.iter().zip(sizes) {
            let there =
                fs::metadata(self.path_of(name)?).ok().map(|m| m.len()).filter(|&len| size.is_none_or(|s| s == len));
            let bytes = match there {
                Some(bytes) => bytes,
                None => self.fetch_one(name).with_context(|| format!("cannot fetch {name} of {}", self.repo))?,
            };
            if size.is_none() {
                self.total += bytes;
                self.bar.set_total(self.total);
            }
            self.done += bytes;
            self.bar.set(self.done);
            self.fetched.bytes += bytes;
            self.fetched.files.push(name.clone());
        }
        Ok(())
    }

    /// Where a file is, or will be.
    pub fn path_of(&self, name: &str) -> Result<PathBuf> {
        if !super::repo::is_safe(name) {
            bail!("`{}` would lie outside the cache", name.escape_debug());
        }
        Ok(self.fetched.folder.join(name))
    }

    /// From now on the revision stands for this commit.
    pub fn finish(self) -> Result<Fetched> {
        self.bar.finish();
        if self.repo.revision != self.fetched.commit {
            let path = self.root.join("refs").join(&self.repo.revision);
            create_folder_of(&path)?;
            fs::write(&path, &self.fetched.commit).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(self.fetched)
    }

    /// Fetches a file's content unless another snapshot has it, and links it. Returns its size.
    fn fetch_one(&mut self, name: &str) -> Result<u64> {
        let info = self.client.info(self.repo, &self.fetched.commit, name)?;
        let blob = self.root.join("blobs").join(&info.etag);
        create_folder_of(&blob)?;
        let _lock = self.lock(&info.etag)?;
        if fs::metadata(&blob).map_or(true, |m| m.len() != info.size) {
            self.download(name, &info, &blob)?;
        }
        link(&blob, &info.etag, &self.path_of(name)?, name)?;
        Ok(info.size)
    }

    /// One process at a time writes a blob; the Python library locks the same file.
    fn lock(&self, etag: &str) -> Result<File> {
        let path = self.cache.join(".locks").join(self.repo.folder_name()).join(format!("{etag}.lock"));
        create_folder_of(&path)?;
        let told = || format!("cannot lock {}", path.display());
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).with_context(told)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                self.common.note(&format!("waiting for another process that fetches {}", self.repo));
                file.lock().with_context(told)?;
            }
            Err(TryLockError::Error(e)) => return Err(e).with_context(told),
        }
        Ok(file)
    }

    /// Fetches what a partial download lacks, and gives it its name once it is whole and what the hub promised.
    fn download(&mut self, name: &str, info: &FileInfo, blob: &Path) -> Result<()> {
        let path = blob.with_file_name(format!("{}.incomplete", info.etag));
        let told = || format!("cannot write {}", path.display());
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).with_context(told)?;
        let mut partial = Partial::resume(file, info).with_context(told)?;
        while partial.len < info.size {
            with_patience(|| {
                let before = partial.len;
                match self.chunk(name, &mut partial, info.size) {
                    // What came is progress: the next request asks for what comes behind it.
                    Err(error) if is_passing(&error) && partial.len > before && !interrupted() => Ok(()),
                    other => other,
                }
            })?;
        }
        if !partial.is_as_promised(info) {
            fs::remove_file(&path).with_context(told)?;
            bail!("the bytes of {name} are not those that the hub promises; help: they were thrown away, try again");
        }
        partial.file.sync_all().with_context(told)?;
        fs::rename(&path, blob).with_context(|| format!("cannot write {}", blob.display()))
    }

    /// One request.
    fn chunk(&mut self, name: &str, partial: &mut Partial, size: u64) -> Result<()> {
        let end = size.min(partial.len + CHUNK_BYTES);
        let (first, mut bytes) = self.client.read(self.repo, &self.fetched.commit, name, partial.len, end)?;
        if first != partial.len {
            partial.restart()?; // the server sends all of it, whatever it was asked for
        }
        let (mut buffer, before) = (vec![0; BUFFER_BYTES], partial.len);
        loop {
            if interrupted() {
                bail!("interrupted; help: what is there is kept, the same command goes on from it");
            }
            let n = bytes.read(&mut buffer).context("the connection broke off")?;
            if n == 0 && partial.len == before {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            if n == 0 || partial.len >= size {
                return Ok(());
            }
            let n = n.min(usize::try_from(size - partial.len).unwrap_or(usize::MAX));
            partial.append(&buffer[..n])?;
            self.fetched.fetched_bytes += n as u64;
            self.bar.set(self.done + partial.len);
        }
    }
}

/// Tries again, ever later, what fails in a way that may pass.
pub fn with_patience<T>(mut work: impl FnMut() -> Result<T>) -> Result<T> {
    let mut failures = 0;
    loop {
        match work() {
            Ok(done) => return Ok(done),
            Err(error) if interrupted() || !is_passing(&error) => return Err(error),
            Err(error) => {
                failures += 1;
                if failures >= ATTEMPTS {
                    return Err(error.context("gave up; help: what is there is kept, the same command goes on from it"));
                }
                std::thread::sleep(Duration::from_millis(50 << (2 * failures)));
            }
        }
    }
}

/// Whether trying again can help.
fn is_passing(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|e| e.is::<Busy>() || e.is::<ureq::Error>() || e.downcast_ref::<io::Error>().is_some_and(is_of_network))
}

/// A full disk is not.
fn is_of_network(error: &io::Error) -> bool {
    use io::ErrorKind::*;
    !matches!(error.kind(), StorageFull | QuotaExceeded | PermissionDenied | ReadOnlyFilesystem | FileTooLarge)
}

/// A file that grows.
struct Partial {
    file: File,
    len: u64,
    /// Of large files, whose name is their hash.
    hash: Option<Sha256>,
}

impl Partial {
    /// Goes on from what is there.
    fn resume(mut file: File, info: &FileInfo) -> io::Result<Partial> {
        let len = file.metadata()?.len();
        let is_hash = info.etag.len() == 64 && info.etag.bytes().all(|b| b.is_ascii_hexdigit());
        let mut hash = is_hash.then(Sha256::new);
        if len > info.size {
            file.set_len(0)?;
        }
        file.seek(SeekFrom::Start(0))?;
        let mut found = 0;
        let mut buffer = vec![0; BUFFER_BYTES];
        while found < len.min(info.size) && len <= info.size {
            let n = file.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            found += n as u64;
            if let Some(hash) = &mut hash {
                hash.update(&buffer[..n]);
            }
        }
        Ok(Partial { file, len: found, hash })
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.len += bytes.len() as u64;
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
        Ok(())
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.len = 0;
        self.hash = self.hash.take().map(|_| Sha256::new());
        Ok(())
    }

    fn is_as_promised(&mut self, info: &FileInfo) -> bool {
        let hex = |hash: Sha256| hash.finalize().iter().map(|b| format!("{b:02x}")).collect::<String>();
        self.len == info.size && self.hash.take().is_none_or(|hash| hex(hash).eq_ignore_ascii_case(&info.etag))
    }
}

fn create_folder_of(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}; help: set HF_HOME", folder.display()))
}

/// Makes `path` stand for a blob: by a relative link, or where there are none, by moving the blob there.
fn link(blob: &Path, etag: &str, path: &Path, name: &str) -> Result<()> {
    create_folder_of(path)?;
    let told = || format!("cannot write {}", path.display());
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).with_context(told),
        _ => {}
    }
    let target = format!("{}blobs/{etag}", "../".repeat(2 + name.matches('/').count()));
    link_to(Path::new(&target), blob, path).with_context(told)
}

#[cfg(unix)]
fn link_to(target: &Path, _blob: &Path, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

#[cfg(not(unix))]
fn link_to(_target: &Path, blob: &Path, path: &Path) -> io::Result<()> {
    fs::rename(blob, path)
}

/// The snapshot of a revision, if the cache has one.
fn snapshot(cache: &Path, repo: &Repo) -> Option<(PathBuf, String)> {
    let root = cache.join(repo.folder_name());
    let named = fs::read_to_string(root.join("refs").join(&repo.revision)).ok();
    let commit = named.map_or_else(|| repo.revision.clone(), |text| text.trim().to_owned());
    let plain = !commit.is_empty() && commit.bytes().all(|b| b.is_ascii_alphanumeric());
    let folder = root.join("snapshots").join(&commit);
    (plain && folder.is_dir()).then_some((folder, commit))
}

/// What the cache has of a repository.
pub fn present(cache: &Path, repo: &Repo) -> Result<Fetched> {
    let Some((folder, commit)) = snapshot(cache, repo) else { bail!("nothing of it was ever fetched") };
    let files = files_in(&folder);
    let bytes = files.iter().filter_map(|name| fs::metadata(folder.join(name)).ok()).map(|m| m.len()).sum();
    Ok(Fetched { folder, commit, files, bytes, fetched_bytes: 0 })
}

/// The model in the cache, if it is whole there: a folder, or a GGUF file.
pub fn whole(cache: &Path, repo: &Repo) -> Option<PathBuf> {
    let (folder, _) = snapshot(cache, repo)?;
    let has = |name: &str| folder.join(name).is_file();
    if repo.file.is_none() && has("config.json") {
        let index = folder.join(INDEX);
        let shards = || quorate_formats::checkpoint::shard_names(&index).ok();
        if has(SINGLE) || (has(INDEX) && shards().is_some_and(|names| names.iter().all(|name| has(name)))) {
            return Some(folder);
        }
    }
    let names = files_in(&folder);
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let parts = select::gguf(&names, repo.file.as_deref()).ok()?;
    let count = parts[0].rsplit_once("-of-").and_then(|(_, rest)| rest.strip_suffix(".gguf")?.parse::<usize>().ok());
    (count.is_none_or(|n| n == parts.len())).then(|| folder.join(&parts[0]))
}

/// Files in a folder and its folders, whose content is there.
fn files_in(folder: &Path) -> Vec<String> {
    let (mut names, mut folders) = (BTreeSet::new(), vec![folder.to_owned()]);
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).into_iter().flatten().flatten() {
            let path = entry.path();
            match (path.is_dir(), path.is_file(), path.strip_prefix(folder)) {
                (true, ..) => folders.push(path),
                (_, true, Ok(name)) => drop(name.to_str().map(|name| names.insert(name.replace('\\', "/")))),
                _ => {}
            }
        }
    }
    names.into_iter().collect()
}
