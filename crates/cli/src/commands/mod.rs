//! One file per command.

mod bench;
mod chat;
mod compare;
mod eval;
mod inspect;
mod inspect_text;
mod library;
mod methods;
mod perplexity;
mod profile;
mod profile_vllm;
mod prune;
mod pull;
mod quantize;
mod record;
mod run;
mod tokenize;

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

use crate::common::Common;

/// The commands.
#[derive(Subcommand)]
pub enum Command {
    /// Answer a prompt with just the experts that it needs
    Run(run::Run),
    /// Hold a conversation
    Chat(chat::Chat),
    /// Measure which experts each task needs, into the pattern library
    Profile(profile::Profile),
    /// Answer task files and score the answers
    Eval(eval::Eval),
    /// Compare metrics and sources of experts over task files
    Compare(compare::Compare),
    /// List, show, remove, merge, export and import patterns
    Library(library::LibraryCommand),
    /// What a model is, where its bytes are, what fits in how much memory
    Inspect(inspect::Inspect),
    /// Fetch a model from the Hugging Face hub
    Pull(pull::Pull),
    /// Write a model, or a list, with only the kept experts
    Prune(prune::Prune),
    /// Write a model as GGUF, in a smaller type
    Quantize(quantize::Quantize),
    /// Record values inside the forward pass
    Record(record::Record),
    /// How well a model predicts a text
    Perplexity(perplexity::Perplexity),
    /// Text to tokens and back
    Tokenize(tokenize::Tokenize),
    /// Measure speed and memory
    Bench(bench::Bench),
    /// Every method: paper, what it needs, how to run it
    Methods(methods::Methods),
}

impl Command {
    /// Runs the command.
    pub fn run(&self, common: &Common) -> Result<ExitCode> {
        match self {
            Command::Eval(c) => return c.run(common),
            Command::Run(c) => c.run(common),
            Command::Chat(c) => c.run(common),
            Command::Profile(c) => c.run(common),
            Command::Compare(c) => c.run(common),
            Command::Library(c) => c.run(common),
            Command::Inspect(c) => c.run(common),
            Command::Pull(c) => c.run(common),
            Command::Prune(c) => c.run(common),
            Command::Quantize(c) => c.run(common),
            Command::Record(c) => c.run(common),
            Command::Perplexity(c) => c.run(common),
            Command::Tokenize(c) => c.run(common),
            Command::Bench(c) => c.run(common),
            Command::Methods(c) => c.run(common),
        }
        .map(|()| ExitCode::SUCCESS)
    }
}
