//! `quorate run`: one prompt, one answer.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use quorate_eval::encode::encode_text;
use quorate_lens::{Interventions, Library, Nearest, retrieve};
use quorate_model::sampling::SamplingParams;
use quorate_model::text::Message;
use quorate_model::{Event, GenerateOptions, KvCache, Lens, Model, NoLens};
use serde_json::json;

use crate::common::{Common, human_bytes, interrupted};
use crate::experts::{ExpertArgs, kept_per_layer, load_plan, open};

/// Arguments of `run`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  quorate run \"78+95=\"
  quorate run \"What is the capital of Oman?\" --keep 8 --json
  quorate run \"<s>It is a truth universally\" --raw --task prose --max-tokens 40
  quorate run \"78+95=\" --plan plan.toml")]
pub struct Run {
    /// The prompt; `-` reads it from standard input
    prompt: String,
    /// Task whose experts are used: `auto` finds the nearest, `none` uses all experts
    #[arg(long, default_value = "auto")]
    task: String,
    /// Plan file: kept experts and interventions
    #[arg(long, value_name = "FILE", conflicts_with_all = ["task", "keep", "memory"])]
    plan: Option<PathBuf>,
    #[command(flatten)]
    experts: ExpertArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Take the text as it is, without chat template
    #[arg(long)]
    raw: bool,
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
        let (max_tokens, stop) = (self.max_tokens, self.stop.clone());
        GenerateOptions { max_tokens, stop, sampling, ..GenerateOptions::default() }
    }
}

impl Run {
    pub fn run(&self, common: &Common) -> Result<()> {
        let start = Instant::now();
        let (mut model, library) = open(common, &self.experts)?;
        let text = self.text()?;
        let prompt =
            if self.raw { encode_text(&model, &text)? } else { chat_prompt(&model, &[Message::new("user", text)])? };
        let mut found = None;
        let mut interventions = Interventions::default();
        let task = match &self.plan {
            Some(path) => {
                let (plan, prepared) = load_plan(&mut model, path)?;
                interventions = prepared;
                plan.task
            }
            None => {
                let choice = choose_task(common, &mut model, &library, &prompt, &self.task, &self.experts)?;
                found = choice.nearest;
                let context = prompt.len() + self.sampling.max_tokens;
                self.experts.load(&mut model, &library, choice.task.as_deref(), context)?;
                choice.task
            }
        };
        announce(common, &model, task.as_deref(), found.as_ref());

        let mut cache = KvCache::new(model.spec(), 1);
        let mut timing = Timing::new(start, prompt.len());
        let mut none = NoLens;
        let lens: &mut dyn Lens = if interventions.is_empty() { &mut none } else { &mut interventions };
        let options = self.sampling.options();
        let answer = model.generate(&prompt, 0, &mut cache, &options, lens, &mut |event| {
            timing.note(&event);
            if let (Event::Text(text), false) = (&event, common.json) {
                print!("{text}");
                let _ = std::io::stdout().flush(); // a closed pipe shows at the next line
            }
            !interrupted()
        })?;
        timing.end();
        if common.json {
            return common.print_json(&json!({
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
            }));
        }
        println!();
        common.note(&timing.summary());
        Ok(())
    }

    fn text(&self) -> Result<String> {
        if self.prompt != "-" {
            return Ok(self.prompt.clone());
        }
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut std::io::stdin(), &mut bytes)?;
        let text = String::from_utf8(bytes);
        text.map_err(|e| anyhow::anyhow!("standard input is not UTF-8 at byte {}", e.utf8_error().valid_up_to()))
    }
}

/// Tokens of a conversation in the model's chat template, ready for the answer.
pub fn chat_prompt(model: &Model, messages: &[Message]) -> Result<Vec<u32>> {
    let template = model.tokenizer().chat_template(false)?;
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
    if prompt.is_empty() {
        bail!("the prompt is empty; help: give some text");
    }
    let found = retrieve(model, library, &[prompt], experts.key.into())?.and_then(|mut found| found.pop());
    let Some(found) = found else {
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
        let rate = |r: Option<f64>| r.map_or("-".into(), |r| format!("{r:.0}"));
        format!(
            "prefill {} tokens at {}/s, decode {} tokens at {}/s, first token after {:.3} s",
            self.prompt_tokens,
            rate(self.prefill_rate()),
            self.tokens,
            rate(self.decode_rate()),
            self.first_token_s.unwrap_or(0.0),
        )
    }
}
