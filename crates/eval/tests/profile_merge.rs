//! Profiles of parts of the data merge to the profile of the whole, and an interrupted one goes on as if nothing had
//! happened.

use std::path::{Path, PathBuf};

use quorate_eval::encode::EncodedItem;
use quorate_eval::profile::{ProfileRun, Split};
use quorate_eval::tasks::load_tasks;
use quorate_lens::{
    BinSum, CONFIDENCE_BINS, ExpertMap, Key, MetricInfo, Pattern, PatternInfo, PhaseStats, ProfileData, PromptKey,
    RouterStats, ScoreTable, Sum, prompt_keys,
};
use quorate_model::Model;

/// Items of each task.
const ITEMS: usize = 20;

fn embedded(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../embedded").join(part)
}

fn model() -> Model {
    let mut model = Model::open(&embedded("model"), 2, None).unwrap();
    model.load_all_experts().unwrap();
    model
}

/// Items of two tasks, short and long ones by turns.
fn items(model: &Model) -> Vec<EncodedItem> {
    let files = ["induction", "prose"].map(|task| embedded("tasks").join(format!("{task}.test.jsonl")));
    let tasks = load_tasks(&files, None).unwrap();
    let (a, b) = (&tasks[0].items[..ITEMS], &tasks[1].items[..ITEMS]);
    let by_turns = a.iter().zip(b).flat_map(|(a, b)| [a, b]);
    by_turns.map(|item| EncodedItem::new(model, item).unwrap()).collect()
}

fn empty(model: &Model) -> ProfileData {
    ProfileData::new(&ExpertMap::of(model.spec()))
}

fn split(shard: (usize, usize)) -> Split {
    Split { shard, ..Split::default() }
}

fn run_to_end(mut run: ProfileRun<'_>) -> ProfileData {
    while run.step().unwrap() {}
    assert_eq!(run.done_tokens(), run.total_tokens());
    run.into_profile()
}

fn profile(model: &Model, items: &[EncodedItem], shard: (usize, usize)) -> ProfileData {
    run_to_end(ProfileRun::new(model, items, split(shard), empty(model)))
}

/// All sums of a phase.
fn sums(stats: &PhaseStats, map: &ExpertMap) -> Vec<(String, Vec<f64>)> {
    let mut all = vec![("max_confidence".to_string(), stats.max_confidence.clone())];
    all.extend(Sum::ALL.iter().map(|&sum| (sum.name().to_string(), stats.sum(sum).to_vec())));
    for (i, sum) in BinSum::ALL.into_iter().enumerate() {
        let from = |unit: usize| (0..CONFIDENCE_BINS).map(move |bin| stats.bins_from(sum, unit, bin));
        all.push((format!("bins {i}"), (0..map.total()).flat_map(from).collect()));
    }
    all
}

#[track_caller]
fn assert_merged(what: &str, merged: &RouterStats, whole: &RouterStats) {
    assert_eq!((&merged.map, merged.items), (&whole.map, whole.items), "{what}");
    for (phase, a, b) in [("prompt", &merged.prompt, &whole.prompt), ("answer", &merged.answer, &whole.answer)] {
        assert!(b.tokens > 0, "{what}, {phase}");
        assert_eq!(a.tokens, b.tokens, "{what}, {phase}: tokens");
        assert_eq!(a.count, b.count, "{what}, {phase}: counts");
        assert_eq!(a.top_count, b.top_count, "{what}, {phase}: counts of first ranks");
        for ((name, a), (_, b)) in sums(a, &whole.map).iter().zip(sums(b, &whole.map)) {
            let most = b.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
            for (unit, (a, b)) in a.iter().zip(&b).enumerate() {
                assert!((a - b).abs() <= 1e-12 * most, "{what}, {phase}: {name} of expert {unit} is {a}, not {b}");
            }
        }
    }
}

fn sorted(keys: &[PromptKey]) -> Vec<Vec<u32>> {
    let bits = |key: &PromptKey| key.hidden.iter().chain(&key.router).map(|v| v.to_bits()).collect();
    let mut all: Vec<Vec<u32>> = keys.iter().map(bits).collect();
    all.sort();
    all
}

fn key(data: &ProfileData) -> Key {
    Key::of(&data.keys, &data.heldout_keys, 0)
}

#[test]
fn shards_merge_to_the_whole() {
    let model = model();
    let items = items(&model);
    let whole = profile(&model, &items, (0, 1));
    assert_eq!((whole.stats.items, whole.heldout.items), (32, 8));
    assert_eq!((whole.keys.len(), whole.heldout_keys.len()), (32, 8));
    for shards in [2, 3] {
        let mut merged = empty(&model);
        // In any order.
        for shard in (0..shards).rev() {
            merged.merge(&profile(&model, &items, (shard, shards)));
        }
        assert_merged(&format!("{shards} shards"), &merged.stats, &whole.stats);
        assert_merged(&format!("{shards} shards, held out"), &merged.heldout, &whole.heldout);
        assert_eq!(sorted(&merged.keys), sorted(&whole.keys));
        assert_eq!(sorted(&merged.heldout_keys), sorted(&whole.heldout_keys));
        assert_eq!(key(&merged), key(&whole), "retrieval keys of {shards} shards");
    }
}

/// Two halves that know nothing of each other: each is profiled as a data set of its own.
#[test]
fn halves_merge_to_the_whole() {
    let model = model();
    let items = items(&model);
    let none_held_out = Split { holdout_every: 0, ..Split::default() };
    let profile = |items: &[EncodedItem]| run_to_end(ProfileRun::new(&model, items, none_held_out, empty(&model)));
    let whole = profile(&items);
    for cut in [1, 17] {
        let mut merged = profile(&items[cut..]);
        merged.merge(&profile(&items[..cut]));
        assert_merged(&format!("cut at {cut}"), &merged.stats, &whole.stats);
        assert_eq!(key(&merged), key(&whole), "cut at {cut}");
    }
    assert_eq!(profile(&items), whole, "profiling again gives the same");
}

fn pattern(model: &Model, data: ProfileData) -> Pattern {
    let fingerprint = model.checkpoint().fingerprint().to_string();
    let info = PatternInfo { name: "two tasks".into(), fingerprint, phases: "both".into(), ..PatternInfo::default() };
    Pattern::build(info, data, |stats| {
        let metric = |name: &str| MetricInfo { name: name.into(), gauge_dependent: name == "logit" };
        let pooled = stats.pooled();
        let table = |name: &str, sum| ScoreTable {
            map: stats.map.clone(),
            metric: metric(name),
            values: pooled.sum(sum).to_vec(),
            counts: pooled.count.clone(),
        };
        vec![table("gate", Sum::Gate), table("norm", Sum::Norm)]
    })
}

/// After every step, what is gathered is written, read, and gone on with.
#[test]
fn an_interrupted_profile_goes_on() {
    let model = model();
    let items = items(&model);
    let whole = profile(&model, &items, (0, 1));
    assert!(whole.done_batches > 4);
    for steps in [0, 1, 3, whole.done_batches - 1, whole.done_batches] {
        let mut first = ProfileRun::new(&model, &items, split((0, 1)), empty(&model));
        for _ in 0..steps {
            assert!(first.step().unwrap());
        }
        let done = first.done_tokens();
        let bytes = pattern(&model, first.into_profile()).to_bytes().unwrap();
        let saved = Pattern::from_bytes(&bytes, "saved").unwrap().data.unwrap();
        assert_eq!(saved.done_batches, steps);
        let second = ProfileRun::new(&model, &items, split((0, 1)), saved);
        assert_eq!(second.done_tokens(), done);
        assert_eq!(run_to_end(second), whole, "interrupted after {steps} steps");
    }
}

#[test]
fn patterns_survive_their_file() {
    let model = model();
    let items = items(&model);
    let mut pattern = pattern(&model, profile(&model, &items, (1, 2)));
    assert!(pattern.key.prototypes.len() > 1 && pattern.key.radius > 0.0);
    let read = |bytes: &[u8]| Pattern::from_bytes(bytes, "a pattern");
    let bytes = pattern.to_bytes().unwrap();
    assert_eq!(read(&bytes).unwrap(), pattern);
    assert_eq!(read(&bytes).unwrap().to_bytes().unwrap(), bytes, "the same pattern, the same bytes");
    assert_eq!(key(pattern.data.as_ref().unwrap()), pattern.key);
    for cut in [0, 7, 8, 100, bytes.len() / 2, bytes.len() - 1] {
        let error = read(&bytes[..cut]).unwrap_err().to_string();
        assert!(error.starts_with("a pattern: ") && error.contains("help: "), "{error}");
    }
    pattern.data = None;
    let compact = pattern.to_bytes().unwrap();
    assert_eq!(read(&compact).unwrap(), pattern);
    assert!(compact.len() * 4 < bytes.len());
    pattern.check_model(model.checkpoint().fingerprint()).unwrap();
    assert!(pattern.check_model("another").is_err());
}

/// A prompt looks the same to retrieval as to the profile, where its answer follows and others are beside it.
#[test]
fn a_prompt_has_the_key_that_its_profile_has() {
    let mut model = model();
    let items = items(&model);
    let (order, _) = Split::default().order(items.len());
    let profiled = profile(&model, &items, (0, 1)).keys;
    let prompts: Vec<&[u32]> = order.iter().map(|&i| items[i].prompt.as_slice()).collect();
    let alone = prompt_keys(&mut model, &prompts, 0).unwrap();
    assert_eq!(alone.len(), profiled.len());
    for (a, b) in alone.iter().zip(&profiled) {
        let most = |v: &[f32]| v.iter().fold(0.0, |m: f32, v| m.max(v.abs()));
        for (a, b) in [(&a.hidden, &b.hidden), (&a.router, &b.router)] {
            assert!(a.iter().zip(b).all(|(x, y)| (x - y).abs() <= 1e-5 * most(b)));
        }
    }
}
