//! 4-bit whole numbers of GPTQ, AWQ and compressed-tensors.

use quorate_formats::packed::{Int4, WordLayout};
use quorate_kernels::quantize;

/// Rows that are unpacked at a time: of outputs side by side in the file, a cache line's worth and more.
const TILE: usize = 64;
/// Where output `r % 8` lies in a word of AWQ.
const AWQ_NIBBLE: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
/// Numbers and bytes of a block of Q4_0.
const BLOCK: (usize, usize) = (32, 18);

/// The stored tensors of a matrix.
pub(super) struct Parts {
    pub codes: Vec<u32>,
    pub scales: Vec<f32>,
    pub zeros: Option<Vec<u32>>,
    pub groups: Option<Vec<u32>>,
}

struct Matrix<'a> {
    int4: &'a Int4,
    parts: &'a Parts,
    rows: usize,
    cols: usize,
    n_groups: usize,
    /// Group of each column.
    groups: Vec<usize>,
}

/// Writes the values, row after row, in the recipe's type.
///
/// # Errors
/// What is wrong with the numbers.
pub(super) fn unpack(int4: &Int4, parts: &Parts, out: &mut [u8]) -> Result<(), String> {
    let matrix = Matrix::new(int4, parts)?;
    let row_bytes = out.len() / matrix.rows.max(1);
    let mut codes = vec![0; TILE * matrix.cols];
    let mut values = vec![0.0; matrix.cols];
    let dtype = super::computable(int4.dtype());
    for (tile, out) in out.chunks_mut((TILE * row_bytes).max(1)).enumerate() {
        matrix.read_tile(tile * TILE, &mut codes);
        for (r, out) in out.chunks_exact_mut(row_bytes).enumerate() {
            let (row, codes) = (tile * TILE + r, &codes[r * matrix.cols..][..matrix.cols]);
            if int4.as_blocks {
                matrix.write_blocks(row, codes, out)?;
            } else {
                matrix.widen(row, codes, &mut values);
                quantize(dtype, &values, out);
            }
        }
    }
    Ok(())
}

impl<'a> Matrix<'a> {
    fn new(int4: &'a Int4, parts: &'a Parts) -> Result<Matrix<'a>, String> {
        let (a, b) = (int4.scales.shape[0], int4.scales.shape[1]);
        let (n_groups, rows) = if int4.layout == WordLayout::Rows { (b, a) } else { (a, b) };
        let cols = match int4.layout {
            WordLayout::Gptq { .. } => int4.codes.shape[0] * 8,
            WordLayout::Awq => int4.codes.shape[0],
            WordLayout::Rows => int4.codes.shape[1] * 8,
        };
        let in_order = |c: usize| if n_groups == 1 { 0 } else { c / int4.group };
        let groups: Vec<usize> = match &parts.groups {
            Some(groups) => groups.iter().map(|&g| g as usize).collect(),
            None => (0..cols).map(in_order).collect(),
        };
        if let Some(group) = groups.iter().find(|&&g| g >= n_groups) {
            return Err(format!("a column is of group {group}, but there are only {n_groups}"));
        }
        if int4.as_blocks && (0..cols).any(|c| groups[c] != in_order(c)) {
            return Err("its columns are not in the groups' order, as config.json says they are".to_owned());
        }
        Ok(Matrix { int4, parts, rows, cols, n_groups, groups })
    }

    /// Numbers of up to [`TILE`] rows from `first` on.
    fn read_tile(&self, first: usize, codes: &mut [u8]) {
        let (rows, cols, words) = (TILE.min(self.rows - first), self.cols, &self.parts.codes);
        match self.int4.layout {
            WordLayout::Gptq { .. } => {
                for (eight, of_rows) in words.chunks_exact(self.rows).enumerate() {
                    for (r, &word) in of_rows[first..first + rows].iter().enumerate() {
                        spread(word, &mut codes[r * cols + 8 * eight..][..8]);
                    }
                }
            }
            WordLayout::Awq => {
                for (c, of_rows) in words.chunks_exact(self.rows.div_ceil(8)).enumerate() {
                    for r in 0..rows {
                        codes[r * cols + c] = nibble(of_rows[(first + r) / 8], AWQ_NIBBLE[(first + r) % 8]);
                    }
                }
            }
            WordLayout::Rows => {
                let of_tile = words[first * cols / 8..].iter().take(rows * cols / 8);
                codes.chunks_exact_mut(8).zip(of_tile).for_each(|(codes, &word)| spread(word, codes));
            }
        }
    }

    fn scale(&self, row: usize, group: usize) -> f32 {
        self.parts.scales[match self.int4.layout {
            WordLayout::Rows => row * self.n_groups + group,
            _ => group * self.rows + row,
        }]
    }

    fn zero(&self, row: usize, group: usize) -> u8 {
        let Some(words) = &self.parts.zeros else { return 8 };
        let eight_out = self.rows.div_ceil(8);
        match self.int4.layout {
            WordLayout::Gptq { zero_offset } => {
                // A zero point of 0 is stored as 15.
                nibble(words[group * eight_out + row / 8], row as u32 % 8).wrapping_add(zero_offset) & 15
            }
            WordLayout::Awq => nibble(words[group * eight_out + row / 8], AWQ_NIBBLE[row % 8]),
            WordLayout::Rows => nibble(words[row / 8 * self.n_groups + group], row as u32 % 8),
        }
    }

    fn widen(&self, row: usize, codes: &[u8], values: &mut [f32]) {
        let of_group: Vec<(f32, f32)> =
            (0..self.n_groups).map(|g| (self.scale(row, g), f32::from(self.zero(row, g)))).collect();
        for ((value, &code), &group) in values.iter_mut().zip(codes).zip(&self.groups) {
            let (scale, zero) = of_group[group];
            *value = (f32::from(code) - zero) * scale;
        }
    }

    /// Blocks of Q4_0: an f16 scale, then the numbers; the first half in the low nibbles.
    fn write_blocks(&self, row: usize, codes: &[u8], out: &mut [u8]) -> Result<(), String> {
        if (0..self.n_groups).any(|g| self.zero(row, g) != 8) {
            return Err("its zero points are not all 8, as config.json says they are".to_owned());
        }
        for (b, (codes, out)) in codes.chunks_exact(BLOCK.0).zip(out.chunks_exact_mut(BLOCK.1)).enumerate() {
            let scale = self.scale(row, self.groups[b * BLOCK.0]);
            quantize(quorate_kernels::DType::F16, &[scale], &mut out[..2]);
            let (low, high) = codes.split_at(BLOCK.0 / 2);
            out[2..].iter_mut().zip(low.iter().zip(high)).for_each(|(out, (low, high))| *out = low | high << 4);
        }
        Ok(())
    }
}

fn nibble(word: u32, index: u32) -> u8 {
    (word >> (4 * index)) as u8 & 15
}

/// Eight numbers of a word, the lowest first.
fn spread(word: u32, codes: &mut [u8]) {
    codes.iter_mut().zip(0..).for_each(|(code, i)| *code = nibble(word, i));
}
