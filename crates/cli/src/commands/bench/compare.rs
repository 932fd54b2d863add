//! `--compare llama.cpp`: both programs in turn on the same file, each run a process of its own, so that neither takes memory
//! from the other.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use serde_json::{Value, json};

use super::median;
use crate::common::{Common, available_bytes, interrupted, say};

/// The peers that `--compare` knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PeerArg {
    /// llama.cpp: `llama-bench` (or the program that LLAMA_BENCH names), or else the Python package llama-cpp-python (of the
    /// Python that QUORATE_PYTHON names, or python3)
    #[value(name = "llama.cpp")]
    LlamaCpp,
}

const SCRIPT: &str = include_str!("peer.py");

/// How llama.cpp is run.
enum Peer {
    Bench(PathBuf),
    Python(PathBuf),
}

/// What is measured.
pub struct Setting {
    pub threads: usize,
    pub prefill: usize,
    pub decode: usize,
    pub repeat: usize,
}

/// Speeds of one run, tokens a second.
#[derive(Clone, Copy)]
struct Speeds {
    prefill: f64,
    decode: f64,
}

impl Speeds {
    fn of(document: &Value) -> Result<Speeds> {
        let n = |name: &str| {
            document[name]
                .as_f64()
                .ok_or_else(|| anyhow!("a run gave no {name}; help: are --prefill and --decode above 0?"))
        };
        Ok(Speeds { prefill: n("prefill_tokens_per_s")?, decode: n("decode_tokens_per_s")? })
    }
}

impl Peer {
    fn find() -> Result<Peer> {
        if let Some(path) = std::env::var_os("LLAMA_BENCH").map(PathBuf::from) {
            if !path.is_file() {
                bail!("LLAMA_BENCH names {}, where there is no program", path.display());
            }
            return Ok(Peer::Bench(path));
        }
        let runs = |program: &Path, args: &[&str]| {
            let mut command = Command::new(program);
            command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        let bench = PathBuf::from("llama-bench");
        if runs(&bench, &["--help"]) {
            return Ok(Peer::Bench(bench));
        }
        let python = std::env::var_os("QUORATE_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from);
        if runs(&python, &["-c", "import llama_cpp"]) {
            return Ok(Peer::Python(python));
        }
        bail!(
            "llama.cpp is not here: there is no llama-bench, and {} has no package llama_cpp; help: `pip install llama-cpp-python`, \
             or name a program by LLAMA_BENCH or a Python by QUORATE_PYTHON",
            python.display()
        )
    }

    /// One run, with weights repacked at loading or not.
    fn run(&self, model: &Path, setting: &Setting, repack: bool) -> Result<Speeds> {
        let [threads, prompt, decode] = [setting.threads, setting.prefill, setting.decode].map(|n| n.to_string());
        let repack = if repack { "1" } else { "0" };
        match self {
            Peer::Python(python) => {
                let mut command = Command::new(python);
                command.arg("-c").arg(SCRIPT).arg(model).args([&threads, &prompt, &decode, repack]);
                Speeds::of(&document(command)?)
            }
            Peer::Bench(bench) => {
                // Decoding begins behind the prompt, as here.
                let speed = |p: &str, n: &str, depth: &str| {
                    let mut command = Command::new(bench);
                    command.arg("-m").arg(model).args(["-t", &threads, "-p", p, "-n", n, "-d", depth]);
                    command.args(["-r", "1", "--repack", repack, "-o", "json"]);
                    let speed = document(command)?[0]["avg_ts"].as_f64();
                    speed.ok_or_else(|| {
                        anyhow!("llama-bench printed no avg_ts; help: take a newer llama.cpp, or unset LLAMA_BENCH")
                    })
                };
                Ok(Speeds { prefill: speed(&prompt, "0", "0")?, decode: speed("0", &decode, &prompt)? })
            }
        }
    }
}

/// Runs a program that prints one JSON document.
fn document(mut command: Command) -> Result<Value> {
    let program = Path::new(command.get_program()).display().to_string();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = said.lines().collect();
        let last = lines[lines.len().saturating_sub(5)..].join("\n");
        let last =
            if last.is_empty() { "it said nothing; help: does it run this model by itself?".into() } else { last };
        bail!("{program} failed ({}): {last}", output.status);
    }
    let printed = || format!("what {program} printed is no JSON; help: does it run this model by itself?");
    serde_json::from_slice(&output.stdout).with_context(printed)
}

/// Runs both in turn and prints speeds and ratios. `own` are the arguments of a run of this program.
pub fn compare(common: &Common, setting: &Setting, own: &[OsString]) -> Result<()> {
    let model = common.model_path()?;
    if !model.is_file() {
        bail!(
            "{} is no GGUF file, which is what llama.cpp reads; help: `quorate quantize` writes one",
            model.display()
        );
    }
    let peer = Peer::find()?;
    let program = std::env::current_exe().context("cannot find this program's file")?;
    let us = || {
        let mut command = Command::new(&program);
        command.args(own);
        Speeds::of(&document(command)?)
    };
    // Repacked weights are a second copy beside the file's pages.
    let file_bytes = std::fs::metadata(&model).with_context(|| model.display().to_string())?.len();
    let fits = available_bytes().is_none_or(|available| 2 * file_bytes < available);
    // Why there are no figures of repacked weights.
    let mut left_out = (!fits).then_some("does not fit");
    if !fits {
        common.note("llama.cpp's repacked weights do not fit into memory beside the file: that mode is left out");
    }
    let modes = if fits { 3 } else { 2 };
    // Neither is to pay for the file's first way into the system's cache.
    let mut progress = common.progress("bench", (modes * setting.repeat + 1) as u64, "runs");
    us()?;
    progress.set(1);
    let mut runs: [Vec<Speeds>; 3] = Default::default();
    for repeat in 0..setting.repeat {
        for (i, runs) in runs.iter_mut().enumerate().take(modes) {
            let repack = i == 2;
            if repack && left_out.is_some() {
                continue;
            }
            match if i == 0 { us() } else { peer.run(&model, setting, repack) } {
                Ok(speeds) => runs.push(speeds),
                Err(error) if repack && !interrupted() => {
                    common
                        .note(&format!("llama.cpp fails with its weights repacked, that mode is left out: {error:#}"));
                    left_out = Some("fails");
                    runs.clear();
                }
                Err(error) => return Err(error),
            }
            progress.set((modes * repeat + i + 2) as u64);
            if interrupted() {
                bail!("interrupted");
            }
        }
    }
    progress.finish();
    let rows: Vec<Value> = ["prefill", "decode"].into_iter().map(|what| row(what, &runs)).collect();
    if common.json {
        return common.print_json(&json!({
            "model": model, "threads": setting.threads, "prefill": setting.prefill, "decode": setting.decode,
            "repeat": setting.repeat, "peer": "llama.cpp", "repacked_left_out": left_out, "rows": rows,
        }));
    }
    say!(
        "{} threads, prompt of {}, {} decoded behind it, {} runs of each in turn; tokens/s, medians",
        setting.threads,
        setting.prefill,
        setting.decode,
        setting.repeat
    )?;
    say!(
        "{:8} {:>9} {:>17} {:>20}   ratio to its better mode: median (least to most)",
        "",
        "quorate",
        "llama.cpp",
        "llama.cpp repacked"
    )?;
    for row in &rows {
        let n = |name: &str| row[name].as_f64().unwrap_or(f64::NAN);
        say!(
            "{:8} {:>9.2} {:>17.2} {:>20}   {:.3} ({:.3} to {:.3})",
            row["what"].as_str().unwrap_or_default(),
            n("quorate"),
            n("llama_cpp"),
            row["llama_cpp_repacked"].as_f64().map_or_else(|| left_out.unwrap_or("none").into(), |n| format!("{n:.2}")),
            n("ratio"),
            n("ratio_least"),
            n("ratio_most")
        )?;
    }
    Ok(())
}

/// Medians, and the ratios run by run to that mode of the peer which is faster in the median.
fn row(what: &str, runs: &[Vec<Speeds>; 3]) -> Value {
    let speeds = runs.each_ref().map(|runs| -> Vec<f64> {
        runs.iter().map(|s| if what == "prefill" { s.prefill } else { s.decode }).collect()
    });
    let medians = speeds.each_ref().map(|s| (!s.is_empty()).then(|| median(s.clone())));
    let [us, plain, repacked] = medians;
    let best = if plain >= repacked { &speeds[1] } else { &speeds[2] };
    let ratios: Vec<f64> = speeds[0].iter().zip(best).map(|(us, peer)| us / peer).collect();
    let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let most = ratios.iter().copied().fold(0.0, f64::max);
    json!({ "what": what, "quorate": us, "llama_cpp": plain, "llama_cpp_repacked": repacked,
        "ratio": median(ratios), "ratio_least": least, "ratio_most": most, "runs": speeds })
}
