//! A method as a command: its card, its arguments, what it does. From the slice [`METHODS`](crate::METHODS) come the
//! sub-commands, `quorate methods`, their JSON and their pages in the documentation.

use clap::{ArgMatches, Args, Command, FromArgMatches};
use quorate_formats::Checkpoint;
use serde::Serialize;

use crate::{Card, Lab, MethodError, Report};

/// A method of a paper.
#[derive(Clone, Copy)]
pub struct Method {
    /// What it is.
    pub card: &'static Card,
    /// Its command; `None` if it is only a score that other commands use.
    pub command: Option<Runner>,
}

/// How a method's command takes its arguments and runs.
#[derive(Clone, Copy)]
pub struct Runner {
    /// Adds the method's arguments to a command.
    pub augment: fn(Command) -> Command,
    /// Runs it with parsed arguments; the report carries the method's name and parameters.
    pub run: fn(&'static Card, &ArgMatches, &mut Lab<'_>) -> Result<Report, MethodError>,
}

/// The parameters of a method that is a command: its arguments, and what it does with them.
pub trait Run: Args + FromArgMatches + Serialize {
    /// Runs the method.
    ///
    /// # Errors
    /// Whatever it needs and does not have.
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError>;
}

impl Method {
    /// A method without a command of its own.
    pub const fn score(card: &'static Card) -> Method {
        Method { card, command: None }
    }

    /// A method with a command.
    pub const fn command<P: Run>(card: &'static Card) -> Method {
        Method { card, command: Some(Runner { augment: P::augment_args, run: run::<P> }) }
    }
}

fn run<P: Run>(card: &'static Card, matches: &ArgMatches, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
    let params = P::from_arg_matches(matches).map_err(|e| MethodError::Outside(e.into()))?;
    let mut report = params.run(lab)?;
    report.method = card.id.to_string();
    report.title = card.title.to_string();
    report.paper = card.paper.to_string();
    report.params = serde_json::to_value(&params).map_err(|e| MethodError::Outside(e.into()))?;
    report.model = model_name(lab.model.checkpoint());
    report.fingerprint = lab.model.checkpoint().fingerprint().to_string();
    Ok(report)
}

/// A model in words: its folder, family, layers and experts.
pub fn model_name(checkpoint: &Checkpoint) -> String {
    let spec = checkpoint.spec();
    let folder = checkpoint.folder().file_name().map_or_else(String::new, |n| format!("{}, ", n.to_string_lossy()));
    let mut text = format!("{folder}{} of {} layers", spec.family, spec.layers.len());
    let moe: Vec<_> = spec.layers.iter().enumerate().filter_map(|(l, _)| spec.moe(l)).collect();
    if let Some(first) = moe.first() {
        let most = moe.iter().map(|m| m.n_experts).max().unwrap_or(first.n_experts);
        text += &format!(", {} with {most} experts, top-{}", moe.len(), first.top_k);
    }
    text
}
