//! Errors of reading and writing model files.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Result of this crate.
pub type Result<T, E = FormatError> = std::result::Result<T, E>;

/// What can be wrong with a model file or folder. The cause, if there is one, is the `source`.
#[derive(Debug, Error)]
pub enum FormatError {
    /// The system refused to read or write.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, e.g. `read`.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A disk is full.
    #[error(
        "no space left for {} ({needed_bytes} bytes in all); help: free some space or write to another disk",
        path.display()
    )]
    DiskFull {
        /// File that was being written.
        path: PathBuf,
        /// Size that it would have had.
        needed_bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// There is no model here.
    #[error("no model at {}: {problem}; help: {help}", path.display())]
    NoModel {
        /// Where a model was looked for.
        path: PathBuf,
        /// What is missing.
        problem: String,
        /// What to do.
        help: &'static str,
    },
    /// A file that should be a regular file is something else.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A file would take the place of a folder or device.
    #[error("{} is no regular file; help: give the name of a file to write", path.display())]
    NoFileToWrite {
        /// The path.
        path: PathBuf,
    },
    /// A safetensors header cannot be what a writer wrote.
    #[error("{}: bad safetensors header: {problem}; help: download or convert the file again", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A GGUF header cannot be what a writer wrote, or is of a kind that is not read.
    #[error("{}: bad GGUF file: {problem}; help: download or convert the file again", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A file ends too early.
    #[error(
        "{} is truncated: {what} needs a file of {expected} bytes, found {found}; help: download it again",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What does not fit: the header or a tensor.
        what: String,
        /// Bytes that the file should have at least.
        expected: u64,
        /// Bytes that it has.
        found: u64,
    },
    /// A file is no longer the one that was opened.
    #[error("{} has changed since it was opened; help: open the model again", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A tensor's entry in a header is wrong.
    #[error("{}: tensor {tensor}: {problem}; help: download or convert the file again", path.display())]
    TensorEntry {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What is wrong.
        problem: String,
    },
    /// A file is not the JSON that it should be.
    #[error("{} is not valid JSON of the expected form", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, column and cause.
        source: serde_json::Error,
    },
    /// A JSON file is larger than any honest one.
    #[error("{} has {size} bytes, more than the {limit} that such a file may have", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A configuration lacks a key.
    #[error("{}: key {key:?} is missing; help: is this the model's own configuration?", path.display())]
    ConfigMissing {
        /// The file.
        path: PathBuf,
        /// The key, with the names of the objects around it.
        key: String,
    },
    /// A configuration value is absurd or not supported.
    #[error("{}: key {key:?} is {value}: {problem}", path.display())]
    ConfigValue {
        /// The file.
        path: PathBuf,
        /// The key, with the names of the objects around it.
        key: String,
        /// The value found, shortened.
        value: Box<str>,
        /// What was expected.
        problem: String,
    },
    /// No family reads this `model_type`.
    #[error("{}: model_type {model_type:?} is not supported; known: {}; help: {}",
        path.display(), known.join(", "), nearest_help(*nearest))]
    UnknownFamily {
        /// The configuration file.
        path: PathBuf,
        /// What it says.
        model_type: String,
        /// Supported types.
        known: Vec<&'static str>,
        /// The supported type with the most similar name, if any is similar.
        nearest: Option<&'static str>,
    },
    /// No family reads this architecture of a GGUF file.
    #[error("{}: architecture {arch:?} is not supported; known: {}; help: take the Hugging Face form of the model, if its \
             family is known there", path.display(), known.join(", "))]
    UnknownArch {
        /// The file.
        path: PathBuf,
        /// What it says.
        arch: String,
        /// Supported architectures.
        known: Vec<&'static str>,
    },
    /// A name in an index file would leave the folder.
    #[error("{}: shard name {name:?} is refused: {problem}", path.display())]
    ShardName {
        /// The index file.
        path: PathBuf,
        /// The name.
        name: String,
        /// Why.
        problem: &'static str,
    },
    /// A tensor that the model needs is not in its files.
    #[error(
        "{}: tensor {tensor} with shape {expected:?} is missing; \
         help: the download may be incomplete, or config.json belongs to another model",
        path.display()
    )]
    MissingTensor {
        /// The model, or the file in which the tensor should be.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The shape that it should have.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error(
        "{}: tensor {tensor}: shape {expected:?} expected, {found:?} found; \
         help: does config.json belong to this model?",
        path.display()
    )]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Shape by the configuration.
        expected: Box<[usize]>,
        /// Shape in the file.
        found: Box<[usize]>,
    },
    /// A tensor has a type that is not what the caller can use.
    #[error("{}: tensor {tensor} is stored as {found}; expected {expected}", path.display())]
    DType {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Its type in the file.
        found: String,
        /// Types that would do.
        expected: &'static str,
    },
    /// A file has no tensor of this name.
    #[error("{} has no tensor {tensor}", path.display())]
    NoTensor {
        /// The file.
        path: PathBuf,
        /// The name asked for.
        tensor: String,
    },
    /// The model has no such weight.
    #[error("this model has no weight for {role}")]
    NoRole {
        /// The role asked for.
        role: crate::Role,
    },
    /// Kept experts that cannot be written as a checkpoint.
    #[error("cannot write a pruned checkpoint: {problem}; help: {help}")]
    Kept {
        /// What is wrong with the kept experts.
        problem: String,
        /// What to do.
        help: std::borrow::Cow<'static, str>,
    },
    /// A model that cannot be said in GGUF.
    #[error("cannot write the model as GGUF: {problem}; help: {}", NOT_IN_GGUF)]
    NotInGguf {
        /// What has no place there.
        problem: String,
    },
    /// New values for a weight that are not as many as it has.
    #[error("tensor {tensor}: {found} new values for {expected}; help: give one for each")]
    EditLength {
        /// The tensor.
        tensor: String,
        /// Values that it has.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// A writer produced another number of bytes than the shape needs.
    #[error("tensor {tensor}: {written} bytes written, its shape needs {expected}")]
    WrittenLength {
        /// The tensor's name.
        tensor: String,
        /// Bytes produced.
        written: u64,
        /// Bytes that shape and type need.
        expected: u64,
    },
    /// The output is there already.
    #[error("{} exists and is not empty; help: choose another name or remove it first", path.display())]
    OutputExists {
        /// The output folder.
        path: PathBuf,
    },
    /// The caller stopped the work.
    #[error("cancelled while writing {}; nothing was left behind", path.display())]
    Cancelled {
        /// The output that was being written.
        path: PathBuf,
    },
}

/// What to do about a model that has no GGUF form.
const NOT_IN_GGUF: &str = "keep it as safetensors";

fn nearest_help(nearest: Option<&str>) -> String {
    match nearest {
        Some(name) => format!("the most similar is {name:?}; a new family is one small file, see the documentation"),
        None => "a new family is one small file, see the documentation".to_owned(),
    }
}

impl FormatError {
    /// Wraps what the system said on a read-side operation.
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    /// Wraps what the system said on a write; a full disk is told as such.
    pub(crate) fn write(path: &Path, needed_bytes: u64, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { path: path.to_owned(), needed_bytes, source }
            }
            _ => Self::io("write", path, source),
        }
    }
}
