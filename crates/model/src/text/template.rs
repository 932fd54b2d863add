//! Chat templates on the engine `minijinja`, set up to render as transformers does with Jinja2.
//!
//! `python` holds what prints and behaves as in Python. The rest is for templates that mean harm, since they come from
//! the internet; `guard` writes checks into their source. Instructions are paid from fuel, in proportion to the
//! conversation, and time is limited: it is looked at in every round of a loop and every call of a macro. Limited in
//! proportion, too, are all that is written (into the prompt or into a variable), and each value that is printed, that
//! `python` builds, that a product makes, or that gets a name (`set`, `with`, loops, arguments). So nothing can double in
//! a loop or a recursion. Recursion is limited by the engine, and for what its parser does not limit there are
//! limits of the source, of each tag and of `elif`. Where it panics, that is an error.
//!
//! What is left: between two names an expression may join values, 64 at most, and recursion may do so at 75 levels, each with
//! values of 64 KiB and 16 times the conversation. So memory is bounded by about 300 MB and a multiple of the
//! conversation. More a template cannot do: it reaches no files, no network and nothing of the host.
//!
//! Known differences from Jinja2; only the first two change what any of 200 released templates writes. Text marked
//! `safe` is not remembered, so adding to it escapes nothing. An empty list cannot be turned around (`[::-1]`), and
//! other negative steps may include one item too many. `'..' % x`, unary `+`, tuples without brackets, `varargs` and
//! `kwargs` of macros are not there. Tuples are lists. A default in a macro does not see earlier arguments. `for .. if`
//! asks before the loop begins. `loop.last` is never true for the characters of a text. Lists made in the template have
//! double quotes where `~` makes them text. Some mistakes are no errors: `None` can be iterated, values of all types
//! compared. Small ones are listed as `differing` in `tests/fixtures/chat_expressions.json`.

mod guard;
mod python;

use std::cell::Cell;
use std::error::Error as StdError;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use minijinja::value::ObjectRepr;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde_json::{Map, Value as Json};

use super::TextError;

/// The largest template, in bytes. Released ones have up to 20,000.
const SOURCE_BYTES_MAX: usize = 1 << 20;
/// Nested evaluations; a call of a macro counts as four.
const DEPTH_MAX: usize = 300;
/// Values in values, in values that get a name.
const NESTED_MAX: usize = 100;
/// How many parts of a value are looked at. Where values can grow from round to round, in namespaces, all of them are, of
/// all such values together so many, and more for each byte of the conversation.
const PARTS_SEEN: usize = 200;
const NAMESPACE_PARTS: usize = 4_000_000;
const NAMESPACE_PARTS_PER_INPUT_BYTE: usize = 1000;
/// Instructions that every render may take, and more for each byte of the conversation.
const FUEL: usize = 5_000_000;
const FUEL_PER_INPUT_BYTE: usize = 64;
/// Bytes that a value may have, and more for each byte of the conversation.
const VALUE_BYTES: usize = 64 << 10;
const VALUE_BYTES_PER_INPUT_BYTE: usize = 16;
/// Bytes that may be written in all, and more for each byte of the conversation.
const WRITTEN: usize = 32 << 20;
const WRITTEN_PER_INPUT_BYTE: usize = 1024;
/// How often a text may be repeated if the number is not written out.
const TIMES_MAX: usize = 1000;
/// A backstop for what fuel does not count. Templates take milliseconds.
const TIME: Duration = Duration::from_secs(10);

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
        let plain = guard::prepared(source, false)?;
        guarded(&plain, || environment(Limits::NONE).template_from_named_str("chat", &plain).map(drop))?;
        Ok(Self { source: guard::prepared(source, true)? })
    }

    /// Renders with these variables. `now` is what `strftime_now` tells; without it there is none.
    pub(super) fn render(&self, variables: &Map<String, Json>, now: Option<i64>) -> Result<String, TextError> {
        let input = serde_json::to_string(variables).map_or(0, |json| json.len());
        let limits = Limits {
            bytes: VALUE_BYTES + VALUE_BYTES_PER_INPUT_BYTE * input,
            written: WRITTEN + WRITTEN_PER_INPUT_BYTE * input,
            parts: NAMESPACE_PARTS + NAMESPACE_PARTS_PER_INPUT_BYTE * input,
            until: Some(Instant::now() + TIME),
        };
        SPENT.set(Spent::default());
        let mut prompt = Vec::new();
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
        Ok(String::from_utf8_lossy(&prompt).into_owned())
    }
}

/// What a template may use, beside fuel.
#[derive(Clone, Copy)]
struct Limits {
    /// Bytes of one value.
    bytes: usize,
    /// Bytes that are written.
    written: usize,
    /// Parts of values in namespaces that are looked at.
    parts: usize,
    until: Option<Instant>,
}

/// What the render that goes on in this thread has used.
#[derive(Clone, Copy, Default)]
struct Spent {
    written: usize,
    parts: usize,
}

thread_local! {
    static SPENT: Cell<Spent> = const { Cell::new(Spent { written: 0, parts: 0 }) };
}

impl Limits {
    const NONE: Self = Self { bytes: usize::MAX, written: usize::MAX, parts: usize::MAX, until: None };

    /// Fails if it is late, or if a value of so many bytes is too large.
    fn check(self, bytes: usize) -> Result<(), Error> {
        match self.until {
            _ if bytes > self.bytes => Err(Stop::Limit("it builds too much").into()),
            Some(until) if Instant::now() > until => Err(Stop::Limit("it takes too long").into()),
            _ => Ok(()),
        }
    }

    /// Counts bytes that are written, or that a round of a loop or a call of a macro can write at most.
    fn write(self, bytes: usize) -> Result<(), Error> {
        let mut spent = SPENT.get();
        spent.written = spent.written.saturating_add(bytes);
        SPENT.set(spent);
        if spent.written > self.written { Err(Stop::Limit("it writes too much").into()) } else { Ok(()) }
    }

    /// Checks a value that gets a name.
    fn name(self, value: &Value, in_namespace: bool) -> Result<(), Error> {
        let length = value.as_str().map(str::len);
        self.check(length.unwrap_or_else(|| value.len().unwrap_or(0).saturating_mul(size_of::<Value>())))?;
        let mut spent = SPENT.get();
        let (mut seen, most) = match in_namespace {
            true => (spent.parts, self.parts),
            false => (0, PARTS_SEEN),
        };
        let is_flat = is_flat(value, in_namespace, 0, &mut seen, most);
        if in_namespace {
            spent.parts = seen;
            SPENT.set(spent);
            if seen > most {
                return Err(Stop::Limit("it builds too much").into());
            }
        }
        if is_flat { Ok(()) } else { Err(Stop::Limit("it puts values into each other too deeply").into()) }
    }

    /// Checks the left side of a product. `kind` tells what is on the right: a number, a text of so many bytes, something
    /// that [`Limits::times`] checks, or something unknown.
    fn factor(self, left: &Value, kind: &str, size: usize) -> Result<(), Error> {
        let number = left.as_i64().map(|n| usize::try_from(n).unwrap_or(0));
        match (left.as_str(), number, kind) {
            (Some(text), _, "number") => self.check(text.len().saturating_mul(size)),
            (Some(text), _, "other") => self.check(text.len().saturating_mul(TIMES_MAX)),
            (None, Some(number), "text") => self.check(number.saturating_mul(size)),
            (Some(_), _, "unknown") => Err(Stop::Limit("it repeats a text, it is not clear how often").into()),
            (None, Some(number), "other" | "unknown") if number > TIMES_MAX => {
                Err(Stop::Limit("it multiplies a large number by what may be a text").into())
            }
            _ => self.check(0),
        }
    }

    /// Checks the right side of a product.
    fn times(self, right: &Value) -> Result<(), Error> {
        match right.as_str() {
            Some(text) => self.check(text.len().saturating_mul(TIMES_MAX)),
            None if right.as_i64().is_some_and(|n| n > TIMES_MAX as i64) => {
                Err(Stop::Limit("it multiplies by a large number that is not written out").into())
            }
            None => Ok(()),
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
    environment.add_filter(guard::NAMED, move |value: Value, in_namespace: bool| {
        limits.name(&value, in_namespace).map(|()| value)
    });
    environment.add_filter(guard::ROUND, move |values: &Value, bytes: usize| {
        limits.write(bytes)?;
        values.try_iter()?.try_for_each(|value| limits.name(&value, false))
    });
    environment.add_filter(guard::FACTOR, move |left: Value, kind: &str, size: Option<usize>| {
        limits.factor(&left, kind, size.unwrap_or(0)).map(|()| left)
    });
    environment.add_filter(guard::TIMES, move |right: Value| limits.times(&right).map(|()| right));
    // It prints the engine's state, and is not in Jinja2.
    environment.remove_global("debug");
    python::add_to(&mut environment, limits);
    environment
}

/// Whether a value is nested so little that the engine can drop and compare it without overflowing the stack. Only `most`
/// parts are looked at. A namespace may not get into another, for it could get into itself.
fn is_flat(value: &Value, in_namespace: bool, depth: usize, seen: &mut usize, most: usize) -> bool {
    *seen += 1;
    let Some(object) = value.as_object().filter(|_| *seen < most) else { return true };
    if depth > NESTED_MAX
        || (in_namespace && ["::Namespace", "::Loop"].iter().any(|name| object.type_name().ends_with(name)))
    {
        return false;
    }
    let mut is_flat = |part: &Value| is_flat(part, in_namespace, depth + 1, seen, most);
    match object.repr() {
        ObjectRepr::Map => object.try_iter_pairs().into_iter().flatten().take(most).all(|(_, part)| is_flat(&part)),
        _ => object.try_iter().into_iter().flatten().take(most).all(|part| is_flat(&part)),
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
            if let Some(place) = place.filter(|place| place.len() <= 100 && !guard::shows(place)) {
                message += &format!(" in '{place}'");
            }
            TextError::TemplateFailed { line, message }
        }
    }
}

#[cfg(test)]
mod tests;
