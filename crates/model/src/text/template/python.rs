//! What the engine has not, or not as in Python: how values are printed, `tojson`, some filters and methods, dates.

use std::fmt::{self, Write};
use std::sync::Arc;

use minijinja::value::{ArgType, Enumerator, Kwargs, Object, ObjectRepr, Rest, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};
use minijinja_contrib::pycompat;
use serde_json::Value as Json;

use super::{Limits, Stop};

/// Values that contain each other more deeply are not printed.
const DEPTH_MAX: usize = 100;

/// Makes the engine more like Python. No value that is built here may have more than `limits.bytes` bytes.
pub(super) fn add_to(environment: &mut Environment<'_>, limits: Limits) {
    environment.set_formatter(move |out, _, value| {
        let printed;
        let text = match value.as_str() {
            Some(text) => text,
            None => {
                printed = text(value, limits)?;
                &printed
            }
        };
        limits.check(0)?;
        limits.write(text.len())?;
        Ok(out.write_str(text)?)
    });
    environment.set_unknown_method_callback(move |state, value, name, args| method(state, value, name, args, limits));
    environment.add_filter("tojson", move |value: &Value, options: Kwargs| tojson(value, &options, limits));
    environment.add_filter("string", move |value: &Value| text(value, limits));
    environment.add_filter("join", move |items: &Value, separator: Option<&Value>| {
        join(items, &separator.map_or_else(|| Ok(String::new()), |separator| text(separator, limits))?, limits)
    });
    environment.add_filter("replace", move |value: &Value, old: &Value, new: &Value, count: Option<usize>| {
        replace(&text(value, limits)?, &text(old, limits)?, &text(new, limits)?, count, limits)
    });
    environment.add_filter("format", move |state: &State, format: &str, args: Rest<Value>| {
        limits.check(formatted(format, &args))?;
        filters::format(state, &format.into(), args)
    });
    environment.add_filter("indent", move |value: &Value, width: _, first: _, blank: _, options: Kwargs| {
        let (width, first) = (option(width, &options, "width")?, option(first, &options, "first")?);
        let blank = option(blank, &options, "blank")?.unwrap_or(false);
        options.assert_all_used()?;
        indent(&text(value, limits)?, width, first.unwrap_or(false), blank, limits)
    });
    let numbers = [
        ("int", Value::from_function(filters::int), Value::from(0)),
        ("float", Value::from_function(filters::float), Value::from(0.0)),
    ];
    for (name, filter, zero) in numbers {
        environment.add_filter(name, move |state: &State, value: Value, default: _, options: Kwargs| {
            let default = option(default, &options, "default")?;
            options.assert_all_used()?;
            let value = value.as_str().map(|text| text.trim().into()).unwrap_or(value);
            filter.call(state, &[value]).or_else(|_| Ok::<Value, Error>(default.unwrap_or_else(|| zero.clone())))
        });
    }
    for name in ["length", "count"] {
        environment.add_filter(name, |value: &Value| if value.is_undefined() { Ok(0) } else { filters::length(value) });
    }
    for name in ["sequence", "iterable"] {
        environment.add_test(name, |value: &Value| !value.is_none() && value.try_iter().is_ok());
    }
    environment.add_test("lower", is_lower);
    environment.add_test("upper", is_upper);
    // Products of lists are lazy and may be longer than memory; these filters build them.
    for (name, filter) in [
        ("batch", Value::from_function(filters::batch)),
        ("list", Value::from_function(filters::list)),
        ("map", Value::from_function(filters::map)),
        ("reject", Value::from_function(filters::reject)),
        ("rejectattr", Value::from_function(filters::rejectattr)),
        ("reverse", Value::from_function(filters::reverse)),
        ("select", Value::from_function(filters::select)),
        ("selectattr", Value::from_function(filters::selectattr)),
        ("slice", Value::from_function(filters::slice)),
        ("sort", Value::from_function(filters::sort)),
        ("unique", Value::from_function(filters::unique)),
    ] {
        environment.add_filter(name, move |state: &State, args: Rest<Value>| {
            let items = args.iter().map(|arg| arg.as_usize().or_else(|| arg.len()).unwrap_or(0)).max();
            limits.check(items.unwrap_or(0).saturating_mul(size_of::<Value>()))?;
            filter.call(state, &args)
        });
    }
}

fn wrong(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// An argument that is given by its place or by its name.
fn option<'a, T: ArgType<'a, Output = T>>(
    given: Option<T>,
    options: &'a Kwargs,
    name: &'a str,
) -> Result<Option<T>, Error> {
    given.map_or_else(|| options.get(name), |given| Ok(Some(given)))
}

/// A value that the engine, too, prints as Python does: a list or a dict.
#[derive(Debug)]
struct Native(Value);

impl Object for Native {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        if self.0.kind() == ValueKind::Map { ObjectRepr::Map } else { ObjectRepr::Seq }
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.get_item(key).ok().filter(|value| !value.is_undefined())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        match self.0.kind() {
            ValueKind::Map => Enumerator::Values(self.0.try_iter().into_iter().flatten().collect()),
            _ => Enumerator::Seq(self.0.len().unwrap_or(0)),
        }
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text(&self.0, Limits::NONE).map_err(|_| fmt::Error)?)
    }
}

/// The engine's value of some JSON.
pub(super) fn value(json: &Json) -> Value {
    match json {
        Json::Array(items) => Value::from_object(Native(items.iter().map(value).collect())),
        Json::Object(map) => {
            Value::from_object(Native(map.iter().map(|(key, item)| (key.clone(), value(item))).collect()))
        }
        scalar => Value::from_serialize(scalar),
    }
}

/// `str(value)`
fn text(value: &Value, limits: Limits) -> Result<String, Error> {
    let mut printer = Printer { out: String::new(), json: None, limits };
    match value.kind() {
        ValueKind::Undefined => {}
        ValueKind::String => printer.out.push_str(value.as_str().unwrap_or_default()),
        _ => printer.value(value, 0)?,
    }
    Ok(printer.out)
}

/// `json.dumps(value, ensure_ascii, indent, separators, sort_keys)`, as transformers' `tojson`.
fn tojson(value: &Value, options: &Kwargs, limits: Limits) -> Result<String, Error> {
    let indent: Option<Value> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let indent = match indent.filter(|indent| !indent.is_none()) {
        Some(indent) if indent.as_str().is_some() => indent.as_str().map(str::to_owned),
        Some(indent) => match usize::try_from(indent)? {
            width @ ..=100 => Some(" ".repeat(width)),
            _ => return Err(Stop::Limit("tojson is asked for an indent of more than 100").into()),
        },
        None => None,
    };
    let [item, key] = match separators {
        Some(separators) => <[_; 2]>::try_from(separators).map_err(|_| wrong("there are two separators"))?,
        None => [if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()],
    };
    let [ascii, sorted] = [options.get::<Option<bool>>("ensure_ascii")?, options.get("sort_keys")?];
    options.assert_all_used()?;
    let style = Style { indent, item, key, ascii: ascii.unwrap_or(false), sorted: sorted.unwrap_or(false) };
    let mut printer = Printer { out: String::new(), json: Some(style), limits };
    printer.value(value, 0)?;
    Ok(printer.out)
}

/// How JSON is written.
struct Style {
    indent: Option<String>,
    item: String,
    key: String,
    ascii: bool,
    sorted: bool,
}

/// Writes values as `repr` does, or as JSON.
struct Printer {
    out: String,
    json: Option<Style>,
    limits: Limits,
}

impl Printer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(Stop::Limit("a value is nested too deeply to be printed").into());
        }
        self.limits.check(self.out.len())?;
        let json = self.json.is_some();
        match value.kind() {
            ValueKind::None => self.out.push_str(if json { "null" } else { "None" }),
            ValueKind::Bool if json => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if !value.is_integer() => {
                let number = f64::try_from(value.clone())?;
                self.out.push_str(&float(number, json));
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.items('[', value.try_iter()?.map(|item| (None, item)), ']', depth)?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.json.as_ref().is_some_and(|style| style.sorted) {
                    keys.sort();
                }
                let entries = keys.into_iter().map(|key| (Some(key.clone()), value.get_item(&key).unwrap_or_default()));
                self.items('{', entries, '}', depth)?;
            }
            ValueKind::Undefined if !json => self.out.push_str("Undefined"),
            kind if json && kind != ValueKind::Bool && kind != ValueKind::Number => {
                return Err(wrong(format!("a value of type {kind} is not JSON serializable")));
            }
            _ => self.out.push_str(&value.to_string()),
        }
        Ok(())
    }

    fn items(
        &mut self,
        open: char,
        items: impl Iterator<Item = (Option<Value>, Value)>,
        close: char,
        depth: usize,
    ) -> Result<(), Error> {
        self.out.push(open);
        let mut empty = true;
        for (key, item) in items {
            if !empty {
                self.out.push_str(self.json.as_ref().map_or(", ", |style| &style.item));
            }
            empty = false;
            self.line(depth + 1);
            if let Some(key) = key {
                if self.json.is_some() && key.as_str().is_none() {
                    let start = self.out.len();
                    self.value(&key, depth + 1)?;
                    let key = self.out.split_off(start);
                    self.string(&key);
                } else {
                    self.value(&key, depth + 1)?;
                }
                self.out.push_str(self.json.as_ref().map_or(": ", |style| &style.key));
            }
            self.value(&item, depth + 1)?;
        }
        if !empty {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    /// A new line with its indentation, if there is one.
    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.json.as_ref().and_then(|style| style.indent.as_ref()) {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&mut self, text: &str) {
        let quote = if self.json.is_none() && (!text.contains('\'') || text.contains('"')) { '\'' } else { '"' };
        self.out.push(quote);
        for c in text.chars() {
            match c {
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\x08' if self.json.is_some() => self.out.push_str("\\b"),
                '\x0c' if self.json.is_some() => self.out.push_str("\\f"),
                _ if c == quote => self.out.extend(['\\', c]),
                // Writing to a string cannot fail.
                _ if c.is_control() && self.json.is_none() => drop(write!(self.out, "\\x{:02x}", c as u32)),
                _ if c < ' ' || (!c.is_ascii() && self.json.as_ref().is_some_and(|style| style.ascii)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                _ => self.out.push(c),
            }
        }
        self.out.push(quote);
    }
}

/// `repr(number)`, or as JSON has it.
fn float(number: f64, json: bool) -> String {
    if !number.is_finite() {
        let names = if json { ["NaN", "Infinity", "-Infinity"] } else { ["nan", "inf", "-inf"] };
        return names[if number.is_nan() { 0 } else { 1 + usize::from(number < 0.0) }].to_owned();
    }
    let text = format!("{number:?}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}

/// `separator.join(items)`
fn join(items: &Value, separator: &str, limits: Limits) -> Result<String, Error> {
    let mut out = String::new();
    for (i, item) in items.try_iter()?.enumerate() {
        if i > 0 {
            out.push_str(separator);
        }
        match item.as_str() {
            Some(item) => out.push_str(item),
            None => out.push_str(&text(&item, limits)?),
        }
        limits.check(out.len())?;
    }
    Ok(out)
}

/// `text.replace(old, new, count)`
fn replace(text: &str, old: &str, new: &str, count: Option<usize>, limits: Limits) -> Result<String, Error> {
    let found = text.matches(old).count().min(count.unwrap_or(usize::MAX));
    limits.check(text.len().saturating_add(found.saturating_mul(new.len())))?;
    Ok(text.replacen(old, new, found))
}

/// The filter `indent`; `width` may be text.
fn indent(text: &str, width: Option<Value>, first: bool, blank: bool, limits: Limits) -> Result<String, Error> {
    let width = width.unwrap_or_else(|| Value::from(4));
    let indent = match width.as_str() {
        Some(indent) => indent.to_owned(),
        None => " ".repeat(usize::try_from(width)?.min(limits.bytes)),
    };
    limits.check(text.matches('\n').count().saturating_mul(indent.len()).saturating_add(text.len()))?;
    let mut out = if first { indent.clone() } else { String::new() };
    for (i, line) in text.split('\n').map(|line| line.strip_suffix('\r').unwrap_or(line)).enumerate() {
        if i > 0 {
            out.push('\n');
            out.push_str(if blank || !line.is_empty() { &indent } else { "" });
        }
        out.push_str(line);
    }
    Ok(out)
}

/// How many bytes a format may become with these arguments: all arguments and the widest padding at each place.
fn formatted(format: &str, args: &[Value]) -> usize {
    let numbers = format.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let widest = numbers.map(|digits| digits.parse().unwrap_or(usize::MAX)).max().unwrap_or(0);
    let all = args.iter().map(|arg| arg.as_str().map_or(32, str::len)).fold(widest, usize::saturating_add);
    format.matches(['%', '{']).count().saturating_mul(all).saturating_add(format.len())
}

fn is_lower(text: &str) -> bool {
    text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase)
}

fn is_upper(text: &str) -> bool {
    text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase)
}

/// Methods that the engine's own imitation of Python has not, has otherwise, or that could build or run without end.
fn method(state: &State, value: &Value, name: &str, args: &[Value], limits: Limits) -> Result<Value, Error> {
    let list = |parts: Vec<&str>| {
        limits.check(parts.len() * size_of::<Value>())?;
        Ok(parts.into_iter().map(Value::from).collect())
    };
    // Python counts characters, not bytes.
    let place = |s: &str, at: Option<usize>| Ok(Value::from(at.map_or(-1, |at| s[..at].chars().count() as i64)));
    let Some(s) = value.as_str() else {
        return pycompat::unknown_method_callback(state, value, name, args);
    };
    match (name, args) {
        ("split" | "rsplit", _) => {
            let (separator, most, options): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
            let (separator, most) = (option(separator, &options, "sep")?, option(most, &options, "maxsplit")?);
            options.assert_all_used()?;
            split(s, separator, most.and_then(|most| usize::try_from(most).ok()), name == "rsplit").and_then(list)
        }
        ("partition" | "rpartition", [separator]) => {
            let separator = separator.as_str().unwrap_or_default();
            let (before, after) = match name {
                "partition" => s.split_once(separator).unwrap_or((s, "")),
                _ => s.rsplit_once(separator).unwrap_or(("", s)),
            };
            list(vec![before, &s[before.len()..s.len() - after.len()], after])
        }
        ("removeprefix", [part]) => Ok(s.strip_prefix(part.as_str().unwrap_or_default()).unwrap_or(s).into()),
        ("removesuffix", [part]) => Ok(s.strip_suffix(part.as_str().unwrap_or_default()).unwrap_or(s).into()),
        ("find", [part]) => place(s, part.as_str().and_then(|part| s.find(part))),
        ("rfind", [part]) => place(s, part.as_str().and_then(|part| s.rfind(part))),
        ("count", [part]) => Ok(part.as_str().map_or(0, |part| s.matches(part).count()).into()),
        ("join", [items]) => join(items, s, limits).map(Value::from),
        ("replace", _) => {
            let (old, new, count): (&str, &str, Option<i64>) = from_args(args)?;
            replace(s, old, new, count.and_then(|count| usize::try_from(count).ok()), limits).map(Value::from)
        }
        ("islower", []) => Ok(is_lower(s).into()),
        ("isupper", []) => Ok(is_upper(s).into()),
        ("isalnum" | "isalpha" | "isdigit" | "isnumeric" | "isspace", []) if s.is_empty() => Ok(false.into()),
        ("format", _) => {
            limits.check(formatted(s, args))?;
            pycompat::unknown_method_callback(state, value, name, args)
        }
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// `text.split(separator, most)`, from the right if `right`.
fn split<'s>(text: &'s str, separator: Option<&str>, most: Option<usize>, right: bool) -> Result<Vec<&'s str>, Error> {
    if separator == Some("") {
        return Err(wrong("empty separator"));
    }
    let most = most.unwrap_or(usize::MAX);
    let mut parts = Vec::new();
    let mut rest = if separator.is_none() { text.trim() } else { text };
    while parts.len() < most {
        let cut = match (separator, right) {
            (Some(separator), false) => rest.split_once(separator),
            (Some(separator), true) => rest.rsplit_once(separator).map(|(rest, part)| (part, rest)),
            (None, false) => rest.split_once(char::is_whitespace).map(|(part, rest)| (part, rest.trim_start())),
            (None, true) => rest.rsplit_once(char::is_whitespace).map(|(rest, part)| (part, rest.trim_end())),
        };
        let Some((part, left)) = cut else { break };
        parts.push(part);
        rest = left;
    }
    if separator.is_some() || !rest.is_empty() {
        parts.push(rest);
    }
    if right {
        parts.reverse();
    }
    Ok(parts)
}

/// `strftime` in the C locale, of a time in seconds since 1970, UTC.
pub(super) fn strftime(now: i64, format: &str) -> Result<String, Error> {
    const MONTHS: &str = "January February March April May June July August September October November December";
    const DAYS: &str = "Sunday Monday Tuesday Wednesday Thursday Friday Saturday";
    let days = now.div_euclid(86_400);
    // After Howard Hinnant's `civil_from_days`.
    let era = (days + 719_468).div_euclid(146_097);
    let day_of_era = (days + 719_468).rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) =
        (now.div_euclid(3600).rem_euclid(24), now.div_euclid(60).rem_euclid(60), now.rem_euclid(60));
    let month_name = MONTHS.split(' ').nth(month as usize - 1).unwrap_or_default();
    let day_name = DAYS.split(' ').nth((days + 4).rem_euclid(7) as usize).unwrap_or_default();
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let code = rest.next().unwrap_or('%');
        // glibc's flag for numbers without padding.
        let (code, width) = if code == '-' { (rest.next().unwrap_or('-'), 0) } else { (code, 2) };
        let number = |value: i64| format!("{value:0width$}");
        out.push_str(&match code {
            'Y' => year.to_string(),
            'y' => number(year.rem_euclid(100)),
            'm' => number(month),
            'd' => number(day),
            'H' => number(hour),
            'I' => number((hour + 11) % 12 + 1),
            'M' => number(minute),
            'S' => number(second),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            'A' => day_name.to_owned(),
            'a' => day_name[..3].to_owned(),
            'B' => month_name.to_owned(),
            'b' => month_name[..3].to_owned(),
            'F' => format!("{year}-{month:02}-{day:02}"),
            'T' => format!("{hour:02}:{minute:02}:{second:02}"),
            'j' if month > 2 => {
                format!("{:03}", day_of_year + 60 + i64::from(year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)))
            }
            'j' => format!("{:03}", day_of_year - 305),
            '%' => "%".to_owned(),
            other => return Err(wrong(format!("strftime_now: unknown code '%{other}'"))),
        });
    }
    Ok(out)
}
