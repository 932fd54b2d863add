//! What is made smaller.

use candle_core::{Device, Tensor};
use quorate_model::{KvCache, Lens, Model, ModelError, NoLens, Segment};

/// A prompt and the answer to be learned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Prompt tokens, at least one.
    pub prompt: Vec<u32>,
    /// Answer tokens, at least one.
    pub answer: Vec<u32>,
}

impl Example {
    /// Rows of the forward pass; the last answer token predicts nothing and is left out.
    pub fn rows(&self) -> usize {
        (self.prompt.len() + self.answer.len()).saturating_sub(1)
    }

    /// The example as a segment whose logits are those that predict the answer.
    pub fn segment(&self, slot: usize) -> Segment {
        let inputs = &self.answer[..self.answer.len().saturating_sub(1)];
        Segment::teacher_forced(slot, &self.prompt, inputs)
    }
}

/// The loss of some examples.
#[derive(Debug)]
pub struct Loss {
    /// Sum of the terms, a scalar with gradient.
    pub sum: Tensor,
    /// Number of terms. The loss of a step is the sum over its passes divided by the number of all their terms.
    pub terms: usize,
}

/// What is to be made smaller. It runs the forward pass itself, with what lenses it likes, and may run several.
pub trait Objective {
    /// The loss of examples that fit one pass.
    ///
    /// # Errors
    /// Whatever goes wrong in the forward pass.
    fn loss(&mut self, model: &Model, examples: &[&Example]) -> Result<Loss, ModelError>;
}

/// Mean cross entropy of the answers' tokens.
pub struct AnswerLoss<'a> {
    lens: Option<&'a mut dyn Lens>,
}

impl<'a> AnswerLoss<'a> {
    /// Without a lens.
    pub fn new() -> AnswerLoss<'a> {
        AnswerLoss { lens: None }
    }

    /// With a lens on every pass, which may change values or add parameters of its own.
    pub fn with_lens(lens: &'a mut dyn Lens) -> AnswerLoss<'a> {
        AnswerLoss { lens: Some(lens) }
    }
}

impl Default for AnswerLoss<'_> {
    fn default() -> Self {
        AnswerLoss::new()
    }
}

impl Objective for AnswerLoss<'_> {
    fn loss(&mut self, model: &Model, examples: &[&Example]) -> Result<Loss, ModelError> {
        let segments: Vec<Segment> = examples.iter().enumerate().map(|(slot, e)| e.segment(slot)).collect();
        let targets: Vec<u32> = examples.iter().flat_map(|e| e.answer.iter().copied()).collect();
        let mut cache = KvCache::new(model.spec(), segments.len());
        let mut none = NoLens;
        let lens: &mut dyn Lens = match &mut self.lens {
            Some(lens) => &mut **lens,
            None => &mut none,
        };
        let forward = model.forward(&segments, &mut cache, lens)?;
        let logits = forward.logits.ok_or_else(|| ModelError::Lens("a lens stopped a training pass".to_string()))?;
        Ok(Loss { terms: targets.len(), sum: cross_entropy(&logits, &targets)? })
    }
}

/// Sum over rows of `-log softmax(logits)[target]`; `logits [M, V]`, one target a row.
///
/// # Errors
/// As many targets as rows are needed, inside the vocabulary.
pub fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor, ModelError> {
    let index = Tensor::from_slice(targets, (targets.len(), 1), &Device::Cpu)?;
    let wanted = logits.gather(&index, 1)?.squeeze(1)?;
    Ok((logits.log_sum_exp(1)? - wanted)?.sum_all()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cross_entropy_by_hand() {
        let logits = Tensor::new(&[[0f32, 0.0], [3f32.ln(), 0.0]], &Device::Cpu).unwrap();
        let loss = cross_entropy(&logits, &[0, 1]).unwrap().to_scalar::<f32>().unwrap();
        assert!((loss - (2f32.ln() + 4f32.ln())).abs() < 1e-6);
    }
}
