//! Running the program as its users do, and the files that it is run on.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};
use tempfile::TempDir;

/// Runs `quorate` with these arguments, each a text or a path.
#[macro_export]
macro_rules! quorate {
    ($($arg:expr),* $(,)?) => {
        $crate::support::finish($crate::support::command(&[$(std::ffi::OsStr::new(&$arg)),*]), b"")
    };
}

/// As [`quorate!`], with bytes on standard input first.
#[macro_export]
macro_rules! quorate_reads {
    ($input:expr; $($arg:expr),* $(,)?) => {
        $crate::support::finish($crate::support::command(&[$(std::ffi::OsStr::new(&$arg)),*]), $input.as_ref())
    };
}

/// What a command left behind.
#[derive(Debug)]
pub struct Output {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Output {
    /// It did what was asked. Returns its standard output.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.err);
        self.out
    }

    /// The one JSON document that it printed.
    #[track_caller]
    pub fn json(self) -> Value {
        let out = self.ok();
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}"))
    }

    /// It failed after it had said how it loaded the model.
    #[track_caller]
    pub fn fails_with_notes(mut self, parts: &[&str]) {
        self.err = self.err.lines().last().unwrap_or_default().to_string();
        self.fails(3, parts);
    }

    /// It failed with this code, nothing on standard output, and a short message that has all `parts`. Returns the message.
    #[track_caller]
    pub fn fails(self, code: i32, parts: &[&str]) -> String {
        assert_eq!((self.code, self.out.as_str()), (Some(code), ""), "{}", self.err);
        for part in parts {
            assert!(self.err.contains(part), "no {part:?} in: {}", self.err);
        }
        assert!(self.err.trim_end().lines().count() <= 8, "{}", self.err);
        self.err
    }
}

/// The program with a home of its own and one thread (two tests run at a time).
pub fn command(args: &[&OsStr]) -> Command {
    let mut command = bare(home());
    command.args(["--threads", "1"]).args(args);
    command
}

/// The program with this home and no arguments yet.
pub fn bare(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
    // No test asks the real hub, whatever the machine is set to.
    for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT"] {
        command.env_remove(name);
    }
    command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", home.join("hf"));
    command.env("QUORATE_HOME", home).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs a command to its end. Whatever it is given, it must not panic.
#[track_caller]
pub fn finish(mut command: Command, input: &[u8]) -> Output {
    command.stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() });
    let mut child = command.spawn().expect("the program starts");
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(input); // it may have ended before it read all
    }
    ended(child)
}

/// Waits for a child.
#[track_caller]
pub fn ended(child: Child) -> Output {
    let output = child.wait_with_output().expect("a child can be waited for");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!err.contains("panicked"), "{err}");
    Output { code: output.status.code(), out: out.into_owned(), err: err.into_owned() }
}

/// Sends a signal, e.g. `INT`, to a child of ours.
pub fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).stderr(Stdio::null()).status();
    sent.expect("there is a program `kill`"); // it fails if the child has ended, which is no matter
}

/// Waits until something holds, at most a minute.
#[track_caller]
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(60), "in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The home of this test program, with the embedded model unpacked and its patterns stored. Tests only read it.
pub fn home() -> &'static Path {
    static HOME: OnceLock<PathBuf> = OnceLock::new();
    HOME.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        for old in names_in(folder) {
            let ended = old.strip_prefix("home-").is_some_and(|pid| !Path::new("/proc").join(pid).exists());
            if ended && cfg!(target_os = "linux") {
                let _ = fs::remove_dir_all(folder.join(old)); // left by a former run; another may be removing it too
            }
        }
        let home = folder.join(format!("home-{}", std::process::id()));
        let mut first = bare(&home);
        first.args(["library", "list"]);
        finish(first, b"").ok();
        home
    })
}

pub fn tempdir() -> TempDir {
    TempDir::new().expect("the system has a folder for temporary files")
}

/// A path as text.
pub fn text(path: &Path) -> String {
    path.to_str().expect("test paths are UTF-8").to_string()
}

pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// A model of a few kilobytes.
pub fn fixture(name: &str) -> PathBuf {
    repository("tests/fixtures").join(name)
}

/// A copy of a fixture's model that may be changed.
pub fn copy_of(name: &str) -> TempDir {
    let copy = tempdir();
    for entry in fs::read_dir(fixture(name)).expect("the fixture is there").flatten() {
        if entry.path().is_file() && entry.file_name() != "reference.safetensors" {
            fs::write(copy.path().join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
        }
    }
    copy
}

/// Changes a JSON file.
pub fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// Header and data of a safetensors file.
pub fn read_safetensors(path: &Path) -> (Map<String, Value>, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let data = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    (serde_json::from_slice(&bytes[8..data]).unwrap(), bytes[data..].to_vec())
}

pub fn write_safetensors(path: &Path, header: &Map<String, Value>, data: &[u8]) {
    let header = serde_json::to_vec(header).unwrap();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(data);
    fs::write(path, bytes).unwrap();
}

/// The values of an F32 tensor.
pub fn f32s(path: &Path, name: &str) -> Vec<f32> {
    let (header, data) = read_safetensors(path);
    let at = |i: usize| header[name]["data_offsets"][i].as_u64().unwrap() as usize;
    data[at(0)..at(1)].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// The first `n` lines of one of the embedded task files, e.g. `bios.test`.
pub fn items(file: &str, n: usize) -> String {
    let all = fs::read_to_string(repository("embedded/tasks").join(format!("{file}.jsonl"))).unwrap();
    let lines: Vec<&str> = all.lines().take(n).collect();
    assert_eq!(lines.len(), n, "{file} is too short");
    lines.join("\n") + "\n"
}

/// Names in a folder, sorted.
pub fn names_in(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = names.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The numbers of a JSON list.
pub fn numbers(list: &Value) -> Vec<u64> {
    list.as_array().unwrap_or_else(|| panic!("{list} is no list")).iter().map(|n| n.as_u64().unwrap()).collect()
}

/// Asserts that a JSON object has these fields.
#[track_caller]
pub fn has_fields(object: &Value, fields: &[&str]) {
    let object = object.as_object().expect("an object");
    fields.iter().for_each(|f| assert!(object.contains_key(*f), "no {f:?} in {object:?}"));
}
