//! What a method works with: the model, task items, recording, answering, controls. No method opens a file, tokenizes, loops
//! over batches or prints; all of that is here, once.

use std::path::Path;

use quorate_eval::encode::{EncodedItem, batches};
use quorate_eval::evaluate::{EvalOptions, ItemScore, evaluate, teacher_forced};
use quorate_eval::tasks::{Task, TaskItem};
use quorate_formats::Role;
use quorate_lens::{ExpertMap, Intervention, Interventions, LensError, Plan, RoutingTrace, TraceRecorder};
use quorate_model::{Lens, LogitRows, Model, Overlay};
use quorate_train::{AnswerLoss, Example, Form, Hooks, Objective, StepReport, TrainError, TrainOptions, Trainer};

use crate::MethodError;

/// Tokens of one forward pass, about.
const BATCH_TOKENS: usize = 512;
/// Texts of one forward pass at most.
const BATCH_ITEMS: usize = 64;

/// What is outside: files, the clock, the user.
pub trait World {
    /// The task files that the user chose, of a split where they have splits.
    ///
    /// # Errors
    /// Files that cannot be read.
    fn tasks(&mut self, split: &str) -> Result<Vec<Task>, MethodError>;

    /// Another model, with all its experts.
    ///
    /// # Errors
    /// As opening a model.
    fn open_model(&mut self, path: &Path) -> Result<Model, MethodError>;

    /// The text of a file that the user named.
    ///
    /// # Errors
    /// A file that cannot be read, or is no UTF-8.
    fn read_text(&mut self, path: &Path) -> Result<String, MethodError>;

    /// Shows how far a stage is; `false` if the user wants to stop.
    fn progress(&mut self, stage: &str, done: u64, total: u64) -> bool;
}

/// What a training left.
#[derive(Clone, Debug)]
pub struct Trained {
    /// The parameters of the best evaluation, without gradients.
    pub overlay: Overlay,
    /// How many values were trained.
    pub values: usize,
    /// Steps done and validation loss (nats per answer token) of each evaluation.
    pub curve: Vec<(u64, f64)>,
    /// Steps of the best evaluation.
    pub best: u64,
}

/// A method's workplace.
pub struct Lab<'a> {
    /// The model, all experts loaded.
    pub model: Model,
    /// Items per task at most.
    pub limit: Option<usize>,
    /// Seed of everything random.
    pub seed: u64,
    /// Which of how many equal parts of a stage is under way, such as the controls of an effect; `(0, 1)` if there is one.
    pub part: (usize, usize),
    world: &'a mut dyn World,
}

impl<'a> Lab<'a> {
    /// A workplace around a model.
    pub fn new(model: Model, world: &'a mut dyn World) -> Lab<'a> {
        Lab { model, limit: None, seed: 0, part: (0, 1), world }
    }

    /// What is outside.
    pub fn world(&mut self) -> &mut dyn World {
        self.world
    }

    /// The routed experts of the model.
    ///
    /// # Errors
    /// A dense model.
    pub fn experts(&self) -> Result<ExpertMap, MethodError> {
        if !self.model.spec().is_moe() {
            return Err(MethodError::needs("the model has no experts", "this method needs a mixture-of-experts model"));
        }
        Ok(ExpertMap::of(self.model.spec()))
    }

    /// The tasks of a split, each with at most `limit` items.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub fn tasks(&mut self, split: &str) -> Result<Vec<Task>, MethodError> {
        let mut tasks = self.world.tasks(split)?;
        tasks.iter_mut().for_each(|t| t.items.truncate(self.limit.unwrap_or(usize::MAX)));
        Ok(tasks)
    }

    /// One task of a split.
    ///
    /// # Errors
    /// Files that cannot be read, or no task of that name.
    pub fn task(&mut self, split: &str, name: &str) -> Result<Task, MethodError> {
        let tasks = self.tasks(split)?;
        let names: Vec<String> = tasks.iter().map(|t| t.name.clone()).collect();
        let found = tasks.into_iter().find(|t| t.name == name);
        Ok(found.ok_or_else(|| LensError::unknown("task", name, names.iter().map(String::as_str)))?)
    }

    /// Items as tokens, answers (with their thinking) included.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn encode(&self, items: &[TaskItem]) -> Result<Vec<EncodedItem>, MethodError> {
        Ok(items.iter().map(|i| EncodedItem::new(&self.model, i)).collect::<Result<_, _>>()?)
    }

    /// Shows how far a stage is.
    ///
    /// # Errors
    /// [`MethodError::Interrupted`] if the user wants to stop.
    pub fn progress(&mut self, stage: &str, done: usize, total: usize) -> Result<(), MethodError> {
        let (part, parts) = self.part;
        let (done, total) = ((part * total + done) as u64, (parts * total) as u64);
        if self.world.progress(stage, done, total) { Ok(()) } else { Err(MethodError::Interrupted) }
    }

    /// Runs texts (prompt and answer as given) through the model under a lens, several in one forward pass. Segment `s` of
    /// a pass is item `first + s`; `begin(lens, first)` is called before each pass. No logits are computed.
    ///
    /// # Errors
    /// As [`Model::forward`], or the user stops.
    pub fn observe<L: Lens>(
        &mut self,
        stage: &str,
        items: &[EncodedItem],
        lens: &mut L,
        mut begin: impl FnMut(&mut L, usize),
    ) -> Result<(), MethodError> {
        let mut cache = self.model.new_cache(BATCH_ITEMS);
        for run in batches(items, BATCH_TOKENS, BATCH_ITEMS) {
            self.progress(stage, run.start, items.len())?;
            begin(lens, run.start);
            let mut segments = Vec::with_capacity(run.len());
            for (slot, item) in items[run].iter().enumerate() {
                cache.truncate(slot, 0);
                let mut segment = item.segment(slot);
                segment.logits = LogitRows::None;
                segments.push(segment);
            }
            self.model.forward(&segments, &mut cache, lens)?;
        }
        self.progress(stage, items.len(), items.len())
    }

    /// The routing of texts, prompt and answer as given; with the raw router logits if `with_logits`.
    ///
    /// # Errors
    /// A dense model, or as [`Lab::observe`].
    pub fn trace(&mut self, items: &[EncodedItem], with_logits: bool) -> Result<RoutingTrace, MethodError> {
        let mut recorder = TraceRecorder::new(self.experts()?, with_logits);
        self.observe("recording the routing", items, &mut recorder, |_, _| {})?;
        Ok(recorder.into_trace())
    }

    /// Answers and scores items greedily under a lens. Plain text is scored as it is.
    ///
    /// # Errors
    /// As [`evaluate`], or the user stops.
    pub fn answer(
        &mut self,
        stage: &str,
        items: &[&TaskItem],
        max_tokens: usize,
        lens: &mut dyn Lens,
    ) -> Result<Vec<ItemScore>, MethodError> {
        let options = EvalOptions { max_tokens, ..EvalOptions::default() };
        let (world, (part, parts), total) = (&mut *self.world, self.part, items.len());
        let scores = evaluate(&self.model, items, &options, lens, &mut |n| {
            world.progress(stage, (part * total + n) as u64, (parts * total) as u64)
        })?;
        scores.into_iter().collect::<Option<Vec<_>>>().ok_or(MethodError::Interrupted)
    }

    /// Negative log-likelihoods of the given answers under a lens; an [`ItemScore::Text`] for each item.
    ///
    /// # Errors
    /// As [`Model::forward`], or the user stops.
    pub fn losses(
        &mut self,
        stage: &str,
        items: &[EncodedItem],
        lens: &mut dyn Lens,
    ) -> Result<Vec<ItemScore>, MethodError> {
        let mut scores = Vec::with_capacity(items.len());
        for run in batches(items, BATCH_TOKENS, BATCH_ITEMS) {
            self.progress(stage, run.start, items.len())?;
            scores.extend(teacher_forced(&self.model, &items[run], lens)?);
        }
        self.progress(stage, items.len(), items.len())?;
        Ok(scores)
    }

    /// Trains weights on answers, beginning with the model as it is, and keeps the parameters with the smallest validation
    /// loss. The model is left as it was.
    ///
    /// # Errors
    /// As [`Trainer::run`], no validation examples, or the user stops.
    pub fn train(
        &mut self,
        stage: &str,
        targets: &[(Role, Form)],
        options: TrainOptions,
        examples: &[Example],
        validation: &[Example],
    ) -> Result<Trained, MethodError> {
        if validation.is_empty() {
            return Err(MethodError::needs("nothing to validate on", "give items of the split `validation`"));
        }
        let mut trainer = Trainer::new(&self.model, targets, options)?;
        let values = trainer.parameters().count();
        let before = self.model.overlay().clone();
        let (world, (part, parts)) = (&mut *self.world, (self.part.0 as u64, self.part.1 as u64));
        let mut on_step = |r: &StepReport| world.progress(stage, part * r.steps + r.step, parts * r.steps);
        let mut losses = Vec::new();
        let mut evaluate = |model: &Model| {
            let loss = mean_loss(model, validation)?;
            losses.push(loss);
            Ok(-loss)
        };
        let mut hooks = Hooks { on_step: &mut on_step, evaluate: Some(&mut evaluate), checkpoint: None };
        let outcome = trainer.run(&mut self.model, examples, &mut AnswerLoss::new(), &mut hooks)?;
        let overlay = self.model.take_overlay();
        self.model.set_overlay(before)?;
        if outcome.stopped {
            return Err(MethodError::Interrupted);
        }
        let every = if options.eval_every == 0 { options.steps } else { options.eval_every };
        let step = |i: usize| options.steps.min((i as u64 + 1) * every);
        let curve = losses.into_iter().enumerate().map(|(i, loss)| (step(i), loss)).collect();
        Ok(Trained { overlay, values, curve, best: outcome.best.map_or(outcome.steps, |(step, _)| step) })
    }

    /// Makes interventions ready for the model.
    ///
    /// # Errors
    /// As [`Interventions::prepare`].
    pub fn prepare(&self, list: &[Intervention]) -> Result<Interventions, MethodError> {
        Ok(Interventions::prepare(list, self.model.spec(), Path::new(""))?)
    }

    /// A plan that keeps all experts and makes these interventions, as TOML.
    ///
    /// # Errors
    /// Numbers that TOML cannot hold.
    pub fn plan(&self, list: Vec<Intervention>) -> Result<String, MethodError> {
        let model = self.model.checkpoint().fingerprint().to_string();
        let plan = Plan { version: quorate_lens::PLAN_VERSION, model, intervene: list, ..Plan::default() };
        Ok(plan.to_toml()?)
    }
}

/// Nats per answer token.
fn mean_loss(model: &Model, examples: &[Example]) -> Result<f64, TrainError> {
    let (mut sum, mut terms) = (0.0, 0);
    for some in examples.chunks(BATCH_ITEMS / 4) {
        let loss = AnswerLoss::new().loss(model, &some.iter().collect::<Vec<_>>())?;
        sum += f64::from(loss.sum.to_scalar::<f32>()?);
        terms += loss.terms;
    }
    Ok(sum / terms.max(1) as f64)
}
