//! MoTE and the core experts of retrieval on a model whose router is planted: a token decides which experts are chosen.

use crate::engine::{Capture, embedded, open};
use crate::support::run_on;
use quorate_eval::encode::EncodedItem;
use quorate_eval::tasks::{Task, TaskItem};
use quorate_formats::Role;
use quorate_methods::Report;
use quorate_model::{KvCache, Model, Site};
use quorate_residency::Matrix;
use serde_json::{Value, json};

fn item(prompt: &str, answer: &str, meta: &Value) -> TaskItem {
    let meta = meta.as_object().unwrap().clone();
    TaskItem { task: "mine".into(), prompt: prompt.into(), answer: answer.into(), choices: None, meta }
}

fn run(model: Model, items: Vec<TaskItem>, line: &str) -> Result<Report, String> {
    let tasks = vec![Task { name: "mine".into(), items, files: Vec::new() }];
    run_on(model, tasks, line).1.map_err(|e| e.to_string())
}

/// Prompts of two kinds told apart by one token (a digit), which the model's first layer sees as it is.
fn prompts(meta: impl Fn(usize, bool) -> Value) -> Vec<TaskItem> {
    let of = |i: usize| {
        let class = i.is_multiple_of(2);
        let sign = if class { "7" } else { "2" };
        item(&format!("<|user|>{}{sign}", char::from(b'a' + (i / 2 % 26) as u8)), "x", &meta(i, class))
    };
    (0..80).map(of).collect()
}

/// The embedded model whose first router has two experts that read the class: 5 is chosen at the last token of one kind of
/// prompt, 9 at that of the other.
fn planted(items: &[TaskItem]) -> Model {
    let mut model = open(&embedded());
    let d = model.router_weight(0).unwrap().cols;
    let mut means = [vec![0f64; d], vec![0f64; d]];
    for (i, item) in items.iter().enumerate() {
        let mut encoded = EncodedItem::new(&model, item).unwrap();
        encoded.answer.clear();
        let mut capture = Capture::new(&[Site::FfnIn]);
        let mut cache = KvCache::new(model.spec(), 1);
        model.forward(&[encoded.segment(0)], &mut cache, &mut capture).unwrap();
        let last = capture.get(0, Site::FfnIn).values.rchunks(d).next().unwrap();
        means[i % 2].iter_mut().zip(last).for_each(|(m, v)| *m += f64::from(*v) / (items.len() / 2) as f64);
    }
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let [yes, no] = &means;
    let difference: Vec<f64> = yes.iter().zip(no).map(|(a, b)| a - b).collect();
    let middle: Vec<f64> = yes.iter().zip(no).map(|(a, b)| (a + b) / 2.0).collect();
    let shared = dot(&difference, &middle) / dot(&middle, &middle);
    let reads: Vec<f64> = difference.iter().zip(&middle).map(|(d, m)| d - shared * m).collect();
    let scale = 20.0 / dot(&reads, &difference);

    // The others are ordered alike for both kinds.
    let common = 0.01 / dot(&middle, &middle);
    let mut weights: Vec<f32> = (0..32 * d).map(|i| ((i / d) as f64 * common * middle[i % d]) as f32).collect();
    for (k, r) in reads.iter().enumerate() {
        weights[5 * d + k] = (scale * r) as f32;
        weights[9 * d + k] = -(scale * r) as f32;
    }
    model.replace_matrix(Role::Router(0), Matrix::from_f32(32, d, &weights).unwrap()).unwrap();
    model
}

fn text(report: &Report, key: &str) -> String {
    report.headline[key].as_str().unwrap().to_string()
}

#[test]
fn mote_finds_the_planted_experts_of_either_class() {
    let items = prompts(|_, class| json!({ "refuse": class }));
    let line = "mote --task mine --label-field refuse --marker nowhere --others 0 --sets 2 --max-tokens 1";
    let found = |more: &str| {
        let report = run(planted(&items), items.clone(), &format!("{line}{more}")).unwrap();
        text(&report, "experts")
    };
    assert_eq!(found(""), "0:5");
    assert_eq!(found(" --invert"), "0:9");
    assert_eq!(found(" --tokens prompt --weight count --action suppress --at all"), "0:5", "the paper's form");
}

#[test]
fn mote_says_what_it_lacks() {
    let line = "mote --task mine --label-field refuse --others 0 --sets 2 --max-tokens 1";
    let error = |meta: fn(usize, bool) -> Value| run(open(&embedded()), prompts(meta), line).unwrap_err();
    let unlabelled = error(|_, _| json!({}));
    assert!(unlabelled.contains("no `meta.refuse`") && unlabelled.contains("label each prompt"), "{unlabelled}");
    let one_class = error(|_, _| json!({ "refuse": true }));
    assert!(one_class.contains("80 texts are of the class and 0 are not"), "{one_class}");
    let few = run(open(&embedded()), prompts(|i, _| json!({ "refuse": i < 3 })), &format!("{line} --marker x"));
    assert!(few.unwrap_err().contains("3 texts are of the class"));
}

#[test]
fn core_experts_are_the_planted_ones_and_labels_at_random_find_nothing() {
    let items = prompts(|i, class| json!({ "scenario": "cognizant", "group": format!("{i}"), "label": class }));
    let line = "core-experts --task mine --tokens last --share 0.005 --splits 4";
    let report = run(planted(&items), items.clone(), line).unwrap();
    let file = report.files.iter().find(|f| f.name == "core.json").unwrap();
    let core: Value = serde_json::from_slice(&file.bytes).unwrap();
    assert_eq!(core["cognizant"]["plus"], json!(["0:5"]));
    assert_eq!(core["cognizant"]["minus"], json!(["0:9"]));
    assert_eq!(report.headline["auc_cognizant"]["held_out"], json!(1.0));

    // Labels that have nothing to do with the prompts.
    let shuffled = |i: usize, _| {
        let label = (i / 2 + i / 7).is_multiple_of(2);
        json!({ "scenario": "cognizant", "group": format!("{i}"), "label": label })
    };
    let report = run(planted(&items), prompts(shuffled), line).unwrap();
    let auc = report.headline["auc_cognizant"]["held_out"].as_f64().unwrap();
    assert!((auc - 0.5).abs() < 0.2, "{auc}");
}

#[test]
fn core_experts_say_what_they_lack() {
    let line = "core-experts --task mine --splits 2";
    let error = |meta: fn(usize, bool) -> Value| run(open(&embedded()), prompts(meta), line).unwrap_err();
    let unknown = error(|_, _| json!({ "scenario": "other" }));
    assert!(unknown.contains("scenario `other`") && unknown.contains("cognizant, quality or in-context"), "{unknown}");
    let one_kind = error(|i, _| json!({ "scenario": "quality", "group": format!("{i}"), "label": true }));
    assert!(one_kind.contains("at least 5 of each are needed"), "{one_kind}");
}
