//! `quorate bench`: speed and memory of the loaded model.

use std::time::Instant;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use quorate_formats::{Checkpoint, DataFile};
use quorate_lens::{
    ExpertMap, Indices, Intervention, Interventions, Op, PhaseSelector, Profiler, Recorder, RouterStats,
};
use quorate_model::{KvCache, Lens, LogitRows, Model, NoLens, Segment, Site};
use quorate_residency::StreamStats;
use serde_json::{Value, json};

use crate::common::{Common, disk_read_bytes, human_bytes, interrupted, parse_count, peak_rss_bytes, say};
use crate::experts::{Beside, ExpertArgs, open};
use crate::stream;

/// Arguments of `bench`.
#[derive(Args)]
#[command(after_help = "\
Lenses are measured in turn with the bare model, so that ratios come from the same minute of the same machine.

Examples:
  quorate bench
  quorate bench --task arithmetic --keep 8 --repeat 9
  quorate bench --cold --task arithmetic --keep 8
  quorate bench --memory 60MiB --on-miss stream --cache lru
  quorate bench --lens none,record,intervene,profile --threads 2 --json")]
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
    first_token_s: f64,
    /// Seconds of each decoded token.
    tokens_s: Vec<f64>,
    /// What streaming did in the prompt, and in decoding.
    streamed: [StreamStats; 2],
}

impl Bench {
    pub fn run(&self, common: &Common) -> Result<()> {
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
        let first_run = self.once(&model, LensArg::None)?; // warms caches and buffers
        for repeat in 0..self.repeat {
            for (i, &lens) in self.lens.iter().enumerate() {
                runs.push(self.once(&model, lens)?);
                progress.set((repeat * self.lens.len() + i + 1) as u64);
                if interrupted() {
                    bail!("interrupted");
                }
            }
        }
        progress.finish();
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
        let document = json!({
            "model": common.model_path()?, "threads": model.pool().threads(), "memory_limit": self.experts.memory,
            "task": task, "prefill": self.prefill, "decode": self.decode,
            "prefill_tokens_per_s": median(first.iter().map(|r| r.prefill).collect()),
            "decode_tokens_per_s": median(first.iter().map(|r| r.decode).collect()),
            "time_to_first_token_s": median(first.iter().map(|r| r.first_token_s).collect()),
            "token_s": { "p50": quantile(&tokens_s, 0.5), "p90": quantile(&tokens_s, 0.9),
                "p99": quantile(&tokens_s, 0.99), "max": quantile(&tokens_s, 1.0) },
            "load_s": load_s, "peak_rss_bytes": peak_rss_bytes(),
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
            peak_rss_bytes().map_or("unknown".into(), human_bytes),
        )?;
        Ok(())
    }

    /// One prompt and one answer of random tokens.
    fn once(&self, model: &Model, lens: LensArg) -> Result<Run> {
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
        let vocabulary = model.spec().vocab_size as u64;
        let mut state = 1u64;
        let mut token = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % vocabulary) as u32
        };
        let mut cache = KvCache::new(model.spec(), 1);
        let prompt: Vec<u32> = (0..self.prefill).map(|_| token()).collect();
        let before = stream::stats(model);
        let start = Instant::now();
        for chunk in prompt.chunks(quorate_model::PREFILL_CHUNK) {
            model.forward(
                &[Segment { logits: LogitRows::Last, ..Segment::prompt(0, chunk.to_vec()) }],
                &mut cache,
                chosen,
            )?;
        }
        let first_token_s = start.elapsed().as_secs_f64();
        let between = stream::stats(model);
        let mut tokens_s = Vec::with_capacity(self.decode);
        for _ in 0..self.decode {
            let start = Instant::now();
            model.forward(&[Segment::decode(0, token())], &mut cache, chosen)?;
            tokens_s.push(start.elapsed().as_secs_f64());
        }
        let decode = self.decode as f64 / tokens_s.iter().sum::<f64>();
        let streamed = [between.since(&before), stream::stats(model).since(&between)];
        Ok(Run { lens, prefill: self.prefill as f64 / first_token_s, decode, first_token_s, tokens_s, streamed })
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
