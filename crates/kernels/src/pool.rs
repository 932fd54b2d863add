//! Threads that share one piece of work at a time.
//!
//! Who calls [`Pool::run`] partitions the work: each worker learns its number and takes its share.
//! Kernels cut theirs into more parts than workers, so that nobody waits long for a thread that
//! the system holds up; a result is always computed by one thread in a fixed order, so it cannot
//! depend on timing. Between two pieces of work the threads spin for a moment (the next layer
//! mostly comes within microseconds) and then sleep.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::hint::spin_loop;
use std::ops::{Deref, Range};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::simd::Isa;

/// How long a thread spins for work, or for the others to finish, before it sleeps. Waking it takes longer than what mostly
/// lies between two products, and on a busy machine that takes longer than usual.
const SPIN: Duration = Duration::from_micros(200);

thread_local! {
    /// Whether this thread is now a worker of some pool.
    static WORKING: Cell<bool> = const { Cell::new(false) };
}

/// Alone in its cache lines (processors fetch two at a time): what one thread writes must not take from others what they read
/// meanwhile. Where threads share no cache, every such exchange takes 200 nanoseconds.
#[repr(align(128))]
struct Apart<T>(T);

impl<T> Deref for Apart<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

/// See [`Shared::pending`].
const PARKED: usize = 1 << (usize::BITS - 1);

/// The work of one [`Pool::run`], without its lifetime.
struct Job {
    call: unsafe fn(*const (), usize, usize),
    data: *const (),
    caller: Thread,
}

/// The newest job, and its number.
struct Newest {
    job: UnsafeCell<Option<Job>>,
    number: AtomicUsize,
}

struct Shared {
    workers: usize,
    newest: Apart<Newest>,
    /// Threads that have not finished it, and [`PARKED`] if who waits for them sleeps.
    pending: Apart<AtomicUsize>,
    /// Per thread: whether it sleeps (or is about to).
    asleep: Box<[AtomicBool]>,
    /// Of every worker, for each of [`Pool::run_stages`].
    taken: Box<[Apart<[Taken; STAGES]>]>,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written only while no thread works (`pending` is 0) and before its number is
// raised, and read only after that was seen; the closure behind `data` is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in a job is used only while `run` keeps its target alive.
unsafe impl Send for Shared {}

/// A set of threads. Dropping it ends and joins them.
pub struct Pool {
    isa: Isa,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    turn: Mutex<()>,
}

impl Pool {
    /// A pool of `threads` workers, of which the caller of [`Pool::run`] is one.
    ///
    /// # Panics
    /// If `threads` is 0, or the system refuses to start a thread.
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::best())
    }

    /// A pool whose kernels use `isa`, for tests of every path.
    pub(crate) fn with_isa(threads: usize, isa: Isa) -> Self {
        assert!(Isa::available().any(|i| i == isa), "{isa:?} on this machine");
        assert!(threads >= 1, "a pool needs a thread");
        let shared = Arc::new(Shared {
            workers: threads,
            newest: Apart(Newest { job: UnsafeCell::new(None), number: AtomicUsize::new(0) }),
            pending: Apart(AtomicUsize::new(0)),
            asleep: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            taken: (0..threads).map(|_| Apart([const { Taken(AtomicU64::new(0)) }; STAGES])).collect(),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let start = |worker| {
            let shared = Arc::clone(&shared);
            let name = format!("kernel-{worker}");
            thread::Builder::new().name(name).spawn(move || shared.serve(worker)).expect("the system starts a thread")
        };
        let threads = (1..threads).map(start).collect();
        Self { isa, shared, threads, turn: Mutex::new(()) }
    }

    /// The instructions that this pool's kernels use: the machine has them.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Workers of this pool.
    pub fn threads(&self) -> usize {
        self.shared.workers
    }

    /// Calls `f(worker, workers)` once on each worker and returns when all have finished.
    ///
    /// Callers on several threads take turns. From inside a worker, of this or another pool,
    /// `f(0, 1)` runs in place.
    ///
    /// # Panics
    /// If `f` panicked on a worker: with the first panic's payload, after all have finished.
    pub fn run<F: Fn(usize, usize) + Sync>(&self, f: F) {
        if self.shared.workers == 1 || WORKING.get() {
            return f(0, 1);
        }
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let panic = self.shared.run(&self.threads, &f);
        drop(turn);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

/// Below this many operations (about 2 microseconds) waking the others costs more than it gives.
const GRAIN: usize = 1 << 16;

/// The most units of one piece of work, per worker.
const UNITS: usize = 64;

/// The most stages of [`Pool::run_stages`].
const STAGES: usize = 2;

/// Some neighbouring units of a piece of work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    first: usize,
    end: usize,
    /// The end of its owner's units.
    last: usize,
    /// Units of the whole.
    of: usize,
}

impl Part {
    /// Units `units` of so many.
    pub(crate) fn new(units: Range<usize>, of: usize) -> Part {
        Part { first: units.start, end: units.end, last: units.end, of }
    }

    /// The part that its owner is likely to do then; it may be empty.
    pub(crate) fn following(self) -> Part {
        Part { first: self.end, end: self.end + (self.last - self.end).div_ceil(2), ..self }
    }

    fn whole() -> Part {
        Part::new(0..1, 1)
    }

    /// This part of `n` items, in units of `align`.
    pub(crate) fn split(self, n: usize, align: usize) -> Range<usize> {
        edge(n, self.first, self.of, align)..edge(n, self.end, self.of, align)
    }
}

/// How many of an owner's units are taken, and of which job: what it says of another one means that none are, so that nobody
/// but who takes some has to write here.
struct Taken(AtomicU64);

impl Taken {
    /// Takes half of what is left of `units`, at least one; its numbers.
    fn half(&self, job: u64, units: usize) -> Option<Range<usize>> {
        // The lowest eight bits are the number of units, [`UNITS`] at most; the others are of the job's number.
        let known = |word: u64| if word >> 8 == job << 8 >> 8 { (word & 255) as usize } else { 0 };
        let half = |taken: usize| taken + (units - taken).div_ceil(2);
        let take = |word: u64| (known(word) < units).then(|| job << 8 | half(known(word)) as u64);
        let before = known(self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).ok()?);
        Some(before..half(before))
    }
}

/// How far workers are with something that others wait for, and [`DONE`].
pub(crate) struct Progress(Apart<AtomicUsize>);

/// See [`Progress`]: all is done, or never will be.
const DONE: usize = 1 << (usize::BITS - 1);

impl Progress {
    pub(crate) fn none() -> Self {
        Self(Apart(AtomicUsize::new(0)))
    }

    /// Notes that so many more of `all` are done. Who does the last calls `last`, and then those that wait go on.
    pub(crate) fn add(&self, more: usize, all: usize, last: impl FnOnce()) {
        if self.0.fetch_add(more, Ordering::AcqRel) + more == all {
            last();
            self.0.fetch_or(DONE, Ordering::Release);
        }
    }

    /// Waits until all is done. It lets other threads run, since the awaited one may be waiting for this very processor.
    pub(crate) fn wait(&self) {
        let done = || self.0.load(Ordering::Acquire) & DONE != 0;
        while !spin_until(done) {}
    }

    /// What lets those go on that wait for any of `all`, if this thread panics: its panic will reach who called the pool.
    pub(crate) fn unless_panicking(all: &[Progress]) -> impl Drop {
        struct Unless<'a>(&'a [Progress]);
        impl Drop for Unless<'_> {
            fn drop(&mut self) {
                if thread::panicking() {
                    for progress in self.0 {
                        progress.0.fetch_or(DONE, Ordering::Release);
                    }
                }
            }
        }
        Unless(all)
    }
}

impl Pool {
    /// Cuts work of so many `operations` into parts and calls `f` once for each.
    ///
    /// A worker does its own units first (they were its own the last time, so their data may
    /// still be near), half of what is left at a time, and then in the same way those that others have not come to: few
    /// parts, of which the last are small, so that all finish together. Hence `f` must give the same
    /// result whatever worker calls it, and whatever the parts are.
    pub(crate) fn run_parts<F: Fn(Part) + Sync>(&self, operations: usize, f: F) {
        self.run_stages([operations], |_, part| f(part));
    }

    /// [`Pool::run_parts`] for pieces of work one after another, `f(stage, part)`. A worker goes on to the next one when all parts of
    /// the one before are taken; others may still be at theirs, for which [`Progress`] lets it wait.
    pub(crate) fn run_stages<const N: usize, F: Fn(usize, Part) + Sync>(&self, operations: [usize; N], f: F) {
        const { assert!(N <= STAGES) };
        let owners = self.threads();
        let alone = || (0..N).for_each(|stage| f(stage, Part::whole()));
        if owners == 1 || operations.iter().fold(0, |sum: usize, n| sum.saturating_add(*n)) < GRAIN {
            return alone();
        }
        let units = operations.map(|n| (n / GRAIN / owners).clamp(1, UNITS));
        self.run(|worker, workers| {
            if workers == 1 {
                return alone();
            }
            let job = self.shared.newest.number.load(Ordering::Relaxed) as u64;
            for (stage, units) in units.into_iter().enumerate() {
                for owner in (worker..worker + owners).map(|w| w % owners) {
                    while let Some(own) = self.shared.taken[owner][stage].half(job, units) {
                        let before = owner * units;
                        let (first, end, last) = (before + own.start, before + own.end, before + units);
                        f(stage, Part { first, end, last, of: owners * units });
                    }
                }
            }
        });
    }

    /// Shares the rows of `x`, each of `cols` values at `cost` operations a value, and calls
    /// `f(rows, values before them)` on each share.
    pub(crate) fn rows<T, F>(&self, x: &mut [T], cols: usize, cost: usize, f: F)
    where
        F: Fn(&mut [T], usize) + Sync,
    {
        let (len, start) = (x.len(), SendPtr(x.as_mut_ptr()));
        self.run_parts(len.saturating_mul(cost), |part| {
            let share = part.split(len, cols);
            // SAFETY: different parts do not overlap, and `x` is borrowed throughout.
            let rows = unsafe { std::slice::from_raw_parts_mut(start.get().add(share.start), share.len()) };
            f(rows, share.start);
        });
    }
}

/// A pointer that workers share; what they write through it must not overlap.
pub(crate) struct SendPtr<T = f32>(pub *mut T);

impl<T> Clone for SendPtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SendPtr<T> {}

// SAFETY: a pointer alone does nothing; who writes through it answers for it.
unsafe impl<T> Sync for SendPtr<T> {}

impl<T> SendPtr<T> {
    pub(crate) fn get(&self) -> *mut T {
        self.0
    }
}

/// A part of a sequence of groups of equal items, divided by cost.
pub(crate) struct Share {
    start: u64,
    end: u64,
    /// Cost of the groups already asked for.
    passed: u64,
}

impl Share {
    /// A part of work that costs `total`.
    pub(crate) fn new(total: u64, part: Part) -> Self {
        let edge = |unit: usize| (u128::from(total) * unit as u128 / part.of as u128) as u64;
        Self { start: edge(part.first), end: edge(part.end), passed: 0 }
    }

    /// Which items of the next group, of `items` at `cost` each, are in this part. Every item is in
    /// exactly one part if all ask for the same groups, of the same total.
    pub(crate) fn take(&mut self, items: usize, cost: u64) -> Range<usize> {
        let edge = |at: u64| (at.saturating_sub(self.passed).div_ceil(cost.max(1)) as usize).min(items);
        let range = edge(self.start)..edge(self.end);
        self.passed += items as u64 * cost;
        range
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.newest.number.fetch_add(1, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A worker catches the panics of its work, so it has none of its own.
            let _ = thread.join();
        }
    }
}

/// Calls the closure of type `F` behind `data`.
///
/// # Safety
/// `data` must point to a live `F`.
unsafe fn call<F: Fn(usize, usize) + Sync>(data: *const (), worker: usize, workers: usize) {
    // SAFETY: as demanded of the caller.
    unsafe { (*data.cast::<F>())(worker, workers) }
}

impl Shared {
    /// Does one job on all threads; gives the first panic's payload.
    fn run<F>(&self, threads: &[JoinHandle<()>], f: &F) -> Option<Box<dyn Any + Send>>
    where
        F: Fn(usize, usize) + Sync,
    {
        let data = std::ptr::from_ref(f).cast();
        let job = Job { call: call::<F>, data, caller: thread::current() };
        // SAFETY: the lock `turn` is held and the previous job is finished, so nobody reads.
        unsafe { *self.newest.job.get() = Some(job) };
        self.pending.store(threads.len(), Ordering::Relaxed);
        // Nobody else writes it now. Nothing here waits until others have seen it.
        self.newest.number.store(self.newest.number.load(Ordering::Relaxed) + 1, Ordering::Release);
        let wake = || {
            for (thread, _) in threads.iter().zip(&self.asleep).filter(|(_, asleep)| asleep.load(Ordering::Relaxed)) {
                thread.thread().unpark();
            }
        };
        wake();
        self.work(|| f(0, self.workers));
        // Who was about to sleep has either seen the new number, or is seen here.
        fence(Ordering::SeqCst);
        wake();
        let left = |state: usize| state & !PARKED;
        if !spin_until(|| left(self.pending.load(Ordering::Acquire)) == 0)
            && left(self.pending.fetch_or(PARKED, Ordering::AcqRel)) != 0
        {
            while left(self.pending.load(Ordering::Acquire)) != 0 {
                thread::park();
            }
        }
        self.panic.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Runs one worker's share, keeping its panic.
    fn work(&self, share: impl FnOnce()) {
        WORKING.set(true);
        let result = catch_unwind(AssertUnwindSafe(share));
        WORKING.set(false);
        if let Err(payload) = result {
            let mut panic = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
            panic.get_or_insert(payload);
        }
    }

    /// Counts a thread out, and wakes who waits for all if it sleeps.
    fn finish(&self) {
        let mut state = self.pending.load(Ordering::Relaxed);
        loop {
            // SAFETY: nobody writes a job as long as this thread is counted.
            let caller = || unsafe { (*self.newest.job.get()).as_ref().map(|job| job.caller.clone()) };
            let sleeps = if state == 1 | PARKED { caller() } else { None };
            match self.pending.compare_exchange_weak(state, state - 1, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return sleeps.into_iter().for_each(|caller| caller.unpark()),
                Err(now) => state = now,
            }
        }
    }

    /// The life of thread `worker` (1 and up).
    fn serve(&self, worker: usize) {
        let asleep = &self.asleep[worker - 1];
        let mut seen = 0;
        loop {
            let news = || self.newest.number.load(Ordering::Acquire) != seen;
            if !spin_until(news) {
                asleep.store(true, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                while !news() {
                    thread::park();
                }
                asleep.store(false, Ordering::Relaxed);
            }
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            seen += 1;
            // SAFETY: the job was written before its number rose, and stays until `pending` is 0.
            let (call, data) = unsafe {
                let job = (*self.newest.job.get()).as_ref().expect("a job comes with each number");
                (job.call, job.data)
            };
            // SAFETY: `run` keeps the closure alive until `pending` is 0.
            self.work(|| unsafe { call(data, worker, self.workers) });
            self.finish();
        }
    }
}

/// Waits until `done`, for [`SPIN`] at most; whether it is done. It lets other threads run, since
/// the awaited one may be waiting for this very processor.
fn spin_until(done: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..32 {
            if done() {
                return true;
            }
            spin_loop();
        }
        thread::yield_now();
        if start.elapsed() >= SPIN {
            return false;
        }
    }
}

/// The share of `worker` in `n` items, as even as can be in units of `align` (the last may be
/// shorter).
///
/// # Panics
/// If `worker >= workers` or `align` is 0.
pub fn split(n: usize, worker: usize, workers: usize, align: usize) -> Range<usize> {
    assert!(worker < workers, "worker {worker} of {workers}");
    edge(n, worker, workers, align)..edge(n, worker + 1, workers, align)
}

/// Where unit `unit` of `units` begins among `n` items, which are cut at multiples of `align` only.
fn edge(n: usize, unit: usize, units: usize, align: usize) -> usize {
    (n.div_ceil(align) * unit / units * align).min(n)
}
