//! Memory of weights.
//!
//! Large buffers are slots of shared mappings: pages of 2 MiB can then reach across their borders, so that nearly all memory
//! of weights is in huge pages whatever the size of an expert. A slot that is dropped gives its pages back at once, and from
//! the heap it would often stay with the process: so a budget is kept.

#![allow(unsafe_code, reason = "slots of a shared mapping are written by different threads")]

use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{MmapMut, MmapOptions, MmapRaw};

use crate::error::{ResidencyError, Result};

/// Alignment of a buffer: a cache line, and the widest vector register.
pub(crate) const ALIGNMENT: usize = 64;

/// Buffers from this size on get pages of their own.
const MAPPED_BYTES_MIN: usize = 1 << 20;

/// Bytes of a mapping at most, if no single buffer is larger.
const SLAB_BYTES: usize = 256 << 20;

/// Memory that begins at a multiple of [`ALIGNMENT`].
pub(crate) enum Buffer {
    /// `bytes` is longer than `len` by up to a line; never grown, so that its address stays.
    Heap { bytes: Vec<u8>, start: usize, len: usize },
    /// Whole pages.
    Slot(Slot),
}

impl Buffer {
    /// Zeros.
    pub(crate) fn zeroed(len: usize) -> Result<Self> {
        Slabs::of(len).take(len)
    }

    /// Whole pages of zeros, whatever the length.
    pub(crate) fn pages(len: usize) -> Result<Self> {
        Slabs::of(len).take_pages(len)
    }

    fn heap(len: usize) -> Self {
        let bytes = vec![0; len + ALIGNMENT - 1];
        let start = bytes.as_ptr().addr().next_multiple_of(ALIGNMENT) - bytes.as_ptr().addr();
        Self::Heap { bytes, start, len }
    }

    pub(crate) fn len(&self) -> usize {
        self.as_slice().len()
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        match self {
            Self::Heap { bytes, start, len } => &bytes[*start..*start + *len],
            Self::Slot(slot) => slot.as_slice(),
        }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        match self {
            Self::Heap { bytes, start, len } => &mut bytes[*start..*start + *len],
            Self::Slot(slot) => slot.as_mut_slice(),
        }
    }
}

/// A part of a mapping that nobody else has.
pub(crate) struct Slot {
    slab: Arc<MmapRaw>,
    /// At a page, as is the next slot's.
    start: usize,
    len: usize,
}

impl Slot {
    fn as_slice(&self) -> &[u8] {
        // SAFETY: the mapping lives as long as this, is readable and zero at first, and has `start + len` bytes; only this slot
        // writes them, and it is borrowed.
        unsafe { std::slice::from_raw_parts(self.slab.as_ptr().add(self.start), self.len) }
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above; it is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.slab.as_mut_ptr().add(self.start), self.len) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // The last slot's memory goes with the mapping.
        #[cfg(target_os = "linux")]
        if Arc::strong_count(&self.slab) > 1 {
            let len = slot_len(self.len);
            // SAFETY: these whole pages, which become zeros, are this slot's alone, and nobody has a reference into it, as it is
            // being dropped. If that is refused, the memory stays until the mapping goes.
            let _ = unsafe { self.slab.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, self.start, len) };
        }
    }
}

/// Gives out buffers whose lengths are known in sum, in as few mappings as can be.
pub(crate) struct Slabs(Mutex<Open>);

struct Open {
    /// Bytes that are still to be given out.
    left: usize,
    /// The mapping at work, and how much of it is taken.
    slab: Option<(Arc<MmapRaw>, usize)>,
}

impl Slabs {
    /// Room for one buffer.
    fn of(len: usize) -> Self {
        Self::of_all([len])
    }

    /// Room for buffers of these lengths, in any order.
    pub(crate) fn of_all(lens: impl IntoIterator<Item = usize>) -> Self {
        let left = lens.into_iter().filter(|&len| len >= MAPPED_BYTES_MIN).map(slot_len).fold(0, usize::saturating_add);
        Self(Mutex::new(Open { left, slab: None }))
    }

    /// A buffer of zeros.
    pub(crate) fn take(&self, len: usize) -> Result<Buffer> {
        if len < MAPPED_BYTES_MIN { Ok(Buffer::heap(len)) } else { self.take_pages(len) }
    }

    fn take_pages(&self, len: usize) -> Result<Buffer> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let needed = slot_len(len);
        let (slab, start) = match open.slab.take().filter(|(slab, taken)| slab.len() - taken >= needed) {
            Some(open) => open,
            // As long as what it will hold, to the page: a huge page behind it would count in full.
            None => (Arc::new(map(needed.max(open.left.min(SLAB_BYTES)), len)?), 0),
        };
        open.left = open.left.saturating_sub(needed);
        open.slab = Some((slab.clone(), start + needed));
        Ok(Buffer::Slot(Slot { slab, start, len }))
    }
}

/// Bytes of the whole pages of a slot.
fn slot_len(len: usize) -> usize {
    len.max(1).next_multiple_of(page_size())
}

#[cfg(target_os = "linux")]
fn page_size() -> usize {
    rustix::param::page_size()
}

/// Elsewhere pages are not given back one by one.
#[cfg(not(target_os = "linux"))]
fn page_size() -> usize {
    1 << 16
}

/// Anonymous memory for a buffer of `len` bytes and others.
fn map(bytes: usize, len: usize) -> Result<MmapRaw> {
    let mapped: MmapMut = MmapOptions::new()
        .len(bytes)
        .map_anon()
        .map_err(|source| ResidencyError::NoMemory { bytes: len as u64, source })?;
    advise_huge_pages(&mapped);
    Ok(mapped.into())
}

/// Fewer page faults while reading, and fewer misses while computing.
#[cfg(target_os = "linux")]
fn advise_huge_pages(mapped: &MmapMut) {
    if mapped.len() >= MAPPED_BYTES_MIN {
        // Only advice: without huge pages all works the same.
        let _ = mapped.advise(memmap2::Advice::HugePage);
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_mapped: &MmapMut) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_zero_apart_and_give_their_memory_back() {
        let lens = [MAPPED_BYTES_MIN, 3 << 20, (2 << 20) + 1, 5];
        let slabs = Slabs::of_all(lens);
        let mut buffers: Vec<Buffer> = lens.iter().map(|&len| slabs.take(len).unwrap()).collect();
        for (i, (buffer, len)) in buffers.iter_mut().zip(lens).enumerate() {
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_slice().as_ptr().addr() % ALIGNMENT, 0);
            assert!(buffer.as_slice().iter().all(|&b| b == 0));
            buffer.as_mut_slice().fill(i as u8 + 1);
        }
        for (i, buffer) in buffers.iter().enumerate() {
            assert!(buffer.as_slice().iter().all(|&b| b == i as u8 + 1));
        }
        let Buffer::Slot(slot) = buffers.swap_remove(1) else { panic!("three are slots") };
        let (slab, start) = (slot.slab.clone(), slot.start);
        assert_eq!(slab.len(), lens[..3].iter().map(|&len| slot_len(len)).sum::<usize>());
        drop(slot);
        if cfg!(target_os = "linux") {
            // SAFETY: the mapping is alive, and nobody has this part now.
            let freed = unsafe { std::slice::from_raw_parts(slab.as_ptr().add(start), lens[1]) };
            assert!(freed.iter().all(|&b| b == 0));
        }
        assert!(buffers.iter().all(|b| b.as_slice().iter().all(|&v| v == b.as_slice()[0] && v > 0)));
    }

    #[test]
    fn more_than_was_said_gets_a_mapping_of_its_own() {
        let slabs = Slabs::of_all([MAPPED_BYTES_MIN]);
        for _ in 0..3 {
            assert_eq!(slabs.take(MAPPED_BYTES_MIN).unwrap().len(), MAPPED_BYTES_MIN);
        }
    }
}
