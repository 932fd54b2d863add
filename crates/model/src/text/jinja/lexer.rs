//! Source text to tokens, with Jinja's whitespace rules (`trim_blocks` and `lstrip_blocks` on).

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
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}",
    ">", "<", "=", ".", ":", "|", ",",
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

/// Length of the number at the start of `s` and whether it is a float.
fn number_length(s: &str, after_dot: bool) -> (usize, bool) {
    let digits = |from: usize, accept: fn(u8) -> bool| {
        let tail = &s.as_bytes()[from.min(s.len())..];
        let mut end = tail.iter().take_while(|&&b| accept(b) || b == b'_').count();
        while end > 0 && tail[end - 1] == b'_' {
            end -= 1;
        }
        from + end
    };
    let decimal: fn(u8) -> bool = |b| b.is_ascii_digit();
    let prefixed: Option<fn(u8) -> bool> = match s.get(..2).map(str::to_ascii_lowercase).as_deref() {
        Some("0x") => Some(|b| b.is_ascii_hexdigit()),
        Some("0o") => Some(|b| (b'0'..=b'7').contains(&b)),
        Some("0b") => Some(|b| b == b'0' || b == b'1'),
        _ => None,
    };
    if let Some(accept) = prefixed {
        let end = digits(2, accept);
        if end > 2 {
            return (end, false);
        }
    }
    let whole = digits(0, decimal);
    if after_dot {
        return (whole, false);
    }
    let mut end = whole;
    if s[end..].starts_with('.') && digits(end + 1, decimal) > end + 1 {
        end = digits(end + 1, decimal);
    }
    if s[end..].starts_with(['e', 'E']) {
        let sign = usize::from(s[end + 1..].starts_with(['+', '-']));
        let exponent = digits(end + 1 + sign, decimal);
        if exponent > end + 1 + sign {
            end = exponent;
        }
    }
    if end == whole && s.starts_with('0') {
        // Python has no whole numbers with leading zeros.
        end = s.bytes().take_while(|&b| b == b'0').count();
    }
    (end, end > whole)
}

/// Python's escapes in a string literal; `None` if one is broken.
fn unescape(body: &str) -> Option<String> {
    let mut out = String::with_capacity(body.len());
    let mut rest = body;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let escape = rest[at + 1..].chars().next()?;
        let tail = &rest[at + 1 + escape.len_utf8()..];
        let hex = |n: usize| -> Option<(char, &str)> {
            let code = u32::from_str_radix(tail.get(..n)?, 16).ok()?;
            Some((char::from_u32(code)?, &tail[n..]))
        };
        rest = tail;
        let simple = match escape {
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'a' => '\x07',
            'b' => '\x08',
            'f' => '\x0c',
            'v' => '\x0b',
            '\\' | '\'' | '"' => escape,
            '\n' => continue,
            'x' | 'u' | 'U' => {
                let (decoded, after) = hex(match escape {
                    'x' => 2,
                    'u' => 4,
                    _ => 8,
                })?;
                rest = after;
                decoded
            }
            '0'..='7' => {
                let n = 1 + tail.bytes().take(2).take_while(|b| (b'0'..=b'7').contains(b)).count();
                let digits = &body[body.len() - tail.len() - 1..][..n];
                rest = &tail[n - 1..];
                char::from_u32(u32::from_str_radix(digits, 8).ok()?)?
            }
            other => {
                out.push('\\');
                other
            }
        };
        out.push(simple);
    }
    out.push_str(rest);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_follow_python() {
        assert_eq!(unescape(r"a\n\x41\u00e9\101\q\'").as_deref(), Some("a\nAéA\\q'"));
        assert_eq!(unescape(r"\x4"), None);
    }

    #[test]
    fn numbers_follow_jinja() {
        assert_eq!(number_length("1.5e3x", false), (5, true));
        assert_eq!(number_length("1.foo", false), (1, false));
        assert_eq!(number_length("1.5", true), (1, false));
        assert_eq!(number_length("0xff_", false), (4, false));
        assert_eq!(number_length("1_000", false), (5, false));
    }
}
