//! Pathways on models whose answer is known: the same model, the same experts in another order, noisier routers.

use crate::engine::{edited, embedded, fixture, noise, open};
use crate::support::{number, run_on, sums, table, task};
use quorate_formats::Role;
use quorate_methods::Report;
use quorate_model::Model;
use quorate_residency::Matrix;
use serde_json::Value;

fn mixed() -> Vec<quorate_eval::tasks::Task> {
    let echo = |i: usize| (format!("<|user|>List: {} j k\nLast<|assistant|>", ["a", "b", "q"][i % 3]), "k".to_string());
    vec![sums(20), task("lists", (0..20).map(echo))]
}

fn run(model: Model, line: &str) -> Report {
    run_on(model, mixed(), line).1.unwrap()
}

fn distance(report: &Report, of: &str) -> f64 {
    number(&report.headline["distance"][of])
}

/// Renumbers the experts of every layer in one way.
fn permuted(path: &std::path::Path, experts: usize) -> Model {
    let to = |e: usize| (e * 13 + 5) % experts;
    let mut model = open(path);
    for layer in model.spec().moe_layers() {
        let router = model.router_weight(layer).unwrap();
        let (d, rows) = (router.cols, router.to_f32());
        let mut moved = rows.clone();
        (0..experts).for_each(|e| moved[to(e) * d..(to(e) + 1) * d].copy_from_slice(&rows[e * d..(e + 1) * d]));
        let old: Vec<_> = (0..experts).map(|e| model.expert_weights(layer, e).unwrap().clone()).collect();
        model.replace_matrix(Role::Router(layer), Matrix::from_f32(experts, d, &moved).unwrap()).unwrap();
        old.into_iter().enumerate().for_each(|(e, expert)| drop(model.replace_expert(layer, to(e), expert).unwrap()));
    }
    model
}

#[test]
fn renumbered_experts_are_as_far_apart_by_expert_but_not_by_character() {
    let line = "pathways --pairs 300 --items 0";
    let (own, other) = (run(open(&embedded()), line), run(permuted(&embedded(), 32), line));
    for of in ["any", "same_task"] {
        assert!((distance(&own, of) - distance(&other, of)).abs() < 1e-9, "{of}");
    }
    assert!((number(&own.headline["consistency_c"]) - number(&other.headline["consistency_c"])).abs() < 1e-4);
    let by_character = |report: &Report| number(&table(report, "checkpoints")[0][6]);
    assert_ne!(by_character(&own), by_character(&other));
    assert!(distance(&own, "same_task") < 0.7 * distance(&own, "any"), "{:?}", own.headline);
    assert!(distance(&own, "any") < distance(&own, "random"), "{:?}", own.headline);
    let chars = run(open(&embedded()), "pathways --pairs 300 --items 0 --unit char");
    assert_eq!(distance(&chars, "any"), by_character(&own));
}

/// One text many times: nothing is between its copies.
#[test]
fn copies_of_a_text_are_at_distance_zero() {
    let copies = task("copies", vec![("<|user|>78+95=<|assistant|>".to_string(), "173".to_string()); 6]);
    let report = run_on(open(&embedded()), vec![copies], "pathways --pairs 20 --items 0").1.unwrap();
    assert_eq!((distance(&report, "any"), distance(&report, "same_task")), (0.0, 0.0));
    assert!(table(&report, "layers").iter().all(|r| number(&r[1]) == 0.0 && number(&r[2]) > 0.0));
}

/// Checkpoints made by noise on all routers: more noise, more loss; the correlations are those of the table's columns.
#[test]
fn checkpoints_are_compared_with_the_same_pairs() {
    let with_noise = |scale: f32| {
        edited(&embedded(), |role, _, values| {
            if let Role::Router(layer) = role {
                let noise = noise(layer as u64, values.len());
                values.iter_mut().zip(noise).for_each(|(v, n)| *v += scale * n);
            }
        })
    };
    let folders = [with_noise(0.6), with_noise(0.2)];
    let paths = folders.iter().map(|f| f.path().display().to_string()).collect::<Vec<_>>().join(" ");
    let line = format!("pathways --pairs 100 --items 4 --max-tokens 6 --checkpoints {paths} {}", embedded().display());
    let report = run(open(&embedded()), &line);
    let rows = table(&report, "checkpoints");
    assert_eq!(rows.len(), 4);
    assert_eq!(rows[2][1..], rows[3][1..], "the model is its own checkpoint");
    assert!(number(&rows[0][1]) > number(&rows[1][1]) && number(&rows[1][1]) > number(&rows[3][1]), "{rows:?}");
    let column = |c: usize| rows.iter().map(|r| number(&r[c])).collect::<Vec<_>>();
    let found = table(&report, "correlations").iter().find(|r| r[0] == "D" && r[1] == "loss").unwrap();
    let wanted = quorate_eval::statistics::pearson(&column(3), &column(1)).unwrap();
    assert!((number(&found[2]) - wanted).abs() < 1e-9);
    let pair = table(&report, "correlations").iter().map(|r| (r[0].clone(), r[1].clone())).collect::<Vec<_>>();
    assert!(!pair.contains(&(Value::from("loss"), Value::from("loss"))), "{pair:?}");
}

#[test]
fn what_is_missing_is_told() {
    let error = |path: &str, line: &str| run_on(open(&fixture(path)), mixed(), line).1.unwrap_err().to_string();
    assert!(error("mixtral", "pathways --mass 0").contains("--mass is 0"));
    assert!(error("mixtral", "pathways --pairs 0").contains("--pairs is 0"));
    assert!(error("mixtral", "pathways --items 0 --memorised 0").contains("0 texts are left, 5 are needed"));
    assert!(error("llama", "pathways").contains("mixture-of-experts"));
    let other = format!("pathways --items 0 --checkpoints {}", embedded().display());
    assert!(error("mixtral", &other).contains("other layers or experts"));
}
