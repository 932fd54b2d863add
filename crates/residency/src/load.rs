//! Reading tensors into memory, on several threads.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

use quorate_formats::spec::NormKind;
use quorate_formats::{Checkpoint, Role, TensorLoc, UNCACHED_ALIGNMENT, uncached_len};
use quorate_kernels::{DType, dequantize};

use crate::buffer::{ALIGNMENT, Buffer, Slabs};
use crate::error::{ResidencyError, Result};
use crate::finite::first_not_finite;
use crate::matrix::{Bytes, Expert, Matrix};
use crate::unpack::unpack;
use crate::weights::Progress;

/// One weight outside the routed experts.
pub(crate) enum Loaded {
    Vector(Vec<f32>),
    Matrix(Matrix),
}

/// Reads a weight outside the routed experts: vectors and routers as f32, other matrices as stored.
pub(crate) fn read_weight(checkpoint: &Checkpoint, role: Role, slabs: &Slabs) -> Result<Loaded> {
    let loc = checkpoint.tensor(role)?;
    let (dtype, bytes) = read_stored_into(checkpoint, role, slabs.take(usize_of(loc.len))?)?;
    let values = || {
        let mut values = vec![0.0; usize_of(loc.elements())];
        dequantize(dtype, &bytes, &mut values);
        values
    };
    let around_zero = checkpoint.spec().norm == NormKind::RmsPlusOne && role.is_plain_norm();
    Ok(match loc.shape[..] {
        _ if around_zero => Loaded::Vector(values().into_iter().map(|w| 1.0 + w).collect()),
        _ if role.is_vector() => Loaded::Vector(values()),
        [rows, cols] if matches!(role, Role::Router(_)) && dtype != DType::F32 => {
            Loaded::Matrix(Matrix::from_f32(rows, cols, &values())?)
        }
        [rows, cols] => Loaded::Matrix(Matrix::new(dtype, rows, cols, bytes)),
        _ => unreachable!("a checkpoint's matrices are checked to be two-dimensional at opening"),
    })
}

/// A weight as transformers has it, row after row: what is fused or packed is taken out, in the type that memory would have.
///
/// # Errors
/// The model has no such weight, a file cannot be read, or a value is not a number.
pub fn read_stored(checkpoint: &Checkpoint, role: Role) -> Result<(DType, Bytes)> {
    let len = usize_of(checkpoint.tensor(role)?.len);
    read_stored_into(checkpoint, role, Buffer::zeroed(len)?)
}

/// [`read_stored`] into a buffer of the weight's length.
fn read_stored_into(checkpoint: &Checkpoint, role: Role, mut buffer: Buffer) -> Result<(DType, Bytes)> {
    let loc = checkpoint.tensor(role)?;
    match checkpoint.recipe(role) {
        Some(recipe) => unpack(checkpoint, recipe, buffer.as_mut_slice())?,
        None => checkpoint.read_into(loc, buffer.as_mut_slice())?,
    }
    let bytes = Bytes::whole(buffer);
    Ok((checked(checkpoint, loc, &bytes)?, bytes))
}

/// Memory of experts that were dropped, for those that come in their place: pages that are there already need not be
/// made and cleared again.
pub(crate) struct Spare {
    buffers: Mutex<Vec<Buffer>>,
    new: Slabs,
}

impl Spare {
    /// The memory of experts that were dropped, and room for others if that is not enough.
    pub(crate) fn of(dropped: Vec<Expert>, new: Slabs) -> Self {
        let buffers = dropped.into_iter().filter_map(Expert::into_buffer).collect();
        Self { buffers: Mutex::new(buffers), new }
    }

    /// A buffer of that length, whatever is in it. If no spare one has it, spare ones make room for a new one first, so
    /// that memory does not grow while any are left.
    fn take(&self, len: usize) -> Result<Buffer> {
        let mut spare = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = spare.iter().rposition(|buffer| buffer.len() == len) {
            return Ok(spare.swap_remove(i));
        }
        let mut freed = 0;
        while freed < len {
            let Some(buffer) = spare.pop() else { break };
            freed += buffer.len();
        }
        self.new.take(len)
    }
}

/// Where an expert's three matrices lie in the files and in a buffer.
pub(crate) struct Layout {
    /// Gate, up and down in the buffer.
    ranges: [Range<usize>; 3],
    /// Ranges that adjoin in the file and in the buffer are read at once.
    pub reads: Vec<Read>,
    /// Length of the buffer.
    pub len: usize,
}

/// Bytes of a file that are read at once.
#[derive(Clone, Debug)]
pub(crate) struct Read {
    /// Which of the checkpoint's files.
    pub file: usize,
    /// Where they lie there.
    pub offset: u64,
    /// Where they go in the buffer.
    pub range: Range<usize>,
}

impl Read {
    /// The whole pages of the buffer that an uncached read fills.
    pub fn pages(&self) -> Range<usize> {
        let start = self.range.start / UNCACHED_ALIGNMENT * UNCACHED_ALIGNMENT;
        start..start + uncached_len(self.offset, self.range.len())
    }
}

/// How bytes of the file come into memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Through the system's cache, each matrix at a cache line.
    Cached,
    /// Past it, in the sectors that hold them: each read has whole pages of the buffer.
    Uncached,
}

impl Layout {
    /// The layout of an expert that is read in one way.
    pub(crate) fn of(checkpoint: &Checkpoint, layer: usize, expert: usize, way: Way) -> Result<Self> {
        let roles = Role::of_expert(layer, expert);
        let locs = [checkpoint.tensor(roles[0])?, checkpoint.tensor(roles[1])?, checkpoint.tensor(roles[2])?];
        let mut order = [0, 1, 2];
        order.sort_by_key(|&i| (locs[i].file, locs[i].offset));
        let mut ranges: [Range<usize>; 3] = [0..0, 0..0, 0..0];
        let mut reads: Vec<Read> = Vec::with_capacity(3);
        let mut end = 0usize;
        for i in order {
            let loc = locs[i];
            let adjoins = |read: &Read| read.file == loc.file && read.offset + read.range.len() as u64 == loc.offset;
            let last = reads.last_mut().filter(|last| adjoins(last));
            let start = match way {
                Way::Cached => end.next_multiple_of(ALIGNMENT),
                Way::Uncached if last.is_some() => end,
                Way::Uncached => {
                    end.next_multiple_of(UNCACHED_ALIGNMENT) + usize_of(loc.offset % UNCACHED_ALIGNMENT as u64)
                }
            };
            let end_here = start + usize_of(loc.len);
            match last.filter(|last| last.range.end == start) {
                Some(last) => last.range.end = end_here,
                None => reads.push(Read { file: loc.file, offset: loc.offset, range: start..end_here }),
            }
            end = start + usize_of(loc.len);
            ranges[i] = start..end;
        }
        let len = if way == Way::Uncached { end.next_multiple_of(UNCACHED_ALIGNMENT) } else { end };
        Ok(Self { ranges, reads, len })
    }
}

/// Bytes of the buffer that [`read_expert`] takes.
pub(crate) fn expert_len(checkpoint: &Checkpoint, layer: usize, expert: usize) -> Result<usize> {
    Ok(Layout::of(checkpoint, layer, expert, Way::Cached)?.len)
}

/// Reads one routed expert, and nothing else. Its three matrices share one buffer, in the order of the file.
pub(crate) fn read_expert(checkpoint: &Checkpoint, layer: usize, expert: usize, spare: &Spare) -> Result<Expert> {
    let layout = Layout::of(checkpoint, layer, expert, Way::Cached)?;
    let buffer = spare.take(layout.len)?;
    fill_expert(checkpoint, layer, expert, layout, buffer, Way::Cached)
}

/// Reads a routed expert into a buffer of the layout's length; for uncached reads, one of whole pages.
pub(crate) fn fill_expert(
    checkpoint: &Checkpoint,
    layer: usize,
    expert: usize,
    layout: Layout,
    mut buffer: Buffer,
    way: Way,
) -> Result<Expert> {
    let roles = Role::of_expert(layer, expert);
    if !lies_plain(checkpoint, layer, expert) {
        for (&role, range) in roles.iter().zip(&layout.ranges) {
            let part = &mut buffer.as_mut_slice()[range.clone()];
            let Some(recipe) = checkpoint.recipe(role) else {
                checkpoint.read_into(checkpoint.tensor(role)?, part)?;
                continue;
            };
            unpack(checkpoint, recipe, part)?;
            if way == Way::Uncached {
                for loc in recipe.stored() {
                    checkpoint.files()[loc.file].check_unchanged()?;
                    checkpoint.files()[loc.file].forget_range(loc.offset, loc.len);
                }
            }
        }
    } else {
        for read in &layout.reads {
            let (file, buffer) = (&checkpoint.files()[read.file], buffer.as_mut_slice());
            match way {
                Way::Cached => file.read_at(read.offset, &mut buffer[read.range.clone()])?,
                Way::Uncached => {
                    file.read_uncached(read.offset, read.range.len(), &mut buffer[read.pages()])?;
                }
            }
        }
    }
    assemble(checkpoint, layer, expert, layout, buffer)
}

/// Whether an expert's matrices lie in the file as they are wanted.
pub(crate) fn lies_plain(checkpoint: &Checkpoint, layer: usize, expert: usize) -> bool {
    Role::of_expert(layer, expert).iter().all(|&role| checkpoint.recipe(role).is_none())
}

/// The expert whose bytes are in a buffer, after a look at them.
pub(crate) fn assemble(
    checkpoint: &Checkpoint,
    layer: usize,
    expert: usize,
    layout: Layout,
    buffer: Buffer,
) -> Result<Expert> {
    let roles = Role::of_expert(layer, expert);
    let locs = [checkpoint.tensor(roles[0])?, checkpoint.tensor(roles[1])?, checkpoint.tensor(roles[2])?];
    let mut parts = Bytes::parts(buffer, layout.ranges).into_iter().zip(locs);
    let mut next = || {
        let (bytes, loc) = parts.next().expect("three parts are taken");
        let dtype = checked(checkpoint, loc, &bytes)?;
        Ok::<_, ResidencyError>(Matrix::new(dtype, loc.shape[0], loc.shape[1], bytes))
    };
    Ok(Expert { gate: next()?, up: next()?, down: next()? })
}

/// The kernels' type of a tensor, all of whose values are numbers.
fn checked(checkpoint: &Checkpoint, loc: &TensorLoc, bytes: &[u8]) -> Result<DType> {
    let dtype = loc.dtype.computable().expect("a checkpoint's types are checked at opening");
    match first_not_finite(dtype, bytes) {
        None => Ok(dtype),
        Some(element) => Err(ResidencyError::NotFinite {
            path: checkpoint.files()[loc.file].path().to_owned(),
            tensor: loc.name.clone(),
            element,
        }),
    }
}

fn usize_of(n: u64) -> usize {
    usize::try_from(n).expect("weights that are loaded fit the address space")
}

/// Runs `read` for each job on a few threads. Stops at the first error, or when `progress` (called here, with the bytes
/// of `size`) says so; then nothing is returned.
pub(crate) fn in_parallel<J: Copy + Send + Sync, T: Send>(
    jobs: &[J],
    size: impl Fn(J) -> u64,
    read: impl Fn(J) -> Result<T> + Sync,
    progress: &mut Progress<'_>,
) -> Result<Vec<(J, T)>> {
    let total = jobs.iter().map(|&j| size(j)).sum();
    let threads = thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8)).min(jobs.len());
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (sender, receiver) = mpsc::channel();
    if !progress(0, total) {
        return Err(ResidencyError::Cancelled);
    }
    thread::scope(|scope| {
        for _ in 0..threads {
            let sender = sender.clone();
            let (next, stop, read) = (&next, &stop, &read);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(&job) = jobs.get(i) else { break };
                    // The receiver is gone after an error; then there is nothing left to do.
                    if sender.send((job, read(job))).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        let mut loaded = Vec::with_capacity(jobs.len());
        let mut done = 0;
        for (job, result) in receiver {
            let failed = match result {
                Ok(value) => {
                    loaded.push((job, value));
                    done += size(job);
                    (!progress(done, total)).then_some(ResidencyError::Cancelled)
                }
                Err(error) => Some(error),
            };
            if let Some(error) = failed {
                stop.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(loaded)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spare_memory_is_used_again_or_makes_room() {
        let spare = |lens: &[usize]| {
            let buffers = Mutex::new(lens.iter().map(|&n| Buffer::zeroed(n).unwrap()).collect());
            Spare { buffers, new: Slabs::of_all([]) }
        };
        let left = |spare: &Spare| spare.buffers.lock().unwrap().iter().map(Buffer::len).collect::<Vec<_>>();

        let exact = spare(&[10, 20, 30]);
        assert_eq!(exact.take(20).unwrap().len(), 20);
        assert_eq!(left(&exact), [10, 30]);
        assert_eq!(exact.take(25).unwrap().len(), 25);
        assert_eq!(left(&exact), [10]);
        assert_eq!(exact.take(25).unwrap().len(), 25);
        assert!(left(&exact).is_empty());
        assert_eq!(exact.take(0).unwrap().len(), 0);
    }

    #[test]
    fn an_error_ends_the_work_of_all_threads() {
        let jobs: Vec<usize> = (0..1000).collect();
        let read = |i: usize| if i == 3 { Err(ResidencyError::Cancelled) } else { Ok(i) };
        assert!(in_parallel(&jobs, |_| 1, read, &mut |_, _| true).is_err());
        let mut loaded = in_parallel(&jobs, |_| 1, |i| Ok(2 * i), &mut |_, _| true).unwrap();
        loaded.sort_unstable();
        assert!(loaded.iter().enumerate().all(|(i, &l)| l == (i, 2 * i)));
        assert!(in_parallel(&jobs, |_| 1, Ok, &mut |done, _| done < 10).is_err());
        assert!(in_parallel(&[0usize; 0], |_| 1, Ok, &mut |_, _| true).unwrap().is_empty());
    }
}
