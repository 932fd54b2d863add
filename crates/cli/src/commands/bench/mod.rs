//! `quorate bench`: speed and memory of the loaded model.

mod compare;
mod roofline;

use std::ffi::OsString;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use quorate_formats::{Checkpoint, DataFile};
use quorate_lens::{
    ExpertMap, Indices, Intervention, Interventions, Op, PhaseSelector, Profiler, Recorder, RouterStats, StageClock,
};
use quorate_model::{KvCache, Lens, LogitRows, Model, NoLens, PREFILL_CHUNK, Segment, Site};
use quorate_residency::StreamStats;
use serde_json::{Value, json};

use crate::common::{Common, disk_read_bytes, human_bytes, interrupted, parse_count, peak_rss_bytes, say};
use crate::experts::{Beside, ExpertArgs, open};
use crate::stream;
use compare::{PeerArg, Setting};
use roofline::{Bandwidth, Need};

/// Tokens after which the memory's speed is measured again.
const SAMPLE_EVERY: usize = 8;

/// Arguments of `bench`.
#[derive(Args)]
#[command(after_help = "\
Lenses are measured in turn with the bare model, so that ratios come from the same minute of the same machine.

Examples:
  quorate bench
  quorate bench --task arithmetic --keep 8 --repeat 9
  quorate bench --cold --task arithmetic --keep 8
  quorate bench --memory 60MiB --on-miss stream --cache lru
  quorate bench --lens none,record,intervene,profile --threads 2 --json
  quorate bench --stages
  quorate bench -m model.gguf --compare llama.cpp --prefill 512 --decode 64")]
pub struct Bench {
    /// Tokens of the prompt
    #[arg(long, default_value_t = 256, value_name = "N", value_parser = parse_count)]
    prefill: usize,
    /// Tokens to generate
    #[arg(long, default_value_t = 128, value_name = "N", value_parser = parse_count)]
    decode: usize,
    /// Runs; medians are reported
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = parse_count)]
    repeat: usize,
    /// Task whose experts are loaded; `none` loads all
    #[arg(long, default_value = "none")]
    task: String,
    /// Load from the disk: the system's cache of the model's files is dropped first (Linux)
    #[arg(long)]
    cold: bool,
    /// What watches or changes the forward pass
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [LensArg::None])]
    lens: Vec<LensArg>,
    /// How the time of a prompt and of a decoded token is spent, stage by stage, in one more run, in which a token takes a little longer
    /// (its steps are not fused)
    #[arg(long)]
    stages: bool,
    /// Runs another program on the same GGUF file in turn with this one, and gives the ratios
    #[arg(long, value_enum, value_name = "PROGRAM", conflicts_with_all = ["cold", "lens", "stages"])]
    compare: Option<PeerArg>,
    #[command(flatten)]
    experts: ExpertArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LensArg {
    /// Nothing
    None,
    /// A recorder on the router logits of every layer
    Record,
    /// One intervention: a gate of every layer scaled by 1
    Intervene,
    /// The statistics of `quorate profile`
    Profile,
}

struct Run {
    lens: LensArg,
    prefill: f64,
    decode: f64,
    /// Bytes a second that the memory gave between its tokens, if that was measured.
    memory: Option<f64>,
    first_token_s: f64,
    /// Seconds of each decoded token.
    tokens_s: Vec<f64>,
    /// What streaming did in the prompt, and in decoding.
    streamed: [StreamStats; 2],
}

impl Bench {
    pub fn run(&self, common: &Common) -> Result<()> {
        if let Some(PeerArg::LlamaCpp) = self.compare {
            return self.compare(common);
        }
        if self.cold {
            Checkpoint::open(&common.model_path()?)?.files().iter().for_each(DataFile::forget_cached);
        }
        let disk_before = disk_read_bytes();
        let start = Instant::now();
        let (mut model, library) = open(common, &self.experts, &self.task)?;
        let context = model.spec().max_position_embeddings;
        let tokens = self.prefill.saturating_add(self.decode);
        if tokens > context {
            bail!("--prefill and --decode need {tokens} tokens, the context is {context}; help: ask for fewer");
        }
        let task = (self.task != "none").then_some(self.task.as_str());
        let beside = Beside::sequence(model.spec(), tokens);
        self.experts.load(common, &mut model, &library, task, beside)?;
        let load_s = start.elapsed().as_secs_f64();
        let disk_bytes = disk_read_bytes().zip(disk_before).map(|(after, before)| after - before);
        let mut runs: Vec<Run> = Vec::new();
        let mut progress = common.progress("bench", (self.repeat * self.lens.len()) as u64, "runs");
        let mut bandwidth = Bandwidth::of(&model);
        let first_run = self.once(&model, LensArg::None, &mut bandwidth)?; // warms caches and buffers
        for repeat in 0..self.repeat {
            for (i, &lens) in self.lens.iter().enumerate() {
                runs.push(self.once(&model, lens, &mut bandwidth)?);
                progress.set((repeat * self.lens.len() + i + 1) as u64);
                if interrupted() {
                    bail!("interrupted");
                }
            }
        }
        progress.finish();
        let stages = if self.stages { Some(self.staged(&model)?) } else { None };
        let of = |lens: LensArg| -> Vec<&Run> { runs.iter().filter(|r| r.lens == lens).collect() };
        let first = of(self.lens[0]);
        let tokens_s: Vec<f64> = first.iter().flat_map(|r| r.tokens_s.iter().copied()).collect();
        let streamed = first
            .iter()
            .fold([StreamStats::default(); 2], |sum, r| [sum[0].plus(&r.streamed[0]), sum[1].plus(&r.streamed[1])]);
        let lenses: Vec<Value> = (self.lens.iter())
            .map(|&lens| {
                let own = of(lens);
                let ratio = |f: fn(&Run) -> f64| median(own.iter().zip(&first).map(|(a, b)| f(a) / f(b)).collect());
                json!({ "lens": format!("{lens:?}").to_lowercase(),
                    "prefill_tokens_per_s": median(own.iter().map(|r| r.prefill).collect()),
                    "decode_tokens_per_s": median(own.iter().map(|r| r.decode).collect()),
                    "prefill_ratio": ratio(|r| r.prefill), "decode_ratio": ratio(|r| r.decode) })
            })
            .collect();
        let peak_rss = peak_rss_bytes();
        let prefill = median(first.iter().map(|r| r.prefill).collect());
        let decode = median(first.iter().map(|r| r.decode).collect());
        let need = Need::of(&model);
        let decodes: Vec<_> = first.iter().map(|r| (r.decode, r.memory)).collect();
        let machine = need.report(&model, prefill, &decodes, self.prefill + self.decode / 2);
        let document = json!({
            "model": common.model_path()?, "threads": model.pool().threads(),
            "instructions": model.pool().isa().name(), "memory_limit": self.experts.memory,
            "task": task, "prefill": self.prefill, "decode": self.decode,
            "prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode, "machine": machine, "stages": stages,
            "time_to_first_token_s": median(first.iter().map(|r| r.first_token_s).collect()),
            "token_s": { "p50": quantile(&tokens_s, 0.5), "p90": quantile(&tokens_s, 0.9),
                "p99": quantile(&tokens_s, 0.99), "max": quantile(&tokens_s, 1.0) },
            "load_s": load_s, "peak_rss_bytes": peak_rss,
            "first_run": { "time_to_first_token_s": load_s + first_run.first_token_s,
                "prefill_tokens_per_s": first_run.prefill, "decode_tokens_per_s": first_run.decode },
            "resident_weight_bytes": model.weights().resident_bytes(),
            "expert_hit_rate": if model.weights().stream().is_some() { streamed[1].hit_rate() } else { Some(1.0) },
            "stream": { "prefill": stream::report(&model, &streamed[0]), "decode": stream::report(&model, &streamed[1]) },
            "bytes_read": model.weights().bytes_read(), "disk_bytes_read": disk_bytes, "cold": self.cold, "lenses": lenses,
            "runs": runs.iter().map(|r| json!({ "lens": format!("{:?}", r.lens).to_lowercase(),
                "prefill_tokens_per_s": r.prefill, "decode_tokens_per_s": r.decode })).collect::<Vec<_>>(),
        });
        if common.json {
            return common.print_json(&document);
        }
        say!(
            "{} threads, prompt of {}, {} generated, median of {}",
            model.pool().threads(),
            self.prefill,
            self.decode,
            self.repeat
        )?;
        say!(
            "{:10} {:>12} {:>12}   ratio to {}",
            "lens",
            "prefill/s",
            "decode/s",
            document["lenses"][0]["lens"].as_str().unwrap_or_default()
        )?;
        for row in &lenses {
            let n = |name: &str| row[name].as_f64().unwrap_or(0.0);
            say!(
                "{:10} {:>12.0} {:>12.0}   {:.3} {:.3}",
                row["lens"].as_str().unwrap_or_default(),
                n("prefill_tokens_per_s"),
                n("decode_tokens_per_s"),
                n("prefill_ratio"),
                n("decode_ratio")
            )?;
        }
        let ms = |q: f64| 1e3 * quantile(&tokens_s, q);
        say!("ms a token: {:.1} median, {:.1} p90, {:.1} p99, {:.1} max", ms(0.5), ms(0.9), ms(0.99), ms(1.0))?;
        let machine = &document["machine"];
        let giga = |name: &str| machine[name].as_f64().map_or(f64::NAN, |v| v / 1e9);
        if let Some(share) = machine["decode_share_of_bandwidth"].as_f64() {
            say!(
                "memory gives {:.1} GB/s; decoding reads {} a token, {:.1} GB/s, {:.0} % of what was read between its tokens; the prompt {:.0} Gop/s",
                giga("read_bandwidth_bytes_per_s"),
                human_bytes(need.token_bytes),
                giga("decode_bytes_per_s"),
                100.0 * share,
                giga("prefill_operations_per_s")
            )?;
        }
        if let Some(stages) = document["stages"].as_object() {
            for (part, rows) in stages {
                say!("{part}:")?;
                for row in rows.as_array().into_iter().flatten() {
                    let (s, share) = (row["s"].as_f64().unwrap_or(0.0), row["share"].as_f64().unwrap_or(0.0));
                    say!(
                        "  {:30} {:>9.2} ms {:>5.1} %",
                        row["stage"].as_str().unwrap_or_default(),
                        1e3 * s,
                        100.0 * share
                    )?;
                }
            }
        }
        if let Some(described) = stream::described(&model) {
            say!("{described}")?;
            say!("prefill: {}", stream::summary(&streamed[0]))?;
            say!("decode:  {}", stream::summary(&streamed[1]))?;
        }
        say!(
            "loaded in {load_s:.3} s; weights {}, read {} ({} from the disk), peak memory {}",
            human_bytes(model.weights().resident_bytes()),
            human_bytes(model.weights().bytes_read()),
            disk_bytes.map_or("unknown".into(), human_bytes),
            peak_rss.map_or("unknown".into(), human_bytes),
        )?;
        Ok(())
    }

    fn compare(&self, common: &Common) -> Result<()> {
        let setting = Setting {
            threads: common.thread_count()?,
            prefill: self.prefill,
            decode: self.decode,
            repeat: self.repeat,
        };
        // The same command, without what makes it a comparison.
        let mut own: Vec<OsString> = Vec::new();
        let mut skip = false;
        for arg in std::env::args_os().skip(1) {
            let name = arg.to_string_lossy().split('=').next().unwrap_or_default().to_owned();
            if !skip && !["--compare", "--repeat", "--json", "--quiet", "-q"].contains(&name.as_str()) {
                own.push(arg.clone());
            }
            skip = arg == "--compare" || arg == "--repeat";
        }
        own.extend(["--repeat", "1", "--json", "--quiet"].map(OsString::from));
        compare::compare(common, &setting, &own)
    }

    /// The time of each stage: of a prompt, and of the tokens decoded behind it.
    fn staged(&self, model: &Model) -> Result<Value> {
        let streamed = model.weights().stream().is_some();
        let (mut prompt, mut decode) = (StageClock::new(streamed), StageClock::new(streamed));
        let (mut token, mut cache) = (tokens_of(model), model.new_cache(1));
        prompt.start();
        self.prompt(model, &mut cache, &mut token, &mut prompt)?;
        for _ in 0..self.decode {
            decode.start();
            model.forward(&[Segment::decode(0, token())], &mut cache, &mut decode)?;
        }
        let report = |clock: &StageClock| -> Value {
            let total: f64 = clock.stages().map(|(_, s)| s).sum();
            clock.stages().map(|(stage, s)| json!({ "stage": stage, "s": s, "share": s / total })).collect()
        };
        Ok(json!({ "prefill": report(&prompt), "decode": report(&decode) }))
    }

    /// A prompt of random tokens.
    fn prompt(
        &self,
        model: &Model,
        cache: &mut KvCache,
        token: &mut impl FnMut() -> u32,
        lens: &mut dyn Lens,
    ) -> Result<()> {
        let prompt: Vec<u32> = (0..self.prefill).map(|_| token()).collect();
        for chunk in prompt.chunks(PREFILL_CHUNK) {
            let segment = Segment { logits: LogitRows::Last, ..Segment::prompt(0, chunk.to_vec()) };
            model.forward(&[segment], cache, lens)?;
        }
        Ok(())
    }

    /// One prompt and one answer of random tokens, between whose tokens the memory's speed is measured.
    fn once(&self, model: &Model, lens: LensArg, bandwidth: &mut Bandwidth<'_>) -> Result<Run> {
        let map = ExpertMap::of(model.spec());
        let mut none = NoLens;
        let mut recorder = Recorder::new(&[Site::RouterLogits], None);
        let scale = Intervention {
            site: Site::Routing,
            layers: Indices::All,
            units: Indices::of(&[0]),
            positions: Indices::All,
            phase: PhaseSelector::All,
            op: Op::Scale { by: 1.0 },
        };
        let chosen: &mut dyn Lens = match lens {
            LensArg::None => &mut none,
            LensArg::Record => &mut recorder,
            LensArg::Intervene => &mut Interventions::prepare(&[scale], model.spec(), std::path::Path::new("."))?,
            LensArg::Profile => &mut Profiler::new(RouterStats::new(map)),
        };
        let (mut token, mut cache) = (tokens_of(model), model.new_cache(1));
        let before = stream::stats(model);
        let start = Instant::now();
        self.prompt(model, &mut cache, &mut token, chosen)?;
        let first_token_s = start.elapsed().as_secs_f64();
        let between = stream::stats(model);
        let mut tokens_s = Vec::with_capacity(self.decode);
        for i in 0..self.decode {
            if i % SAMPLE_EVERY == 0 {
                bandwidth.sample(model.pool());
            }
            let start = Instant::now();
            model.forward(&[Segment::decode(0, token())], &mut cache, chosen)?;
            tokens_s.push(start.elapsed().as_secs_f64());
        }
        let decode = self.decode as f64 / tokens_s.iter().sum::<f64>();
        let streamed = [between.since(&before), stream::stats(model).since(&between)];
        let (prefill, memory) = (self.prefill as f64 / first_token_s, bandwidth.take());
        Ok(Run { lens, prefill, decode, memory, first_token_s, tokens_s, streamed })
    }
}

/// Random tokens, always the same.
fn tokens_of(model: &Model) -> impl FnMut() -> u32 + use<> {
    let vocabulary = model.spec().vocab_size as u64;
    let mut state = 1u64;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocabulary) as u32
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    if n == 0 { f64::NAN } else { 0.5 * (values[(n - 1) / 2] + values[n / 2]) }
}

/// The smallest value that a share `q` of the values do not exceed.
fn quantile(values: &[f64], q: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let rank = (values.len() as f64 * q).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}
