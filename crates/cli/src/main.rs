//! The `quorate` program: arguments, printing and exit codes. What it does is in the library crates.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod commands;
mod common;
mod embedded;
mod experts;
mod hub;
mod method;
mod stream;
mod vllm;

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser};
use quorate_kernels::Isa;

use crate::commands::Command;
use crate::common::Common;

/// Runs mixture-of-experts language models with just the experts that a task needs.
#[derive(Parser)]
#[command(
    name = "quorate",
    version,
    max_term_width = 100,
    after_help = "\
Exit codes: 0 done, 1 a check failed, 2 usage, 3 input or environment.
Files: $QUORATE_HOME, or quorate/ in the user's data folder, holds the pattern library and the unpacked embedded model.
Processor: $QUORATE_ISA names the vector instructions to use (amx, avx512, avx2, neon, portable) in place of the widest there are.

Examples:
  quorate run \"78+95=\"               find the nearest task, load its experts, answer
  quorate profile --tasks tasks/      measure which experts each task needs
  quorate eval --keep 8 --task own    how well 8 experts per layer do"
)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    let work = match parse() {
        Ok(work) => work,
        Err(error) => {
            let _ = error.print(); // nowhere left to report that stderr is closed
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    match choose_instructions().and_then(|()| common::catch_interrupts()).and_then(|()| work.run()) {
        Ok(outcome) => outcome,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "quorate: {}", chain(&error)); // nowhere left to report a closed stderr
            ExitCode::from(3)
        }
    }
}

/// The vector instructions that `QUORATE_ISA` names, if it does.
fn choose_instructions() -> anyhow::Result<()> {
    match std::env::var_os("QUORATE_ISA").filter(|name| !name.is_empty()) {
        Some(name) => Isa::choose(&name.to_string_lossy()).context("QUORATE_ISA"),
        None => Ok(()),
    }
}

/// What was asked for: a command of the program's own, or a method's.
enum Work {
    Command(Box<Cli>),
    Method(Box<Common>, ArgMatches),
}

fn parse() -> Result<Work, clap::Error> {
    let matches = method::with_methods(Cli::command()).try_get_matches()?;
    match method::chosen(&matches) {
        Some((.., own)) => Ok(Work::Method(Box::new(Common::from_arg_matches(own)?), matches)),
        None => Ok(Work::Command(Box::new(Cli::from_arg_matches(&matches)?))),
    }
}

impl Work {
    fn run(&self) -> anyhow::Result<ExitCode> {
        match self {
            Work::Command(cli) => cli.command.run(&cli.common),
            Work::Method(common, matches) => {
                let (method, runner, own) = method::chosen(matches).context("no method was chosen")?;
                method::run(common, method, runner, own).map(|()| ExitCode::SUCCESS)
            }
        }
    }
}

/// The error and its causes, each said once, and then what helps.
fn chain(error: &anyhow::Error) -> String {
    let (mut problems, mut helps) = (String::new(), String::new());
    for cause in error.chain().map(ToString::to_string) {
        let (problem, help) = cause.split_once("help: ").unwrap_or((&cause, ""));
        let (problem, help) = (problem.trim_end().trim_end_matches(';'), help.trim_end());
        // A cause is often told by the one above it, and then adds no more than a number.
        let core = problem.rsplit(": ").next().filter(|core| core.len() > 12).unwrap_or(problem);
        if !core.is_empty() && !problems.contains(core) {
            problems += &format!("{}{problem}", if problems.is_empty() { "" } else { ": " });
        }
        if !help.is_empty() && !helps.contains(help) {
            helps += &format!("; help: {help}");
        }
    }
    problems + &helps
}

/// Whether whoever read our output has closed it, as `head` does.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let pipe = |io: &std::io::Error| io.kind() == std::io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| {
        let json = cause.downcast_ref::<serde_json::Error>();
        cause.downcast_ref::<std::io::Error>().is_some_and(pipe)
            || json.is_some_and(|j| j.io_error_kind() == Some(std::io::ErrorKind::BrokenPipe))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_is_said_once_and_what_helps_comes_last() {
        let cause = || anyhow::anyhow!("file is not a database");
        assert_eq!(
            chain(&cause().context("library l: file is not a database; help: check it")),
            "library l: file is not a database; help: check it"
        );
        let two = cause().context("cannot open l; help: check it").context("cannot run; help: wait");
        assert_eq!(chain(&two), "cannot run: cannot open l: file is not a database; help: wait; help: check it");
        assert_eq!(chain(&cause().context("error 26: file is not a database")), "error 26: file is not a database");
    }
}
