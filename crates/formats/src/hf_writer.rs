//! Writing a pruned or edited model as a Hugging Face folder that transformers loads.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::config::read_json;
use crate::prune::{Cut, Pruned, check_kept, cuts, slices};
use crate::role::Role;
use crate::safetensors::HEADER_BYTES_MAX;
use crate::writer::Temporary;
use crate::{Checkpoint, FormatError, Result, StoredDType, TensorOut, write_safetensors};

/// Bytes copied at once.
const CHUNK_BYTES: u64 = 4 << 20;

/// The key of the language model's part in a configuration that has several.
const TEXT: &str = "text_config";

/// Called with bytes done and bytes in all; `false` cancels.
pub type Progress<'a> = dyn FnMut(u64, u64) -> bool + 'a;

/// Writes the model with only the experts `kept` (one ascending list of expert ids per MoE layer, all of one length,
/// since transformers knows one number of experts). Routers, their biases and tensors that stack experts lose the other
/// parts; experts are numbered anew; layers that predict further tokens are left out; all else is copied byte for byte,
/// packed weights as they are packed. `config.json` gets the new number (and that of groups), and an object `quorate` with
/// the kept ids.
///
/// A router with groups of experts needs equally many of each group that is left.
///
/// The folder is written under a temporary name and renamed at the end: an error or a cancel leaves nothing behind.
///
/// # Errors
/// Kept experts that cannot be written so, an `out_dir` that is not empty, a read or write error, or a cancel.
pub fn write_pruned_hf(
    checkpoint: &Checkpoint,
    kept: &[Vec<usize>],
    out_dir: &Path,
    shard_bytes_max: u64,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let pruned = check_kept(checkpoint, kept, true)?;
    let config = pruned_config(checkpoint, kept, &pruned)?;
    write_hf(checkpoint, pieces(checkpoint, kept), config, out_dir, shard_bytes_max, progress)
}

/// Writes the model with other values for some of its weights, by role; these are stored as F32, all else is copied byte
/// for byte. `config.json` stays, but for an object `quorate` with the fingerprint of the source.
///
/// # Errors
/// A weight that the model does not have or of another size, an `out_dir` that is not empty, a read or write error, or a
/// cancel.
pub fn write_edited_hf(
    checkpoint: &Checkpoint,
    edits: &HashMap<Role, Vec<f32>>,
    out_dir: &Path,
    shard_bytes_max: u64,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let mut edited: HashMap<&str, &Vec<f32>> = HashMap::new();
    for (&role, values) in edits {
        let loc = checkpoint.tensor(role)?;
        let expected = loc.shape.iter().product::<usize>();
        if values.len() != expected {
            let (tensor, found) = (loc.name.clone(), values.len());
            return Err(FormatError::EditLength { tensor, expected, found });
        }
        edited.insert(&loc.name, values);
    }
    let piece = |loc: &crate::TensorLoc| {
        let (dtype, source, bytes) = match edited.get(loc.name.as_str()) {
            Some(values) => (StoredDType::F32, Source::Values(values), 4 * values.len() as u64),
            None => (loc.dtype, Source::File { file: loc.file, ranges: vec![(loc.offset, loc.len)] }, loc.len),
        };
        Piece { name: loc.name.clone(), dtype, shape: loc.shape.clone(), source, bytes }
    };
    let pieces = checkpoint.tensors().iter().map(piece).collect();
    let note = json!({"source_fingerprint": checkpoint.fingerprint(), "edited_weights": edits.len()});
    write_hf(checkpoint, pieces, config_with(checkpoint, note)?, out_dir, shard_bytes_max, progress)
}

/// Writes a folder of these tensors and this configuration, with the source's other files.
fn write_hf(
    checkpoint: &Checkpoint,
    pieces: Vec<Piece<'_>>,
    config: Value,
    out_dir: &Path,
    shard_bytes_max: u64,
    progress: &mut Progress<'_>,
) -> Result<()> {
    if checkpoint.gguf().is_some() {
        let problem = "the model is in GGUF, whose tensors have other names and another order".to_owned();
        return Err(FormatError::Kept { problem, help: "write --as gguf, or start from the safetensors form".into() });
    }
    if out_dir.exists() && fs::read_dir(out_dir).map_or(true, |mut entries| entries.next().is_some()) {
        return Err(FormatError::OutputExists { path: out_dir.to_owned() });
    }
    let temporary = Temporary::beside(out_dir);
    let folder = &temporary.path;
    fs::create_dir(folder).map_err(|e| FormatError::io("create", folder, e))?;
    let shards = shards(pieces, shard_bytes_max);
    let mut copy = Copy { checkpoint, out_dir, done: 0, total: total(&shards), progress };
    copy.tell(0)?;
    for (i, shard) in shards.iter().enumerate() {
        copy.shard(&folder.join(shard_name(i, shards.len())), shard)?;
    }
    if shards.len() > 1 {
        write_json(&folder.join("model.safetensors.index.json"), &index(&shards))?;
    }
    write_json(&folder.join("config.json"), &config)?;
    copy_sidecars(checkpoint.folder(), folder)?;
    if out_dir.exists() {
        fs::remove_dir(out_dir).map_err(|e| FormatError::io("replace", out_dir, e))?;
    }
    temporary.rename(out_dir).map_err(|e| FormatError::io("write", out_dir, e))
}

/// One tensor of the output: where its bytes come from.
struct Piece<'a> {
    name: String,
    dtype: StoredDType,
    shape: Vec<usize>,
    source: Source<'a>,
    bytes: u64,
}

/// Where a tensor's bytes come from.
enum Source<'a> {
    /// Offsets and lengths in a file of the source.
    File { file: usize, ranges: Vec<(u64, u64)> },
    /// New values.
    Values(&'a [f32]),
}

/// All tensors of the output, in the order of the source.
fn pieces(checkpoint: &Checkpoint, kept: &[Vec<usize>]) -> Vec<Piece<'static>> {
    let cuts = cuts(checkpoint, kept);
    let whole = |loc: &crate::TensorLoc| (vec![(loc.offset, loc.len)], loc.shape.clone());
    let piece = |loc: &crate::TensorLoc| {
        let (name, (ranges, shape)) = match cuts.get(&loc.name) {
            None => (loc.name.clone(), whole(loc)),
            Some(Cut::Renamed(name)) => (name.clone(), whole(loc)),
            Some(Cut::Experts { of, ids }) => (loc.name.clone(), slices(loc, *of, ids)),
            Some(Cut::Gone) => return None,
        };
        let bytes = ranges.iter().map(|(_, len)| len).sum();
        Some(Piece { name, dtype: loc.dtype, shape, source: Source::File { file: loc.file, ranges }, bytes })
    };
    checkpoint.tensors().iter().filter_map(piece).collect()
}

/// Cuts the list into files of at most `bytes_max` (more only for a single larger tensor).
fn shards(pieces: Vec<Piece<'_>>, bytes_max: u64) -> Vec<Vec<Piece<'_>>> {
    let mut shards: Vec<Vec<Piece<'_>>> = vec![Vec::new()];
    let mut filled = 0;
    for piece in pieces {
        let last = shards.last_mut().expect("there is always one");
        if filled + piece.bytes > bytes_max && !last.is_empty() {
            filled = 0;
            shards.push(Vec::new());
        }
        filled += piece.bytes;
        shards.last_mut().expect("there is always one").push(piece);
    }
    shards
}

fn total(shards: &[Vec<Piece<'_>>]) -> u64 {
    shards.iter().flatten().map(|p| p.bytes).sum()
}

fn shard_name(i: usize, count: usize) -> String {
    match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    }
}

/// The copying of bytes, with its progress.
struct Copy<'a, 'p> {
    checkpoint: &'a Checkpoint,
    out_dir: &'a Path,
    done: u64,
    total: u64,
    progress: &'a mut Progress<'p>,
}

impl Copy<'_, '_> {
    fn tell(&mut self, more: u64) -> Result<()> {
        self.done += more;
        match (self.progress)(self.done, self.total) {
            true => Ok(()),
            false => Err(FormatError::Cancelled { path: self.out_dir.to_owned() }),
        }
    }

    fn shard(&mut self, path: &Path, pieces: &[Piece<'_>]) -> Result<()> {
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let copy = std::cell::RefCell::new(self);
        let tensors = pieces.iter().map(|piece| {
            let copy = &copy;
            TensorOut::streamed(piece.name.clone(), piece.dtype, &piece.shape, move |sink| {
                let mut copy = copy.borrow_mut();
                let (file, ranges) = match &piece.source {
                    Source::File { file, ranges } => (*file, ranges),
                    Source::Values(values) => {
                        for chunk in values.chunks(CHUNK_BYTES as usize / 4) {
                            let bytes: Vec<u8> = chunk.iter().flat_map(|v| v.to_le_bytes()).collect();
                            sink.write(&bytes)?;
                            copy.tell(bytes.len() as u64)?;
                        }
                        return Ok(());
                    }
                };
                for &(offset, len) in ranges {
                    for at in (0..len).step_by(CHUNK_BYTES as usize) {
                        let mut chunk = vec![0; (len - at).min(CHUNK_BYTES) as usize];
                        copy.checkpoint.files()[file].read_at(offset + at, &mut chunk)?;
                        sink.write(&chunk)?;
                        copy.tell(chunk.len() as u64)?;
                    }
                }
                Ok(())
            })
        });
        write_safetensors(path, Some(metadata), tensors)
    }
}

fn index(shards: &[Vec<Piece<'_>>]) -> Value {
    let names = shards.iter().enumerate().flat_map(|(i, pieces)| {
        pieces.iter().map(move |p| (p.name.clone(), Value::String(shard_name(i, shards.len()))))
    });
    let mut names: Vec<(String, Value)> = names.collect();
    names.sort_by(|a, b| a.0.cmp(&b.0));
    json!({"metadata": {"total_size": total(shards)}, "weight_map": names.into_iter().collect::<Map<_, _>>()})
}

/// The source's `config.json` with the new number of experts, and where they came from.
fn pruned_config(checkpoint: &Checkpoint, kept: &[Vec<usize>], pruned: &Pruned) -> Result<Value> {
    let layers = checkpoint.spec().moe_layers();
    let ids: Map<String, Value> = layers.iter().zip(kept).map(|(l, ids)| (l.to_string(), json!(ids))).collect();
    let note = json!({"source_fingerprint": checkpoint.fingerprint(), "kept_experts": ids});
    let mut config = config_with(checkpoint, note)?;
    let text = match config.get(TEXT) {
        Some(text) if text.get("model_type").is_some() => &mut config[TEXT],
        _ => &mut config,
    };
    let mut set = |key: &str, value: usize| {
        // A list has one entry for each decoder layer.
        match text.get_mut(key).filter(|v| !v.is_null()) {
            Some(Value::Array(list)) => list.iter_mut().for_each(|entry| *entry = json!(value)),
            Some(entry) => *entry = json!(value),
            None => {}
        }
    };
    checkpoint.family().expert_count_keys.iter().for_each(|key| set(key, pruned.count()));
    if let Some((groups, chosen)) = pruned.groups {
        set("n_group", groups);
        set("topk_group", chosen);
    }
    // Layers that predict further tokens are left out.
    ["num_nextn_predict_layers", "mtp_num_hidden_layers"].iter().for_each(|key| set(key, 0));
    Ok(config)
}

/// The source's `config.json` with a note of what was done.
fn config_with(checkpoint: &Checkpoint, mut note: Value) -> Result<Value> {
    let mut config: Map<String, Value> = read_json(checkpoint.config().path(), HEADER_BYTES_MAX)?;
    // A model pruned twice keeps its whole history; ids are those of the model before.
    if let Some(earlier) = config.remove("quorate") {
        note["source"] = earlier;
    }
    config.insert("quorate".to_owned(), note);
    Ok(Value::Object(config))
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    write_synced(path, format!("{value:#}\n").as_bytes())
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let written = File::create(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|e| FormatError::write(path, bytes.len() as u64, e))
}

/// Copies what belongs to a model besides configuration and weights: tokenizer, chat template, generation settings,
/// licence.
fn copy_sidecars(from: &Path, to: &Path) -> Result<()> {
    let beginnings = [
        "tokenizer",
        "tokenization_",
        "vocab",
        "merges",
        "special_tokens",
        "added_tokens",
        "generation_config",
        "chat_template",
        "LICENSE",
        "NOTICE",
    ];
    let endings = [".jinja", ".tiktoken"];
    let list = fs::read_dir(from).map_err(|e| FormatError::io("read", from, e))?;
    for entry in list {
        let entry = entry.map_err(|e| FormatError::io("read", from, e))?;
        let file_name = entry.file_name();
        let Some(name) = file_name.to_str() else {
            continue;
        };
        let belongs = beginnings.iter().any(|b| name.starts_with(b)) || endings.iter().any(|e| name.ends_with(e));
        // `is_file` follows links, as hub caches need.
        if belongs && entry.path().is_file() {
            let bytes = fs::read(entry.path()).map_err(|e| FormatError::io("read", &entry.path(), e))?;
            write_synced(&to.join(name), &bytes)?;
        }
    }
    Ok(())
}
