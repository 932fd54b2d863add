//! How long and how fast.

use crate::{AdamWOptions, TrainError};

/// The learning rate over time: linear warm-up, then a half cosine down to a floor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Learning rate after the warm-up.
    pub peak: f64,
    /// Steps of the warm-up.
    pub warmup: u64,
    /// The last learning rate, as a part of `peak`.
    pub floor: f64,
}

impl Schedule {
    /// The learning rate of step `step` (from 0) of `steps`.
    pub fn rate(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let done = (step - self.warmup) as f64 / steps.saturating_sub(self.warmup).max(1) as f64;
        let part = 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos());
        self.peak * (self.floor + (1.0 - self.floor) * part)
    }
}

/// Options of a training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainOptions {
    /// Steps in all.
    pub steps: u64,
    /// Examples of one step.
    pub batch: usize,
    /// Tokens of one forward pass, about; a step whose examples have more takes several passes. It bounds the memory.
    pub pass_tokens: usize,
    /// Learning rate.
    pub schedule: Schedule,
    /// Optimizer.
    pub adamw: AdamWOptions,
    /// Largest norm of the gradient of all parameters together; longer ones are scaled down.
    pub clip: Option<f64>,
    /// Order of the examples.
    pub seed: u64,
    /// Steps between evaluations; 0 evaluates only at the end.
    pub eval_every: u64,
    /// Steps between checkpoints; 0 writes only when the run ends or is stopped.
    pub checkpoint_every: u64,
}

impl Default for TrainOptions {
    fn default() -> TrainOptions {
        TrainOptions {
            steps: 100,
            batch: 8,
            pass_tokens: 1024,
            schedule: Schedule { peak: 1e-3, warmup: 10, floor: 0.1 },
            adamw: AdamWOptions::default(),
            clip: Some(1.0),
            seed: 0,
            eval_every: 0,
            checkpoint_every: 0,
        }
    }
}

impl TrainOptions {
    /// Whether the options make sense.
    ///
    /// # Errors
    /// The first that does not, by name.
    pub(crate) fn check(&self) -> Result<(), TrainError> {
        let rules = [
            (self.batch > 0, "batch must be at least 1"),
            (self.pass_tokens > 0, "pass_tokens must be at least 1"),
            (self.schedule.peak > 0.0 && self.schedule.peak.is_finite(), "the learning rate must be above 0"),
            ((0.0..=1.0).contains(&self.schedule.floor), "floor is a part of the learning rate, from 0 to 1"),
            (self.clip.is_none_or(|c| c > 0.0), "clip must be above 0"),
            (self.adamw.is_valid(), "betas must be in 0..1, epsilon above 0 and the weight decay at least 0"),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, rule)) => Err(TrainError::Options((*rule).to_string())),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_by_hand() {
        let schedule = Schedule { peak: 2.0, warmup: 4, floor: 0.25 };
        let rates: Vec<f64> = [0, 3, 4, 8, 12].iter().map(|&step| schedule.rate(step, 12)).collect();
        // Half of the cosine at the middle: 2 (0.25 + 0.75 / 2).
        assert_eq!(rates, [0.5, 2.0, 2.0, 1.25, 0.5]);
        assert_eq!(Schedule { warmup: 0, ..schedule }.rate(0, 0), 2.0);
    }

    #[test]
    fn senseless_options_are_named() {
        let ok = TrainOptions::default();
        assert!(ok.check().is_ok());
        let bad = TrainOptions { clip: Some(0.0), ..ok };
        assert_eq!(bad.check().unwrap_err().to_string(), "clip must be above 0");
    }
}
