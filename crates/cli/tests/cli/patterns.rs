//! `profile` and `library`: patterns are measured, merged exactly, stored by several processes at once, and never lost.

use std::fs;
use std::path::{Path, PathBuf};

use quorate_lens::Library;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::quorate;
use crate::support::{self, bare, ended, fixture, has_fields, items, names_in, numbers, tempdir};

/// A folder with two task files, `sums` and `people`, of 30 questions each.
pub fn two_tasks() -> TempDir {
    let folder = tempdir();
    for (task, from) in [("sums", "arithmetic"), ("people", "bios")] {
        let text = items(&format!("{from}.test"), 30).replace(&format!("\"{from}\""), &format!("\"{task}\""));
        fs::write(folder.path().join(format!("{task}.jsonl")), text).unwrap();
    }
    folder
}

fn library(folder: &TempDir) -> PathBuf {
    folder.path().join("library.sqlite")
}

fn listed(library: &Path) -> Vec<String> {
    let infos = quorate!["library", "list", "--library", library, "--json"].json();
    infos.as_array().unwrap().iter().map(|i| i["name"].as_str().unwrap().to_string()).collect()
}

#[test]
fn profiling_stores_patterns_and_says_how_well_they_serve() {
    let tasks = two_tasks();
    let library = library(&tasks);
    let json = quorate!["profile", "--tasks", tasks.path(), "--library", &library, "--json"].json();
    let patterns = json["patterns"].as_array().unwrap();
    let names: Vec<&str> = patterns.iter().filter_map(|p| p["name"].as_str()).collect();
    assert_eq!(names, ["people", "sums", "generalist"]);
    for pattern in patterns {
        has_fields(pattern, &["items", "prompt_tokens", "answer_tokens", "phases", "metric", "overlap"]);
        let held_out = if pattern["name"] == "generalist" { 12 } else { 6 };
        assert_eq!(pattern["heldout_items"], held_out, "every fifth: {pattern}");
        let covered = pattern["heldout_coverage"].as_array().unwrap();
        let share = |i: usize| covered[i]["coverage"]["gate_mass"].as_f64().unwrap();
        assert_eq!((&covered[0]["keep"], covered.len()), (&json!(16), 5));
        assert!(share(0) <= 1.0 && share(0) > share(2) && share(2) > 0.25, "{pattern}");
    }
    assert_eq!(patterns[0]["overlap"]["nearest"]["name"], "sums");

    let names = listed(&library);
    assert!(names.contains(&"sums".into()) && names.contains(&"people".into()) && names.contains(&"worldfacts".into()));
    let run = quorate!["run", "78+95=", "--task", "sums", "--library", &library, "--json"].json();
    assert_eq!((&run["task"], &run["text"]), (&json!("sums"), &json!("173")));
    let text = quorate!["profile", "--tasks", tasks.path(), "--library", &library].ok();
    assert!(text.starts_with("held-out coverage") && text.contains("\nsums "), "{text}");
}

/// Two files of one pattern: the same in all but the order of the prompts, and hence in the last bits of sums.
#[track_caller]
fn assert_same(a: &Path, b: &Path) {
    let ((a_header, a), (b_header, b)) = (support::read_safetensors(a), support::read_safetensors(b));
    assert_eq!(a_header["__metadata__"], b_header["__metadata__"]);
    assert_eq!(a_header.keys().collect::<Vec<_>>(), b_header.keys().collect::<Vec<_>>());
    for (name, entry) in a_header.iter().filter(|(name, _)| *name != "__metadata__") {
        let offsets = numbers(&entry["data_offsets"]);
        let range = offsets[0] as usize..offsets[1] as usize;
        let (a, b) = (&a[range.clone()], &b[range]);
        if name.ends_with("keys") {
            assert_eq!(a.len(), b.len(), "{name}");
        } else if entry["dtype"] == "F64" {
            let values = |bytes: &[u8]| -> Vec<f64> {
                bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
            };
            let far = |(a, b): (&f64, &f64)| (a - b).abs() > 1e-12 * a.abs();
            assert!(!values(a).iter().zip(&values(b)).any(far), "{name}");
        } else {
            assert!(a == b, "{name}: counts and keys are the same to the bit");
        }
    }
}

#[test]
fn shards_merge_to_the_whole() {
    let tasks = two_tasks();
    let at = |name: &str| tasks.path().join("out").join(name);
    quorate!["profile", "--tasks", tasks.path(), "-o", &at("whole"), "-q"].ok();
    let mut merge =
        support::command(&["library".as_ref(), "merge".as_ref(), "--library".as_ref(), library(&tasks).as_ref()]);
    for shard in ["0/3", "1/3", "2/3"] {
        let folder = at(&shard[..1]);
        quorate!["profile", "--tasks", tasks.path(), "--shard", shard, "-o", &folder, "-q"].ok();
        let files = names_in(&folder);
        assert_eq!(files, ["people", "sums"].map(|t| format!("{t}.{}-of-3.pattern", &shard[..1])));
        merge.args(files.iter().map(|f| folder.join(f)));
    }
    assert_eq!(support::finish(merge, b"").ok(), "merged people, sums\n");
    quorate!["library", "export", "people", "sums", "-o", &at("merged"), "--library", &library(&tasks)].ok();
    for task in ["people.pattern", "sums.pattern"] {
        assert_same(&at("whole").join(task), &at("merged").join(task));
    }
    quorate!["profile", "--tasks", tasks.path(), "--shard", "3/3", "-o", &at("x")].fails(2, &["3/3", "I below N"]);
    let twice = at("0").join("sums.0-of-3.pattern");
    quorate!["library", "merge", &twice, &twice, "--library", &library(&tasks)].fails(3, &["named twice"]);
}

#[test]
fn the_settings_of_a_profile_matter() {
    let tasks = two_tasks();
    let sums = tasks.path().join("sums.jsonl");
    let profiled = |args: &[&str]| {
        let out = tasks.path().join("out");
        let mut command = support::command(&["profile".as_ref(), "--json".as_ref(), "--tasks".as_ref(), sums.as_ref()]);
        command.arg("-o").arg(&out).args(args);
        support::finish(command, b"").json()["patterns"][0].clone()
    };
    let all = profiled(&[]);
    assert_eq!((&all["items"], &all["phases"]), (&json!(24), &json!("balanced")));
    assert_eq!(all["overlap"]["mean"], Value::Null, "there is no other");
    let few = profiled(&["--limit", "7", "--holdout", "0", "--phase", "answer"]);
    assert_eq!((&few["items"], &few["heldout_items"], &few["phases"]), (&json!(7), &json!(0), &json!("answer")));
    assert_eq!(few["heldout_coverage"][0]["coverage"], Value::Null);

    let refuse = |args: &[&str], code: i32, parts: &[&str]| {
        let mut command = support::command(&["profile".as_ref(), "--tasks".as_ref(), sums.as_ref()]);
        command.arg("--library").arg(library(&tasks)).args(args);
        support::finish(command, b"").fails(code, parts);
    };
    refuse(&["--limit", "0"], 2, &["--limit", "above 0"]);
    refuse(&["--holdout", "1"], 3, &["task `sums` leaves no tokens", "30 of them held out", "help:"]);
    refuse(&["--key-layer", "6"], 3, &["--key-layer 6", "0 to 5"]);
    assert!(!library(&tasks).exists() || !listed(&library(&tasks)).contains(&"sums".into()), "nothing empty is stored");
}

#[test]
fn tasks_lie_in_no_other_folder_and_take_no_other_name() {
    let folder = tempdir();
    let task = |name: &str| {
        let path = folder.path().join("task.jsonl");
        fs::write(&path, items("bios.test", 6).replace("\"bios\"", &format!("\"{name}\""))).unwrap();
        path
    };
    let out = folder.path().join("a/b/c");
    quorate!["profile", "--tasks", &task("../../evil"), "-o", &out, "-q"].ok();
    assert_eq!(names_in(&out), ["%2E.%2F..%2Fevil.pattern"]);
    assert_eq!(names_in(&folder.path().join("a/b")), ["c"]);
    let library = folder.path().join("l.sqlite");
    quorate!["library", "import", &out.join("%2E.%2F..%2Fevil.pattern"), "--library", &library].ok();
    let again = folder.path().join("d/e/f");
    quorate!["library", "export", "../../evil", "-o", &again, "--library", &library].ok();
    assert_eq!((names_in(&again), names_in(&folder.path().join("d/e"))), (names_in(&out), vec!["f".to_string()]));
    for name in ["generalist", "auto", "none", "own", "random"] {
        quorate!["profile", "--tasks", &task(name), "-o", &out].fails(3, &[&format!("`{name}`"), "help:"]);
    }
    quorate!["library", "merge", "bios", "code", "--into", "auto", "--library", &library].fails(3, &["`auto`"]);
}

#[test]
fn the_library_lists_shows_and_removes() {
    let folder = tempdir();
    let library = library(&folder);
    let all = listed(&library);
    assert_eq!(all.len(), 20, "those of the embedded model: {all:?}");
    let list = quorate!["library", "list", "--library", &library];
    assert!(
        list.out.starts_with("pattern") && list.out.contains("\narithmetic ") && list.err.contains("20 patterns in")
    );

    let show = quorate!["library", "show", "bios", "--library", &library, "--json"].json();
    has_fields(&show, &["info", "summary", "metric", "ranking"]);
    let ranking = show["ranking"].as_array().unwrap();
    assert_eq!(ranking.len(), 6);
    for layer in ranking {
        let mut experts = numbers(&layer["experts"]);
        experts.sort_unstable();
        assert_eq!(experts, (0..32).collect::<Vec<u64>>());
    }
    let reap = quorate!["library", "show", "bios", "--metric", "reap", "--library", &library].ok();
    assert!(reap.contains("experts by reap, best first:") && reap.contains("  layer 5: "), "{reap}");

    quorate!["library", "remove", "bios", "no-such-task", "--library", &library].fails(3, &["no task `no-such-task`"]);
    assert_eq!(listed(&library).len(), 20, "all or none");
    assert_eq!(quorate!["library", "remove", "bios", "code", "--library", &library].ok(), "removed bios, code\n");
    assert_eq!(listed(&library).len(), 18);
    quorate!["library", "show", "bois", "--library", &library]
        .fails(3, &["no task `bois`", "help: there is arithmetic, "]);
}

#[test]
fn the_library_exports_imports_and_merges() {
    let tasks = two_tasks();
    let (first, second) = (library(&tasks), tasks.path().join("second.sqlite"));
    quorate!["profile", "--tasks", tasks.path(), "--library", &first, "-q"].ok();
    let (full, compact) = (tasks.path().join("full"), tasks.path().join("compact"));
    quorate!["library", "export", "sums", "people", "-o", &full, "--library", &first].ok();
    quorate!["library", "export", "sums", "people", "-o", &compact, "--compact", "--library", &first].ok();
    let size = |folder: &Path| fs::metadata(folder.join("sums.pattern")).unwrap().len();
    assert!(size(&compact) * 10 < size(&full), "{} {}", size(&compact), size(&full));

    let (a, b) = (compact.join("sums.pattern"), compact.join("people.pattern"));
    assert_eq!(
        quorate!["library", "import", &a, &b, "--library", &second, "--json"].json()["imported"],
        json!(["sums", "people"])
    );
    let answer =
        |library: &Path| quorate!["run", "Compute 609-5.", "--task", "sums", "--library", library, "--json"].json();
    assert_eq!(answer(&first)["kept_per_layer"], answer(&second)["kept_per_layer"]);
    let found = |library: &Path| quorate!["run", "Compute 609-5.", "--library", library, "--json"].json();
    assert_eq!(found(&first)["distance"], found(&second)["distance"], "retrieval needs no more than a compact file");

    quorate!["library", "merge", "sums", "people", "--library", &first].fails(3, &["different tasks", "--into NAME"]);
    quorate!["library", "merge", "sums", "people", "--into", "both", "--library", &first].ok();
    quorate!["library", "merge", "sums", "people", "--into", "both", "--library", &second].ok(); // of compact ones
    for library in [&first, &second] {
        let info = quorate!["library", "show", "both", "--library", library, "--json"].json()["info"].clone();
        assert_eq!((&info["items"], &info["merged_from"]), (&json!(48), &json!(["sums", "people"])));
    }
    // As good as one profile of both: it is what the generalist is.
    let both = quorate!["library", "show", "both", "--library", &first, "--json"].json();
    let generalist = quorate!["library", "show", "generalist", "--library", &first, "--json"].json();
    assert_eq!(both["summary"]["heldout_coverage"], generalist["summary"]["heldout_coverage"]);
}

#[test]
fn patterns_of_another_model_are_told_apart() {
    let tasks = two_tasks();
    let library = library(&tasks);
    let (olmoe, mixtral) = (fixture("olmoe"), fixture("mixtral"));
    let (out, sums) = (tasks.path().join("out"), tasks.path().join("sums.jsonl"));
    quorate!["profile", "-m", &olmoe, "--tasks", &sums, "-o", &out, "-q"].ok();
    let pattern = out.join("sums.pattern");
    quorate!["library", "import", &pattern, "--library", &library].ok();
    assert!(!listed(&library).contains(&"sums".into()), "the embedded model's only");
    assert!(quorate!["library", "list", "--all", "--library", &library].ok().contains("\nsums "));
    let here = quorate!["library", "list", "-m", &olmoe, "--library", &library, "--json"].json();
    assert_eq!((here.as_array().map(Vec::len), &here[0]["name"]), (Some(1), &json!("sums")));

    quorate!["run", "x", "--task", "sums", "--library", &library]
        .fails(3, &["pattern `sums` was made for model", "this is model", "help: profile this model"]);
    quorate!["run", "x", "-m", &mixtral, "--task", "bios", "--library", &library].fails(3, &["was made for model"]);
    quorate!["run", "x", "-m", &mixtral, "--task", "zzz", "--library", &library]
        .fails(3, &["no patterns of model", "help:"]);
    quorate!["library", "merge", &pattern, "bios", "--into", "x", "--library", &library]
        .fails(3, &["was made for model"]);

    // A pattern that says it is this model's, but is not.
    let (mut header, data) = support::read_safetensors(&pattern);
    let meta = header["__metadata__"]["quorate"].as_str().unwrap().to_string();
    let ours = quorate!["inspect", "--json"].json()["fingerprint"].as_str().unwrap().to_string();
    let theirs = quorate!["inspect", "-m", &olmoe, "--json"].json()["fingerprint"].as_str().unwrap().to_string();
    header["__metadata__"]["quorate"] = json!(meta.replace(&theirs, &ours));
    support::write_safetensors(&pattern, &header, &data);
    quorate!["library", "import", &pattern, "--library", &library].ok();
    quorate!["run", "x", "--task", "sums", "--library", &library]
        .fails(3, &["pattern `sums`", "this model's shape", "help:"]);
    quorate!["run", "x", "--library", &library].fails(3, &["pattern `sums`", "this model's shape", "help:"]);
}

#[test]
fn damaged_pattern_files_are_refused_and_nothing_is_stored() {
    let folder = tempdir();
    let (library, out) = (library(&folder), folder.path().join("out"));
    quorate!["library", "export", "bios", "code", "-o", &out, "--library", &library].ok();
    let (good, bad) = (out.join("code.pattern"), out.join("bios.pattern"));
    quorate!["library", "remove", "bios", "code", "--library", &library].ok();
    let whole = fs::read(&bad).unwrap();
    let mut huge = whole.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    for bytes in [&b"no pattern"[..], b"", &whole[..100], &whole[..whole.len() - 1], &huge] {
        fs::write(&bad, bytes).unwrap();
        quorate!["library", "import", &good, &bad, "--library", &library]
            .fails(3, &["bios.pattern", "pattern", "help:"]);
    }
    let (mut header, data) = support::read_safetensors(&good);
    let meta = header["__metadata__"]["quorate"].as_str().unwrap().replace("\"version\":1", "\"version\":9");
    header["__metadata__"]["quorate"] = json!(meta);
    support::write_safetensors(&bad, &header, &data);
    quorate!["library", "import", &good, &bad, "--library", &library].fails(3, &["bios.pattern", "version 9", "help:"]);
    quorate!["library", "import", &out.join("none.pattern"), "--library", &library]
        .fails(3, &["none.pattern", "No such file"]);
    let names = listed(&library);
    assert!(!names.contains(&"code".into()) && names.len() == 18, "all or none: {names:?}");
}

#[test]
fn processes_store_patterns_at_once() {
    let folder = tempdir();
    let new = folder.path().join("home"); // of which all are the first user
    let children: Vec<_> = (0..6)
        .map(|i| {
            let path = folder.path().join(format!("{i}.jsonl"));
            fs::write(&path, items("bios.test", 5).replace("\"bios\"", &format!("\"task{i}\""))).unwrap();
            let mut command = bare(&new);
            command.args(["profile", "-q", "--threads", "1", "--tasks"]).arg(path).spawn().unwrap()
        })
        .collect();
    children.into_iter().for_each(|child| drop(ended(child).ok()));
    let mut list = bare(&new);
    list.args(["library", "list", "--json"]);
    assert_eq!(support::finish(list, b"").json().as_array().map(Vec::len), Some(26));
    let left: Vec<String> = names_in(&new).into_iter().filter(|n| n.contains("tmp")).collect();
    assert_eq!(left, [""; 0]);
}

#[test]
fn a_new_version_of_the_program_keeps_what_the_user_stored() {
    let folder = tempdir();
    let path = library(&folder);
    let tasks = folder.path().join("arithmetic.jsonl");
    fs::write(&tasks, items("arithmetic.test", 10)).unwrap();
    let count =
        |name: &str| quorate!["library", "show", name, "--library", &path, "--json"].json()["info"]["items"].clone();
    quorate!["profile", "--tasks", &tasks, "--library", &path, "-q"].ok();
    quorate!["library", "merge", "bios", "code", "--into", "context", "--library", &path].ok();
    let before = ["arithmetic", "context", "bios"].map(count);
    Library::open(&path).unwrap().set_note("embedded", "an older version").unwrap();
    assert_eq!(["arithmetic", "context", "bios"].map(count), before);
    assert_eq!(before[0], 8);
}

#[test]
fn keys_of_a_later_layer_find_tasks_too() {
    let tasks = two_tasks();
    let (library, olmoe) = (library(&tasks), fixture("olmoe"));
    quorate!["profile", "-m", &olmoe, "--tasks", tasks.path(), "--key-layer", "1", "--library", &library, "-q"].ok();
    let json = quorate!["run", "78+95=", "-m", &olmoe, "--library", &library, "--max-tokens", "4", "--json"].json();
    let task = json["nearest"].as_str().expect("a task is found").to_string();
    // The second message finds the same task; looking for it must not leave experts out of memory.
    let chat = |args: &[&str]| {
        let mut command = support::command(&["chat".as_ref(), "-m".as_ref(), olmoe.as_ref(), "--library".as_ref()]);
        command.arg(&library).args(["--max-tokens", "9", "-q"]).args(args);
        support::finish(command, b"78+95=\n78+95=\n78+95=\n").ok()
    };
    assert_eq!(
        chat(&["--each-message", "--scope", "local", "--task", "auto"]),
        chat(&["--scope", "local", "--task", &task])
    );
}

/// What the program itself recorded, given back as another engine's routing, ranks experts as its own profile does.
#[test]
fn recorded_routing_makes_a_pattern() {
    let folder = tempdir();
    let at = |name: &str| folder.path().join(name);
    let library = at("l.sqlite");
    let logits = at("logits.safetensors");
    let prompt = "<|user|>78+95=<|assistant|>";
    quorate!["record", "--prompt", format!("{prompt}1"), "--sites", "router_logits", "-o", &logits].ok();
    fs::write(at("one.jsonl"), json!({ "task": "mine", "prompt": prompt, "answer": "1" }).to_string()).unwrap();

    let args = ["profile", "--from-trace", logits.to_str().unwrap(), "--name", "seen", "--library"];
    let told = quorate![args[0], args[1], args[2], args[3], args[4], args[5], &library, "--json"].json();
    assert_eq!(told["patterns"][0]["metric"], "peu");
    quorate!["profile", "--tasks", &at("one.jsonl"), "--phase", "both", "--holdout", "0", "--library", &library].ok();
    let ranking = |name: &str, metric: &str| {
        quorate!["library", "show", name, "--metric", metric, "--library", &library, "--json"].json()["ranking"].clone()
    };
    for metric in ["peu", "frequency", "gate-sum", "tcess"] {
        assert_eq!(ranking("seen", metric), ranking("mine", metric), "{metric}");
    }
    quorate!["library", "show", "seen", "--metric", "reap", "--library", &library].fails(3, &["no metric `reap`"]);

    let ids = r#"[[[0,1,2,3],[0,1,2,3],[0,1,2,3],[0,1,2,3],[0,1,2,3],[0,1,2,3]]]"#;
    fs::write(at("ids.json"), ids).unwrap();
    let told = quorate!["profile", "--from-trace", &at("ids.json"), "--name", "ids", "--library", &library].ok();
    assert!(told.contains("metric frequency"), "{told}");
    assert_eq!(ranking("ids", "frequency")[0]["experts"][0], 0);
    let plan = at("plan.toml");
    quorate!["prune", "--task", "ids", "--metric", "frequency", "--keep", "4", "--library", &library, "-o", &plan].ok();
    assert!(fs::read_to_string(&plan).unwrap().contains("experts = \"0-3\""));
    quorate!["prune", "--task", "ids", "--keep", "4", "--library", &library, "-o", &at("x")]
        .fails(3, &["no metric `peu`", "frequency"]);
    quorate!["profile", "--from-trace", &at("one.jsonl"), "--name", "x"].fails(3, &["one.jsonl", "--format"]);
    quorate!["profile", "--from-trace", &at("ids.json")].fails(2, &["--name"]);
    quorate!["profile", "--from-trace", &at("ids.json"), "--name", "x", "--format", "y"].fails(2, &["imatrix"]);
}
