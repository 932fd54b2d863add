//! AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, Algorithm 2).
//!
//! Our own, since it must be saved and resumed exactly, and may leave rows of a matrix alone.

/// Options of [`AdamW`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of their squares.
    pub beta2: f64,
    /// Added to the root.
    pub epsilon: f64,
    /// Decoupled weight decay: each step takes this part, times the learning rate, of the weight away.
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    fn default() -> AdamWOptions {
        AdamWOptions { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

impl AdamWOptions {
    pub(crate) fn is_valid(&self) -> bool {
        let betas = [self.beta1, self.beta2].iter().all(|b| (0.0..1.0).contains(b));
        betas && self.epsilon > 0.0 && self.weight_decay >= 0.0 && self.weight_decay.is_finite()
    }
}

/// The state of one parameter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdamW {
    /// Steps so far; a step without gradient does not count.
    pub steps: u64,
    /// Mean of the gradients.
    pub mean: Vec<f32>,
    /// Mean of their squares.
    pub square: Vec<f32>,
}

impl AdamW {
    /// No step done yet, for a parameter of `n` values.
    pub fn new(n: usize) -> AdamW {
        AdamW { steps: 0, mean: vec![0.0; n], square: vec![0.0; n] }
    }

    /// One step of the values in `range`s with their gradient, with learning rate `rate`:
    ///
    /// `m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= rate (decay w + m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps))`.
    ///
    /// # Panics
    /// If lengths differ.
    pub fn step(
        &mut self,
        options: &AdamWOptions,
        rate: f64,
        values: &mut [f32],
        gradient: &[f32],
        ranges: &[std::ops::Range<usize>],
    ) {
        assert_eq!((values.len(), gradient.len()), (self.mean.len(), self.mean.len()), "lengths of a parameter");
        self.steps += 1;
        let t = self.steps.min(i32::MAX as u64) as i32;
        let (b1, b2) = (options.beta1, options.beta2);
        let (unbias1, unbias2) = (1.0 - b1.powi(t), 1.0 - b2.powi(t));
        for i in ranges.iter().cloned().flatten() {
            let g = f64::from(gradient[i]);
            let m = b1 * f64::from(self.mean[i]) + (1.0 - b1) * g;
            let v = b2 * f64::from(self.square[i]) + (1.0 - b2) * g * g;
            (self.mean[i], self.square[i]) = (m as f32, v as f32);
            let w = f64::from(values[i]);
            let update = m / unbias1 / ((v / unbias2).sqrt() + options.epsilon);
            values[i] = (w - rate * (options.weight_decay * w + update)) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two steps worked out by hand, with betas of one half: g = 1, then g = -2.
    #[test]
    fn steps_by_hand() {
        let options = AdamWOptions { beta1: 0.5, beta2: 0.5, epsilon: 1e-8, weight_decay: 0.1 };
        let mut state = AdamW::new(3);
        let mut w = [2.0, 5.0, 2.0];
        // m = 0.5, v = 0.5; without bias both 1: the step is 1. w = 2 - 0.1 (0.2 + 1) = 1.88.
        state.step(&options, 0.1, &mut w, &[1.0, 9.0, 1.0], &[0..1, 2..3]);
        assert!((w[0] - 1.88).abs() < 1e-6 && w[1] == 5.0 && w[2] == w[0], "{w:?}");
        // m = 0.25 - 1 = -0.75, over 0.75: -1. v = 0.25 + 2 = 2.25, over 0.75: 3. w = 1.88 - 0.1 (0.188 - 1 / sqrt 3).
        state.step(&options, 0.1, &mut w, &[-2.0, 9.0, -2.0], &[0..1, 2..3]);
        let expected = 1.88 - 0.1 * (0.188 - 1.0 / 3f32.sqrt());
        assert!((w[0] - expected).abs() < 1e-6 && w[1] == 5.0, "{w:?} {expected}");
        assert_eq!(state.steps, 2);
        assert_eq!(state.mean[1], 0.0);
    }
}
