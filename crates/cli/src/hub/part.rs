//! Of a model on the hub, only the bytes that a plan's kept experts need.
//!
//! The shards' headers come first. They tell where every expert lies; what all tokens need is fetched, then the kept experts, into
//! sparse files that nobody else sees, and the pruned folder is written from them.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use quorate_formats::{Checkpoint, FormatError, Role, TensorLoc, write_pruned_hf};
use quorate_lens::{ExpertMap, Plan};

use super::client::{CHUNK_BYTES, Client, Listing};
use super::{Hub, Repo, cache, select};
use crate::common::{Common, Progress, interrupted};

/// Bytes that are fetched along rather than asked for apart.
const GAP_BYTES: u64 = 4 << 10;
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// What was done.
#[derive(Debug)]
pub struct Pruned {
    /// Bytes of the kept model's ranges.
    pub bytes: u64,
    /// Those of them that came over the network now.
    pub fetched_bytes: u64,
    /// Bytes of the whole model's weights.
    pub model_bytes: u64,
    /// Kept experts of each MoE layer.
    pub kept: Vec<usize>,
}

/// Fetches the kept experts and all that every token needs, and writes a folder of just these to `out`.
pub fn pull_kept(hub: &Hub, common: &Common, repo: &Repo, plan: &Path, out: &Path, shard_size: u64) -> Result<Pruned> {
    if hub.settings.offline {
        bail!(
            "--plan needs the network; help: with the whole model in the cache, `quorate prune --list {}`",
            plan.display()
        );
    }
    if fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(FormatError::OutputExists { path: out.to_owned() }.into());
    }
    let plan = Plan::read(plan)?;
    let listing = hub.client.list(repo)?;
    let folder = part_folder(out)?;
    let shards = sidecars_and_shards(hub, common, repo, &listing, &folder)?;
    let mut ranges = Ranges::open(common, &hub.client, repo, &listing.commit, &folder)?;
    for shard in &shards {
        ranges.header(shard)?;
    }
    let checkpoint = Checkpoint::open(&folder)?;
    ranges.fetch(&checkpoint, &outside_experts(&checkpoint))?;
    // Only now the bytes that its fingerprint is made of are there.
    let checkpoint = Checkpoint::open(&folder)?;
    let map = ExpertMap::of(checkpoint.spec());
    let all = |(kept, &n): (Option<Vec<usize>>, &usize)| kept.unwrap_or_else(|| (0..n).collect());
    let kept = plan.kept(checkpoint.spec(), checkpoint.fingerprint())?;
    let kept: Vec<Vec<usize>> = kept.into_iter().zip(&map.experts).map(all).collect();
    let roles = map.layers.iter().zip(&kept).flat_map(|(&l, ids)| ids.iter().flat_map(move |&e| Role::of_expert(l, e)));
    ranges.fetch(&checkpoint, &merged(roles.flat_map(|role| ranges_of(&checkpoint, role)).collect(), GAP_BYTES))?;
    ranges.bar.finish();
    let mut bar = common.progress("writing", 0, "bytes");
    write_pruned_hf(&checkpoint, &kept, out, shard_size, &mut |done, total| {
        bar.set_total(total);
        bar.set(done);
        !interrupted()
    })
    .with_context(|| format!("cannot write {}", out.display()))?;
    bar.finish();
    let (bytes, fetched_bytes, model_bytes) = (ranges.done, ranges.fetched, checkpoint.total_bytes());
    drop((checkpoint, ranges));
    fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    Ok(Pruned { bytes, fetched_bytes, model_bytes, kept: kept.iter().map(Vec::len).collect() })
}

/// Where the sparse files are meanwhile; it stays if the work is interrupted.
fn part_folder(out: &Path) -> Result<PathBuf> {
    let Some(name) = out.file_name().and_then(|n| n.to_str()) else {
        bail!("{} is no name for a folder; help: -o DIR", out.display());
    };
    let folder = out.with_file_name(format!(".{name}.part"));
    fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    Ok(folder)
}

/// Copies the small files there; returns the names of the shards.
fn sidecars_and_shards(
    hub: &Hub,
    common: &Common,
    repo: &Repo,
    listing: &Listing,
    folder: &Path,
) -> Result<Vec<String>> {
    let mut names = select::sidecars(listing);
    let weights = select::weights(listing, None)?;
    if let select::Weights::Index(index) = &weights {
        names.push(index.clone());
    }
    let mut downloads = cache::Downloads::new(common, &hub.settings, &hub.client, repo, listing);
    downloads.fetch(&names)?;
    for name in &names {
        fs::copy(downloads.path_of(name)?, folder.join(name)).with_context(|| format!("cannot copy {name}"))?;
    }
    match weights {
        select::Weights::Index(index) => {
            let shards = quorate_formats::checkpoint::shard_names(&folder.join(index))?;
            select::listed(listing, &shards)
        }
        select::Weights::Files(files) if files.iter().all(|f| f.ends_with(".safetensors")) => Ok(files),
        select::Weights::Files(_) => {
            bail!(
                "{repo} has its weights in GGUF, of which whole files are fetched; help: leave --plan out, then `quorate prune`"
            )
        }
    }
}

/// A range of a file: its index, first byte, and the byte behind the last.
type Range = (usize, u64, u64);

/// The bytes that a weight is made of.
fn ranges_of(checkpoint: &Checkpoint, role: Role) -> Vec<Range> {
    let range = |t: &TensorLoc| (t.file, t.offset, t.offset + t.len);
    match (checkpoint.recipe(role), checkpoint.tensor(role)) {
        (Some(recipe), _) => recipe.stored().into_iter().map(range).collect(),
        (None, Ok(loc)) => vec![range(loc)],
        (None, Err(_)) => Vec::new(),
    }
}

/// All tensors but what belongs to routed experts.
fn outside_experts(checkpoint: &Checkpoint) -> Vec<Range> {
    let experts = checkpoint.roles().filter(|role| role.is_expert()).flat_map(|role| ranges_of(checkpoint, role));
    let experts = merged(experts.collect(), 0);
    let all = merged(checkpoint.tensors().iter().map(|t| (t.file, t.offset, t.offset + t.len)).collect(), 0);
    let mut left = Vec::new();
    for (file, mut start, end) in all {
        for &(_, from, to) in experts.iter().filter(|&&(f, from, _)| f == file && from < end) {
            if to <= start {
                continue;
            }
            if from > start {
                left.push((file, start, from));
            }
            start = to.min(end);
        }
        if start < end {
            left.push((file, start, end));
        }
    }
    merged(left, GAP_BYTES)
}

/// Ranges in order, those joined between which no more than `gap` bytes lie.
fn merged(mut ranges: Vec<Range>, gap: u64) -> Vec<Range> {
    ranges.sort_unstable();
    let mut joined: Vec<Range> = Vec::new();
    for (file, start, end) in ranges {
        match joined.last_mut() {
            Some(last) if last.0 == file && start <= last.2.saturating_add(gap) => last.2 = last.2.max(end),
            _ => joined.push((file, start, end)),
        }
    }
    joined
}

/// Sparse copies of the shards, and what of them is there.
struct Ranges<'a> {
    client: &'a Client,
    repo: &'a Repo,
    commit: &'a str,
    folder: &'a Path,
    journal: File,
    known: HashSet<String>,
    bar: Progress,
    total: u64,
    done: u64,
    fetched: u64,
}

impl<'a> Ranges<'a> {
    /// Goes on from what an interrupted run left, if it was of the same commit.
    fn open(
        common: &Common,
        client: &'a Client,
        repo: &'a Repo,
        commit: &'a str,
        folder: &'a Path,
    ) -> Result<Ranges<'a>> {
        let path = folder.join("fetched");
        let told = || format!("cannot write {}", path.display());
        let mut journal =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).with_context(told)?;
        let mut text = String::new();
        journal.read_to_string(&mut text).with_context(told)?;
        // A line that was not finished does not count.
        let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        let same = whole.lines().next() == Some(commit);
        let known = if same { whole.lines().skip(1).map(str::to_owned).collect() } else { HashSet::new() };
        journal.set_len(if same { whole.len() as u64 } else { 0 }).with_context(told)?;
        journal.seek(SeekFrom::End(0)).with_context(told)?;
        if !same {
            writeln!(journal, "{commit}").with_context(told)?;
        }
        let bar = common.progress(&repo.id, 0, "bytes");
        Ok(Ranges { client, repo, commit, folder, journal, known, bar, total: 0, done: 0, fetched: 0 })
    }

    /// A shard's header, in a file of the shard's size.
    fn header(&mut self, shard: &str) -> Result<()> {
        let size = self.client.info(self.repo, self.commit, shard)?.size;
        let path = self.folder.join(shard);
        let told = || format!("cannot write {}", path.display());
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).with_context(told)?;
        file.set_len(size).with_context(told)?;
        self.range(shard, 0, size.min(8))?;
        let mut length = [0; 8];
        File::open(&path).and_then(|mut file| file.read_exact(&mut length)).with_context(told)?;
        let length = u64::from_le_bytes(length);
        if length > HEADER_BYTES_MAX || length.saturating_add(8) > size {
            bail!(
                "{shard} of {} begins with a header of {length} bytes, which cannot be; help: is it safetensors?",
                self.repo
            );
        }
        self.range(shard, 8, 8 + length)
    }

    fn fetch(&mut self, checkpoint: &Checkpoint, ranges: &[Range]) -> Result<()> {
        self.total += ranges.iter().map(|(_, start, end)| end - start).sum::<u64>();
        self.bar.set_total(self.total);
        for &(file, start, end) in ranges {
            let name = checkpoint.files()[file].path().file_name().and_then(|n| n.to_str());
            let name = name.context("a shard's name is text, as the index has it")?.to_owned();
            let mut from = start;
            while from < end {
                let to = end.min(from + CHUNK_BYTES);
                self.range(&name, from, to)?;
                self.done += to - from;
                self.bar.set(self.done);
                from = to;
            }
        }
        Ok(())
    }

    /// Bytes `start..end` of a shard, unless they are there.
    fn range(&mut self, shard: &str, start: u64, end: u64) -> Result<()> {
        let line = format!("{start} {end} {shard}");
        if self.known.contains(&line) {
            return Ok(());
        }
        let told = || format!("cannot fetch bytes {start} to {end} of {shard}");
        let bytes = cache::with_patience(|| {
            let (first, reader) = self.client.read(self.repo, self.commit, shard, start, end)?;
            if first != start {
                bail!("the server sends whole files only; help: leave --plan out, then `quorate prune`");
            }
            let mut bytes = Vec::new();
            reader.take(end - start).read_to_end(&mut bytes).context("the connection broke off")?;
            if bytes.len() as u64 != end - start {
                return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
            }
            Ok(bytes)
        });
        let bytes = bytes.with_context(told)?;
        let path = self.folder.join(shard);
        let mut file = OpenOptions::new().write(true).open(&path).with_context(told)?;
        file.seek(SeekFrom::Start(start)).and_then(|_| file.write_all(&bytes)).with_context(told)?;
        writeln!(self.journal, "{line}").with_context(told)?;
        self.known.insert(line);
        self.fetched += end - start;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::merged;

    #[test]
    fn ranges_are_joined_over_small_gaps() {
        let ranges = vec![(1, 0, 5), (0, 20, 30), (0, 0, 10), (0, 8, 12), (0, 16, 18)];
        assert_eq!(merged(ranges.clone(), 0), [(0, 0, 12), (0, 16, 18), (0, 20, 30), (1, 0, 5)]);
        assert_eq!(merged(ranges, 4), [(0, 0, 30), (1, 0, 5)]);
    }
}
