//! How long it takes to find the nearest of many patterns: `cargo bench -p quorate-lens`.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use quorate_lens::{Key, KeyIndex, KeyMetric, PromptKey};

fn main() {
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let d = 256; // keys of wider models are sketched to this
    for patterns in [20, 100, 1000] {
        let mut vector = || (0..d).map(|_| random()).collect::<Vec<f32>>();
        let keys = (0..patterns).map(|i| {
            let mean = PromptKey { hidden: vector(), router: Vec::new() };
            (
                format!("task{i}"),
                Key { mean, prototypes: (0..8).map(|_| vector()).collect(), radius: 1.0, moe_layer: 0 },
            )
        });
        let index = KeyIndex::new(keys.collect());
        let prompt = PromptKey { hidden: vector(), router: Vec::new() };
        let mut times: Vec<f64> = (0..101)
            .map(|_| {
                let start = Instant::now();
                assert!(index.nearest(&prompt, KeyMetric::Hidden).is_some());
                start.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        println!("{patterns:5} patterns: {:.3} ms (median of 101)", 1e3 * times[50]);
    }
}
