//! Finding values that are no numbers, fast enough to look at every weight that is read.

use quorate_kernels::DType;

/// Elements looked at before a decision; the inner loop has no branch and becomes vector code.
const BLOCK: usize = 4096;

/// Index of the first element (for `Q8_0`: of the first of its block) that is infinite or not a number.
pub(crate) fn first_not_finite(dtype: DType, bytes: &[u8]) -> Option<usize> {
    match dtype {
        DType::F32 => find(bytes.as_chunks::<4>().0, |b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        DType::F16 => find(bytes.as_chunks::<2>().0, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        DType::BF16 => find(bytes.as_chunks::<2>().0, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        DType::Q8_0 => find(bytes.as_chunks::<34>().0, |b| u16::from_le_bytes([b[0], b[1]]) & 0x7c00 == 0x7c00)
            .map(|block| block * 32),
        // A type of the kernels that no file here is read into.
        _ => None,
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
