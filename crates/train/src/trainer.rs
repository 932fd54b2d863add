//! The loop.

use std::path::{Path, PathBuf};

use quorate_formats::Role;
use quorate_model::{Model, ops};

use crate::state::{Identity, Random, Saved, load, save};
use crate::{AdamW, Example, Form, Objective, Parameters, TrainError, TrainOptions};

/// Where a training is: steps done, and the place in the present round through the examples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    pub step: u64,
    pub epoch: u64,
    pub position: u64,
}

/// The best evaluation so far.
#[derive(Clone, Debug, PartialEq)]
pub struct Best {
    /// Steps that were done.
    pub step: u64,
    /// The score.
    pub score: f64,
    /// All parameters, as they were.
    pub values: Vec<Vec<f32>>,
}

/// What a step was like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Loss before the step: mean over the terms of its examples.
    pub loss: f64,
    /// Norm of the gradient, before clipping.
    pub norm: f64,
    /// Learning rate.
    pub rate: f64,
    /// Token rows that were computed.
    pub tokens: usize,
}

/// A function that scores a model; higher is better.
pub type Evaluate<'a> = dyn FnMut(&Model) -> Result<f64, TrainError> + 'a;

/// What happens besides the steps.
pub struct Hooks<'a> {
    /// Called after each step; false stops the run (after a checkpoint).
    pub on_step: &'a mut dyn FnMut(&StepReport) -> bool,
    /// Evaluates the model with the parameters over it, without gradients.
    pub evaluate: Option<&'a mut Evaluate<'a>>,
    /// Where checkpoints are written.
    pub checkpoint: Option<PathBuf>,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Steps done in all, those before a resume included.
    pub steps: u64,
    /// Whether `on_step` stopped it.
    pub stopped: bool,
    /// Loss of the last step.
    pub loss: Option<f64>,
    /// Step and score of the best evaluation.
    pub best: Option<(u64, f64)>,
}

/// A training under way.
pub struct Trainer {
    parameters: Parameters,
    states: Vec<AdamW>,
    options: TrainOptions,
    place: Place,
    best: Option<Best>,
}

impl Trainer {
    /// Begins a training of weights of `model`.
    ///
    /// # Errors
    /// Options that make no sense, or as [`Parameters::new`].
    pub fn new(model: &Model, targets: &[(Role, Form)], options: TrainOptions) -> Result<Trainer, TrainError> {
        Trainer::of(Parameters::new(model, targets, options.seed)?, options)
    }

    /// Begins a training of parameters that are there.
    ///
    /// # Errors
    /// Options that make no sense, or no parameters.
    pub fn of(parameters: Parameters, options: TrainOptions) -> Result<Trainer, TrainError> {
        options.check()?;
        if parameters.count() == 0 {
            return Err(TrainError::Options("nothing is to be trained; help: select at least one weight".to_string()));
        }
        let states = parameters.all().iter().map(|p| AdamW::new(p.var.elem_count())).collect();
        Ok(Trainer { parameters, states, options, place: Place::default(), best: None })
    }

    /// Goes back to where a checkpoint was written. Parameters and seed must be those of the training that wrote it; a run
    /// on the same examples then continues bit for bit as if there had been no break.
    ///
    /// # Errors
    /// A file that cannot be read, or is of another model, seed or choice of parameters; then nothing changes.
    pub fn resume(&mut self, model: &Model, path: &Path) -> Result<(), TrainError> {
        let saved = load(path, &self.identity(model), &self.parameters)?;
        self.parameters.set(&saved.values)?;
        (self.states, self.place, self.best) = (saved.states, saved.place, saved.best);
        Ok(())
    }

    /// Writes a checkpoint.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, model: &Model, path: &Path) -> Result<(), TrainError> {
        let (values, states) = (self.parameters.values()?, self.states.clone());
        let saved = Saved { place: self.place, values, states, best: self.best.clone() };
        save(path, &self.identity(model), &self.parameters, &saved)
    }

    fn identity<'m>(&self, model: &'m Model) -> Identity<'m> {
        Identity { fingerprint: model.checkpoint().fingerprint(), seed: self.options.seed }
    }

    /// What is trained, with its present values.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The best evaluation so far.
    pub fn best(&self) -> Option<&Best> {
        self.best.as_ref()
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.place.step
    }

    /// Trains until the steps are done or `on_step` stops it. The model is left with the parameters over it, without
    /// gradients: those of the best evaluation if there was one, else the last. After an error it has its overlay of before.
    ///
    /// # Errors
    /// Examples that are empty or longer than the model's context, a loss that is not a number, and what the objective, the
    /// evaluation or writing a checkpoint report.
    pub fn run(
        &mut self,
        model: &mut Model,
        examples: &[Example],
        objective: &mut dyn Objective,
        hooks: &mut Hooks<'_>,
    ) -> Result<Outcome, TrainError> {
        check_examples(model, examples)?;
        let before = model.take_overlay();
        let outcome = self.steps_until_done(model, examples, objective, hooks);
        if outcome.is_err() {
            model.set_overlay(before)?;
        }
        outcome
    }

    fn steps_until_done(
        &mut self,
        model: &mut Model,
        examples: &[Example],
        objective: &mut dyn Objective,
        hooks: &mut Hooks<'_>,
    ) -> Result<Outcome, TrainError> {
        let (mut stopped, mut loss) = (false, None);
        model.set_overlay(self.parameters.overlay().clone())?;
        while self.place.step < self.options.steps && !stopped {
            let report = self.step(model, examples, objective)?;
            loss = Some(report.loss);
            stopped = !(hooks.on_step)(&report);
            let (done, ends) = (self.place.step, self.place.step == self.options.steps);
            if let Some(evaluate) = &mut hooks.evaluate
                && (ends || self.options.eval_every > 0 && done.is_multiple_of(self.options.eval_every))
            {
                model.set_overlay(self.parameters.overlay().detached()?)?;
                let score = evaluate(model)?;
                if self.best.as_ref().is_none_or(|best| score > best.score) {
                    self.best = Some(Best { step: done, score, values: self.parameters.values()? });
                }
                model.set_overlay(self.parameters.overlay().clone())?;
            }
            let every = self.options.checkpoint_every;
            if let Some(path) = &hooks.checkpoint
                && (ends || stopped || every > 0 && done.is_multiple_of(every))
            {
                self.save(model, path)?;
            }
        }
        let last = self.parameters.values()?;
        if let Some(best) = &self.best {
            self.parameters.set(&best.values)?;
        }
        model.set_overlay(self.parameters.overlay().detached()?)?;
        self.parameters.set(&last)?;
        let best = self.best.as_ref().map(|best| (best.step, best.score));
        Ok(Outcome { steps: self.place.step, stopped, loss, best })
    }

    /// One step on the next examples.
    fn step(
        &mut self,
        model: &Model,
        examples: &[Example],
        objective: &mut dyn Objective,
    ) -> Result<StepReport, TrainError> {
        let batch = self.next_batch(examples);
        let mut gradients: Vec<Option<Vec<f32>>> = vec![None; self.parameters.all().len()];
        let (mut sum, mut terms, mut tokens) = (0.0, 0, 0);
        for pass in passes(&batch, self.options.pass_tokens) {
            let loss = objective.loss(model, pass)?;
            sum += f64::from(loss.sum.to_scalar::<f32>()?);
            terms += loss.terms;
            tokens += pass.iter().map(|e| e.rows()).sum::<usize>();
            let grads = loss.sum.backward()?;
            for (parameter, total) in self.parameters.all().iter().zip(&mut gradients) {
                let Some(gradient) = grads.get(&parameter.var) else { continue };
                let gradient = gradient.contiguous()?;
                let gradient = ops::values(&gradient)?;
                match total {
                    Some(total) => total.iter_mut().zip(&*gradient).for_each(|(t, g)| *t += g),
                    None => *total = Some(gradient.to_vec()),
                }
            }
        }
        let loss = sum / terms.max(1) as f64;
        if !loss.is_finite() {
            return Err(TrainError::Diverged { step: self.place.step, loss });
        }
        let (norm, rate) = self.apply(gradients, terms)?;
        self.place.step += 1;
        Ok(StepReport { step: self.place.step, steps: self.options.steps, loss, norm, rate, tokens })
    }

    /// Scales the summed gradients to their mean, clips them, and moves the parameters.
    fn apply(&mut self, gradients: Vec<Option<Vec<f32>>>, terms: usize) -> Result<(f64, f64), TrainError> {
        let options = &self.options;
        let all = || self.parameters.all().iter().zip(&gradients);
        let trained = all().filter_map(|(p, g)| Some((p, g.as_ref()?)));
        let squares = trained.flat_map(|(p, g)| p.trained.iter().flat_map(|range| &g[range.clone()]));
        let norm = squares.map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt() / terms.max(1) as f64;
        if !norm.is_finite() {
            return Err(TrainError::Diverged { step: self.place.step, loss: norm });
        }
        let clipped = options.clip.map_or(1.0, |clip| (clip / norm.max(1e-12)).min(1.0));
        let scale = (clipped / terms.max(1) as f64) as f32;
        let rate = options.schedule.rate(self.place.step, options.steps);
        for ((parameter, gradient), state) in self.parameters.all().iter().zip(gradients).zip(&mut self.states) {
            let Some(mut gradient) = gradient else { continue };
            gradient.iter_mut().for_each(|g| *g *= scale);
            let mut adamw = options.adamw;
            if !parameter.decays {
                adamw.weight_decay = 0.0;
            }
            let mut values = ops::values(parameter.var.as_tensor())?.to_vec();
            state.step(&adamw, rate, &mut values, &gradient, &parameter.trained);
            parameter.set(values)?;
        }
        Ok((norm, rate))
    }

    /// The next examples of the round; the last batch of a round may be smaller.
    fn next_batch<'e>(&mut self, examples: &'e [Example]) -> Vec<&'e Example> {
        let n = examples.len() as u64;
        if self.place.position >= n {
            self.place = Place { epoch: self.place.epoch + 1, position: 0, ..self.place };
        }
        let order = Random::new(self.options.seed, self.place.epoch + 1).order(examples.len());
        let end = n.min(self.place.position + self.options.batch as u64);
        let batch = order[self.place.position as usize..end as usize].iter().map(|&i| &examples[i]).collect();
        self.place.position = end;
        batch
    }
}

/// Splits examples into runs of at most `tokens` rows, without padding; every run has at least one example.
fn passes<'a, 'e>(batch: &'a [&'e Example], tokens: usize) -> Vec<&'a [&'e Example]> {
    let (mut runs, mut start, mut sum) = (Vec::new(), 0, 0);
    for (i, example) in batch.iter().enumerate() {
        if i > start && sum + example.rows() > tokens {
            runs.push(&batch[start..i]);
            (start, sum) = (i, 0);
        }
        sum += example.rows();
    }
    if start < batch.len() {
        runs.push(&batch[start..]);
    }
    runs
}

fn check_examples(model: &Model, examples: &[Example]) -> Result<(), TrainError> {
    if examples.is_empty() {
        return Err(TrainError::Options("there are no examples to learn from".to_string()));
    }
    let context = model.spec().max_position_embeddings;
    for (index, example) in examples.iter().enumerate() {
        let refuse = |problem: String| Err(TrainError::Example { index, problem });
        if example.prompt.is_empty() || example.answer.is_empty() {
            return refuse("has an empty prompt or answer".to_string());
        }
        if example.rows() > context {
            return refuse(format!("has {} tokens, the model's context is {context}", example.rows()));
        }
    }
    Ok(())
}
