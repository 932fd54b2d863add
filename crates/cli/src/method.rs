//! Runs a method from the slice of methods: what every method's command has in common.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{ArgMatches, Args, Command, FromArgMatches};
use quorate_eval::tasks::{Task, load_tasks};
use quorate_formats::{Checkpoint, Role, write_edited_hf, write_file};
use quorate_methods::{Card, Lab, METHODS, Method, MethodError, Report, Runner, Table, World};
use quorate_model::Model;
use serde_json::Value;

use crate::common::{Common, Progress, interrupted, parse_count, say};

/// The folder of a changed model, in that of the report.
const MODEL_FOLDER: &str = "model";
/// Largest size of one of its files.
const SHARD_BYTES: u64 = 4 << 30;

/// Options of every method's command.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Options of every method")]
struct MethodArgs {
    /// Task files or folders; left out with the embedded model, its own tasks
    #[arg(long, value_name = "PATH", num_args = 1..)]
    tasks: Vec<PathBuf>,
    /// Items per task at most
    #[arg(long, value_name = "N", value_parser = parse_count)]
    limit: Option<usize>,
    /// Seed of everything random
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder for the report (report.json) and what the method makes: plans, lists, adapters
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// The report as one HTML page, to be opened in a browser; it loads nothing from elsewhere
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// The program's command with a sub-command for each method that has one.
pub fn with_methods(program: Command) -> Command {
    METHODS
        .iter()
        .filter_map(|m| Some((m.card, m.command?)))
        .fold(program, |program, (card, runner)| program.subcommand(command_of(card, runner)))
}

/// The command of one method.
pub fn command_of(card: &'static Card, runner: Runner) -> Command {
    let about = format!("{} ({}, {})", card.title, card.paper, card.year);
    let after = format!(
        "{}\n\nNeeds: {}\nCost:  {}\n\nExamples:\n  {}",
        card.about,
        card.needs,
        card.cost,
        card.run.replace('\n', "\n  ")
    );
    let command = Command::new(card.id).about(about).after_help(after);
    MethodArgs::augment_args((runner.augment)(command))
}

/// The method whose command was chosen, if one was.
pub fn chosen(matches: &ArgMatches) -> Option<(&'static Method, Runner, &ArgMatches)> {
    let (name, matches) = matches.subcommand()?;
    let method = METHODS.iter().find(|m| m.card.id == name)?;
    Some((method, method.command?, matches))
}

/// Runs a method.
pub fn run(common: &Common, method: &Method, runner: Runner, matches: &ArgMatches) -> Result<()> {
    let args = MethodArgs::from_arg_matches(matches)?;
    let mut model = common.open_model(None)?;
    common.load_all_experts(&mut model)?;
    let mut outside = Outside::new(common, &args.tasks);
    let mut lab = Lab::new(model, &mut outside);
    (lab.limit, lab.seed) = (args.limit, args.seed);
    let report = (runner.run)(method.card, matches, &mut lab)?;
    let checkpoint = lab.model.checkpoint().clone();
    outside.end();
    if let Some(folder) = &args.output {
        write_files(common, folder, &report)?;
        write_model(common, &folder.join(MODEL_FOLDER), &checkpoint, &report)?;
    }
    if let Some(file) = &args.html {
        write_page(common, file, &report)?;
    }
    if common.json {
        return common.print_json(&report);
    }
    let text = text(&report)?;
    say!("{}", text.trim_end())?;
    let mut names: Vec<&str> = report.files.iter().map(|f| f.name.as_str()).collect();
    names.extend((!report.experts.is_empty()).then_some(MODEL_FOLDER));
    if args.output.is_none() && !names.is_empty() {
        common.note(&format!("not written: {}; help: give a folder with -o", names.join(", ")));
    }
    Ok(())
}

fn write_files(common: &Common, folder: &Path, report: &Report) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let document = serde_json::to_vec_pretty(report)?;
    write_file(&folder.join("report.json"), &document)?;
    for file in &report.files {
        write_file(&folder.join(&file.name), &file.bytes)?;
        common.note(&format!("{}: {}", folder.join(&file.name).display(), file.about));
    }
    Ok(())
}

/// Writes a report as one HTML page.
fn write_page(common: &Common, file: &Path, report: &Report) -> Result<()> {
    write_file(file, quorate_page::page(report)?.as_bytes())?;
    common.note(&format!("{}: the report, to be opened in a browser", file.display()));
    Ok(())
}

/// Writes the changed experts as a model folder, if there are any.
fn write_model(common: &Common, folder: &Path, checkpoint: &Checkpoint, report: &Report) -> Result<()> {
    if report.experts.is_empty() {
        return Ok(());
    }
    let mut edits = HashMap::new();
    for (id, expert) in &report.experts {
        let [gate, up, down] = Role::of_expert(id.layer, id.expert);
        edits.extend([(gate, expert.gate.to_f32()), (up, expert.up.to_f32()), (down, expert.down.to_f32())]);
    }
    let mut bar = common.progress("writing", checkpoint.total_bytes(), "bytes");
    write_edited_hf(checkpoint, &edits, folder, SHARD_BYTES, &mut |done, _| {
        bar.set(done);
        !interrupted()
    })
    .with_context(|| format!("cannot write {}", folder.display()))?;
    bar.finish();
    common.note(&format!("{}: the model with {} changed experts", folder.display(), report.experts.len()));
    Ok(())
}

/// The world of a method: this process, its files and its user.
pub struct Outside<'a> {
    common: &'a Common,
    tasks: &'a [PathBuf],
    bar: Option<(String, Progress)>,
}

impl<'a> Outside<'a> {
    /// A world with these task files.
    pub fn new(common: &'a Common, tasks: &'a [PathBuf]) -> Outside<'a> {
        Outside { common, tasks, bar: None }
    }

    fn end(&mut self) {
        if let Some((_, bar)) = self.bar.take() {
            bar.finish();
        }
    }
}

impl World for Outside<'_> {
    fn tasks(&mut self, split: &str) -> Result<Vec<Task>, MethodError> {
        let paths = self.common.task_paths(self.tasks).map_err(|e| MethodError::Outside(e.into()))?;
        Ok(load_tasks(&paths, Some(split))?)
    }

    fn open_model(&mut self, path: &Path) -> Result<Model, MethodError> {
        let common = Common { model: Some(path.to_path_buf()), ..self.common.clone() };
        let open = || {
            let mut model = common.open_model(None)?;
            common.load_all_experts(&mut model)?;
            Ok(model)
        };
        open().map_err(|e: anyhow::Error| MethodError::Outside(e.into()))
    }

    fn read_text(&mut self, path: &Path) -> Result<String, MethodError> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
        text.map_err(|e| MethodError::Outside(e.into()))
    }

    fn progress(&mut self, stage: &str, done: u64, total: u64) -> bool {
        if self.bar.as_ref().is_none_or(|(name, _)| name != stage) {
            self.end();
            self.bar = Some((stage.to_string(), self.common.progress(stage, total, "items")));
        }
        if let Some((_, bar)) = &mut self.bar {
            bar.set(done);
        }
        !interrupted()
    }
}

/// A report as text for a terminal.
pub fn text(report: &Report) -> Result<String> {
    let mut out = String::new();
    for (name, value) in &report.headline {
        writeln!(out, "{name}: {}", cell(value))?;
    }
    for table in &report.tables {
        write!(out, "\n{} ({})\n{}", table.name, table.about, grid(table))?;
    }
    let mut shown = Vec::new();
    for map in &report.maps {
        // Of a group of like maps (`GROUP: NAME`) one line.
        let name = map.name.split_once(": ").map_or(map.name.as_str(), |(group, _)| group);
        if !shown.contains(&name) {
            shown.push(name);
            writeln!(out, "\n{name} ({}): {} layers, in --json, -o DIR and --html FILE", map.about, map.layers.len())?;
        }
    }
    if let Some(cards) = &report.cards {
        writeln!(out, "\ncards ({}): {} experts, in --json, -o DIR and --html FILE", cards.about, cards.cards.len())?;
    }
    for note in &report.notes {
        writeln!(out, "\n{note}")?;
    }
    Ok(out)
}

/// A table with columns as wide as what they hold; numbers to the right.
fn grid(table: &Table) -> String {
    let rows: Vec<Vec<String>> = table.rows.iter().map(|row| row.iter().map(cell).collect()).collect();
    let width = |c: usize| {
        let cells = rows.iter().map(|row| row[c].chars().count());
        cells.chain([table.columns[c].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..table.columns.len()).map(width).collect();
    let number = |c: usize| table.rows.iter().all(|row| row[c].is_number() || row[c].is_null());
    let line = |cells: &[String]| {
        let padded = cells.iter().enumerate().map(|(c, text)| {
            if number(c) { format!("{text:>0$}", widths[c]) } else { format!("{text:<0$}", widths[c]) }
        });
        padded.collect::<Vec<_>>().join("  ").trim_end().to_string() + "\n"
    };
    line(&table.columns) + &rows.iter().map(|row| line(row)).collect::<String>()
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_string(),
        Value::String(text) => text.clone(),
        Value::Number(n) if n.is_f64() => short(n.as_f64().unwrap_or(0.0)),
        other => other.to_string(),
    }
}

/// A number with four significant digits.
fn short(v: f64) -> String {
    match v.abs() {
        0.0 => "0".to_string(),
        a if (1e-3..1e6).contains(&a) => {
            let digits = (3 - a.log10().floor() as i32).clamp(0, 6) as usize;
            format!("{v:.digits$}")
        }
        _ => format!("{v:.3e}"),
    }
}

/// Begin and end of what is generated in a method's page; what stands outside is written by hand.
const BEGIN: &str = "<!-- made by `quorate methods --docs` from the method's card and arguments -->";
const END: &str = "<!-- end -->";

/// Writes a page for each method into a folder. What was written by hand below the generated part stays.
pub fn write_pages(common: &Common, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    for method in METHODS {
        let path = folder.join(format!("{}.md", method.card.id));
        let by_hand = match std::fs::read_to_string(&path) {
            Ok(old) => match old.split_once(END) {
                Some((_, rest)) => rest.to_string(),
                None => bail!("{}: the line `{END}` is missing; help: put it below the generated part", path.display()),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => "\n".to_string(),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        write_file(&path, format!("{}{by_hand}", page(method)?).as_bytes())?;
    }
    common.note(&format!("{} pages in {}", METHODS.len(), folder.display()));
    Ok(())
}

fn page(method: &Method) -> Result<String> {
    let card = method.card;
    let mut out =
        format!("{BEGIN}\n\n# {}\n\n{} ({}, {})\n\n{}\n\n", card.id, card.title, card.paper, card.year, card.about);
    writeln!(out, "- **Needs:** {}\n- **Cost:** {}", card.needs, card.cost)?;
    if !card.metrics.is_empty() {
        writeln!(out, "- **Metrics:** `{}`", card.metrics.join("`, `"))?;
    }
    writeln!(out, "\n```sh\n{}\n```\n", card.run)?;
    if let Some(runner) = method.command {
        let mut command = (runner.augment)(Command::new(card.id));
        command.build();
        let own: Vec<_> = command.get_arguments().filter(|a| a.get_id() != "help").collect();
        if !own.is_empty() {
            writeln!(out, "| option | default | what |\n|---|---|---|")?;
        }
        for arg in own {
            let name = arg.get_long().map_or_else(|| arg.get_id().to_string(), |l| format!("--{l}"));
            let default: Vec<_> = arg.get_default_values().iter().map(|v| v.to_string_lossy()).collect();
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
            writeln!(out, "| `{name}` | {} | {help} |", default.join(" "))?;
        }
        writeln!(out)?;
    }
    Ok(out + END)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_are_short_and_columns_straight() {
        assert_eq!([0.0, 12.3456, 0.012345, -1234.6, 1e-9].map(short), ["0", "12.35", "0.01235", "-1235", "1.000e-9"]);
        let mut report = Report::default();
        let table = report.table("t", "a table", &["name", "n"]);
        table.row([json!("long name"), json!(1)]);
        table.row([json!("x"), Value::Null]);
        assert_eq!(grid(&report.tables[0]), "name       n\nlong name  1\nx          -\n");
    }
}
