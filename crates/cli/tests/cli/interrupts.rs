//! Ctrl-C and worse: nothing half-written is left, and nothing that was done is lost.
#![cfg(unix)]

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::quorate;
use crate::support::{bare, command, ended, finish, home, items, names_in, signal, tempdir, wait_until};

/// A home of its own that shares the unpacked model.
fn own_home() -> TempDir {
    let own = tempdir();
    for name in names_in(home()).into_iter().filter(|n| n.starts_with("embedded-")) {
        std::os::unix::fs::symlink(home().join(&name), own.path().join(name)).unwrap();
    }
    own
}

/// Two task files, of which the second takes a while.
fn tasks(folder: &Path) -> PathBuf {
    let tasks = folder.join("tasks");
    fs::create_dir(&tasks).unwrap();
    for (task, from, n) in [("a", "bios.train-sample", 30), ("b", "arithmetic.train-sample", 500)] {
        let own = format!("\"{}\"", from.split('.').next().unwrap());
        fs::write(tasks.join(format!("{task}.jsonl")), items(from, n).replace(&own, &format!("\"{task}\""))).unwrap();
    }
    tasks
}

fn profile(home: &Path, tasks: &Path, out: &Path) -> Command {
    let mut command = bare(home);
    command.args(["profile", "--threads", "1", "--tasks"]).arg(tasks).arg("-o").arg(out);
    command
}

fn partials(home: &Path) -> Vec<String> {
    names_in(&home.join("profiles"))
}

/// The files of two folders are the same.
#[track_caller]
fn same_files(a: &Path, b: &Path) {
    assert_eq!(names_in(a), names_in(b));
    assert!(!names_in(a).is_empty());
    for name in names_in(a) {
        assert!(fs::read(a.join(&name)).unwrap() == fs::read(b.join(&name)).unwrap(), "{name}");
    }
}

#[test]
fn a_killed_profile_goes_on_and_ends_the_same() {
    let home = own_home();
    let tasks = tasks(home.path());
    let (whole, resumed) = (home.path().join("whole"), home.path().join("resumed"));
    finish(profile(home.path(), &tasks, &whole), b"").ok();
    assert_eq!(partials(home.path()), [""; 0], "what is finished is tidied away");

    let mut killed = profile(home.path(), &tasks, &resumed).spawn().unwrap();
    wait_until("the first task is saved", || partials(home.path()).iter().any(|n| n.ends_with(".partial")));
    killed.kill().unwrap();
    assert_eq!(ended(killed).code, None, "it was killed");
    assert_eq!(names_in(&resumed), [""; 0], "patterns are written when all are there");

    let again = finish(profile(home.path(), &tasks, &resumed), b"");
    assert!(again.err.contains("a: going on at "), "{}", again.err);
    again.ok();
    same_files(&whole, &resumed);
}

#[test]
fn an_interrupted_profile_goes_on_in_the_middle_of_a_task() {
    let home = own_home();
    let tasks = tasks(home.path());
    let (whole, resumed) = (home.path().join("whole"), home.path().join("resumed"));
    finish(profile(home.path(), &tasks, &whole), b"").ok();

    let interrupted = [200, 100, 400, 50, 800].into_iter().any(|delay| {
        let child = profile(home.path(), &tasks, &resumed).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        signal(&child, "INT");
        let output = ended(child);
        if output.code == Some(3) && partials(home.path()).iter().any(|n| n.contains("-b-")) {
            assert!(output.err.contains("what is done so far is kept, give the same command again"), "{}", output.err);
            return true;
        }
        let _ = fs::remove_dir_all(&resumed); // too early or too late
        let _ = fs::remove_dir_all(home.path().join("profiles"));
        false
    });
    assert!(interrupted, "no delay met the second task");
    assert!(partials(home.path()).iter().all(|n| n.ends_with(".partial")), "{:?}", partials(home.path()));
    let again = finish(profile(home.path(), &tasks, &resumed), b"");
    assert!(again.err.contains("b: going on at "), "{}", again.err);
    again.ok();
    same_files(&whole, &resumed);
    assert_eq!(partials(home.path()), [""; 0]);

    // A damaged rest is told and not used; --restart does not look at it.
    let child = profile(home.path(), &tasks, &home.path().join("x")).spawn().unwrap();
    wait_until("the first task is saved", || partials(home.path()).iter().any(|n| n.ends_with(".partial")));
    signal(&child, "KILL");
    ended(child);
    for name in partials(home.path()) {
        fs::write(home.path().join("profiles").join(name), "rubbish").unwrap();
    }
    let again = finish(profile(home.path(), &tasks, &resumed), b"");
    assert!(again.err.contains("is damaged; a begins anew"), "{}", again.err);
    same_files(&whole, &resumed);
}

#[test]
fn a_killed_profile_leaves_the_library_as_it_was() {
    let home = own_home();
    let tasks = tasks(home.path());
    let list = || {
        let mut list = bare(home.path());
        list.args(["library", "list", "--json"]);
        finish(list, b"").json()
    };
    let before = list();
    for name in ["INT", "KILL", "TERM"] {
        let mut into_library = bare(home.path());
        into_library.args(["profile", "-q", "--threads", "1", "--restart", "--tasks"]).arg(&tasks);
        let child = into_library.spawn().unwrap();
        wait_until("it works", || !partials(home.path()).is_empty());
        signal(&child, name);
        assert_ne!(ended(child).code, Some(0), "{name}");
        assert_eq!(list(), before);
        fs::remove_dir_all(home.path().join("profiles")).unwrap();
    }
}

#[test]
fn an_interrupted_answer_shows_what_there_is_and_fails() {
    let folder = tempdir();
    let plan = folder.path().join("endless.toml");
    let no_end = "version = 1\n[[intervene]]\nsite = 'logits'\nop = 'bias'\nby = -1e6\nunits = '2'\n"; // of </s>
    fs::write(&plan, no_end).unwrap();
    let endless = || {
        let mut run = command(&["run", "Tell", "--raw", "--max-tokens", "500", "-q", "--plan"].map(AsRef::as_ref));
        run.arg(&plan);
        run
    };
    let whole = finish(endless(), b"").ok();
    let mut child = endless().spawn().unwrap();
    let mut first = [0; 4];
    child.stdout.as_mut().expect("it is piped").read_exact(&mut first).unwrap();
    signal(&child, "INT");
    let output = ended(child);
    let shown = [&first, output.out.trim_end().as_bytes()].concat();
    assert_eq!((output.code, output.err.as_str()), (Some(3), "quorate: interrupted\n"));
    assert!(
        whole.as_bytes().starts_with(&shown) && shown.len() + 100 < whole.len(),
        "{} of {}",
        shown.len(),
        whole.len()
    );
}

#[test]
fn waiting_for_input_ends_at_once() {
    for args in [&["run", "-"][..], &["chat"]] {
        let mut command = command(&args.iter().map(AsRef::as_ref).collect::<Vec<_>>());
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take();
        std::thread::sleep(Duration::from_millis(300));
        signal(&child, "INT");
        let output = ended(child);
        assert!(output.code == Some(130) || output.code.is_none(), "{args:?}: {output:?}");
        drop(input);
    }
}

#[test]
fn an_interrupted_prune_leaves_all_or_nothing() {
    let folder = tempdir();
    let (mut stopped, mut done) = (0, 0);
    for delay in [0, 10, 20, 30, 40, 50, 60, 70, 80, 100, 2000] {
        let out = folder.path().join("out");
        let args = ["prune", "--task", "bios", "--keep", "31", "--as", "hf", "--shard-size", "2MiB", "-o"];
        let child = command(&args.map(AsRef::as_ref)).arg(&out).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        signal(&child, "INT");
        let output = ended(child);
        if output.code == Some(0) {
            assert_eq!(quorate!["inspect", "-m", &out, "--json"].json()["experts"], 31);
            fs::remove_dir_all(&out).unwrap();
            done += 1;
        } else {
            assert!(output.code.is_none() || output.err.contains("cancelled while"), "{}", output.err);
            stopped += 1;
        }
        assert_eq!(names_in(folder.path()), [""; 0], "after {delay} ms");
    }
    assert!(stopped > 0 && done > 0, "{stopped} {done}");
}

#[test]
fn an_interrupted_comparison_keeps_its_cells() {
    let folder = tempdir();
    let (out, tasks) = (folder.path().join("out"), folder.path().join("t.jsonl"));
    fs::write(&tasks, items("arithmetic.test", 40) + &items("bios.test", 40)).unwrap();
    let compare = || {
        let mut compare = command(&["compare", "--keep", "16,8", "--json", "-q", "-o"].map(AsRef::as_ref));
        compare.arg(&out).arg("--tasks").arg(&tasks);
        compare
    };
    let child = compare().spawn().unwrap();
    let json = folder.path().join("out.json");
    wait_until("some cells are kept", || json.exists());
    signal(&child, "INT");
    let output = ended(child);
    assert_eq!(output.code, Some(3), "{}", output.err);
    assert!(output.err.contains("interrupted; what is done so far is kept"), "{}", output.err);
    let kept: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let kept = kept["cells"].as_array().unwrap().clone();
    let all = finish(compare(), b"").json()["cells"].as_array().unwrap().clone();
    assert!(!kept.is_empty() && kept.len() < all.len() && all.starts_with(&kept));
    assert_eq!(all[0]["source"], json!("all"));
    assert_eq!(names_in(folder.path()), ["out.json", "out.md", "t.jsonl"]);
}

#[test]
fn an_interrupted_evaluation_says_so() {
    let child = command(&["eval".as_ref(), "-q".as_ref()]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    signal(&child, "INT");
    let output = ended(child);
    assert_eq!((output.code, output.err.as_str(), output.out.as_str()), (Some(3), "quorate: interrupted\n", ""));
}
