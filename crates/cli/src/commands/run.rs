//! `quorate run`: one prompt, one answer.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::Args;
use quorate_eval::encode::encode_text;
use quorate_lens::{Interventions, Library, Nearest, retrieve};
use quorate_methods::experts::rerouting::{FitOptions, Rerouter, Rerouting};
use quorate_model::sampling::SamplingParams;
use quorate_model::text::Message;
use quorate_model::{Event, GenerateOptions, Model};
use serde_json::json;

use crate::common::{Common, as_text, human_bytes, interrupted, peak_rss_bytes, say, wait_for};
use crate::experts::{Beside, ExpertArgs, kept_per_layer, load_plan, open};
use crate::stream;

/// Arguments of `run`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  quorate run \"78+95=\"
  quorate run \"What is the capital of Oman?\" --keep 8 --json
  quorate run \"<s>It is a truth universally\" --raw --task prose --max-tokens 40
  quorate run \"78+95=\" --plan plan.toml
  quorate run \"78+95=\" --memory 60MiB --on-miss stream
  quorate run \"78+95=\" --reroute --json")]
pub struct Run {
    /// The prompt; `-` reads it from standard input
    prompt: String,
    /// Task whose experts are used: `auto` finds the nearest, `none` uses all experts
    #[arg(long, default_value = "auto")]
    task: String,
    /// Plan file: kept experts and interventions
    #[arg(long, value_name = "FILE", conflicts_with_all = ["task", "keep", "metric", "scope", "mode", "protect", "protect_file"])]
    plan: Option<PathBuf>,
    #[command(flatten)]
    experts: ExpertArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Take the text as it is, without chat template
    #[arg(long)]
    raw: bool,
    /// Fit vectors on the router logits to the text so far, before the answer and on the way (`quorate rerouting`)
    #[arg(long)]
    reroute: bool,
    #[command(flatten, next_help_heading = "Options of --reroute")]
    fit: FitOptions,
}

/// How tokens are chosen and when to stop; shared with `chat`.
#[derive(Args, Clone, Debug)]
pub struct SamplingArgs {
    /// Most tokens to generate
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub max_tokens: usize,
    /// 0 takes the most likely token; higher is more random
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Choose among this many most likely tokens (0: all)
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub top_k: usize,
    /// Choose among the most likely tokens with this share of the probability
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    pub top_p: f32,
    /// Leave out tokens with less than this times the top probability
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    pub min_p: f32,
    /// Above 1, tokens that occurred are made less likely
    #[arg(long, default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Seed of the random choice
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Go on after tokens that end an answer
    #[arg(long)]
    pub ignore_eos: bool,
    /// Text that ends the answer; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
}

impl SamplingArgs {
    /// The options of a generation.
    pub fn options(&self) -> GenerateOptions {
        let sampling = SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        };
        let (max_tokens, stop, ignore_eos) = (self.max_tokens, self.stop.clone(), self.ignore_eos);
        // Special tokens are shown: `</think>` tells where the answer begins.
        GenerateOptions { max_tokens, stop, sampling, ignore_eos, keep_special: true }
    }
}

impl Run {
    pub fn run(&self, common: &Common) -> Result<()> {
        let start = Instant::now();
        let text = self.text()?;
        let (mut model, library) = open(common, &self.experts, &self.task)?;
        let prompt =
            if self.raw { encode_text(&model, &text)? } else { chat_prompt(&model, &[Message::new("user", text)])? };
        let mut found = None;
        let mut interventions = Interventions::default();
        let tokens = prompt.len().saturating_add(self.sampling.max_tokens);
        let beside = Beside::sequence(model.spec(), tokens);
        let task = match &self.plan {
            Some(path) => {
                let (plan, prepared) = load_plan(common, &mut model, path, Some((&self.experts, beside)))?;
                interventions = prepared;
                plan.task
            }
            None => {
                let choice = choose_task(common, &mut model, &library, &prompt, &self.task, &self.experts)?;
                found = choice.nearest;
                self.experts.load(common, &mut model, &library, choice.task.as_deref(), beside)?;
                choice.task
            }
        };
        announce(common, &model, task.as_deref(), found.as_ref());
        if self.reroute && !interventions.is_empty() {
            bail!("--reroute cannot fit through a plan's interventions; help: leave one of the two out");
        }

        if self.reroute && model.weights().stream().is_some() {
            bail!("--reroute needs gradients, which do not go through streamed experts; help: leave --on-miss out");
        }
        let mut cache = model.new_cache(1);
        let before = stream::stats(&model);
        let mut timing = Timing::new(start, prompt.len());
        let mut rerouter = match self.reroute {
            true => Some(Rerouter::new(&model, Rerouting::new(model.spec(), &self.fit)?)?),
            false => None,
        };
        let options = self.sampling.options();
        let mut shown = Shown::new(common);
        let mut on = |event: Event<'_>| {
            timing.note(&event);
            shown.show(&event) && !interrupted()
        };
        let answer = match &mut rerouter {
            Some(guide) => model.generate_guided(&prompt, 0, &mut cache, &options, guide, &mut on),
            None => model.generate(&prompt, 0, &mut cache, &options, &mut interventions, &mut on),
        }?;
        let fits = rerouter.map(|r| r.fits).unwrap_or_default();
        timing.end();
        shown.end()?;
        if common.json {
            common.print_json(&json!({
                "text": answer.text,
                "tokens": answer.tokens,
                "finish": answer.finish.name(),
                "task": task,
                "nearest": found.as_ref().map(|n| &n.name),
                "distance": found.as_ref().map(|n| n.distance),
                "familiar": found.as_ref().map(|n| n.familiar),
                "kept_per_layer": kept_per_layer(&model),
                "resident_bytes": model.weights().resident_bytes(),
                "bytes_read": model.weights().bytes_read(),
                "model_bytes": model.weights().model_bytes(),
                "prompt_tokens": prompt.len(),
                "prefill_tokens_per_s": timing.prefill_rate(),
                "decode_tokens_per_s": timing.decode_rate(),
                "time_to_first_token_s": timing.first_token_s,
                "peak_rss_bytes": peak_rss_bytes(),
                "stream": stream::report(&model, &stream::stats(&model).since(&before)),
                "fits": self.reroute.then_some(&fits),
            }))?;
        } else {
            fits.iter().for_each(|fit| common.note(&fit.to_string()));
            common.note(&timing.summary());
            if model.weights().stream().is_some() {
                common.note(&stream::summary(&stream::stats(&model).since(&before)));
            }
        }
        if interrupted() {
            bail!("interrupted");
        }
        Ok(())
    }

    /// The prompt. From standard input, one line end behind it does not count, except with `--raw`.
    fn text(&self) -> Result<String> {
        let mut text = self.prompt.clone();
        if text == "-" {
            let mut bytes = Vec::new();
            wait_for(|| std::io::stdin().read_to_end(&mut bytes)).context("cannot read standard input")?;
            text = as_text(bytes, "standard input")?;
            if !self.raw {
                text.truncate(text.trim_end_matches(['\r', '\n']).len());
            }
        }
        if text.is_empty() {
            bail!("the prompt is empty; help: give some text");
        }
        Ok(text)
    }
}

/// The answer on stdout as it comes; nothing with `--json`.
pub struct Shown {
    quiet: bool,
    written: std::io::Result<()>,
}

impl Shown {
    /// Nothing shown yet.
    pub fn new(common: &Common) -> Shown {
        Shown { quiet: common.json, written: Ok(()) }
    }

    /// Shows the text of an event; `false` if nobody can read it.
    pub fn show(&mut self, event: &Event<'_>) -> bool {
        if let (Event::Text(text), false) = (event, self.quiet) {
            let mut out = std::io::stdout().lock();
            self.written = write!(out, "{text}").and_then(|()| out.flush());
        }
        self.written.is_ok()
    }

    /// Ends the line.
    pub fn end(self) -> Result<()> {
        self.written?;
        if !self.quiet {
            say!()?;
        }
        Ok(())
    }
}

/// Tokens of a conversation in the model's chat template, ready for the answer.
pub fn chat_prompt(model: &Model, messages: &[Message]) -> Result<Vec<u32>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let template = model.tokenizer().chat_template(false)?.with_time(i64::try_from(now).unwrap_or(0));
    let text = template.render(messages, None, &serde_json::Map::new(), true)?;
    Ok(model.tokenizer().encode(&text, false)?)
}

/// Which task's experts to use.
pub struct TaskChoice {
    /// The pattern; `None` uses all experts.
    pub task: Option<String>,
    /// What retrieval found, if it was asked.
    pub nearest: Option<Nearest>,
}

/// Follows `--task`: `auto`, `none` or a name.
pub fn choose_task(
    common: &Common,
    model: &mut Model,
    library: &Library,
    prompt: &[u32],
    task: &str,
    experts: &ExpertArgs,
) -> Result<TaskChoice> {
    match task {
        "none" => return Ok(TaskChoice { task: None, nearest: None }),
        "auto" if !model.spec().is_moe() => return Ok(TaskChoice { task: None, nearest: None }),
        "auto" => {}
        name => return Ok(TaskChoice { task: Some(name.to_string()), nearest: None }),
    }
    let found = retrieve(model, library, &[prompt], experts.key.into())?.and_then(|mut found| found.pop());
    let Some(found) = found else {
        if let Some(k) = experts.keep {
            bail!(
                "no patterns of this model yet to choose {k} experts by; help: make them with `quorate profile --tasks DIR`"
            );
        }
        common.note("no patterns of this model yet, so all experts are loaded; help: quorate profile --tasks DIR");
        return Ok(TaskChoice { task: None, nearest: None });
    };
    Ok(TaskChoice { task: Some(found.task), nearest: Some(found.nearest) })
}

/// Says which experts were loaded and why.
pub fn announce(common: &Common, model: &Model, task: Option<&str>, nearest: Option<&Nearest>) {
    let why = match (task, nearest) {
        (None, _) => "all experts".to_string(),
        (Some(task), Some(n)) if n.familiar => format!("nearest task: {task} (distance {:.3})", n.distance),
        (Some(task), Some(n)) => {
            format!("unfamiliar prompt (nearest task {} at distance {:.3}); using {task}", n.name, n.distance)
        }
        (Some(task), None) => format!("task: {task}"),
    };
    if let Some(streaming) = stream::described(model) {
        return common.note(&format!("{why}; {streaming}"));
    }
    let weights = model.weights();
    let all: usize = model.spec().moe_layers().iter().filter_map(|&l| model.spec().moe(l)).map(|m| m.n_experts).sum();
    common.note(&format!(
        "{why}; loaded {} of {all} experts, {} of {} in memory, {} read",
        weights.experts_resident(),
        human_bytes(weights.resident_bytes()),
        human_bytes(weights.model_bytes()),
        human_bytes(weights.bytes_read()),
    ));
}

/// Clock of one generation.
pub struct Timing {
    start: Instant,
    prompt_tokens: usize,
    begin: Instant,
    prefilled: Option<Instant>,
    last: Instant,
    tokens: usize,
    /// From the start of the command to the first token.
    pub first_token_s: Option<f64>,
}

impl Timing {
    /// Starts; `start` is when the user asked.
    pub fn new(start: Instant, prompt_tokens: usize) -> Timing {
        let now = Instant::now();
        Timing { start, prompt_tokens, begin: now, prefilled: None, last: now, tokens: 0, first_token_s: None }
    }

    /// Notes an event.
    pub fn note(&mut self, event: &Event<'_>) {
        self.last = Instant::now();
        match event {
            Event::Prefilled(_) => self.prefilled = Some(self.last),
            Event::Token(_) => {
                self.tokens += 1;
                self.first_token_s.get_or_insert(self.start.elapsed().as_secs_f64());
            }
            Event::Text(_) => {}
        }
    }

    /// The generation is over.
    pub fn end(&mut self) {
        self.last = Instant::now();
    }

    /// Prompt tokens per second.
    pub fn prefill_rate(&self) -> Option<f64> {
        self.prefilled.map(|p| self.prompt_tokens as f64 / (p - self.begin).as_secs_f64().max(1e-9))
    }

    /// Generated tokens per second after the prefill.
    pub fn decode_rate(&self) -> Option<f64> {
        let prefilled = self.prefilled.filter(|_| self.tokens > 0)?;
        Some(self.tokens as f64 / (self.last - prefilled).as_secs_f64().max(1e-9))
    }

    /// One line.
    pub fn summary(&self) -> String {
        let rate = |r: Option<f64>| r.map_or(String::new(), |r| format!(" at {r:.0}/s"));
        let first = self.first_token_s.map_or(String::new(), |s| format!(", first token after {s:.3} s"));
        let (prefill, decode) = (rate(self.prefill_rate()), rate(self.decode_rate()));
        format!("prefill {} tokens{prefill}, decode {} tokens{decode}{first}", self.prompt_tokens, self.tokens)
    }
}
