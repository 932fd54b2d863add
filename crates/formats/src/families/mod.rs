//! Families: from a released checkpoint's keys and tensor names to [`ModelSpec`] and roles.
//!
//! A new family is one small file here and one line in [`FAMILIES`]; no forward code.

mod common;
mod deepseek;
mod ernie4_5_moe;
mod gemma;
mod glm4_moe;
mod gpt2;
mod gpt_oss;
mod granite_moe;
mod hunyuan_moe;
mod llama;
mod llama4;
mod mistral;
mod mixtral;
mod olmo2;
mod olmoe;
mod pangu_moe;
mod phi3;
mod phimoe;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;
mod qwen3_next;

use crate::config::Config;
use crate::role::{Role, TensorNames};
use crate::source::Fused;
use crate::spec::ModelSpec;
use crate::{FormatError, Result};

/// A named mapping from configuration keys and tensor names to the one vocabulary.
#[derive(Debug)]
pub struct Family {
    /// Name, as in [`ModelSpec::family`].
    pub name: &'static str,
    /// Values of `model_type` that it reads.
    pub model_types: &'static [&'static str],
    /// Reads the configuration.
    pub spec: fn(&Config) -> Result<ModelSpec>,
    /// Tensor names in safetensors files.
    pub names: TensorNames,
    /// Keys that may hold the number of routed experts, the usual one first. Empty for dense families.
    pub expert_count_keys: &'static [&'static str],
    /// Which weights are parts of other tensors; `None` if each is a tensor of its own.
    pub fused: Option<fn(&ModelSpec, Role) -> Option<Fused>>,
}

/// All families.
pub static FAMILIES: &[&Family] = &[
    &olmoe::FAMILY,
    &qwen3_moe::FAMILY,
    &qwen2_moe::FAMILY,
    &mixtral::FAMILY,
    &llama::FAMILY,
    &mistral::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
    &qwen3_next::FAMILY,
    &qwen3_next::QWEN3_5,
    &deepseek::V1,
    &deepseek::V2,
    &deepseek::V3,
    &glm4_moe::FAMILY,
    &gpt_oss::FAMILY,
    &phimoe::FAMILY,
    &granite_moe::FAMILY,
    &llama4::FAMILY,
    &hunyuan_moe::FAMILY,
    &ernie4_5_moe::FAMILY,
    &pangu_moe::FAMILY,
    &gemma::GEMMA2,
    &gemma::GEMMA3,
    &phi3::FAMILY,
    &olmo2::FAMILY,
    &gpt2::FAMILY,
];

/// The family that reads a configuration, by its `model_type`.
///
/// # Errors
/// No `model_type`, or one that no family reads; then the known ones are named.
pub fn find(config: &Config) -> Result<&'static Family> {
    let model_type = config.opt_text("model_type")?.ok_or_else(|| config.missing("model_type"))?;
    if let Some(family) = FAMILIES.iter().find(|f| f.model_types.contains(&model_type)) {
        return Ok(family);
    }
    let known: Vec<&'static str> = FAMILIES.iter().flat_map(|f| f.model_types).copied().collect();
    // A text of any length may stand there; only a short one can be a slip of the pen.
    let short: String = model_type.chars().take(64).collect();
    let nearest = known.iter().map(|k| (distance(k, &short), *k)).min().filter(|(d, k)| *d <= k.len() / 4);
    Err(FormatError::UnknownFamily {
        path: config.path().to_owned(),
        model_type: short,
        known,
        nearest: nearest.map(|(_, k)| k),
    })
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distance_by_hand() {
        assert_eq!(distance("olmoe", "olmoe"), 0);
        assert_eq!(distance("olmoe", "olmo"), 1);
        assert_eq!(distance("qwen3_moe", "qwen2moe"), 2);
        assert_eq!(distance("", "abc"), 3);
    }

    #[test]
    fn names_and_model_types_are_unique() {
        let mut types: Vec<_> = FAMILIES.iter().flat_map(|f| f.model_types).collect();
        let count = types.len();
        types.sort_unstable();
        types.dedup();
        assert_eq!(types.len(), count);
    }
}
