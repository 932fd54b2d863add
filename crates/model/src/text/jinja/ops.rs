//! Operators, item and attribute access, slices.

use super::ast::{BinOp, CmpOp};
use super::value::{ENTRY_BYTES, SeqKind, Value};
use super::{Budget, Error, Res, methods, pyfmt};

/// `left op right`
pub(super) fn binary(op: BinOp, left: &Value, right: &Value, budget: &Budget) -> Res<Value> {
    if let (BinOp::Mod, Value::Str(format)) = (op, left) {
        return pyfmt::percent(format, right, budget);
    }
    for side in [left, right] {
        if let Value::Undefined(why) = side {
            return Err(Error::runtime(&**why));
        }
    }
    match (op, left, right) {
        (BinOp::Add, Value::Str(a), Value::Str(b)) => {
            budget.alloc(a.len() + b.len())?;
            return Ok(Value::Str([&**a, &**b].concat().into()));
        }
        (BinOp::Add, Value::Seq(a), Value::Seq(b)) if a.kind == b.kind && a.kind != SeqKind::Generator => {
            budget.alloc((a.items.len() + b.items.len()) * ENTRY_BYTES)?;
            return Value::seq(a.kind, [&a.items[..], &b.items[..]].concat(), budget);
        }
        (BinOp::Mul, _, _) => {
            if let Some(repeated) = repeat(left, right, budget)? {
                return Ok(repeated);
            }
        }
        _ => {}
    }
    match (left.as_int(), right.as_int()) {
        (Some(a), Some(b)) => int_op(op, a, b),
        _ => match (left.as_float(), right.as_float()) {
            (Some(a), Some(b)) => float_op(op, a, b),
            _ => Err(unsupported(op, left, right)),
        },
    }
}

fn unsupported(op: BinOp, left: &Value, right: &Value) -> Error {
    let (a, b) = (left.type_name(), right.type_name());
    if op == BinOp::Add && matches!(left, Value::Str(_) | Value::Seq(_)) {
        return Error::runtime(format!("can only concatenate {a} (not \"{b}\") to {a}"));
    }
    let op = match op {
        BinOp::Add => "+",
        BinOp::Sub => "-",
        BinOp::Mul => "*",
        BinOp::Div => "/",
        BinOp::FloorDiv => "//",
        BinOp::Mod => "%",
        BinOp::Pow => "** or pow()",
    };
    Error::runtime(format!("unsupported operand type(s) for {op}: '{a}' and '{b}'"))
}

/// `"ab" * 3`, `3 * [1]`; `None` if neither side can be repeated.
fn repeat(left: &Value, right: &Value, budget: &Budget) -> Res<Option<Value>> {
    let (what, count) = match (left, right.as_int(), right, left.as_int()) {
        (Value::Str(_) | Value::Seq(_), Some(count), ..) => (left, count),
        (.., Value::Str(_) | Value::Seq(_), Some(count)) => (right, count),
        _ => return Ok(None),
    };
    let count = usize::try_from(count.max(0)).unwrap_or(usize::MAX);
    match what {
        Value::Str(text) => {
            budget.alloc(text.len().saturating_mul(count))?;
            Ok(Some(Value::Str(text.repeat(count).into())))
        }
        Value::Seq(seq) if seq.kind != SeqKind::Generator => {
            budget.alloc((seq.items.len() * ENTRY_BYTES).saturating_mul(count))?;
            let count = if seq.items.is_empty() { 0 } else { count };
            let items = (0..count).flat_map(|_| seq.items.iter().cloned()).collect();
            Ok(Some(Value::seq(seq.kind, items, budget)?))
        }
        _ => Ok(None),
    }
}

fn int_op(op: BinOp, a: i128, b: i128) -> Res<Value> {
    if b == 0 && matches!(op, BinOp::Div | BinOp::FloorDiv | BinOp::Mod) {
        return Err(Error::runtime("division by zero"));
    }
    let result = match op {
        BinOp::Add => a.checked_add(b),
        BinOp::Sub => a.checked_sub(b),
        BinOp::Mul => a.checked_mul(b),
        BinOp::Div => return Ok(Value::Float(a as f64 / b as f64)),
        // Python rounds towards minus infinity and gives the remainder the divisor's sign.
        BinOp::FloorDiv => a.checked_div(b).map(|q| q - i128::from(a % b != 0 && (a < 0) != (b < 0))),
        BinOp::Mod => a.checked_rem(b).map(|r| if r != 0 && (r < 0) != (b < 0) { r + b } else { r }),
        BinOp::Pow if b < 0 => return float_op(op, a as f64, b as f64),
        BinOp::Pow => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
    };
    result.map(Value::Int).ok_or_else(|| Error::runtime("the number is too large"))
}

fn float_op(op: BinOp, a: f64, b: f64) -> Res<Value> {
    if b == 0.0 && matches!(op, BinOp::Div | BinOp::FloorDiv | BinOp::Mod) {
        return Err(Error::runtime("float division by zero"));
    }
    let modulo = || {
        let r = a % b;
        if r != 0.0 && (r < 0.0) != (b < 0.0) { r + b } else { r }
    };
    Ok(Value::Float(match op {
        BinOp::Add => a + b,
        BinOp::Sub => a - b,
        BinOp::Mul => a * b,
        BinOp::Div => a / b,
        BinOp::FloorDiv => ((a - modulo()) / b).round(),
        BinOp::Mod => modulo(),
        BinOp::Pow if a == 0.0 && b < 0.0 => {
            return Err(Error::runtime("0.0 cannot be raised to a negative power"));
        }
        BinOp::Pow => a.powf(b),
    }))
}

/// `left op right` of a comparison.
pub(super) fn compare(op: CmpOp, left: &Value, right: &Value, budget: &Budget) -> Res<bool> {
    use std::cmp::Ordering::{Equal, Greater, Less};
    let ordered = |name| left.compare(right, name, budget);
    Ok(match op {
        CmpOp::Eq => left.equals(right, budget)?,
        CmpOp::Ne => !left.equals(right, budget)?,
        CmpOp::Lt => ordered("<")? == Some(Less),
        CmpOp::Le => matches!(ordered("<=")?, Some(Less | Equal)),
        CmpOp::Gt => ordered(">")? == Some(Greater),
        CmpOp::Ge => matches!(ordered(">=")?, Some(Greater | Equal)),
        CmpOp::In => contains(right, left, budget)?,
        CmpOp::NotIn => !contains(right, left, budget)?,
    })
}

/// `item in container`
pub(super) fn contains(container: &Value, item: &Value, budget: &Budget) -> Res<bool> {
    match container {
        Value::Undefined(_) => Ok(false),
        Value::Str(text) => match item {
            Value::Str(part) => {
                budget.scan(text.len() + part.len())?;
                Ok(text.contains(&**part))
            }
            other => {
                Err(Error::runtime(format!("'in <string>' requires string as left operand, not {}", other.type_name())))
            }
        },
        Value::Seq(seq) => {
            for have in &seq.items {
                if have.equals(item, budget)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        Value::Dict(dict) => Ok(dict.get(item, budget)?.is_some()),
        other => {
            let name = other.type_name();
            Err(Error::runtime(format!("argument of type '{name}' is not iterable")))
        }
    }
}

/// What Jinja complains about when a missing item or attribute is used.
fn missing(of: &Value, key: &Value, budget: &Budget) -> Res<Value> {
    let owner = match of {
        Value::None => "None".to_owned(),
        other => format!("{} object", other.type_name()),
    };
    let complaint = match key {
        Value::Str(name) => {
            budget.alloc(name.len())?;
            format!("'{owner}' has no attribute '{name}'")
        }
        key => {
            let mut text = format!("{owner} has no element ");
            key.write_repr(&mut text, budget)?;
            text
        }
    };
    Ok(Value::undefined(complaint))
}

/// `of[key]`: items first, then attributes.
pub(super) fn item(of: &Value, key: &Value, budget: &Budget) -> Res<Value> {
    if let Value::Undefined(why) = of {
        return Err(Error::runtime(&**why));
    }
    if let Some(found) = own_item(of, key, budget)? {
        return Ok(found);
    }
    match key.as_str().and_then(|name| methods::attribute(of, name)) {
        Some(found) => Ok(found),
        None => missing(of, key, budget),
    }
}

/// `of.name`: attributes first, then items.
pub(super) fn attribute(of: &Value, name: &str, budget: &Budget) -> Res<Value> {
    if let Value::Undefined(why) = of {
        return Err(Error::runtime(&**why));
    }
    if let Some(found) = methods::attribute(of, name) {
        return Ok(found);
    }
    let key = Value::Str(name.into());
    match own_item(of, &key, budget)? {
        Some(found) => Ok(found),
        None => missing(of, &key, budget),
    }
}

fn own_item(of: &Value, key: &Value, budget: &Budget) -> Res<Option<Value>> {
    match of {
        Value::Dict(dict) => Ok(dict.get(key, budget)?.cloned()),
        Value::Seq(seq) if seq.kind != SeqKind::Generator => {
            let index = key.as_int().and_then(|i| absolute(i, seq.items.len()));
            Ok(index.and_then(|i| seq.items.get(i).cloned()))
        }
        Value::Str(text) => {
            let Some(index) = key.as_int() else { return Ok(None) };
            budget.scan(text.len())?;
            let index = match index < 0 {
                true => absolute(index, text.chars().count()),
                false => usize::try_from(index).ok(),
            };
            let found = index.and_then(|i| text.chars().nth(i));
            Ok(found.map(|c| Value::Str(c.to_string().into())))
        }
        _ => Ok(None),
    }
}

/// The position that an index, counted from the end if negative, stands for.
fn absolute(index: i128, length: usize) -> Option<usize> {
    usize::try_from(if index < 0 { index + length as i128 } else { index }).ok()
}

/// `of[start:stop:step]`
pub(super) fn slice(of: &Value, bounds: [Option<Value>; 3], budget: &Budget) -> Res<Value> {
    let mut numbers = [None; 3];
    for (number, bound) in numbers.iter_mut().zip(&bounds) {
        *number = match bound {
            None | Some(Value::None) => None,
            Some(Value::Undefined(why)) => return Err(Error::runtime(&**why)),
            Some(other) => {
                Some(other.as_int().ok_or_else(|| Error::runtime("slice indices must be integers or None"))?)
            }
        };
    }
    match of {
        Value::Undefined(why) => Err(Error::runtime(&**why)),
        Value::Str(text) => {
            budget.alloc(4 * text.len())?;
            let chars: Vec<char> = text.chars().collect();
            let picked: String = positions(numbers, chars.len())?.map(|i| chars[i]).collect();
            budget.text(picked)
        }
        Value::Seq(seq) if seq.kind != SeqKind::Generator => {
            let items = positions(numbers, seq.items.len())?.map(|i| seq.items[i].clone());
            budget.alloc(seq.items.len() * ENTRY_BYTES)?;
            Value::seq(seq.kind, items.collect(), budget)
        }
        other => {
            let name = other.type_name();
            Err(Error::runtime(format!("'{name}' object cannot be sliced")))
        }
    }
}

/// The positions that a slice picks, by Python's rules.
fn positions([start, stop, step]: [Option<i128>; 3], length: usize) -> Res<impl Iterator<Item = usize>> {
    let length = length as i128;
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(Error::runtime("slice step cannot be zero"));
    }
    let (lowest, highest) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let clamp = |index: i128| if index < 0 { index.saturating_add(length) } else { index }.clamp(lowest, highest);
    let (first, last) = if step > 0 { (lowest, highest) } else { (highest, lowest) };
    let mut at = start.map_or(first, clamp);
    let stop = stop.map_or(last, clamp);
    Ok(std::iter::from_fn(move || {
        if if step > 0 { at >= stop } else { at <= stop } {
            return None;
        }
        let here = at;
        at = at.saturating_add(step);
        usize::try_from(here).ok()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_follow_python() {
        let picked = |start, stop, step| -> Vec<usize> { positions([start, stop, step], 5).unwrap().collect() };
        assert_eq!(picked(None, None, Some(-1)), [4, 3, 2, 1, 0]);
        assert_eq!(picked(Some(3), Some(0), Some(-1)), [3, 2, 1]);
        assert_eq!(picked(Some(-2), None, None), [3, 4]);
        assert_eq!(picked(Some(1), Some(100), Some(2)), [1, 3]);
        assert_eq!(picked(Some(9), Some(-9), Some(-2)), [4, 2, 0]);
        assert!(picked(Some(4), Some(1), None).is_empty());
        assert!(positions([None, None, Some(0)], 5).is_err());
    }

    #[test]
    fn division_rounds_down_as_in_python() {
        let budget = Budget::new(1000, 1000);
        let of = |op, a, b| match binary(op, &Value::Int(a), &Value::Int(b), &budget).unwrap() {
            Value::Int(value) => value,
            _ => panic!("not an integer"),
        };
        assert_eq!([of(BinOp::FloorDiv, -7, 2), of(BinOp::FloorDiv, 7, -2)], [-4, -4]);
        assert_eq!([of(BinOp::Mod, -7, 3), of(BinOp::Mod, 7, -3), of(BinOp::Mod, 6, 3)], [2, -2, 0]);
        assert_eq!(of(BinOp::Pow, 2, 100), 1 << 100);
    }
}
