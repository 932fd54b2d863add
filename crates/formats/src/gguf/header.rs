//! Reading a GGUF header piece by piece.

use super::value::{GgufArray, GgufValue, number, width};
use crate::{DataFile, FormatError, Result};

/// Values in all arrays of a header at most; the largest vocabularies have a quarter of a million tokens and twice as many
/// merges.
const VALUES_MAX: u64 = 1 << 22;
/// Bytes read at once.
const CHUNK: u64 = 1 << 16;

/// A place in a header.
pub(super) struct Cursor<'a> {
    data: &'a DataFile,
    at: u64,
    /// No byte is read from here on: the file's end, or the longest header.
    end: u64,
    chunk: Vec<u8>,
    chunk_at: u64,
    /// Values that arrays may still have.
    values_left: u64,
}

impl<'a> Cursor<'a> {
    pub fn new(data: &'a DataFile, most: u64) -> Cursor<'a> {
        Cursor { data, at: 0, end: data.size().min(most), chunk: Vec::new(), chunk_at: 0, values_left: VALUES_MAX }
    }

    pub fn position(&self) -> u64 {
        self.at
    }

    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        self.data.size()
    }

    pub fn bad(&self, problem: impl Into<String>) -> FormatError {
        FormatError::Gguf { path: self.data.path().to_owned(), problem: problem.into() }
    }

    pub fn truncated(&self, what: String, expected: u64) -> FormatError {
        FormatError::Truncated { path: self.data.path().to_owned(), what, expected, found: self.size() }
    }

    /// `count` things of at least `least` bytes each must lie in what is left of the header.
    pub fn check_count(&self, count: u64, least: u64, what: &str) -> Result<()> {
        match count.checked_mul(least) {
            Some(bytes) if bytes <= self.end - self.at => Ok(()),
            _ => Err(self.bad(format!("{count} {what} cannot lie in {} bytes", self.end - self.at))),
        }
    }

    /// So many bytes must be left in the header.
    fn check_left(&self, len: u64) -> Result<()> {
        if len > self.end - self.at {
            let end = self.at.saturating_add(len);
            if end <= self.size() {
                return Err(self.bad(format!("its header is longer than {} bytes", self.end)));
            }
            return Err(self.truncated("the header".to_owned(), end));
        }
        Ok(())
    }

    /// The next `len` bytes; there are so many.
    fn take(&mut self, len: u64) -> Result<Vec<u8>> {
        self.check_left(len)?;
        let mut bytes = vec![0; usize::try_from(len).expect("at most the longest header")];
        let inside = self.at >= self.chunk_at && self.at + len <= self.chunk_at + self.chunk.len() as u64;
        if !inside && len < CHUNK {
            let fill = CHUNK.min(self.end - self.at);
            self.chunk.resize(usize::try_from(fill).expect("at most a chunk"), 0);
            self.chunk_at = self.at;
            self.data.read_at(self.at, &mut self.chunk)?;
        }
        if len < CHUNK {
            let from = usize::try_from(self.at - self.chunk_at).expect("inside the chunk");
            bytes.copy_from_slice(&self.chunk[from..][..len as usize]);
        } else {
            self.data.read_at(self.at, &mut bytes)?;
        }
        self.at += len;
        Ok(bytes)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(&self.take(N as u64)?);
        Ok(array)
    }

    pub fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn string(&mut self) -> Result<String> {
        let len = self.u64()?;
        let bytes = self.take(len)?;
        String::from_utf8(bytes).map_err(|_| self.bad("a text in its header is not UTF-8"))
    }

    /// The value of a key.
    pub fn value(&mut self, kind: u32, key: &str) -> Result<GgufValue> {
        match (kind, width(kind)) {
            (7, _) => match self.array::<1>()?[0] {
                flag @ (0 | 1) => Ok(GgufValue::Bool(flag == 1)),
                other => Err(self.bad(format!("key `{key}` has the truth value {other}"))),
            },
            (_, Some(width)) => Ok(number(kind, &self.take(width as u64)?)),
            (8, None) => Ok(GgufValue::Text(self.string()?)),
            (9, None) => self.values(key).map(GgufValue::Array),
            _ => Err(self.bad(format!("key `{key}` has the type {kind}, which is unknown"))),
        }
    }

    /// The values of an array.
    fn values(&mut self, key: &str) -> Result<GgufArray> {
        let kind = self.u32()?;
        let count = self.u64()?;
        let least = match (kind, width(kind)) {
            (_, Some(width)) => width as u64,
            (8, None) => 8,
            (9, None) => return Err(self.bad(format!("key `{key}` has arrays in an array, which are not read"))),
            _ => return Err(self.bad(format!("key `{key}` has the type {kind}, which is unknown"))),
        };
        self.check_count(count, least, &format!("values of key `{key}`"))?;
        if count > self.values_left {
            let most = self.values_left;
            return Err(self.bad(format!("key `{key}` has {count} values, at most {most} are allowed here")));
        }
        self.values_left -= count;
        let bytes = match kind {
            8 => self.texts(count)?,
            _ => self.take(count * least)?,
        };
        let len = usize::try_from(count).expect("so many values are in the header");
        GgufArray::checked(kind, len, bytes).map_err(|problem| self.bad(format!("key `{key}` has {problem}")))
    }

    /// Texts as they lie there. Their lengths are looked at first, so that the memory for them is exact.
    fn texts(&mut self, count: u64) -> Result<Vec<u8>> {
        let start = self.at;
        for _ in 0..count {
            let len = self.u64()?;
            self.check_left(len)?;
            self.at += len;
        }
        let end = std::mem::replace(&mut self.at, start);
        self.take(end - start)
    }
}
