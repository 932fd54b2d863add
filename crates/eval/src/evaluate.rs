//! Answering task items and scoring the answers, many at a time.

use quorate_lens::LensError;
use quorate_model::{GenerateOptions, Lens, Model, ModelError, ops};

use crate::answer::exact_match;
use crate::encode::{EncodedItem, batches, encode_text, is_language_modelling};
use crate::tasks::TaskItem;

/// Tokens of one teacher-forced forward pass, about.
const BATCH_TOKENS: usize = 512;

/// How items are answered.
#[derive(Clone, Copy, Debug)]
pub struct EvalOptions {
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// Sequences that are answered at the same time.
    pub parallel: usize,
}

impl EvalOptions {
    /// Tokens of plain text that one forward pass scores, about.
    pub fn text_batch_tokens(&self) -> usize {
        BATCH_TOKENS.min(64 * self.parallel)
    }
}

impl Default for EvalOptions {
    fn default() -> EvalOptions {
        EvalOptions { max_tokens: 96, parallel: 48 }
    }
}

/// How one item went.
#[derive(Clone, Debug, PartialEq)]
pub enum ItemScore {
    /// A question: whether the generated answer is the wanted one, and what was generated.
    Exact {
        /// Whether it matches.
        ok: bool,
        /// The generated text.
        text: String,
    },
    /// Plain text.
    Text {
        /// Sum of negative log-likelihoods of the answer's tokens, in nats.
        nll: f64,
        /// Number of these tokens.
        tokens: usize,
        /// How many of them were the most likely ones.
        top1: usize,
    },
}

/// Scores of the items of one task.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TaskScore {
    /// Items.
    pub n: usize,
    /// Questions among them, and how many were answered rightly.
    pub questions: (usize, usize),
    /// Of the texts among them: nats, tokens, tokens predicted rightly.
    pub text: (f64, usize, usize),
}

impl TaskScore {
    /// Adds one item.
    pub fn add(&mut self, score: &ItemScore) {
        self.n += 1;
        match score {
            ItemScore::Exact { ok, .. } => {
                self.questions.0 += 1;
                self.questions.1 += usize::from(*ok);
            }
            ItemScore::Text { nll, tokens, top1 } => {
                self.text.0 += nll;
                self.text.1 += tokens;
                self.text.2 += top1;
            }
        }
    }

    /// Percent of the questions answered rightly; `None` if there are no questions.
    pub fn exact_match(&self) -> Option<f64> {
        (self.questions.0 > 0).then(|| 100.0 * self.questions.1 as f64 / self.questions.0 as f64)
    }

    /// Perplexity per token of the texts; `None` if there are no texts.
    pub fn perplexity(&self) -> Option<f64> {
        (self.text.1 > 0).then(|| (self.text.0 / self.text.1 as f64).exp())
    }

    /// Percent of the texts' tokens that were the most likely ones.
    pub fn top1(&self) -> Option<f64> {
        (self.text.1 > 0).then(|| 100.0 * self.text.2 as f64 / self.text.1 as f64)
    }
}

/// Answers and scores items; `on_done(items so far)` returning false stops, and what was scored so far is returned with
/// `None` for the rest.
///
/// # Errors
/// As [`Model::generate_many`].
pub fn evaluate(
    model: &Model,
    items: &[&TaskItem],
    options: &EvalOptions,
    lens: &mut dyn Lens,
    on_done: &mut dyn FnMut(usize) -> bool,
) -> Result<Vec<Option<ItemScore>>, LensError> {
    let mut scores = vec![None; items.len()];
    let (texts, questions): (Vec<usize>, Vec<usize>) = (0..items.len()).partition(|&i| is_language_modelling(items[i]));
    let mut done = 0;
    let batch_tokens = options.text_batch_tokens();
    if !score_texts(model, items, &texts, batch_tokens, &mut scores, lens, &mut |n| {
        done = n;
        on_done(n)
    })? {
        return Ok(scores);
    }
    let prompts = questions.iter().map(|&i| encode_text(model, &items[i].prompt)).collect::<Result<Vec<_>, _>>()?;
    let max_tokens = options.max_tokens;
    let generate = GenerateOptions { max_tokens, keep_special: true, ..GenerateOptions::default() };
    model.generate_many(&prompts, options.parallel, &generate, lens, &mut |index, answer| {
        let item = questions[index];
        let ok = exact_match(&answer.text, &items[item].answer);
        scores[item] = Some(ItemScore::Exact { ok, text: answer.text });
        done += 1;
        on_done(done)
    })?;
    Ok(scores)
}

fn score_texts(
    model: &Model,
    items: &[&TaskItem],
    texts: &[usize],
    batch_tokens: usize,
    scores: &mut [Option<ItemScore>],
    lens: &mut dyn Lens,
    on_done: &mut dyn FnMut(usize) -> bool,
) -> Result<bool, ModelError> {
    let encoded = texts.iter().map(|&i| EncodedItem::new(model, items[i])).collect::<Result<Vec<_>, _>>()?;
    for run in batches(&encoded, batch_tokens, 64) {
        let forced = teacher_forced(model, &encoded[run.clone()], lens)?;
        for (&item, forced) in texts[run.clone()].iter().zip(forced) {
            scores[item] = Some(forced);
        }
        if !on_done(run.end) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// One forward pass over items with their answers given; an [`ItemScore::Text`] for each.
///
/// # Errors
/// As [`Model::forward`].
pub fn teacher_forced(model: &Model, items: &[EncodedItem], lens: &mut dyn Lens) -> Result<Vec<ItemScore>, ModelError> {
    let mut cache = model.new_cache(items.len());
    let segments: Vec<_> = items.iter().enumerate().map(|(slot, item)| item.segment(slot)).collect();
    let forward = model.forward(&segments, &mut cache, lens)?;
    let Some(logits) = forward.logits else {
        return Err(ModelError::Lens("a lens stopped the pass before the logits".into()));
    };
    let logits = ops::values(&logits)?;
    let mut rows = logits.chunks_exact(model.spec().vocab_size);
    let mut scores = Vec::with_capacity(items.len());
    for item in items {
        let (mut nll, mut top1) = (0.0, 0);
        for &token in &item.answer {
            let row = rows.next().unwrap_or_default();
            let (loss, first) = token_loss(row, token as usize);
            nll += loss;
            top1 += usize::from(first);
        }
        rows.next(); // the last row predicts what follows the answer
        scores.push(ItemScore::Text { nll, tokens: item.answer.len(), top1 });
    }
    Ok(scores)
}

/// `-ln p(token)` and whether no other token is more likely.
fn token_loss(logits: &[f32], token: usize) -> (f64, bool) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&v| f64::from(v - max).exp()).sum();
    (sum.ln() - f64::from(logits[token] - max), logits[token] == max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_of_a_token() {
        let (loss, first) = token_loss(&[0.0, 3f32.ln()], 1);
        assert!((loss - (4f64 / 3.0).ln()).abs() < 1e-6 && first);
        assert!(!token_loss(&[0.0, 3f32.ln()], 0).1);
    }

    #[test]
    fn scores_add_up() {
        let mut score = TaskScore::default();
        score.add(&ItemScore::Exact { ok: true, text: String::new() });
        score.add(&ItemScore::Exact { ok: false, text: String::new() });
        score.add(&ItemScore::Text { nll: 2.0, tokens: 2, top1: 1 });
        assert_eq!((score.n, score.exact_match(), score.top1()), (3, Some(50.0), Some(50.0)));
        assert!((score.perplexity().unwrap() - 1f64.exp()).abs() < 1e-12);
        assert_eq!(TaskScore::default().exact_match(), None);
    }
}
