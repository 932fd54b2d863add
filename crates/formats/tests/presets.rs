//! Presets: their shapes add up to what the models' authors publish.

use quorate_formats::{PRESETS, Preset, shape};

/// `46.7B` is 46.7 thousand million, in steps of a tenth.
fn published(text: &str) -> (f64, f64) {
    let (number, unit) = text.split_at(text.len() - 1);
    let unit = match unit {
        "B" => 1e9,
        "T" => 1e12,
        _ => panic!("{text}"),
    };
    let digits = number.split_once('.').map_or(0, |(_, fraction)| fraction.len() as i32);
    (number.parse::<f64>().unwrap() * unit, unit * 10f64.powi(-digits))
}

#[test]
fn parameters_are_as_published() {
    assert!(PRESETS.len() >= 12);
    for preset in PRESETS {
        let (file, spec) = (preset.read().unwrap(), preset.outline().unwrap().spec);
        let total = shape::parameter_counts(&spec).total as f64;
        let (expected, step) = published(&file.parameters);
        // Some round the number, some cut it, and some count what we do not read.
        let cut = (total / step).floor() * step;
        let off = if file.besides.is_some() { 0.015 } else { 0.01 };
        assert!(
            (total - expected).abs() < off * expected || (cut - expected).abs() < 1e-6 * expected,
            "{}: {total} counted, {} published",
            preset.name,
            file.parameters
        );
        assert!(spec.is_moe() && file.source.split('/').count() == 2, "{}", preset.name);
    }
}

#[test]
fn active_parameters_are_as_published() {
    // Model cards. Some leave out the embedding, which matters where it is large: those are not here.
    for (name, expected) in [
        ("mixtral-8x7b", 12.9e9),
        ("mixtral-8x22b", 39e9),
        ("olmoe-1b-7b", 1.3e9),
        ("qwen2-57b-a14b", 14e9),
        ("qwen3-30b-a3b", 3.3e9),
        ("qwen3-235b-a22b", 22e9),
        ("deepseek-v2", 21e9),
        ("deepseek-v3", 37e9),
        ("kimi-k2", 32e9),
        ("phi-3.5-moe", 6.6e9),
        ("glm-4.5", 32e9),
        ("llama-4-scout", 17e9),
        ("hunyuan-a13b", 13e9),
    ] {
        let counts = shape::parameter_counts(&Preset::find(name).unwrap().outline().unwrap().spec);
        let off = counts.active as f64 / expected - 1.0;
        assert!(off.abs() < 0.06, "{name}: {} active, {expected} published", counts.active);
    }
}

#[test]
fn presets_are_found_by_name_and_no_other() {
    assert_eq!(Preset::find("DeepSeek-R1").unwrap().name, "deepseek-r1");
    assert!(Preset::find("deepseek").is_none() && Preset::find("").is_none());
}
