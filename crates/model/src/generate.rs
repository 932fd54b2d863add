//! From prompt tokens to answer tokens: prefill in chunks, decoding, sampling, stopping; one sequence or many.

use std::collections::VecDeque;

use crate::ops::values;
use crate::sampling::{Sampler, SamplingParams, StopStrings};
use crate::{KvCache, Lens, LogitRows, Model, ModelError, Phase, Segment};

/// Tokens that one forward pass of a prompt computes at most.
pub const PREFILL_CHUNK: usize = 512;

/// When and how to stop, and how to choose tokens.
#[derive(Clone, Debug, Default)]
pub struct GenerateOptions {
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// How the next token is chosen.
    pub sampling: SamplingParams,
    /// Go on after an end-of-text token.
    pub ignore_eos: bool,
    /// Leave special tokens such as `<think>` in the text.
    pub keep_special: bool,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model produced an end-of-text token.
    Eos,
    /// A stop text occurred.
    Stop,
    /// `max_tokens` or the model's context was reached.
    Length,
    /// The caller or a lens asked to stop.
    Cancelled,
}

impl Finish {
    /// The name in JSON output.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Eos => "eos",
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Cancelled => "cancelled",
        }
    }
}

/// What happens while a text is generated.
#[derive(Debug)]
pub enum Event<'a> {
    /// So many prompt tokens are computed.
    Prefilled(usize),
    /// A token was chosen.
    Token(u32),
    /// Text that is ready to be shown.
    Text(&'a str),
}

/// A generated answer.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The text, without end-of-text and stop texts.
    pub text: String,
    /// The tokens, without the end-of-text token.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// A lens that may change while a text is generated.
pub trait Guide {
    /// The lens of the passes to come.
    fn lens(&mut self) -> &mut dyn Lens;

    /// Sees the text so far, before its prompt is computed and after every token. True if the lens has changed in such a
    /// way that what the cache holds is to be computed anew.
    ///
    /// # Errors
    /// Whatever goes wrong in it; the generation stops with it.
    fn revise(&mut self, text: &[u32]) -> Result<bool, ModelError>;
}

/// A lens that does not change.
struct Fixed<'a>(&'a mut dyn Lens);

impl Guide for Fixed<'_> {
    fn lens(&mut self) -> &mut dyn Lens {
        self.0
    }
    fn revise(&mut self, _: &[u32]) -> Result<bool, ModelError> {
        Ok(false)
    }
}

/// One sequence's state while it is generated.
struct Stream {
    sampler: Sampler,
    stops: StopStrings,
    history: Vec<u32>,
    out: Generation,
    decoder: crate::text::StreamDecoder,
    room: usize,
}

impl Stream {
    /// A text of which the cache holds the tokens `held`.
    fn new(model: &Model, held: &[u32], prompt: &[u32], options: &GenerateOptions) -> Result<Stream, ModelError> {
        let context = model.spec().max_position_embeddings;
        let tokens = held.len() + prompt.len();
        if prompt.is_empty() {
            return Err(ModelError::EmptyPrompt);
        }
        if tokens >= context {
            return Err(ModelError::PromptTooLong { tokens, context });
        }
        Ok(Stream {
            sampler: Sampler::new(options.sampling.clone())?,
            stops: StopStrings::new(options.stop.clone()),
            history: [held, prompt].concat(),
            out: Generation { text: String::new(), tokens: Vec::new(), finish: Finish::Length },
            decoder: model.tokenizer().stream_decoder(!options.keep_special),
            room: options.max_tokens.min(context - tokens),
        })
    }

    /// Takes the logits of the last row; returns the next token to feed, or `None` at the end.
    fn step(
        &mut self,
        model: &Model,
        logits: &mut [f32],
        options: &GenerateOptions,
        on: &mut dyn FnMut(Event<'_>) -> bool,
    ) -> Result<Option<u32>, ModelError> {
        if self.room == 0 {
            return self.end(model, Finish::Length, on);
        }
        let token = self.sampler.sample(logits, &self.history)?;
        if !options.ignore_eos && model.spec().eos_token_ids.contains(&token) {
            return self.end(model, Finish::Eos, on);
        }
        self.room -= 1;
        self.history.push(token);
        self.out.tokens.push(token);
        let mut go_on = on(Event::Token(token));
        if let Some(piece) = self.decoder.push(model.tokenizer(), token)? {
            let ready = self.stops.push(&piece);
            go_on &= self.emit(&ready, on);
            if self.stops.stopped() {
                self.out.finish = Finish::Stop;
                return Ok(None);
            }
        }
        if !go_on {
            return self.end(model, Finish::Cancelled, on);
        }
        if self.room == 0 { self.end(model, Finish::Length, on) } else { Ok(Some(token)) }
    }

    fn emit(&mut self, text: &str, on: &mut dyn FnMut(Event<'_>) -> bool) -> bool {
        self.out.text.push_str(text);
        text.is_empty() || on(Event::Text(text))
    }

    /// Flushes what decoder and stop matcher held back.
    fn end(
        &mut self,
        model: &Model,
        finish: Finish,
        on: &mut dyn FnMut(Event<'_>) -> bool,
    ) -> Result<Option<u32>, ModelError> {
        self.out.finish = finish;
        let piece = self.decoder.flush(model.tokenizer())?.unwrap_or_default();
        let mut ready = self.stops.push(&piece);
        if self.stops.stopped() {
            self.out.finish = Finish::Stop;
        } else {
            ready.push_str(&self.stops.flush());
        }
        self.emit(&ready, on);
        Ok(None)
    }
}

/// A text whose first `given` tokens are the prompt and the others generated, in chunks; logits of the last row only.
fn again(slot: usize, text: &[u32], given: usize) -> Vec<Segment> {
    let whole = Segment::prompt(slot, text[..given].to_vec());
    let phases = [whole.phases, vec![Phase::Decode; text.len() - given]].concat();
    let chunks = text.chunks(PREFILL_CHUNK).zip(phases.chunks(PREFILL_CHUNK));
    let mut segments: Vec<Segment> = chunks
        .map(|(tokens, phases)| {
            let (tokens, phases) = (tokens.to_vec(), phases.to_vec());
            Segment { slot, tokens, phases, logits: LogitRows::None }
        })
        .collect();
    if let Some(last) = segments.last_mut() {
        last.logits = LogitRows::Last;
    }
    segments
}

impl Model {
    /// Computes a prompt in chunks of [`PREFILL_CHUNK`] tokens and returns the logits of its last token, `[V]`.
    ///
    /// # Errors
    /// As [`Model::forward`]; an empty prompt. `Ok(None)` if `on` returned false or a lens stopped the pass.
    pub fn prefill(
        &self,
        prompt: &[u32],
        slot: usize,
        cache: &mut KvCache,
        lens: &mut dyn Lens,
        on: &mut dyn FnMut(Event<'_>) -> bool,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        let chunks: Vec<&[u32]> = prompt.chunks(PREFILL_CHUNK).collect();
        let mut done = 0;
        for (i, chunk) in chunks.iter().enumerate() {
            let mut segment = Segment::prompt(slot, chunk.to_vec());
            if i + 1 < chunks.len() {
                segment.logits = LogitRows::None;
                segment.phases.fill(Phase::Prompt);
            }
            let held = cache.len(slot);
            let forward = self.forward(&[segment], cache, lens)?;
            let stopped = cache.len(slot) == held;
            done += chunk.len();
            if stopped || !on(Event::Prefilled(done)) {
                return Ok(None);
            }
            if let Some(logits) = forward.logits {
                return Ok(Some(values(&logits)?.to_vec()));
            }
        }
        Ok(None)
    }

    /// Continues what `slot` of the cache holds with `prompt` and generates an answer. `on` returning false ends it.
    ///
    /// # Errors
    /// An empty prompt, one that is too long for the context, and as [`Model::forward`].
    pub fn generate(
        &self,
        prompt: &[u32],
        slot: usize,
        cache: &mut KvCache,
        options: &GenerateOptions,
        lens: &mut dyn Lens,
        on: &mut dyn FnMut(Event<'_>) -> bool,
    ) -> Result<Generation, ModelError> {
        self.generate_guided(prompt, slot, cache, options, &mut Fixed(lens), on)
    }

    /// As [`Model::generate`] with a lens that may change on the way.
    ///
    /// # Errors
    /// As [`Model::generate`], and what the guide reports.
    pub fn generate_guided(
        &self,
        prompt: &[u32],
        slot: usize,
        cache: &mut KvCache,
        options: &GenerateOptions,
        guide: &mut dyn Guide,
        on: &mut dyn FnMut(Event<'_>) -> bool,
    ) -> Result<Generation, ModelError> {
        let mut stream = Stream::new(self, cache.tokens(slot), prompt, options)?;
        let given = stream.history.len();
        let anew = guide.revise(&stream.history)? && given > prompt.len();
        let first = if anew {
            cache.truncate(slot, 0);
            self.prefill(&stream.history, slot, cache, guide.lens(), on)?
        } else {
            self.prefill(prompt, slot, cache, guide.lens(), on)?
        };
        let Some(mut logits) = first else {
            stream.out.finish = Finish::Cancelled;
            return Ok(stream.out);
        };
        while let Some(token) = stream.step(self, &mut logits, options, on)? {
            let segments = if guide.revise(&stream.history)? {
                cache.truncate(slot, 0);
                again(slot, &stream.history, given)
            } else {
                vec![Segment::decode(slot, token)]
            };
            let mut next = None;
            for segment in segments {
                next = self.forward(&[segment], cache, guide.lens())?.logits;
            }
            match next {
                Some(next) => logits.copy_from_slice(&values(&next)?),
                None => {
                    stream.end(self, Finish::Cancelled, on)?;
                    break;
                }
            }
        }
        Ok(stream.out)
    }

    /// Answers many prompts, up to `parallel` at a time: prompts enter as others finish, and every forward carries all
    /// running sequences. `on_done(index, answer)` is called as each ends; returning false stops, and so does a lens that
    /// stops a pass: the others get no answer.
    ///
    /// # Errors
    /// As [`Model::generate`], for the first prompt that fails.
    pub fn generate_many(
        &self,
        prompts: &[Vec<u32>],
        parallel: usize,
        options: &GenerateOptions,
        lens: &mut dyn Lens,
        on_done: &mut dyn FnMut(usize, Generation) -> bool,
    ) -> Result<(), ModelError> {
        let mut cache = self.new_cache(parallel.max(1));
        let mut free: Vec<usize> = (0..cache.slots()).rev().collect();
        let mut waiting: VecDeque<usize> = (0..prompts.len()).collect();
        let mut running: Vec<(usize, usize, Stream)> = Vec::new(); // (prompt, slot, state)
        let mut segments: Vec<Segment> = Vec::new(); // one per running stream, in the same order
        let ignore = &mut |_: Event<'_>| true;
        loop {
            let mut budget = PREFILL_CHUNK.saturating_sub(segments.len());
            while let (Some(&next), Some(&slot)) = (waiting.front(), free.last()) {
                let tokens = &prompts[next];
                if tokens.len() > budget && !segments.is_empty() {
                    break;
                }
                budget = budget.saturating_sub(tokens.len());
                waiting.pop_front();
                free.pop();
                cache.truncate(slot, 0);
                running.push((next, slot, Stream::new(self, &[], tokens, options)?));
                segments.push(Segment::prompt(slot, tokens.clone()));
            }
            if segments.is_empty() {
                return Ok(());
            }
            let forward = self.forward(&segments, &mut cache, lens)?;
            let Some(logits) = forward.logits else { return Ok(()) };
            let mut logits = values(&logits)?.to_vec();
            segments.clear();
            let mut still = Vec::with_capacity(running.len());
            for ((index, slot, mut stream), row) in
                running.into_iter().zip(logits.chunks_exact_mut(self.spec().vocab_size))
            {
                match stream.step(self, row, options, ignore)? {
                    Some(token) => {
                        segments.push(Segment::decode(slot, token));
                        still.push((index, slot, stream));
                    }
                    None => {
                        free.push(slot);
                        if !on_done(index, stream.out) {
                            return Ok(());
                        }
                    }
                }
            }
            running = still;
        }
    }
}
