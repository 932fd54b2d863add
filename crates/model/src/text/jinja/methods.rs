//! Methods of strings, lists and dicts. Those that would change a value are refused, as in the
//! sandbox of transformers.

use std::rc::Rc;

use super::calls::{CallArgs, count_arg, int_arg, needed_text, text_arg};
use super::value::{Dict, ENTRY_BYTES, Seq, SeqKind, Value};
use super::{Budget, Error, Res, pyfmt, pystr};

const STR: [&str; 37] = [
    "capitalize",
    "center",
    "count",
    "endswith",
    "find",
    "format",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "islower",
    "isnumeric",
    "isspace",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "title",
    "upper",
    "zfill",
];
const SEQ: [&str; 2] = ["count", "index"];
const DICT: [&str; 5] = ["copy", "get", "items", "keys", "values"];
/// Methods that Python has and the sandbox refuses.
const CHANGING: [&str; 11] =
    ["append", "clear", "extend", "insert", "pop", "popitem", "remove", "reverse", "setdefault", "sort", "update"];

/// `of.name`, where it is a method or belongs to the engine's own objects.
pub(super) fn attribute(of: &Value, name: &str) -> Option<Value> {
    let known = match of {
        Value::Str(_) => STR.contains(&name),
        Value::Seq(seq) if seq.kind == SeqKind::List => SEQ.contains(&name) || CHANGING.contains(&name),
        Value::Seq(seq) if seq.kind == SeqKind::Tuple => SEQ.contains(&name),
        Value::Dict(_) => DICT.contains(&name) || CHANGING[4..].contains(&name) || name == "clear",
        Value::Namespace(attributes) => {
            let attributes = attributes.borrow();
            return attributes.iter().find(|(have, _)| &**have == name).map(|(_, v)| v.clone());
        }
        Value::Loop(_) if name == "cycle" => true,
        Value::Loop(state) => return state.attribute(name),
        Value::Macro(def, _) if name == "name" => return Some(Value::Str(def.name.clone())),
        _ => false,
    };
    known.then(|| Value::Method(Rc::new((of.clone(), name.into()))))
}

/// `of.name(args)`
pub(super) fn call(of: &Value, name: &str, args: &CallArgs, budget: &Budget) -> Res<Value> {
    match of {
        Value::Str(text) => {
            budget.scan(text.len())?;
            str_method(text, name, args, budget)
        }
        Value::Seq(seq) if SEQ.contains(&name) => seq_method(seq, name, args, budget),
        Value::Dict(dict) if DICT.contains(&name) => dict_method(of, dict, name, args, budget),
        Value::Loop(state) => state.cycle(args),
        other => {
            Err(Error::runtime(format!("'{name}' would change a {}, which templates may not do", other.type_name())))
        }
    }
}

fn list(parts: Vec<&str>, kind: SeqKind, budget: &Budget) -> Res<Value> {
    budget.alloc(parts.iter().map(|part| part.len() + ENTRY_BYTES).sum())?;
    let items = parts.into_iter().map(|part| Value::Str(part.into())).collect();
    Value::seq(kind, items, budget)
}

fn str_method(s: &str, name: &str, args: &CallArgs, budget: &Budget) -> Res<Value> {
    match name {
        "strip" | "lstrip" | "rstrip" => strip(s, name, args, budget),
        "split" | "rsplit" => split(s, name, args, budget),
        "splitlines" => {
            let [keep] = args.bind(name, ["keepends"])?;
            let lines = pystr::split_lines(s, keep.is_some_and(|keep| keep.truth()));
            list(lines, SeqKind::List, budget)
        }
        "partition" | "rpartition" => partition(s, name, args, budget),
        "startswith" | "endswith" => {
            let [affix] = args.bind(name, ["prefix"])?;
            starts_or_ends(s, name == "startswith", affix.as_ref(), budget)
        }
        "removeprefix" | "removesuffix" => {
            let [affix] = args.bind(name, ["prefix"])?;
            let affix = needed_text(name, affix)?;
            let cut = match name {
                "removeprefix" => s.strip_prefix(&*affix),
                _ => s.strip_suffix(&*affix),
            };
            budget.text(cut.unwrap_or(s))
        }
        "replace" => {
            let [old, new, count] = args.bind(name, ["old", "new", "count"])?;
            let count = int_arg(name, count)?.and_then(|count| usize::try_from(count).ok());
            replace(s, &needed_text(name, old)?, &needed_text(name, new)?, count, budget)
        }
        "join" => join(s, args, budget),
        "find" | "rfind" | "index" | "rindex" | "count" => search(s, name, args),
        "format" => pyfmt::braces(s, args, budget),
        "center" | "ljust" | "rjust" | "zfill" => pad(s, name, args, budget),
        _ => {
            args.none(name)?;
            Ok(match name {
                "upper" => budget.text(s.to_uppercase())?,
                "lower" => budget.text(s.to_lowercase())?,
                "capitalize" => budget.text(pystr::capitalize(s))?,
                "title" => budget.text(pystr::title(s))?,
                _ => Value::Bool(is_all(s, name)),
            })
        }
    }
}

fn strip(s: &str, name: &str, args: &CallArgs, budget: &Budget) -> Res<Value> {
    let [chars] = args.bind(name, ["chars"])?;
    let chars = text_arg(name, chars)?;
    budget.step(s.len().saturating_mul(chars.as_ref().map_or(0, |chars| chars.len() / 64)))?;
    let left = if name == "rstrip" { s } else { pystr::lstrip(s, chars.as_deref()) };
    budget.text(if name == "lstrip" { left } else { pystr::rstrip(left, chars.as_deref()) })
}

fn partition(s: &str, name: &str, args: &CallArgs, budget: &Budget) -> Res<Value> {
    let [separator] = args.bind(name, ["sep"])?;
    let separator = needed_text(name, separator)?;
    check_separator(&separator)?;
    let from_left = name == "partition";
    let parts = if from_left { s.split_once(&*separator) } else { s.rsplit_once(&*separator) };
    let parts = match parts {
        Some((before, after)) => vec![before, &separator, after],
        None if from_left => vec![s, "", ""],
        None => vec!["", "", s],
    };
    list(parts, SeqKind::Tuple, budget)
}

fn join(s: &str, args: &CallArgs, budget: &Budget) -> Res<Value> {
    let [items] = args.bind("join", ["iterable"])?;
    let items = items.ok_or_else(|| Error::runtime("join() takes one argument"))?;
    let mut out = String::new();
    for (i, item) in items.iterate(budget)?.iter().enumerate() {
        let Value::Str(text) = item else {
            let found = item.type_name();
            return Err(Error::runtime(format!("sequence item {i}: expected str instance, {found} found")));
        };
        if i > 0 {
            budget.push(&mut out, s)?;
        }
        budget.push(&mut out, text)?;
    }
    budget.text(out)
}

/// The methods `isalpha` and the like.
fn is_all(s: &str, name: &str) -> bool {
    let all = |of: fn(char) -> bool| !s.is_empty() && s.chars().all(of);
    match name {
        "islower" => pystr::all_cased(s, false),
        "isupper" => pystr::all_cased(s, true),
        "isascii" => s.is_ascii(),
        "isspace" => all(pystr::is_space),
        "isalpha" => all(char::is_alphabetic),
        "isalnum" => all(char::is_alphanumeric),
        _ => all(char::is_numeric),
    }
}

fn check_separator(separator: &str) -> Res<()> {
    if separator.is_empty() { Err(Error::runtime("empty separator")) } else { Ok(()) }
}

fn split(s: &str, name: &str, args: &CallArgs, budget: &Budget) -> Res<Value> {
    let [separator, limit] = args.bind(name, ["sep", "maxsplit"])?;
    let separator = text_arg(name, separator)?;
    separator.as_deref().map_or(Ok(()), check_separator)?;
    let limit = int_arg(name, limit)?.and_then(|limit| usize::try_from(limit).ok());
    let parts = match &separator {
        Some(separator) => s.matches(&**separator).count(),
        None => s.len() / 2,
    };
    budget.alloc(parts.min(limit.unwrap_or(parts)).saturating_mul(16))?;
    list(pystr::split(s, separator.as_deref(), limit, name == "rsplit"), SeqKind::List, budget)
}

fn starts_or_ends(s: &str, starts: bool, affix: Option<&Value>, budget: &Budget) -> Res<Value> {
    let matches = |affix: &str| if starts { s.starts_with(affix) } else { s.ends_with(affix) };
    match affix {
        Some(Value::Str(affix)) => Ok(Value::Bool(matches(affix))),
        Some(Value::Seq(seq)) if seq.kind == SeqKind::Tuple => {
            budget.scan(seq.items.iter().filter_map(Value::as_str).map(str::len).sum())?;
            Ok(Value::Bool(seq.items.iter().filter_map(Value::as_str).any(matches)))
        }
        _ => Err(Error::runtime("startswith and endswith need a str or a tuple of str")),
    }
}

/// `s.replace(old, new, count)`, paid for before it is built.
pub(super) fn replace(s: &str, old: &str, new: &str, count: Option<usize>, budget: &Budget) -> Res<Value> {
    budget.scan(s.len())?;
    let found = s.matches(old).count().min(count.unwrap_or(usize::MAX));
    budget.alloc(s.len().saturating_add(found.saturating_mul(new.len())))?;
    Ok(Value::Str(s.replacen(old, new, found).into()))
}

fn search(s: &str, name: &str, args: &CallArgs) -> Res<Value> {
    let [part, start] = args.bind(name, ["sub", "start"])?;
    let part = needed_text(name, part)?;
    let start = count_arg(name, start)?.unwrap_or(0);
    let skipped = s.char_indices().nth(start).map_or(s.len(), |(at, _)| at);
    let tail = &s[skipped..];
    if name == "count" {
        return Ok(Value::Int(tail.matches(&*part).count() as i128));
    }
    let at = if name.starts_with('r') { tail.rfind(&*part) } else { tail.find(&*part) };
    match at {
        Some(at) => Ok(Value::Int(s[..skipped + at].chars().count() as i128)),
        None if name.ends_with("find") => Ok(Value::Int(-1)),
        None => Err(Error::runtime("substring not found")),
    }
}

fn pad(s: &str, name: &str, args: &CallArgs, budget: &Budget) -> Res<Value> {
    let [width, fill] = args.bind(name, ["width", "fillchar"])?;
    let width = count_arg(name, width)?.unwrap_or(0);
    let fill = text_arg(name, fill)?;
    let fill = fill.as_deref().unwrap_or(if name == "zfill" { "0" } else { " " });
    if fill.chars().count() != 1 {
        return Err(Error::runtime("the fill character must be exactly one character long"));
    }
    let length = s.chars().count();
    let missing = width.saturating_sub(length);
    budget.alloc(missing.saturating_mul(fill.len()).saturating_add(s.len()))?;
    let left = match name {
        "ljust" => 0,
        // CPython's rounding of an odd rest.
        "center" => missing / 2 + (missing & width & 1),
        _ => missing,
    };
    let (sign, body) = match s.strip_prefix(['-', '+']) {
        Some(body) if name == "zfill" => s.split_at(s.len() - body.len()),
        _ => ("", s),
    };
    let text = [sign, &fill.repeat(left), body, &fill.repeat(missing - left)].concat();
    Ok(Value::Str(text.into()))
}

fn seq_method(seq: &Seq, name: &str, args: &CallArgs, budget: &Budget) -> Res<Value> {
    let [wanted] = args.bind(name, ["value"])?;
    let wanted = wanted.unwrap_or(Value::None);
    let mut count = 0;
    for (i, item) in seq.items.iter().enumerate() {
        if item.equals(&wanted, budget)? {
            if name == "index" {
                return Ok(Value::Int(i as i128));
            }
            count += 1;
        }
    }
    if name == "index" {
        return Err(Error::runtime("the value is not in the list"));
    }
    Ok(Value::Int(count))
}

fn dict_method(of: &Value, dict: &Dict, name: &str, args: &CallArgs, budget: &Budget) -> Res<Value> {
    if name == "get" {
        let [key, default] = args.bind(name, ["key", "default"])?;
        let key = key.ok_or_else(|| Error::runtime("get() takes a key"))?;
        let found = dict.get(&key, budget)?.cloned();
        return Ok(found.or(default).unwrap_or(Value::None));
    }
    args.none(name)?;
    match name {
        "copy" => Ok(of.clone()),
        "items" => items(dict, SeqKind::List, budget),
        "keys" => Value::list(dict.entries().iter().map(|(key, _)| key.clone()).collect(), budget),
        _ => Value::list(dict.entries().iter().map(|(_, v)| v.clone()).collect(), budget),
    }
}

/// The entries of a dict as pairs.
pub(super) fn items(dict: &Dict, kind: SeqKind, budget: &Budget) -> Res<Value> {
    let pair = |(key, value): &(Value, Value)| Value::seq(SeqKind::Tuple, vec![key.clone(), value.clone()], budget);
    Value::seq(kind, dict.entries().iter().map(pair).collect::<Res<_>>()?, budget)
}
