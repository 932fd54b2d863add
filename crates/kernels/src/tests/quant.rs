//! Weights in blocks: their values against ggml's, their products against `f64`.

use super::*;

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/gguf_types/");

/// Per type its blocks, and the 1024 values that ggml makes of them.
fn fixture() -> Vec<(DType, Vec<u8>, Vec<f32>)> {
    let read = |name: &str| std::fs::read(format!("{FIXTURE}{name}")).expect("the fixture is there");
    let (blocks, values) = (read("blocks.bin"), read("values.bin"));
    let values: Vec<f32> = values.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let index = String::from_utf8(read("index.txt")).expect("the index is text");
    let (mut at, mut all) = (0, Vec::new());
    for (line, values) in index.lines().zip(values.chunks_exact(1024)) {
        let (name, len) = line.split_once(' ').expect("a name and a length");
        let dtype = *DType::ALL.iter().find(|t| t.name() == name).expect("a type of this crate");
        let len: usize = len.parse().expect("a number of bytes");
        all.push((dtype, blocks[at..at + len].to_vec(), values.to_vec()));
        at += len;
    }
    assert_eq!((at, all.len()), (blocks.len(), DType::ALL.len()), "every type, and nothing else");
    all
}

#[test]
fn values_are_those_of_ggml_to_the_bit() {
    for (dtype, blocks, want) in fixture() {
        for isa in Isa::available() {
            let mut got = vec![f32::NAN; want.len()];
            dequantize_with(isa, dtype, &blocks, &mut got);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                // Zeros may differ in sign, as ggml's own paths do.
                assert!(got == want, "{isa:?} {} value {i}: {got:e}, not {want:e}", dtype.name());
            }
        }
    }
}
