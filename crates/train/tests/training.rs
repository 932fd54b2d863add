//! Training learns, changes what it was told to and nothing else, and goes on after a break as if there had been none.

#[path = "../../model/tests/support/mod.rs"]
mod support;

use std::path::Path;

use quorate_formats::Role;
use quorate_model::{Model, Overlay, Patch};
use quorate_train::{
    AdamWOptions, AnswerLoss, Example, Form, Hooks, Objective, Outcome, Schedule, StepReport, TrainError, TrainOptions,
    Trainer, select,
};
use support::{assert_close, assert_same, fixture, open, plain, prompts, relative, values};

const MODEL: &str = "qwen2_moe_mixed";

/// Some prompts with answers of different lengths.
fn examples() -> Vec<Example> {
    let [a, b] = prompts(MODEL);
    let example = |from: &[u32], prompt: usize, answer: usize| Example {
        prompt: from[..prompt].to_vec(),
        answer: from[prompt..prompt + answer].to_vec(),
    };
    vec![example(&a, 5, 3), example(&b, 9, 2), example(&a[8..], 6, 4), example(&b[12..], 3, 1), example(&a[2..], 8, 1)]
}

fn options(steps: u64) -> TrainOptions {
    TrainOptions {
        steps,
        batch: 2,
        schedule: Schedule { peak: 0.02, warmup: 3, floor: 0.1 },
        adamw: AdamWOptions { weight_decay: 0.01, ..AdamWOptions::default() },
        seed: 7,
        ..TrainOptions::default()
    }
}

/// A bit of everything: a router in full, rows of another, low-rank terms on attention and on an expert, a norm.
fn targets(model: &Model) -> Vec<(Role, Form)> {
    select(model.spec(), |role| match role {
        Role::Router(0) => Some(Form::Full),
        Role::Router(_) => Some(Form::Rows(vec![4, 1, 4])),
        Role::Q(_) | Role::O(_) | Role::ExpertUp(_, 2) | Role::DenseDown(_) => {
            Some(Form::LowRank { rank: 2, alpha: 4.0 })
        }
        Role::ExpertDown(0, 1) | Role::FinalNorm => Some(Form::Full),
        _ => None,
    })
}

fn run(trainer: &mut Trainer, model: &mut Model, on_step: &mut dyn FnMut(&StepReport) -> bool) -> Outcome {
    let mut hooks = Hooks { on_step, evaluate: None, checkpoint: None };
    trainer.run(model, &examples(), &mut AnswerLoss::new(), &mut hooks).unwrap()
}

/// The mean loss of all examples.
fn loss(model: &Model) -> f32 {
    let examples = examples();
    let loss = AnswerLoss::new().loss(model, &examples.iter().collect::<Vec<_>>()).unwrap();
    loss.sum.to_scalar::<f32>().unwrap() / loss.terms as f32
}

#[test]
fn a_few_examples_are_learned() {
    let mut model = open(&fixture(MODEL));
    let before = loss(&model);
    let all = select(model.spec(), |role| match role.is_vector() || role == Role::Embed {
        true => None,
        false => Some(Form::LowRank { rank: 1, alpha: 2.0 }),
    });
    let mut trainer = Trainer::new(&model, &all, options(60)).unwrap();
    let mut reports = Vec::new();
    let outcome = run(&mut trainer, &mut model, &mut |report| {
        reports.push(*report);
        true
    });
    assert!(before > 3.0 && loss(&model) < 0.05, "from {before} to {}", loss(&model));
    assert_eq!((outcome.steps, outcome.stopped, reports.len()), (60, false, 60));
    assert!((reports[0].rate - 0.02 / 3.0).abs() < 1e-12 && reports[2].rate == 0.02);
    // The model is left with what was learned, without gradients.
    assert!(!model.overlay().is_empty());
    assert!(model.overlay().iter().all(|(_, patch)| match patch {
        Patch::Replace(tensor) => !tensor.track_op(),
        Patch::LowRank(term) => !term.a.track_op() && !term.b.track_op(),
    }));
}

#[test]
fn only_what_was_selected_changes() {
    let mut model = open(&fixture(MODEL));
    let tokens = &prompts(MODEL)[0];
    let before = plain(&model, tokens);
    let targets = targets(&model);
    let mut trainer = Trainer::new(&model, &targets, options(4)).unwrap();
    let begin = trainer.parameters().values().unwrap();
    model.set_overlay(trainer.parameters().overlay().clone()).unwrap();
    // B begins at zero, so nothing is changed yet.
    assert_close("begin", &plain(&model, tokens), &before, relative(1e-6, &before));
    model.take_overlay();
    run(&mut trainer, &mut model, &mut |_| true);
    let roles: Vec<Role> = model.overlay().iter().map(|(role, _)| role).collect();
    let mut expected: Vec<Role> = targets.iter().map(|(role, _)| *role).collect();
    expected.sort();
    assert_eq!(roles, expected);
    let end = trainer.parameters().values().unwrap();
    for ((parameter, begin), end) in trainer.parameters().all().iter().zip(&begin).zip(&end) {
        let changed: Vec<bool> = begin.iter().zip(end).map(|(a, b)| a != b).collect();
        assert!(changed.contains(&true), "{} is as it was", parameter.name);
        let trained = |i: usize| parameter.trained.iter().any(|range| range.contains(&i));
        assert!(changed.iter().enumerate().all(|(i, &c)| !c || trained(i)), "{}", parameter.name);
    }
    let rows = trainer.parameters().all().iter().find(|p| p.name == "layer 2 router").unwrap();
    assert_eq!(rows.trained.iter().map(|r| r.len()).sum::<usize>(), 2 * model.spec().hidden_size);
    assert_ne!(plain(&model, tokens), before);
    model.take_overlay();
    assert_same("the model's own weights", &plain(&model, tokens), &before);
}

/// Runs with an evaluation whose scores are 1 2 3 2 1 ..., and a checkpoint at each fourth step.
fn evaluated(trainer: &mut Trainer, model: &mut Model, path: &Path, until: u64) -> (Vec<StepReport>, Outcome) {
    let (mut reports, mut scores) = (Vec::new(), trainer.steps() / 2);
    let mut on_step = |report: &StepReport| {
        reports.push(*report);
        report.step < until
    };
    let mut evaluate = |model: &Model| {
        let untracked = |(_, patch): (Role, &Patch)| match patch {
            Patch::Replace(tensor) => !tensor.track_op(),
            Patch::LowRank(term) => !term.a.track_op(),
        };
        assert!(model.overlay().iter().all(untracked));
        scores += 1;
        Ok(3.0 - (3.0 - scores as f64).abs())
    };
    let mut hooks = Hooks { on_step: &mut on_step, evaluate: Some(&mut evaluate), checkpoint: Some(path.to_owned()) };
    let outcome = trainer.run(model, &examples(), &mut AnswerLoss::new(), &mut hooks).unwrap();
    (reports, outcome)
}

#[test]
fn a_resumed_run_is_the_same_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let options = TrainOptions { eval_every: 2, checkpoint_every: 4, pass_tokens: 8, ..options(11) };
    let mut model = open(&fixture(MODEL));
    let targets = targets(&model);
    let mut whole = Trainer::new(&model, &targets, options).unwrap();
    let (straight, outcome) = evaluated(&mut whole, &mut model, &dir.path().join("whole"), u64::MAX);
    assert_eq!(outcome.best, Some((6, 3.0)));
    let straight_logits = plain(&model, &prompts(MODEL)[0]);

    model.take_overlay();
    let path = dir.path().join("part");
    let mut part = Trainer::new(&model, &targets, options).unwrap();
    let (mut reports, outcome) = evaluated(&mut part, &mut model, &path, 7);
    assert!(outcome.stopped && outcome.steps == 7);
    model.take_overlay();
    let mut resumed = Trainer::new(&model, &targets, options).unwrap();
    resumed.resume(&model, &path).unwrap();
    let (rest, outcome) = evaluated(&mut resumed, &mut model, &path, u64::MAX);
    assert_eq!((outcome.steps, outcome.stopped, outcome.best), (11, false, Some((6, 3.0))));
    reports.extend(rest);
    assert_eq!(reports, straight);
    assert_eq!(resumed.parameters().values().unwrap(), whole.parameters().values().unwrap());
    assert_eq!(resumed.best(), whole.best());
    assert_same("the best model", &plain(&model, &prompts(MODEL)[0]), &straight_logits);
    let files = [dir.path().join("whole"), path].map(|p| std::fs::read(p).unwrap());
    assert!(files[0] == files[1], "the last checkpoints differ");
}

#[test]
fn a_checkpoint_of_other_training_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let model = open(&fixture(MODEL));
    let router = [(Role::Router(0), Form::Full)];
    Trainer::new(&model, &router, options(4)).unwrap().save(&model, &path).unwrap();
    let refused = |model: &Model, targets: &[(Role, Form)], options| {
        let mut trainer = Trainer::new(model, targets, options).unwrap();
        trainer.resume(model, &path).unwrap_err().to_string()
    };
    let error = refused(&model, &router, TrainOptions { seed: 8, ..options(4) });
    assert!(error.contains("its seed is 7, not 8"), "{error}");
    let error = refused(&model, &[(Role::FinalNorm, Form::Full)], options(4));
    assert!(error.contains("it trains layer 0 router, too"), "{error}");
    let more = [router[0].clone(), (Role::FinalNorm, Form::Full)];
    let error = refused(&model, &more, options(4));
    assert!(error.contains("value final norm is not in it") || error.contains("steps is broken"), "{error}");
    let error = refused(&open(&fixture("olmoe")), &router, options(4));
    assert!(error.contains("it is of another model"), "{error}");
}

#[test]
fn several_passes_make_the_same_step() {
    let step = |pass_tokens| {
        let mut model = open(&fixture(MODEL));
        let options = TrainOptions { pass_tokens, batch: 5, ..options(1) };
        let mut trainer = Trainer::new(&model, &targets(&model), options).unwrap();
        let mut seen = None;
        run(&mut trainer, &mut model, &mut |report| {
            seen = Some(*report);
            true
        });
        seen.unwrap()
    };
    let (one, many) = (step(1000), step(1));
    assert!((one.loss - many.loss).abs() < 1e-5 && (one.norm - many.norm).abs() < 1e-4, "{one:?} {many:?}");
    assert_eq!(one.tokens, many.tokens);
}

/// The gradient of a step is that of the mean loss: its norm against a difference along itself.
#[test]
fn a_small_step_lowers_the_loss_as_its_gradient_says() {
    let mut model = open(&fixture(MODEL));
    let options = TrainOptions { batch: 5, clip: None, ..options(1) };
    let mut trainer = Trainer::new(&model, &[(Role::FinalNorm, Form::Full)], options).unwrap();
    let weight = values(trainer.parameters().all()[0].var.as_tensor());
    let mut norm = 0.0;
    run(&mut trainer, &mut model, &mut |report| {
        norm = report.norm;
        true
    });
    // By coordinates: central differences of the mean loss.
    let at = |model: &mut Model, i: usize, step: f32| {
        let mut moved = weight.clone();
        moved[i] += step;
        let tensor = quorate_model::ops::tensor(moved, &[weight.len()]).unwrap();
        let overlay: Overlay = [(Role::FinalNorm, Patch::Replace(tensor))].into_iter().collect();
        model.set_overlay(overlay).unwrap();
        f64::from(loss(model))
    };
    let slope = |i| (at(&mut model, i, 1e-2) - at(&mut model, i, -1e-2)) / 2e-2;
    let squares: f64 = (0..weight.len()).map(slope).map(|s| s * s).sum();
    assert!((squares.sqrt() - norm).abs() < 1e-2 * norm, "{} {norm}", squares.sqrt());
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let mut model = open(&fixture(MODEL));
    let rank = |rank| Form::LowRank { rank, alpha: 1.0 };
    let cases = [
        (vec![(Role::Router(1), Form::Full)], "cannot train layer 1 router: the model has none"),
        (vec![(Role::Router(0), Form::Rows(vec![6]))], "it has no row 6, only 6"),
        (vec![(Role::Router(0), rank(7))], "rank 7 is not in 1..=6"),
        (vec![(Role::FinalNorm, rank(1))], "a vector has no low-rank form"),
        (vec![(Role::FinalNorm, Form::Full), (Role::FinalNorm, Form::Full)], "it is named twice"),
        (vec![], "nothing is to be trained"),
    ];
    for (targets, message) in cases {
        let error = Trainer::new(&model, &targets, options(1)).err().expect(message).to_string();
        assert!(error.contains(message), "{error}");
    }
    let mut trainer = Trainer::new(&model, &[(Role::FinalNorm, Form::Full)], options(1)).unwrap();
    let empty = Example { prompt: vec![1], answer: vec![] };
    let mut hooks = Hooks { on_step: &mut |_| true, evaluate: None, checkpoint: None };
    let error = trainer.run(&mut model, &[empty], &mut AnswerLoss::new(), &mut hooks).unwrap_err();
    assert_eq!(error.to_string(), "example 0 has an empty prompt or answer");
    // A failing evaluation ends the run and leaves the model as it was.
    let mut fail = |_: &Model| Err(TrainError::Options("no score".to_string()));
    let mut hooks = Hooks { on_step: &mut |_| true, evaluate: Some(&mut fail), checkpoint: None };
    let error = trainer.run(&mut model, &examples(), &mut AnswerLoss::new(), &mut hooks).unwrap_err();
    assert_eq!(error.to_string(), "no score");
    assert!(model.overlay().is_empty());
}
