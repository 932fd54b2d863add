//! What a render may cost.
//!
//! A chat template is a program from the internet. Everything it does is paid from two purses that
//! are never refilled during a render: `steps` (evaluated nodes, compared values, scanned bytes) and
//! `bytes` (text and containers built, whether still alive or not). So a template can neither loop
//! for long nor hold more memory than its purse, whatever it computes.

use std::cell::Cell;

use super::value::Value;
use super::{Error, Res};

/// Bytes scanned or copied for the price of one step.
const BYTES_PER_STEP: usize = 64;

/// The purses of one render. Shared by reference: every function that works pays.
pub(crate) struct Budget {
    steps: Cell<u64>,
    bytes: Cell<u64>,
    bytes_at_start: u64,
}

impl Budget {
    /// A budget of so many steps and bytes.
    pub(crate) fn new(steps: u64, bytes: u64) -> Self {
        Self { steps: Cell::new(steps), bytes: Cell::new(bytes), bytes_at_start: bytes }
    }

    /// The bytes paid for so far.
    pub(crate) fn spent_bytes(&self) -> u64 {
        self.bytes_at_start - self.bytes.get()
    }

    /// Pays for `n` steps of work.
    pub(crate) fn step(&self, n: usize) -> Res<()> {
        match self.steps.get().checked_sub(n as u64) {
            Some(rest) => self.steps.set(rest),
            None => return Err(Error::limit("the template runs too long: it used up its steps")),
        }
        Ok(())
    }

    /// Pays for reading `bytes` bytes.
    pub(crate) fn scan(&self, bytes: usize) -> Res<()> {
        self.step(1 + bytes / BYTES_PER_STEP)
    }

    /// Pays for building `bytes` bytes; call it before building where the size can be known.
    pub(crate) fn alloc(&self, bytes: usize) -> Res<()> {
        match self.bytes.get().checked_sub(bytes as u64) {
            Some(rest) => self.bytes.set(rest),
            None => return Err(Error::limit("the template builds too much text or data")),
        }
        self.scan(bytes)
    }

    /// Makes a string value and pays for it.
    pub(crate) fn text(&self, text: impl AsRef<str>) -> Res<Value> {
        let text = text.as_ref();
        self.alloc(text.len())?;
        Ok(Value::Str(text.into()))
    }

    /// Appends to `out` and pays for it.
    pub(crate) fn push(&self, out: &mut String, text: &str) -> Res<()> {
        self.alloc(text.len())?;
        out.push_str(text);
        Ok(())
    }
}
