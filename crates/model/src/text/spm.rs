//! SentencePiece's byte-pair encoding: of all neighbours whose concatenation is a token, those with the best score merge first.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use tokenizers::Token;
use tokenizers::models::bpe::Vocab;

/// What vocabularies write for a space.
pub(super) const SPACE: char = '\u{2581}';

/// A vocabulary with scores.
///
/// Text is merged as it stands between added tokens, without a split into words. Spaces are written as [`SPACE`]. A
/// character that is no token becomes the tokens of its bytes, or the unknown token.
pub(super) struct Spm {
    tokens: Vec<String>,
    scores: Vec<f32>,
    ids: Vocab,
    /// `<0x00>` to `<0xFF>`, if all of them are there.
    bytes: Option<Box<[u32; 256]>>,
    unknown: Option<u32>,
    /// Whether each text gets a space in front.
    space_prefix: bool,
}

/// One piece of text on the way: a character at first, later a token.
#[derive(Clone, Copy)]
struct Symbol {
    /// Where it begins in the escaped text.
    start: usize,
    /// Bytes in the escaped text; 0 once it has been merged into its left neighbour.
    len: usize,
    /// Bytes in the text as it was given.
    source: usize,
    prev: usize,
    next: usize,
}

/// No neighbour.
const NONE: usize = usize::MAX;

/// Two neighbours that may merge.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of both when they were found: if that has changed, one of them is another one now.
    len: usize,
}

impl Ord for Pair {
    /// The best score first, of equal ones the leftmost.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Pair {}

impl Spm {
    /// `tokens` are all different, and there is a score for each.
    pub fn new(tokens: Vec<String>, scores: Vec<f32>, unknown: Option<u32>, space_prefix: bool) -> Self {
        let ids: Vocab = tokens.iter().zip(0..).map(|(token, id)| (token.clone(), id)).collect();
        let mut bytes = Box::new([0; 256]);
        let all = (0..256).all(|byte| match ids.get(&format!("<0x{byte:02X}>")) {
            Some(&id) => {
                bytes[byte] = id;
                true
            }
            None => false,
        });
        Self { tokens, scores, ids, bytes: all.then_some(bytes), unknown, space_prefix }
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    pub fn id_to_token(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(String::as_str)
    }

    pub fn vocab(&self) -> impl Iterator<Item = (String, u32)> {
        self.ids.iter().map(|(token, &id)| (token.clone(), id))
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens of a text; their offsets are bytes of the text as it was given.
    pub fn tokenize(&self, text: &str) -> tokenizers::Result<Vec<Token>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let (escaped, mut symbols) = self.characters(text);
        self.merge(&escaped, &mut symbols);
        let (mut out, mut at, mut index) = (Vec::new(), 0, 0);
        while let Some(symbol) = symbols.get(index) {
            // A space in front that stays alone stands for the first character, as transformers has it.
            let place = if symbol.source == 0 { text.chars().next().map_or(0, char::len_utf8) } else { symbol.source };
            self.push(&escaped[symbol.start..][..symbol.len], at, place, &mut out)?;
            at += symbol.source;
            index = symbol.next;
        }
        Ok(out)
    }

    /// The escaped text and its characters.
    fn characters(&self, text: &str) -> (String, Vec<Symbol>) {
        let mut escaped = String::with_capacity(text.len() * 4 / 3 + 3);
        let mut symbols = Vec::with_capacity(text.len() + 1);
        let prefix = self.space_prefix.then_some((SPACE, 0));
        let characters = text.chars().map(|c| (if c == ' ' { SPACE } else { c }, c.len_utf8()));
        for (c, source) in prefix.into_iter().chain(characters) {
            let (index, start) = (symbols.len(), escaped.len());
            escaped.push(c);
            let prev = index.wrapping_sub(1); // NONE for the first
            symbols.push(Symbol { start, len: c.len_utf8(), source, prev, next: index + 1 });
        }
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        (escaped, symbols)
    }

    fn merge(&self, escaped: &str, symbols: &mut [Symbol]) {
        let mut queue = BinaryHeap::with_capacity(symbols.len());
        let pair = |symbols: &[Symbol], left: usize, right: usize| {
            let (a, b) = (symbols.get(left)?, symbols.get(right)?);
            let len = a.len + b.len;
            let id = self.token_to_id(&escaped[a.start..][..len])?;
            Some(Pair { score: self.scores[id as usize], left, right, len })
        };
        queue.extend((1..symbols.len()).filter_map(|right| pair(symbols, right - 1, right)));
        while let Some(Pair { left, right, len, .. }) = queue.pop() {
            let (a, b) = (symbols[left], symbols[right]);
            if a.len == 0 || b.len == 0 || a.len + b.len != len {
                continue;
            }
            symbols[left] = Symbol { len, source: a.source + b.source, next: b.next, ..a };
            symbols[right].len = 0;
            if let Some(next) = symbols.get_mut(b.next) {
                next.prev = left;
            }
            queue.extend(pair(symbols, a.prev, left));
            queue.extend(pair(symbols, left, b.next));
        }
    }

    /// Writes a symbol that lies at byte `at` of the source and takes `source` bytes there.
    fn push(&self, symbol: &str, at: usize, source: usize, out: &mut Vec<Token>) -> tokenizers::Result<()> {
        if let Some(id) = self.token_to_id(symbol) {
            out.push(Token::new(id, symbol.to_owned(), (at, at + source)));
        } else if let Some(bytes) = &self.bytes {
            for (i, &byte) in symbol.as_bytes().iter().enumerate() {
                let id = bytes[usize::from(byte)];
                let offsets = (at + i.min(source), at + (i + 1).min(source));
                out.push(Token::new(id, self.tokens[id as usize].clone(), offsets));
            }
        } else if let Some(id) = self.unknown {
            out.push(Token::new(id, self.tokens[id as usize].clone(), (at, at + source)));
        } else {
            let problem = "is in no token, and the vocabulary has neither all bytes nor an unknown token";
            return Err(format!("{symbol:?} {problem}").into());
        }
        Ok(())
    }
}
