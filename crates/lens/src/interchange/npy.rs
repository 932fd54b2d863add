//! numpy's `.npy`: integer arrays.

/// First bytes of a file.
pub(super) const MAGIC: &[u8] = b"\x93NUMPY";

/// An array of integers in C order.
pub(super) struct IntArray {
    pub shape: Vec<usize>,
    pub values: Vec<i64>,
}

/// Reads an array of little-endian integers in C order.
pub(super) fn read_integers(bytes: &[u8]) -> Result<IntArray, String> {
    let cut = || "the .npy file is cut off".to_string();
    let rest = bytes.strip_prefix(MAGIC).ok_or("it is no .npy file")?;
    let (version, rest) = rest.split_at_checked(2).ok_or_else(cut)?;
    let (len, rest) = match version[0] {
        1 => {
            rest.split_first_chunk::<2>().map(|(n, rest)| (u32::from(u16::from_le_bytes(*n)), rest)).ok_or_else(cut)?
        }
        2 | 3 => rest.split_first_chunk::<4>().map(|(n, rest)| (u32::from_le_bytes(*n), rest)).ok_or_else(cut)?,
        other => return Err(format!("version {other} of .npy is unknown")),
    };
    let (header, data) = rest.split_at_checked(len as usize).ok_or_else(cut)?;
    let header = std::str::from_utf8(header).map_err(|_| "the .npy header is no text")?;
    let kind = field(header, "descr")?.trim_matches(['\'', '"']).to_string();
    match field(header, "fortran_order")? {
        "False" => {}
        _ => return Err("the array is in Fortran order; help: save np.ascontiguousarray(x)".into()),
    }
    let shape = field(header, "shape")?.trim_start_matches('(').trim_end_matches(')').split(',').map(str::trim);
    let shape = shape.filter(|d| !d.is_empty()).map(|d| d.parse().map_err(|_| format!("`{d}` is no dimension")));
    let shape = shape.collect::<Result<Vec<usize>, String>>()?;
    let values: Vec<i64> = match kind.as_str() {
        "|u1" | "<u1" => data.iter().map(|&b| i64::from(b)).collect(),
        "|i1" | "<i1" => data.iter().map(|&b| i64::from(b as i8)).collect(),
        "<u2" => words(data, |b| i64::from(u16::from_le_bytes(b)))?,
        "<i2" => words(data, |b| i64::from(i16::from_le_bytes(b)))?,
        "<u4" => words(data, |b| i64::from(u32::from_le_bytes(b)))?,
        "<i4" => words(data, |b| i64::from(i32::from_le_bytes(b)))?,
        "<i8" => words(data, i64::from_le_bytes)?,
        "<u8" => words(data, |b| i64::try_from(u64::from_le_bytes(b)).unwrap_or(i64::MAX))?,
        _ => return Err(format!("the array has the type {kind}, little-endian integers are needed")),
    };
    let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    if elements != Some(values.len()) {
        return Err(format!("shape {shape:?} does not fit the {} numbers that follow", values.len()));
    }
    Ok(IntArray { shape, values })
}

fn words<const N: usize>(data: &[u8], value: impl Fn([u8; N]) -> i64) -> Result<Vec<i64>, String> {
    let (words, rest) = data.as_chunks::<N>();
    if !rest.is_empty() {
        return Err("the .npy file ends inside a number".into());
    }
    Ok(words.iter().map(|&b| value(b)).collect())
}

/// The text of a field in the header, a Python dictionary of one text, one truth value and one tuple.
fn field<'a>(header: &'a str, name: &str) -> Result<&'a str, String> {
    let missing = || format!("the .npy header has no `{name}`");
    let at = header.find(&format!("'{name}'")).ok_or_else(missing)?;
    let rest = header[at + name.len() + 2..].trim_start().strip_prefix(':').ok_or_else(missing)?.trim_start();
    let end = match rest.strip_prefix('(') {
        Some(inside) => inside.find(')').map(|i| i + 2),
        None => rest.find([',', '}']),
    };
    end.map(|end| rest[..end].trim()).ok_or_else(missing)
}
