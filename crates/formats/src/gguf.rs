//! The GGUF container (versions 2 and 3, little endian): checked metadata and tensor infos, and reads of single tensors.
//!
//! A file is magic, version, counts, key-value pairs, tensor infos, padding, and the tensors' bytes. Every length, count and
//! offset is checked against the file before anything is read or allocated by it.

mod arch;
mod elsewhere;
mod ends;
mod files;
mod header;
mod layout;
mod meta_out;
mod model;
mod names;
mod plan_out;
mod tensors_out;
mod types;
mod value;
mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

pub use arch::{ARCHS, Arch, COMMON_KEYS};
pub use elsewhere::elsewhere;
pub use files::in_folder;
pub(crate) use layout::single_expert;
pub use meta_out::{difference, metadata_for_gguf};
pub(crate) use model::{GgufModel, open as open_model};
pub use names::GGUF_NAMES;
pub use plan_out::{GgufPlan, check_written, plan_gguf};
pub use tensors_out::{Change, Content, GgufMade, tensors_for_gguf};
pub use types::GgmlType;
pub use value::{GgufArray, GgufValue};
pub use writer::{GgufOut, gguf_bytes, write_gguf};

use crate::datafile::push_sparingly;
use crate::{DataFile, FormatError, Result, StoredDType, TensorLoc};
use header::Cursor;

/// First bytes of a file.
pub const GGUF_MAGIC: [u8; 4] = *b"GGUF";
/// Longest header (metadata and tensor infos) that is read.
pub const GGUF_HEADER_BYTES_MAX: u64 = 1 << 28;
/// Dimensions of a tensor at most.
const DIMS_MAX: u32 = 4;
/// Key-value pairs at most; models have some dozens, pruned ones another for each layer.
const PAIRS_MAX: u64 = 1 << 14;
/// Alignment of tensors unless `general.alignment` says otherwise.
const ALIGNMENT: u64 = 32;

/// Where one tensor lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// Its name.
    pub name: String,
    /// Shape in the file's order: innermost (contiguous) dimension first.
    pub shape: Vec<u64>,
    /// Element type.
    pub dtype: GgmlType,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl GgufTensor {
    /// The same place in the words of a checkpoint, in file `index`.
    fn into_loc(self, index: usize) -> TensorLoc {
        let dtype = match self.dtype {
            GgmlType::F32 => StoredDType::F32,
            GgmlType::F16 => StoredDType::F16,
            GgmlType::BF16 => StoredDType::Bf16,
            GgmlType::F64 => StoredDType::F64,
            GgmlType::I8 => StoredDType::I8,
            GgmlType::I16 => StoredDType::I16,
            GgmlType::I32 => StoredDType::I32,
            GgmlType::I64 => StoredDType::I64,
            blocks => StoredDType::Blocks(blocks),
        };
        let dim = |d: u64| usize::try_from(d).expect("a tensor that lies in a file fits the address space");
        let shape = self.shape.into_iter().rev().map(dim).collect();
        TensorLoc { name: self.name, file: index, dtype, shape, offset: self.offset, len: self.len }
    }
}

/// One open GGUF file: its metadata and index, and reads of single tensors.
#[derive(Debug)]
pub struct GgufFile {
    data: DataFile,
    version: u32,
    metadata: BTreeMap<String, GgufValue>,
    tensors: BTreeMap<String, GgufTensor>,
}

impl GgufFile {
    /// Opens a file and reads its header, no tensor.
    ///
    /// # Errors
    /// The file cannot be read, is no GGUF file of a known version, or its header is not that of a whole and well-formed file.
    pub fn open(path: &Path) -> Result<GgufFile> {
        GgufFile::open_part(path, true)
    }

    /// As [`GgufFile::open`]; unless it is `whole`, the file may end anywhere behind its header.
    pub(crate) fn open_part(path: &Path, whole: bool) -> Result<GgufFile> {
        let data = DataFile::open(path)?;
        let mut cursor = Cursor::new(&data, GGUF_HEADER_BYTES_MAX);
        if cursor.array::<4>()? != GGUF_MAGIC {
            return Err(cursor.bad("it does not begin with `GGUF`"));
        }
        let version = cursor.u32()?;
        if version & 0xffff == 0 {
            return Err(cursor.bad("it is big-endian, only little-endian files are read"));
        }
        if !(2..=3).contains(&version) {
            return Err(cursor.bad(format!("version {version} is unknown, versions 2 and 3 are read")));
        }
        let (n_tensors, n_pairs) = (cursor.u64()?, cursor.u64()?);
        let metadata = read_metadata(&mut cursor, n_pairs)?;
        let infos = read_infos(&mut cursor, n_tensors)?;
        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT,
            Some(value) => value
                .as_u64()
                .filter(|a| a.is_power_of_two() && *a <= 1 << 20)
                .ok_or_else(|| cursor.bad("`general.alignment` is no power of two"))?,
        };
        let size = if whole { cursor.size() } else { u64::MAX };
        let tensors = place(&cursor, infos, alignment, size)?;
        Ok(GgufFile { data, version, metadata, tensors })
    }

    /// Version of the format.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Key-value pairs.
    pub fn metadata(&self) -> &BTreeMap<String, GgufValue> {
        &self.metadata
    }

    /// The tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &GgufTensor> {
        self.tensors.values()
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn tensor(&self, name: &str) -> Result<&GgufTensor> {
        let missing = || FormatError::NoTensor { path: self.data.path().to_owned(), tensor: name.to_owned() };
        self.tensors.get(name).ok_or_else(missing)
    }

    /// The open file.
    pub fn data(&self) -> &DataFile {
        &self.data
    }

    /// The values of an F32 tensor, in the file's order.
    ///
    /// # Errors
    /// No such tensor, another type, or the file cannot be read.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.tensor(name)?;
        if tensor.dtype != GgmlType::F32 {
            return Err(FormatError::DType {
                path: self.data.path().to_owned(),
                tensor: name.to_owned(),
                found: tensor.dtype.name().to_owned(),
                expected: "F32",
            });
        }
        // Checked against the file's size at opening, so the length is that of real bytes.
        let mut bytes = vec![0; usize::try_from(tensor.len).expect("a tensor fits the address space")];
        self.data.read_at(tensor.offset, &mut bytes)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
    }
}

fn read_metadata(cursor: &mut Cursor<'_>, pairs: u64) -> Result<BTreeMap<String, GgufValue>> {
    // A key's length, a type and a value take at least 13 bytes.
    cursor.check_count(pairs, 13, "key-value pairs")?;
    if pairs > PAIRS_MAX {
        return Err(cursor.bad(format!("it has {pairs} key-value pairs, at most {PAIRS_MAX} are allowed")));
    }
    let mut metadata = BTreeMap::new();
    for _ in 0..pairs {
        let key = cursor.string()?;
        let kind = cursor.u32()?;
        let value = cursor.value(kind, &key)?;
        if metadata.contains_key(&key) {
            return Err(cursor.bad(format!("key `{key}` occurs twice")));
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

/// Tensor infos as they are written: offsets count from where the tensors' bytes begin.
fn read_infos(cursor: &mut Cursor<'_>, tensors: u64) -> Result<Vec<GgufTensor>> {
    // A name's length, a number of dimensions, a type and an offset.
    cursor.check_count(tensors, 24, "tensors")?;
    let (mut infos, mut names) = (Vec::new(), BTreeSet::new());
    for _ in 0..tensors {
        let name = cursor.string()?;
        let dims = cursor.u32()?;
        if dims > DIMS_MAX {
            return Err(cursor.bad(format!("tensor {name} has {dims} dimensions, at most {DIMS_MAX} are allowed")));
        }
        let shape = (0..dims).map(|_| cursor.u64()).collect::<Result<Vec<_>>>()?;
        let kind = cursor.u32()?;
        let dtype = GgmlType::of(kind)
            .ok_or_else(|| cursor.bad(format!("tensor {name} has the type {kind}, which is unknown")))?;
        let len = dtype
            .bytes_of(&shape)
            .ok_or_else(|| cursor.bad(format!("tensor {name}: shape {shape:?} of {} has no size", dtype.name())))?;
        if len == 0 {
            return Err(cursor.bad(format!("tensor {name} has no elements")));
        }
        let offset = cursor.u64()?;
        if !names.insert(name.clone()) {
            return Err(cursor.bad(format!("tensor {name} occurs twice")));
        }
        push_sparingly(&mut infos, GgufTensor { name, shape, dtype, offset, len });
    }
    Ok(infos)
}

/// Places the tensors in the file, and checks that they lie in it and do not overlap.
fn place(
    cursor: &Cursor<'_>,
    mut infos: Vec<GgufTensor>,
    alignment: u64,
    size: u64,
) -> Result<BTreeMap<String, GgufTensor>> {
    let start = cursor.position().next_multiple_of(alignment);
    for tensor in &mut infos {
        let name = &tensor.name;
        if !tensor.offset.is_multiple_of(alignment) {
            return Err(cursor.bad(format!("tensor {name} is not aligned to {alignment} bytes")));
        }
        let end = start.checked_add(tensor.offset).and_then(|at| at.checked_add(tensor.len));
        match end {
            Some(end) if end <= size => tensor.offset += start,
            _ => return Err(cursor.truncated(format!("tensor {name}"), end.unwrap_or(u64::MAX))),
        }
    }
    infos.sort_by_key(|t| (t.offset, t.len));
    if let Some(pair) = infos.windows(2).find(|pair| pair[0].offset + pair[0].len > pair[1].offset) {
        return Err(cursor.bad(format!("tensors {} and {} overlap", pair[0].name, pair[1].name)));
    }
    Ok(infos.into_iter().map(|t| (t.name.clone(), t)).collect())
}
