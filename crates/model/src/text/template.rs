//! Chat templates on the engine `minijinja`, set up to render as transformers does with Jinja2.
//!
//! `python` holds what prints and behaves as in Python. The rest is for templates that mean harm, since they come from
//! the internet. Instructions are paid from fuel, in proportion to the conversation, and there is a limit of time. The
//! size of the prompt is limited in proportion, too, and that of values that are printed, that `python` builds, and
//! that `{% set %}` gives a name; so no loop can double a text for long, or wrap a list into lists for long. Recursion
//! is limited by the engine, and for what its parser does not limit there are limits of the source, of each tag and of
//! `elif`. Where it panics, that is an error.
//!
//! NOT bounded is the time of one operation on long text (`in`, `==`, ..; the limit of time is seen only where one of
//! the values above is made), and memory for values without a name: `'x' * n` is up to 100 MB each time, text may grow
//! in the arguments of macros that call each other, long literal text may be captured in a loop, and a list that is
//! nested behind many short values is not seen to be nested. So a hostile template may run for long, exhaust memory or
//! overflow the stack. More it cannot do: templates reach no files, no network and nothing of the host.
//!
//! Known differences from Jinja2; only the first two change what any of 200 released templates writes. Text marked
//! `safe` is not remembered, so adding to it escapes nothing. An empty list cannot be turned around (`[::-1]`), and
//! other negative steps may include one item too many. `'..' % x`, unary `+`, tuples without brackets, `varargs` and
//! `kwargs` of macros are not there. Tuples are lists. A default in a macro does not see earlier arguments. `for .. if`
//! asks before the loop begins. `loop.last` is never true for the characters of a text. Lists made in the template have
//! double quotes where `~` makes them text. Some mistakes are no errors: `None` can be iterated, values of all types
//! compared. Small ones are listed as `differing` in `tests/fixtures/chat_expressions.json`.

mod python;

use std::error::Error as StdError;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use minijinja::value::ObjectRepr;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde_json::{Map, Value as Json};

use super::TextError;

/// The largest template, in bytes. Released ones have up to 20,000.
const SOURCE_BYTES_MAX: usize = 1 << 20;
/// The longest tag, in characters without those of strings. In released templates they have up to 250.
const TAG_CHARS_MAX: usize = 2000;
/// The most `elif` tags. Released templates have up to 20.
const ELIFS_MAX: usize = 500;
/// Nested evaluations; a call of a macro counts as four.
const DEPTH_MAX: usize = 300;
/// Values in values, in values that get a name; and how many are looked at.
const NESTED_MAX: usize = 100;
const PARTS_SEEN: usize = 200;
/// Instructions that every render may take, and more for each byte of the conversation.
const FUEL: usize = 5_000_000;
const FUEL_PER_INPUT_BYTE: usize = 64;
/// Bytes that a text may have, and more for each byte of the conversation.
const BYTES: usize = 8 << 20;
const BYTES_PER_INPUT_BYTE: usize = 32;
/// A backstop for what fuel does not count. Templates take milliseconds.
const TIME: Duration = Duration::from_secs(20);

/// A template that parses.
pub(super) struct Template {
    source: String,
}

impl Template {
    /// Parses a template.
    pub(super) fn new(source: &str) -> Result<Self, TextError> {
        if source.len() > SOURCE_BYTES_MAX {
            let message = format!("the template has more than {SOURCE_BYTES_MAX} bytes");
            return Err(TextError::TemplateSyntax { line: 0, message });
        }
        // Errors are found in the source without guards, so that they name nothing that is not written there.
        let plain = prepared(source, false)?;
        guarded(&plain, || environment(Limits::NONE).template_from_named_str("chat", &plain).map(drop))?;
        Ok(Self { source: prepared(source, true)? })
    }

    /// Renders with these variables. `now` is what `strftime_now` tells; without it there is none.
    pub(super) fn render(&self, variables: &Map<String, Json>, now: Option<i64>) -> Result<String, TextError> {
        let input = serde_json::to_string(variables).map_or(0, |json| json.len());
        let limits = Limits { bytes: BYTES + BYTES_PER_INPUT_BYTE * input, until: Some(Instant::now() + TIME) };
        let mut prompt = Prompt { bytes: Vec::new(), limits };
        guarded(&self.source, || {
            let mut environment = environment(limits);
            environment.set_fuel(Some((FUEL + FUEL_PER_INPUT_BYTE * input) as u64));
            if let Some(now) = now {
                environment.add_function("strftime_now", move |format: &str| python::strftime(now, format));
            }
            let template = environment.template_from_named_str("chat", &self.source)?;
            let variables: Value = variables.iter().map(|(name, json)| (name.as_str(), python::value(json))).collect();
            template.render_captured_to(variables, &mut prompt).map(drop)
        })?;
        // The engine writes nothing but text.
        Ok(String::from_utf8_lossy(&prompt.bytes).into_owned())
    }
}

/// What a template may use, beside fuel. The time is checked where values are built, named or printed.
#[derive(Clone, Copy)]
struct Limits {
    /// Bytes of one value and of the prompt.
    bytes: usize,
    until: Option<Instant>,
}

impl Limits {
    const NONE: Self = Self { bytes: usize::MAX, until: None };

    /// Fails if it is late, or if a value of so many bytes is too large.
    fn check(self, bytes: usize) -> Result<(), Error> {
        match self.until {
            _ if bytes > self.bytes => Err(Stop::Limit("it builds too much").into()),
            Some(until) if Instant::now() > until => Err(Stop::Limit("it takes too long").into()),
            _ => Ok(()),
        }
    }
}

/// Why a template was stopped, beside the errors that the engine has.
#[derive(Debug, thiserror::Error)]
enum Stop {
    /// The template called `raise_exception`.
    #[error("{0}")]
    Raised(String),
    /// It wanted too much.
    #[error("{0}")]
    Limit(&'static str),
}

impl From<Stop> for Error {
    fn from(stop: Stop) -> Self {
        Error::new(ErrorKind::InvalidOperation, stop.to_string()).with_source(stop)
    }
}

/// The engine as transformers sets up Jinja2.
fn environment<'source>(limits: Limits) -> Environment<'source> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_recursion_limit(DEPTH_MAX);
    environment.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        Err(Stop::Raised(message.to_string()).into())
    });
    environment.add_filter(GUARD, move |value: Value, in_namespace: bool| {
        let length = value.as_str().map(str::len);
        limits.check(length.unwrap_or_else(|| value.len().unwrap_or(0).saturating_mul(size_of::<Value>())))?;
        match is_flat(&value, in_namespace, 0, &mut 0) {
            true => Ok(value),
            false => Err(Stop::Limit("it puts values into each other too deeply").into()),
        }
    });
    // It prints the engine's state, and is not in Jinja2.
    environment.remove_global("debug");
    python::add_to(&mut environment, limits);
    environment
}

/// Whether a value is nested so little that the engine can drop and compare it without overflowing the stack. Only the
/// first parts are looked at. A namespace may not get into another, for it could get into itself.
fn is_flat(value: &Value, in_namespace: bool, depth: usize, seen: &mut usize) -> bool {
    *seen += 1;
    let Some(object) = value.as_object().filter(|_| *seen < PARTS_SEEN) else { return true };
    if depth > NESTED_MAX
        || (in_namespace && ["::Namespace", "::Loop"].iter().any(|name| object.type_name().ends_with(name)))
    {
        return false;
    }
    let mut is_flat = |part: &Value| is_flat(part, in_namespace, depth + 1, seen);
    match object.repr() {
        ObjectRepr::Map => {
            object.try_iter_pairs().into_iter().flatten().take(PARTS_SEEN).all(|(_, part)| is_flat(&part))
        }
        _ => object.try_iter().into_iter().flatten().take(PARTS_SEEN).all(|part| is_flat(&part)),
    }
}

/// The prompt while it is written.
struct Prompt {
    bytes: Vec<u8>,
    limits: Limits,
}

impl Write for Prompt {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.limits.check(self.bytes.len() + bytes.len()).map_err(io::Error::other)?;
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs a part of the engine. It panics on a few operations, such as turning around an empty list.
fn guarded<T>(source: &str, work: impl FnOnce() -> Result<T, Error>) -> Result<T, TextError> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| text_error(&error, source)),
        Err(_) => Err(TextError::TemplateFailed { line: 0, message: "the template engine broke down".to_owned() }),
    }
}

/// An error in the words of this crate; with the place in the source where there is one.
fn text_error(error: &Error, source: &str) -> TextError {
    let line = error.line().and_then(|line| u32::try_from(line).ok()).unwrap_or(0);
    let mut message = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(found) = cause {
        match found.downcast_ref() {
            Some(Stop::Raised(message)) => return TextError::TemplateRaised { message: message.clone() },
            Some(Stop::Limit(message)) => return TextError::TemplateLimit { line, message: (*message).to_owned() },
            None => cause = found.source(),
        }
    }
    match error.kind() {
        ErrorKind::OutOfFuel => TextError::TemplateLimit { line, message: "it runs too long".to_owned() },
        ErrorKind::WriteFailure => TextError::TemplateLimit { line, message: "it writes too much".to_owned() },
        _ if message == "recursion limit exceeded" => TextError::TemplateLimit { line, message },
        ErrorKind::SyntaxError | ErrorKind::BadEscape => TextError::TemplateSyntax { line, message },
        ErrorKind::UnknownFunction if message.starts_with("strftime_now ") => {
            message += ": the template asks for the time and none was given";
            TextError::TemplateFailed { line, message }
        }
        _ => {
            let place = error.range().and_then(|range| source.get(range));
            if let Some(place) = place.filter(|place| place.len() <= 100) {
                message += &format!(" in '{place}'");
            }
            TextError::TemplateFailed { line, message }
        }
    }
}

/// The filter that values get before they get a name.
const GUARD: &str = "value_that_may_have_a_name";

/// The source as the engine shall read it: `{% generation %}` blocks, which it does not know, become `{% with %}`
/// blocks, which have a scope of their own, too; and if `guards`, `{% set x = y %}` becomes
/// `{% set x = (y)|GUARD(..) %}`. Lines stay lines.
fn prepared(source: &str, guards: bool) -> Result<String, TextError> {
    let mut out = String::with_capacity(source.len() * 5 / 4);
    let (mut rest, mut elifs) = (source, 0);
    while let Some(start) = rest.as_bytes().windows(2).position(|pair| matches!(pair, b"{{" | b"{%" | b"{#")) {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let word = word(rest);
        let mut tag = Tag::default();
        if rest.starts_with("{#") {
            tag.end = rest.find("#}").map(|end| end + 2);
        } else if word == "raw" {
            let mut tags = rest.match_indices("{%").map(|(at, _)| at);
            tag.end = tags.find(|at| self::word(&rest[*at..]) == "endraw");
        } else {
            tag = Tag::scan(rest);
        }
        elifs += usize::from(word == "elif");
        if tag.chars > TAG_CHARS_MAX || elifs > ELIFS_MAX {
            let line = 1 + source[..source.len() - rest.len()].matches('\n').count() as u32;
            let message = match elifs > ELIFS_MAX {
                true => format!("there are more than {ELIFS_MAX} elif tags"),
                false => format!("a tag has more than {TAG_CHARS_MAX} characters"),
            };
            return Err(TextError::TemplateSyntax { line, message });
        }
        // The engine says what is wrong with a tag without end.
        let Some(end) = tag.end else { break };
        match (&rest[..end], tag.assigned) {
            (text, _) if matches!(word, "generation" | "endgeneration") => {
                out.push_str(&text.replacen("generation", "with", 1));
            }
            (text, Some(assigned)) if guards && word == "set" => {
                let inner = text.strip_suffix("%}").unwrap_or(text);
                let inner = inner.strip_suffix(['-', '+']).unwrap_or(inner);
                let (target, value) = inner.split_at(assigned);
                let (close, in_namespace) = (&text[inner.len()..], target.contains('.'));
                out.push_str(&format!("{target} ({value})|{GUARD}({in_namespace}) {close}"));
            }
            (text, _) => out.push_str(text),
        }
        rest = &rest[end..];
    }
    Ok(out + rest)
}

/// The first word of a block tag.
fn word(tag: &str) -> &str {
    let inner = tag.strip_prefix("{%").unwrap_or_default();
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start();
    &inner[..inner.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(inner.len())]
}

/// What a tag looks like from outside.
#[derive(Default)]
struct Tag {
    /// Its length, if it ends.
    end: Option<usize>,
    /// Characters that are neither in strings nor white.
    chars: usize,
    /// Behind the first `=` outside of brackets.
    assigned: Option<usize>,
}

impl Tag {
    /// Looks at the tag that `text` begins with, as the engine's own scanner does.
    fn scan(text: &str) -> Self {
        let mut tag = Self::default();
        let close = if text.starts_with("{{") { "}}" } else { "%}" };
        let (mut quote, mut depth) = (None, 0_i32);
        let mut chars = text.char_indices().skip(2);
        while let Some((at, c)) = chars.next() {
            match (quote, c) {
                (Some(_), '\\') => drop(chars.next()),
                (Some(open), _) if open == c => quote = None,
                (Some(_), _) => {}
                _ if depth == 0 && text[at..].starts_with(close) => {
                    tag.end = Some(at + 2);
                    break;
                }
                (None, '\'' | '"') => quote = Some(c),
                (None, '(' | '[' | '{') => depth += 1,
                (None, ')' | ']' | '}') => depth -= 1,
                (None, '=') if depth == 0 && tag.assigned.is_none() => tag.assigned = Some(at + 1),
                _ => {}
            }
            tag.chars += usize::from(quote.is_none() && !c.is_whitespace());
        }
        tag
    }
}

#[cfg(test)]
mod tests;
