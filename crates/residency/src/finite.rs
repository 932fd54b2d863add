//! Finding values that are no numbers, fast enough to look at every weight that is read.

use quorate_kernels::DType;

/// Elements looked at before a decision; the inner loop has no branch and becomes vector code.
const BLOCK: usize = 4096;

/// Index of the first element (in types of blocks: of the first of its block) that is infinite or not a number.
pub(crate) fn first_not_finite(dtype: DType, bytes: &[u8]) -> Option<usize> {
    match dtype {
        DType::F32 => find(bytes.as_chunks::<4>().0, |b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        DType::F16 => find(bytes.as_chunks::<2>().0, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        DType::BF16 => find(bytes.as_chunks::<2>().0, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        _ => first_bad_block(dtype, bytes).map(|block| block * dtype.block_len()),
    }
}

/// The first block with a scale or offset that is not finite. Codes always are.
fn first_bad_block(dtype: DType, bytes: &[u8]) -> Option<usize> {
    let mut blocks = bytes.chunks_exact(dtype.block_bytes());
    let half = |b: &[u8], at: usize| u16::from_le_bytes([b[at], b[at + 1]]) & 0x7c00 == 0x7c00;
    match dtype {
        // A power of two; 255 stands for no number.
        DType::MXFP4 => blocks.position(|b| b[0] == 255),
        // The scale's four digits are the upper ones of the last four words: infinities have the exponent 31.
        DType::IQ1_M => blocks.position(|b| b[55] >> 4 & 7 == 7 && b[53] >> 4 & 12 == 12),
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => blocks.position(|b| half(b, 0) || half(b, 2)),
        DType::Q2_K => blocks.position(|b| half(b, 80) || half(b, 82)),
        DType::Q3_K => blocks.position(|b| half(b, 108)),
        DType::Q6_K => blocks.position(|b| half(b, 208)),
        _ => blocks.position(|b| half(b, 0)),
    }
}

fn find<const N: usize>(elements: &[[u8; N]], bad: impl Fn([u8; N]) -> bool) -> Option<usize> {
    let (block, _) = elements.chunks(BLOCK).enumerate().find(|(_, c)| c.iter().fold(false, |any, &e| any | bad(e)))?;
    let start = block * BLOCK;
    elements[start..].iter().position(|&e| bad(e)).map(|i| start + i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_first_in_every_type() {
        let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        for (i, bad) in [0, 1, 4095, 4096, 9999].into_iter().zip(bad.into_iter().cycle()) {
            let mut values = vec![1.5f32; 10_000];
            values[i] = bad;
            let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let f16s: Vec<u8> = values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
            let bf16s: Vec<u8> = values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
            assert_eq!(first_not_finite(DType::F32, &f32s), Some(i));
            assert_eq!(first_not_finite(DType::F16, &f16s), Some(i));
            assert_eq!(first_not_finite(DType::BF16, &bf16s), Some(i));
        }
        let mut blocks = vec![0; 34 * 3];
        blocks[34..36].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
        assert_eq!(first_not_finite(DType::Q8_0, &blocks), Some(32));
    }

    #[test]
    fn the_largest_numbers_are_finite() {
        assert_eq!(first_not_finite(DType::F32, &f32::MAX.to_le_bytes()), None);
        assert_eq!(first_not_finite(DType::F16, &half::f16::MIN.to_le_bytes()), None);
        assert_eq!(first_not_finite(DType::BF16, &half::bf16::MAX.to_le_bytes()), None);
        assert_eq!(first_not_finite(DType::Q8_0, &[0xff; 0]), None);
    }
}
