//! The safetensors container: a checked header, and reads of single tensors.
//!
//! A file is `u64` header length (little endian), a JSON header, and the tensors' bytes without gaps. Nothing in the
//! header is believed before it is checked against the file's size.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};

use crate::datafile::push_sparingly;
use crate::{DataFile, FormatError, GgmlType, Result};

/// Longest header that is read.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;

macro_rules! stored_dtypes {
    ($($variant:ident $name:literal $bits:literal),* $(,)?) => {
        /// Element type of a stored tensor.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(non_camel_case_types, reason = "the format's own names")]
        pub enum StoredDType {
            $(#[doc = concat!("`", $name, "`.")] $variant,)*
            /// Blocks of a GGUF file.
            Blocks(GgmlType),
        }

        impl StoredDType {
            /// The name in a safetensors header, or that of ggml.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* Self::Blocks(kind) => kind.name() }
            }

            /// Bits of one element; of blocks, on average and rounded down.
            pub fn bits(self) -> u64 {
                match self {
                    $(Self::$variant => $bits,)*
                    Self::Blocks(kind) => kind.block().1 * 8 / kind.block().0,
                }
            }

            /// The type of that name in a safetensors header.
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

stored_dtypes! {
    Bool "BOOL" 8, F4 "F4" 4, F6E2M3 "F6_E2M3" 6, F6E3M2 "F6_E3M2" 6, U8 "U8" 8, I8 "I8" 8, F8E5M2 "F8_E5M2" 8,
    F8E4M3 "F8_E4M3" 8, F8E8M0 "F8_E8M0" 8, I16 "I16" 16, U16 "U16" 16, F16 "F16" 16, Bf16 "BF16" 16, I32 "I32" 32,
    U32 "U32" 32, F32 "F32" 32, C64 "C64" 64, F64 "F64" 64, I64 "I64" 64, U64 "U64" 64,
}

impl fmt::Display for StoredDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl StoredDType {
    /// Whether numbers come in blocks.
    pub fn is_blocks(self) -> bool {
        matches!(self, Self::Blocks(_))
    }

    /// The kernels' type for it, if there are kernels for it.
    pub fn computable(self) -> Option<quorate_kernels::DType> {
        match self {
            Self::F32 => Some(quorate_kernels::DType::F32),
            Self::F16 => Some(quorate_kernels::DType::F16),
            Self::Bf16 => Some(quorate_kernels::DType::BF16),
            Self::Blocks(kind) => quorate_kernels::DType::ALL.iter().copied().find(|dtype| dtype.name() == kind.name()),
            _ => None,
        }
    }

    /// Bytes of a tensor of this type and shape; `None` on overflow, or if the last byte or a row's last block is not full.
    pub fn bytes_of(self, shape: &[usize]) -> Option<u64> {
        if let Self::Blocks(kind) = self {
            return kind.bytes_of(&shape.iter().rev().map(|&d| d as u64).collect::<Vec<_>>());
        }
        let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64))?;
        let bits = elements.checked_mul(self.bits())?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

/// Where one tensor lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorLoc {
    /// Its name in the file.
    pub name: String,
    /// Index into the data files.
    pub file: usize,
    /// Element type.
    pub dtype: StoredDType,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl TensorLoc {
    /// Number of elements. It was checked at opening and cannot overflow.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product()
    }
}

/// One open safetensors file: its index, and reads of single tensors.
#[derive(Debug)]
pub struct SafetensorsFile {
    data: DataFile,
    metadata: BTreeMap<String, String>,
    /// In the order of their offsets.
    tensors: Vec<TensorLoc>,
    by_name: BTreeMap<String, usize>,
}

impl SafetensorsFile {
    /// Opens a file and reads its header, no tensor.
    ///
    /// # Errors
    /// The file cannot be read, or its header is not that of a whole and well-formed file.
    pub fn open(path: &Path) -> Result<Self> {
        let data = DataFile::open(path)?;
        let mut length = [0; 8];
        if data.size() < 8 {
            return Err(truncated(&data, "the header length".to_owned(), 8));
        }
        data.read_at(0, &mut length)?;
        let header_len = u64::from_le_bytes(length);
        if header_len > HEADER_BYTES_MAX {
            let problem = format!("a header of {header_len} bytes, at most {HEADER_BYTES_MAX} are allowed");
            return Err(FormatError::Header { path: path.to_owned(), problem });
        }
        let data_start = 8 + header_len;
        if data_start > data.size() {
            return Err(truncated(&data, format!("the header of {header_len} bytes"), data_start));
        }
        let header_len = usize::try_from(header_len).expect("at most HEADER_BYTES_MAX");
        let mut header = vec![0; header_len];
        data.read_at(8, &mut header)?;
        let header: RawHeader = serde_json::from_slice(&header)
            .map_err(|e| FormatError::Header { path: path.to_owned(), problem: e.to_string() })?;
        let tensors = check(&data, data_start, header.tensors)?;
        let by_name: BTreeMap<_, _> = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(Self { data, metadata: header.metadata, tensors, by_name })
    }

    /// The file's own key-value pairs (`__metadata__`).
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// All tensors, in the order of their bytes.
    pub fn tensors(&self) -> &[TensorLoc] {
        &self.tensors
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn tensor(&self, name: &str) -> Result<&TensorLoc> {
        let index = self
            .by_name
            .get(name)
            .ok_or_else(|| FormatError::NoTensor { path: self.data.path().to_owned(), tensor: name.to_owned() })?;
        Ok(&self.tensors[*index])
    }

    /// The open file.
    pub fn data(&self) -> &DataFile {
        &self.data
    }

    /// Index and file apart, with `file` as the index's file number.
    pub(crate) fn into_parts(mut self, file: usize) -> (DataFile, Vec<TensorLoc>) {
        self.tensors.iter_mut().for_each(|t| t.file = file);
        (self.data, self.tensors)
    }

    /// The values of a float tensor (F32, F16, BF16 or F64), as f32. For small files: all of it is read.
    ///
    /// # Errors
    /// No such tensor, another type, or the file cannot be read.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        read_tensor_f32(&self.data, self.tensor(name)?)
    }

    /// The values of an I64 or I32 tensor. For small files: all of it is read.
    ///
    /// # Errors
    /// No such tensor, another type, or the file cannot be read.
    pub fn read_i64(&self, name: &str) -> Result<Vec<i64>> {
        let loc = self.tensor(name)?;
        let bytes = read_tensor_bytes(&self.data, loc)?;
        match loc.dtype {
            StoredDType::I64 => Ok(words(&bytes, i64::from_le_bytes)),
            StoredDType::I32 => Ok(words(&bytes, |b| i64::from(i32::from_le_bytes(b)))),
            _ => Err(wrong_dtype(&self.data, loc, "I64 or I32")),
        }
    }

    /// The values of an F64 tensor. For small files: all of it is read.
    ///
    /// # Errors
    /// No such tensor, another type, or the file cannot be read.
    pub fn read_f64(&self, name: &str) -> Result<Vec<f64>> {
        let loc = self.tensor(name)?;
        match loc.dtype {
            StoredDType::F64 => Ok(words(&read_tensor_bytes(&self.data, loc)?, f64::from_le_bytes)),
            _ => Err(wrong_dtype(&self.data, loc, "F64")),
        }
    }
}

/// The bytes of a tensor that lies in `data`.
///
/// # Errors
/// The file cannot be read.
pub fn read_tensor_bytes(data: &DataFile, loc: &TensorLoc) -> Result<Vec<u8>> {
    // Checked against the file's size at opening, so the length is that of real bytes.
    let mut bytes = vec![0; usize::try_from(loc.len).expect("a tensor fits the address space")];
    data.read_at(loc.offset, &mut bytes)?;
    Ok(bytes)
}

/// The values of a float tensor (F32, F16, BF16 or F64) that lies in `data`, as f32.
///
/// # Errors
/// Another type, or the file cannot be read.
pub fn read_tensor_f32(data: &DataFile, loc: &TensorLoc) -> Result<Vec<f32>> {
    let bytes = read_tensor_bytes(data, loc)?;
    match loc.dtype {
        StoredDType::F32 => Ok(words(&bytes, f32::from_le_bytes)),
        StoredDType::F16 => Ok(words(&bytes, |b| half::f16::from_le_bytes(b).to_f32())),
        StoredDType::Bf16 => Ok(words(&bytes, |b| half::bf16::from_le_bytes(b).to_f32())),
        StoredDType::F64 => Ok(words(&bytes, |b| f64::from_le_bytes(b) as f32)),
        _ => Err(wrong_dtype(data, loc, "F32, F16, BF16 or F64")),
    }
}

fn words<const N: usize, T>(bytes: &[u8], value: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|&b| value(b)).collect()
}

fn wrong_dtype(data: &DataFile, loc: &TensorLoc, expected: &'static str) -> FormatError {
    FormatError::DType {
        path: data.path().to_owned(),
        tensor: loc.name.clone(),
        found: loc.dtype.name().to_owned(),
        expected,
    }
}

fn truncated(data: &DataFile, what: String, expected: u64) -> FormatError {
    FormatError::Truncated { path: data.path().to_owned(), what, expected, found: data.size() }
}

/// Header as it is written, unchecked.
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawTensor)>,
}

#[derive(serde::Deserialize)]
struct RawTensor {
    dtype: Box<str>,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Reads the entries in order, so that a name written twice is seen.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut header = RawHeader { metadata: BTreeMap::new(), tensors: Vec::new() };
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                header.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
            } else {
                let tensor = map.next_value();
                let tensor = tensor.map_err(|e| de::Error::custom(format!("tensor {name}: {e}")))?;
                push_sparingly(&mut header.tensors, (name, tensor));
            }
        }
        Ok(header)
    }
}

/// Checks every entry against its own shape, the others and the file. Returns them by offset.
fn check(data: &DataFile, data_start: u64, raw: Vec<(String, RawTensor)>) -> Result<Vec<TensorLoc>> {
    let data_len = data.size() - data_start;
    let mut tensors = Vec::with_capacity(raw.len());
    for (name, raw) in raw {
        let (begin, end) = raw.data_offsets;
        let refuse =
            |problem: String| FormatError::TensorEntry { path: data.path().to_owned(), tensor: name.clone(), problem };
        let dtype =
            StoredDType::from_name(&raw.dtype).ok_or_else(|| refuse(format!("unknown dtype {:?}", raw.dtype)))?;
        let needed = dtype
            .bytes_of(&raw.shape)
            .ok_or_else(|| refuse(format!("shape {:?} of {dtype} has no possible size", raw.shape)))?;
        let len = end
            .checked_sub(begin)
            .ok_or_else(|| refuse(format!("its bytes end at {end}, before they begin at {begin}")))?;
        if len != needed {
            let shape = &raw.shape;
            return Err(refuse(format!("shape {shape:?} of {dtype} needs {needed} bytes, the offsets span {len}")));
        }
        if end > data_len {
            return Err(truncated(data, format!("tensor {name}"), data_start.saturating_add(end)));
        }
        tensors.push(TensorLoc { name, file: 0, dtype, shape: raw.shape, offset: data_start + begin, len });
    }
    check_names(data, &tensors)?;
    tensors.sort_by_key(|t| (t.offset, t.len));
    check_cover(data, data_start, &tensors)?;
    Ok(tensors)
}

fn check_names(data: &DataFile, tensors: &[TensorLoc]) -> Result<()> {
    let mut names: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => Err(FormatError::TensorEntry {
            path: data.path().to_owned(),
            tensor: pair[0].to_owned(),
            problem: "the name occurs twice".to_owned(),
        }),
    }
}

/// The format allows neither overlaps nor gaps nor bytes behind the last tensor.
fn check_cover(data: &DataFile, data_start: u64, tensors: &[TensorLoc]) -> Result<()> {
    let mut at = data_start;
    for tensor in tensors {
        if tensor.offset != at {
            let kind = if tensor.offset < at { "overlap another tensor's" } else { "leave a gap before them" };
            return Err(FormatError::TensorEntry {
                path: data.path().to_owned(),
                tensor: tensor.name.clone(),
                problem: format!("its bytes {kind}"),
            });
        }
        at += tensor.len;
    }
    if at != data.size() {
        let problem = format!("{} bytes follow the last tensor", data.size() - at);
        return Err(FormatError::Header { path: data.path().to_owned(), problem });
    }
    Ok(())
}
