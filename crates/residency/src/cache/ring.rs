//! Reads of experts through io_uring: one thread keeps several of them under way.

#![allow(unsafe_code, reason = "the system writes into buffers while nobody else has them")]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::PoisonError;
use std::time::Instant;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode};
use quorate_formats::Checkpoint;

use super::Shared;
use super::reader::Job;
use crate::buffer::Buffer;
use crate::error::Result;
use crate::load::{Layout, Way, assemble, lies_plain};
use crate::matrix::Expert;

/// Experts whose reads are under way at most: more of them would not be faster, and what is urgent would have to wait for
/// what is only expected.
const DEPTH: usize = 3;

/// Reads of an expert at most.
const READS: usize = 3;

/// Bytes of a read at most; what is longer is read piece by piece.
const READ_BYTES: usize = 1 << 30;

/// How long a completion is waited for before there may be something new to submit.
const PAUSE: Timespec = Timespec::new().nsec(200_000);

/// The system's queues, and what is under way.
pub(super) struct Ring {
    ring: IoUring,
    flights: [Option<Flight>; DEPTH],
    /// Reads that the system has not completed.
    pending: usize,
    /// Whether the system refused to go on: what is to be read is then read when it lands, one by one.
    refused: bool,
}

/// An expert on its way into memory.
struct Flight {
    layer: usize,
    expert: usize,
    layout: Layout,
    /// Only the system touches it while reads are open. An error if there was no other memory in its place.
    buffer: Result<Buffer>,
    /// Bytes that came, by read.
    came: [usize; READS],
    /// Reads that are open.
    open: usize,
    begin: Instant,
}

impl Ring {
    /// A ring for the experts of a checkpoint; `None` where the system has none, or experts have to be unpacked, or a file
    /// system does not read past its cache.
    pub fn open(checkpoint: &Checkpoint) -> Option<Self> {
        let spec = checkpoint.spec();
        let layers = spec.moe_layers();
        let mut experts =
            layers.iter().flat_map(|&l| (0..spec.moe(l).map_or(0, |moe| moe.n_experts)).map(move |e| (l, e)));
        let plain = experts.all(|(l, e)| lies_plain(checkpoint, l, e));
        let direct = checkpoint.files().iter().all(|file| file.uncached_handle().is_some());
        let ring = IoUring::new((DEPTH * READS) as u32).ok().filter(|_| plain && direct)?;
        // Without it a wait has no limit (before Linux 5.11).
        if !ring.params().is_feature_ext_arg() {
            return None;
        }
        Some(Self { ring, flights: [const { None }; DEPTH], pending: 0, refused: false })
    }

    /// The life of the thread.
    pub fn serve(mut self, shared: &Shared) {
        while self.fill(shared, true) {
            self.wait(shared);
            self.land(shared);
        }
    }

    /// Begins to read experts as long as there is a place, and waits for one to read if nothing is under way and it may;
    /// `false` if the thread is to end.
    fn fill(&mut self, shared: &Shared, may_wait: bool) -> bool {
        let mut state = shared.lock();
        loop {
            if state.stop {
                return false;
            }
            let free = self.flights.iter().filter(|flight| flight.is_none()).count();
            if let Some(job) = if free > 0 { state.next_job() } else { None } {
                state.reading(true);
                drop(state);
                self.begin(shared, job);
                state = shared.lock();
            } else if may_wait && free == DEPTH {
                state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            } else {
                return true;
            }
        }
    }

    /// Submits the reads of an expert.
    fn begin(&mut self, shared: &Shared, job: Job) {
        let Job { layer, expert, buffer } = job;
        let begin = Instant::now();
        let ready = || -> Result<(Layout, Buffer)> {
            let layout = Layout::of(&shared.checkpoint, layer, expert, Way::Uncached)?;
            let buffer = buffer.map_or_else(|| Buffer::pages(layout.len), Ok)?;
            Ok((layout, buffer))
        };
        match ready() {
            Ok((layout, buffer)) => {
                let place = self.flights.iter().position(Option::is_none).expect("jobs are taken for free places");
                let buffer = Ok(buffer);
                let flight = Flight { layer, expert, layout, buffer, came: [0; READS], open: 0, begin };
                self.flights[place] = Some(flight);
                for read in 0..self.flights[place].as_ref().map_or(0, |f| f.layout.reads.len()) {
                    self.submit(shared, place, read);
                }
            }
            Err(error) => arrived(shared, layer, expert, Err(error), begin),
        }
    }

    /// Submits what has not come yet of a read, unless the system refuses all.
    fn submit(&mut self, shared: &Shared, place: usize, read: usize) {
        let Some(flight) = self.flights[place].as_mut().filter(|_| !self.refused) else { return };
        let Ok(buffer) = &mut flight.buffer else { return };
        let came = flight.came[read];
        let what = &flight.layout.reads[read];
        let pages = what.pages();
        let Some(file) = shared.checkpoint.files()[what.file].uncached_handle() else { return };
        let offset = what.offset - (what.range.start - pages.start) as u64 + came as u64;
        let into = &mut buffer.as_mut_slice()[pages][came..];
        let entry = opcode::Read::new(Fd(file.as_raw_fd()), into.as_mut_ptr(), into.len().min(READ_BYTES) as u32)
            .offset(offset)
            .build()
            .user_data((place * READS + read) as u64);
        // SAFETY: the file lives as long as the checkpoint, which `Shared` holds. The bytes are those of a buffer that does not
        // move and that nobody touches or drops before the read is completed: `land` and `drop` see to that.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_ok() {
            flight.open += 1;
            self.pending += 1;
        }
        // There is a place for every read. If there were none, the read would be made up for when the expert lands.
    }

    /// Waits for a completion, and submits again what was cut short.
    fn wait(&mut self, shared: &Shared) {
        if self.refused {
            return;
        }
        let full = self.flights.iter().all(Option::is_some);
        let arguments = if full { SubmitArgs::new() } else { SubmitArgs::new().timespec(&PAUSE) };
        // Interrupted, out of time or short of something: what came is looked at all the same, and the rest is waited for the next
        // time.
        let waited = self.ring.submitter().submit_with_args(usize::from(self.pending > 0), &arguments);
        if waited.is_err_and(|error| !passes(&error)) {
            return self.give_up();
        }
        let done: Vec<(u64, i32)> = self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (which, result) in done {
            self.pending -= 1;
            let (place, read) = (which as usize / READS, which as usize % READS);
            let Some(flight) = &mut self.flights[place] else { continue };
            flight.open -= 1;
            let again = match result {
                // Nothing more comes, or an error: the expert lands without it, which tells why.
                0 => false,
                n if n > 0 => {
                    flight.came[read] += n as usize;
                    let what = &flight.layout.reads[read];
                    flight.came[read] < what.range.end - what.pages().start
                }
                n => [io::ErrorKind::Interrupted, io::ErrorKind::WouldBlock]
                    .contains(&io::Error::from_raw_os_error(-n).kind()),
            };
            if again {
                self.submit(shared, place, read);
            }
        }
    }

    /// Asks the system for nothing any more. It may still write where reads are open, and not say so: those buffers are never used
    /// again, and what was under way is read into others when it lands.
    fn give_up(&mut self) {
        (self.refused, self.pending) = (true, 0);
        for flight in self.flights.iter_mut().flatten().filter(|flight| flight.open > 0) {
            std::mem::forget(std::mem::replace(&mut flight.buffer, Buffer::pages(flight.layout.len)));
            (flight.open, flight.came) = (0, [0; READS]);
        }
    }

    /// Hands over the experts that are complete; others are submitted first, so that the disk goes on.
    fn land(&mut self, shared: &Shared) {
        let landed: Vec<Flight> =
            self.flights.iter_mut().filter_map(|flight| flight.take_if(|f| f.open == 0)).collect();
        if landed.is_empty() {
            return;
        }
        self.fill(shared, false);
        if !self.refused {
            // What could not be submitted now is submitted by the next wait.
            let _ = self.ring.submit();
        }
        for flight in landed {
            let (layer, expert, begin) = (flight.layer, flight.expert, flight.begin);
            arrived(shared, layer, expert, settled(shared, flight), begin);
        }
    }
}

/// Whether the system may well do what it did not do this time.
fn passes(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, ResourceBusy, TimedOut, WouldBlock};
    // Out of time is an error of its own here.
    let out_of_time = rustix::io::Errno::TIME.raw_os_error();
    [Interrupted, ResourceBusy, TimedOut, WouldBlock].contains(&error.kind())
        || error.raw_os_error() == Some(out_of_time)
}

/// The expert of a flight all of whose reads are done.
fn settled(shared: &Shared, flight: Flight) -> Result<Expert> {
    let Flight { layer, expert, layout, buffer, came, .. } = flight;
    let mut buffer = buffer?;
    for (read, came) in layout.reads.iter().zip(came) {
        let file = &shared.checkpoint.files()[read.file];
        file.settle_uncached(read.offset, read.range.len(), &mut buffer.as_mut_slice()[read.pages()], came)?;
    }
    assemble(&shared.checkpoint, layer, expert, layout, buffer)
}

fn arrived(shared: &Shared, layer: usize, expert: usize, result: Result<Expert>, begin: Instant) {
    let mut state = shared.lock();
    state.reading(false);
    state.arrived(layer, expert, result, begin.elapsed().as_secs_f64());
    shared.ready.notify_all();
    // What came may be in the way of nobody, and make room for what waits.
    shared.work.notify_all();
}

impl Drop for Ring {
    /// Waits for the system to have done with all buffers.
    fn drop(&mut self) {
        while self.pending > 0 {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => break,
                _ => self.pending -= self.ring.completion().count(),
            }
        }
        if self.pending > 0 {
            // The system still has them, and does not say when it is done: their memory stays.
            std::mem::forget(std::mem::take(&mut self.flights));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Condvar, Mutex};

    use super::super::state::{Content, State};
    use super::super::{CachePolicy, most_stream_bytes};
    use super::*;
    use crate::load::{Spare, read_expert};

    /// The system stops to answer while experts are on their way, and later ones are not even asked for: all come.
    #[test]
    fn experts_come_when_the_system_refuses_to_go_on() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/olmoe");
        let checkpoint = Arc::new(Checkpoint::open(path.as_ref()).expect("the fixture"));
        // Where there is no io_uring, or nothing is read past the system's cache, there is no ring either.
        let Some(mut ring) = Ring::open(&checkpoint) else { return };
        let room = most_stream_bytes(&checkpoint).expect("sizes");
        let state = State::new(&checkpoint, room, CachePolicy::Lru).expect("room for all");
        let shared = Shared { checkpoint, state: Mutex::new(state), work: Condvar::new(), ready: Condvar::new() };
        shared.lock().visit(0, &[(0, 1), (1, 1), (2, 1), (3, 1)], 4);
        assert!(ring.fill(&shared, false), "nobody stops");
        assert!(ring.pending > 0 && ring.flights.iter().all(Option::is_some), "experts are on their way");
        ring.give_up();
        // The first ones land, and the last is taken, which lands then.
        for _ in 0..2 {
            ring.wait(&shared);
            ring.land(&shared);
        }
        for expert in 0..4 {
            let want =
                read_expert(&shared.checkpoint, 0, expert, &Spare::of(Vec::new(), crate::buffer::Slabs::of_all([])));
            let want = want.expect("the fixture's expert");
            let state = shared.lock();
            let Content::Here(got) = &state.slots[0][expert].content else { panic!("expert {expert} did not come") };
            for (got, want) in [(&got.gate, &want.gate), (&got.up, &want.up), (&got.down, &want.down)] {
                assert_eq!(got.data()[..], want.data()[..], "expert {expert}");
            }
        }
    }

    #[test]
    fn only_what_passes_is_waited_for() {
        for (code, want) in [(4, true), (11, true), (16, true), (62, true), (1, false), (9, false), (22, false)] {
            assert_eq!(passes(&io::Error::from_raw_os_error(code)), want, "error {code}");
        }
    }
}
