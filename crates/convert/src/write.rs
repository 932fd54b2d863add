//! One file, tensor by tensor.

use std::collections::BTreeMap;
use std::path::Path;

use quorate_formats::gguf::{Change, Content, GgufMade, GgufOut, check_written, elsewhere, plan_gguf, write_gguf};
use quorate_formats::{Checkpoint, FormatError, GgmlType, GgufValue, Recipe, Role, Sink};
use quorate_kernels::{DType, Pool, dequantize, encode};
use quorate_residency::read_stored;

use crate::error::{ConvertError, Result};
use crate::mix::{About, Mix, Place, fitting};
use crate::vocabulary;

/// Values decoded and encoded at once.
const CHUNK: usize = 1 << 22;

/// How much the columns of matrices matter: by tensor name, sums of squared inputs `[n, cols]` and counts `[n]`, as in
/// llama.cpp's importance matrices.
pub type Importance = BTreeMap<String, (Vec<f32>, Vec<f32>)>;

/// What to write.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// Types of the matrices; `None` leaves each as it is stored.
    pub mix: Option<&'static Mix>,
    /// The type of stacked experts, in place of the mix's.
    pub experts: Option<DType>,
    /// Tensors whose names contain one of these are F32.
    pub keep_f32: &'a [String],
    /// Importance of columns.
    pub importance: Option<&'a Importance>,
    /// Experts that are kept, one ascending list per MoE layer; `None` is all.
    pub kept: Option<&'a [Vec<usize>]>,
    /// The kind of the pre-tokenizer, where it is not known by its rules.
    pub pre: Option<&'a str>,
}

/// What was written.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Bytes of tensors.
    pub bytes: u64,
    /// Tensors and bytes by type.
    pub types: BTreeMap<&'static str, (usize, u64)>,
    /// Matrices without importance, where an importance matrix was given.
    pub without_importance: Vec<String>,
    /// What llama.cpp will compute otherwise than this program and the model's authors, in spite of the file.
    pub elsewhere: Vec<&'static str>,
}

/// Called with bytes done and bytes in all; `false` cancels.
pub type Progress<'a> = dyn FnMut(u64, u64) -> bool + 'a;

/// Writes a checkpoint as one GGUF file: under a temporary name, checked to be read as the same model, then renamed. An
/// error or a cancel leaves nothing behind.
///
/// # Errors
/// Experts that cannot be kept, a model or tokenizer without a form in GGUF, an importance matrix of another model, a value
/// that a type cannot hold, a read or write error, or a cancel.
pub fn write_model(
    checkpoint: &Checkpoint,
    options: &Options<'_>,
    out: &Path,
    pool: &Pool,
    progress: &mut Progress<'_>,
) -> Result<Summary> {
    let mut plan = plan_gguf(checkpoint, options.kept)?;
    if !plan.from_gguf {
        plan.metadata.extend(vocabulary::metadata(checkpoint, options.pre)?);
    }
    if let Some(mix) = options.mix {
        plan.set("general.file_type", GgufValue::Unsigned(mix.file_type));
    }
    plan.set("general.quantization_version", GgufValue::Unsigned(2));
    let jobs = jobs(checkpoint, options, &plan.tensors)?;
    let mut summary = Summary { elsewhere: elsewhere(&plan.spec), ..Summary::default() };
    for job in &jobs {
        let entry = summary.types.entry(job.dtype.name()).or_default();
        *entry = (entry.0 + 1, entry.1 + job.bytes()?);
        summary.bytes += job.bytes()?;
    }
    let lacking = |job: &&Job<'_>| options.importance.is_some() && job.dtype.is_quantized() && job.importance.is_none();
    summary.without_importance = jobs.iter().filter(lacking).map(|job| job.made.name.clone()).collect();

    let state = std::cell::RefCell::new(Writing { checkpoint, pool, out, progress, done: 0, total: summary.bytes });
    state.borrow_mut().tell(0)?;
    // Errors of this crate that a writer of `formats` cannot carry.
    let failed = std::cell::RefCell::new(None);
    let tensors = jobs.iter().map(|job| {
        let (state, failed) = (&state, &failed);
        let produce = Box::new(move |sink: &mut Sink<'_>| {
            state.borrow_mut().tensor(job, sink).map_err(|error| match error {
                ConvertError::Format(error) => error,
                other => {
                    failed.replace(Some(other));
                    FormatError::Cancelled { path: out.to_owned() }
                }
            })
        });
        Ok(GgufOut {
            name: job.made.name.clone(),
            shape: job.made.shape.iter().rev().map(|&n| n as u64).collect(),
            dtype: ggml(job.dtype)?,
            produce,
        })
    });
    let tensors = tensors.collect::<Result<Vec<_>>>()?;
    let written = write_gguf(out, &plan.metadata, tensors, |path| check_written(path, &plan.spec));
    match (failed.take(), written) {
        (Some(error), _) => Err(error),
        (None, Err(error)) => Err(error.into()),
        (None, Ok(())) => Ok(summary),
    }
}

/// The file's type.
fn ggml(dtype: DType) -> Result<GgmlType> {
    let found = (0..64).filter_map(GgmlType::of).find(|t| t.name() == dtype.name());
    let problem = || FormatError::NotInGguf { problem: format!("{} has no number there", dtype.name()) };
    Ok(found.ok_or_else(problem)?)
}

/// A tensor to be written.
struct Job<'a> {
    made: &'a GgufMade,
    dtype: DType,
    /// The type that it has now, if it has one.
    stored: Option<DType>,
    importance: Option<Vec<f32>>,
}

impl Job<'_> {
    fn cols(&self) -> usize {
        self.made.shape.last().copied().unwrap_or(1)
    }

    /// Matrices in a stack.
    fn matrices(&self) -> usize {
        match self.made.shape.as_slice() {
            [stack @ .., _, _] => stack.iter().product(),
            _ => 1,
        }
    }

    fn bytes(&self) -> Result<u64> {
        let elements: usize = self.made.shape.iter().product();
        let bytes = self.dtype.row_bytes(self.cols()).map(|row| (elements / self.cols().max(1) * row) as u64);
        let problem = || format!("rows of {} have {} values", self.made.name, self.cols());
        Ok(bytes.ok_or_else(|| FormatError::NotInGguf { problem: problem() })?)
    }
}

fn jobs<'a>(checkpoint: &Checkpoint, options: &Options<'_>, tensors: &'a [GgufMade]) -> Result<Vec<Job<'a>>> {
    let spec = checkpoint.spec();
    let place = |made: &'a GgufMade, values_before| Place { name: &made.name, shape: &made.shape, values_before };
    let attn = spec.layers.first().map(|l| &l.attn);
    let about = About {
        layers: spec.layers.len(),
        experts: spec.moe_layers().first().and_then(|&l| spec.moe(l)).map_or(0, |moe| moe.n_experts),
        group: attn.map_or(1, |a| a.n_heads / a.n_kv_heads.max(1)),
        tied: spec.tie_word_embeddings,
        values: tensors.iter().filter(|made| place(made, 0).is_value()).count(),
        importance: options.importance.is_some(),
    };
    let mut values_before = 0;
    let mut jobs = Vec::with_capacity(tensors.len());
    for made in tensors {
        let place = place(made, values_before);
        values_before += usize::from(place.is_value());
        let stored = stored_type(checkpoint, made)?;
        let dtype = match options.mix {
            _ if options.keep_f32.iter().any(|part| made.name.contains(part.as_str())) => DType::F32,
            _ if place.is_kept() => match &made.content {
                // What a file holds so it goes on holding.
                Content::Stored { .. } => stored.unwrap_or(DType::F32),
                _ => DType::F32,
            },
            _ if place.is_experts() && options.experts.is_some() => {
                fitting(options.experts.unwrap_or(DType::F16), made.shape.last().copied().unwrap_or(1))
            }
            Some(mix) => mix.of(&about, &place),
            None => stored.unwrap_or(DType::F32),
        };
        if Some(dtype) != stored && !dtype.is_writable() {
            let problem = format!("{} cannot be written as {}, which is only read", made.name, dtype.name());
            return Err(FormatError::NotInGguf { problem }.into());
        }
        let mut job = Job { made, dtype, stored, importance: None };
        if dtype.is_quantized() {
            job.importance = importance_of(checkpoint, &job, options)?;
        }
        jobs.push(job);
    }
    Ok(jobs)
}

/// The type of a tensor's values as they are now: what is packed in small floats is a type that holds them.
fn stored_type(checkpoint: &Checkpoint, made: &GgufMade) -> Result<Option<DType>> {
    Ok(match &made.content {
        Content::Values(_) => None,
        Content::Stored { dtype, .. } => dtype.computable(),
        Content::Weights(weights) => match weights.first() {
            None => None,
            Some((role, _)) => match checkpoint.recipe(*role) {
                Some(Recipe::Mxfp4 { .. }) => Some(DType::MXFP4),
                Some(Recipe::Scaled { .. }) => Some(DType::BF16),
                _ => checkpoint.tensor(*role)?.dtype.computable(),
            },
        },
    })
}

/// The importance of each column for each matrix of the tensor.
fn importance_of(checkpoint: &Checkpoint, job: &Job<'_>, options: &Options<'_>) -> Result<Option<Vec<f32>>> {
    let Some((sums, counts)) = options.importance.and_then(|all| all.get(&job.made.name)) else { return Ok(None) };
    let (cols, matrices) = (job.cols(), job.matrices());
    let wrong = |problem: String| Err(ConvertError::Importance { problem: format!("{}: {problem}", job.made.name) });
    if counts.is_empty() || sums.len() != counts.len() * cols {
        return wrong(format!("{} numbers for {} times {cols} columns", sums.len(), counts.len()));
    }
    let kept: Vec<usize> = match (job.made.shape.len() > 2, counts.len()) {
        (_, 1) => vec![0; matrices],
        (true, n) if n == matrices => (0..n).collect(),
        (true, n) => match kept_experts(checkpoint, job, options) {
            Some(ids) if ids.iter().all(|&e| e < n) => ids,
            _ => return wrong(format!("it is of {n} matrices, the tensor has {matrices}")),
        },
        (false, n) => return wrong(format!("it is of {n} matrices, the tensor is one")),
    };
    let mut importance = Vec::with_capacity(matrices * cols);
    for m in kept {
        let (row, count) = (&sums[m * cols..][..cols], counts[m]);
        // An expert that was never chosen: all its columns are equal.
        importance.extend(row.iter().map(|sum| if count > 0.0 { sum / count } else { 1.0 }));
    }
    if !importance.iter().all(|v| v.is_finite() && *v >= 0.0) {
        return wrong("a sum of squares is negative or no number".to_owned());
    }
    Ok(Some(importance))
}

/// The experts in a stack, if some were left out.
fn kept_experts(checkpoint: &Checkpoint, job: &Job<'_>, options: &Options<'_>) -> Option<Vec<usize>> {
    match &job.made.content {
        Content::Weights(weights) => weights.iter().map(|(role, _)| role.of_experts().flatten()).collect(),
        Content::Stored { .. } => {
            let layer: usize = job.made.name.strip_prefix("blk.")?.split('.').next()?.parse().ok()?;
            let moe = checkpoint.spec().moe_layers().iter().position(|&l| l == layer)?;
            options.kept?.get(moe).cloned()
        }
        Content::Values(_) => None,
    }
}

/// The copying, with its progress.
struct Writing<'a, 'p> {
    checkpoint: &'a Checkpoint,
    pool: &'a Pool,
    out: &'a Path,
    progress: &'a mut Progress<'p>,
    done: u64,
    total: u64,
}

impl Writing<'_, '_> {
    fn tell(&mut self, more: usize) -> Result<()> {
        self.done += more as u64;
        match (self.progress)(self.done, self.total) {
            true => Ok(()),
            false => Err(FormatError::Cancelled { path: self.out.to_owned() }.into()),
        }
    }

    fn tensor(&mut self, job: &Job<'_>, sink: &mut Sink<'_>) -> Result<()> {
        match &job.made.content {
            Content::Values(values) => self.encode(job, 0, values, sink),
            Content::Stored { file, ranges, .. } if job.stored == Some(job.dtype) => {
                for &(offset, len) in ranges {
                    for at in (0..len).step_by(CHUNK) {
                        let mut chunk = vec![0; (len - at).min(CHUNK as u64) as usize];
                        self.checkpoint.files()[*file].read_at(offset + at, &mut chunk)?;
                        sink.write(&chunk)?;
                        self.tell(chunk.len())?;
                    }
                }
                Ok(())
            }
            Content::Stored { file, ranges, .. } => {
                let dtype = job.stored.unwrap_or(DType::F32);
                let each = job.matrices() / ranges.len().max(1);
                for (i, &(offset, len)) in ranges.iter().enumerate() {
                    self.stored(job, dtype, *file, (offset, len), (i * each, each.max(1)), sink)?;
                }
                Ok(())
            }
            Content::Weights(weights) => {
                for (i, (role, change)) in weights.iter().enumerate() {
                    let matrix = if weights.len() == job.matrices() { i } else { 0 };
                    self.weight(job, matrix, *role, change, sink)?;
                }
                Ok(())
            }
        }
    }

    /// A range of a file that holds `matrices` matrices from `first` on, in another type.
    fn stored(
        &mut self,
        job: &Job<'_>,
        dtype: DType,
        file: usize,
        (offset, len): (u64, u64),
        (first, matrices): (usize, usize),
        sink: &mut Sink<'_>,
    ) -> Result<()> {
        let cols = job.cols();
        let Some(row) = dtype.row_bytes(cols).filter(|&row| row > 0) else { return Ok(()) };
        let each = len as usize / matrices / row;
        let rows_at_once = (CHUNK / cols.max(1)).max(1);
        for m in 0..matrices {
            for start in (0..each).step_by(rows_at_once) {
                let rows = rows_at_once.min(each - start);
                let mut bytes = vec![0; rows * row];
                self.checkpoint.files()[file].read_at(offset + ((m * each + start) * row) as u64, &mut bytes)?;
                let mut values = vec![0.0; rows * cols];
                dequantize(dtype, &bytes, &mut values);
                self.encode(job, first + m, &values, sink)?;
            }
        }
        Ok(())
    }

    /// A weight of the model, changed.
    fn weight(&mut self, job: &Job<'_>, matrix: usize, role: Role, change: &Change, sink: &mut Sink<'_>) -> Result<()> {
        let (dtype, bytes) = read_stored(self.checkpoint, role)?;
        let shape = self.checkpoint.expected_shape(role).ok_or(FormatError::NoRole { role })?;
        // A vector's elements are its rows.
        let (rows, cols) = match shape.as_slice() {
            [n] => (*n, 1),
            [rows, rest @ ..] => (*rows, rest.iter().product()),
            [] => (1, 1),
        };
        let Some(row) = dtype.row_bytes(cols) else {
            return Err(FormatError::NotInGguf { problem: format!("{role} has rows that are no whole blocks") }.into());
        };
        let values_of = |rows: &mut dyn Iterator<Item = usize>| {
            let mut values = Vec::new();
            for r in rows {
                let at = values.len();
                values.resize(at + cols, 0.0);
                dequantize(dtype, &bytes[r * row..][..row], &mut values[at..]);
            }
            values
        };
        if let Change::Keys { heads, keys, rows } = change {
            for h in 0..*heads {
                let head = values_of(&mut (h * rows..h * rows + keys));
                let columns: Vec<f32> = (0..cols * keys).map(|i| head[i % keys * cols + i / keys]).collect();
                self.encode(job, h, &columns, sink)?;
            }
            return Ok(());
        }
        let order: Vec<usize> = match change {
            Change::Rows(order) | Change::MinusExp(order) => order.clone(),
            _ => (0..rows).collect(),
        };
        let at_once = if shape.len() == 1 { order.len() } else { (CHUNK / cols.max(1)).max(1) };
        for chunk in order.chunks(at_once.max(1)) {
            let mut values = values_of(&mut chunk.iter().copied());
            match change {
                Change::PlusOne => values.iter_mut().for_each(|v| *v += 1.0),
                Change::MinusExp(_) => values.iter_mut().for_each(|v| *v = -v.exp()),
                Change::Columns(order) => {
                    values = values.chunks_exact(cols).flat_map(|row| order.iter().map(|&c| row[c])).collect();
                }
                _ => {}
            }
            self.encode(job, matrix, &values, sink)?;
        }
        Ok(())
    }

    /// Whole rows of one matrix of a tensor.
    fn encode(&mut self, job: &Job<'_>, matrix: usize, values: &[f32], sink: &mut Sink<'_>) -> Result<()> {
        // A vector may come in parts, and is never in blocks.
        let cols = if job.dtype.is_quantized() { job.cols() } else { values.len().max(1) };
        let importance = job.importance.as_ref().map(|w| &w[matrix * cols..][..cols]);
        let len = values.len() / job.dtype.block_len() * job.dtype.block_bytes();
        let mut bytes = vec![0; len];
        if !values.is_empty() {
            let encoded = encode(self.pool, job.dtype, cols, values, importance, &mut bytes);
            encoded.map_err(|source| ConvertError::Value { tensor: job.made.name.clone(), source })?;
        }
        sink.write(&bytes)?;
        self.tell(bytes.len())
    }
}
