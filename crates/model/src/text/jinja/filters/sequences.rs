//! Filters over sequences and dicts.

use std::cmp::Ordering;

use super::super::calls::{CallArgs, count_arg, text_arg};
use super::super::value::{SeqKind, Value};
use super::super::{Budget, Error, Res, methods, ops, predicates};

/// `value | name(args)`
pub(super) fn apply(name: &str, value: &Value, args: &CallArgs, budget: &Budget) -> Res<Value> {
    match name {
        "map" => map(value, args, budget),
        "select" | "reject" | "selectattr" | "rejectattr" => select(name, value, args, budget),
        "join" => join(value, args, budget),
        "sort" => sort(value, args, budget),
        "dictsort" => dictsort(value, args, budget),
        "unique" => unique(value, args, budget),
        "min" | "max" => extreme(name, value, args, budget),
        "sum" => sum(value, args, budget),
        "batch" | "slice" => chunks(name, value, args, budget),
        _ => {
            args.none(name)?;
            match (name, value) {
                ("list", _) => Value::list(value.iterate(budget)?, budget),
                ("items", Value::Undefined(_)) => Value::seq(SeqKind::Generator, Vec::new(), budget),
                ("items", Value::Dict(dict)) => methods::items(dict, SeqKind::Generator, budget),
                ("items", _) => Err(Error::runtime("can only get item pairs from a mapping")),
                ("reverse", Value::Str(text)) => budget.text(text.chars().rev().collect::<String>()),
                ("reverse", _) => {
                    let items = value.iterate(budget)?.into_iter().rev().collect();
                    Value::seq(SeqKind::Generator, items, budget)
                }
                ("first", _) => Ok(value
                    .iterate(budget)?
                    .into_iter()
                    .next()
                    .unwrap_or_else(|| Value::undefined("no first item, sequence was empty"))),
                ("last", Value::Seq(seq)) if seq.kind == SeqKind::Generator => {
                    Err(Error::runtime("'generator' object is not reversible"))
                }
                _ => Ok(value
                    .iterate(budget)?
                    .pop()
                    .unwrap_or_else(|| Value::undefined("no last item, sequence was empty"))),
            }
        }
    }
}

/// `item.a.0.b`, as the `attribute` argument of many filters has it.
fn path(item: &Value, attribute: &Value, budget: &Budget) -> Res<Value> {
    let Value::Str(path) = attribute else {
        return ops::item(item, attribute, budget);
    };
    let mut value = item.clone();
    for part in path.split('.') {
        let key = match part.parse::<u32>() {
            Ok(index) => Value::Int(i128::from(index)),
            Err(_) => Value::Str(part.into()),
        };
        value = ops::item(&value, &key, budget)?;
    }
    Ok(value)
}

/// What to sort or compare an item by: its attribute, case ignored unless asked for.
fn key(item: &Value, attribute: Option<&Value>, cased: bool, budget: &Budget) -> Res<Value> {
    let value = match attribute {
        None | Some(Value::None) => item.clone(),
        Some(attribute) => path(item, attribute, budget)?,
    };
    match &value {
        Value::Str(text) if !cased => budget.text(text.to_lowercase()),
        _ => Ok(value),
    }
}

fn map(value: &Value, args: &CallArgs, budget: &Budget) -> Res<Value> {
    if !value.truth() {
        return Value::seq(SeqKind::Generator, Vec::new(), budget);
    }
    let items = value.iterate(budget)?;
    let mapped: Res<Vec<Value>> = if args.positional.is_empty() {
        let [attribute, default] = args.bind("map", ["attribute", "default"])?;
        let attribute = attribute.ok_or_else(|| Error::runtime("map requires a filter argument"))?;
        let get = |item: &Value| {
            let found = path(item, &attribute, budget)?;
            Ok(match (&found, &default) {
                (Value::Undefined(_), Some(default)) => default.clone(),
                _ => found,
            })
        };
        items.iter().map(get).collect()
    } else {
        let name = args.positional[0].to_text(budget)?;
        let rest = CallArgs { positional: args.positional[1..].to_vec(), named: args.named.clone() };
        items.iter().map(|item| super::apply(&name, item, &rest, budget)).collect()
    };
    Value::seq(SeqKind::Generator, mapped?, budget)
}

fn select(name: &str, value: &Value, args: &CallArgs, budget: &Budget) -> Res<Value> {
    let mut kept = Vec::new();
    if value.truth() {
        let mut rest = args.positional.iter();
        let attribute = match name.ends_with("attr") {
            true => Some(rest.next().ok_or_else(|| Error::runtime("missing parameter for attribute name"))?),
            false => None,
        };
        let test = rest.next().map(|test| test.to_text(budget)).transpose()?;
        let test_args = CallArgs { positional: rest.cloned().collect(), named: args.named.clone() };
        let wanted = name.starts_with("select");
        for item in value.iterate(budget)? {
            budget.step(1)?;
            let subject = match attribute {
                Some(attribute) => path(&item, attribute, budget)?,
                None => item.clone(),
            };
            let passed = match &test {
                Some(test) => predicates::test(test, &subject, &test_args, budget)?,
                None => subject.truth(),
            };
            if passed == wanted {
                kept.push(item);
            }
        }
    }
    Value::seq(SeqKind::Generator, kept, budget)
}

fn join(value: &Value, args: &CallArgs, budget: &Budget) -> Res<Value> {
    let [separator, attribute] = args.bind("join", ["d", "attribute"])?;
    let separator = separator.map_or(Ok("".into()), |separator| separator.to_text(budget))?;
    let mut out = String::new();
    for (i, item) in value.iterate(budget)?.iter().enumerate() {
        if i > 0 {
            budget.push(&mut out, &separator)?;
        }
        match &attribute {
            None | Some(Value::None) => item.write_str(&mut out, budget)?,
            Some(attribute) => path(item, attribute, budget)?.write_str(&mut out, budget)?,
        }
    }
    budget.text(out)
}

fn is_true(value: Option<&Value>) -> bool {
    value.is_some_and(Value::truth)
}

/// Sorts stably with an order that may fail (where the standard library's may not).
pub(in super::super) fn sort_by<T: Clone>(
    items: &mut [T],
    compare: &dyn Fn(&T, &T) -> Res<Option<Ordering>>,
) -> Res<()> {
    let middle = items.len() / 2;
    if middle == 0 {
        return Ok(());
    }
    sort_by(&mut items[..middle], compare)?;
    sort_by(&mut items[middle..], compare)?;
    let (left, right) = (items[..middle].to_vec(), items[middle..].to_vec());
    let (mut left, mut right) = (left.into_iter().peekable(), right.into_iter().peekable());
    for slot in items {
        let from_right = match (left.peek(), right.peek()) {
            (Some(l), Some(r)) => compare(r, l)? == Some(Ordering::Less),
            (None, _) => true,
            (_, None) => false,
        };
        let next = if from_right { right.next() } else { left.next() };
        // Both halves together have as many items as there are slots.
        *slot = next.expect("a merge has an item for every slot");
    }
    Ok(())
}

/// Items with their keys, sorted by the keys.
fn sorted(items: Vec<Value>, key: impl Fn(&Value) -> Res<Value>, reverse: bool, budget: &Budget) -> Res<Vec<Value>> {
    let mut keyed: Vec<_> = items.into_iter().map(|item| Ok((key(&item)?, item))).collect::<Res<_>>()?;
    sort_by(&mut keyed, &|a, b| {
        let order = a.0.compare(&b.0, "<", budget)?;
        Ok(if reverse { order.map(Ordering::reverse) } else { order })
    })?;
    Ok(keyed.into_iter().map(|(_, item)| item).collect())
}

fn sort(value: &Value, args: &CallArgs, budget: &Budget) -> Res<Value> {
    let [reverse, cased, attribute] = args.bind("sort", ["reverse", "case_sensitive", "attribute"])?;
    let cased = is_true(cased.as_ref());
    let by = |item: &Value| match &attribute {
        Some(Value::Str(paths)) if paths.contains(',') => {
            let keys = paths.split(',').map(|part| key(item, Some(&Value::Str(part.into())), cased, budget));
            Value::list(keys.collect::<Res<_>>()?, budget)
        }
        attribute => key(item, attribute.as_ref(), cased, budget),
    };
    let items = sorted(value.iterate(budget)?, by, is_true(reverse.as_ref()), budget)?;
    Value::list(items, budget)
}

fn dictsort(value: &Value, args: &CallArgs, budget: &Budget) -> Res<Value> {
    let [cased, by, reverse] = args.bind("dictsort", ["case_sensitive", "by", "reverse"])?;
    let place = match text_arg("dictsort", by)?.as_deref() {
        None | Some("key") => Value::Int(0),
        Some("value") => Value::Int(1),
        Some(_) => {
            return Err(Error::runtime("you can only sort by either \"key\" or \"value\""));
        }
    };
    let Value::Dict(dict) = value else {
        let name = value.type_name();
        return Err(Error::runtime(format!("dictsort needs a dict, not {name}")));
    };
    let pairs = methods::items(dict, SeqKind::List, budget)?.iterate(budget)?;
    let by = |pair: &Value| key(pair, Some(&place), is_true(cased.as_ref()), budget);
    Value::list(sorted(pairs, by, is_true(reverse.as_ref()), budget)?, budget)
}

fn unique(value: &Value, args: &CallArgs, budget: &Budget) -> Res<Value> {
    let [cased, attribute] = args.bind("unique", ["case_sensitive", "attribute"])?;
    let mut seen: Vec<Value> = Vec::new();
    let mut kept = Vec::new();
    'items: for item in value.iterate(budget)? {
        let key = key(&item, attribute.as_ref(), is_true(cased.as_ref()), budget)?;
        for before in &seen {
            if before.equals(&key, budget)? {
                continue 'items;
            }
        }
        seen.push(key);
        kept.push(item);
    }
    Value::seq(SeqKind::Generator, kept, budget)
}

fn extreme(name: &str, value: &Value, args: &CallArgs, budget: &Budget) -> Res<Value> {
    let [cased, attribute] = args.bind(name, ["case_sensitive", "attribute"])?;
    let wanted = if name == "min" { Ordering::Less } else { Ordering::Greater };
    let mut best: Option<(Value, Value)> = None;
    for item in value.iterate(budget)? {
        let key = key(&item, attribute.as_ref(), is_true(cased.as_ref()), budget)?;
        let better = match &best {
            Some((best, _)) => key.compare(best, "<", budget)? == Some(wanted),
            None => true,
        };
        if better {
            best = Some((key, item));
        }
    }
    let nothing = || Value::undefined("no aggregated item, sequence was empty");
    Ok(best.map_or_else(nothing, |(_, item)| item))
}

fn sum(value: &Value, args: &CallArgs, budget: &Budget) -> Res<Value> {
    let [attribute, start] = args.bind("sum", ["attribute", "start"])?;
    let mut total = start.unwrap_or(Value::Int(0));
    for item in value.iterate(budget)? {
        let part = key(&item, attribute.as_ref(), true, budget)?;
        total = ops::binary(super::super::ast::BinOp::Add, &total, &part, budget)?;
    }
    Ok(total)
}

/// `batch`: lists of so many items; `slice`: so many lists.
fn chunks(name: &str, value: &Value, args: &CallArgs, budget: &Budget) -> Res<Value> {
    let [count, fill] = args.bind(name, ["count", "fill_with"])?;
    let count = count_arg(name, count)?.filter(|&count| count > 0);
    let count = count.ok_or_else(|| Error::runtime(format!("{name} needs a positive number")))?;
    let fill = fill.filter(|fill| !matches!(fill, Value::None));
    let items = value.iterate(budget)?;
    let mut lists = Vec::new();
    if name == "batch" {
        for chunk in items.chunks(count) {
            let missing = if fill.is_some() { count - chunk.len() } else { 0 };
            budget.alloc(missing.saturating_mul(super::super::value::ENTRY_BYTES))?;
            let padding = (0..missing).filter_map(|_| fill.clone());
            lists.push(Value::list(chunk.iter().cloned().chain(padding).collect(), budget)?);
        }
    } else {
        budget.alloc(count.saturating_mul(super::super::value::ENTRY_BYTES))?;
        let (each, longer) = (items.len() / count, items.len() % count);
        let mut items = items.into_iter();
        for i in 0..count {
            let mut list: Vec<_> = items.by_ref().take(each + usize::from(i < longer)).collect();
            list.extend(fill.clone().filter(|_| i >= longer));
            lists.push(Value::list(list, budget)?);
        }
    }
    Value::seq(SeqKind::Generator, lists, budget)
}
