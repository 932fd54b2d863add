//! A model on disk: its specification, and where the bytes of each weight lie.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::bind::{Bound, Naming, bind};
use crate::config::{HEAD_DIM_MAX, HEADS_MAX, LAYERS_MAX, WIDTH_MAX, read_json};
use crate::families::{self, Family};
use crate::gguf::{self, GgufModel, GgufValue};
use crate::role::Role;
use crate::safetensors::HEADER_BYTES_MAX;
use crate::shape::{self, ParameterCounts};
use crate::source::Recipe;
use crate::spec::ModelSpec;
use crate::{Config, DataFile, FormatError, Result, SafetensorsFile, TensorLoc, fingerprint, packed};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A model on disk. Opening reads headers and configuration, and 64 bytes of some tensors; no expert is touched.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    folder: PathBuf,
    config: Config,
    spec: ModelSpec,
    family: &'static Family,
    gguf: Option<BTreeMap<String, GgufValue>>,
    files: Vec<DataFile>,
    /// By file, then offset.
    tensors: Vec<TensorLoc>,
    bound: Bound,
    fingerprint: String,
}

/// All of a checkpoint but its tensors.
struct About {
    path: PathBuf,
    folder: PathBuf,
    config: Config,
    spec: ModelSpec,
    family: &'static Family,
    gguf: Option<BTreeMap<String, GgufValue>>,
}

impl Checkpoint {
    /// Opens a folder (`config.json` with `model.safetensors` or with an index and its shards), one `.safetensors` file
    /// beside its `config.json`, a `.gguf` file or the first part of a split one, or a folder with one model in GGUF.
    ///
    /// # Errors
    /// Anything missing, malformed, inconsistent or not supported, by name.
    pub fn open(path: &Path) -> Result<Self> {
        let (folder, weights) = locate(path)?;
        let (files, tensors) = match weights {
            Weights::File(file) => {
                let (data, tensors) = SafetensorsFile::open(&file)?.into_parts(0);
                (vec![data], tensors)
            }
            Weights::Index(index) => open_shards(&folder, &index)?,
            Weights::Gguf(file) => {
                let GgufModel { config, spec, family, files, tensors, bound, metadata } =
                    gguf::open_model(&file, true)?;
                let about = About { path: path.to_owned(), folder, config, spec, family, gguf: Some(metadata) };
                return Self::of(about, files, tensors, bound);
            }
        };
        let config = Config::read(&folder)?;
        let family = families::find(&config)?;
        check_layers(&config, &files, &tensors)?;
        let spec = (family.spec)(&config)?;
        let fused = |role| family.fused.and_then(|fused| fused(&spec, role));
        let naming = Naming { names: &family.names, fused: &fused, scheme: packed::scheme(&config)? };
        let bound = bind(path, &spec, &naming, &files, &tensors)?;
        Self::of(About { path: path.to_owned(), folder, config, spec, family, gguf: None }, files, tensors, bound)
    }

    fn of(about: About, files: Vec<DataFile>, tensors: Vec<TensorLoc>, bound: Bound) -> Result<Self> {
        let stored = |role: &Role| bound.recipes.get(role).and_then(|r| r.stored().first().copied());
        let by_role = bound.roles.iter().map(|(role, loc)| (*role, stored(role).unwrap_or(loc)));
        let fingerprint = fingerprint::fingerprint(&about.spec, &tensors, by_role, &files)?;
        let About { path, folder, config, spec, family, gguf } = about;
        Ok(Self { path, folder, config, spec, family, gguf, files, tensors, bound, fingerprint })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of configuration and sidecar files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The configuration files; of a model in GGUF, what they would say.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Metadata of a model in GGUF, its tokenizer's among them; `None` of other files.
    pub fn gguf(&self) -> Option<&BTreeMap<String, GgufValue>> {
        self.gguf.as_ref()
    }

    /// The architecture.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The family that read it.
    pub fn family(&self) -> &'static Family {
        self.family
    }

    /// 16 hex characters that stand for exactly these weights.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The open data files; [`TensorLoc::file`] indexes them.
    pub fn files(&self) -> &[DataFile] {
        &self.files
    }

    /// Bytes read so far from all data files.
    pub fn bytes_read(&self) -> u64 {
        self.files.iter().map(DataFile::bytes_read).sum()
    }

    /// All tensors of all files, by file and offset.
    pub fn tensors(&self) -> &[TensorLoc] {
        &self.tensors
    }

    /// Names of the tensors that the model does not need.
    pub fn unused_tensors(&self) -> &[String] {
        &self.bound.unused
    }

    /// Where a weight lies; of one with a [`Checkpoint::recipe`], where its parts begin, and type and size in memory.
    ///
    /// # Errors
    /// The model has no such weight.
    pub fn tensor(&self, role: Role) -> Result<&TensorLoc> {
        self.bound.roles.get(&role).ok_or(FormatError::NoRole { role })
    }

    /// How a weight's values come out of stored bytes that are not the weight as it is; `None` if they are.
    pub fn recipe(&self, role: Role) -> Option<&Recipe> {
        self.bound.recipes.get(&role)
    }

    /// The name of a weight's tensor in the family's safetensors files, were it a tensor of its own.
    pub fn name_of(&self, role: Role) -> String {
        self.bound.prefix.name(&self.family.names.of(role))
    }

    /// The model's roles: embedding, head and final norm, then layer by layer, routed experts last in each.
    pub fn roles(&self) -> impl Iterator<Item = Role> {
        shape::roles(&self.spec)
    }

    /// The shape of a weight, if the model has it.
    pub fn expected_shape(&self, role: Role) -> Option<Vec<usize>> {
        shape::expected_shape(&self.spec, role)
    }

    /// Fills `buf` with the first bytes of a tensor; for all of it, `buf` has [`TensorLoc::len`] bytes.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read_into(&self, loc: &TensorLoc, buf: &mut [u8]) -> Result<()> {
        self.files[loc.file].read_at(loc.offset, buf)
    }

    /// Bytes in the files of one routed expert, 0 if there is no such expert.
    pub fn expert_bytes(&self, layer: usize, expert: usize) -> u64 {
        Role::of_expert(layer, expert).iter().filter_map(|&r| self.tensor(r).ok()).map(|t| t.len).sum()
    }

    /// Bytes in the files of all that the model needs but routed experts.
    pub fn non_expert_bytes(&self) -> u64 {
        self.sum(|role| !role.is_expert(), |t| t.len)
    }

    /// Bytes in the files of all that the model needs.
    pub fn total_bytes(&self) -> u64 {
        self.sum(|_| true, |t| t.len)
    }

    /// How many numbers the model has.
    pub fn parameter_counts(&self) -> ParameterCounts {
        shape::parameter_counts(&self.spec)
    }

    fn sum(&self, which: impl Fn(Role) -> bool, what: impl Fn(&TensorLoc) -> u64) -> u64 {
        self.bound.roles.iter().filter(|(role, _)| which(**role)).map(|(_, loc)| what(loc)).sum()
    }

    /// A file beside the weights, e.g. `tokenizer.json`, if it is there.
    pub fn sidecar(&self, name: &str) -> Option<PathBuf> {
        let plain = Path::new(name).file_name().is_some_and(|f| f == name);
        Some(self.folder.join(name)).filter(|path| plain && path.is_file())
    }
}

/// Layers that are specified whatever the files hold: few enough to cost nothing.
const LAYERS_FREE: usize = 64;
/// Bytes of frequencies that all layers may have whatever the files hold.
const FREQUENCIES_FREE: u64 = 1 << 18;

/// Before layers are specified one by one: a layer has tensors of its own, and more bytes in them than its specification has
/// in its list of frequencies, which is half as long as a head is wide. No model falls short of this.
pub(crate) fn check_layers(config: &Config, files: &[DataFile], tensors: &[TensorLoc]) -> Result<()> {
    let bytes: u64 = files.iter().map(DataFile::size).sum();
    // What is no number, or too large, is refused by the family, in its own words.
    let number = |key: &str, max: usize| config.opt_count(key, max).ok().flatten();
    let share = || Some(number("hidden_size", WIDTH_MAX)? / number("num_attention_heads", HEADS_MAX)?);
    let own = || number("head_dim", HEAD_DIM_MAX).or_else(share);
    let width = number("qk_rope_head_dim", HEAD_DIM_MAX).or_else(own).unwrap_or(0);
    for key in ["num_hidden_layers", "n_layer"] {
        let Some(layers) = number(key, LAYERS_MAX) else { continue };
        if layers > tensors.len().max(LAYERS_FREE) {
            return Err(config.refuse(key, format!("there are only {} tensors", tensors.len())));
        }
        if 2 * (layers * width) as u64 > bytes.max(FREQUENCIES_FREE) {
            return Err(config.refuse(key, format!("that many with heads of {width} cannot lie in {bytes} bytes")));
        }
    }
    Ok(())
}

enum Weights {
    File(PathBuf),
    Index(PathBuf),
    Gguf(PathBuf),
}

/// The GGUF file (of several parts, the first) that a model at `path` is opened from; `None` if it is opened from safetensors, or
/// if there are no weights. What belongs to a model, such as its tokenizer, is in that file.
///
/// # Errors
/// The folder holds several models in GGUF, or cannot be read.
pub fn gguf_of(path: &Path) -> Result<Option<PathBuf>> {
    if path.is_dir() && !has_safetensors(path) {
        return gguf::in_folder(path);
    }
    Ok(Some(path.to_owned()).filter(|path| path.is_file() && path.extension().is_some_and(|e| e == "gguf")))
}

fn has_safetensors(folder: &Path) -> bool {
    folder.join(SINGLE).is_file() || folder.join(INDEX).is_file()
}

/// The folder, and the file that leads to the weights.
fn locate(path: &Path) -> Result<(PathBuf, Weights)> {
    let metadata = fs::metadata(path).map_err(|e| FormatError::io("open", path, e))?;
    let no_model =
        |problem: &str, help| Err(FormatError::NoModel { path: path.to_owned(), problem: problem.to_owned(), help });
    if !metadata.is_dir() {
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned();
        return match path.extension().and_then(|e| e.to_str()) {
            Some("safetensors") => Ok((parent, Weights::File(path.to_owned()))),
            Some("gguf") => Ok((parent, Weights::Gguf(path.to_owned()))),
            _ => no_model("it is no .safetensors or .gguf file", "name a folder, a .safetensors file or a .gguf file"),
        };
    }
    // In this order, as transformers has it.
    let (single, index) = (path.join(SINGLE), path.join(INDEX));
    if single.is_file() {
        Ok((path.to_owned(), Weights::File(single)))
    } else if index.is_file() {
        Ok((path.to_owned(), Weights::Index(index)))
    } else if let Some(file) = gguf_of(path)? {
        Ok((path.to_owned(), Weights::Gguf(file)))
    } else {
        no_model(
            "it has neither model.safetensors nor model.safetensors.index.json nor a .gguf file",
            "download the safetensors or GGUF form of the model, or convert it",
        )
    }
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl ShardIndex {
    /// The shards, each once, in order.
    fn shards(&self, index_path: &Path) -> Result<Vec<&String>> {
        let mut shards: Vec<&String> = self.weight_map.values().collect();
        shards.sort_unstable();
        shards.dedup();
        shards.iter().try_for_each(|name| check_shard_name(index_path, name))?;
        Ok(shards)
    }
}

/// The shards that an index (`model.safetensors.index.json`) names, each once, in order.
///
/// # Errors
/// The file cannot be read, or a name would leave the folder.
pub fn shard_names(index_path: &Path) -> Result<Vec<String>> {
    let index: ShardIndex = read_json(index_path, HEADER_BYTES_MAX)?;
    Ok(index.shards(index_path)?.into_iter().cloned().collect())
}

/// Opens the shards that an index names, and checks that each tensor is where the index says.
fn open_shards(folder: &Path, index_path: &Path) -> Result<(Vec<DataFile>, Vec<TensorLoc>)> {
    let index: ShardIndex = read_json(index_path, HEADER_BYTES_MAX)?;
    let shards = index.shards(index_path)?;
    let (mut files, mut tensors) = (Vec::new(), Vec::new());
    for shard in &shards {
        let (data, mut of_shard) = SafetensorsFile::open(&folder.join(shard))?.into_parts(files.len());
        files.push(data);
        tensors.append(&mut of_shard);
    }
    let home = homes(&files, &tensors)?;
    for (name, shard) in &index.weight_map {
        let file = shards.binary_search(&shard).expect("all values are in the list");
        if home.get(name.as_str()) != Some(&file) {
            let path = files[file].path().to_owned();
            return Err(FormatError::NoTensor { path, tensor: name.clone() });
        }
    }
    Ok((files, tensors))
}

/// The file of each tensor, which is in one only.
pub(crate) fn homes<'a>(files: &[DataFile], tensors: &'a [TensorLoc]) -> Result<HashMap<&'a str, usize>> {
    let mut home = HashMap::new();
    for t in tensors {
        if let Some(first) = home.insert(t.name.as_str(), t.file) {
            let first: &DataFile = &files[first];
            return Err(FormatError::TensorEntry {
                path: files[t.file].path().to_owned(),
                tensor: t.name.clone(),
                problem: format!("it is in {} too", first.path().display()),
            });
        }
    }
    Ok(home)
}

/// A shard must be a file of the folder itself. A link there may lead elsewhere: caches are built so.
fn check_shard_name(index: &Path, name: &str) -> Result<()> {
    let problem = if name.is_empty() || name.contains(['/', '\\', ':', '\0']) || name.starts_with('.') {
        "it must be the name of a file in the same folder"
    } else if !name.ends_with(".safetensors") {
        "only .safetensors files are read"
    } else {
        return Ok(());
    };
    Err(FormatError::ShardName { path: index.to_owned(), name: name.to_owned(), problem })
}
