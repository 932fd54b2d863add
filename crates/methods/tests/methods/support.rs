//! A world of tasks in memory, and methods run in it as commands.

use std::path::Path;

use clap::{ArgMatches, Command};
use quorate_eval::tasks::{Task, TaskItem};
use quorate_methods::{Lab, METHODS, MethodError, Report, World};
use quorate_model::Model;
use serde_json::Value;

/// Tasks in memory; models are opened, other files are not.
pub struct Tasks(pub Vec<Task>);

impl World for Tasks {
    fn tasks(&mut self, _: &str) -> Result<Vec<Task>, MethodError> {
        Ok(self.0.clone())
    }
    fn open_model(&mut self, path: &Path) -> Result<Model, MethodError> {
        let mut model = Model::open(path, 2, None)?;
        model.load_all_experts()?;
        Ok(model)
    }
    fn read_text(&mut self, _: &Path) -> Result<String, MethodError> {
        Err(MethodError::needs("no files", "none"))
    }
    fn progress(&mut self, _: &str, _: u64, _: u64) -> bool {
        true
    }
}

/// A task of questions and answers.
pub fn task(name: &str, items: impl IntoIterator<Item = (String, String)>) -> Task {
    let item =
        |(prompt, answer)| TaskItem { task: name.into(), prompt, answer, choices: None, meta: serde_json::Map::new() };
    Task { name: name.into(), items: items.into_iter().map(item).collect(), files: Vec::new() }
}

/// Sums of the embedded model's kind.
pub fn sums(count: usize) -> Task {
    task("sums", (0..count).map(|i| sum(10 + 7 * i % 89, 11 + 5 * i % 83)))
}

fn sum(a: usize, b: usize) -> (String, String) {
    (format!("<|user|>{a}+{b}=<|assistant|>"), (a + b).to_string())
}

/// Runs a method's command line on a model; the model comes back with the report.
pub fn run_on(model: Model, tasks: Vec<Task>, line: &str) -> (Model, Result<Report, MethodError>) {
    let mut words = line.split_whitespace();
    let method = METHODS.iter().find(|m| Some(m.card.id) == words.clone().next()).unwrap();
    let runner = method.command.unwrap();
    let matches: ArgMatches = (runner.augment)(Command::new(method.card.id)).get_matches_from(&mut words);
    let mut world = Tasks(tasks);
    let mut lab = Lab::new(model, &mut world);
    let report = (runner.run)(method.card, &matches, &mut lab);
    (lab.model, report)
}

pub fn table<'a>(report: &'a Report, name: &str) -> &'a [Vec<Value>] {
    &report.tables.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("no table {name}")).rows
}

pub fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}
