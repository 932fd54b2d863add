//! From logits to the next token, and where an answer ends. No I/O, no clock: the same parameters and logits give the
//! same tokens on every machine.

use serde::{Deserialize, Serialize};

/// How the next token is chosen. The default is greedy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingParams {
    /// Divides the logits: below 1 sharper, above 1 flatter. 0 takes the most likely token, whatever the rest says.
    pub temperature: f32,
    /// Only the so many most likely tokens (and those as likely as the last of them); 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability; 1 for all.
    pub top_p: f32,
    /// Only tokens at least this likely relative to the most likely one; 0 for all.
    pub min_p: f32,
    /// Makes tokens that occurred less likely (above 1) or more likely (below 1); 1 for neither.
    pub repetition_penalty: f32,
    /// Where the random numbers start.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

/// What can be wrong with parameters or logits.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// A parameter outside its range.
    #[error("{field} is {value}; help: it must be {range}")]
    OutOfRange {
        /// The parameter.
        field: &'static str,
        /// What it is.
        value: f32,
        /// What it may be.
        range: &'static str,
    },
    /// A logit that is not a number, or infinitely large.
    #[error("the logit of token {token} is {value}: the model's numbers are broken")]
    BrokenLogit {
        /// The token.
        token: usize,
        /// Its logit.
        value: f32,
    },
    /// All logits are minus infinity, or there are none.
    #[error("none of {count} tokens may be chosen: all are excluded")]
    NothingToChoose {
        /// Number of logits.
        count: usize,
    },
    /// The history names a token that has no logit.
    #[error("token {token} of the history is outside the vocabulary of {vocab_size}")]
    HistoryToken {
        /// The token.
        token: u32,
        /// Number of logits.
        vocab_size: usize,
    },
}

impl SamplingParams {
    /// Whether all parameters are in range.
    ///
    /// # Errors
    /// Names the first parameter that is not, and its range.
    pub fn check(&self) -> Result<(), SamplingError> {
        let check = |field, value: f32, ok: bool, range| {
            if ok && value.is_finite() { Ok(()) } else { Err(SamplingError::OutOfRange { field, value, range }) }
        };
        let (p, m, r) = (self.top_p, self.min_p, self.repetition_penalty);
        check("temperature", self.temperature, self.temperature >= 0.0, "0 (greedy) or more")?;
        check("top_p", p, p > 0.0 && p <= 1.0, "above 0 and at most 1 (all tokens)")?;
        check("min_p", m, (0.0..=1.0).contains(&m), "between 0 (all tokens) and 1")?;
        check("repetition_penalty", r, r > 0.0, "above 0 (1 for none)")
    }
}

/// Random numbers: `SplitMix64` of Steele, Lea and Flood (2014). Its state is a counter in steps of the golden ratio;
/// each output is the state, mixed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// The numbers that a seed gives.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 random bits.
    #[allow(clippy::should_implement_trait, reason = "a generator never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// At least 0, below 1, in steps of 2^-53.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A whole number below `n`, which is above 0.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }

    /// Puts values in a random order.
    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        for last in (1..values.len()).rev() {
            values.swap(last, self.below(last + 1));
        }
    }
}

/// Chooses tokens.
///
/// The order of operations is that of Hugging Face transformers: repetition penalty, temperature, top-k, top-p, min-p,
/// each on what the ones before have left.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    random: SplitMix64,
    /// Tokens that may still be chosen, with their weights. Kept to save its memory.
    candidates: Vec<Candidate>,
    /// One bit a token: whether it was penalised. All clear between calls.
    penalised: Vec<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    logit: f32,
    /// Proportional to the probability; the most likely token has 1.
    weight: f64,
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    ///
    /// # Errors
    /// As [`SamplingParams::check`].
    pub fn new(params: SamplingParams) -> Result<Self, SamplingError> {
        params.check()?;
        let random = SplitMix64::new(params.seed);
        Ok(Self { params, random, candidates: Vec::new(), penalised: Vec::new() })
    }

    /// Chooses the next token. `logits` has one number per token of the vocabulary, minus infinity excluding a token,
    /// and is changed; `history` are the tokens so far, prompt included. Of equally likely tokens, greedy takes the one
    /// with the lowest id.
    ///
    /// # Errors
    /// A logit that is NaN or plus infinity, all tokens excluded, or a token in `history` without a logit.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32]) -> Result<u32, SamplingError> {
        if let Some(token) = logits.iter().position(|&x| x.is_nan() || x == f32::INFINITY) {
            return Err(SamplingError::BrokenLogit { token, value: logits[token] });
        }
        self.penalise(logits, history)?;
        let nothing = SamplingError::NothingToChoose { count: logits.len() };
        let best = argmax(logits).ok_or(nothing)?;
        if self.params.temperature == 0.0 {
            return Ok(best as u32);
        }
        self.weigh(logits, logits[best]);
        self.keep_top_k();
        self.keep_top_p();
        let least = f64::from(self.params.min_p);
        self.candidates.retain(|candidate| candidate.weight >= least);
        Ok(self.draw())
    }

    /// Each token of the history once, as often as it may occur: `x / penalty` above 0, `x * penalty` below.
    fn penalise(&mut self, logits: &mut [f32], history: &[u32]) -> Result<(), SamplingError> {
        let penalty = self.params.repetition_penalty;
        if penalty == 1.0 {
            return Ok(());
        }
        let vocab_size = logits.len();
        if let Some(&token) = history.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(SamplingError::HistoryToken { token, vocab_size });
        }
        self.penalised.resize(vocab_size.div_ceil(64), 0);
        for &token in history {
            let (word, bit) = (token as usize / 64, 1 << (token % 64));
            if self.penalised[word] & bit == 0 {
                self.penalised[word] |= bit;
                let logit = &mut logits[token as usize];
                *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
            }
        }
        for &token in history {
            self.penalised[token as usize / 64] = 0;
        }
        Ok(())
    }

    /// Fills `candidates` with all tokens that are not excluded, most likely weight 1.
    fn weigh(&mut self, logits: &[f32], best: f32) {
        let temperature = f64::from(self.params.temperature);
        self.candidates.clear();
        for (token, &logit) in logits.iter().enumerate() {
            if logit > f32::NEG_INFINITY {
                let weight = (f64::from(logit - best) / temperature).exp();
                self.candidates.push(Candidate { token: token as u32, logit, weight });
            }
        }
    }

    /// Keeps the `top_k` most likely and those that are as likely as the last of them.
    fn keep_top_k(&mut self) {
        let k = self.params.top_k;
        if k > 0 && k < self.candidates.len() {
            let (_, kth, _) = self.candidates.select_nth_unstable_by(k - 1, likelier_first);
            let least = kth.logit;
            self.candidates.retain(|candidate| candidate.logit >= least);
            // Selecting shuffles; the order decides which random number gives which token.
            self.candidates.sort_unstable_by_key(|candidate| candidate.token);
        }
    }

    /// Keeps the most likely tokens up to the one with which their probabilities reach `top_p`.
    fn keep_top_p(&mut self) {
        let p = f64::from(self.params.top_p);
        if p >= 1.0 {
            return;
        }
        let total: f64 = self.candidates.iter().map(|candidate| candidate.weight).sum();
        // A token less likely than this share of the rest cannot be needed, even if all others were as unlikely: no
        // need to sort the whole vocabulary.
        let negligible = (1.0 - p) * total / self.candidates.len() as f64 * 0.999;
        self.candidates.retain(|candidate| candidate.weight >= negligible);
        self.candidates.sort_unstable_by(likelier_first);
        let mut before = 0.0;
        let needed = self.candidates.iter().take_while(|candidate| {
            let wanted = before < p * total;
            before += candidate.weight;
            wanted
        });
        let needed = needed.count().max(1);
        self.candidates.truncate(needed);
        self.candidates.sort_unstable_by_key(|candidate| candidate.token);
    }

    /// A random candidate by weight.
    fn draw(&mut self) -> u32 {
        let total: f64 = self.candidates.iter().map(|candidate| candidate.weight).sum();
        let mut left = self.random.unit() * total;
        let mut chosen = 0;
        for candidate in self.candidates.iter().filter(|candidate| candidate.weight > 0.0) {
            // The last one stands for what rounding leaves over.
            chosen = candidate.token;
            left -= candidate.weight;
            if left < 0.0 {
                break;
            }
        }
        chosen
    }
}

fn likelier_first(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

/// The first of the largest logits, if any is above minus infinity.
fn argmax(logits: &[f32]) -> Option<usize> {
    let mut best = None;
    let mut most = f32::NEG_INFINITY;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > most {
            (best, most) = (Some(token), logit);
        }
    }
    best
}

/// Finds texts that end an answer in text that comes in pieces, and never lets out any part of them.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    /// The end of the text so far, as far as a stop text may have begun in it.
    held: String,
    matched: Option<usize>,
}

impl StopStrings {
    /// A matcher for these texts. Empty ones, which would end everything before it begins, are left out.
    pub fn new(stops: Vec<String>) -> Self {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        Self { stops, held: String::new(), matched: None }
    }

    /// Takes a piece and gives the text that is certainly before any stop text. After a stop text nothing comes.
    pub fn push(&mut self, piece: &str) -> String {
        if self.matched.is_some() {
            return String::new();
        }
        self.held.push_str(piece);
        let found = self.stops.iter().enumerate().filter_map(|(i, stop)| Some((self.held.find(stop)?, i))).min();
        let ready = match found {
            Some((at, stop)) => {
                self.matched = Some(stop);
                self.held.truncate(at);
                self.held.len()
            }
            None => self.first_possible_start(),
        };
        let rest = self.held.split_off(ready);
        std::mem::replace(&mut self.held, rest)
    }

    /// Gives what was held back, when the text has ended without a stop text.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Whether a stop text was found.
    pub fn stopped(&self) -> bool {
        self.matched.is_some()
    }

    /// The stop text that was found.
    pub fn matched(&self) -> Option<&str> {
        self.matched.map(|stop| self.stops[stop].as_str())
    }

    /// Where the held text first continues to its end like the beginning of a stop text.
    fn first_possible_start(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = (self.held.len() + 1).saturating_sub(longest);
        let mut starts = self.held.char_indices().map(|(at, _)| at).filter(|&at| at >= from);
        let begins = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        starts.find(begins).unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests;
