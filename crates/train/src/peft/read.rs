//! Reading an adapter.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use quorate_formats::{Checkpoint, Role, SafetensorsFile};
use quorate_model::{LowRank, Overlay, Patch, ops};
use serde_json::{Map, Value};

use super::names::{Module, Modules};
use super::{AdapterConfig, CONFIG, PREFIX, WEIGHTS};
use crate::TrainError;

/// A matrix of the file.
struct Factor {
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// What the file has of one module.
#[derive(Default)]
struct Parts {
    a: Option<Factor>,
    b: Option<Factor>,
    whole: Option<Factor>,
}

/// Reads an adapter of this model: its effect as an overlay.
///
/// # Errors
/// A file that is missing or broken, an adapter of another kind or another model, or one that uses what is not supported
/// (every tensor of the file is used, or the first that cannot be is named).
pub fn read(checkpoint: &Checkpoint, folder: &Path) -> Result<Overlay, TrainError> {
    let refuse = |problem: String| TrainError::Adapter { path: folder.to_owned(), problem };
    let config_path = folder.join(CONFIG);
    let text = fs::read_to_string(&config_path)
        .map_err(|e| refuse(format!("cannot read {CONFIG}: {e}; help: name the folder that holds it")))?;
    let config: Map<String, Value> =
        serde_json::from_str(&text).map_err(|e| refuse(format!("{CONFIG} is no JSON object: {e}")))?;
    let config = AdapterConfig::parse(folder, &config)?;
    let weights = folder.join(WEIGHTS);
    if !weights.exists() && folder.join("adapter_model.bin").exists() {
        return Err(refuse("its weights are a pickle; help: save it again with safe_serialization".to_string()));
    }
    let file = SafetensorsFile::open(&weights)?;
    let modules = Modules::of(checkpoint);
    let mut parts: BTreeMap<String, Parts> = BTreeMap::new();
    for tensor in file.tensors() {
        let (module, part) =
            parse_key(&tensor.name).ok_or_else(|| refuse(format!("the tensor {} is not supported", tensor.name)))?;
        let factor = Factor { shape: tensor.shape.clone(), values: file.read_f32(&tensor.name)? };
        let of_module = parts.entry(module).or_default();
        let place = match part {
            Part::A => &mut of_module.a,
            Part::B => &mut of_module.b,
            Part::Whole => &mut of_module.whole,
        };
        if place.replace(factor).is_some() {
            return Err(refuse(format!("there are two tensors like {}", tensor.name)));
        }
    }
    let mut overlay = Overlay::new();
    for (name, parts) in parts {
        add(&mut overlay, &config, checkpoint, &modules, &name, parts, folder)?;
    }
    Ok(overlay)
}

enum Part {
    A,
    B,
    Whole,
}

/// Module (without prefix) and part of a key: `.lora_A.weight`, `.lora_A.NAME.weight`, a plain `.weight`, or one within
/// `modules_to_save`.
fn parse_key(key: &str) -> Option<(String, Part)> {
    let key = key.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
    for (marker, part) in [(".lora_A", Part::A), (".lora_B", Part::B), (".modules_to_save", Part::Whole)] {
        if let Some((module, adapter)) = key.split_once(marker) {
            let plain = adapter.is_empty() || adapter.strip_prefix('.').is_some_and(|name| !name.contains('.'));
            return plain.then(|| (module.to_string(), part));
        }
    }
    (!key.contains(".lora_")).then(|| (key.to_string(), Part::Whole))
}

fn add(
    overlay: &mut Overlay,
    config: &AdapterConfig,
    checkpoint: &Checkpoint,
    modules: &Modules,
    name: &str,
    parts: Parts,
    folder: &Path,
) -> Result<(), TrainError> {
    let refuse = |problem: String| TrainError::Adapter { path: folder.to_owned(), problem };
    // A second parameter of one module is wrapped around the first.
    let module = name.replace(".base_layer", "");
    let found = modules
        .get(&module)
        .ok_or_else(|| refuse(format!("the model has no module {module}; help: is the adapter of another model?")))?;
    match (found, parts) {
        (Module::One(role), Parts { a: Some(a), b: Some(b), whole: None }) => {
            let (rank, scale) = config.of(folder, &module)?;
            let shape = checkpoint.expected_shape(role).unwrap_or_default();
            let (out, inner) = (shape.first().copied().unwrap_or(0), shape.get(1).copied().unwrap_or(0));
            if a.shape != [rank, inner] || b.shape != [out, rank] {
                let (a, b) = (a.shape, b.shape);
                let problem =
                    format!("{module} has factors {a:?} and {b:?}; [{rank}, {inner}] and [{out}, {rank}] expected");
                return Err(refuse(problem));
            }
            put(overlay, role, Patch::LowRank(term(a.values, b.values, out, inner, rank, scale)?), folder)
        }
        (Module::One(role), Parts { a: None, b: None, whole: Some(whole) }) => {
            if checkpoint.expected_shape(role).is_none_or(|shape| shape != whole.shape) {
                return Err(refuse(format!("{module} is saved in full with the shape {:?}", whole.shape)));
            }
            put(overlay, role, Patch::Replace(ops::tensor(whole.values, &whole.shape)?), folder)
        }
        (Module::Experts(l), Parts { a: Some(a), b: Some(b), whole: None }) => {
            for (role, patch) in stacked(config, checkpoint, &module, l, &a, &b, folder)? {
                put(overlay, role, patch, folder)?;
            }
            Ok(())
        }
        _ => Err(refuse(format!("{module} has not one A and one B, or one whole weight"))),
    }
}

fn put(overlay: &mut Overlay, role: Role, patch: Patch, folder: &Path) -> Result<(), TrainError> {
    match overlay.insert(role, patch) {
        None => Ok(()),
        Some(_) => {
            Err(TrainError::Adapter { path: folder.to_owned(), problem: format!("{role} is changed twice in it") })
        }
    }
}

fn term(a: Vec<f32>, b: Vec<f32>, out: usize, inner: usize, rank: usize, scale: f32) -> Result<LowRank, TrainError> {
    Ok(LowRank { a: ops::tensor(a, &[rank, inner])?, b: ops::tensor(b, &[out, rank])?, scale })
}

/// The terms of stacked experts. Rows of A are by expert, then rank; columns of B by rank, then expert:
/// `Delta_e[o, i] = scale * sum over j of B[o, j * E + e] A[e * r + j, i]`. Which of the two parameters it is, the shapes tell.
fn stacked(
    config: &AdapterConfig,
    checkpoint: &Checkpoint,
    module: &str,
    l: usize,
    a: &Factor,
    b: &Factor,
    folder: &Path,
) -> Result<Vec<(Role, Patch)>, TrainError> {
    let refuse = |problem: String| TrainError::Adapter { path: folder.to_owned(), problem };
    let (d, moe) = (checkpoint.spec().hidden_size, checkpoint.spec().moe(l));
    let moe = moe.ok_or_else(|| refuse(format!("layer {l} has no experts")))?;
    let (experts, width) = (moe.n_experts, moe.intermediate_size);
    let ([rows, inner], [out, columns]) = (&a.shape[..], &b.shape[..]) else {
        return Err(refuse(format!("the factors of {module} are no matrices")));
    };
    // Of each expert's gate, up and down, those that the parameter holds.
    let (parameter, parts) = match (*inner, *out) {
        shape if shape == (d, 2 * width) => ("gate_up_proj", 0..2),
        shape if shape == (width, d) => ("down_proj", 2..3),
        _ => return Err(refuse(format!("{module} has factors {:?} and {:?}, which fit no experts", a.shape, b.shape))),
    };
    let (r, scale) = config.of(folder, &format!("{module}.{parameter}"))?;
    if *rows != r * experts || *columns != r * experts {
        let problem = format!("{module}.{parameter} has rank {rows} of {experts} experts, {r} each expected");
        return Err(refuse(problem));
    }
    let each = out / parts.len();
    let mut patches = Vec::new();
    for e in 0..experts {
        for (i, role) in Role::of_expert(l, e)[parts.clone()].iter().enumerate() {
            let own_a = a.values[e * r * inner..(e + 1) * r * inner].to_vec();
            let row = |o: usize| (0..r).map(move |j| o * columns + j * experts + e);
            let own_b = (i * each..(i + 1) * each).flat_map(row).map(|at| b.values[at]).collect();
            patches.push((*role, Patch::LowRank(term(own_a, own_b, each, *inner, r, scale)?)));
        }
    }
    Ok(patches)
}
