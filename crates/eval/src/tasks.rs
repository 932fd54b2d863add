//! Task files: JSON lines, `{"task", "prompt", "answer", "choices"?, "meta"?}`, one question a line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

/// The longest line that is read, in bytes.
const LINE_BYTES_MAX: usize = 16 << 20;

/// One question.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskItem {
    /// The task's name.
    pub task: String,
    /// The exact text that the model gets, special tokens included.
    pub prompt: String,
    /// The exact text that it should give.
    pub answer: String,
    /// The answers to choose from, if it is a question of choice.
    pub choices: Option<Vec<String>>,
    /// Anything else that is known of the question: the field `meta`, and fields that the format does not have.
    pub meta: Map<String, Value>,
}

/// All questions of one task, in the order of the files and lines.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// The name that the questions carry.
    pub name: String,
    /// The questions.
    pub items: Vec<TaskItem>,
    /// The files they come from, in order.
    pub files: Vec<PathBuf>,
}

/// What can be wrong with task files.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// A file or folder could not be read.
    #[error("cannot read {}: {source}", .path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line is no question.
    #[error("{}:{line}: {message}", .path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        message: String,
    },
    /// A file has no questions.
    #[error("{} has no questions; help: each line is an object with task, prompt and answer", .path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A folder has no file of the wanted kind.
    #[error("no task files{} in {}: {}", of_split(.split), .dir.display(), what_is_there(.found, .split))]
    NoFiles {
        /// The folder.
        dir: PathBuf,
        /// The wanted split, if one was wanted.
        split: Option<String>,
        /// Names of what is there.
        found: Vec<String>,
    },
    /// No path was given.
    #[error("no task files were given; help: name files or folders of .jsonl files")]
    NoPaths,
}

fn of_split(split: &Option<String>) -> String {
    split.as_ref().map_or_else(String::new, |split| format!(" of the split '{split}'"))
}

fn what_is_there(found: &[String], split: &Option<String>) -> String {
    const SHOWN: usize = 8;
    if found.is_empty() {
        return "the folder is empty".to_owned();
    }
    let mut text = format!("there is {}", found[..found.len().min(SHOWN)].join(", "));
    if found.len() > SHOWN {
        text += &format!(" and {} more", found.len() - SHOWN);
    }
    let splits: Vec<&str> = found.iter().filter_map(|name| split_of(name)?).collect();
    let nearest = split.as_ref().and_then(|split| nearest_name(split, &splits));
    match nearest {
        Some(nearest) => format!("{text}; help: did you mean the split '{nearest}'?"),
        None => format!("{text}; help: names are like NAME.jsonl or NAME.test.jsonl"),
    }
}

/// Reads task files: those named, and those in named folders (not in folders of them). In a folder `split` chooses the
/// files: `NAME.test.jsonl` is of the split `test`; `NAME.jsonl` is of every split. Without `split` all are read.
///
/// Tasks come in the order in which they first occur, the files of a folder in the order of their names.
///
/// # Errors
/// A file that cannot be read or has no questions, a line that is none (with its number), or a folder without files of
/// the split.
pub fn load_tasks(paths: &[PathBuf], split: Option<&str>) -> Result<Vec<Task>, TaskError> {
    let mut files = Vec::new();
    for path in paths {
        if path.is_dir() {
            files.extend(files_of(path, split)?);
        } else {
            files.push(path.clone());
        }
    }
    if files.is_empty() {
        return Err(TaskError::NoPaths);
    }
    let mut tasks: Vec<Task> = Vec::new();
    let mut seen = Vec::new();
    for file in files {
        // A file that is named twice, or named and in a named folder, counts once.
        let real = file.canonicalize().unwrap_or_else(|_| file.clone());
        if seen.contains(&real) {
            continue;
        }
        seen.push(real);
        for item in load_file(&file)? {
            let at = tasks.iter().position(|task| task.name == item.task).unwrap_or_else(|| {
                tasks.push(Task { name: item.task.clone(), items: Vec::new(), files: Vec::new() });
                tasks.len() - 1
            });
            let task = &mut tasks[at];
            if task.files.last() != Some(&file) {
                task.files.push(file.clone());
            }
            task.items.push(item);
        }
    }
    Ok(tasks)
}

/// The split in a file's name: `None` if it is no task file, `Some(None)` if it is of every split.
fn split_of(name: &str) -> Option<Option<&str>> {
    let stem = name.strip_suffix(".jsonl").filter(|stem| !stem.is_empty() && !stem.starts_with('.'))?;
    Some(stem.rsplit_once('.').map(|(_, split)| split))
}

/// The task files of a folder, sorted by name.
fn files_of(dir: &Path, split: Option<&str>) -> Result<Vec<PathBuf>, TaskError> {
    let failed = |source| TaskError::Read { path: dir.to_owned(), source };
    let mut found = Vec::new();
    for entry in dir.read_dir().map_err(failed)? {
        found.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    found.sort();
    let wanted = |name: &&String| match (split_of(name), split) {
        (Some(Some(have)), Some(split)) => have == split,
        (kind, _) => kind.is_some(),
    };
    let files: Vec<_> = found.iter().filter(wanted).map(|name| dir.join(name)).filter(|path| !path.is_dir()).collect();
    if files.is_empty() {
        return Err(TaskError::NoFiles { dir: dir.to_owned(), split: split.map(str::to_owned), found });
    }
    Ok(files)
}

/// The questions of one file.
fn load_file(path: &Path) -> Result<Vec<TaskItem>, TaskError> {
    let failed = |source| TaskError::Read { path: path.to_owned(), source };
    let mut reader = BufReader::new(File::open(path).map_err(failed)?);
    let mut items = Vec::new();
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let limit = LINE_BYTES_MAX as u64 + 1;
        reader.by_ref().take(limit).read_until(b'\n', &mut bytes).map_err(failed)?;
        if bytes.is_empty() {
            break;
        }
        let wrong = |message: String| TaskError::Line { path: path.to_owned(), line, message };
        if bytes.len() > LINE_BYTES_MAX {
            return Err(wrong(format!("the line has more than {} MiB", LINE_BYTES_MAX >> 20)));
        }
        let text = std::str::from_utf8(&bytes)
            .map_err(|error| wrong(format!("the line is no UTF-8 text: byte {} is wrong", error.valid_up_to() + 1)))?;
        let text = if line == 1 { text.strip_prefix('\u{feff}').unwrap_or(text) } else { text };
        if !text.trim().is_empty() {
            items.push(parse_item(text.trim()).map_err(wrong)?);
        }
    }
    if items.is_empty() {
        return Err(TaskError::Empty { path: path.to_owned() });
    }
    Ok(items)
}

fn parse_item(line: &str) -> Result<TaskItem, String> {
    let value: Value = serde_json::from_str(line).map_err(|error| {
        // Its message ends with a line number that counts within this one line.
        let text = error.to_string();
        let reason = text.split(" at line ").next().unwrap_or(&text);
        format!("the line is no valid JSON: {reason} at column {}", error.column())
    })?;
    let Value::Object(mut object) = value else {
        return Err(format!("the line is {}, it must be an object with task, prompt and answer", kind_of(&value)));
    };
    let task = text_field(&mut object, "task")?;
    if task.trim().is_empty() {
        return Err("the field 'task' is empty".to_owned());
    }
    let prompt = text_field(&mut object, "prompt")?;
    let answer = text_field(&mut object, "answer")?;
    let choices = choices_field(object.remove("choices"))?;
    let mut meta = match object.remove("meta") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(meta)) => meta,
        Some(other) => return Err(format!("the field 'meta' is {}, it must be an object", kind_of(&other))),
    };
    // What a file says beyond the format is kept where further knowledge belongs.
    for (name, value) in object {
        meta.entry(name).or_insert(value);
    }
    Ok(TaskItem { task, prompt, answer, choices, meta })
}

fn text_field(object: &mut Map<String, Value>, name: &str) -> Result<String, String> {
    match object.remove(name) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("the field '{name}' is {}, it must be a string", kind_of(&other))),
        None => {
            let others: Vec<&str> = object.keys().map(String::as_str).collect();
            let near = nearest_name(name, &others).map(|near| format!("; help: is '{near}' meant to be it?"));
            Err(format!("the field '{name}' is missing{}", near.unwrap_or_default()))
        }
    }
}

fn choices_field(value: Option<Value>) -> Result<Option<Vec<String>>, String> {
    let list = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(format!("the field 'choices' is {}, it must be a list", kind_of(&other))),
    };
    let text = |(i, choice)| match choice {
        Value::String(text) => Ok(text),
        other => Err(format!("choice {} is {}, it must be a string", i + 1, kind_of(&other))),
    };
    let choices: Vec<String> = list.into_iter().enumerate().map(text).collect::<Result<_, _>>()?;
    if choices.is_empty() { Err("the field 'choices' is empty".to_owned()) } else { Ok(Some(choices)) }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The candidate that takes the fewest edits to become, if they are at most a third of the name.
fn nearest_name<'a>(name: &str, candidates: &[&'a str]) -> Option<&'a str> {
    let near = candidates.iter().map(|candidate| (edits(name, candidate), *candidate));
    near.min().filter(|(edits, _)| *edits <= name.chars().count().div_ceil(3)).map(|(_, candidate)| candidate)
}

/// Levenshtein's distance in characters, one row of the table at a time.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests;
