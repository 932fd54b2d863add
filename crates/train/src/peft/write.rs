//! Writing an adapter.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::Tensor;
use quorate_formats::{Checkpoint, Role, TensorOut, safetensors_bytes, write_file, write_safetensors};
use quorate_model::{LowRank, Overlay, Patch, ops};
use serde_json::{Map, Value, json};

use super::names::module_of;
use super::{CONFIG, PREFIX, WEIGHTS};
use crate::TrainError;

/// Writes an overlay as an adapter of this model. Low-rank terms become LoRA factors, replaced weights modules saved in full.
/// `base` is the name or path of the model that the configuration mentions.
///
/// # Errors
/// Biases and replaced experts, which PEFT cannot keep so, an empty overlay, or files that cannot be written.
pub fn write(checkpoint: &Checkpoint, overlay: &Overlay, folder: &Path, base: &str) -> Result<(), TrainError> {
    let refuse = |problem: String| TrainError::Adapter { path: folder.to_owned(), problem };
    let Content { tensors, config } = content(checkpoint, overlay, folder, base)?;
    fs::create_dir_all(folder).map_err(|e| refuse(format!("cannot make the folder: {e}")))?;
    write_safetensors(&folder.join(WEIGHTS), Some(metadata()), tensors)?;
    Ok(write_file(&folder.join(CONFIG), config.as_bytes())?)
}

/// The files of an adapter, name and content, as [`write()`] would write them.
///
/// # Errors
/// As [`write()`], but for the writing.
pub fn encode(
    checkpoint: &Checkpoint,
    overlay: &Overlay,
    base: &str,
) -> Result<[(&'static str, Vec<u8>); 2], TrainError> {
    let Content { tensors, config } = content(checkpoint, overlay, Path::new("in memory"), base)?;
    Ok([(CONFIG, config.into_bytes()), (WEIGHTS, safetensors_bytes(Some(metadata()), tensors)?)])
}

fn metadata() -> HashMap<String, String> {
    [("format".to_string(), "pt".to_string())].into()
}

/// What an adapter's files hold.
struct Content {
    tensors: Vec<TensorOut<'static>>,
    config: String,
}

fn content(checkpoint: &Checkpoint, overlay: &Overlay, folder: &Path, base: &str) -> Result<Content, TrainError> {
    let refuse = |problem: String| TrainError::Adapter { path: folder.to_owned(), problem };
    if overlay.is_empty() {
        return Err(refuse("there is nothing to write, the overlay is empty".to_string()));
    }
    let (mut tensors, mut terms, mut whole) = (Vec::new(), Vec::new(), Vec::new());
    for (role, patch) in overlay.iter() {
        let module = module_of(checkpoint, role).ok_or_else(|| {
            refuse(format!("{role} cannot be kept; help: biases are no modules, write a whole model instead"))
        })?;
        match patch {
            Patch::LowRank(LowRank { a, b, scale }) => {
                tensors.push(out(format!("{PREFIX}{module}.lora_A.weight"), a)?);
                tensors.push(out(format!("{PREFIX}{module}.lora_B.weight"), b)?);
                terms.push(Term { role, module, rank: a.dim(0)?, alpha: f64::from(*scale) * a.dim(0)? as f64 });
            }
            Patch::Replace(_) if role.is_expert() => {
                let help = "help: train it as a low-rank term, or write a whole model instead";
                return Err(refuse(format!("{role} is replaced, which an adapter cannot keep; {help}")));
            }
            Patch::Replace(tensor) => {
                tensors.push(out(format!("{PREFIX}{module}.weight"), tensor)?);
                whole.push(module);
            }
        }
    }
    let config = config(&terms, &whole, base);
    let config = serde_json::to_string_pretty(&config).map_err(|e| refuse(format!("cannot write {CONFIG}: {e}")))?;
    Ok(Content { tensors, config })
}

fn out(name: String, tensor: &Tensor) -> Result<TensorOut<'static>, TrainError> {
    Ok(TensorOut::f32(name, tensor.dims(), ops::values(tensor)?.to_vec()))
}

/// What the configuration says of a low-rank term.
struct Term {
    role: Role,
    module: String,
    rank: usize,
    alpha: f64,
}

/// The configuration of LoRA terms and modules saved in full.
///
/// Rank and alpha of experts are the defaults, if there are any: where transformers stacks experts, PEFT takes no others.
fn config(terms: &[Term], whole: &[String], base: &str) -> Value {
    let usual = terms.iter().find(|term| term.role.is_expert()).or(terms.first());
    let (rank, alpha) = usual.map_or((8, 8.0), |term| (term.rank, term.alpha));
    // PEFT calls alpha an integer, and takes any number.
    let number =
        |alpha: f64| if alpha.fract() == 0.0 && alpha.abs() < 1e9 { json!(alpha as i64) } else { json!(alpha) };
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    for Term { role, module, rank: r, alpha: a } in terms {
        // A router is a module or, in transformers 5, a parameter.
        let end = if matches!(role, Role::Router(_)) { r"(\.weight)?" } else { "" };
        let pattern = module.replace('.', r"\.") + end;
        if *r != rank {
            ranks.insert(pattern.clone(), json!(r));
        }
        if *a != alpha {
            alphas.insert(pattern, number(*a));
        }
    }
    let targets: Vec<&String> = terms.iter().map(|term| &term.module).collect();
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": true,
        "r": rank,
        "lora_alpha": number(alpha),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": targets,
        "modules_to_save": if whole.is_empty() { Value::Null } else { json!(whole) },
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "use_rslora": false,
        "use_dora": false,
        "init_lora_weights": true,
    })
}
