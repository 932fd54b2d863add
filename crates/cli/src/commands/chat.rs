//! `quorate chat`: a conversation.

use std::io::{BufRead, IsTerminal, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use quorate_model::text::Message;
use quorate_model::{ModelError, NoLens};
use serde_json::json;

use super::run::{SamplingArgs, Shown, Timing, announce, chat_prompt, choose_task};
use crate::common::{Common, interrupted, say, wait_for};
use crate::experts::{Beside, ExpertArgs, open};
use crate::stream;

/// Arguments of `chat`.
#[derive(Args)]
#[command(after_help = "\
The first message fixes the task's experts for the whole conversation, unless --each-message is given.
With --json each answer is one JSON document per line. An empty line or Ctrl-D ends the conversation.

Examples:
  quorate chat
  printf 'What is the capital of Oman?\\n' | quorate chat --keep 8
  quorate chat --task bios --system \"Answer briefly.\"")]
pub struct Chat {
    /// Task whose experts are used: `auto` finds the one nearest to the first message, `none` uses all experts
    #[arg(long, default_value = "auto")]
    task: String,
    /// Find the nearest task anew for each message
    #[arg(long)]
    each_message: bool,
    /// System message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    experts: ExpertArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

impl Chat {
    pub fn run(&self, common: &Common) -> Result<()> {
        let (mut model, library) = open(common, &self.experts, &self.task)?;
        let mut messages: Vec<Message> = self.system.iter().map(|s| Message::new("system", s.clone())).collect();
        let begin = messages.len();
        let context = model.spec().max_position_embeddings;
        let mut cache = model.new_cache(1);
        let mut held: Vec<u32> = Vec::new(); // tokens whose keys and values the cache holds
        let mut task: Option<Option<String>> = None;
        let options = self.sampling.options();
        let mut failed = false;
        while let Some(line) = read_line()? {
            let start = Instant::now();
            messages.push(Message::new("user", line.clone()));
            let mut prompt = chat_prompt(&model, &messages)?;
            let room = self.sampling.max_tokens.min(context / 4);
            while prompt.len() + room > context && messages.len() > begin + 1 {
                common.note(&format!("the oldest messages are left out: the model's context has {context} tokens"));
                messages.drain(begin..begin + 2); // a question and its answer
                prompt = chat_prompt(&model, &messages)?;
            }
            if task.is_none() || self.each_message {
                let first = chat_prompt(&model, &[Message::new("user", line)])?;
                let choice = choose_task(common, &mut model, &library, &first, &self.task, &self.experts)?;
                let beside = Beside::sequence(model.spec(), usize::MAX);
                // Loaded even for the same task: keys of a later layer need other experts for a moment.
                self.experts.load(common, &mut model, &library, choice.task.as_deref(), beside)?;
                if task.as_ref() != Some(&choice.task) {
                    announce(common, &model, choice.task.as_deref(), choice.nearest.as_ref());
                    held.clear(); // other experts, other keys and values
                    task = Some(choice.task);
                }
            }
            let shared = held.iter().zip(&prompt).take_while(|(a, b)| a == b).count().min(prompt.len() - 1);
            cache.truncate(0, shared);
            let shared = cache.len(0); // a recurrent state cannot be taken back
            let mut timing = Timing::new(start, prompt.len() - shared);
            let mut shown = Shown::new(common);
            let before = stream::stats(&model);
            let answer = model.generate(&prompt[shared..], 0, &mut cache, &options, &mut NoLens, &mut |event| {
                timing.note(&event);
                shown.show(&event) && !interrupted()
            });
            timing.end();
            let answer = match answer {
                Ok(answer) => answer,
                // A file that cannot be read now may be there for the next message.
                Err(error @ (ModelError::Residency(_) | ModelError::Format(_))) => {
                    shown.end()?;
                    let error = format!("{:#}", anyhow::Error::from(error));
                    if common.json {
                        say!("{}", json!({ "error": error }))?;
                    }
                    common.note(&format!("error: {error}"));
                    (held, failed) = (cache.tokens(0).to_vec(), true);
                    messages.pop();
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            shown.end()?;
            held = prompt;
            held.extend(&answer.tokens);
            held.truncate(cache.len(0));
            if common.json {
                let document = json!({
                    "text": answer.text, "tokens": answer.tokens, "task": task.clone().flatten(),
                    "cached_tokens": shared, "finish": answer.finish.name(),
                    "decode_tokens_per_s": timing.decode_rate(), "time_to_first_token_s": timing.first_token_s,
                    "stream": stream::report(&model, &stream::stats(&model).since(&before)),
                });
                say!("{document}")?;
            } else {
                common.note(&timing.summary());
                if model.weights().stream().is_some() {
                    common.note(&stream::summary(&stream::stats(&model).since(&before)));
                }
            }
            messages.push(Message::new("assistant", answer.text));
            if interrupted() {
                bail!("interrupted");
            }
        }
        if failed {
            bail!("not every message was answered");
        }
        Ok(())
    }
}

/// The next message; `None` at the end.
fn read_line() -> Result<Option<String>> {
    if std::io::stdin().is_terminal() {
        let _ = write!(std::io::stderr(), "> "); // only a sign that it is the user's turn
    }
    let mut bytes = Vec::new();
    wait_for(|| std::io::stdin().lock().read_until(b'\n', &mut bytes)).context("cannot read standard input")?;
    let line = String::from_utf8(bytes).context("the message is no UTF-8 text; help: convert it to UTF-8")?;
    let line = line.trim_end_matches(['\n', '\r']);
    Ok((!line.is_empty()).then(|| line.to_string()))
}
