//! Python's formatting: `"%5.2f" % x` and `"{:>5}".format(x)`.

use super::calls::CallArgs;
use super::value::{SeqKind, Value};
use super::{Budget, Error, Res, ops};

/// Widths and precisions above this are refused.
const WIDTH_MAX: usize = 10_000;

/// One conversion: `%-05.2f` or `{:<05.2f}`.
#[derive(Default)]
struct Spec {
    fill: Option<char>,
    /// `<`, `>`, `^` or `=` (padding after the sign).
    align: Option<char>,
    plus: Option<char>,
    alternate: bool,
    grouping: Option<char>,
    width: usize,
    precision: Option<usize>,
    kind: Option<char>,
}

fn bad(message: impl Into<String>) -> Error {
    Error::runtime(message)
}

/// Reads a decimal number off the front.
fn take_number(text: &mut &str) -> Res<Option<usize>> {
    let length = text.bytes().take_while(u8::is_ascii_digit).count();
    if length == 0 {
        return Ok(None);
    }
    let number = text[..length].parse().unwrap_or(usize::MAX);
    if number > WIDTH_MAX {
        return Err(bad("the width of a format is too large"));
    }
    *text = &text[length..];
    Ok(Some(number))
}

fn take_char(text: &mut &str, accept: impl Fn(char) -> bool) -> Option<char> {
    let first = text.chars().next().filter(|&c| accept(c))?;
    *text = &text[first.len_utf8()..];
    Some(first)
}

/// `format % values`
pub(super) fn percent(format: &str, values: &Value, budget: &Budget) -> Res<Value> {
    let single = std::slice::from_ref(values);
    let list = match values {
        Value::Seq(seq) if seq.kind == SeqKind::Tuple => &seq.items[..],
        _ => single,
    };
    let mut used = 0;
    let mut next = || {
        used += 1;
        list.get(used - 1).cloned().ok_or_else(|| bad("not enough arguments for format string"))
    };
    let mut out = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        budget.push(&mut out, &rest[..at])?;
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('%') {
            budget.push(&mut out, "%")?;
            rest = after;
            continue;
        }
        let mut named = None;
        if let Some(after) = rest.strip_prefix('(') {
            let (name, after) = after.split_once(')').ok_or_else(|| bad("incomplete format key"))?;
            if !matches!(values, Value::Dict(_)) {
                return Err(bad("format requires a mapping"));
            }
            named = Some(ops::item(values, &budget.text(name)?, budget)?);
            rest = after;
        }
        let mut spec = percent_spec(&mut rest)?;
        let value = match named {
            Some(value) => value,
            None => next()?,
        };
        let text = percent_value(&mut spec, &value, budget)?;
        pad(&mut out, &spec, &text, '>', budget)?;
    }
    budget.push(&mut out, rest)?;
    let all_used = match values {
        Value::Seq(seq) if seq.kind == SeqKind::Tuple => used >= list.len(),
        // Whatever can be indexed counts as a mapping of which nothing need be used.
        Value::Seq(_) | Value::Dict(_) | Value::Undefined(_) => true,
        _ => used > 0,
    };
    if !all_used {
        return Err(bad("not all arguments converted during string formatting"));
    }
    budget.text(out)
}

/// Reads flags, width, precision and kind of a `%` conversion.
fn percent_spec(rest: &mut &str) -> Res<Spec> {
    let mut spec = Spec::default();
    while let Some(flag) = take_char(rest, |c| "-+ #0".contains(c)) {
        match flag {
            '-' => spec.align = Some('<'),
            '0' if spec.align.is_none() => (spec.fill, spec.align) = (Some('0'), Some('=')),
            '#' => spec.alternate = true,
            '0' => {}
            sign => spec.plus = Some(sign),
        }
    }
    spec.width = take_number(rest)?.unwrap_or(0);
    if take_char(rest, |c| c == '.').is_some() {
        spec.precision = Some(take_number(rest)?.unwrap_or(0));
    }
    spec.kind = take_char(rest, |_| true);
    Ok(spec)
}

fn percent_value(spec: &mut Spec, value: &Value, budget: &Budget) -> Res<String> {
    let kind = spec.kind.ok_or_else(|| bad("incomplete format"))?;
    let mut text = String::new();
    match kind {
        's' | 'r' | 'a' => {
            if kind == 's' {
                value.write_str(&mut text, budget)?
            } else {
                value.write_repr(&mut text, budget)?
            }
            // Zero padding is for numbers only.
            (spec.fill, spec.align) = (None, spec.align.filter(|&align| align == '<'));
            truncate(&mut text, spec.precision);
        }
        'c' => match value {
            Value::Str(one) if one.chars().count() == 1 => text.push_str(one),
            _ => return Err(bad("%c requires int or char")),
        },
        'd' | 'i' | 'u' | 'x' | 'X' | 'o' => {
            let int = match value {
                Value::Float(float) if !"xXo".contains(kind) => Some(float.trunc() as i128),
                other => other.as_int(),
            };
            let int = int
                .ok_or_else(|| bad(format!("%{kind} format: a real number is required, not {}", value.type_name())))?;
            spec.kind = Some(if "iu".contains(kind) { 'd' } else { kind });
            text = integer(int, spec);
        }
        'f' | 'F' | 'e' | 'E' | 'g' | 'G' => {
            let float = value.as_float();
            let float = float.ok_or_else(|| bad(format!("must be real number, not {}", value.type_name())))?;
            text = self::float(float, spec);
        }
        other => return Err(bad(format!("unsupported format character '{other}'"))),
    }
    Ok(text)
}

fn truncate(text: &mut String, chars: Option<usize>) {
    if let Some((at, _)) = chars.and_then(|chars| text.char_indices().nth(chars)) {
        text.truncate(at);
    }
}

fn sign(negative: bool, spec: &Spec) -> &'static str {
    match (negative, spec.plus) {
        (true, _) => "-",
        (_, Some('+')) => "+",
        (_, Some(' ')) => " ",
        _ => "",
    }
}

fn integer(value: i128, spec: &Spec) -> String {
    let size = value.unsigned_abs();
    let (prefix, digits) = match spec.kind {
        Some('x') => ("0x", format!("{size:x}")),
        Some('X') => ("0X", format!("{size:X}")),
        Some('o') => ("0o", format!("{size:o}")),
        Some('b') => ("0b", format!("{size:b}")),
        _ => ("", size.to_string()),
    };
    let prefix = if spec.alternate { prefix } else { "" };
    format!("{}{prefix}{}", sign(value < 0, spec), grouped(&digits, spec.grouping))
}

/// Separates thousands in the whole part.
fn grouped(digits: &str, separator: Option<char>) -> String {
    let Some(separator) = separator else { return digits.to_owned() };
    let whole = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    let mut out = String::new();
    for (i, c) in digits[..whole].char_indices() {
        if i > 0 && (whole - i) % 3 == 0 {
            out.push(separator);
        }
        out.push(c);
    }
    out + &digits[whole..]
}

fn float(value: f64, spec: &Spec) -> String {
    let size = value.abs();
    let kind = spec.kind.unwrap_or('g');
    let precision = spec.precision.unwrap_or(6);
    let digits = if !value.is_finite() {
        if value.is_nan() { "nan" } else { "inf" }.to_owned()
    } else {
        match kind.to_ascii_lowercase() {
            'f' => format!("{size:.precision$}"),
            '%' => format!("{:.precision$}%", size * 100.0),
            'e' => exponent(&format!("{size:.precision$e}")),
            _ => general(size, precision.max(1), spec.alternate),
        }
    };
    let digits = if kind.is_ascii_uppercase() { digits.to_uppercase() } else { digits };
    let negative = value.is_sign_negative() && !value.is_nan();
    format!("{}{}", sign(negative, spec), grouped(&digits, spec.grouping))
}

/// Rust's `1.5e2` as C's `1.5e+02`.
fn exponent(text: &str) -> String {
    let (digits, exponent) = text.split_once('e').unwrap_or((text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// C's `%g`: significant digits, trailing zeros dropped unless `keep_zeros`.
fn general(size: f64, significant: usize, keep_zeros: bool) -> String {
    let scientific = format!("{size:.*e}", significant - 1);
    let power: i32 = scientific.split_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or(0);
    let trim = |digits: &str| match digits.contains('.') && !keep_zeros {
        true => digits.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => digits.to_owned(),
    };
    if (-4..significant as i32).contains(&power) {
        let decimals = usize::try_from(significant as i32 - 1 - power).unwrap_or(0);
        trim(&format!("{size:.decimals$}"))
    } else {
        let text = exponent(&scientific);
        let (digits, tail) = text.split_once('e').unwrap_or((&text, ""));
        format!("{}e{tail}", trim(digits))
    }
}

/// Appends `text` padded to the width.
fn pad(out: &mut String, spec: &Spec, text: &str, default_align: char, budget: &Budget) -> Res<()> {
    let missing = spec.width.saturating_sub(text.chars().count());
    budget.alloc(text.len() + 4 * missing)?;
    let fill = spec.fill.unwrap_or(' ');
    let align = spec.align.unwrap_or(default_align);
    let left = match align {
        '<' => 0,
        '^' => missing / 2,
        _ => missing,
    };
    let number_sign = if align == '=' { text.find(|c| !"+- ".contains(c)).unwrap_or(0) } else { 0 };
    out.push_str(&text[..number_sign]);
    out.extend(std::iter::repeat_n(fill, left));
    out.push_str(&text[number_sign..]);
    out.extend(std::iter::repeat_n(fill, missing - left));
    Ok(())
}

/// `format.format(args)`
pub(super) fn braces(format: &str, args: &CallArgs, budget: &Budget) -> Res<Value> {
    let mut out = String::new();
    let mut automatic = 0;
    let mut rest = format;
    while let Some(at) = rest.find(['{', '}']) {
        budget.push(&mut out, &rest[..at])?;
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            budget.push(&mut out, brace)?;
            rest = after;
            continue;
        }
        if brace == "}" {
            return Err(bad("single '}' encountered in format string"));
        }
        let (field, after) = rest.split_once('}').ok_or_else(|| bad("expected '}' before end of string"))?;
        if field.contains('{') {
            return Err(bad("nested format fields are not supported"));
        }
        rest = after;
        let (target, spec) = field.split_once(':').unwrap_or((field, ""));
        let (target, conversion) = match target.split_once('!') {
            Some((target, conversion)) => (target, Some(conversion)),
            None => (target, None),
        };
        let value = braces_field(target, args, &mut automatic, budget)?;
        braces_value(&mut out, &value, conversion, spec, budget)?;
    }
    budget.push(&mut out, rest)?;
    budget.text(out)
}

/// The argument that `name`, `0`, `` or `name.attribute[item]` stands for.
fn braces_field(target: &str, args: &CallArgs, automatic: &mut usize, budget: &Budget) -> Res<Value> {
    let end = target.find(['.', '[']).unwrap_or(target.len());
    let (first, mut path) = target.split_at(end);
    let value = if first.is_empty() {
        *automatic += 1;
        args.positional.get(*automatic - 1)
    } else if let Ok(index) = first.parse::<usize>() {
        args.positional.get(index)
    } else {
        args.named.iter().find(|(name, _)| &**name == first).map(|(_, value)| value)
    };
    let mut value = value.cloned().ok_or_else(|| bad(format!("no argument for the format field '{{{target}}}'")))?;
    while !path.is_empty() {
        if let Some(tail) = path.strip_prefix('[') {
            let (key, tail) = tail.split_once(']').ok_or_else(|| bad("missing ']' in format"))?;
            let key = key.parse().map_or_else(|_| budget.text(key), |int| Ok(Value::Int(int)))?;
            (value, path) = (ops::item(&value, &key, budget)?, tail);
        } else {
            let tail = path.strip_prefix('.').unwrap_or(path);
            let (name, tail) = tail.split_at(tail.find(['.', '[']).unwrap_or(tail.len()));
            (value, path) = (ops::attribute(&value, name, budget)?, tail);
        }
    }
    Ok(value)
}

fn braces_value(out: &mut String, value: &Value, conversion: Option<&str>, mut text: &str, budget: &Budget) -> Res<()> {
    let mut spec = Spec::default();
    let second = text.chars().nth(1);
    if second.is_some_and(|c| "<>^=".contains(c)) {
        spec.fill = take_char(&mut text, |_| true);
    }
    spec.align = take_char(&mut text, |c| "<>^=".contains(c));
    spec.plus = take_char(&mut text, |c| "+- ".contains(c));
    spec.alternate = take_char(&mut text, |c| c == '#').is_some();
    if take_char(&mut text, |c| c == '0').is_some() && spec.align.is_none() {
        (spec.fill, spec.align) = (Some('0'), Some('='));
    }
    spec.width = take_number(&mut text)?.unwrap_or(0);
    spec.grouping = take_char(&mut text, |c| ",_".contains(c));
    if take_char(&mut text, |c| c == '.').is_some() {
        spec.precision = take_number(&mut text)?;
    }
    spec.kind = take_char(&mut text, |_| true);
    if !text.is_empty() {
        return Err(bad("invalid format specifier"));
    }
    let mut body = String::new();
    match (conversion, value) {
        (Some("r" | "a"), _) => value.write_repr(&mut body, budget)?,
        (None, Value::Float(float)) if spec.kind.is_some() || spec.precision.is_some() => {
            body = self::float(*float, &spec);
        }
        (None, Value::Int(_) | Value::Bool(_)) if spec.kind.is_some_and(|k| "eEfFgG%".contains(k)) => {
            body = self::float(value.as_float().unwrap_or(0.0), &spec);
        }
        (None, Value::Int(int)) => body = integer(*int, &spec),
        (None, Value::Float(_)) => value.write_str(&mut body, budget)?,
        _ => {
            value.write_str(&mut body, budget)?;
            truncate(&mut body, spec.precision);
        }
    }
    let is_number = conversion.is_none() && matches!(value, Value::Int(_) | Value::Float(_));
    pad(out, &spec, &body, if is_number { '>' } else { '<' }, budget)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn percent_text(format: &str, values: Vec<Value>) -> String {
        let budget = Budget::new(10_000, 100_000);
        let values = Value::seq(SeqKind::Tuple, values, &budget).unwrap();
        percent(format, &values, &budget).unwrap().as_str().unwrap().to_owned()
    }

    #[test]
    fn percent_follows_python() {
        let f = |x| vec![Value::Float(x)];
        assert_eq!(percent_text("%.2f|", f(2.675)), "2.67|");
        assert_eq!(percent_text("%8.3e", f(12345.678)), "1.235e+04");
        assert_eq!(percent_text("%g", f(1e-5)), "1e-05");
        assert_eq!(percent_text("%g", f(100_000.0)), "100000");
        assert_eq!(percent_text("%+05d|%-5d|%x", [7, 8, 255].map(Value::Int).to_vec()), "+0007|8    |ff");
        assert_eq!(percent_text("%5s%%|%.1s", vec![Value::Str("ab".into()), Value::Str("cd".into())]), "   ab%|c");
    }
}
