//! How Python prints values: `str` and `repr`.

use std::sync::Arc;

use super::value::{SeqKind, Value};
use super::{Budget, Res, pystr};

impl Value {
    /// `str(value)`, appended.
    pub(super) fn write_str(&self, out: &mut String, budget: &Budget) -> Res<()> {
        match self {
            Self::Undefined(_) => Ok(()),
            Self::Str(text) => budget.push(out, text),
            other => other.write_repr(out, budget),
        }
    }

    /// `str(value)`
    pub(super) fn to_text(&self, budget: &Budget) -> Res<Arc<str>> {
        if let Self::Str(text) = self {
            return Ok(text.clone());
        }
        let mut out = String::new();
        self.write_str(&mut out, budget)?;
        Ok(out.into())
    }

    /// `repr(value)`, appended.
    pub(super) fn write_repr(&self, out: &mut String, budget: &Budget) -> Res<()> {
        budget.step(1)?;
        match self {
            Self::Undefined(_) => budget.push(out, "Undefined"),
            Self::None => budget.push(out, "None"),
            Self::Bool(value) => budget.push(out, if *value { "True" } else { "False" }),
            Self::Int(value) => budget.push(out, &value.to_string()),
            Self::Float(value) => budget.push(out, &pystr::float_repr(*value)),
            Self::Str(text) => {
                budget.step(text.len())?;
                budget.push(out, &pystr::repr(text))
            }
            Self::Seq(seq) => {
                let (open, close) = match seq.kind {
                    SeqKind::Tuple if seq.items.len() == 1 => ("(", ",)"),
                    SeqKind::Tuple => ("(", ")"),
                    _ => ("[", "]"),
                };
                budget.push(out, open)?;
                for (i, item) in seq.items.iter().enumerate() {
                    if i > 0 {
                        budget.push(out, ", ")?;
                    }
                    item.write_repr(out, budget)?;
                }
                budget.push(out, close)
            }
            Self::Dict(dict) => {
                budget.push(out, "{")?;
                for (i, (key, value)) in dict.entries().iter().enumerate() {
                    if i > 0 {
                        budget.push(out, ", ")?;
                    }
                    key.write_repr(out, budget)?;
                    budget.push(out, ": ")?;
                    value.write_repr(out, budget)?;
                }
                budget.push(out, "}")
            }
            other => budget.push(out, &format!("<{}>", other.type_name())),
        }
    }
}
