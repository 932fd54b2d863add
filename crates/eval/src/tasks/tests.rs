use super::*;

/// An empty folder for one test.
fn tempdir(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("quorate-tasks-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn write(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    path
}

fn item(task: &str, prompt: &str) -> String {
    format!("{{\"task\": \"{task}\", \"prompt\": \"{prompt}\", \"answer\": \"a\"}}\n")
}

fn prompts(task: &Task) -> Vec<&str> {
    task.items.iter().map(|item| item.prompt.as_str()).collect()
}

#[test]
fn reads_every_field() {
    let dir = tempdir("fields");
    let line =
        r#"{"task": "t", "prompt": "p\n", "answer": "é", "choices": ["é", "b"], "meta": {"k": [1]}, "id": 7, "k": 8}"#;
    // A byte order mark, CRLF, blank lines, and no line end at the end.
    let path = write(&dir, "x.jsonl", format!("\u{feff}\r\n{line}\r\n\n  \n{}", item("t", "q").trim_end()));
    let tasks = load_tasks(std::slice::from_ref(&path), Some("test")).unwrap();
    assert_eq!(tasks.len(), 1);
    let first = TaskItem {
        task: "t".into(),
        prompt: "p\n".into(),
        answer: "é".into(),
        choices: Some(vec!["é".into(), "b".into()]),
        meta: Map::from_iter([("k".to_owned(), serde_json::json!([1])), ("id".to_owned(), serde_json::json!(7))]),
    };
    assert_eq!(tasks[0].items[0], first);
    assert_eq!((prompts(&tasks[0]), &tasks[0].files), (vec!["p\n", "q"], &vec![path]));
}

#[test]
fn the_split_chooses_files_of_a_folder() {
    let dir = tempdir("splits");
    write(&dir, "b.test.jsonl", item("b", "test"));
    write(&dir, "a.test.jsonl", item("a", "test"));
    write(&dir, "a.train-sample.jsonl", item("a", "train"));
    write(&dir, "a.validation.jsonl", item("a", "validation"));
    write(&dir, "c.jsonl", item("a", "any"));
    write(&dir, "facts.json", "{}");
    std::fs::create_dir(dir.join("d.test.jsonl")).unwrap();
    let load = |split| load_tasks(std::slice::from_ref(&dir), split).unwrap();
    let test = load(Some("test"));
    assert_eq!(test.iter().map(|task| task.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(prompts(&test[0]), ["test", "any"]);
    assert_eq!(test[0].files, [dir.join("a.test.jsonl"), dir.join("c.jsonl")]);
    assert_eq!(prompts(&load(Some("train-sample"))[0]), ["train", "any"]);
    assert_eq!(prompts(&load(None)[0]), ["test", "train", "validation", "any"]);
    // A file named itself is read whatever its split, and once.
    let file = dir.join("a.validation.jsonl");
    let both = load_tasks(&[file.clone(), dir.clone(), file], Some("test")).unwrap();
    assert_eq!(prompts(&both[0]), ["validation", "test", "any"]);
}

#[test]
fn folders_without_files_say_what_is_there() {
    let dir = tempdir("none");
    let error = |split| load_tasks(std::slice::from_ref(&dir), split).unwrap_err().to_string();
    assert!(error(None).ends_with("the folder is empty"), "{}", error(None));
    write(&dir, "a.validation.jsonl", item("a", "x"));
    write(&dir, "notes.txt", "x");
    let message = error(Some("validaton"));
    assert!(
        message.contains("of the split 'validaton'") && message.contains("a.validation.jsonl, notes.txt"),
        "{message}"
    );
    assert!(message.contains("did you mean the split 'validation'?"), "{message}");
    assert!(error(Some("zzz")).contains("names are like"), "{}", error(Some("zzz")));
    assert!(matches!(load_tasks(&[], None), Err(TaskError::NoPaths)));
    let missing = load_tasks(&[dir.join("missing.jsonl")], None).unwrap_err();
    assert!(missing.to_string().starts_with("cannot read ") && missing.to_string().contains("missing.jsonl"));
}

#[test]
fn broken_lines_are_named() {
    let dir = tempdir("broken");
    let good = item("t", "p");
    let cases: [(&[u8], &str); 14] = [
        (b"{\"task\": }", "the line is no valid JSON: expected value at column 10"),
        (b"{\"task\": \"t\"", "the line is no valid JSON: EOF while parsing an object at column 12"),
        (b"{} {}", "the line is no valid JSON: trailing characters at column 4"),
        (b"[1]", "the line is a list, it must be an object with task, prompt and answer"),
        (b"{\"prompt\": \"\", \"answer\": \"\"}", "the field 'task' is missing"),
        (b"{\"task\": \" \", \"prompt\": \"\", \"answer\": \"\"}", "the field 'task' is empty"),
        (b"{\"task\": \"t\", \"answer\": \"\"}", "the field 'prompt' is missing"),
        (b"{\"task\": \"t\", \"prompt\": \"\"}", "the field 'answer' is missing"),
        (b"{\"task\": \"t\", \"prompt\": 5, \"answer\": \"\"}", "the field 'prompt' is a number, it must be a string"),
        (
            b"{\"task\": \"t\", \"prompt\": \"\", \"anwser\": \"\"}",
            "the field 'answer' is missing; help: is 'anwser' meant to be it?",
        ),
        (
            b"{\"task\": \"t\", \"prompt\": \"\", \"answer\": \"\", \"choices\": \"x\"}",
            "the field 'choices' is a string, it must be a list",
        ),
        (
            b"{\"task\": \"t\", \"prompt\": \"\", \"answer\": \"\", \"choices\": [\"x\", null]}",
            "choice 2 is null, it must be a string",
        ),
        (
            b"{\"task\": \"t\", \"prompt\": \"\", \"answer\": \"\", \"meta\": []}",
            "the field 'meta' is a list, it must be an object",
        ),
        (b"{\"task\": \"\xff\"}", "the line is no UTF-8 text: byte 11 is wrong"),
    ];
    for (line, message) in cases {
        let content = [good.as_bytes(), b"\r\n", line, b"\n", good.as_bytes()].concat();
        let path = write(&dir, "x.jsonl", content);
        let error = load_tasks(std::slice::from_ref(&path), None).unwrap_err().to_string();
        assert_eq!(error, format!("{}:3: {message}", path.display()));
    }
    for content in ["", "\n \r\n", "\u{feff}"] {
        let path = write(&dir, "x.jsonl", content);
        assert!(matches!(load_tasks(&[path], None), Err(TaskError::Empty { .. })));
    }
}

#[test]
fn endless_lines_and_deep_values_are_refused() {
    let dir = tempdir("long");
    let path = write(&dir, "long.jsonl", vec![b'['; LINE_BYTES_MAX + 100]);
    let error = load_tasks(&[path], None).unwrap_err().to_string();
    assert!(error.ends_with("long.jsonl:1: the line has more than 16 MiB"), "{error}");
    let path = write(&dir, "deep.jsonl", vec![b'['; 100_000]);
    let error = load_tasks(&[path], None).unwrap_err().to_string();
    assert!(error.contains("recursion limit"), "{error}");
}

#[test]
fn nearest_names_are_near() {
    assert_eq!(edits("kitten", "sitting"), 3);
    assert_eq!(edits("", "abc"), 3);
    assert_eq!(nearest_name("tset", &["train-sample", "test"]), Some("test"));
    assert_eq!(nearest_name("x", &["train-sample", "test"]), None);
}
