//! Writing safetensors: one tensor at a time, whole or not at all.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Map, Value, json};

use crate::{FormatError, Result, StoredDType};

/// The first tensor begins at a multiple of this; so then do all whose sizes are multiples of it.
const DATA_ALIGNMENT: usize = 64;

/// A tensor to be written.
pub struct TensorOut<'a> {
    name: String,
    dtype: StoredDType,
    shape: Vec<usize>,
    produce: Produce<'a>,
}

/// What writes a tensor's bytes when it is its turn.
pub type Produce<'a> = Box<dyn FnOnce(&mut Sink<'_>) -> Result<()> + 'a>;

impl fmt::Debug for TensorOut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorOut({} {} {:?})", self.name, self.dtype, self.shape)
    }
}

impl<'a> TensorOut<'a> {
    /// A tensor whose bytes are produced only when it is its turn to be written.
    pub fn streamed(
        name: impl Into<String>,
        dtype: StoredDType,
        shape: &[usize],
        produce: impl FnOnce(&mut Sink<'_>) -> Result<()> + 'a,
    ) -> Self {
        Self { name: name.into(), dtype, shape: shape.to_vec(), produce: Box::new(produce) }
    }

    /// A tensor of which the bytes are there.
    pub fn bytes(
        name: impl Into<String>,
        dtype: StoredDType,
        shape: &[usize],
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Self {
        let bytes = bytes.into();
        Self::streamed(name, dtype, shape, move |sink| sink.write(&bytes))
    }

    /// An F32 tensor.
    pub fn f32(name: impl Into<String>, shape: &[usize], values: impl Into<Cow<'a, [f32]>>) -> Self {
        let values = values.into();
        Self::streamed(name, StoredDType::F32, shape, move |sink| write_words(sink, &values, |v| v.to_le_bytes()))
    }

    /// An F64 tensor.
    pub fn f64(name: impl Into<String>, shape: &[usize], values: impl Into<Cow<'a, [f64]>>) -> Self {
        let values = values.into();
        Self::streamed(name, StoredDType::F64, shape, move |sink| write_words(sink, &values, |v| v.to_le_bytes()))
    }

    /// An I64 tensor.
    pub fn i64(name: impl Into<String>, shape: &[usize], values: impl Into<Cow<'a, [i64]>>) -> Self {
        let values = values.into();
        Self::streamed(name, StoredDType::I64, shape, move |sink| write_words(sink, &values, |v| v.to_le_bytes()))
    }
}

fn write_words<T: Copy, const N: usize>(sink: &mut Sink<'_>, values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Result<()> {
    let mut buffer = Vec::with_capacity(values.len().min(8192) * N);
    for chunk in values.chunks(8192) {
        buffer.clear();
        buffer.extend(chunk.iter().flat_map(|&v| bytes(v)));
        sink.write(&buffer)?;
    }
    Ok(())
}

/// Takes a tensor's bytes, in as many pieces as its producer likes.
pub struct Sink<'a> {
    out: &'a mut dyn Write,
    path: &'a Path,
    file_bytes: u64,
    written: u64,
}

impl fmt::Debug for Sink<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sink({}, {} bytes)", self.path.display(), self.written)
    }
}

impl<'a> Sink<'a> {
    /// Of a file that will have so many bytes.
    pub(crate) fn new(out: &'a mut dyn Write, path: &'a Path, file_bytes: u64) -> Self {
        Self { out, path, file_bytes, written: 0 }
    }

    /// Bytes taken so far.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// The disk is full or the system cannot write.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|e| FormatError::write(self.path, self.file_bytes, e))?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

/// Writes a file under a temporary name in the same folder, syncs and renames it: what was there before stays whole until
/// then.
///
/// # Errors
/// `path` is a folder or device, the disk is full, or the system cannot write.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    check_output(path)?;
    let failed = |e| FormatError::write(path, bytes.len() as u64, e);
    let temporary = Temporary::beside(path);
    let mut file = OpenOptions::new().write(true).create_new(true).open(&temporary.path).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    temporary.rename(path).map_err(failed)
}

/// Refuses to put a file in the place of a folder or device.
///
/// # Errors
/// [`FormatError::NoFileToWrite`].
pub fn check_output(path: &Path) -> Result<()> {
    if path.exists() && !path.is_file() {
        return Err(FormatError::NoFileToWrite { path: path.to_owned() });
    }
    Ok(())
}

/// Writes a safetensors file: under a temporary name in the same folder, synced, then renamed. An error leaves nothing
/// behind, and a file of that name as it was. Wider element types go first, so that all are aligned; otherwise the
/// order is kept.
///
/// # Errors
/// A name twice, a shape that does not fit its bytes, a full disk, or an error of a producer.
pub fn write_safetensors<'a>(
    path: &Path,
    metadata: Option<HashMap<String, String>>,
    tensors: impl IntoIterator<Item = TensorOut<'a>>,
) -> Result<()> {
    check_output(path)?;
    let (tensors, header, file_bytes) = laid_out(path, metadata, tensors)?;
    let failed = |e| FormatError::write(path, file_bytes, e);

    let temporary = Temporary::beside(path);
    let file = OpenOptions::new().write(true).create_new(true).open(&temporary.path).map_err(failed)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&header).map_err(failed)?;
    write_data(&mut out, path, file_bytes, tensors)?;
    let file = out.into_inner().map_err(|e| failed(e.into_error()))?;
    file.sync_all().map_err(failed)?;
    temporary.rename(path).map_err(failed)
}

/// The bytes of a small safetensors file, as [`write_safetensors`] would write it.
///
/// # Errors
/// A name twice, a shape that does not fit its bytes, or an error of a producer.
pub fn safetensors_bytes<'a>(
    metadata: Option<HashMap<String, String>>,
    tensors: impl IntoIterator<Item = TensorOut<'a>>,
) -> Result<Vec<u8>> {
    let path = Path::new("memory");
    let (tensors, mut bytes, file_bytes) = laid_out(path, metadata, tensors)?;
    write_data(&mut bytes, path, file_bytes, tensors)?;
    Ok(bytes)
}

/// Tensors in the order of the file, its header, and its size.
fn laid_out<'a>(
    path: &Path,
    metadata: Option<HashMap<String, String>>,
    tensors: impl IntoIterator<Item = TensorOut<'a>>,
) -> Result<(Vec<TensorOut<'a>>, Vec<u8>, u64)> {
    let mut tensors: Vec<TensorOut<'a>> = tensors.into_iter().collect();
    tensors.sort_by_key(|t| std::cmp::Reverse(t.dtype.bits()));
    let (header, data_bytes) = header(path, metadata, &tensors)?;
    let file_bytes = header.len() as u64 + data_bytes;
    Ok((tensors, header, file_bytes))
}

fn write_data(out: &mut dyn Write, path: &Path, file_bytes: u64, tensors: Vec<TensorOut<'_>>) -> Result<()> {
    for tensor in tensors {
        let expected = byte_size(path, &tensor)?;
        let mut sink = Sink::new(out, path, file_bytes);
        (tensor.produce)(&mut sink)?;
        if sink.written != expected {
            return Err(FormatError::WrittenLength { tensor: tensor.name, written: sink.written, expected });
        }
    }
    Ok(())
}

/// Length, JSON and padding; and the number of data bytes.
fn header(path: &Path, metadata: Option<HashMap<String, String>>, tensors: &[TensorOut<'_>]) -> Result<(Vec<u8>, u64)> {
    let mut entries = Map::new();
    if let Some(metadata) = metadata {
        let mut sorted: Vec<_> = metadata.into_iter().collect();
        sorted.sort();
        let sorted: Map<String, Value> = sorted.into_iter().map(|(k, v)| (k, Value::String(v))).collect();
        entries.insert("__metadata__".to_owned(), Value::Object(sorted));
    }
    let mut at = 0u64;
    for tensor in tensors {
        let begin = at;
        at = begin.checked_add(byte_size(path, tensor)?).ok_or_else(|| refuse(path, tensor, "too large"))?;
        let entry = json!({"dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [begin, at]});
        if tensor.name == "__metadata__" || entries.insert(tensor.name.clone(), entry).is_some() {
            return Err(refuse(path, tensor, "the name is taken"));
        }
    }
    let mut json = Value::Object(entries).to_string().into_bytes();
    json.resize((8 + json.len()).next_multiple_of(DATA_ALIGNMENT) - 8, b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok((header, at))
}

fn byte_size(path: &Path, tensor: &TensorOut<'_>) -> Result<u64> {
    let size = tensor.dtype.bytes_of(&tensor.shape);
    size.ok_or_else(|| refuse(path, tensor, "its shape has no possible size"))
}

fn refuse(path: &Path, tensor: &TensorOut<'_>, problem: &str) -> FormatError {
    FormatError::TensorEntry { path: path.to_owned(), tensor: tensor.name.clone(), problem: problem.to_owned() }
}

/// A file or folder under a temporary name; removed when dropped, unless it was renamed.
pub(crate) struct Temporary {
    pub(crate) path: PathBuf,
    renamed: bool,
}

impl Temporary {
    /// A name beside `path` that no other process or thread uses.
    pub(crate) fn beside(path: &Path) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let path = path.with_file_name(format!(".{name}.{}-{n}.tmp", process::id()));
        Self { path, renamed: false }
    }

    /// Gives it its true name, durably.
    pub(crate) fn rename(mut self, to: &Path) -> io::Result<()> {
        if self.path.is_dir() {
            sync_folder(&self.path)?;
        }
        fs::rename(&self.path, to)?;
        self.renamed = true;
        sync_folder(to.parent().unwrap_or(Path::new("")))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.renamed {
            // One of the two fits; if neither does, it was never made.
            let _ = fs::remove_file(&self.path).or_else(|_| fs::remove_dir_all(&self.path));
        }
    }
}

/// Makes names in a folder durable.
fn sync_folder(folder: &Path) -> io::Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_as_such() {
        let mut full = OpenOptions::new().write(true).open("/dev/full").expect("the device that is always full");
        let mut sink = Sink { out: &mut full, path: Path::new("a.safetensors"), file_bytes: 5, written: 0 };
        let error = sink.write(b"x").expect_err("it is full");
        let message =
            "no space left for a.safetensors (5 bytes in all); help: free some space or write to another disk";
        assert_eq!(error.to_string(), message);
    }
}
