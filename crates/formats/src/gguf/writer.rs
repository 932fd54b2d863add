//! Writing GGUF files: small ones whole, models tensor by tensor.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::OpenOptions;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::value::GgufValue;
use super::{ALIGNMENT, GGUF_MAGIC, GgmlType};
use crate::writer::{Produce, Sink, Temporary, check_output};
use crate::{FormatError, Result};

/// A file of version 3 with these key-value pairs and F32 tensors `(name, shape innermost first, values)`. Numbers are
/// written as 32-bit where they fit, arrays as they are, an empty one as one of texts.
///
/// The shape must have as many elements as there are values.
pub fn gguf_bytes(metadata: &[(String, GgufValue)], tensors: &[(String, Vec<u64>, Vec<f32>)]) -> Vec<u8> {
    let mut out = head(metadata, tensors.len());
    let mut offset = 0u64;
    for (name, shape, values) in tensors {
        debug_assert_eq!(shape.iter().product::<u64>(), values.len() as u64, "{name}");
        info(&mut out, name, shape, GgmlType::F32, offset);
        offset += (values.len() as u64 * 4).next_multiple_of(ALIGNMENT);
    }
    for (.., values) in tensors {
        out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
        values.iter().for_each(|v| out.extend(v.to_le_bytes()));
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    out
}

/// A tensor whose bytes are produced when it is its turn to be written.
pub struct GgufOut<'a> {
    /// Its name.
    pub name: String,
    /// Its shape, innermost dimension first.
    pub shape: Vec<u64>,
    /// Element type.
    pub dtype: GgmlType,
    /// Writes the bytes.
    pub produce: Produce<'a>,
}

impl fmt::Debug for GgufOut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GgufOut({} {} {:?})", self.name, self.dtype.name(), self.shape)
    }
}

/// Writes a file of version 3: under a temporary name in the same folder, synced, looked over by `check`, then renamed. An
/// error leaves nothing behind, and a file of that name as it was. One tensor at a time is in memory.
///
/// # Errors
/// A name twice, a shape without a size, a full disk, or an error of a producer or of `check`.
pub fn write_gguf(
    path: &Path,
    metadata: &[(String, GgufValue)],
    tensors: Vec<GgufOut<'_>>,
    check: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    check_output(path)?;
    let refuse = |tensor: &GgufOut<'_>, problem: &str| FormatError::TensorEntry {
        path: path.to_owned(),
        tensor: tensor.name.clone(),
        problem: problem.to_owned(),
    };
    let mut header = head(metadata, tensors.len());
    let (mut offset, mut sizes, mut names) = (0u64, Vec::with_capacity(tensors.len()), BTreeSet::new());
    for tensor in &tensors {
        let size =
            tensor.dtype.bytes_of(&tensor.shape).ok_or_else(|| refuse(tensor, "its shape has no possible size"))?;
        if !names.insert(tensor.name.as_str()) {
            return Err(refuse(tensor, "the name is taken"));
        }
        info(&mut header, &tensor.name, &tensor.shape, tensor.dtype, offset);
        let end = offset.checked_add(size).and_then(|end| end.checked_next_multiple_of(ALIGNMENT));
        offset = end.ok_or_else(|| refuse(tensor, "too large"))?;
        sizes.push(size);
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
    let file_bytes = header.len() as u64 + offset;
    let failed = |e| FormatError::write(path, file_bytes, e);

    let temporary = Temporary::beside(path);
    let file = OpenOptions::new().write(true).create_new(true).open(&temporary.path).map_err(failed)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&header).map_err(failed)?;
    for (tensor, expected) in tensors.into_iter().zip(sizes) {
        let mut sink = Sink::new(&mut out, path, file_bytes);
        (tensor.produce)(&mut sink)?;
        let written = sink.written();
        if written != expected {
            return Err(FormatError::WrittenLength { tensor: tensor.name, written, expected });
        }
        let padding = written.next_multiple_of(ALIGNMENT) - written;
        out.write_all(&[0; ALIGNMENT as usize][..padding as usize]).map_err(failed)?;
    }
    let file = out.into_inner().map_err(|e| failed(e.into_error()))?;
    file.sync_all().map_err(failed)?;
    check(&temporary.path)?;
    temporary.rename(path).map_err(failed)
}

/// Magic, version, counts and key-value pairs.
fn head(metadata: &[(String, GgufValue)], tensors: usize) -> Vec<u8> {
    let mut out = GGUF_MAGIC.to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut out, key);
        out.extend(value.kind().to_le_bytes());
        value.put(&mut out, value.kind());
    }
    out
}

fn info(out: &mut Vec<u8>, name: &str, shape: &[u64], dtype: GgmlType, offset: u64) {
    text(out, name);
    out.extend((shape.len() as u32).to_le_bytes());
    shape.iter().for_each(|d| out.extend(d.to_le_bytes()));
    out.extend(dtype.id().to_le_bytes());
    out.extend(offset.to_le_bytes());
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
