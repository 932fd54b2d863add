//! A short name for exactly these weights.

use sha2::{Digest, Sha256};

use crate::role::Role;
use crate::spec::ModelSpec;
use crate::{DataFile, Result, TensorLoc};

/// Tensors from which bytes are sampled, and bytes of each.
const SAMPLES_MAX: usize = 64;
const SAMPLE_BYTES: u64 = 64;

/// 16 hex characters of SHA-256 over the specification, the sorted index (name, type, shape) and bytes from the middle
/// of some tensors that are no experts. How the tensors lie in files does not matter.
///
/// # Errors
/// A file cannot be read.
pub(crate) fn fingerprint<'a>(
    spec: &ModelSpec,
    tensors: &[TensorLoc],
    roles: impl Iterator<Item = (Role, &'a TensorLoc)>,
    files: &[DataFile],
) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(serde_json::to_vec(spec).expect("a specification has only finite numbers and text keys"));

    let mut index: Vec<&TensorLoc> = tensors.iter().collect();
    index.sort_by_key(|t| &t.name);
    for t in index {
        hash.update(format!("{}\0{}\0{:?}\0", t.name, t.dtype, t.shape));
    }

    let mut sampled: Vec<&TensorLoc> = roles.filter(|(role, _)| !role.is_expert()).map(|(_, t)| t).collect();
    sampled.sort_by_key(|t| (&t.name, t.offset, t.len));
    let count = sampled.len().min(SAMPLES_MAX);
    for i in 0..count {
        let t = sampled[i * sampled.len() / count];
        let mut bytes = [0; SAMPLE_BYTES as usize];
        let n = t.len.min(SAMPLE_BYTES);
        let bytes = &mut bytes[..n as usize];
        files[t.file].read_at(t.offset + (t.len - n) / 2, bytes)?;
        hash.update(&bytes);
    }
    Ok(hash.finalize()[..8].iter().map(|b| format!("{b:02x}")).collect())
}
