//! Values as Python has them, without its mutability: only namespaces change.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::rc::Rc;
use std::sync::Arc;

use super::ast::Name;
use super::calls::LoopState;
use super::{Budget, Error, Res, ast};

/// How deep containers may lie in each other. Bounds the stack of printing, comparing, dropping.
const DEPTH_MAX: usize = 100;

/// What an entry of a container is charged, over the text it holds.
pub(super) const ENTRY_BYTES: usize = 48;

/// A value in a template.
#[derive(Clone)]
pub(crate) enum Value {
    /// Jinja's undefined, with the complaint to make if it is used.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Arc<str>),
    Seq(Rc<Seq>),
    Dict(Rc<Dict>),
    Namespace(Rc<RefCell<Vec<(Name, Value)>>>),
    /// A global function.
    Function(&'static str),
    /// A method with the value it belongs to.
    Method(Rc<(Value, Name)>),
    /// A macro with the scope it was defined in.
    Macro(Arc<ast::Macro>, usize),
    /// The variable `loop`.
    Loop(Rc<LoopState>),
}

/// What kind of sequence: they differ in printing, comparing and truth.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SeqKind {
    List,
    Tuple,
    /// What Python's generators and views give: can be iterated, not indexed or measured.
    Generator,
}

/// A list, tuple or generator.
pub(crate) struct Seq {
    pub(super) kind: SeqKind,
    pub(super) items: Vec<Value>,
    depth: usize,
}

/// A dict in insertion order.
#[derive(Default)]
pub(crate) struct Dict {
    entries: Vec<(Value, Value)>,
    depth: usize,
}

fn checked_depth<'v>(values: impl Iterator<Item = &'v Value>) -> Res<usize> {
    let depth = 1 + values.map(Value::depth).max().unwrap_or(0);
    if depth > DEPTH_MAX {
        return Err(Error::limit(format!("data nests deeper than {DEPTH_MAX} levels")));
    }
    Ok(depth)
}

impl Dict {
    /// The entries in order.
    pub(super) fn entries(&self) -> &[(Value, Value)] {
        &self.entries
    }

    /// The value of a key; keys of different types are compared as Python does (`1 == 1.0 == True`).
    pub(super) fn get(&self, key: &Value, budget: &Budget) -> Res<Option<&Value>> {
        for (have, value) in &self.entries {
            if have.equals(key, budget)? {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    /// Sets a key, which must be hashable.
    fn insert(&mut self, key: Value, value: Value, budget: &Budget) -> Res<()> {
        key.check_hashable()?;
        budget.alloc(2 * ENTRY_BYTES)?;
        for entry in &mut self.entries {
            if entry.0.equals(&key, budget)? {
                entry.1 = value;
                return Ok(());
            }
        }
        self.entries.push((key, value));
        Ok(())
    }
}

impl Value {
    /// An undefined value: `'name' is undefined`.
    pub(super) fn undefined(complaint: impl AsRef<str>) -> Self {
        Self::Undefined(complaint.as_ref().into())
    }

    /// A list, paid for.
    pub(super) fn list(items: Vec<Value>, budget: &Budget) -> Res<Self> {
        Self::seq(SeqKind::List, items, budget)
    }

    /// A sequence, paid for.
    pub(super) fn seq(kind: SeqKind, items: Vec<Value>, budget: &Budget) -> Res<Self> {
        budget.alloc(items.len() * ENTRY_BYTES)?;
        let depth = checked_depth(items.iter())?;
        Ok(Self::Seq(Rc::new(Seq { kind, items, depth })))
    }

    /// A dict, paid for; later entries replace earlier ones of the same key.
    pub(super) fn dict(entries: Vec<(Value, Value)>, budget: &Budget) -> Res<Self> {
        let mut dict = Dict::default();
        for (key, value) in entries {
            dict.insert(key, value, budget)?;
        }
        dict.depth = checked_depth(dict.entries.iter().flat_map(|(k, v)| [k, v]))?;
        Ok(Self::Dict(Rc::new(dict)))
    }

    /// From JSON, paid for.
    pub(crate) fn from_json(json: &serde_json::Value, budget: &Budget) -> Res<Self> {
        Self::from_json_at(json, 0, budget)
    }

    fn from_json_at(json: &serde_json::Value, depth: usize, budget: &Budget) -> Res<Self> {
        use serde_json::Value as Json;
        if depth > DEPTH_MAX {
            return Err(Error::limit(format!("data nests deeper than {DEPTH_MAX} levels")));
        }
        Ok(match json {
            Json::Null => Self::None,
            Json::Bool(value) => Self::Bool(*value),
            Json::Number(number) => match number.as_i128() {
                Some(int) => Self::Int(int),
                None => Self::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(text) => budget.text(text)?,
            Json::Array(items) => {
                let items = items.iter().map(|item| Self::from_json_at(item, depth + 1, budget));
                Self::list(items.collect::<Res<_>>()?, budget)?
            }
            // JSON objects have no double keys, so there is no need to look for them.
            Json::Object(map) => {
                let mut entries = Vec::with_capacity(map.len());
                for (key, value) in map {
                    budget.alloc(2 * ENTRY_BYTES)?;
                    let value = Self::from_json_at(value, depth + 1, budget)?;
                    entries.push((budget.text(key)?, value));
                }
                let depth = checked_depth(entries.iter().map(|(_, value)| value))?;
                Self::Dict(Rc::new(Dict { entries, depth }))
            }
        })
    }

    fn depth(&self) -> usize {
        match self {
            Self::Seq(seq) => seq.depth,
            Self::Dict(dict) => dict.depth,
            Self::Method(method) => method.0.depth(),
            Self::Loop(state) => state.items.iter().map(Self::depth).max().unwrap_or(0) + 1,
            _ => 0,
        }
    }

    /// What Python calls the type.
    pub(super) fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Str(_) => "str",
            Self::Seq(seq) => match seq.kind {
                SeqKind::List => "list",
                SeqKind::Tuple => "tuple",
                SeqKind::Generator => "generator",
            },
            Self::Dict(_) => "dict",
            Self::Namespace(_) => "Namespace",
            Self::Function(_) | Self::Method(_) => "function",
            Self::Macro(..) => "Macro",
            Self::Loop(_) => "LoopContext",
        }
    }

    /// Python's truth.
    pub(super) fn truth(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(value) => *value,
            Self::Int(value) => *value != 0,
            Self::Float(value) => *value != 0.0,
            Self::Str(text) => !text.is_empty(),
            Self::Seq(seq) => seq.kind == SeqKind::Generator || !seq.items.is_empty(),
            Self::Dict(dict) => !dict.entries.is_empty(),
            _ => true,
        }
    }

    /// The text, if it is a string.
    pub(super) fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) => Some(text),
            _ => None,
        }
    }

    /// The number, if it is an integer (or a bool, which Python counts as one).
    pub(super) fn as_int(&self) -> Option<i128> {
        match self {
            Self::Int(value) => Some(*value),
            Self::Bool(value) => Some(i128::from(*value)),
            _ => None,
        }
    }

    /// The number, if it is one.
    pub(super) fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            other => other.as_int().map(|value| value as f64),
        }
    }

    /// The items that iterating gives.
    pub(super) fn iterate(&self, budget: &Budget) -> Res<Vec<Value>> {
        let items = match self {
            Self::Undefined(_) => Vec::new(),
            Self::Seq(seq) => {
                budget.alloc(seq.items.len() * ENTRY_BYTES)?;
                seq.items.clone()
            }
            Self::Dict(dict) => {
                budget.alloc(dict.entries.len() * ENTRY_BYTES)?;
                dict.entries.iter().map(|(key, _)| key.clone()).collect()
            }
            Self::Str(text) => {
                budget.alloc(text.len() * ENTRY_BYTES)?;
                text.chars().map(|c| Self::Str(c.to_string().into())).collect()
            }
            other => {
                let name = other.type_name();
                return Err(Error::runtime(format!("'{name}' object is not iterable")));
            }
        };
        Ok(items)
    }

    /// `len(value)`
    pub(super) fn length(&self, budget: &Budget) -> Res<usize> {
        match self {
            Self::Undefined(_) => Ok(0),
            Self::Str(text) => {
                budget.scan(text.len())?;
                Ok(text.chars().count())
            }
            Self::Seq(seq) if seq.kind != SeqKind::Generator => Ok(seq.items.len()),
            Self::Dict(dict) => Ok(dict.entries.len()),
            other => {
                let name = other.type_name();
                Err(Error::runtime(format!("object of type '{name}' has no len()")))
            }
        }
    }

    fn check_hashable(&self) -> Res<()> {
        match self {
            Self::Seq(seq) if seq.kind == SeqKind::Tuple => seq.items.iter().try_for_each(Self::check_hashable),
            Self::Seq(_) | Self::Dict(_) => Err(Error::runtime(format!("unhashable type: '{}'", self.type_name()))),
            _ => Ok(()),
        }
    }

    /// `self == other`
    pub(super) fn equals(&self, other: &Value, budget: &Budget) -> Res<bool> {
        budget.step(1)?;
        Ok(match (self, other) {
            (Self::Undefined(_), Self::Undefined(_)) | (Self::None, Self::None) => true,
            (Self::Str(a), Self::Str(b)) => {
                a.len() == b.len() && {
                    budget.scan(a.len())?;
                    a == b
                }
            }
            (Self::Seq(a), Self::Seq(b)) => {
                if a.kind != b.kind || a.items.len() != b.items.len() {
                    return Ok(false);
                }
                for (a, b) in a.items.iter().zip(&b.items) {
                    if !a.equals(b, budget)? {
                        return Ok(false);
                    }
                }
                true
            }
            (Self::Dict(a), Self::Dict(b)) => {
                if a.entries.len() != b.entries.len() {
                    return Ok(false);
                }
                for (key, value) in &a.entries {
                    match b.get(key, budget)? {
                        Some(have) if have.equals(value, budget)? => {}
                        _ => return Ok(false),
                    }
                }
                true
            }
            (Self::Namespace(a), Self::Namespace(b)) => Rc::ptr_eq(a, b),
            (Self::Macro(a, _), Self::Macro(b, _)) => Arc::ptr_eq(a, b),
            (Self::Function(a), Self::Function(b)) => a == b,
            _ => match (self.as_int(), other.as_int()) {
                (Some(a), Some(b)) => a == b,
                _ => match (self.as_float(), other.as_float()) {
                    (Some(a), Some(b)) => a == b,
                    _ => false,
                },
            },
        })
    }

    /// The order of two values; `None` where neither is less (NaN). Values of types that have no
    /// order are an error, as in Python.
    pub(super) fn compare(&self, other: &Value, op: &str, budget: &Budget) -> Res<Option<Ordering>> {
        budget.step(1)?;
        match (self, other) {
            (Self::Undefined(why), _) | (_, Self::Undefined(why)) => Err(Error::runtime(&**why)),
            (Self::Str(a), Self::Str(b)) => {
                budget.scan(a.len().min(b.len()))?;
                Ok(Some(a.cmp(b)))
            }
            (Self::Seq(a), Self::Seq(b)) if a.kind == b.kind && a.kind != SeqKind::Generator => {
                for (a, b) in a.items.iter().zip(&b.items) {
                    if !a.equals(b, budget)? {
                        return a.compare(b, op, budget);
                    }
                }
                Ok(Some(a.items.len().cmp(&b.items.len())))
            }
            _ => match (self.as_int(), other.as_int()) {
                (Some(a), Some(b)) => Ok(Some(a.cmp(&b))),
                _ => match (self.as_float(), other.as_float()) {
                    (Some(a), Some(b)) => Ok(a.partial_cmp(&b)),
                    _ => Err(Error::runtime(format!(
                        "'{op}' not supported between instances of '{}' and '{}'",
                        self.type_name(),
                        other.type_name()
                    ))),
                },
            },
        }
    }
}
