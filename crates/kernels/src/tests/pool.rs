use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::*;
use crate::pool::{Part, Progress, Share};

#[test]
fn every_worker_runs_once() {
    for threads in 1..=4 {
        let pool = Pool::new(threads);
        assert_eq!(pool.threads(), threads);
        for round in 0..200 {
            let calls: Vec<_> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            pool.run(|worker, workers| {
                assert_eq!(workers, threads);
                calls[worker].fetch_add(1, Ordering::Relaxed);
            });
            assert!(calls.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            if round % 50 == 0 {
                // Long enough for the threads to fall asleep.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// Who waits for the others sleeps after a while, and so do they.
#[test]
fn long_work_and_long_pauses_lose_nobody() {
    let pool = Pool::new(3);
    for round in 0..30 {
        let calls = AtomicUsize::new(0);
        pool.run(|worker, _| {
            std::thread::sleep(Duration::from_micros(if worker == round % 3 {
                1000
            } else {
                190 + 10 * worker as u64
            }));
            calls.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(calls.into_inner(), 3);
        std::thread::sleep(Duration::from_micros(150 + 10 * round as u64));
    }
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
    let pool = Pool::new(3);
    for bad in [0, 1, 2] {
        let work = |worker, _| assert!(worker != bad, "worker {bad} fails");
        let payload = catch_unwind(AssertUnwindSafe(|| pool.run(work))).unwrap_err();
        let message = payload.downcast_ref::<String>().expect("a message");
        assert_eq!(*message, format!("worker {bad} fails"));
        let sum = AtomicUsize::new(0);
        pool.run(|worker, _| {
            sum.fetch_add(worker, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 3);
    }
}

#[test]
fn a_nested_run_is_inline() {
    let (pool, other) = (Pool::new(2), Pool::new(2));
    let seen = Mutex::new(Vec::new());
    pool.run(|worker, _| {
        pool.run(|w, n| seen.lock().unwrap().push((worker, w, n)));
        other.run(|w, n| seen.lock().unwrap().push((worker, w, n)));
    });
    let mut seen = seen.into_inner().unwrap();
    seen.sort_unstable();
    assert_eq!(seen, [(0, 0, 1), (0, 0, 1), (1, 0, 1), (1, 0, 1)]);
}

#[test]
fn callers_take_turns() {
    let (pool, sum) = (Pool::new(3), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..100 {
                    pool.run(|_, _| {
                        sum.fetch_add(1, Ordering::Relaxed);
                    });
                }
            });
        }
    });
    assert_eq!(sum.into_inner(), 4 * 100 * 3);
}

#[test]
fn every_item_is_in_one_part() {
    for threads in [1, 2, 3, 70] {
        let pool = Pool::new(threads);
        for operations in [0, 1 << 17, 1 << 19, usize::MAX] {
            let calls: Vec<_> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
            pool.run_parts(operations, |part| {
                calls[part.split(1000, 1)].iter().for_each(|c| _ = c.fetch_add(1, Ordering::Relaxed));
            });
            assert!(calls.into_iter().all(|c| c.into_inner() == 1));
        }
    }
}

#[test]
fn split_covers_everything_once() {
    for n in 0..50 {
        for (workers, align) in [(1, 1), (3, 1), (4, 8), (7, 16), (2, 64)] {
            let mut next = 0;
            for worker in 0..workers {
                let range = split(n, worker, workers, align);
                assert_eq!(range.start, next);
                assert!(range.start.is_multiple_of(align) || range.is_empty());
                next = range.end;
            }
            assert_eq!(next, n);
        }
    }
}

#[test]
fn shares_cover_everything_once() {
    let mut random = Random(19);
    for _ in 0..200 {
        let groups: Vec<_> = (0..1 + random.below(9)).map(|_| (random.below(20), random.below(30) as u64)).collect();
        let total = groups.iter().map(|(items, cost)| *items as u64 * cost).sum();
        let workers = 1 + random.below(6);
        let mut shares: Vec<_> = (0..workers).map(|w| Share::new(total, Part::new(w..w + 1, workers))).collect();
        for (items, cost) in groups {
            let mut next = 0;
            for share in &mut shares {
                let range = share.take(items, cost);
                assert!(range.is_empty() || range.start == next);
                next = next.max(range.end);
            }
            assert!(next == items || cost == 0);
        }
    }
}

#[test]
fn stages_wait_for_what_they_need() {
    for threads in 1..=4 {
        let pool = Pool::new(threads);
        for _ in 0..200 {
            let (progress, squares) = (Progress::none(), AtomicUsize::new(0));
            let (n, sum, made) = (100, AtomicUsize::new(0), AtomicUsize::new(0));
            pool.run_stages([1 << 24, 1 << 20], |stage, part| {
                let items = part.split(n, 1);
                if stage == 0 {
                    squares.fetch_add(items.clone().map(|i| i * i).sum(), Ordering::Relaxed);
                    progress.add(items.len(), n, || made.store(squares.load(Ordering::Relaxed), Ordering::Relaxed));
                } else {
                    progress.wait();
                    sum.fetch_add(items.len() * made.load(Ordering::Relaxed), Ordering::Relaxed);
                }
            });
            assert_eq!(sum.into_inner(), n * 328_350, "{threads} threads");
        }
    }
}

#[test]
fn who_waits_for_a_worker_that_panics_goes_on() {
    let pool = Pool::new(3);
    for round in 0..20 {
        let (progress, n) = ([Progress::none()], 64);
        let work = |stage, part: Part| {
            let _unless = Progress::unless_panicking(&progress);
            if stage == 0 {
                assert!(!part.split(n, 1).contains(&round), "the worker of item {round} fails");
                progress[0].add(part.split(n, 1).len(), n, || ());
            } else {
                progress[0].wait();
            }
        };
        let payload = catch_unwind(AssertUnwindSafe(|| pool.run_stages([1 << 24; 2], work))).unwrap_err();
        let message = payload.downcast_ref::<String>().expect("a message");
        assert_eq!(*message, format!("the worker of item {round} fails"));
    }
}
