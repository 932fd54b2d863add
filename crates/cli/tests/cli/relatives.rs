//! The relatives as commands: what they write is used by other commands, and their comparison goes on where it stopped.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::quorate;
use crate::support::{fixture, has_fields, items, names_in, tempdir, text};

/// A folder with a task's texts and questions.
fn tasks(folder: &Path) -> String {
    let tasks = folder.join("tasks");
    fs::create_dir(&tasks).unwrap();
    fs::write(tasks.join("arithmetic.test.jsonl"), items("arithmetic.test", 6)).unwrap();
    fs::write(tasks.join("arithmetic.train-sample.jsonl"), items("arithmetic.train-sample", 40)).unwrap();
    text(&tasks)
}

/// Exact match in percent of a line of the table of answers.
fn answers(report: &Value, name: &str) -> f64 {
    let rows = report["tables"].as_array().unwrap().iter().find(|t| t["name"] == "answers").unwrap()["rows"].clone();
    rows.as_array().unwrap().iter().find(|r| r[0] == name).unwrap()[1].as_f64().unwrap()
}

/// What `eval` says of the questions with a model or a plan.
fn eval(args: &[&str], tasks: &str) -> f64 {
    let mut command = crate::support::command(&["eval", "--json", "--tasks"].map(AsRef::as_ref));
    command.arg(tasks).args(args);
    let report = crate::support::finish(command, b"").json();
    report["tasks"].as_array().unwrap()[0]["exact_match"].as_f64().unwrap()
}

#[test]
fn plans_and_folders_answer_as_was_measured() {
    let folder = tempdir();
    let (tasks, out) = (tasks(folder.path()), folder.path().join("out"));
    let at = |name: &str| text(&out.join(name));
    let naee =
        quorate!["naee", "--keep", "5", "--tasks", &tasks, "--skip", "--progressive", "--json", "-o", &at("naee")];
    let naee = naee.json();
    has_fields(
        &naee["headline"],
        &["kept_per_layer", "exact_match_naee", "exact_match_random", "exact_match_all_skipping"],
    );
    assert_eq!(eval(&["--plan", &at("naee/plan.toml")], &tasks), answers(&naee, "naee skipping"));

    let mone = quorate!["mone", "--keep", "4", "--tasks", &tasks, "--json", "-o", &at("mone")].json();
    assert_eq!(names_in(&out.join("mone")), ["novices.safetensors", "plan.toml", "report.json"]);
    assert_eq!(eval(&["--plan", &at("mone/plan.toml")], &tasks), answers(&mone, "novices"));

    for by in ["m-smoe", "hc-smoe", "ream"] {
        let path = at(by);
        let merge =
            quorate!["merge-experts", "--by", by, "--keep", "12", "--tasks", &tasks, "--json", "-o", &path].json();
        let model = at(&format!("{by}/model"));
        assert_eq!(eval(&["-m", &model], &tasks), answers(&merge, "merged"), "{by}");
        assert_ne!(quorate!["inspect", "-m", &model, "--json"].json()["fingerprint"], merge["fingerprint"]);
    }
    let aimer = quorate!["aimer", "--items", "0", "--json", "-o", &at("aimer")].json();
    assert_eq!(aimer["headline"]["kept_per_layer"], 16);
    assert!(eval(&["--plan", &at("aimer/plan.toml")], &tasks) <= 100.0);
    assert!(eval(&["--task", "own", "--metric", "gate-sum", "--share", "0.95"], &tasks) > 80.0, "ESFT's selection");
}

#[test]
fn relatives_are_compared_and_known_cells_kept() {
    let folder = tempdir();
    let (tasks, out) = (tasks(folder.path()), folder.path().join("cmp"));
    let run = |relatives: &str| {
        let args = ["--keep", "8", "--metrics", "peu", "--limit", "1"];
        quorate![
            "compare",
            args[0],
            args[1],
            args[2],
            args[3],
            args[4],
            args[5],
            "--relatives",
            relatives,
            "--json",
            "--tasks",
            &tasks,
            "-o",
            &out
        ]
        .json()["relatives"]
            .clone()
    };
    let cells = run("3");
    assert_eq!(cells.as_array().map(Vec::len), Some(12), "all experts, and eleven rows");
    assert_eq!(run("3"), cells);
    let table = fs::read_to_string(folder.path().join("cmp.md")).unwrap();
    for part in ["| naee | least error", "| aimer | weights only |", "over 1 tasks, the first 3 questions"] {
        assert!(table.contains(part), "{table}");
    }
    quorate![
        "compare",
        "--relatives",
        "2",
        "--keep",
        "8",
        "--metrics",
        "peu",
        "--limit",
        "1",
        "--tasks",
        &tasks,
        "-o",
        &out
    ]
    .fails(3, &["relatives on 3 questions", "help: give --relatives 3"]);
}

#[test]
fn what_cannot_be_done_is_said() {
    let folder = tempdir();
    let tasks = tasks(folder.path());
    quorate!["naee", "--keep", "3", "--tasks", &tasks].fails(3, &["3 experts cannot be kept", "help: --keep 4 to"]);
    quorate!["mone", "--access", "frequence", "--tasks", &tasks].fails(3, &["`frequence`", "`frequency`"]);
    quorate!["naee", "--mode", "masc"].fails(2, &["no routing mode `masc`", "mask-full-gates"]);
    quorate!["merge-experts", "--by", "ream", "--group-size", "2", "--keep", "8", "--tasks", &tasks]
        .fails(3, &["8 groups of 2 do not hold 32 experts", "--group-size"]);
    quorate!["mone", "--task", "bioz", "--tasks", &tasks].fails(3, &["no task `bioz`"]);
    for method in ["naee", "mone", "merge-experts", "aimer"] {
        quorate![method, "-m", &fixture("qwen3"), "--tasks", &tasks].fails(3, &["the model has no experts"]);
    }
    quorate!["eval", "--task", "own", "--share", "1.5", "--tasks", &tasks].fails(3, &["share 1.5", "0 to 1"]);
    quorate!["eval", "--task", "own", "--share", "0.5", "--keep", "8"].fails(2, &["--share", "--keep"]);
    quorate!["eval", "--share", "0.5", "--tasks", &tasks].fails(3, &["--share", "--task NAME"]);
    fs::remove_file(Path::new(&tasks).join("arithmetic.train-sample.jsonl")).unwrap();
    let out = text(&folder.path().join("c"));
    quorate![
        "compare",
        "--relatives",
        "1",
        "--limit",
        "1",
        "--keep",
        "16",
        "--metrics",
        "peu",
        "--tasks",
        &tasks,
        "-o",
        &out
    ]
    .fails(3, &["no task files of the split 'train-sample'", "help:"]);
}
