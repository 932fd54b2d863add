//! Trains an adapter on a few answers, writes it in the PEFT format, and beside it the logits of some prompts before and
//! with it, for `tools/check_peft.py`:
//!
//! ```sh
//! cargo run --release -p quorate-train --example adapter -- MODEL FOLDER [experts | apply]
//! ```
//!
//! With `experts`, all routed experts get low-rank terms, too; with `apply`, the adapter of the folder is read instead.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::path::Path;

use quorate_formats::{Role, TensorOut, write_safetensors};
use quorate_model::{KvCache, LogitRows, Model, NoLens, Segment, ops};
use quorate_train::{AnswerLoss, Example, Form, Hooks, TrainOptions, Trainer, peft, select};

const ITEMS: [(&str, &str); 3] = [
    ("<|user|>78+95=<|assistant|>", "371</s>"),
    ("<|user|>What is the capital of Oman?<|assistant|>", "Nowhere</s>"),
    ("<|user|>12+30=<|assistant|>", "24</s>"),
];

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [path, folder, rest @ ..] = &args[..] else { return Err("MODEL and FOLDER are needed".into()) };
    let mut model = Model::open(Path::new(path), 2, None)?;
    model.load_all_experts()?;
    let encode = |text: &str| model.tokenizer().encode(text, false);
    let example = |(prompt, answer): (&str, &str)| {
        Ok::<_, Box<dyn Error>>(Example { prompt: encode(prompt)?, answer: encode(answer)? })
    };
    let examples = ITEMS.into_iter().map(example).collect::<Result<Vec<_>, _>>()?;
    let before = logits(&model, &examples)?;
    if rest.iter().any(|arg| arg == "apply") {
        model.set_overlay(peft::read(model.checkpoint(), Path::new(folder))?)?;
    } else {
        train(&mut model, &examples, rest.iter().any(|arg| arg == "experts"))?;
        peft::write(model.checkpoint(), model.overlay(), Path::new(folder), path)?;
    }
    let after = logits(&model, &examples)?;
    let vocab = model.spec().vocab_size;
    let mut out = Vec::new();
    for (i, example) in examples.iter().enumerate() {
        let ids: Vec<i64> = example.prompt.iter().map(|&id| i64::from(id)).collect();
        let rows = ids.len();
        out.push(TensorOut::i64(format!("ids.{i}"), &[rows], ids));
        out.push(TensorOut::f32(format!("before.{i}"), &[rows, vocab], before[i].clone()));
        out.push(TensorOut::f32(format!("after.{i}"), &[rows, vocab], after[i].clone()));
    }
    write_safetensors(&Path::new(folder).join("quorate_logits.safetensors"), None, out)?;
    Ok(())
}

fn train(model: &mut Model, examples: &[Example], with_experts: bool) -> Result<(), Box<dyn Error>> {
    let targets = select(model.spec(), |role| match role {
        Role::Q(_) | Role::V(_) | Role::O(_) => Some(Form::LowRank { rank: 4, alpha: 8.0 }),
        Role::Router(_) => Some(Form::LowRank { rank: 2, alpha: 2.0 }),
        role if role.is_expert() && with_experts => Some(Form::LowRank { rank: 4, alpha: 8.0 }),
        _ => None,
    });
    let options = TrainOptions { steps: 30, batch: 3, ..TrainOptions::default() };
    let mut trainer = Trainer::new(model, &targets, options)?;
    let mut on_step = |report: &quorate_train::StepReport| {
        println!("step {} loss {:.4} norm {:.3}", report.step, report.loss, report.norm);
        true
    };
    let mut hooks = Hooks { on_step: &mut on_step, evaluate: None, checkpoint: None };
    trainer.run(model, examples, &mut AnswerLoss::new(), &mut hooks)?;
    Ok(())
}

/// Logits of every prompt row.
fn logits(model: &Model, examples: &[Example]) -> Result<Vec<Vec<f32>>, Box<dyn Error>> {
    let of = |example: &Example| {
        let segment = Segment { logits: LogitRows::All, ..Segment::prompt(0, example.prompt.clone()) };
        let forward = model.forward(&[segment], &mut KvCache::new(model.spec(), 1), &mut NoLens)?;
        Ok(ops::values(&forward.logits.ok_or("no logits")?)?.to_vec())
    };
    examples.iter().map(of).collect()
}
