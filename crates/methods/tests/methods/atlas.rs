//! The atlas on models and labels whose answer is known.

use crate::engine::{fixture, open};
use crate::support::{Tasks, run_on};
use quorate_eval::tasks::{Task, TaskItem};
use quorate_formats::Role;
use quorate_lens::{ExpertMap, RoutingTrace};
use quorate_methods::{ExpertCard, Lab, MethodError, Report};
use quorate_model::Model;
use quorate_model::sampling::SplitMix64;
use quorate_residency::{Expert, Matrix};
use serde_json::{Map, Value};

/// A task of random words over an alphabet of its own.
fn words(name: &str, first: char, count: usize) -> Task {
    let mut random = SplitMix64::new(u64::from(first));
    let mut word = |n: usize| (0..n).map(|_| char::from(first as u8 + random.below(9) as u8)).collect::<String>();
    let item = |_| TaskItem { task: name.into(), prompt: word(20), answer: word(4), choices: None, meta: Map::new() };
    Task { name: name.into(), items: (0..count).map(item).collect(), files: Vec::new() }
}

fn atlas(model: Model, tasks: &[Task], options: &str) -> Result<Report, MethodError> {
    run_on(model, tasks.to_vec(), &format!("atlas --occurrences 2 --examples 1 {options}")).1
}

fn cards(report: &Report) -> &[ExpertCard] {
    &report.cards.as_ref().unwrap().cards
}

fn flagged(report: &Report, flag: &str) -> Vec<(usize, usize)> {
    let has = |c: &&ExpertCard| c.flags.iter().any(|f| f == flag);
    cards(report).iter().filter(has).map(|c| (c.layer, c.expert)).collect()
}

fn map<'a>(report: &'a Report, name: &str) -> &'a [Vec<Option<f64>>] {
    &report.maps.iter().find(|m| m.name == name).unwrap_or_else(|| panic!("no map {name}")).values
}

fn trace(items: &[TaskItem]) -> RoutingTrace {
    let mut world = Tasks(Vec::new());
    let mut lab = Lab::new(open(&fixture("olmoe")), &mut world);
    let items = lab.encode(items).unwrap();
    lab.trace(&items, false).unwrap()
}

/// A router of zeros gives every tie to the first three of six.
#[test]
fn experts_that_no_token_chooses_are_named_and_have_no_numbers() {
    let mut model = open(&fixture("olmoe"));
    for layer in model.spec().moe_layers() {
        model.replace_matrix(Role::Router(layer), Matrix::from_f32(6, 64, &[0.0; 6 * 64]).unwrap()).unwrap();
    }
    let report = atlas(model, &[words("a", 'a', 8), words("b", 'p', 8)], "").unwrap();
    assert_eq!(flagged(&report, "never used"), [(0, 3), (0, 4), (0, 5), (1, 3), (1, 4), (1, 5)]);
    for (name, used, unused) in
        [("use", Some(1.0), Some(0.0)), ("task entropy", Some(1.0), None), ("task: a", Some(1.0), None)]
    {
        for layer in map(&report, name) {
            assert_eq!(layer[..], [used, used, used, unused, unused, unused], "{name}");
        }
    }
    let card = &cards(&report)[4];
    assert_eq!((card.layer, card.expert), (0, 4));
    assert!(card.lists.iter().all(Vec::is_empty), "{card:?}");
    assert!(report.notes.iter().any(|n| n.contains("no flag `refusal`")), "{:?}", report.notes);
}

/// Labels follow one expert's use, or nothing.
#[test]
fn the_expert_that_the_labels_follow_is_flagged_and_random_labels_flag_none() {
    let mut task = words("a", 'a', 60);
    let items = trace(&task.items).items;
    let uses = |i: usize| items[i].counts(&ExpertMap::new(vec![0, 1], vec![6, 6]), |_, _| true)[6 + 4];
    let mut sorted: Vec<u64> = (0..60).map(uses).collect();
    sorted.sort_unstable();
    let mut random = SplitMix64::new(2);
    for (i, item) in task.items.iter_mut().enumerate() {
        item.meta.insert("often".into(), Value::Bool(uses(i) > sorted[30]));
        item.meta.insert("coin".into(), Value::Bool(random.below(2) == 1));
    }
    let options = "--effect 0.02 --label follows:often=true chance:coin=true";
    let report = atlas(open(&fixture("olmoe")), &[task.clone(), words("b", 'p', 9)], options).unwrap();
    let contrast = map(&report, "follows contrast");
    let largest = contrast.iter().flatten().flatten().copied().fold(f64::MIN, f64::max);
    assert_eq!(contrast[1][4], Some(largest));
    assert!(flagged(&report, "follows").contains(&(1, 4)));
    assert_eq!(flagged(&report, "chance"), []);
    let strict = atlas(open(&fixture("olmoe")), &[task.clone()], "--effect 0.9 --label follows:often=true").unwrap();
    assert_eq!(flagged(&strict, "follows"), [], "beyond chance, but not by 0.9");
    let error = |options: &str| atlas(open(&fixture("olmoe")), &[task.clone()], options).unwrap_err().to_string();
    assert!(error("--label x:nothing=1").contains("no task has 5 texts on both sides of the label `x:nothing=1`"));
    assert!(error("--label x:often=t/z").contains("no task has 5 texts"), "one class only");
    assert!(error("--shuffles 0").contains("--shuffles"));
}

#[test]
fn shares_lifts_and_examples_are_those_of_the_texts() {
    let tasks = [words("a", 'a', 12), words("b", 'p', 20)];
    let report = atlas(open(&fixture("olmoe")), &tasks, "--rows 9").unwrap();
    let experts = ExpertMap::new(vec![0, 1], vec![6, 6]);
    let traces = [trace(&tasks[0].items), trace(&tasks[1].items)];
    let (counts, tokens) =
        ([traces[0].counts(&experts), traces[1].counts(&experts)], [traces[0].tokens(), traces[1].tokens()]);
    for (unit, card) in cards(&report).iter().enumerate() {
        let n = [counts[0][unit], counts[1][unit]];
        let usage = (n[0] + n[1]) as f64 / (tokens[0] + tokens[1]) as f64;
        for row in &card.lists[0] {
            let t = usize::from(row[0] == "b");
            let lift = n[t] as f64 / tokens[t] as f64 / usage;
            assert!((row[1].as_f64().unwrap() - n[t] as f64 / (n[0] + n[1]) as f64).abs() < 1e-4, "{row:?}");
            assert!((row[2].as_f64().unwrap() - lift).abs() < 1e-3, "{row:?} {lift}");
        }
        // With all partners shown, shares sum to the other choices.
        let partners: f64 = card.lists[2].iter().map(|row| row[1].as_f64().unwrap()).sum();
        assert!((partners - 2.0).abs() < 1e-3, "{partners}");
        for row in &card.lists[1] {
            let quoted = format!("{:?}", row[2][0][1].as_str().unwrap());
            assert_eq!(row[0], quoted, "the example's marked token is the token");
        }
    }
    let dense = atlas(open(&fixture("qwen3")), &tasks, "").unwrap_err().to_string();
    assert!(dense.contains("no experts"), "{dense}");
}

#[test]
fn an_expert_with_huge_outputs_is_super() {
    let mut model = open(&fixture("olmoe"));
    let expert = model.expert_weights(1, 2).unwrap().clone();
    let scaled: Vec<f32> = expert.down.to_f32().iter().map(|v| 1e3 * v).collect();
    let down = Matrix::from_f32(expert.down.rows, expert.down.cols, &scaled).unwrap();
    model.replace_expert(1, 2, Expert { down, ..expert }).unwrap();
    let tasks = [words("a", 'a', 20)];
    assert_eq!(flagged(&atlas(model, &tasks, "").unwrap(), "super expert"), [(1, 2)]);
    assert_eq!(flagged(&atlas(open(&fixture("olmoe")), &tasks, "").unwrap(), "super expert"), []);
}
