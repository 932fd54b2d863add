//! What a GGUF file of a checkpoint will hold: metadata and tensors, from safetensors or from another GGUF file.

use std::path::Path;

use super::arch::Arch;
use super::meta_out::{difference, metadata_for_gguf};
use super::tensors_out::{Content, GgufMade, tensors_for_gguf};
use super::{GgufValue, model};
use crate::prune::{Cut, Pruned, check_kept, cuts, pruned_spec, slices};
use crate::spec::ModelSpec;
use crate::{Checkpoint, FormatError, Result};

/// What a file will hold, but for the tokenizer of a model from safetensors.
#[derive(Clone, Debug)]
pub struct GgufPlan {
    /// Key-value pairs.
    pub metadata: Vec<(String, GgufValue)>,
    /// The tensors.
    pub tensors: Vec<GgufMade>,
    /// What the file must be read as.
    pub spec: ModelSpec,
    /// Whether the source is a GGUF file, so that the tokenizer is in the metadata.
    pub from_gguf: bool,
}

/// The plan for a checkpoint with only the experts `kept` (one ascending list per MoE layer, all of one length; `None` is
/// all). Layers that predict further tokens are left out, unless a GGUF file keeps all its experts.
///
/// # Errors
/// Experts that cannot be kept, or a model that has no form in GGUF.
pub fn plan_gguf(checkpoint: &Checkpoint, kept: Option<&[Vec<usize>]>) -> Result<GgufPlan> {
    let pruned = kept.map(|kept| check_kept(checkpoint, kept, true)).transpose()?;
    let spec = match &pruned {
        Some(pruned) => pruned_spec(checkpoint.spec(), pruned),
        None => checkpoint.spec().clone(),
    };
    let (arch, mut plan) = match checkpoint.gguf() {
        Some(metadata) => {
            let name = metadata.get("general.architecture").and_then(GgufValue::as_str).unwrap_or_default();
            let metadata = metadata.iter().filter(|(key, _)| !key.starts_with("split.") && *key != "general.alignment");
            let metadata = metadata.map(|(key, value)| (key.clone(), value.clone())).collect();
            let tensors = stored(checkpoint, kept)?;
            (name.to_owned(), GgufPlan { metadata, tensors, spec, from_gguf: true })
        }
        None => {
            let model_type = checkpoint.config().opt_text("model_type")?.unwrap_or_default();
            let arch = Arch::of_model_type(model_type).ok_or_else(|| FormatError::NotInGguf {
                problem: format!("the family {} has no architecture there", checkpoint.family().name),
            })?;
            let metadata = metadata_for_gguf(checkpoint, arch)?;
            let tensors = tensors_for_gguf(checkpoint, arch, kept)?;
            (arch.name.to_owned(), GgufPlan { metadata, tensors, spec, from_gguf: false })
        }
    };
    if let (Some(kept), Some(pruned)) = (kept, &pruned) {
        plan.tell_pruned(checkpoint, &arch, kept, pruned);
    }
    Ok(plan)
}

impl GgufPlan {
    /// Sets a key.
    pub fn set(&mut self, key: &str, value: GgufValue) {
        match self.metadata.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key.to_owned(), value)),
        }
    }

    fn tell_pruned(&mut self, checkpoint: &Checkpoint, arch: &str, kept: &[Vec<usize>], pruned: &Pruned) {
        let number = |n: usize| GgufValue::Unsigned(n as u64);
        self.set(&format!("{arch}.expert_count"), number(pruned.count()));
        let groups = [format!("{arch}.expert_group_count"), format!("{arch}.expert_group_used_count")];
        match pruned.groups {
            Some((n, chosen)) if chosen < n => {
                self.set(&groups[0], number(n));
                self.set(&groups[1], number(chosen));
            }
            _ => self.metadata.retain(|(key, _)| !groups.contains(key)),
        }
        self.set(&format!("{arch}.block_count"), number(self.spec.layers.len()));
        self.metadata.retain(|(key, _)| *key != format!("{arch}.nextn_predict_layers"));
        self.set("quorate.source_fingerprint", GgufValue::Text(checkpoint.fingerprint().to_owned()));
        for (layer, ids) in self.spec.moe_layers().into_iter().zip(kept) {
            let ids = GgufValue::list(ids.iter().map(|&e| number(e)));
            self.set(&format!("quorate.kept_experts.{layer}"), ids);
        }
    }
}

/// The tensors of a GGUF file as they are stored.
fn stored(checkpoint: &Checkpoint, kept: Option<&[Vec<usize>]>) -> Result<Vec<GgufMade>> {
    let cuts = kept.map(|kept| cuts(checkpoint, kept)).unwrap_or_default();
    let mut made = Vec::with_capacity(checkpoint.tensors().len());
    for loc in checkpoint.tensors() {
        let (ranges, shape) = match cuts.get(&loc.name) {
            None => (vec![(loc.offset, loc.len)], loc.shape.clone()),
            Some(Cut::Experts { of, ids }) if loc.shape.contains(of) => slices(loc, *of, ids),
            // A tensor for each expert, in the manner of old files.
            Some(Cut::Renamed(_)) => (vec![(loc.offset, loc.len)], loc.shape.clone()),
            Some(Cut::Experts { .. }) => {
                let problem = format!("{} has no part for each of its layer's experts", loc.name);
                return Err(FormatError::NotInGguf { problem });
            }
            Some(Cut::Gone) => continue,
        };
        let name = match cuts.get(&loc.name) {
            Some(Cut::Renamed(name)) => name.clone(),
            _ => loc.name.clone(),
        };
        let content = Content::Stored { file: loc.file, ranges, dtype: loc.dtype };
        made.push(GgufMade { name, shape, content });
    }
    Ok(made)
}

/// Checks that a written file says what was meant: its specification is the plan's.
///
/// # Errors
/// A file that cannot be opened, or another specification; then what differs.
pub fn check_written(path: &Path, expected: &ModelSpec) -> Result<()> {
    let problem = match model::open(path, true) {
        Ok(written) => difference(expected, &written.spec),
        Err(FormatError::MissingTensor { tensor, .. }) => {
            Some(format!("its architecture has {tensor} in every model, this one has not"))
        }
        Err(other) => return Err(other),
    };
    problem.map_or(Ok(()), |problem| Err(FormatError::NotInGguf { problem }))
}
