//! Input and surroundings that are wrong: one clear line that names the thing and the mend, and nothing lost.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::quorate;
use crate::support::{self, bare, command, finish, fixture, home, items, names_in, tempdir};

/// `profile` and `eval` both refuse these task files.
#[track_caller]
fn tasks_refused(text: &[u8], parts: &[&str]) {
    let folder = tempdir();
    let tasks = folder.path().join("tasks.jsonl");
    fs::write(&tasks, text).unwrap();
    let library = folder.path().join("library.sqlite");
    quorate!["profile", "--tasks", &tasks, "--library", &library].fails(3, parts);
    quorate!["eval", "--tasks", &tasks, "--library", &library].fails(3, parts);
    assert_eq!(names_in(folder.path()), ["tasks.jsonl"], "refused before anything is made");
}

#[test]
fn task_files() {
    let good = r#"{"task":"a","prompt":"x","answer":"y"}"#;
    let after = |line: &str| format!("{good}\n{good}\n{line}\n{good}\n");
    for (line, part) in [
        (r#"{"task":"a","prompt":"x""#, "no valid JSON"),
        (r#"{"task":"a","prompt":"x","answer":"y"} extra"#, "no valid JSON"),
        (r#"["a"]"#, "an object with task, prompt and answer"),
        (r#"{"task":"a","promt":"x","answer":"y"}"#, "'prompt' is missing; help: is 'promt' meant"),
        (r#"{"task":"a","prompt":7,"answer":"y"}"#, "'prompt' is a number"),
        (r#"{"task":"","prompt":"x","answer":"y"}"#, "'task' is empty"),
        (r#"{"task":"a","prompt":"x","answer":"y","meta":3}"#, "'meta' is a number"),
    ] {
        tasks_refused(after(line).as_bytes(), &["tasks.jsonl:3: ", part]);
    }
    let not_utf8 = [good.as_bytes(), b"\n{\"task\":\"\xff\"}\n"].concat();
    tasks_refused(&not_utf8, &["tasks.jsonl:2: ", "no UTF-8 text: byte 10"]);
    tasks_refused(b"", &["tasks.jsonl has no questions", "help: each line"]);
    tasks_refused(b"\n \n", &["tasks.jsonl has no questions"]);
    quorate!["profile", "--tasks", "/no/such/tasks.jsonl"].fails(3, &["/no/such/tasks.jsonl", "No such file"]);
    let empty = tempdir();
    quorate!["eval", "--tasks", empty.path()].fails(3, &["no task files of the split 'test'", "the folder is empty"]);
    quorate!["eval", "--split", "tset"]
        .fails(3, &["no task files of the split 'tset'", "did you mean the split 'test'?"]);
    quorate!["eval", "-m", &fixture("olmoe")].fails(3, &["no task files", "help: give --tasks"]);
    quorate!["profile", "-m", &fixture("qwen3"), "--tasks", empty.path()].fails(3, &["no task files"]);
}

#[test]
fn names_are_suggested() {
    quorate!["run", "x", "--task", "arithmetik"].fails(3, &["no task `arithmetik`", "did you mean `arithmetic`?"]);
    quorate!["run", "x", "--task", "zzzzzz"].fails(3, &["no task `zzzzzz`", "help: there is arithmetic, bios, "]);
    quorate!["bench", "--task", "bois"].fails(3, &["did you mean `bios`?"]);
    quorate!["eval", "--task", "bois"].fails(3, &["did you mean `bios`?"]);
    quorate!["prune", "--task", "bios,cod", "-o", "x"].fails(3, &["no task `cod`", "did you mean `code`?"]);
    for command in [&["run", "x"][..], &["run", "x", "--task", "none"], &["eval"], &["bench"], &["chat"]] {
        let mut command = support::command(&command.iter().map(AsRef::as_ref).collect::<Vec<_>>());
        command.args(["--metric", "raep"]);
        finish(command, b"").fails(3, &["no metric `raep`", "did you mean `reap`?"]);
    }
    quorate!["library", "show", "bios", "--metric", "raep"].fails(3, &["did you mean `reap`?"]);
    quorate!["record", "--tokens", "1", "--sites", "logitz", "-o", "x"]
        .fails(3, &["no site `logitz`", "help: the sites are"]);
    assert!(!Path::new("x").exists());
}

#[test]
fn numbers_of_experts() {
    for scope in ["local", "global", "global-share"] {
        for keep in ["0", "3", "33", "18446744073709551615"] {
            quorate!["run", "78+95=", "--keep", keep, "--scope", scope].fails(
                3,
                &[&format!("cannot keep {keep} experts per layer"), "a token uses 4", "help: --keep 4 to --keep 32"],
            );
        }
        quorate!["run", "78+95=", "--keep", "4", "--scope", scope, "-q"].ok();
        quorate!["run", "78+95=", "--keep", "32", "--scope", scope, "-q"].ok();
    }
    quorate!["run", "x", "--protect", "7:1"].fails(3, &["layer 7 has no experts", "help: 0-5 have"]);
    quorate!["run", "x", "--protect", "1:32"].fails(3, &["expert 32 of layer 1", "help: the layer has 32"]);
    quorate!["run", "x", "--protect", "1-2"].fails(2, &["`1-2`", "LAYER:EXPERT"]);
    quorate!["run", "x", "--keep", "4", "--scope", "local", "--protect", "0:0,0:1,0:2,0:3,0:4"]
        .fails(3, &["cannot keep 4 experts in layer 0", "help: keep between 5 and 32"]);
}

#[test]
fn files_of_protected_experts() {
    let folder = tempdir();
    let list = |text: &str| {
        std::fs::write(folder.path().join("list.json"), text).unwrap();
        folder.path().join("list.json")
    };
    let run = |file: &Path| quorate!["run", "x", "--keep", "4", "--scope", "local", "--protect-file", file];
    run(&folder.path().join("none.json")).fails(3, &["cannot read", "none.json"]);
    run(&list("layer,expert")).fails(3, &["list.json: ", "help: a list of experts is like"]);
    run(&list(r#"[{"layer": 7, "expert": 1}]"#)).fails(3, &["layer 7 has no experts", "help: 0-5 have"]);
    run(&list(r#"[{"layer": 1, "expert": -1}]"#)).ok();
    let prune = |name: &str, args: &[&str]| {
        let out = folder.path().join(name);
        let mut command = support::command(&["prune", "--task", "bios", "--keep", "4", "-o"].map(AsRef::as_ref));
        command.arg(&out).args(args);
        finish(command, b"").ok();
        std::fs::read_to_string(out).unwrap()
    };
    let file = list(r#"[{"layer": 1, "expert": 3}, {"layer": 1, "expert": 4}, {"layer": 5, "expert": 0}]"#);
    let by_file = prune("file.toml", &["--protect-file", file.to_str().unwrap()]);
    assert_eq!(by_file, prune("flags.toml", &["--protect", "1:3,1:4,5:0"]));
    assert_ne!(by_file, prune("none.toml", &[]));
    quorate!["run", "x", "--task", "none", "--protect-file", &file].fails(3, &["--protect-file choose"]);
}

#[test]
fn sampling_and_text() {
    quorate!["run", "x", "--temperature=-1"].fails_with_notes(&["temperature is -1", "help:"]);
    quorate!["run", "x", "--top-p", "2"].fails_with_notes(&["top_p is 2", "help:"]);
    quorate!["run", "x", "--threads", "0"].fails(3, &["--threads 0", "help: give 1 to 1024"]);
    quorate!["run", "", "--raw"].fails(3, &["the prompt is empty", "help:"]);
    let file = tempdir();
    let out = file.path().join("r");
    quorate!["record", "--prompt", "", "--sites", "z", "-o", &out].fails(3, &["the prompt is empty", "help:"]);
    quorate!["record", "--tokens", &["5"; 513].join(","), "--sites", "z", "-o", &out]
        .fails(3, &["513 tokens", "512", "help:"]);
    quorate!["record", "--tokens", "4096", "--sites", "z", "-o", &out].fails(3, &["token 4096", "vocabulary of 4096"]);
    quorate!["record", "--tokens", "1", "--sites", "z", "--layers", "6", "-o", &out]
        .fails(3, &["layer 6", "help: the model has 6"]);
    quorate!["record", "--tokens", "1", "--sites", "z", "--layers", "2-1", "-o", &out]
        .fails(3, &["`2-1`", "help: write"]);
    quorate!["record", "--tokens", "1", "--sites", "mlp_hidden", "-o", &out]
        .fails(3, &["nothing was recorded", "help:"]);
    assert_eq!(names_in(file.path()), [""; 0]);
}

#[test]
fn plans() {
    let folder = tempdir();
    let path = folder.path().join("plan.toml");
    let refused = |plan: &str, parts: &[&str]| {
        fs::write(&path, plan).unwrap();
        for command in [&["run", "78+95="][..], &["eval", "--limit", "1"]] {
            let mut command = support::command(&command.iter().map(AsRef::as_ref).collect::<Vec<_>>());
            command.args(["-q", "--plan"]).arg(&path);
            let message = finish(command, b"").fails(3, parts);
            assert!(message.contains("plan.toml"), "{message}");
        }
    };
    let intervene = |rest: &str| format!("version = 1\n[[intervene]]\n{rest}");
    refused("", &["missing field `version`"]);
    refused("rubbish", &["line 1"]);
    refused("version = 9", &["plan version 9", "help:"]);
    refused("version = 1\nkeap = []", &["unknown field `keap`", "line 2"]);
    refused("version = 1\nrouting_mode = 'maks'", &["`maks`", "`mask`"]);
    refused("version = 1\nmodel = '0123456789abcdef'", &["was made for model 0123456789abcdef", "help:"]);
    refused("version = 1\n[[keep]]\nlayer = 6\nexperts = '0-9'", &["layer 6 has no experts"]);
    refused("version = 1\n[[keep]]\nlayer = 0\nexperts = '0-32'", &["layer 0 has only 32 experts"]);
    refused("version = 1\n[[keep]]\nlayer = 0\nexperts = '0-2'", &["layer 0 keeps 3 experts", "help: keep at least 4"]);
    refused("version = 1\n[[keep]]\nlayer = 0\nexperts = '0-99999999999'", &["`0-99999999999`", "help: write"]);
    let many = format!("version = 1\n[[keep]]\nlayer = 0\nexperts = '{}'", ["0-16777215"; 5000].join(","));
    refused(&many, &["layer 0 has only 32 experts"]);
    let twice = "version = 1\n[[keep]]\nlayer = 0\nexperts = '0-9'\n[[keep]]\nlayer = 0\nexperts = '0-9'";
    refused(twice, &["layer 0 is named twice", "help:"]);
    refused(&intervene("site = 'zz'\nop = 'zero'"), &["no site `zz`", "help:"]);
    refused(&intervene("site = 'z'\nop = 'scael'\nby = 2.0"), &["no operation `scael`", "`scale`", "help:"]);
    refused(&intervene("site = 'z'\nop = 'scale'"), &["needs `by`"]);
    refused(&intervene("site = 'z'\nop = 'zero'\nby = 1.0"), &["has no `by`"]);
    refused(&intervene("site = 'z'\nop = 'zero'\nlayrs = '1'"), &["unknown field `layrs`"]);
    refused(&intervene("site = 'z'\nop = 'zero'\nlayers = '6'"), &["layer 6 does not exist"]);
    refused(&intervene("site = 'z'\nop = 'zero'\nunits = '8'"), &["unit 8 does not exist, there are 8"]);
    refused(&intervene("site = 'z'\nop = 'mask'"), &["not possible there", "help: use it at router_logits"]);
    refused(&intervene("site = 'mlp_hidden'\nop = 'zero'"), &["none of the chosen layers has this site", "help:"]);
    let file = "site = 'z'\nop = 'patch'\nvalue = {file = 'none.safetensors', tensor = 'x'}";
    refused(&intervene(file), &["none.safetensors", "No such file"]);
    quorate!["record", "--tokens", "1", "--sites", "z", "-o", &folder.path().join("none.safetensors")].ok();
    refused(&intervene(file), &["none.safetensors has no tensor x"]);

    fs::write(&path, intervene("site = 'z'\nop = 'add'\nvalue = [1.0, 2.0]")).unwrap();
    quorate!["run", "x", "-q", "--plan", &path].fails(3, &["`add` at z", "2 values given", "help: give 32"]);
    fs::write(&path, intervene("site = 'resid_post'\nop = 'scale'\nby = 1e38")).unwrap();
    quorate!["run", "x", "-q", "--plan", &path].fails(3, &["router logits of layer 1 are not numbers"]);
    fs::write(&path, b"version = 1 # \xff").unwrap();
    quorate!["run", "x", "-q", "--plan", &path].fails(3, &["plan.toml", "UTF-8"]);
    quorate!["run", "x", "-q", "--plan", &folder.path().join("no.toml")].fails(3, &["no.toml", "No such file"]);
}

#[test]
fn a_library_that_is_none() {
    let folder = tempdir();
    let library = folder.path().join("library.sqlite");
    fs::write(&library, "this is no database, and longer than its header would be: ".repeat(20)).unwrap();
    for command in
        [&["run", "x"][..], &["library", "list"], &["eval", "--task", "own"], &["prune", "--task", "bios", "-o", "x"]]
    {
        let mut command = support::command(&command.iter().map(AsRef::as_ref).collect::<Vec<_>>());
        command.arg("--library").arg(&library);
        finish(command, b"").fails(3, &["library.sqlite: file is not a database; help: check"]);
    }
    quorate!["library", "list", "--library", folder.path()].fails(3, &["unable to open database file", "help:"]);
    quorate!["library", "list", "--library", &library.join("x")]
        .fails(3, &["library.sqlite", "help: set QUORATE_HOME"]);
    let before = fs::read(&library).unwrap();
    assert!(before.starts_with(b"this is no database"), "it is left alone");
}

#[test]
fn outputs_that_are_no_files() {
    let folder = tempdir();
    for (out, part) in [("/dev/null", "no regular file"), ("/no/such/folder/x", "No such file"), ("/proc/x", "")] {
        if cfg!(not(target_os = "linux")) {
            break;
        }
        quorate!["record", "--tokens", "1", "--sites", "z", "-o", out].fails(3, &[out, part]);
        quorate!["prune", "--task", "bios", "-o", out].fails(3, &[out, part]);
        quorate!["prune", "--task", "bios", "--as", "hf", "-o", out].fails(3, &[out]);
    }
    let file = folder.path().join("file");
    fs::write(&file, "mine").unwrap();
    quorate!["profile", "--limit", "1", "-o", &file].fails(3, &["cannot make the folder", "file"]);
    quorate!["library", "export", "-o", &file].fails(3, &["cannot make the folder", "file"]);
    quorate!["prune", "--task", "bios", "--as", "hf", "-o", &file].fails(3, &["file"]);
    quorate!["record", "--tokens", "1", "--sites", "z", "-o", folder.path()].fails(3, &["no regular file", "help:"]);
    assert_eq!(
        (fs::read_to_string(&file).unwrap().as_str(), names_in(folder.path())),
        ("mine", vec!["file".to_string()])
    );
    assert!(Path::new("/dev/null").metadata().is_ok_and(|m| !m.is_file()), "a device stays one");
}

#[cfg(unix)]
mod permissions {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::os::unix::process::CommandExt;

    use super::*;

    /// A command of somebody for whom permissions count: root is replaced by nobody. `None` where that cannot be.
    fn unprivileged(home: &Path, args: &[&str]) -> Option<Command> {
        let become_nobody = |command: &mut Command| {
            if fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0) {
                command.uid(65534).gid(65534);
            }
        };
        let mut probe = Command::new(env!("CARGO_BIN_EXE_quorate"));
        become_nobody(probe.arg("--version").stdout(std::process::Stdio::null()));
        probe.status().ok().filter(std::process::ExitStatus::success)?;
        let mut command = bare(home);
        become_nobody(command.args(args));
        Some(command)
    }

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// A folder that all may enter.
    fn open_folder() -> TempDir {
        let folder = tempdir();
        mode(folder.path(), 0o755);
        folder
    }

    #[test]
    fn files_that_may_not_be_read() {
        let folder = open_folder();
        let (tasks, library) = (folder.path().join("t.jsonl"), folder.path().join("w/l.sqlite"));
        fs::write(&tasks, items("bios.test", 2)).unwrap();
        fs::create_dir(folder.path().join("w")).unwrap();
        mode(&folder.path().join("w"), 0o777);
        let model = support::copy_of("olmoe");
        mode(model.path(), 0o755);
        let run = |args: &[&str]| {
            let mut command = unprivileged(home(), args)?;
            command.arg("--library").arg(&library);
            Some(finish(command, b""))
        };
        let (tasks_text, model_text) = (support::text(&tasks), support::text(model.path()));
        for file in ["config.json", "model.safetensors", "tokenizer.json"] {
            mode(&model.path().join(file), 0o000);
            let Some(output) = run(&["run", "x", "-m", &model_text]) else { return };
            output.fails(3, &[file, "Permission denied"]);
            mode(&model.path().join(file), 0o644);
        }
        mode(&tasks, 0o000);
        let Some(output) = run(&["eval", "-m", &model_text, "--tasks", &tasks_text]) else { return };
        output.fails(3, &["t.jsonl", "Permission denied"]);
        mode(model.path(), 0o000);
        let Some(output) = run(&["inspect", "-m", &model_text]) else { return };
        mode(model.path(), 0o755);
        output.fails(3, &[&model_text]);
    }

    #[test]
    fn folders_that_may_not_be_written() {
        let folder = open_folder();
        let closed = folder.path().join("closed");
        fs::create_dir(&closed).unwrap();
        mode(&closed, 0o555);
        let at = |name: &str| support::text(&closed.join(name));
        // Nothing can be unpacked.
        let Some(command) = unprivileged(&closed, &["run", "x"]) else { return };
        finish(command, b"")
            .fails(3, &["cannot unpack the embedded model into", &at("")[..at("").len() - 1], "QUORATE_HOME"]);
        let Some(command) = unprivileged(&closed.join("new"), &["run", "x"]) else { return };
        finish(command, b"").fails(3, &["cannot unpack the embedded model into", "QUORATE_HOME"]);
        // Nor the library of another model be made, or a partial profile be saved.
        let olmoe = support::text(&fixture("olmoe"));
        let Some(command) = unprivileged(&closed, &["run", "x", "-m", &olmoe]) else { return };
        finish(command, b"").fails(3, &["closed/library.sqlite", "help:"]);
        // What is there can be used; outputs are refused by name.
        let model = support::text(&support::repository("embedded/model"));
        let library = folder.path().join("w");
        fs::create_dir(&library).unwrap();
        mode(&library, 0o777);
        let library = support::text(&library.join("l.sqlite"));
        for args in [
            &["record", "--tokens", "1", "--sites", "z", "-o", &at("r")][..],
            &["prune", "--task", "bios", "-o", &at("p")],
            &["prune", "--task", "bios", "--as", "hf", "-o", &at("h")],
            &["library", "export", "bios", "-o", &at("e")],
            &["compare", "--limit", "1", "--keep", "8", "-o", &at("c")],
        ] {
            let Some(mut command) = unprivileged(&closed, args) else { return };
            let tasks = support::text(&support::repository("embedded/tasks"));
            command.args(["-q", "-m", &model, "--library", &library]);
            if args[0] == "compare" {
                command.args(["--tasks", &tasks]);
            }
            let message = finish(command, b"").fails(3, &["Permission denied"]);
            assert!(message.contains(&at("")), "{message}");
        }
        assert_eq!(names_in(&closed), [""; 0]);
    }

    #[test]
    fn a_home_that_may_not_be_written_can_be_used() {
        let folder = open_folder();
        for name in names_in(home()).into_iter().filter(|n| n.starts_with("embedded-")) {
            std::os::unix::fs::symlink(home().join(&name), folder.path().join(name)).unwrap();
        }
        let library = folder.path().join("library.sqlite");
        quorate!["library", "list", "--library", &library].ok();
        mode(&library, 0o444);
        mode(folder.path(), 0o555);
        let Some(run) = unprivileged(folder.path(), &["run", "78+95=", "-q"]) else { return };
        assert_eq!(finish(run, b"").ok(), "173\n");
        let Some(remove) = unprivileged(folder.path(), &["library", "remove", "bios"]) else { return };
        finish(remove, b"").fails(3, &["library.sqlite", "readonly", "help:"]);
    }
}

/// The program where no file may grow beyond `kib`, which is how a full disk looks to it.
#[cfg(target_os = "linux")]
fn on_a_full_disk(kib: u64, args: &[&str]) -> support::Output {
    let program = env!("CARGO_BIN_EXE_quorate");
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", kib * 2);
    let mut command = Command::new("sh");
    command.args(["-c", &script, program]).args(args).env("QUORATE_HOME", home());
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    finish(command, b"")
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_loses_nothing() {
    let folder = tempdir();
    let at = |name: &str| support::text(&folder.path().join(name));
    let (library, tasks) = (at("library.sqlite"), at("t.jsonl"));
    fs::write(&tasks, items("bios.test", 10).replace("\"bios\"", "\"mine\"")).unwrap();
    quorate!["profile", "--tasks", &tasks, "--library", &library, "-o", &at("out"), "-q"].ok();
    quorate!["profile", "--tasks", &tasks, "--library", &library, "-q"].ok();
    quorate!["record", "--tokens", "1,2", "--sites", "z", "-o", &at("r")].ok();
    let list = || quorate!["library", "list", "--library", &library, "--json"].json();
    let (before, files) = (list(), names_in(folder.path()));
    let record = fs::read(at("r")).unwrap();
    let pattern = fs::read(at("out/mine.pattern")).unwrap();

    let too_large = ["File too large", "space"]; // one of the two, as the system has it
    let fails = |args: &[&str], part: &str| {
        let message = on_a_full_disk(64, args).fails(3, &[part]);
        assert!(too_large.iter().any(|t| message.contains(t)) || message.contains("disk"), "{message}");
    };
    fails(&["record", "--prompt", "What is the capital of Oman?", "--sites", "logits", "-o", &at("r")], &at("r"));
    fails(&["prune", "--task", "bios", "--as", "hf", "-o", &at("hf"), "-q"], &at("hf"));
    fails(&["library", "export", "mine", "-o", &at("out"), "--library", &library], "mine.pattern");
    fails(&["profile", "--tasks", &tasks, "-o", &at("out"), "-q"], ".partial");
    fails(&["library", "import", &at("out/mine.pattern"), "--library", &library], &library);
    fails(&["library", "merge", "bios", "mine", "--into", "new", "--library", &library], &library);
    assert_eq!((list(), names_in(folder.path())), (before.clone(), files), "all is as it was");
    assert!(record == fs::read(at("r")).unwrap() && pattern == fs::read(at("out/mine.pattern")).unwrap());
    // With room again, the library takes it.
    quorate!["library", "merge", "bios", "mine", "--into", "new", "--library", &library].ok();
    assert_eq!(list().as_array().map(Vec::len), before.as_array().map(|b| b.len() + 1));
    // And nothing is unpacked by halves.
    let mut command = Command::new("sh");
    let script = format!("trap '' XFSZ; ulimit -f 4096; exec {} run x", env!("CARGO_BIN_EXE_quorate"));
    command.args(["-c", &script]).env("QUORATE_HOME", folder.path().join("home"));
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    finish(command, b"").fails(3, &["cannot unpack the embedded model", "help: free 60 MB"]);
    assert_eq!(names_in(&folder.path().join("home")), [""; 0]);
}

#[cfg(target_os = "linux")]
#[test]
fn output_that_cannot_be_printed_is_an_error() {
    for args in [&["run", "78+95="][..], &["methods"], &["methods", "--json"], &["inspect"], &["library", "list"]] {
        let mut command = command(&args.iter().map(AsRef::as_ref).collect::<Vec<_>>());
        command.stdout(fs::File::options().write(true).open("/dev/full").expect("the device that is always full"));
        let output = finish(command, b"");
        assert_eq!(output.code, Some(3), "{args:?}: {}", output.err);
        assert!(output.err.contains("No space left on device"), "{args:?}: {}", output.err);
    }
}

/// A file system of this size, where we may mount one.
#[cfg(target_os = "linux")]
struct Mounted(TempDir);

#[cfg(target_os = "linux")]
impl Mounted {
    fn new(size: &str) -> Option<Mounted> {
        let folder = tempdir();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(folder.path());
        mount.stderr(std::process::Stdio::null()).status().ok().filter(std::process::ExitStatus::success)?;
        Some(Mounted(folder))
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

#[cfg(target_os = "linux")]
impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status(); // else it stays until the machine is restarted
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_really_full_disk() {
    let Some(disk) = Mounted::new("3m") else { return };
    let folder = tempdir();
    let tasks = folder.path().join("t.jsonl");
    fs::write(&tasks, items("bios.test", 10).replace("\"bios\"", "\"mine\"")).unwrap();
    let library = disk.at("library.sqlite");
    quorate!["library", "list", "--library", &library].ok();
    fs::write(disk.at("ballast"), vec![1; 3 << 20]).unwrap_err();
    let list = || quorate!["library", "list", "--library", &library, "--json"].json();
    let before = list();
    assert_eq!(before.as_array().map(Vec::len), Some(20), "a full disk can be read");
    quorate!["profile", "--tasks", &tasks, "--library", &library, "-q"].fails(3, &["library.sqlite", "full", "help:"]);
    quorate!["record", "--tokens", "1", "--sites", "logits", "-o", &disk.at("r")]
        .fails(3, &["no space left for", "help: free"]);
    quorate!["prune", "--task", "bios", "--as", "hf", "-o", &disk.at("h"), "-q"]
        .fails(3, &["no space left for", "help: free"]);
    quorate!["library", "export", "-o", &disk.at("e")].fails(3, &["no space left for", "No space left", "help: free"]);
    assert_eq!(list(), before);
    assert!(names_in(disk.0.path()).iter().all(|n| !n.contains("tmp") && n != "h" && n != "r"));
    fs::remove_file(disk.at("ballast")).unwrap();
    let stored: Value = quorate!["profile", "--tasks", &tasks, "--library", &library, "-q", "--json"].json();
    assert_eq!(stored["patterns"][0]["name"], json!("mine"), "what was profiled was kept until there is room");
}
