//! What a prompt looks like to the first router: the query of pattern retrieval. No expert is needed for it.

use candle_core::Tensor;
use quorate_model::{At, Flow, Lens, ModelError, Site, SiteSet, ops};

use crate::ExpertMap;

/// How the prompts of a task look to the first router: distribution of their keys.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Key {
    /// Mean key, `[d]`.
    pub mean: Vec<f32>,
    /// Variance of each coordinate within the task, `[d]`.
    pub var: Vec<f32>,
    /// Typical keys; none for a generalist, which is not retrieved.
    pub prototypes: Vec<Vec<f32>>,
    /// Distance within which the task's own held-out prompts lie.
    pub radius: f32,
    /// Prompts behind it.
    pub items: u64,
}

impl Key {
    pub(crate) fn check(&self) -> Result<(), String> {
        let d = self.mean.len();
        if self.var.len() != d || self.prototypes.iter().any(|p| p.len() != d) {
            return Err(format!("the key's parts have different lengths, {d} expected"));
        }
        Ok(())
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((self.mean.len() as u32).to_le_bytes());
        bytes.extend(self.radius.to_le_bytes());
        bytes.extend(self.items.to_le_bytes());
        let values = self.mean.iter().chain(&self.var).chain(self.prototypes.iter().flatten());
        values.for_each(|v| bytes.extend(v.to_le_bytes()));
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Key, String> {
        let bad = || "the key is damaged; help: profile the task again".to_string();
        let (head, rest) = bytes.split_at_checked(16).ok_or_else(bad)?;
        let number = |b: &[u8]| <[u8; 4]>::try_from(b).map_err(|_| bad());
        let d = u32::from_le_bytes(number(&head[..4])?) as usize;
        let radius = f32::from_le_bytes(number(&head[4..8])?);
        let items = u64::from_le_bytes(<[u8; 8]>::try_from(&head[8..]).map_err(|_| bad())?);
        let values: Vec<f32> = rest.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        if rest.len() % 4 != 0 || values.len() < 2 * d || (d > 0 && values.len() % d != 0) {
            return Err(bad());
        }
        let prototypes = values[2 * d..].chunks(d.max(1)).map(<[f32]>::to_vec).collect();
        Ok(Key { mean: values[..d].to_vec(), var: values[d..2 * d].to_vec(), prototypes, radius, items })
    }
}

/// Observes the input of the first MoE layer's router, over the prompt rows of each segment.
///
/// Used alone with [`KeyProbe::stopping`], the forward pass ends at that router, before any expert.
#[derive(Debug)]
pub struct KeyProbe {
    layer: usize,
    stop: bool,
    keys: Vec<Vec<f32>>,
}

impl KeyProbe {
    /// Observes and lets the pass go on.
    pub fn watching(map: &ExpertMap) -> KeyProbe {
        KeyProbe { layer: map.layers.first().copied().unwrap_or(0), stop: false, keys: Vec::new() }
    }

    /// Observes and ends the pass.
    pub fn stopping(map: &ExpertMap) -> KeyProbe {
        KeyProbe { stop: true, ..KeyProbe::watching(map) }
    }

    /// The keys of the segments seen, in order.
    pub fn take(&mut self) -> Vec<Vec<f32>> {
        std::mem::take(&mut self.keys)
    }
}

impl Lens for KeyProbe {
    fn sites(&self, layer: usize) -> SiteSet {
        if layer == self.layer { SiteSet::of(&[Site::FfnIn]) } else { SiteSet::NONE }
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        let d = value.dim(1)?;
        let x = ops::values(value)?;
        for span in &at.rows.spans {
            let rows = span.row0..span.row0 + span.len;
            let prompt: Vec<usize> = rows.filter(|&r| at.rows.phase[r].is_prompt()).collect();
            let mut key = vec![0f32; d];
            for &row in &prompt {
                key.iter_mut().zip(&x[row * d..(row + 1) * d]).for_each(|(k, x)| *k += x);
            }
            key.iter_mut().for_each(|k| *k /= prompt.len().max(1) as f32);
            self.keys.push(key);
        }
        Ok(if self.stop { Flow::Stop } else { Flow::Continue })
    }
}
