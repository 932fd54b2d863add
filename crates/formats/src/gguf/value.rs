//! Values of GGUF metadata. Arrays lie in memory as they lie in the file.

use std::fmt;

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
    Array(GgufArray),
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

    /// An array of these values, which are of one type.
    ///
    /// # Panics
    /// If they are not, or are arrays.
    pub fn list(values: impl IntoIterator<Item = GgufValue>) -> GgufValue {
        GgufValue::Array(GgufArray::of(values))
    }

    /// The number that stands for the narrowest common type which holds the value.
    pub(super) fn kind(&self) -> u32 {
        match self {
            GgufValue::Unsigned(v) if u32::try_from(*v).is_ok() => 4,
            GgufValue::Unsigned(_) => 10,
            GgufValue::Signed(v) if i32::try_from(*v).is_ok() => 5,
            GgufValue::Signed(_) => 11,
            GgufValue::Float(v) if f64::from(*v as f32) == *v || v.is_nan() => 6,
            GgufValue::Float(_) => 12,
            GgufValue::Bool(_) => 7,
            GgufValue::Text(_) => 8,
            GgufValue::Array(_) => 9,
        }
    }

    /// Writes the value as one of a type that holds it.
    pub(super) fn put(&self, out: &mut Vec<u8>, kind: u32) {
        match self {
            GgufValue::Unsigned(v) => out.extend(&v.to_le_bytes()[..if kind == 4 { 4 } else { 8 }]),
            GgufValue::Signed(v) => out.extend(&v.to_le_bytes()[..if kind == 5 { 4 } else { 8 }]),
            GgufValue::Float(v) if kind == 6 => out.extend((*v as f32).to_le_bytes()),
            GgufValue::Float(v) => out.extend(v.to_le_bytes()),
            GgufValue::Bool(v) => out.push(u8::from(*v)),
            GgufValue::Text(v) => {
                out.extend((v.len() as u64).to_le_bytes());
                out.extend(v.as_bytes());
            }
            GgufValue::Array(array) => {
                out.extend(array.kind.to_le_bytes());
                out.extend((array.len as u64).to_le_bytes());
                out.extend(&array.bytes);
            }
        }
    }
}

/// Values of one type: numbers, truth values or texts. They take the bytes that they take in the file, so that no count in a
/// header costs more memory than the file has.
#[derive(Clone)]
pub struct GgufArray {
    kind: u32,
    len: usize,
    /// Texts with their lengths before them.
    bytes: Vec<u8>,
}

impl GgufArray {
    /// Values as they lie in a file.
    ///
    /// # Errors
    /// What is wrong with them.
    pub(super) fn checked(kind: u32, len: usize, bytes: Vec<u8>) -> Result<GgufArray, &'static str> {
        let array = GgufArray { kind, len, bytes };
        match kind {
            7 if array.bytes.iter().any(|&b| b > 1) => Err("a truth value that is neither 0 nor 1"),
            8 if array.raw_texts().any(|text| std::str::from_utf8(text).is_err()) => Err("a text that is not UTF-8"),
            _ => Ok(array),
        }
    }

    fn of(values: impl IntoIterator<Item = GgufValue>) -> GgufArray {
        let values: Vec<GgufValue> = values.into_iter().collect();
        // The widest, so that every value fits.
        let kind = values.iter().map(GgufValue::kind).max().unwrap_or(8);
        let same = values.windows(2).all(|pair| std::mem::discriminant(&pair[0]) == std::mem::discriminant(&pair[1]));
        assert!(same && kind != 9, "an array has values of one type, and no arrays");
        let mut bytes = Vec::new();
        values.iter().for_each(|value| value.put(&mut bytes, kind));
        GgufArray { kind, len: values.len(), bytes }
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The values, one by one.
    pub fn iter(&self) -> impl Iterator<Item = GgufValue> + '_ {
        let texts = self.raw_texts().map(|text| GgufValue::Text(String::from_utf8_lossy(text).into_owned()));
        let width = width(self.kind).unwrap_or(1);
        let of_numbers = if self.kind == 8 { &[][..] } else { &self.bytes };
        texts.chain(of_numbers.chunks_exact(width).map(|bytes| number(self.kind, bytes)))
    }

    /// The texts, if that is what it holds. No values are no texts too.
    pub fn texts(&self) -> Option<Vec<&str>> {
        let texts = || self.raw_texts().map(std::str::from_utf8).collect::<Result<_, _>>().ok();
        if self.kind == 8 || self.is_empty() { texts() } else { None }
    }

    fn raw_texts(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = if self.kind == 8 { self.bytes.as_slice() } else { &[] };
        std::iter::from_fn(move || {
            let (len, after) = rest.split_first_chunk::<8>()?;
            let (text, after) = after.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
            rest = after;
            Some(text)
        })
    }
}

impl PartialEq for GgufArray {
    /// Whether the values are the same, in whatever width.
    fn eq(&self, other: &GgufArray) -> bool {
        match self.kind == other.kind {
            true => self.len == other.len && self.bytes == other.bytes,
            false => self.len == other.len && self.iter().eq(other.iter()),
        }
    }
}

impl fmt::Debug for GgufArray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// Bytes of a number or truth value of a type; `None` of texts, arrays and types that are unknown.
pub(super) fn width(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// A number or truth value, which has the bytes of its type.
pub(super) fn number(kind: u32, bytes: &[u8]) -> GgufValue {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    let unsigned = u64::from_le_bytes(word);
    let shift = 64 - 8 * bytes.len() as u32;
    match kind {
        1 | 3 | 5 | 11 => GgufValue::Signed((unsigned << shift).cast_signed() >> shift),
        6 => GgufValue::Float(f64::from(f32::from_bits(unsigned as u32))),
        12 => GgufValue::Float(f64::from_bits(unsigned)),
        7 => GgufValue::Bool(unsigned != 0),
        _ => GgufValue::Unsigned(unsigned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_hold_what_was_put_into_them() {
        let lists = [
            vec![GgufValue::Unsigned(1), GgufValue::Unsigned(1 << 40)],
            vec![GgufValue::Signed(-1), GgufValue::Signed(i64::MIN)],
            vec![GgufValue::Signed(-7)],
            vec![GgufValue::Float(0.5), GgufValue::Float(0.1)],
            vec![GgufValue::Bool(true), GgufValue::Bool(false)],
            vec![GgufValue::Text("a".into()), GgufValue::Text(String::new()), GgufValue::Text("ü".into())],
            vec![],
        ];
        for values in lists {
            let array = GgufArray::of(values.clone());
            assert_eq!((array.len(), array.is_empty()), (values.len(), values.is_empty()));
            assert_eq!(array.iter().collect::<Vec<_>>(), values);
            let texts = values.iter().map(GgufValue::as_str).collect::<Option<Vec<_>>>();
            assert_eq!(array.texts(), texts);
        }
    }

    #[test]
    fn widths_do_not_count_signs_do() {
        let array = |kind, bytes: &[u8]| GgufArray::checked(kind, 2, bytes.to_vec()).unwrap();
        assert_eq!(array(0, &[1, 255]), array(2, &[1, 0, 255, 0]));
        assert_ne!(array(0, &[1, 255]), array(1, &[1, 255]));
        assert_eq!(array(1, &[1, 255]), GgufArray::of([1, -1].map(GgufValue::Signed)));
    }

    #[test]
    #[should_panic(expected = "values of one type")]
    fn mixed_values_are_a_bug() {
        let _ = GgufValue::list([GgufValue::Bool(true), GgufValue::Unsigned(1)]);
    }
}
