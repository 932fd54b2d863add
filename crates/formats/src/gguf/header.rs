//! Reading a GGUF header piece by piece.

use crate::{DataFile, FormatError, Result};

/// Values in all arrays of a header at most; the largest vocabularies have a quarter of a million tokens and twice as many
/// merges. In memory a value takes 24 bytes, in the file as little as one.
const VALUES_MAX: u64 = 1 << 22;
/// Of these in an array of single bytes.
const BYTES_MAX: u64 = 1 << 20;
/// Arrays in arrays at most.
const DEPTH_MAX: usize = 4;
/// Bytes read at once.
const CHUNK: u64 = 1 << 16;

/// A value of GGUF metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// An unsigned integer of any width.
    Unsigned(u64),
    /// A signed integer of any width.
    Signed(i64),
    /// A 32- or 64-bit float.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A text.
    Text(String),
    /// Values of one type.
    Array(Vec<GgufValue>),
}

impl GgufValue {
    /// An integer that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            GgufValue::Unsigned(v) => Some(*v),
            GgufValue::Signed(v) => u64::try_from(*v).ok(),
            _ => None,
        }
    }

    /// A text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            GgufValue::Text(text) => Some(text),
            _ => None,
        }
    }
}

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

    /// The next `len` bytes; there are so many.
    fn take(&mut self, len: u64) -> Result<Vec<u8>> {
        if len > self.end - self.at {
            let end = self.at.saturating_add(len);
            if end <= self.size() {
                return Err(self.bad(format!("its header is longer than {} bytes", self.end)));
            }
            return Err(self.truncated("the header".to_owned(), end));
        }
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
        self.nested(kind, key, 0)
    }

    fn nested(&mut self, kind: u32, key: &str, depth: usize) -> Result<GgufValue> {
        Ok(match kind {
            0 => GgufValue::Unsigned(u64::from(self.array::<1>()?[0])),
            1 => GgufValue::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => GgufValue::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => GgufValue::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => GgufValue::Unsigned(u64::from(self.u32()?)),
            5 => GgufValue::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            6 => GgufValue::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => match self.array::<1>()?[0] {
                0 => GgufValue::Bool(false),
                1 => GgufValue::Bool(true),
                other => return Err(self.bad(format!("key `{key}` has the truth value {other}"))),
            },
            8 => GgufValue::Text(self.string()?),
            9 if depth == DEPTH_MAX => return Err(self.bad(format!("key `{key}` nests arrays too deeply"))),
            9 => {
                let kind = self.u32()?;
                let count = self.u64()?;
                self.check_count(count, least_bytes(kind), &format!("values of key `{key}`"))?;
                let most = if least_bytes(kind) == 1 { self.values_left.min(BYTES_MAX) } else { self.values_left };
                if count > most {
                    return Err(self.bad(format!("key `{key}` has {count} values, at most {most} are allowed here")));
                }
                self.values_left -= count;
                let mut values = Vec::new();
                for _ in 0..count {
                    values.push(self.nested(kind, key, depth + 1)?);
                }
                GgufValue::Array(values)
            }
            10 => GgufValue::Unsigned(self.u64()?),
            11 => GgufValue::Signed(i64::from_le_bytes(self.array()?)),
            12 => GgufValue::Float(f64::from_le_bytes(self.array()?)),
            _ => return Err(self.bad(format!("key `{key}` has the type {kind}, which is unknown"))),
        })
    }
}

/// Bytes that a value of a type takes at least; 1 for a type that is refused when its first value is read.
fn least_bytes(kind: u32) -> u64 {
    match kind {
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        9 => 12,
        _ => 1,
    }
}
