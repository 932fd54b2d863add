//! llama.cpp's importance matrix in GGUF: per weight the sum of its squared inputs and how many rows were summed. Weights of
//! stacked experts have a count for each expert: how often it was chosen.

use std::collections::BTreeMap;
use std::path::Path;

use quorate_formats::{DataFile, GgufFile, GgufValue, gguf::GGUF_MAGIC, gguf_bytes};

use super::traces::{TraceShape, add_counts};
use crate::{LensError, RouterStats};

/// What is said of files of the old kind.
pub(super) const LEGACY: &str =
    "; an old imatrix.dat does not have the counts of experts, make it again with a llama-imatrix that writes GGUF";
/// Stacked weights of experts in a layer.
const EXPERT_WEIGHTS: [&str; 4] = ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps"];

/// An importance matrix.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Imatrix {
    /// Names of the calibration texts.
    pub datasets: Vec<String>,
    /// Chunks of text that were run.
    pub chunk_count: u64,
    /// Tokens of a chunk.
    pub chunk_size: u64,
    /// By weight, e.g. `blk.0.ffn_up_exps.weight`.
    pub entries: BTreeMap<String, ImatrixEntry>,
}

/// The statistics of one weight, or of `n` stacked ones.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImatrixEntry {
    /// Sums of squared inputs, `[n, width]`.
    pub in_sum2: Vec<f32>,
    /// Rows summed, `[n]`.
    pub counts: Vec<f32>,
}

/// Reads a file.
pub(super) fn read(path: &Path) -> Result<Imatrix, LensError> {
    let bad = |problem: String| LensError::invalid(path.display().to_string(), problem);
    let data = DataFile::open(path)?;
    let mut magic = [0; 4];
    if data.size() < 4 || data.read_at(0, &mut magic).is_err() || magic != GGUF_MAGIC {
        return Err(bad(format!("it is no GGUF file{LEGACY}")));
    }
    let file = GgufFile::open(path)?;
    let meta = |key: &str| file.metadata().get(key);
    match meta("general.type").and_then(GgufValue::as_str) {
        Some("imatrix") => {}
        other => return Err(bad(format!("it is a GGUF file of the type {other:?}, not an importance matrix"))),
    }
    let number = |key: &str| meta(key).and_then(GgufValue::as_u64).unwrap_or(0);
    let datasets = match meta("imatrix.datasets") {
        Some(GgufValue::Array(names)) => names.texts().unwrap_or_default().into_iter().map(String::from).collect(),
        _ => Vec::new(),
    };
    let (chunk_count, chunk_size) = (number("imatrix.chunk_count"), number("imatrix.chunk_size"));
    let mut entries = BTreeMap::new();
    for tensor in file.tensors() {
        let Some(weight) = tensor.name.strip_suffix(".counts") else { continue };
        let counts = file.read_f32(&tensor.name)?;
        let in_sum2 = file.read_f32(&format!("{weight}.in_sum2"))?;
        if counts.is_empty() || !in_sum2.len().is_multiple_of(counts.len()) {
            return Err(bad(format!("{weight} has {} sums for {} counts", in_sum2.len(), counts.len())));
        }
        entries.insert(weight.to_string(), ImatrixEntry { in_sum2, counts });
    }
    Ok(Imatrix { datasets, chunk_count, chunk_size, entries })
}

impl Imatrix {
    /// Reads an importance matrix in GGUF.
    ///
    /// # Errors
    /// A file that cannot be read, is of the old kind, or is none.
    pub fn read(path: &Path) -> Result<Imatrix, LensError> {
        read(path)
    }

    /// The file's bytes, as llama.cpp reads them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let datasets = GgufValue::list(self.datasets.iter().cloned().map(GgufValue::Text));
        let metadata = [
            ("general.type", GgufValue::Text("imatrix".into())),
            ("imatrix.datasets", datasets),
            ("imatrix.chunk_count", GgufValue::Unsigned(self.chunk_count)),
            ("imatrix.chunk_size", GgufValue::Unsigned(self.chunk_size)),
        ]
        .map(|(key, value)| (key.to_string(), value));
        let mut tensors = Vec::with_capacity(2 * self.entries.len());
        for (weight, entry) in &self.entries {
            let n = entry.counts.len() as u64;
            let width = entry.in_sum2.len() as u64 / n.max(1);
            tensors.push((format!("{weight}.in_sum2"), vec![width, n], entry.in_sum2.clone()));
            tensors.push((format!("{weight}.counts"), vec![1, n], entry.counts.clone()));
        }
        gguf_bytes(&metadata, &tensors)
    }

    /// How often each expert was chosen.
    ///
    /// # Errors
    /// A layer of experts that is missing, counts that are no counts, or that differ between the weights of a layer.
    pub fn stats(&self, shape: &TraceShape) -> Result<RouterStats, String> {
        let mut rows = Vec::with_capacity(shape.map.n_layers());
        for &layer in &shape.map.layers {
            let names = EXPERT_WEIGHTS.map(|w| format!("blk.{layer}.{w}.weight"));
            let mut found = names.iter().filter_map(|name| Some((name, &self.entries.get(name)?.counts)));
            let Some((first, counts)) = found.next() else {
                return Err(format!("it has no counts of the experts of layer {layer} ({})", names[0]));
            };
            if let Some((other, _)) = found.find(|(_, c)| *c != counts) {
                return Err(format!("`{first}` and `{other}` have different counts"));
            }
            let whole = |&c: &f32| ((0.0..1e18).contains(&c) && c.fract() == 0.0).then_some(c as u64);
            let row: Option<Vec<u64>> = counts.iter().map(whole).collect();
            rows.push(row.ok_or_else(|| format!("`{first}` has counts that are no whole numbers"))?);
        }
        let mut stats = RouterStats::new(shape.map.clone());
        add_counts(&mut stats, shape, &rows)?;
        Ok(stats)
    }
}
