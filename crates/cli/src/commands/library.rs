//! `quorate library`: the stored patterns.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use quorate_lens::{Library, Pattern};
use quorate_methods::patterns::{best_metric, common_phases, merged, summary};
use quorate_model::Model;
use serde_json::json;

use super::profile::{check_name, patterns_of, print_summary};
use crate::common::{Common, say};

/// Arguments of `library`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  quorate library list
  quorate library show arithmetic
  quorate library merge arithmetic modular --into sums
  quorate library merge shard0/*.pattern shard1/*.pattern
  quorate library export -o patterns/ --compact
  quorate library import patterns/*.pattern")]
pub struct LibraryCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Patterns of the model (--all: of every model)
    List {
        /// Patterns of every model
        #[arg(long)]
        all: bool,
    },
    /// A pattern: where it comes from, held-out coverage, overlap with the others, best experts
    Show {
        /// Its name
        name: String,
        /// Metric whose ranking is shown [default: peu, or frequency where that is all that is known]
        #[arg(long)]
        metric: Option<String>,
    },
    /// Remove patterns
    Remove {
        /// Their names
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Pool patterns, exactly as if their texts had been profiled at once
    Merge {
        /// Names in the library, or pattern files; files of one task are merged into that task
        #[arg(required = true, value_name = "SOURCE")]
        sources: Vec<String>,
        /// Name of the result; left out, the sources must be shards, and keep their task's name
        #[arg(long, value_name = "NAME")]
        into: Option<String>,
    },
    /// Write patterns as files
    Export {
        /// Their names; left out, all of the model
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        /// Folder
        #[arg(short, long, value_name = "DIR")]
        output: PathBuf,
        /// Leave out what only merging needs
        #[arg(long)]
        compact: bool,
    },
    /// Read pattern files
    Import {
        /// The files
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
}

impl LibraryCommand {
    pub fn run(&self, common: &Common) -> Result<()> {
        let mut library = common.open_library()?;
        match &self.action {
            Action::List { all } => list(common, &library, *all),
            Action::Show { name, metric } => show(common, &library, name, metric.as_deref()),
            Action::Remove { names } => {
                let fingerprint = fingerprint(common)?;
                patterns_of(&library, &fingerprint, names)?; // all are there, or none is removed
                names.iter().try_for_each(|name| library.remove(&fingerprint, name))?;
                done(common, "removed", names)
            }
            Action::Merge { sources, into } => merge(common, &mut library, sources, into.as_deref()),
            Action::Export { names, output, compact } => export(common, &library, names, output, *compact),
            Action::Import { files } => {
                let names = library.import(files)?;
                done(common, "imported", &names)
            }
        }
    }
}

fn done(common: &Common, what: &str, names: &[String]) -> Result<()> {
    if common.json {
        return common.print_json(&json!({ what: names }));
    }
    Ok(say!("{what} {}", names.join(", "))?)
}

fn fingerprint(common: &Common) -> Result<String> {
    Ok(quorate_formats::Checkpoint::open(&common.model_path()?)?.fingerprint().to_string())
}

fn list(common: &Common, library: &Library, all: bool) -> Result<()> {
    let infos = library.list((!all).then(|| fingerprint(common)).transpose()?.as_deref())?;
    if common.json {
        return common.print_json(&infos);
    }
    say!("{:16} {:>7} {:>9} {:>9} {:>9}  {:9} model", "pattern", "items", "prompt", "answer", "held out", "phases")?;
    for i in &infos {
        say!(
            "{:16} {:>7} {:>9} {:>9} {:>9}  {:9} {}",
            i.name,
            i.items,
            i.tokens[0],
            i.tokens[1],
            i.heldout_items,
            i.phases,
            i.fingerprint
        )?;
    }
    common.note(&format!("{} patterns in {}", infos.len(), library.path().display()));
    Ok(())
}

fn show(common: &Common, library: &Library, name: &str, metric: Option<&str>) -> Result<()> {
    let model: Model = common.open_model(None)?;
    let fingerprint = model.checkpoint().fingerprint();
    let pattern = library.get(fingerprint, name)?;
    let names: Vec<String> = library.list(Some(fingerprint))?.into_iter().map(|i| i.name).collect();
    let all = patterns_of(library, fingerprint, &names)?;
    let summary = summary(model.spec(), &pattern, &all)?;
    let metric = metric.unwrap_or(best_metric(&pattern));
    let scores = pattern.scores(metric)?;
    let rankings: Vec<(usize, Vec<usize>)> =
        scores.map.layers.iter().enumerate().map(|(moe, &layer)| (layer, scores.ranking(moe))).collect();
    if common.json {
        let rankings: Vec<_> = rankings.iter().map(|(l, r)| json!({ "layer": l, "experts": r })).collect();
        return common.print_json(&json!({
            "info": pattern.info, "summary": summary, "metric": scores.metric, "ranking": rankings,
        }));
    }
    say!("{} of model {}, from {}", name, pattern.info.fingerprint, pattern.info.data.join(", "))?;
    say!(
        "{} items ({} held out), {} prompt and {} answer tokens",
        pattern.info.items,
        pattern.info.heldout_items,
        pattern.info.tokens[0],
        pattern.info.tokens[1]
    )?;
    say!("held-out coverage (share of selections / of gate mass):")?;
    print_summary(&summary)?;
    say!("experts by {metric}, best first:")?;
    for (layer, ranking) in rankings {
        let ids: Vec<String> = ranking.iter().map(ToString::to_string).collect();
        say!("  layer {layer}: {}", ids.join(" "))?;
    }
    Ok(())
}

/// Merges sources; files without `--into` are grouped by their task.
fn merge(common: &Common, library: &mut Library, sources: &[String], into: Option<&str>) -> Result<()> {
    if let Some(name) = into {
        check_name(name)?;
    }
    let mut patterns = Vec::with_capacity(sources.len());
    for (i, source) in sources.iter().enumerate() {
        if sources[..i].contains(source) {
            bail!("`{source}` is named twice; help: each part of a profile counts once");
        }
        let path = PathBuf::from(source);
        if path.is_file() {
            let bytes = std::fs::read(&path).with_context(|| source.clone())?;
            patterns.push(Pattern::from_bytes(&bytes, source)?);
        } else {
            patterns.push(library.get(&fingerprint(common)?, source)?);
        }
    }
    let mut groups: Vec<(String, Vec<&Pattern>)> = Vec::new();
    for pattern in &patterns {
        let name = into.unwrap_or(&pattern.info.name);
        match groups.iter_mut().find(|g| g.0 == name) {
            Some(group) => group.1.push(pattern),
            None => groups.push((name.to_string(), vec![pattern])),
        }
    }
    if into.is_none() && groups.iter().any(|g| g.1.len() < 2) {
        bail!("the sources are of different tasks; help: name the result with --into NAME");
    }
    let mut results = Vec::with_capacity(groups.len());
    for (name, group) in &groups {
        results.push(merged(name, group, common_phases(group)?)?);
    }
    library.put(&results)?;
    done(common, "merged", &results.into_iter().map(|p| p.info.name).collect::<Vec<_>>())
}

fn export(common: &Common, library: &Library, names: &[String], output: &PathBuf, compact: bool) -> Result<()> {
    let fingerprint = fingerprint(common)?;
    let names = match names {
        [] => library.list(Some(&fingerprint))?.into_iter().map(|i| i.name).collect(),
        names => names.to_vec(),
    };
    std::fs::create_dir_all(output).with_context(|| format!("cannot make the folder {}", output.display()))?;
    for mut pattern in patterns_of(library, &fingerprint, &names)? {
        if compact {
            pattern.data = None;
        }
        pattern.write(output, "")?;
    }
    done(common, "exported", &names)
}
