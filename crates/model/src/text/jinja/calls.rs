//! Arguments of calls, and the variable `loop`.

use std::rc::Rc;
use std::sync::Arc;

use super::ast::{ForLoop, Name};
use super::value::Value;
use super::{Error, Res};

/// Evaluated arguments.
#[derive(Default, Clone)]
pub(super) struct CallArgs {
    pub(super) positional: Vec<Value>,
    pub(super) named: Vec<(Name, Value)>,
}

impl CallArgs {
    /// Assigns the arguments to parameters by place and name.
    pub(super) fn bind<const N: usize>(&self, function: &str, params: [&str; N]) -> Res<[Option<Value>; N]> {
        if self.positional.len() > N {
            let given = self.positional.len();
            return Err(Error::runtime(format!("{function} takes at most {N} argument(s), {given} given")));
        }
        let mut bound = [const { None }; N];
        for (slot, value) in bound.iter_mut().zip(&self.positional) {
            *slot = Some(value.clone());
        }
        for (name, value) in &self.named {
            match params.iter().position(|param| *param == &**name) {
                Some(i) if bound[i].is_none() => bound[i] = Some(value.clone()),
                Some(_) => {
                    return Err(Error::runtime(format!("{function} got '{name}' twice")));
                }
                None => {
                    let message = format!("{function} got an unexpected keyword argument '{name}'");
                    return Err(Error::runtime(message));
                }
            }
        }
        Ok(bound)
    }

    /// Refuses all arguments.
    pub(super) fn none(&self, function: &str) -> Res<()> {
        self.bind(function, []).map(|[]| ())
    }
}

/// A text argument.
pub(super) fn text_arg(function: &str, value: Option<Value>) -> Res<Option<Arc<str>>> {
    match value {
        None | Some(Value::None) => Ok(None),
        Some(Value::Str(text)) => Ok(Some(text)),
        Some(other) => {
            let name = other.type_name();
            Err(Error::runtime(format!("{function} needs a str argument, not {name}")))
        }
    }
}

/// A text argument that must be there.
pub(super) fn needed_text(function: &str, value: Option<Value>) -> Res<Arc<str>> {
    text_arg(function, value)?.ok_or_else(|| Error::runtime(format!("{function} needs a str argument")))
}

/// An integer argument.
pub(super) fn int_arg(function: &str, value: Option<Value>) -> Res<Option<i128>> {
    match value {
        None | Some(Value::None) => Ok(None),
        Some(other) => match other.as_int() {
            Some(int) => Ok(Some(int)),
            None => {
                let name = other.type_name();
                Err(Error::runtime(format!("{function} needs an int argument, not {name}")))
            }
        },
    }
}

/// A count or width: an integer argument, negative ones counting as 0.
pub(super) fn count_arg(function: &str, value: Option<Value>) -> Res<Option<usize>> {
    let int = int_arg(function, value)?;
    Ok(int.map(|int| usize::try_from(int.max(0)).unwrap_or(usize::MAX)))
}

/// The variable `loop` at one turn.
pub(crate) struct LoopState {
    pub(super) items: Rc<Vec<Value>>,
    pub(super) index: usize,
    /// How many recursive loops are around this one.
    pub(super) depth: usize,
    /// What `loop(..)` runs, if the loop is recursive, and the scope it was written in.
    pub(super) recursion: Option<(Arc<ForLoop>, usize)>,
}

impl LoopState {
    /// `loop.name`
    pub(super) fn attribute(&self, name: &str) -> Option<Value> {
        let int = |value: usize| Value::Int(value as i128);
        let (i, n) = (self.index, self.items.len());
        Some(match name {
            "index" => int(i + 1),
            "index0" => int(i),
            "revindex" => int(n - i),
            "revindex0" => int(n - i - 1),
            "first" => Value::Bool(i == 0),
            "last" => Value::Bool(i + 1 == n),
            "length" => int(n),
            "depth" => int(self.depth + 1),
            "depth0" => int(self.depth),
            "previtem" => match i.checked_sub(1) {
                Some(before) => self.items[before].clone(),
                None => Value::undefined("there is no previous item"),
            },
            "nextitem" => match self.items.get(i + 1) {
                Some(after) => after.clone(),
                None => Value::undefined("there is no next item"),
            },
            _ => return None,
        })
    }

    /// `loop.cycle(a, b)`
    pub(super) fn cycle(&self, args: &CallArgs) -> Res<Value> {
        match args.positional.len() {
            0 => Err(Error::runtime("no items for cycling given")),
            n => Ok(args.positional[self.index % n].clone()),
        }
    }
}
