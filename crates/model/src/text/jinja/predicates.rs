//! Tests: `value is name(args)`.

use super::ast::CmpOp;
use super::calls::CallArgs;
use super::value::{SeqKind, Value};
use super::{Budget, Error, Res, filters, ops, pystr};

/// `value is name(args)`
pub(super) fn test(name: &str, value: &Value, args: &CallArgs, budget: &Budget) -> Res<bool> {
    let comparison = match name {
        "eq" | "==" | "equalto" => Some(CmpOp::Eq),
        "ne" | "!=" => Some(CmpOp::Ne),
        "lt" | "<" | "lessthan" => Some(CmpOp::Lt),
        "le" | "<=" => Some(CmpOp::Le),
        "gt" | ">" | "greaterthan" => Some(CmpOp::Gt),
        "ge" | ">=" => Some(CmpOp::Ge),
        "in" => Some(CmpOp::In),
        _ => None,
    };
    if comparison.is_some() || matches!(name, "divisibleby" | "sameas") {
        let [other] = args.bind(name, ["other"])?;
        let other = other.ok_or_else(|| Error::runtime(format!("'is {name}' needs an argument")))?;
        return match comparison {
            Some(op) => ops::compare(op, value, &other, budget),
            None if name == "sameas" => same(value, &other, budget),
            None => Ok(remainder(value, &other, budget)?.as_float() == Some(0.0)),
        };
    }
    args.none(name)?;
    let text_case = |upper| -> Res<bool> { Ok(pystr::all_cased(&value.to_text(budget)?, upper)) };
    Ok(match name {
        "defined" => !matches!(value, Value::Undefined(_)),
        "undefined" => matches!(value, Value::Undefined(_)),
        "none" => matches!(value, Value::None),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "boolean" => matches!(value, Value::Bool(_)),
        "string" => matches!(value, Value::Str(_)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => matches!(value, Value::Int(_) | Value::Float(_) | Value::Bool(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        "sequence" => match value {
            Value::Seq(seq) => seq.kind != SeqKind::Generator,
            other => matches!(other, Value::Str(_) | Value::Dict(_) | Value::Undefined(_)),
        },
        "iterable" => {
            matches!(value, Value::Str(_) | Value::Seq(_) | Value::Dict(_) | Value::Undefined(_) | Value::Loop(_))
        }
        "callable" => matches!(value, Value::Function(_) | Value::Method(_) | Value::Macro(..) | Value::Undefined(_)),
        "even" => remainder(value, &Value::Int(2), budget)?.as_float() == Some(0.0),
        "odd" => remainder(value, &Value::Int(2), budget)?.as_float() == Some(1.0),
        "lower" => text_case(false)?,
        "upper" => text_case(true)?,
        "escaped" => false,
        "filter" => value.as_str().is_some_and(filters::exists),
        "test" => value.as_str().is_some_and(exists),
        other => return Err(Error::runtime(format!("no test named '{other}'"))),
    })
}

fn remainder(value: &Value, by: &Value, budget: &Budget) -> Res<Value> {
    ops::binary(super::ast::BinOp::Mod, value, by, budget)
}

/// Python's `is`, as far as a template can tell: equal and of one type.
fn same(a: &Value, b: &Value, budget: &Budget) -> Res<bool> {
    match (a, b) {
        (Value::Seq(a), Value::Seq(b)) => Ok(std::rc::Rc::ptr_eq(a, b)),
        (Value::Dict(a), Value::Dict(b)) => Ok(std::rc::Rc::ptr_eq(a, b)),
        _ => Ok(a.type_name() == b.type_name() && a.equals(b, budget)?),
    }
}

fn exists(name: &str) -> bool {
    const NAMES: [&str; 39] = [
        "!=",
        "<",
        "<=",
        "==",
        ">",
        ">=",
        "boolean",
        "callable",
        "defined",
        "divisibleby",
        "eq",
        "equalto",
        "escaped",
        "even",
        "false",
        "filter",
        "float",
        "ge",
        "greaterthan",
        "gt",
        "in",
        "integer",
        "iterable",
        "le",
        "lessthan",
        "lower",
        "lt",
        "mapping",
        "ne",
        "none",
        "number",
        "odd",
        "sameas",
        "sequence",
        "string",
        "test",
        "true",
        "undefined",
        "upper",
    ];
    NAMES.contains(&name)
}
