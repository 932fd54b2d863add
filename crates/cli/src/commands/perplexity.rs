//! `quorate perplexity`: how well a model predicts a text.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use quorate_eval::encode::encode_text;
use quorate_eval::perplexity::Windows;
use quorate_lens::Interventions;
use serde_json::json;

use crate::common::{Common, interrupted, parse_count, read_text_file, say};
use crate::experts::load_plan;

/// Arguments of `perplexity`.
#[derive(Args)]
#[command(after_help = "\
The text is cut into windows of --context tokens, and of each window the second half is scored: the measure of \
llama-perplexity, so that the numbers can be compared.

Examples:
  quorate perplexity -m model.gguf notes.txt
  quorate perplexity -m mixtral/ wiki.txt --plan plan.toml --context 2048 --windows 20")]
pub struct Perplexity {
    /// File with the text
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Tokens of a window
    #[arg(long, default_value_t = 512, value_name = "N", value_parser = parse_count)]
    context: usize,
    /// Windows at most, from the text's beginning
    #[arg(long, value_name = "N", value_parser = parse_count)]
    windows: Option<usize>,
    /// Plan file: kept experts and interventions
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
}

impl Perplexity {
    pub fn run(&self, common: &Common) -> Result<()> {
        let text = read_text_file(&self.file)?;
        let mut model = common.open_model(None)?;
        let longest = model.spec().max_position_embeddings;
        if !(4..=longest).contains(&self.context) {
            bail!("a window of {} tokens is not possible; help: --context takes 4 to {longest}", self.context);
        }
        let mut tokens = encode_text(&model, &text)?;
        let bos = model.tokenizer().bos_token().and_then(|token| model.tokenizer().token_to_id(token));
        let bos = bos.filter(|id| tokens.first() == Some(id));
        if tokens.len() < self.context {
            bail!(
                "the text has {} tokens, fewer than a window of {}; help: lower --context",
                tokens.len(),
                self.context
            );
        }
        tokens.truncate(self.windows.map_or(usize::MAX, |n| n.saturating_mul(self.context)));
        let windows = Windows::new(&tokens, bos, self.context);
        let mut interventions = Interventions::default();
        match &self.plan {
            Some(path) => interventions = load_plan(common, &mut model, path, None)?.1,
            None => common.load_all_experts(&mut model)?,
        }
        let start = Instant::now();
        let mut progress = common.progress("perplexity", windows.len() as u64, "windows");
        let score = windows.score(&model, &mut interventions, &mut |done, _| {
            progress.set(done as u64);
            !interrupted()
        })?;
        progress.finish();
        if interrupted() {
            bail!("interrupted");
        }
        let (nats, scored, _) = score.text;
        let seconds = start.elapsed().as_secs_f64();
        if common.json {
            return common.print_json(&json!({
                "perplexity": score.perplexity(), "nats": nats, "scored_tokens": scored, "top1": score.top1(),
                "windows": windows.len(), "context": self.context, "seconds": seconds,
            }));
        }
        say!(
            "perplexity {:.4} over {scored} tokens in {} windows of {}; top-1 {:.1} %; {seconds:.1} s",
            score.perplexity().unwrap_or(f64::NAN),
            windows.len(),
            self.context,
            score.top1().unwrap_or(f64::NAN),
        )?;
        Ok(())
    }
}
