//! Questions behind a passage that says other than the model knows: what Router Lens and CEFT train and measure on.

use std::ops::Range;

use candle_core::Tensor;
use clap::Args;
use quorate_eval::encode::{EncodedItem, encode_text_with_offsets};
use quorate_eval::evaluate::ItemScore;
use quorate_eval::tasks::TaskItem;
use quorate_lens::{ExpertId, ExpertMap, Op, PhaseSelector, on_experts};
use quorate_model::{At, Flow, Lens, ModelError, NoLens, Overlay, Phase, Site, SiteSet, ops};
use quorate_train::{Example, Schedule, TrainOptions};
use serde::Serialize;
use serde_json::Value;

use crate::{Lab, MethodError};

/// Where questions with a passage come from.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Source {
    /// The task whose prompts hold a passage and a question
    #[arg(long, default_value = "context")]
    pub task: String,
    /// Field of `meta` with the answer by the passage; without it, the item's answer
    #[arg(long, default_value = "context_answer", value_name = "FIELD")]
    pub wanted: String,
    /// Field of `meta` with the answer by memory; items where it is the same or null are left out
    #[arg(long, default_value = "memory_answer", value_name = "FIELD")]
    pub memory: String,
    /// Words that say where the answer is to be sought; they are taken out of prompts
    #[arg(long, num_args = 0.., default_values = ["According to the passage, ", "From memory, "], value_name = "TEXT")]
    pub cues: Vec<String>,
    /// What stands before the passage
    #[arg(long, default_value = "Passage: ", value_name = "TEXT")]
    pub before: String,
    /// What stands behind the passage; left out, the end of the line
    #[arg(long, value_name = "TEXT")]
    pub behind: Option<String>,
}

/// How weights are trained.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Tuning {
    /// Steps
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
    /// Items of a step
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub batch: usize,
    /// Evaluations on the validation items; the best one's weights are kept
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub evaluations: u64,
    /// Numerator of the scale of low-rank terms
    #[arg(long, default_value_t = 32.0)]
    pub alpha: f32,
}

impl Tuning {
    /// Options of a training with this learning rate: cosine down to zero behind a warm-up of a tenth.
    pub fn options(&self, rate: f64, seed: u64) -> TrainOptions {
        TrainOptions {
            steps: self.steps,
            batch: self.batch,
            schedule: Schedule { peak: rate, warmup: self.steps / 10, floor: 0.0 },
            seed,
            eval_every: self.steps.div_ceil(self.evaluations),
            ..TrainOptions::default()
        }
    }
}

/// A question behind a passage.
#[derive(Clone, Debug)]
pub struct Question {
    /// The prompt, and the answer by the passage with the token that ends it.
    pub text: EncodedItem,
    /// The prompt with the answer by memory.
    pub memory: Option<EncodedItem>,
    /// Prompt tokens of the passage.
    pub passage: Vec<usize>,
    /// Prompt tokens of the answer in the passage; empty if it is not there word for word.
    pub answer: Vec<usize>,
}

impl Question {
    /// The question as an example to learn.
    pub fn example(&self) -> Example {
        Example { prompt: self.text.prompt.clone(), answer: self.text.answer.clone() }
    }
}

impl Source {
    /// The questions of a split.
    ///
    /// # Errors
    /// A task without questions of this kind, or without a passage in a prompt.
    pub fn questions(&self, lab: &mut Lab<'_>, split: &str) -> Result<Vec<Question>, MethodError> {
        let items = lab.task(split, &self.task)?.items;
        let mut questions = Vec::new();
        for item in items.iter().filter(|item| self.contradicts(item)) {
            questions.push(self.question(lab, item)?);
        }
        if questions.is_empty() {
            let what = format!("no item of `{}` ({split}) contradicts what the model knows", self.task);
            let help = format!("items need two answers, in `meta`: `{}` and `{}`", self.wanted, self.memory);
            return Err(MethodError::needs(what, help));
        }
        Ok(questions)
    }

    /// The items of the test split as they stand, cues and own answers included: what tuning for the passage must not harm.
    ///
    /// # Errors
    /// Task files that cannot be read, or as [`Lab::encode`].
    pub fn as_written(&self, lab: &mut Lab<'_>) -> Result<Vec<EncodedItem>, MethodError> {
        let items = lab.task("test", &self.task)?.items;
        let mut encoded = lab.encode(&items)?;
        let (end, context) = (lab.model.spec().eos_token_ids.first(), lab.model.spec().max_position_embeddings);
        encoded.iter_mut().filter(|item| item.len() < context).for_each(|item| item.answer.extend(end));
        Ok(encoded)
    }

    /// Whether passage and memory answer differently; true where nothing is said of memory.
    fn contradicts(&self, item: &TaskItem) -> bool {
        match item.meta.get(&self.memory) {
            None => true,
            Some(Value::String(memory)) => memory != self.wanted_of(item),
            Some(_) => false,
        }
    }

    fn wanted_of<'i>(&self, item: &'i TaskItem) -> &'i str {
        item.meta.get(&self.wanted).and_then(Value::as_str).unwrap_or(&item.answer)
    }

    fn question(&self, lab: &Lab<'_>, item: &TaskItem) -> Result<Question, MethodError> {
        let prompt = without_cues(&item.prompt, &self.cues);
        let wanted = self.wanted_of(item);
        let passage = between(&prompt, &self.before, self.behind.as_deref().unwrap_or("\n")).ok_or_else(|| {
            let what = format!("a prompt of `{}` has no passage: {prompt}", self.task);
            MethodError::needs(what, "say what stands --before and --behind the passage")
        })?;
        let tokens = encode_text_with_offsets(&lab.model, &prompt)?;
        let covering = |bytes: Range<usize>| {
            let chars = prompt[..bytes.start].chars().count()..prompt[..bytes.end].chars().count();
            let inside = |t: &Range<usize>| t.start < chars.end && t.end > chars.start;
            (0..tokens.len()).filter(|&i| inside(&tokens[i].chars)).collect::<Vec<_>>()
        };
        let found = prompt[passage.clone()].find(wanted).map(|at| passage.start + at);
        let answer = found.map_or_else(Vec::new, |at| covering(at..at + wanted.len()));
        let ids: Vec<u32> = tokens.iter().map(|t| t.id).collect();
        let with = |text: &str| -> Result<EncodedItem, MethodError> {
            let mut answer = lab.model.tokenizer().encode(text, false).map_err(ModelError::from)?;
            answer.extend(lab.model.spec().eos_token_ids.first());
            let encoded = EncodedItem { prompt: ids.clone(), answer };
            let context = lab.model.spec().max_position_embeddings;
            if encoded.len() > context {
                let what = format!("a question has {} tokens, the model's context is {context}", encoded.len());
                return Err(MethodError::needs(what, "leave it out of the task file"));
            }
            Ok(encoded)
        };
        let memory = item.meta.get(&self.memory).and_then(Value::as_str).map(&with).transpose()?;
        Ok(Question { text: with(wanted)?, memory, passage: covering(passage), answer })
    }
}

/// A prompt without the words that say where to look; what follows them begins a sentence.
fn without_cues(prompt: &str, cues: &[String]) -> String {
    let mut text = prompt.to_string();
    for cue in cues.iter().filter(|cue| !cue.is_empty()) {
        if let Some((before, behind)) = text.split_once(cue.as_str()) {
            let mut rest = behind.chars();
            let first: String = rest.next().map(|c| c.to_uppercase().collect()).unwrap_or_default();
            text = format!("{before}{first}{}", rest.as_str());
        }
    }
    text
}

/// Bytes between two marks, the second the first behind the first.
fn between(text: &str, before: &str, behind: &str) -> Option<Range<usize>> {
    let start = text.find(before)? + before.len();
    let end = start + text[start..].find(behind)?;
    (end > start).then_some(start..end)
}

/// How questions were answered: percent by the passage and by memory, the whole answer with its end.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rates {
    /// By the passage.
    pub passage: f64,
    /// By memory; `None` if that answer is not known.
    pub memory: Option<f64>,
}

/// Answers questions with an overlay over the model and experts masked.
///
/// # Errors
/// As [`Lab::losses`].
pub fn rates(
    lab: &mut Lab<'_>,
    stage: &str,
    questions: &[Question],
    overlay: &Overlay,
    masked: &[ExpertId],
) -> Result<Rates, MethodError> {
    let by_passage: Vec<EncodedItem> = questions.iter().map(|q| q.text.clone()).collect();
    let by_memory: Vec<EncodedItem> = questions.iter().filter_map(|q| q.memory.clone()).collect();
    under(lab, overlay, |lab| {
        let passage = answered(lab, stage, &by_passage, masked)?.unwrap_or(0.0);
        Ok(Rates { passage, memory: answered(lab, stage, &by_memory, masked)? })
    })
}

/// Percent of items that are answered as given, with experts masked; `None` of none.
///
/// An answer counts if each of its tokens, the ending one too, is the most likely after those before it: then greedy
/// generation gives it.
///
/// # Errors
/// As [`Lab::losses`].
pub fn answered(
    lab: &mut Lab<'_>,
    stage: &str,
    items: &[EncodedItem],
    masked: &[ExpertId],
) -> Result<Option<f64>, MethodError> {
    let mask = on_experts(masked, Site::RouterLogits, PhaseSelector::All, &Op::Mask);
    let scores = match mask.is_empty() {
        true => lab.losses(stage, items, &mut NoLens)?,
        false => lab.losses(stage, items, &mut lab.prepare(&mask)?)?,
    };
    let whole = |s: &&ItemScore| matches!(s, ItemScore::Text { tokens, top1, .. } if tokens == top1);
    let hits = scores.iter().filter(whole).count() as f64;
    Ok((!items.is_empty()).then(|| 100.0 * hits / items.len() as f64))
}

/// Does something with an overlay over the model, and takes it off again.
///
/// # Errors
/// Those of what is done, or an overlay that does not fit.
pub fn under<'a, T>(
    lab: &mut Lab<'a>,
    overlay: &Overlay,
    work: impl FnOnce(&mut Lab<'a>) -> Result<T, MethodError>,
) -> Result<T, MethodError> {
    let before = lab.model.take_overlay();
    lab.model.set_overlay(overlay.clone())?;
    let result = work(lab);
    lab.model.set_overlay(before)?;
    result
}

/// The `n` most used experts of each layer; of equally used ones the first.
pub fn most_used(map: &ExpertMap, counts: &[u64], n: usize) -> Vec<usize> {
    let of_layer = |moe: usize| {
        let mut units: Vec<usize> = map.range(moe).collect();
        units.sort_by_key(|&u| (std::cmp::Reverse(counts[u]), u));
        units.truncate(n);
        units
    };
    (0..map.n_layers()).flat_map(of_layer).collect()
}

/// What the last prompt token sees and says in each layer, mean over questions.
#[derive(Clone, Debug, Default)]
pub struct Insight {
    /// Attention to the passage, mean over heads, `[layer]`.
    pub to_passage: Vec<f64>,
    /// Attention to the answer in the passage.
    pub to_answer: Vec<f64>,
    /// Probability of the first token of the passage's answer by the logit lens.
    pub passage: Vec<f64>,
    /// Probability of the first token of memory's answer.
    pub memory: Vec<f64>,
}

/// Collects attention and residual stream of the last prompt token of each question.
struct LastToken<'q> {
    questions: &'q [Question],
    layers: usize,
    first: usize,
    to_passage: Vec<f64>,
    to_answer: Vec<f64>,
    streams: Vec<Vec<f32>>,
}

impl Lens for LastToken<'_> {
    fn sites(&self, layer: usize) -> SiteSet {
        if layer < self.layers { SiteSet::of(&[Site::AttnPattern, Site::ResidPost]) } else { SiteSet::NONE }
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        let x = ops::values(value)?;
        let width = x.len() / at.rows.len();
        for (i, span) in at.rows.spans.iter().enumerate() {
            let last = (span.row0..span.row0 + span.len).rfind(|&row| at.rows.phase[row] == Phase::PromptLast);
            let Some(row) = last.map(|row| &x[row * width..(row + 1) * width]) else { continue };
            let question = &self.questions[self.first + i];
            if at.site == Site::ResidPost {
                self.streams[at.layer].extend_from_slice(row);
                continue;
            }
            let (heads, keys) = (value.dim(1)?, value.dim(2)?);
            let sum = |tokens: &[usize]| -> f64 {
                let of_head = |h: usize| tokens.iter().map(move |&s| f64::from(row[h * keys + s])).sum::<f64>();
                (0..heads).map(of_head).sum::<f64>() / heads as f64
            };
            self.to_passage[at.layer] += sum(&question.passage);
            self.to_answer[at.layer] += sum(&question.answer);
        }
        Ok(Flow::Continue)
    }
}

/// Looks at the last prompt token of questions.
///
/// # Errors
/// As [`Lab::observe`].
pub fn insight(lab: &mut Lab<'_>, questions: &[Question]) -> Result<Insight, MethodError> {
    let (layers, n) = (lab.model.spec().layers.len(), questions.len());
    let zeros = || vec![0.0; layers];
    let mut lens = LastToken {
        questions,
        layers,
        first: 0,
        to_passage: zeros(),
        to_answer: zeros(),
        streams: vec![Vec::new(); layers],
    };
    let prompt = |q: &Question| EncodedItem { prompt: q.text.prompt.clone(), answer: Vec::new() };
    let prompts: Vec<EncodedItem> = questions.iter().map(prompt).collect();
    lab.observe("looking at the last prompt token", &prompts, &mut lens, |lens, first| lens.first = first)?;
    let mut insight = Insight { passage: zeros(), memory: zeros(), ..Insight::default() };
    let d = lab.model.spec().hidden_size;
    for (layer, stream) in lens.streams.into_iter().enumerate() {
        let logits = lab.model.unembed(&ops::tensor(stream, &[n, d])?)?;
        let logits = ops::values(&logits)?;
        for (row, question) in logits.chunks_exact(logits.len() / n.max(1)).zip(questions) {
            let p = |item: &EncodedItem| probability(row, item.answer.first().copied());
            insight.passage[layer] += p(&question.text) / n as f64;
            insight.memory[layer] += question.memory.as_ref().map_or(0.0, p) / n as f64;
        }
    }
    let means = |sums: Vec<f64>| sums.into_iter().map(|s| s / n.max(1) as f64).collect();
    (insight.to_passage, insight.to_answer) = (means(lens.to_passage), means(lens.to_answer));
    Ok(insight)
}

fn probability(logits: &[f32], token: Option<u32>) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&v| f64::from(v - max).exp()).sum();
    token.map_or(0.0, |token| f64::from(logits[token as usize] - max).exp() / sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cues_go_and_the_question_begins_a_sentence() {
        let cues = ["According to the passage, ".to_string(), String::new()];
        let prompt = "<|user|>Passage: A is B.\nAccording to the passage, what is A?<|assistant|>";
        assert_eq!(without_cues(prompt, &cues), "<|user|>Passage: A is B.\nWhat is A?<|assistant|>");
        assert_eq!(without_cues("Q?", &cues), "Q?");
    }

    #[test]
    fn the_passage_lies_between_its_marks() {
        let text = "\nx Passage: Ä is B.\nQ?\n";
        assert_eq!(&text[between(text, "Passage: ", "\n").unwrap()], "Ä is B.");
        assert_eq!(between("Passage: \nQ", "Passage: ", "\n"), None);
        assert_eq!(between("Passage: A", "Passage: ", "\n"), None);
    }

    #[test]
    fn most_used_are_taken_by_layer_and_ties_by_number() {
        let map = ExpertMap::new(vec![0, 2], vec![4, 3]);
        assert_eq!(most_used(&map, &[5, 9, 5, 1, 0, 0, 7], 2), [1, 0, 6, 4]);
    }

    #[test]
    fn probability_by_hand() {
        assert!((probability(&[0.0, 3f32.ln()], Some(1)) - 0.75).abs() < 1e-6);
        assert_eq!(probability(&[0.0], None), 0.0);
    }
}
