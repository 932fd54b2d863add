//! MoTE and the core experts of retrieval on a model whose router is planted: a token decides which experts are chosen.

#[path = "../../model/tests/support/mod.rs"]
mod engine;

use std::path::Path;

use clap::{ArgMatches, Command};
use engine::{embedded, open};
use quorate_eval::encode::EncodedItem;
use quorate_eval::tasks::{Task, TaskItem};
use quorate_methods::{Lab, METHODS, MethodError, Report, World};
use quorate_model::Model;
use serde_json::{Value, json};

/// Tasks in memory, the same for all splits.
struct Tasks(Vec<Task>);

impl World for Tasks {
    fn tasks(&mut self, _: &str) -> Result<Vec<Task>, MethodError> {
        Ok(self.0.clone())
    }
    fn open_model(&mut self, _: &Path) -> Result<Model, MethodError> {
        Err(MethodError::needs("no files", "none"))
    }
    fn read_text(&mut self, _: &Path) -> Result<String, MethodError> {
        Err(MethodError::needs("no files", "none"))
    }
    fn progress(&mut self, _: &str, _: u64, _: u64) -> bool {
        true
    }
}

fn item(prompt: &str, answer: &str, meta: &Value) -> TaskItem {
    let meta = meta.as_object().unwrap().clone();
    TaskItem { task: "mine".into(), prompt: prompt.into(), answer: answer.into(), choices: None, meta }
}

fn run(model: Model, items: Vec<TaskItem>, line: &str) -> Result<Report, String> {
    let mut words = line.split(' ');
    let method = METHODS.iter().find(|m| Some(m.card.id) == words.clone().next()).unwrap();
    let runner = method.command.unwrap();
    let matches: ArgMatches = (runner.augment)(Command::new(method.card.id)).get_matches_from(&mut words);
    let mut world = Tasks(vec![Task { name: "mine".into(), items, files: Vec::new() }]);
    let mut lab = Lab::new(model, &mut world);
    (runner.run)(method.card, &matches, &mut lab).map_err(|e| e.to_string())
}

/// Prompts of two kinds told apart by one token (a digit), which the model's first layer sees as it is.
fn prompts(meta: impl Fn(usize, bool) -> Value) -> Vec<TaskItem> {
    let of = |i: usize| {
        let class = i % 2 == 0;
        let sign = if class { "7" } else { "2" };
        item(&format!("<|user|>{}{sign}", char::from(b'a' + (i / 2 % 26) as u8)), "x", &meta(i, class))
    };
    (0..80).map(of).collect()
}
