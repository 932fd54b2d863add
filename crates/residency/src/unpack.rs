//! Weights that do not lie in their files as they are computed with: transposed, interleaved, reordered, or packed in small
//! floats.

use quorate_formats::{Checkpoint, FormatError, Recipe, StoredDType, TensorLoc};
use quorate_kernels::{DType, dequantize, quantize};

use crate::error::Result;

mod int4;

/// Reads what a recipe names and writes the weight's values, row after row, in the recipe's type; `out` has their length.
pub(crate) fn unpack(checkpoint: &Checkpoint, recipe: &Recipe, out: &mut [u8]) -> Result<()> {
    let read = |loc: &TensorLoc| {
        let mut bytes = vec![0; usize::try_from(loc.len).expect("weights that are loaded fit the address space")];
        checkpoint.read_into(loc, &mut bytes)?;
        Ok::<_, crate::ResidencyError>(bytes)
    };
    match recipe {
        Recipe::Columns { matrix, first, step, count } => {
            let size = element_bytes(matrix);
            columns(&read(matrix)?, size, [matrix.shape[0], matrix.shape[1]], [*first, *step, *count], out);
        }
        Recipe::EverySecond { matrix, first } => {
            let (bytes, size) = (read(matrix)?, element_bytes(matrix));
            let chosen = bytes.chunks_exact(size).skip(*first).step_by(2);
            out.chunks_exact_mut(size).zip(chosen).for_each(|(out, value)| out.copy_from_slice(value));
        }
        Recipe::Reordered { matrix, order } => {
            let bytes = read(matrix)?;
            let rows: usize = matrix.shape[..matrix.shape.len().saturating_sub(1).max(1)].iter().product();
            let row = bytes.len() / rows.max(1);
            for (out, from) in out.chunks_exact_mut(row.max(1)).zip(order.rows()) {
                out.copy_from_slice(&bytes[from * row..][..row]);
            }
        }
        Recipe::KeysValues { keys, values } => {
            let (k, v) = (read(keys)?, read(values)?);
            let [heads, rank, nope] = [0, 1, 2].map(|axis| keys.shape[axis]);
            let sizes = [rank, nope, values.shape[1]];
            // A head at a time: widened, all of them would take several times what they are kept in.
            let each = |bytes: &[u8]| (bytes.len() / heads.max(1)).max(1);
            let (of_heads, size) = (k.chunks_exact(each(&k)).zip(v.chunks_exact(each(&v))), each(out));
            for (out, (k, v)) in out.chunks_exact_mut(size).zip(of_heads) {
                let [k, v] = [(keys, k), (values, v)].map(|(loc, bytes)| {
                    let mut numbers = vec![0.0; loc.shape[1] * loc.shape[2]];
                    dequantize(computable(loc.dtype), bytes, &mut numbers);
                    numbers
                });
                quantize(computable(recipe.dtype()), &keys_values(&k, &v, sizes), out);
            }
        }
        Recipe::LogOfNegative { vector } => {
            let logs: Vec<f32> = widened(vector, &read(vector)?).iter().map(|x| (-x).ln()).collect();
            quantize(computable(recipe.dtype()), &logs, out);
        }
        Recipe::Scaled { values, scales, block } => {
            let decode = if values.dtype == StoredDType::I8 { |code: u8| f32::from(code as i8) } else { e4m3 };
            let factors = widened(scales, &read(scales)?);
            scaled(&read(values)?, decode, values.shape[1], &factors, scales.shape[1], *block, out);
        }
        Recipe::Int4(int4) => {
            let parts = int4::Parts {
                codes: words(&read(&int4.codes)?),
                scales: widened(&int4.scales, &read(&int4.scales)?),
                zeros: int4.zeros.as_ref().map(&read).transpose()?.map(|bytes| words(&bytes)),
                groups: int4.groups.as_ref().map(&read).transpose()?.map(|bytes| words(&bytes)),
            };
            int4::unpack(int4, &parts, out).map_err(|problem| FormatError::TensorEntry {
                path: checkpoint.files()[int4.codes.file].path().to_owned(),
                tensor: int4.codes.name.clone(),
                problem,
            })?;
        }
        Recipe::Mxfp4 { blocks, scales, first, step } => {
            let per_row = scales.shape[1];
            mxfp4(&read(blocks)?, &read(scales)?, per_row, *first, *step, out);
        }
    }
    Ok(())
}

fn computable(dtype: StoredDType) -> DType {
    dtype.computable().expect("a checkpoint's types are checked at opening")
}

/// The values of a stored tensor.
fn widened(loc: &TensorLoc, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; loc.shape.iter().product()];
    dequantize(computable(loc.dtype), bytes, &mut values);
    values
}

/// Of a head: the `nope` columns of its keys' matrix `[rank, nope]` as rows, then the rows of its values' `[width, rank]`.
fn keys_values(keys: &[f32], values: &[f32], [rank, nope, width]: [usize; 3]) -> Vec<f32> {
    let mut joined = Vec::with_capacity((nope + width) * rank);
    joined.extend((0..nope * rank).map(|i| keys[i % rank * nope + i / rank]));
    joined.extend_from_slice(&values[..width * rank]);
    joined
}

fn element_bytes(loc: &TensorLoc) -> usize {
    (loc.dtype.bits() / 8) as usize
}

/// Columns `first`, `first + step`, .. (`count` of them) of a matrix of `rows x cols` elements, as rows.
fn columns(matrix: &[u8], size: usize, [rows, cols]: [usize; 2], [first, step, count]: [usize; 3], out: &mut [u8]) {
    for c in 0..count {
        for r in 0..rows {
            let from = (r * cols + first + c * step) * size;
            out[(c * rows + r) * size..][..size].copy_from_slice(&matrix[from..from + size]);
        }
    }
}

/// Bytes' values times the scale of their block, as f32.
fn scaled(
    values: &[u8],
    decode: fn(u8) -> f32,
    cols: usize,
    scales: &[f32],
    scales_per_row: usize,
    block: [usize; 2],
    out: &mut [u8],
) {
    for (i, (&code, out)) in values.iter().zip(out.as_chunks_mut::<4>().0).enumerate() {
        let scale = scales[i / cols / block[0] * scales_per_row + i % cols / block[1]];
        *out = (decode(code) * scale).to_le_bytes();
    }
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|&word| u32::from_le_bytes(word)).collect()
}

/// An 8-bit float: sign, 4 bits of exponent biased by 7, 3 of mantissa; no infinities, and `0x7f` is not a number.
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let size = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & 128 == 0 { size } else { -size }
}

/// 4-bit floats: sign, 2 bits of exponent, 1 of mantissa.
const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// Rows `first`, `first + step`, .. of blocks of 32 with 16 bytes each, as bf16, which holds all values exactly.
fn mxfp4(blocks: &[u8], scales: &[u8], per_row: usize, first: usize, step: usize, out: &mut [u8]) {
    let rows = out.len() / (per_row * 64);
    let mut out = out.chunks_exact_mut(2);
    for row in 0..rows {
        for b in 0..per_row {
            let at = (first + row * step) * per_row + b;
            // Biased by 127, as in an f32; below its smallest normal number nothing is left of 4 bits.
            let scale = 2f32.powi(i32::from(scales[at]) - 127);
            for byte in &blocks[at * 16..at * 16 + 16] {
                for nibble in [byte & 15, byte >> 4] {
                    let size = E2M1[usize::from(nibble & 7)] * scale;
                    let value = if nibble & 8 == 0 { size } else { -size };
                    if let Some(out) = out.next() {
                        out.copy_from_slice(&((value.to_bits() >> 16) as u16).to_le_bytes());
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_become_rows() {
        let matrix = [0u8, 1, 2, 3, 10, 11, 12, 13]; // 2 x 4
        let mut out = [0; 4];
        columns(&matrix, 1, [2, 4], [1, 2, 2], &mut out);
        assert_eq!(out, [1, 11, 3, 13]);
    }

    #[test]
    fn keys_are_turned_and_values_follow() {
        // Rank 2, two key rows and one of values.
        assert_eq!(keys_values(&[1.0, 2.0, 3.0, 4.0], &[5.0, 6.0], [2, 2, 1]), [1.0, 3.0, 2.0, 4.0, 5.0, 6.0]);
    }

    #[test]
    fn small_floats() {
        assert_eq!([0x38, 0x39, 0xb8, 0x7e, 0x01, 0x00].map(e4m3), [1.0, 1.125, -1.0, 448.0, 2f32.powi(-9), 0.0]);
        assert!(e4m3(0x7f).is_nan());
        let mut out = [0; 64];
        let mut block = [0u8; 16];
        block[0] = 0x72; // 1, then 6
        block[15] = 0x9f; // -6, then -0.5
        mxfp4(&block, &[128], 1, 0, 1, &mut out);
        let value = |i: usize| f32::from_bits(u32::from(u16::from_le_bytes([out[2 * i], out[2 * i + 1]])) << 16);
        assert_eq!([0, 1, 30, 31].map(value), [2.0, 12.0, -12.0, -1.0]);
    }

    #[test]
    fn scales_belong_to_blocks() {
        let mut out = [0; 4 * 9];
        scaled(&[0x38; 9], e4m3, 3, &[1.0, 2.0, 3.0, 4.0], 2, [2, 2], &mut out);
        let values: Vec<f32> = out.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        assert_eq!(values, [1.0, 1.0, 2.0, 1.0, 1.0, 2.0, 3.0, 3.0, 4.0]);
    }
}
