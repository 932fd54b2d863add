//! Files of `torch.save`: a zip archive of uncompressed members, a pickle and one member for each storage.

use super::pickle::{Element, Pickle, TensorRef};

/// An open file.
pub(super) struct TorchFile<'a> {
    /// Members by name without the archive's folder.
    members: Vec<(&'a str, &'a [u8])>,
}

const END: [u8; 4] = *b"PK\x05\x06";
const CENTRAL: [u8; 4] = *b"PK\x01\x02";
const LOCAL: [u8; 4] = *b"PK\x03\x04";

impl<'a> TorchFile<'a> {
    /// Finds the members.
    pub fn open(bytes: &'a [u8]) -> Result<TorchFile<'a>, String> {
        if bytes.starts_with(&[0x80]) {
            return Err("it is of a torch older than 1.6; help: load and save it again with a newer one".into());
        }
        let cut = || "the archive is damaged or cut off".to_string();
        // The end record is followed by a comment of at most 65535 bytes.
        let from = bytes.len().saturating_sub(22 + 65535);
        let end = bytes[from..].windows(4).rposition(|w| w == END).ok_or_else(cut)? + from;
        let (count, start) = (u16_at(bytes, end + 10)?, u32_at(bytes, end + 16)?);
        let (mut members, mut at) = (Vec::new(), start as usize);
        for _ in 0..count {
            if bytes.get(at..at + 4) != Some(&CENTRAL[..]) {
                return Err(cut());
            }
            let (method, packed, size) = (u16_at(bytes, at + 10)?, u32_at(bytes, at + 20)?, u32_at(bytes, at + 24)?);
            let [name, extra, comment] = [28, 30, 32].map(|o| u16_at(bytes, at + o).map(usize::from));
            let (name_len, extra, comment, local) = (name?, extra?, comment?, u32_at(bytes, at + 42)? as usize);
            let name = bytes.get(at + 46..at + 46 + name_len).ok_or_else(cut)?;
            let name = std::str::from_utf8(name).map_err(|_| "a member's name is no text")?;
            if [packed, size].contains(&u32::MAX) {
                return Err(format!("member {name} is larger than 4 GiB"));
            }
            if method != 0 || packed != size {
                return Err(format!("member {name} is compressed; torch.save writes none such"));
            }
            if bytes.get(local..local.saturating_add(4)) != Some(&LOCAL[..]) {
                return Err(cut());
            }
            let skip = usize::from(u16_at(bytes, local + 26)?) + usize::from(u16_at(bytes, local + 28)?);
            let data = local + 30 + skip;
            let data = bytes.get(data..data + size as usize).ok_or_else(cut)?;
            members.push((name.split_once('/').map_or(name, |(_, inner)| inner), data));
            at += 46 + name_len + extra + comment;
        }
        let file = TorchFile { members };
        if file.member("byteorder").is_ok_and(|order| order.trim_ascii() != b"little") {
            return Err("it was written on a big-endian machine".into());
        }
        Ok(file)
    }

    fn member(&self, name: &str) -> Result<&'a [u8], String> {
        let found = self.members.iter().find(|(n, _)| *n == name);
        found.map(|(_, data)| *data).ok_or_else(|| format!("it has no member `{name}`; help: is it of torch.save?"))
    }

    /// What the file holds.
    pub fn pickle(&self) -> Result<Pickle, String> {
        Pickle::read(self.member("data.pkl")?)
    }

    /// Shape and values of a tensor of integers, in C order.
    pub fn integers(&self, tensor: &TensorRef) -> Result<(Vec<usize>, Vec<i64>), String> {
        let bad = |problem: &str| format!("a tensor of storage {}: {problem}", tensor.storage);
        let data = self.member(&format!("data/{}", tensor.storage))?;
        let width = tensor.element.bytes();
        if tensor.elements.checked_mul(width) != Some(data.len()) {
            return Err(bad(&format!("{} numbers of {width} bytes in {} bytes", tensor.elements, data.len())));
        }
        let total = tensor.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        // No more numbers than are stored: a repeated stride cannot make them many.
        let total =
            total.filter(|&n| n <= tensor.elements).ok_or_else(|| bad("it has more numbers than are stored"))?;
        if total == 0 {
            return Ok((tensor.shape.clone(), Vec::new()));
        }
        let reach = |at: usize, (&size, &stride): (&usize, &usize)| at.checked_add((size - 1).checked_mul(stride)?);
        let last = tensor.shape.iter().zip(&tensor.strides).try_fold(tensor.offset, reach);
        if last.is_none_or(|last| last >= tensor.elements) {
            return Err(bad("it reaches beyond its storage"));
        }
        let mut index = vec![0; tensor.shape.len()];
        let mut values = Vec::with_capacity(total);
        for _ in 0..total {
            let at = tensor.offset + index.iter().zip(&tensor.strides).map(|(i, s)| i * s).sum::<usize>();
            let number = tensor.element.integer(&data[at * width..(at + 1) * width]);
            values.push(number.ok_or_else(|| bad("it has no integers"))?);
            for d in (0..index.len()).rev() {
                index[d] += 1;
                if index[d] < tensor.shape[d] {
                    break;
                }
                index[d] = 0;
            }
        }
        Ok((tensor.shape.clone(), values))
    }
}

impl Element {
    fn bytes(self) -> usize {
        match self {
            Element::I8 | Element::U8 => 1,
            Element::I16 | Element::F16 => 2,
            Element::I32 | Element::F32 => 4,
            Element::I64 | Element::F64 => 8,
        }
    }

    fn integer(self, bytes: &[u8]) -> Option<i64> {
        Some(match self {
            Element::U8 => i64::from(*bytes.first()?),
            Element::I8 => i64::from(*bytes.first()? as i8),
            Element::I16 => i64::from(i16::from_le_bytes(bytes.try_into().ok()?)),
            Element::I32 => i64::from(i32::from_le_bytes(bytes.try_into().ok()?)),
            Element::I64 => i64::from_le_bytes(bytes.try_into().ok()?),
            Element::F16 | Element::F32 | Element::F64 => return None,
        })
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, String> {
    let found = bytes.get(at..).and_then(|b| b.first_chunk::<2>());
    found.map(|b| u16::from_le_bytes(*b)).ok_or_else(|| "the archive is cut off".to_string())
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, String> {
    let found = bytes.get(at..).and_then(|b| b.first_chunk::<4>());
    found.map(|b| u32::from_le_bytes(*b)).ok_or_else(|| "the archive is cut off".to_string())
}
