//! Source text to tokens, with Jinja's whitespace rules (`trim_blocks` and `lstrip_blocks` on).

use super::literals::{number_length, unescape};
use super::{Error, ErrorKind, Res};

/// A token with its line.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Token {
    pub(super) tok: Tok,
    pub(super) line: u32,
}

/// What a token is.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Tok {
    Data(String),
    VarBegin,
    VarEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Str(String),
    Int(i128),
    Float(f64),
    Op(&'static str),
    Eof,
}

/// Operators, the longer ones first.
const OPERATORS: [&str; 25] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".",
    ":", "|", ",",
];

/// Splits a template into tokens; the last one is [`Tok::Eof`].
pub(super) fn tokenize(source: &str) -> Res<Vec<Token>> {
    // Jinja reads every kind of line end as \n and drops one at the end of the template.
    let source = normalize_newlines(source);
    let source = source.strip_suffix('\n').unwrap_or(&source);
    let mut lexer = Lexer { source, pos: 0, line: 1, line_start: true, tokens: Vec::new() };
    while lexer.pos < source.len() {
        lexer.root()?;
    }
    lexer.push(Tok::Eof);
    Ok(lexer.tokens)
}

fn normalize_newlines(text: &str) -> String {
    text.replace("\r\n", "\n").replace('\r', "\n")
}

struct Lexer<'s> {
    source: &'s str,
    pos: usize,
    line: u32,
    /// Whether the last token ended with a line end: only then may indentation be stripped.
    line_start: bool,
    tokens: Vec<Token>,
}

impl<'s> Lexer<'s> {
    fn push(&mut self, tok: Tok) {
        self.tokens.push(Token { tok, line: self.line });
    }

    fn error<T>(&self, message: impl Into<String>) -> Res<T> {
        Err(Error::new(ErrorKind::Syntax, message).at(self.line))
    }

    fn rest(&self) -> &'s str {
        &self.source[self.pos..]
    }

    /// Moves over `bytes` bytes and keeps count of lines.
    fn advance(&mut self, bytes: usize) {
        let passed = &self.source[self.pos..self.pos + bytes];
        self.line += passed.matches('\n').count() as u32;
        if bytes > 0 {
            self.line_start = passed.ends_with('\n');
        }
        self.pos += bytes;
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        self.advance(rest.len() - rest.trim_start().len());
    }

    /// Text up to the next tag, then the tag.
    fn root(&mut self) -> Res<()> {
        let rest = self.rest();
        let opens = |&(at, _): &(usize, &str)| rest[at + 1..].starts_with(['%', '{', '#']);
        let Some((at, _)) = rest.match_indices('{').find(opens) else {
            self.push(Tok::Data(rest.to_owned()));
            self.advance(rest.len());
            return Ok(());
        };
        let tag = &rest[at..at + 2];
        let sign = rest[at + 2..].chars().next().filter(|c| matches!(c, '-' | '+'));
        self.data(&rest[..at], sign, tag != "{{");
        self.advance(at + 2 + sign.map_or(0, char::len_utf8));
        match tag {
            "{#" => self.comment(),
            "{{" => {
                self.push(Tok::VarBegin);
                self.tag("}}", Tok::VarEnd)
            }
            _ => match self.raw_header() {
                Some(length) => self.raw(length),
                None => {
                    self.push(Tok::BlockBegin);
                    self.tag("%}", Tok::BlockEnd)
                }
            },
        }
    }

    /// Emits text before a tag, stripped as the tag asks.
    fn data(&mut self, text: &str, sign: Option<char>, strip_indent: bool) {
        let mut kept = text;
        if sign == Some('-') {
            kept = text.trim_end();
        } else if sign.is_none() && strip_indent {
            let line_start = text.rfind('\n').map_or(0, |at| at + 1);
            if (line_start > 0 || self.line_start) && text[line_start..].trim().is_empty() {
                kept = &text[..line_start];
            }
        }
        if !kept.is_empty() {
            self.push(Tok::Data(kept.to_owned()));
        }
    }

    fn comment(&mut self) -> Res<()> {
        let Some(at) = self.rest().find("#}") else {
            return self.error("missing end of comment tag");
        };
        let sign = self.rest()[..at].chars().next_back().filter(|c| matches!(c, '-' | '+'));
        self.advance(at + 2);
        self.after_close(sign, true);
        Ok(())
    }

    /// What follows a closed tag: `-` strips all space, a block takes one line end with it.
    fn after_close(&mut self, sign: Option<char>, trim_newline: bool) {
        if sign == Some('-') {
            self.skip_space();
        } else if sign.is_none() && trim_newline && self.rest().starts_with('\n') {
            self.advance(1);
        }
    }

    /// Length of ` raw %}` if the block just opened is one.
    fn raw_header(&self) -> Option<usize> {
        let rest = self.rest();
        let after = rest.trim_start().strip_prefix("raw")?.trim_start();
        let (close, strip) = match after.strip_prefix("-%}") {
            Some(close) => (close, true),
            None => (after.strip_prefix("%}")?, false),
        };
        let close = if strip { close.trim_start() } else { close };
        Some(rest.len() - close.len())
    }

    fn raw(&mut self, header: usize) -> Res<()> {
        self.advance(header);
        let body = self.rest();
        let mut from = 0;
        while let Some(at) = body[from..].find("{%").map(|at| at + from) {
            let open = &body[at + 2..];
            let sign = open.chars().next().filter(|c| matches!(c, '-' | '+'));
            let open = open.strip_prefix(['-', '+']).unwrap_or(open);
            if let Some(tail) = open.trim_start().strip_prefix("endraw").map(str::trim_start) {
                let end_sign = tail.chars().next().filter(|c| matches!(c, '-' | '+'));
                let tail = tail.strip_prefix(['-', '+']).unwrap_or(tail);
                if let Some(tail) = tail.strip_prefix("%}") {
                    self.data(&body[..at], sign, true);
                    self.advance(body.len() - tail.len());
                    self.after_close(end_sign, true);
                    return Ok(());
                }
            }
            from = at + 2;
        }
        self.error("missing end of raw directive")
    }

    /// The inside of a tag up to its closing `end`.
    fn tag(&mut self, end: &str, end_tok: Tok) -> Res<()> {
        let is_block = end == "%}";
        let mut open = Vec::new();
        loop {
            self.skip_space();
            let rest = self.rest();
            if rest.is_empty() {
                return self.error(format!("the tag is not closed with '{end}'"));
            }
            if open.is_empty() {
                let sign = rest
                    .chars()
                    .next()
                    .filter(|&c| c == '-' || (c == '+' && is_block))
                    .filter(|_| rest[1..].starts_with(end));
                if sign.is_some() || rest.starts_with(end) {
                    self.advance(end.len() + usize::from(sign.is_some()));
                    self.push(end_tok);
                    self.after_close(sign, is_block);
                    return Ok(());
                }
            }
            self.inner(&mut open)?;
        }
    }

    fn inner(&mut self, open: &mut Vec<&'static str>) -> Res<()> {
        let rest = self.rest();
        let first = rest.chars().next().unwrap_or(' ');
        if first.is_ascii_digit() {
            return self.number();
        }
        if first.is_alphanumeric() || first == '_' {
            let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_'));
            let end = end.unwrap_or(rest.len());
            self.push(Tok::Name(rest[..end].to_owned()));
            self.advance(end);
            return Ok(());
        }
        if first == '"' || first == '\'' {
            return self.string(first);
        }
        let Some(op) = OPERATORS.iter().find(|op| rest.starts_with(**op)) else {
            return self.error(format!("unexpected character {first:?}"));
        };
        match *op {
            "(" => open.push(")"),
            "[" => open.push("]"),
            "{" => open.push("}"),
            ")" | "]" | "}" if open.pop() != Some(*op) => {
                return self.error(format!("unexpected '{op}'"));
            }
            _ => {}
        }
        self.push(Tok::Op(op));
        self.advance(op.len());
        Ok(())
    }

    fn number(&mut self) -> Res<()> {
        let after_dot = self.source[..self.pos].ends_with('.');
        let rest = self.rest();
        let (length, is_float) = number_length(rest, after_dot);
        let text = rest[..length].replace('_', "").to_ascii_lowercase();
        let tok = if is_float {
            text.parse().ok().map(Tok::Float)
        } else {
            let radix = |digits: &str, radix| i128::from_str_radix(digits, radix).ok();
            match text.get(..2) {
                Some("0x") => radix(&text[2..], 16),
                Some("0o") => radix(&text[2..], 8),
                Some("0b") => radix(&text[2..], 2),
                _ => text.parse().ok(),
            }
            .map(Tok::Int)
        };
        let Some(tok) = tok else {
            return self.error(format!("the number '{text}' is out of range"));
        };
        self.push(tok);
        self.advance(length);
        Ok(())
    }

    fn string(&mut self, quote: char) -> Res<()> {
        let body = &self.rest()[1..];
        let mut escaped = false;
        let end = body.find(|c| {
            let closes = c == quote && !escaped;
            escaped = c == '\\' && !escaped;
            closes
        });
        let Some(end) = end else {
            return self.error("missing end of string");
        };
        let Some(text) = unescape(&body[..end]) else {
            return self.error("broken escape in string");
        };
        self.push(Tok::Str(text));
        self.advance(end + 2);
        Ok(())
    }
}
