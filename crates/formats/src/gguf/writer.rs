//! Writing small GGUF files whole.

use super::header::GgufValue;
use super::{ALIGNMENT, GGUF_MAGIC, GgmlType};

/// A file of version 3 with these key-value pairs and F32 tensors `(name, shape innermost first, values)`. Numbers are
/// written as 32-bit where they fit, an empty array as one of texts.
///
/// The shape must have as many elements as there are values, and an array values of one type.
pub fn gguf_bytes(metadata: &[(String, GgufValue)], tensors: &[(String, Vec<u64>, Vec<f32>)]) -> Vec<u8> {
    let mut out = GGUF_MAGIC.to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut out, key);
        out.extend(kind(value).to_le_bytes());
        put(&mut out, value, kind(value));
    }
    let mut offset = 0u64;
    for (name, shape, values) in tensors {
        debug_assert_eq!(shape.iter().product::<u64>(), values.len() as u64, "{name}");
        text(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|d| out.extend(d.to_le_bytes()));
        out.extend(GgmlType::F32.id().to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += (values.len() as u64 * 4).next_multiple_of(ALIGNMENT);
    }
    for (.., values) in tensors {
        out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
        values.iter().for_each(|v| out.extend(v.to_le_bytes()));
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn kind(value: &GgufValue) -> u32 {
    match value {
        GgufValue::Unsigned(v) if u32::try_from(*v).is_ok() => 4,
        GgufValue::Unsigned(_) => 10,
        GgufValue::Signed(v) if i32::try_from(*v).is_ok() => 5,
        GgufValue::Signed(_) => 11,
        GgufValue::Float(_) => 12,
        GgufValue::Bool(_) => 7,
        GgufValue::Text(_) => 8,
        GgufValue::Array(_) => 9,
    }
}

fn put(out: &mut Vec<u8>, value: &GgufValue, as_kind: u32) {
    match value {
        GgufValue::Unsigned(v) => out.extend(&v.to_le_bytes()[..if as_kind == 4 { 4 } else { 8 }]),
        GgufValue::Signed(v) => out.extend(&v.to_le_bytes()[..if as_kind == 5 { 4 } else { 8 }]),
        GgufValue::Float(v) => out.extend(v.to_le_bytes()),
        GgufValue::Bool(v) => out.push(u8::from(*v)),
        GgufValue::Text(v) => text(out, v),
        GgufValue::Array(values) => {
            // The widest, so that every value fits.
            let inner = values.iter().map(kind).max().unwrap_or(8);
            out.extend(inner.to_le_bytes());
            out.extend((values.len() as u64).to_le_bytes());
            values.iter().for_each(|v| put(out, v, inner));
        }
    }
}
