//! `quorate quantize`: a model as a GGUF file, its matrices in a smaller type.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use quorate_convert::{Importance, MIXES, Mix, Options, Summary, write_model};
use quorate_formats::{Checkpoint, check_output};
use quorate_kernels::{DType, Pool};
use quorate_lens::interchange::Imatrix;
use serde_json::json;

use crate::common::{Common, human_bytes, interrupted, say};

/// Arguments of `quantize`.
#[derive(Args)]
#[command(after_help = "\
From safetensors (any family that has an architecture in GGUF) or from another GGUF file; llama.cpp and this program read \
what is written. Names mean what llama-quantize means by them: _S and _M give some matrices more bits. Q4_K, Q5_K and Q6_K \
are that type throughout, but for the output matrix. Vectors, routers and other small weights stay as they are (F32).
One part of a tensor at a time is in memory; the file appears under its name when it is whole.

Examples:
  quorate quantize -m Qwen3-30B-A3B -o qwen.gguf --type Q4_K_M
  quorate quantize -m model.gguf -o small.gguf --type Q6_K --experts Q4_K --imatrix imatrix.gguf
  quorate quantize -o embedded.gguf --type F16")]
pub struct Quantize {
    /// File to write
    #[arg(short, long, value_name = "OUT.gguf")]
    output: PathBuf,
    /// Types of the matrices: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q5_K_S, Q4_K_M, Q4_K_S, ..
    #[arg(long = "type", value_name = "TYPE", value_parser = mix)]
    mix: &'static Mix,
    /// Type of the routed experts, if another, e.g. Q4_K
    #[arg(long, value_name = "TYPE", value_parser = dtype)]
    experts: Option<DType>,
    /// Importance matrix of llama-imatrix (GGUF): columns that matter more are rounded with more care
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Keep tensors as F32 whose names contain one of these, e.g. token_embd,attn_v
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    keep_f32: Vec<String>,
    /// How llama.cpp splits texts (tokenizer.ggml.pre), where that is not told by the tokenizer's expressions
    #[arg(long, value_name = "KIND")]
    pre: Option<String>,
}

/// A type or mix by name.
pub(super) fn mix(name: &str) -> Result<&'static Mix, String> {
    Mix::named(name).ok_or_else(|| {
        let known: Vec<&str> = MIXES.iter().map(|mix| mix.name).collect();
        format!("`{name}` is no type; help: one of {}", known.join(", "))
    })
}

fn dtype(name: &str) -> Result<DType, String> {
    let writable = || DType::ALL.iter().copied().filter(|t| t.is_writable());
    writable().find(|t| t.name().eq_ignore_ascii_case(name)).ok_or_else(|| {
        let known: Vec<&str> = writable().map(DType::name).collect();
        format!("`{name}` is no type that can be written; help: one of {}", known.join(", "))
    })
}

/// Says what llama.cpp will make of a file that was written, where that is something else.
pub(super) fn note_elsewhere(common: &Common, written: &Summary) {
    if !written.elsewhere.is_empty() {
        common.note(&format!("llama.cpp computes this model otherwise: {}", written.elsewhere.join("; ")));
    }
}

impl Quantize {
    pub fn run(&self, common: &Common) -> Result<()> {
        check_output(&self.output)?;
        let checkpoint = Checkpoint::open(&common.model_path()?)?;
        let importance = self.importance()?;
        let options = Options {
            mix: Some(self.mix),
            experts: self.experts,
            keep_f32: &self.keep_f32,
            importance: importance.as_ref(),
            kept: None,
            pre: self.pre.as_deref(),
        };
        let pool = Pool::new(common.thread_count()?);
        let start = std::time::Instant::now();
        let mut bar = common.progress("writing", 0, "bytes");
        let summary = write_model(&checkpoint, &options, &self.output, &pool, &mut |done, total| {
            bar.set_total(total);
            bar.set(done);
            !interrupted()
        })
        .with_context(|| format!("cannot write {}", self.output.display()))?;
        bar.finish();
        if let [first, ..] = summary.without_importance.as_slice() {
            let n = summary.without_importance.len();
            common.note(&format!("the importance matrix has nothing of {n} matrices, {first} among them"));
        }
        note_elsewhere(common, &summary);
        if common.json {
            let types = summary.types.iter().map(|(t, (n, bytes))| json!({"type": t, "tensors": n, "bytes": bytes}));
            return common.print_json(&json!({
                "output": self.output, "type": self.mix.name, "bytes": summary.bytes,
                "source_bytes": checkpoint.total_bytes(), "seconds": start.elapsed().as_secs_f64(),
                "types": types.collect::<Vec<_>>(), "without_importance": summary.without_importance, "llama_cpp_differs": summary.elsewhere,
            }));
        }
        let types = summary.types.iter().map(|(t, (n, bytes))| format!("{n} {t} ({})", human_bytes(*bytes)));
        Ok(say!(
            "{}: {} of {} in {:.1} s; {}",
            self.output.display(),
            human_bytes(summary.bytes),
            human_bytes(checkpoint.total_bytes()),
            start.elapsed().as_secs_f64(),
            types.collect::<Vec<_>>().join(", ")
        )?)
    }

    fn importance(&self) -> Result<Option<Importance>> {
        let Some(path) = &self.imatrix else { return Ok(None) };
        let matrix = Imatrix::read(path)?;
        Ok(Some(matrix.entries.into_iter().map(|(name, entry)| (name, (entry.in_sum2, entry.counts))).collect()))
    }
}
