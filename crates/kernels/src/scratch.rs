//! Buffers that a thread keeps from call to call, so that warm calls allocate nothing.

use std::cell::Cell;
use std::thread::LocalKey;

use crate::quant::Rounded;

/// A cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code, reason = "read through pointers")] [f32; 16]);

thread_local! {
    static FLOATS: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    static SHARED: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    static ROUNDED: Cell<Vec<Rounded>> = const { Cell::new(Vec::new()) };
    static INDICES: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
}

/// Calls `f` with `len` values that start at a cache line; what they hold is left from before.
pub(crate) fn floats<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    lines(&FLOATS, len, f)
}

/// The same in another place: for what all workers share, while each of them has its own [`floats`].
pub(crate) fn shared<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    lines(&SHARED, len, f)
}

fn lines<R>(kept: &'static LocalKey<Cell<Vec<Line>>>, len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut lines = kept.take();
    if lines.len() < len.div_ceil(16) {
        lines.resize(len.div_ceil(16), Line([0.0; 16]));
    }
    // SAFETY: a line is sixteen values without padding, and there are enough lines.
    let values = unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), len) };
    let result = f(values);
    kept.set(lines);
    result
}

/// Calls `f` with `len` zeros.
pub(crate) fn indices<R>(len: usize, f: impl FnOnce(&mut [u32]) -> R) -> R {
    let mut values = INDICES.take();
    values.clear();
    values.resize(len, 0);
    let result = f(&mut values);
    INDICES.set(values);
    result
}

/// Calls `f` with `len` chunks; what they hold is left from before.
pub(crate) fn rounded<R>(len: usize, f: impl FnOnce(&mut [Rounded]) -> R) -> R {
    let mut chunks = ROUNDED.take();
    if chunks.len() < len {
        chunks.resize(len, Rounded::ZERO);
    }
    let result = f(&mut chunks[..len]);
    ROUNDED.set(chunks);
    result
}
