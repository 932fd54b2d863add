//! A softmax router does not feel a constant on all logits of a token. A metric that does says so (`gauge_dependent`).

use std::path::{Path, PathBuf};

use quorate_lens::{
    ExpertMap, Indices, Intervention, Interventions, Op, PhaseSelector, Profiler, RouterStats, ScoreTable,
};
use quorate_methods::{Phases, all_tables};
use quorate_model::{Chain, KvCache, Model, Segment, Site};

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// Statistics of two texts with `constant` added to all router logits.
fn profile(model: &Model, texts: &[Vec<u32>], constant: f32) -> RouterStats {
    let bias = Intervention {
        site: Site::RouterLogits,
        layers: Indices::All,
        units: Indices::All,
        positions: Indices::All,
        phase: PhaseSelector::All,
        op: Op::Bias { by: constant },
    };
    let mut bias = Interventions::prepare(&[bias], model.spec(), Path::new("")).unwrap();
    let mut profiler = Profiler::new(RouterStats::new(ExpertMap::of(model.spec())));
    let segment = |(slot, text): (usize, &Vec<u32>)| Segment::teacher_forced(slot, &text[..9], &text[9..]);
    let segments: Vec<Segment> = texts.iter().enumerate().map(segment).collect();
    let mut cache = KvCache::new(model.spec(), texts.len());
    model.forward(&segments, &mut cache, &mut Chain(vec![&mut bias, &mut profiler])).unwrap();
    profiler.count_items(texts.len() as u64);
    profiler.into_stats()
}

/// The largest change of a score, relative to the largest score.
fn change(a: &ScoreTable, b: &ScoreTable) -> f64 {
    let most = a.values.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
    a.values.iter().zip(&b.values).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / most
}

#[test]
fn metrics_say_whether_they_depend_on_the_gauge() {
    let fixtures = ["olmoe", "qwen3_moe", "qwen2_moe", "mixtral"].map(|name| root("tests/fixtures").join(name));
    for path in fixtures.into_iter().chain([root("embedded/model")]) {
        let mut model = Model::open(&path, 2, None).unwrap();
        model.load_all_experts().unwrap();
        let texts: Vec<Vec<u32>> = vec![(4..40).collect(), (90..120).rev().collect()];
        let own = profile(&model, &texts, 0.0);
        for constant in [2.75, -1.5] {
            let shifted = profile(&model, &texts, constant);
            assert_eq!(own.pooled().count, shifted.pooled().count, "the choice is the same");
            for phases in [Phases::Prompt, Phases::Answer, Phases::Both, Phases::Balanced] {
                let tables = |stats| all_tables(stats, &[stats], phases);
                for (a, b) in tables(&own).iter().zip(&tables(&shifted)) {
                    let (name, change) = (&a.metric.name, change(a, b));
                    let what = format!("{}: {name} changes by {change} under {constant}", path.display());
                    assert!(if a.metric.gauge_dependent { change > 1e-2 } else { change < 1e-5 }, "{what}");
                }
            }
        }
    }
}

#[test]
fn raw_logits_are_known_to_be_gauge_dependent() {
    for (name, dependent) in [("peu", true), ("tcess", true), ("peu-gauge-free", false), ("easy-ep", false)] {
        assert_eq!(quorate_methods::metric(name).unwrap().gauge_dependent, dependent, "{name}");
    }
}
