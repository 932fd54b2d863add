//! What the commands share: opening the model and the library, threads, JSON, progress, interruption.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use quorate_formats::Preset;
use quorate_lens::{LensError, Library};
use quorate_model::text::Tokenizer;
use quorate_model::{KeptExperts, KvType, Model, OpenOptions, RoutingMode};
use quorate_residency::StreamOptions;
use serde::Serialize;

use crate::embedded;
use crate::hub::{self, Hub};
use crate::stream::note_base;

/// Writes a line to stdout. What stands in the way, a closed pipe or a full disk, is the command's error: no panic.
macro_rules! say {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        writeln!(std::io::stdout(), $($arg)*)
    }};
}
pub(crate) use say;

/// Flags of every command.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Options of every command")]
pub struct Common {
    /// Model: a folder (config.json, safetensors, tokenizer.json), or OWNER/REPO of the Hugging Face hub; left out, the embedded model
    #[arg(short, long, global = true, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Folder whose tokenizer.json is used in place of the model's own tokenizer
    #[arg(long, global = true, value_name = "FOLDER")]
    pub tokenizer: Option<PathBuf>,
    /// Compute threads; left out, all cores
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,
    /// Numbers of the KV cache; left out, f16 for models with weights in blocks (most GGUF files), f32 for others
    #[arg(long, global = true, value_enum, value_name = "TYPE")]
    pub kv_type: Option<KvTypeArg>,
    /// Pattern library file; left out, library.sqlite in the home folder
    #[arg(long, global = true, value_name = "FILE")]
    pub library: Option<PathBuf>,
    /// One JSON document on stdout; everything else goes to stderr
    #[arg(long, global = true)]
    pub json: bool,
    /// Ask nothing of the network: models of the hub come from the cache
    #[arg(long, global = true)]
    pub offline: bool,
    /// No progress, no notes
    #[arg(short, long, global = true)]
    pub quiet: bool,
}

/// [`KvType`] on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(non_camel_case_types, reason = "the usual name")]
pub enum KvTypeArg {
    /// As they were computed
    F32,
    /// Half the memory, rounded to 11 bits
    F16,
    /// About a quarter of the memory, signed bytes with a scale for every 32
    #[value(name = "q8_0")]
    Q8_0,
}

impl Common {
    /// The folder or file of the chosen model; one that the hub has is fetched if need be.
    pub fn model_path(&self) -> Result<PathBuf> {
        let Some(path) = &self.model else { return Ok(embedded::unpacked()?.join("model")) };
        if path.exists() {
            return Ok(path.clone());
        }
        if path.to_str().and_then(Preset::find).is_some() {
            bail!(
                "{} is a preset, known by its shape only; help: `quorate inspect -m {0}` looks at it; to run it, name its folder or OWNER/REPO",
                path.display()
            );
        }
        match hub::named(path) {
            Some(repo) => {
                let model = Hub::new(self)?.model(self, &repo);
                model.with_context(|| format!("there is no folder {}, and as a model of the hub", path.display()))
            }
            None => bail!(
                "there is no model at {}; help: give a folder with config.json and *.safetensors, OWNER/REPO of the hub, or leave -m out \
                 for the embedded model; `quorate inspect --presets` lists the models that are known by name",
                path.display()
            ),
        }
    }

    /// Opens the tokenizer alone.
    pub fn open_tokenizer(&self) -> Result<Tokenizer> {
        Ok(match &self.tokenizer {
            Some(folder) => Tokenizer::open(folder)?,
            None => Tokenizer::of_model(&self.model_path()?)?,
        })
    }

    /// Number of compute threads.
    pub fn thread_count(&self) -> Result<usize> {
        match self.threads {
            Some(n @ 1..=1024) => Ok(n),
            Some(n) => bail!("--threads {n} is out of range; help: give 1 to 1024"),
            None => Ok(std::thread::available_parallelism().map_or(1, usize::from)),
        }
    }

    /// Opens the model without its experts.
    pub fn open_model(&self, memory_limit: Option<u64>) -> Result<Model> {
        let mut bar = self.progress("loading", 0, "bytes");
        let (threads, tokenizer) = (self.thread_count()?, self.tokenizer.as_deref());
        let kv_type = self.kv_type.map(|kv_type| match kv_type {
            KvTypeArg::F32 => KvType::F32,
            KvTypeArg::F16 => KvType::F16,
            KvTypeArg::Q8_0 => KvType::Q8_0,
        });
        let options = OpenOptions { threads, memory_limit, tokenizer, kv_type };
        let model = Model::open_with(&self.model_path()?, &options, &mut loading(&mut bar))?;
        // What opening took is given back; what passes take is kept for the next.
        quorate_kernels::give_back_freed_memory();
        note_base(&model);
        quorate_kernels::keep_freed_memory();
        bar.finish();
        Ok(model)
    }

    /// Loads just these experts, given per MoE layer.
    pub fn load_experts(&self, model: &mut Model, kept: &[KeptExperts], mode: RoutingMode) -> Result<()> {
        let mut bar = self.progress("loading experts", 0, "bytes");
        model.load_experts_with(kept, mode, &mut loading(&mut bar))?;
        bar.finish();
        Ok(())
    }

    /// Makes the model stream its experts, some of them pinned.
    pub fn stream_experts(
        &self,
        model: &mut Model,
        options: &StreamOptions,
        best_first: &[(usize, usize)],
        rates: Option<&[Vec<f32>]>,
    ) -> Result<()> {
        let mut bar = self.progress("loading experts", 0, "bytes");
        model.stream_experts(options, best_first, rates, &mut loading(&mut bar))?;
        bar.finish();
        Ok(())
    }

    /// Loads all experts.
    pub fn load_all_experts(&self, model: &mut Model) -> Result<()> {
        let all = vec![None; model.spec().moe_layers().len()];
        self.load_experts(model, &all, RoutingMode::Mask)
    }

    /// Opens the pattern library; on first use it receives the embedded model's patterns.
    pub fn open_library(&self) -> Result<Library> {
        let path = match &self.library {
            Some(path) => path.clone(),
            None => embedded::home()?.join("library.sqlite"),
        };
        let mut library = match Library::open(&path) {
            Err(error @ LensError::Io { .. }) => {
                return Err(error)
                    .context("cannot make the pattern library; help: set QUORATE_HOME, or give --library FILE");
            }
            other => other?,
        };
        embedded::store_patterns(&mut library)?;
        Ok(library)
    }

    /// Task files: those given, or the embedded ones if the model is the embedded one.
    pub fn task_paths(&self, given: &[PathBuf]) -> Result<Vec<PathBuf>> {
        match (given.is_empty(), &self.model) {
            (false, _) => Ok(given.to_vec()),
            (true, None) => Ok(vec![embedded::unpacked()?.join("tasks")]),
            (true, Some(_)) => bail!("no task files; help: give --tasks DIR or FILE.jsonl.."),
        }
    }

    /// Prints the JSON document of a command.
    pub fn print_json(&self, document: &impl Serialize) -> Result<()> {
        let mut out = std::io::stdout().lock();
        serde_json::to_writer_pretty(&mut out, document)?;
        writeln!(out)?;
        Ok(())
    }

    /// A note for the user, on stderr.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            let _ = writeln!(std::io::stderr(), "{text}"); // nowhere left to report that stderr is closed
        }
    }

    /// A progress bar over `total` units named `unit`.
    pub fn progress(&self, what: &str, total: u64, unit: &'static str) -> Progress {
        Progress::new(what, total, unit, self.quiet)
    }
}

/// Shows bytes as they are loaded; Ctrl-C cancels.
fn loading(bar: &mut Progress) -> impl FnMut(u64, u64) -> bool + '_ {
    |done, total| {
        bar.set_total(total);
        bar.set(done);
        !interrupted()
    }
}

/// Progress on stderr: a bar with rate and time left on a terminal, else a plain line every five seconds.
pub struct Progress {
    bar: ProgressBar,
    what: String,
    unit: &'static str,
    plain: bool,
    start: Instant,
    start_at: Option<u64>,
    last: Instant,
}

impl Progress {
    fn new(what: &str, total: u64, unit: &'static str, quiet: bool) -> Progress {
        let terminal = std::io::stderr().is_terminal();
        let target =
            if quiet || !terminal { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr_with_hz(8) };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let template = "{msg:24} [{bar:30}] {percent:>3}% {human_pos}/{human_len} {per_sec} left {eta}";
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message(what.to_string());
        let now = Instant::now();
        Progress { bar, what: what.into(), unit, plain: !quiet && !terminal, start: now, start_at: None, last: now }
    }

    /// There are `total` units in all.
    pub fn set_total(&mut self, total: u64) {
        self.bar.set_length(total);
    }

    /// `done` units are done.
    pub fn set(&mut self, done: u64) {
        let from = *self.start_at.get_or_insert(done);
        self.bar.set_position(done);
        if self.plain && self.last.elapsed() > Duration::from_secs(5) {
            self.last = Instant::now();
            let total = self.bar.length().unwrap_or(0);
            let rate = (done - from) as f64 / self.start.elapsed().as_secs_f64().max(1e-9);
            let left = match (total.saturating_sub(done)) as f64 / rate {
                left if left.is_finite() => format!(", {rate:.0} {unit}/s, {left:.0} s left", unit = self.unit),
                _ => String::new(),
            };
            let (what, unit) = (&self.what, self.unit);
            let _ = writeln!(std::io::stderr(), "{what}: {done}/{total} {unit}{left}");
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static WAITING: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C is noted and left to the command, which ends cleanly. A second one ends the process at once, and so
/// does the first if the command waits for input.
pub fn catch_interrupts() -> Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) || WAITING.load(Ordering::SeqCst) {
            #[allow(clippy::exit)]
            std::process::exit(130);
        }
    })
    .context("cannot listen for Ctrl-C")
}

/// Whether Ctrl-C was pressed.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Reads input during which Ctrl-C ends the process: nothing is under way that could be lost.
pub fn wait_for<T>(read: impl FnOnce() -> T) -> T {
    WAITING.store(true, Ordering::SeqCst);
    let input = read();
    WAITING.store(false, Ordering::SeqCst);
    input
}

/// FNV-1a, to tell inputs apart.
pub struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Fnv {
        Fnv(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    /// Takes in a text.
    pub fn mix(&mut self, text: &str) {
        text.bytes().for_each(|b| self.0 = (self.0 ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    }

    /// 16 hexadecimal digits.
    pub fn hex(&self) -> String {
        format!("{:016x}", self.0)
    }
}

/// The text of a file.
pub fn read_text_file(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    as_text(bytes, &path.display().to_string())
}

/// Bytes of `place` as text.
pub fn as_text(bytes: Vec<u8>, place: &str) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to() + 1;
        anyhow!("{place} is no UTF-8 text: byte {at} is wrong; help: convert it to UTF-8")
    })
}

/// Bytes as text with a binary unit.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Parses a number above 0.
pub fn parse_count(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| format!("`{text}` is no number above 0"))
}

/// Parses `6GiB`, `512 MB`, `1e9`, `123`.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let bad = || format!("`{text}` is no size; help: write 6GiB, 512MB or a number of bytes");
    let split = text.find(|c: char| c.is_ascii_alphabetic() && c != 'e').unwrap_or(text.len());
    let number: f64 = text[..split].trim().parse().map_err(|_| bad())?;
    let factor = match text[split..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024f64.powi(2),
        "g" | "gib" => 1024f64.powi(3),
        "t" | "tib" => 1024f64.powi(4),
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return Err(bad()),
    };
    let bytes = number * factor;
    if bytes.is_finite() && (0.0..1e18).contains(&bytes) { Ok(bytes as u64) } else { Err(bad()) }
}

/// Largest amount of memory this process has held, if the system tells.
pub fn peak_rss_bytes() -> Option<u64> {
    status_bytes("VmHWM:")
}

/// Memory that this process holds now, if the system tells.
pub fn rss_bytes() -> Option<u64> {
    status_bytes("VmRSS:")
}

/// Memory that could be taken without taking it from others, if the system tells.
pub fn available_bytes() -> Option<u64> {
    kib_in("/proc/meminfo", "MemAvailable:")
}

fn status_bytes(field: &str) -> Option<u64> {
    kib_in("/proc/self/status", field)
}

/// A field of a file of such fields, in KiB there, in bytes here.
fn kib_in(file: &str, field: &str) -> Option<u64> {
    let status = std::fs::read_to_string(Path::new(file)).ok()?;
    let line = status.lines().find(|l| l.starts_with(field))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Bytes that this process has caused to be read from storage, if the system tells.
pub fn disk_read_bytes() -> Option<u64> {
    let io = std::fs::read_to_string("/proc/self/io").ok()?;
    io.lines().find_map(|l| l.strip_prefix("read_bytes: "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_and_print() {
        assert_eq!(parse_bytes("6GiB").unwrap(), 6 << 30);
        assert_eq!(parse_bytes("1.5 MB").unwrap(), 1_500_000);
        assert_eq!(parse_bytes("123").unwrap(), 123);
        for bad in ["", "x", "-1", "6 parsecs", "1e99"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
        assert_eq!((human_bytes(512), human_bytes(1536)), ("512 B".into(), "1.5 KiB".into()));
    }
}
