//! Filters: `value | name(args)`. Those over sequences are in [`sequences`].

mod sequences;

use std::sync::Arc;

use super::calls::{CallArgs, count_arg, int_arg, text_arg};
use super::value::{SeqKind, Value};
use super::{Budget, Error, Res, json, methods, pyfmt, pystr};

pub(super) use sequences::sort_by;

const NAMES: [&str; 43] = [
    "abs",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "first",
    "float",
    "forceescape",
    "format",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "sum",
    "title",
    "tojson",
    "trim",
    "unique",
    "upper",
    "wordcount",
];
/// Whether there is such a filter.
pub(super) fn exists(name: &str) -> bool {
    NAMES.contains(&name)
}

/// `value | name(args)`
pub(super) fn apply(name: &str, value: &Value, args: &CallArgs, budget: &Budget) -> Res<Value> {
    match name {
        "default" | "d" => {
            let [default, boolean] = args.bind(name, ["default_value", "boolean"])?;
            let boolean = boolean.is_some_and(|boolean| boolean.truth());
            if matches!(value, Value::Undefined(_)) || (boolean && !value.truth()) {
                return Ok(default.unwrap_or_else(|| Value::Str("".into())));
            }
            Ok(value.clone())
        }
        "tojson" => json::tojson(value, args, budget),
        "length" | "count" => {
            args.none(name)?;
            Ok(Value::Int(value.length(budget)? as i128))
        }
        "upper" | "lower" | "capitalize" | "title" | "string" | "safe" | "trim" | "center" | "replace" | "indent"
        | "escape" | "e" | "forceescape" | "format" | "wordcount" => {
            let text = value.to_text(budget)?;
            budget.scan(text.len())?;
            text_filter(name, &text, args, budget)
        }
        "int" | "float" | "abs" | "round" => number_filter(name, value, args),
        _ if exists(name) => sequences::apply(name, value, args, budget),
        other => Err(Error::runtime(format!("no filter named '{other}'"))),
    }
}

fn text_filter(name: &str, s: &Arc<str>, args: &CallArgs, budget: &Budget) -> Res<Value> {
    match name {
        "trim" => methods::call(&Value::Str(s.clone()), "strip", args, budget),
        "replace" => {
            let [old, new, count] = args.bind(name, ["old", "new", "count"])?;
            let needed = || Error::runtime("replace needs two arguments");
            let old = old.ok_or_else(needed)?.to_text(budget)?;
            let new = new.ok_or_else(needed)?.to_text(budget)?;
            let count = int_arg(name, count)?.and_then(|count| usize::try_from(count).ok());
            methods::replace(s, &old, &new, count, budget)
        }
        "indent" => indent(s, args, budget),
        "center" => {
            let [width] = args.bind(name, ["width"])?;
            let width = width.unwrap_or(Value::Int(80));
            let args = CallArgs { positional: vec![width], named: Vec::new() };
            methods::call(&Value::Str(s.clone()), "center", &args, budget)
        }
        "format" if args.named.is_empty() => {
            let values = Value::seq(SeqKind::Tuple, args.positional.clone(), budget)?;
            pyfmt::percent(s, &values, budget)
        }
        "format" => {
            let named = args.named.iter().map(|(name, v)| (Value::Str(name.clone()), v.clone()));
            pyfmt::percent(s, &Value::dict(named.collect(), budget)?, budget)
        }
        _ => {
            args.none(name)?;
            match name {
                "upper" => budget.text(s.to_uppercase()),
                "lower" => budget.text(s.to_lowercase()),
                "capitalize" => budget.text(pystr::capitalize(s)),
                "title" => budget.text(pystr::title_words(s)),
                "wordcount" => {
                    let is_word = |c: char| c.is_alphanumeric() || c == '_';
                    let words = s.split(|c| !is_word(c)).filter(|word| !word.is_empty());
                    Ok(Value::Int(words.count() as i128))
                }
                "escape" | "e" | "forceescape" => escape(s, budget),
                _ => Ok(Value::Str(s.clone())),
            }
        }
    }
}

fn escape(s: &str, budget: &Budget) -> Res<Value> {
    let mut out = String::new();
    for c in s.chars() {
        match c {
            '&' => budget.push(&mut out, "&amp;")?,
            '<' => budget.push(&mut out, "&lt;")?,
            '>' => budget.push(&mut out, "&gt;")?,
            '\'' => budget.push(&mut out, "&#39;")?,
            '"' => budget.push(&mut out, "&#34;")?,
            other => out.push(other),
        }
    }
    budget.text(out)
}

fn indent(s: &str, args: &CallArgs, budget: &Budget) -> Res<Value> {
    let [width, first, blank] = args.bind("indent", ["width", "first", "blank"])?;
    let indent = match width {
        Some(Value::Str(text)) => text,
        other => {
            let width = count_arg("indent", other)?.unwrap_or(4);
            budget.alloc(width)?;
            " ".repeat(width).into()
        }
    };
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.truth());
    let (first, blank) = (is_true(first), is_true(blank));
    let mut out = String::new();
    let with_end = format!("{s}\n");
    for (i, text) in pystr::split_lines(&with_end, false).into_iter().enumerate() {
        if i > 0 {
            budget.push(&mut out, "\n")?;
        }
        if if i == 0 { first } else { blank || !text.is_empty() } {
            budget.push(&mut out, &indent)?;
        }
        budget.push(&mut out, text)?;
    }
    budget.text(out)
}

fn number_filter(name: &str, value: &Value, args: &CallArgs) -> Res<Value> {
    if let Value::Undefined(why) = value {
        return Err(Error::runtime(&**why));
    }
    match name {
        "int" => {
            let [default, base] = args.bind(name, ["default", "base"])?;
            let base = int_arg(name, base)?.unwrap_or(10);
            let parsed = match value {
                Value::Str(text) => parse_int(text, base).or_else(|| parse_float(text).and_then(float_to_int)),
                Value::Float(float) => float_to_int(*float),
                other => other.as_int(),
            };
            Ok(parsed.map_or_else(|| default.unwrap_or(Value::Int(0)), Value::Int))
        }
        "float" => {
            let [default] = args.bind(name, ["default"])?;
            let parsed = value.as_float().or_else(|| value.as_str().and_then(parse_float));
            Ok(parsed.map_or_else(|| default.unwrap_or(Value::Float(0.0)), Value::Float))
        }
        "abs" => {
            args.none(name)?;
            match (value, value.as_int()) {
                (Value::Float(float), _) => Ok(Value::Float(float.abs())),
                (_, Some(int)) => Ok(Value::Int(int.saturating_abs())),
                (other, None) => {
                    let name = other.type_name();
                    Err(Error::runtime(format!("bad operand type for abs(): '{name}'")))
                }
            }
        }
        _ => round(value, args),
    }
}

fn float_to_int(float: f64) -> Option<i128> {
    float.is_finite().then_some(float.trunc() as i128)
}

/// Python's `int(text, base)`.
fn parse_int(text: &str, base: i128) -> Option<i128> {
    let text = pystr::rstrip(pystr::lstrip(text, None), None).to_ascii_lowercase();
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(&text)),
    };
    let prefix = match base {
        16 => "0x",
        8 => "0o",
        2 => "0b",
        _ => "",
    };
    let digits = digits.strip_prefix(prefix).unwrap_or(digits);
    let broken = digits.starts_with(['_', '+', '-']) || digits.ends_with('_') || digits.contains("__");
    let base = u32::try_from(base).ok().filter(|base| (2..=36).contains(base) && !broken)?;
    let int = i128::from_str_radix(&digits.replace('_', ""), base).ok()?;
    Some(if negative { -int } else { int })
}

/// Python's `float(text)`.
fn parse_float(text: &str) -> Option<f64> {
    pystr::rstrip(pystr::lstrip(text, None), None).parse().ok()
}

fn round(value: &Value, args: &CallArgs) -> Res<Value> {
    let [precision, method] = args.bind("round", ["precision", "method"])?;
    let precision = int_arg("round", precision)?.unwrap_or(0).clamp(-300, 300) as i32;
    let method = text_arg("round", method)?;
    let Some(float) = value.as_float() else {
        let name = value.type_name();
        return Err(Error::runtime(format!("type {name} doesn't define __round__ method")));
    };
    let scale = 10f64.powi(precision);
    let rounded = match method.as_deref().unwrap_or("common") {
        "ceil" => (float * scale).ceil() / scale,
        "floor" => (float * scale).floor() / scale,
        "common" if matches!(value, Value::Int(_) | Value::Bool(_)) && precision >= 0 => {
            return Ok(value.clone());
        }
        // Formatting rounds the exact value, halves to even, as Python does.
        "common" if precision >= 0 => format!("{float:.*}", precision as usize).parse().unwrap_or(float),
        "common" => (float * scale).round_ties_even() / scale,
        _ => return Err(Error::runtime("method must be common, ceil or floor")),
    };
    Ok(Value::Float(rounded))
}
