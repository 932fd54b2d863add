//! The part of Python's pickle that `torch.save` needs for containers of numbers, texts and tensors. It builds no objects and
//! calls nothing: whatever else a pickle asks for is refused by name.
//!
//! Values live in an arena and refer to each other by number, so that no input can make this recurse, and every value costs
//! at least one byte of input.

use std::collections::HashMap;

/// Element type of a torch storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    U8,
    I8,
    I16,
    I32,
    I64,
    F16,
    F32,
    F64,
}

impl Element {
    fn of(class: &str) -> Option<Element> {
        Some(match class {
            "torch ByteStorage" | "torch BoolStorage" => Element::U8,
            "torch CharStorage" => Element::I8,
            "torch ShortStorage" => Element::I16,
            "torch IntStorage" => Element::I32,
            "torch LongStorage" => Element::I64,
            "torch HalfStorage" | "torch BFloat16Storage" => Element::F16,
            "torch FloatStorage" => Element::F32,
            "torch DoubleStorage" => Element::F64,
            _ => return None,
        })
    }
}

/// A tensor that lies in a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TensorRef {
    /// Name of the storage's member.
    pub storage: String,
    pub element: Element,
    /// Numbers in the storage.
    pub elements: usize,
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

/// A value; numbers are places in the arena.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    /// A class or function that is allowed.
    Class(String),
    List(Vec<usize>),
    Tuple(Vec<usize>),
    Dict(Vec<(usize, usize)>),
    Storage(String, Element, usize),
    Tensor(TensorRef),
}

/// Dimensions of a tensor at most.
const DIMS_MAX: usize = 8;
const REBUILD: &str = "torch._utils _rebuild_tensor_v2";
const ORDERED: &str = "collections OrderedDict";

/// What a pickle holds.
#[derive(Debug)]
pub(super) struct Pickle {
    values: Vec<Value>,
    root: usize,
}

impl Pickle {
    /// Reads a pickle.
    pub fn read(bytes: &[u8]) -> Result<Pickle, String> {
        let mut machine =
            Machine { rest: bytes, values: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
        while machine.step()? {}
        let root = machine.pop()?;
        Ok(Pickle { values: machine.values, root })
    }

    pub fn root(&self) -> usize {
        self.root
    }

    pub fn value(&self, at: usize) -> &Value {
        &self.values[at]
    }

    /// The value of a key, if `at` is a dictionary that has it.
    pub fn get(&self, at: usize, key: &str) -> Option<usize> {
        let Value::Dict(pairs) = &self.values[at] else { return None };
        pairs.iter().rev().find(|(k, _)| matches!(&self.values[*k], Value::Text(t) if t == key)).map(|(_, v)| *v)
    }

    pub fn list(&self, at: usize) -> Option<&[usize]> {
        match &self.values[at] {
            Value::List(items) | Value::Tuple(items) => Some(items),
            _ => None,
        }
    }

    pub fn tensor(&self, at: usize) -> Option<&TensorRef> {
        match &self.values[at] {
            Value::Tensor(tensor) => Some(tensor),
            _ => None,
        }
    }
}

struct Machine<'a> {
    rest: &'a [u8],
    values: Vec<Value>,
    stack: Vec<usize>,
    /// Heights of the stack where marks were set.
    marks: Vec<usize>,
    memo: HashMap<u32, usize>,
}

impl<'a> Machine<'a> {
    /// Does one operation; `false` at the end.
    fn step(&mut self) -> Result<bool, String> {
        let [op] = self.take()?;
        match op {
            0x80 => {
                let [version] = self.take()?;
                if !(2..=5).contains(&version) {
                    return Err(format!("pickle protocol {version} is unknown"));
                }
            }
            b'.' => return Ok(false),
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.push(Value::None),
            0x88 => self.push(Value::Bool(true)),
            0x89 => self.push(Value::Bool(false)),
            b'K' => self.number(|[b]: [u8; 1]| i64::from(b))?,
            b'M' => self.number(|b| i64::from(u16::from_le_bytes(b)))?,
            b'J' => self.number(|b| i64::from(i32::from_le_bytes(b)))?,
            0x8a => self.long()?,
            b'G' => {
                let value = Value::Float(f64::from_be_bytes(self.take()?));
                self.push(value);
            }
            b'X' => {
                let len = u32::from_le_bytes(self.take()?);
                self.text(len as usize)?;
            }
            0x8c => {
                let [len] = self.take()?;
                self.text(usize::from(len))?;
            }
            b'}' => self.push(Value::Dict(Vec::new())),
            b']' => self.push(Value::List(Vec::new())),
            b')' => self.push(Value::Tuple(Vec::new())),
            b't' => {
                let items = self.marked()?;
                self.push(Value::Tuple(items));
            }
            0x85..=0x87 => {
                let from = self.stack.len().checked_sub(usize::from(op - 0x84)).ok_or_else(short)?;
                self.above_mark(from)?;
                let items = self.stack.split_off(from);
                self.push(Value::Tuple(items));
            }
            b'a' => {
                let item = self.pop()?;
                self.extend_list(&[item])?;
            }
            b'e' => {
                let items = self.marked()?;
                self.extend_list(&items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.extend_dict(&[key, value])?;
            }
            b'u' => {
                let items = self.marked()?;
                self.extend_dict(&items)?;
            }
            b'q' | b'r' => {
                let slot = self.slot(op == b'q')?;
                let top = *self.stack.last().ok_or_else(short)?;
                self.memo.insert(slot, top);
            }
            0x94 => {
                let top = *self.stack.last().ok_or_else(short)?;
                let slot = u32::try_from(self.memo.len()).map_err(|_| short())?;
                self.memo.insert(slot, top);
            }
            b'h' | b'j' => {
                let slot = self.slot(op == b'h')?;
                let value = *self.memo.get(&slot).ok_or("the pickle refers to a value that it did not store")?;
                self.stack.push(value);
            }
            b'c' => {
                let class = format!("{} {}", self.line()?, self.line()?);
                self.class(class)?;
            }
            b'Q' => self.storage()?,
            b'R' => self.call()?,
            // Frames only say how much to read at once.
            0x95 => drop(self.take::<8>()?),
            _ => return Err(format!("the pickle has the operation 0x{op:02x}, which is refused")),
        }
        Ok(true)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (bytes, rest) = self.rest.split_first_chunk::<N>().ok_or_else(short)?;
        self.rest = rest;
        Ok(*bytes)
    }

    fn bytes(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (bytes, rest) = self.rest.split_at_checked(len).ok_or_else(short)?;
        self.rest = rest;
        Ok(bytes)
    }

    fn push(&mut self, value: Value) {
        self.stack.push(self.values.len());
        self.values.push(value);
    }

    fn pop(&mut self) -> Result<usize, String> {
        self.above_mark(self.stack.len().checked_sub(1).ok_or_else(short)?)?;
        self.stack.pop().ok_or_else(short)
    }

    /// Nothing is taken from under a mark.
    fn above_mark(&self, from: usize) -> Result<(), String> {
        if self.marks.last().is_some_and(|&mark| from < mark) { Err(short()) } else { Ok(()) }
    }

    fn marked(&mut self) -> Result<Vec<usize>, String> {
        let mark = self.marks.pop().filter(|&m| m <= self.stack.len()).ok_or_else(short)?;
        Ok(self.stack.split_off(mark))
    }

    fn number<const N: usize>(&mut self, value: impl Fn([u8; N]) -> i64) -> Result<(), String> {
        let value = Value::Int(value(self.take()?));
        self.push(value);
        Ok(())
    }

    fn long(&mut self) -> Result<(), String> {
        let [len] = self.take()?;
        let bytes = self.bytes(usize::from(len))?;
        if bytes.len() > 8 {
            return Err("the pickle has an integer of more than 64 bits".into());
        }
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut whole = [if negative { 0xff } else { 0 }; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(whole)));
        Ok(())
    }

    fn text(&mut self, len: usize) -> Result<(), String> {
        let text = std::str::from_utf8(self.bytes(len)?).map_err(|_| "a text in the pickle is not UTF-8")?;
        self.push(Value::Text(text.to_string()));
        Ok(())
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let end = self.rest.iter().position(|&b| b == b'\n').ok_or_else(short)?;
        let line = std::str::from_utf8(self.bytes(end)?).map_err(|_| "a name in the pickle is not UTF-8")?;
        self.take::<1>()?;
        Ok(line)
    }

    fn slot(&mut self, short: bool) -> Result<u32, String> {
        if short { self.take().map(|[b]: [u8; 1]| u32::from(b)) } else { self.take().map(u32::from_le_bytes) }
    }

    fn extend_list(&mut self, items: &[usize]) -> Result<(), String> {
        match self.stack.last().map(|&top| &mut self.values[top]) {
            Some(Value::List(list)) => list.extend_from_slice(items),
            _ => return Err("the pickle appends to what is no list".into()),
        }
        Ok(())
    }

    fn extend_dict(&mut self, items: &[usize]) -> Result<(), String> {
        let (pairs, rest) = items.as_chunks::<2>();
        match self.stack.last().map(|&top| &mut self.values[top]) {
            Some(Value::Dict(dict)) if rest.is_empty() => dict.extend(pairs.iter().map(|&[k, v]| (k, v))),
            _ => return Err("the pickle sets items of what is no dictionary".into()),
        }
        Ok(())
    }

    fn class(&mut self, class: String) -> Result<(), String> {
        if class != REBUILD && class != ORDERED && Element::of(&class).is_none() {
            return Err(format!(
                "the pickle asks for `{}`, which is refused: only containers, numbers, texts and tensors are read",
                class.replace(' ', ".")
            ));
        }
        self.push(Value::Class(class));
        Ok(())
    }

    /// A storage: `("storage", class, name, device, numbers)`.
    fn storage(&mut self) -> Result<(), String> {
        let at = self.pop()?;
        let bad = || "the pickle names a storage in an unknown way".to_string();
        let Value::Tuple(parts) = &self.values[at] else { return Err(bad()) };
        let &[_, class, name, _, elements] = parts.as_slice() else { return Err(bad()) };
        let (Value::Class(class), Value::Text(name)) = (&self.values[class], &self.values[name]) else {
            return Err(bad());
        };
        let element = Element::of(class).ok_or_else(bad)?;
        let elements = self.size(elements).ok_or_else(bad)?;
        self.push(Value::Storage(name.clone(), element, elements));
        Ok(())
    }

    fn call(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let (Value::Tuple(arguments), Value::Class(class)) = (&self.values[arguments], &self.values[function]) else {
            return Err("the pickle calls what is no function, which is refused".into());
        };
        let made = match (class.as_str(), arguments.as_slice()) {
            (ORDERED, []) => Some(Value::Dict(Vec::new())),
            (REBUILD, &[storage, offset, shape, strides, ..]) => self.tensor(storage, offset, shape, strides),
            _ => None,
        };
        let made = made.ok_or_else(|| format!("the pickle calls `{}` in an unknown way", class.replace(' ', ".")))?;
        self.push(made);
        Ok(())
    }

    fn tensor(&self, storage: usize, offset: usize, shape: usize, strides: usize) -> Option<Value> {
        let Value::Storage(name, element, elements) = &self.values[storage] else { return None };
        let sizes = |at: usize| match &self.values[at] {
            Value::Tuple(items) => items.iter().map(|&i| self.size(i)).collect::<Option<Vec<usize>>>(),
            _ => None,
        };
        let (shape, strides) = (sizes(shape)?, sizes(strides)?);
        (shape.len() == strides.len() && shape.len() <= DIMS_MAX).then_some(())?;
        let (storage, element, elements) = (name.clone(), *element, *elements);
        Some(Value::Tensor(TensorRef { storage, element, elements, offset: self.size(offset)?, shape, strides }))
    }

    fn size(&self, at: usize) -> Option<usize> {
        match self.values[at] {
            Value::Int(v) => usize::try_from(v).ok(),
            _ => None,
        }
    }
}

fn short() -> String {
    "the pickle is damaged or cut off".to_string()
}
