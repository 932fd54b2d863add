//! `tojson` as transformers has it: Python's `json.dumps` with non-ASCII text kept.

use std::fmt::Write;
use std::sync::Arc;

use super::calls::{CallArgs, text_arg};
use super::value::Value;
use super::{Budget, Error, Res, pystr};

/// How to write.
struct Style {
    ascii: bool,
    indent: Option<Arc<str>>,
    item_separator: Arc<str>,
    key_separator: Arc<str>,
    sort_keys: bool,
}

/// `value | tojson(ensure_ascii, indent, separators, sort_keys)`
pub(super) fn tojson(value: &Value, args: &CallArgs, budget: &Budget) -> Res<Value> {
    let [ascii, indent, separators, sort_keys] =
        args.bind("tojson", ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let indent = match &indent {
        Some(width) if width.as_int().is_some() => {
            let width = usize::try_from(width.as_int().unwrap_or(0).max(0)).unwrap_or(usize::MAX);
            budget.alloc(width)?;
            Some(" ".repeat(width).into())
        }
        _ => text_arg("tojson", indent)?,
    };
    let (mut item, mut key) = (if indent.is_some() { "," } else { ", " }.into(), ": ".into());
    if let Some(separators) = separators.filter(|s| !matches!(s, Value::None)) {
        match &separators.iterate(budget)?[..] {
            [Value::Str(a), Value::Str(b)] => (item, key) = (a.clone(), b.clone()),
            _ => return Err(Error::runtime("tojson needs two separators, both str")),
        }
    }
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.truth());
    let style = Style {
        ascii: is_true(ascii),
        indent,
        item_separator: item,
        key_separator: key,
        sort_keys: is_true(sort_keys),
    };
    let mut out = String::new();
    write(&mut out, value, &style, 0, budget)?;
    budget.text(out)
}

fn write(out: &mut String, value: &Value, style: &Style, level: usize, budget: &Budget) -> Res<()> {
    budget.step(1)?;
    match value {
        Value::Str(text) => write_str(out, text, style.ascii, budget),
        Value::Seq(seq) if seq.kind != super::value::SeqKind::Generator => {
            if seq.items.is_empty() {
                return budget.push(out, "[]");
            }
            budget.push(out, "[")?;
            for (i, item) in seq.items.iter().enumerate() {
                separate(out, style, i, level + 1, budget)?;
                write(out, item, style, level + 1, budget)?;
            }
            line(out, style, level, budget)?;
            budget.push(out, "]")
        }
        Value::Dict(dict) => {
            if dict.entries().is_empty() {
                return budget.push(out, "{}");
            }
            let mut entries: Vec<_> = dict.entries().iter().collect();
            if style.sort_keys {
                super::filters::sort_by(&mut entries, &|a, b| a.0.compare(&b.0, "<", budget))?;
            }
            budget.push(out, "{")?;
            for (i, (key, value)) in entries.into_iter().enumerate() {
                separate(out, style, i, level + 1, budget)?;
                let Some(key) = scalar(key).or_else(|| key.as_str().map(str::to_owned)) else {
                    let name = key.type_name();
                    let message = format!("keys must be str, int, float, bool or None, not {name}");
                    return Err(Error::runtime(message));
                };
                write_str(out, &key, style.ascii, budget)?;
                budget.push(out, &style.key_separator)?;
                write(out, value, style, level + 1, budget)?;
            }
            line(out, style, level, budget)?;
            budget.push(out, "}")
        }
        other => match scalar(other) {
            Some(text) => budget.push(out, &text),
            None => Err(Error::runtime(format!("object of type {} is not JSON serializable", other.type_name()))),
        },
    }
}

fn scalar(value: &Value) -> Option<String> {
    Some(match value {
        Value::None => "null".into(),
        Value::Bool(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        Value::Float(value) if value.is_nan() => "NaN".into(),
        Value::Float(value) if value.is_infinite() => if *value > 0.0 { "Infinity" } else { "-Infinity" }.into(),
        Value::Float(value) => pystr::float_repr(*value),
        _ => return None,
    })
}

fn separate(out: &mut String, style: &Style, i: usize, level: usize, budget: &Budget) -> Res<()> {
    if i > 0 {
        budget.push(out, &style.item_separator)?;
    }
    line(out, style, level, budget)
}

/// A new line with its indentation, if there is one.
fn line(out: &mut String, style: &Style, level: usize, budget: &Budget) -> Res<()> {
    if let Some(indent) = &style.indent {
        budget.push(out, "\n")?;
        for _ in 0..level {
            budget.push(out, indent)?;
        }
    }
    Ok(())
}

fn write_str(out: &mut String, text: &str, ascii: bool, budget: &Budget) -> Res<()> {
    budget.alloc(text.len() + 2)?;
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            _ if c >= ' ' && (c.is_ascii() || !ascii) => out.push(c),
            _ => {
                budget.alloc(12)?;
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a string cannot fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
    out.push('"');
    Ok(())
}
