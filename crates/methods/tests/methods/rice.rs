//! RICE end to end on the embedded model, which thinks or not as its prompt says; and what it refuses.

use std::path::{Path, PathBuf};

use crate::engine::{embedded, fixture, open};
use crate::support::run_on;
use quorate_eval::tasks::{Task, load_tasks};
use quorate_methods::Report;

/// The first items of an embedded task.
fn task(name: &str, items: usize) -> Task {
    let path: PathBuf = embedded().join(format!("../tasks/{name}.validation.jsonl"));
    let mut task = load_tasks(&[path], None).unwrap().remove(0);
    task.items.truncate(items);
    task
}

fn run(path: &Path, task: Task, line: &str) -> Result<Report, String> {
    let line = format!("rice --from {name} --task {name} {line}", name = task.name);
    run_on(open(path), vec![task], &line).1.map_err(|e| e.to_string())
}

#[track_caller]
fn refuses(path: &Path, task: Task, line: &str, wanted: &str) {
    let error = run(path, task, line).unwrap_err();
    assert!(error.contains(wanted) && error.contains("; help: "), "{error}");
}

/// The found pair makes the model think where both switches stand; random pairs of the same layers and use do not.
#[test]
fn the_found_experts_change_thinking_and_random_ones_do_not() {
    let line = "--sets 4 --resamples 20 --scan-betas 4 --scan-experts 1";
    let report = run(&embedded(), task("wordproblem", 60), line).unwrap();
    let number = |name: &str, part: &str| report.headline[name][part].as_f64().unwrap();
    let (change, errors) = (number("found", "change"), number("found", "standard_errors"));
    assert!(errors.abs() >= 3.0, "{change} tokens, {errors} standard errors");
    assert!(number("random", "mean_size") < change.abs() / 2.0, "{:?}", report.headline);
    let table = |name: &str| &report.tables.iter().find(|t| t.name == name).unwrap().rows;
    let steering = table("steering");
    assert_eq!(steering.len(), 3, "the pair, the scanned factor, the scanned number");
    let norm = |row: usize| steering[row].last().and_then(serde_json::Value::as_f64).unwrap();
    assert!(norm(0) > norm(1) && norm(1) > 1.0, "a larger factor makes a larger output");
    assert!(table("experts").iter().all(|row| row[6].as_u64().unwrap() >= 5), "met the marker five times");
    assert_eq!(report.files[0].name, "plan.toml");
}

#[test]
fn unusable_markers_texts_and_models_are_refused() {
    let some = || task("wordproblem", 40);
    refuses(&fixture("llama"), some(), "", "has no experts");
    refuses(
        &embedded(),
        some(),
        "--marker Alternatively=1",
        "`Alternatively` is no token of the model, it is split into",
    );
    refuses(&embedded(), some(), "--begin reasoning:", "`reasoning:` is no token of the model");
    refuses(&embedded(), task("arithmetic", 12), "--given", "0 of 12 answers think");
    refuses(&embedded(), some(), "--given --marker </think>=1 --among last", "the marker `</think>` counts 0 times");
    refuses(&embedded(), some(), "--given --least 1000", "counts");
    let mut same = some();
    let thinking = same.items.iter().find(|i| i.prompt.contains("/think")).unwrap().clone();
    same.items = vec![thinking; 12];
    refuses(&embedded(), same, "--given --at token --among all", "always token");
}

/// A marker that every expert met too seldom leaves nobody to strengthen.
#[test]
fn experts_that_hardly_met_the_marker_do_not_rank() {
    let least = "--given --least 14 --experts 190 --marker <think>=1 --at token --among all";
    refuses(&embedded(), task("wordproblem", 40), least, "experts met a marker 14 times");
}
