//! Calls: global functions, methods, macros, recursive loops.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use super::super::ast::{Args, Expr, Macro, Name};
use super::super::calls::{CallArgs, int_arg, needed_text};
use super::super::value::{ENTRY_BYTES, SeqKind, Value};
use super::super::{Budget, Error, ErrorKind, Res, methods};
use super::Interp;

/// The global functions.
pub(super) const NAMES: [&str; 5] = ["raise_exception", "strftime_now", "range", "dict", "namespace"];

/// What Python's sandbox allows a range to hold.
const RANGE_MAX: u128 = 100_000;

/// Sets an attribute of a namespace.
pub(super) fn set_attribute(
    attributes: &mut Vec<(Name, Value)>,
    name: &Name,
    value: Value,
    budget: &Budget,
) -> Res<()> {
    if name.starts_with('_') {
        return Err(Error::runtime(format!(
            "templates cannot store underscore-prefixed attributes on a namespace, but got '{name}'"
        )));
    }
    budget.step(1 + attributes.len())?;
    match attributes.iter_mut().find(|(have, _)| have == name) {
        Some((_, have)) => *have = value,
        None => {
            budget.alloc(2 * ENTRY_BYTES)?;
            attributes.push((name.clone(), value));
        }
    }
    Ok(())
}

impl Interp<'_> {
    /// `callee(args)`; `caller` is the block of a `{% call %}`.
    pub(super) fn call(&mut self, callee: &Expr, args: &Args, caller: Option<Value>) -> Res<Value> {
        let callee = self.eval(callee)?;
        let args = self.args(args)?;
        match &callee {
            Value::Function(name) => self.call_function(name, &args),
            Value::Method(method) => methods::call(&method.0, &method.1, &args, self.budget),
            Value::Macro(def, scope) => self.call_macro(def, *scope, args, caller),
            Value::Loop(state) => {
                let Some((def, scope)) = state.recursion.clone() else {
                    return Err(Error::runtime("the loop is not recursive"));
                };
                let [over] = args.bind("loop", ["iterable"])?;
                let over = over.ok_or_else(|| Error::runtime("loop() takes an iterable"))?;
                let (mut text, here) = (String::new(), self.scope);
                self.scope = scope;
                self.captures += 1;
                self.run_loop(&def, &over, state.depth + 1, &mut text)?;
                self.captures -= 1;
                self.scope = here;
                self.budget.text(text)
            }
            Value::Undefined(why) => Err(Error::runtime(&**why)),
            other => {
                let name = other.type_name();
                Err(Error::runtime(format!("'{name}' object is not callable")))
            }
        }
    }

    fn call_function(&mut self, name: &'static str, args: &CallArgs) -> Res<Value> {
        match name {
            "raise_exception" => {
                let [message] = args.bind(name, ["message"])?;
                let message = message.unwrap_or(Value::None).to_text(self.budget)?;
                Err(Error::new(ErrorKind::Raised, &*message))
            }
            "strftime_now" => {
                let [format] = args.bind(name, ["format"])?;
                let now = self.now.ok_or_else(|| Error::runtime("no time was given"))?;
                let text = now.format(&needed_text(name, format)?, self.budget)?;
                self.budget.text(text)
            }
            "range" => range(args, self.budget),
            _ => {
                let entries = self.dict_entries(args)?;
                if name == "dict" {
                    return Value::dict(entries, self.budget);
                }
                let mut attributes = Vec::new();
                for (key, value) in entries {
                    let Value::Str(key) = key else {
                        return Err(Error::runtime("a namespace's attributes are named by strings"));
                    };
                    set_attribute(&mut attributes, &key, value, self.budget)?;
                }
                let cell = Rc::new(RefCell::new(attributes));
                self.namespaces.push(cell.clone());
                self.budget.alloc(2 * ENTRY_BYTES)?;
                Ok(Value::Namespace(cell))
            }
        }
    }

    /// The entries that Python's `dict(..)` makes of a dict or pairs, and of named arguments.
    fn dict_entries(&self, args: &CallArgs) -> Res<Vec<(Value, Value)>> {
        let mut entries = Vec::new();
        match args.positional.as_slice() {
            [] => {}
            [Value::Dict(dict)] => entries.extend(dict.entries().iter().cloned()),
            [pairs] => {
                for pair in pairs.iterate(self.budget)? {
                    match &pair.iterate(self.budget)?[..] {
                        [key, value] => entries.push((key.clone(), value.clone())),
                        _ => return Err(Error::runtime("dict() takes pairs of key and value")),
                    }
                }
            }
            _ => return Err(Error::runtime("dict() takes at most 1 positional argument")),
        }
        self.budget.alloc(entries.len() * ENTRY_BYTES)?;
        let named = args.named.iter();
        entries.extend(named.map(|(name, value)| (Value::Str(name.clone()), value.clone())));
        Ok(entries)
    }

    fn call_macro(&mut self, def: &Arc<Macro>, scope: usize, mut args: CallArgs, caller: Option<Value>) -> Res<Value> {
        let outer = self.scope;
        self.scope = self.scopes.open(scope, self.budget)?;
        let mut positional = args.positional.into_iter();
        let first_default = def.params.len() - def.defaults.len();
        for (i, param) in def.params.iter().enumerate() {
            let named = args.named.iter().position(|(name, _)| name == param);
            let value = match (positional.next(), named) {
                (Some(_), Some(_)) => {
                    let message = format!("macro '{}' got '{param}' twice", def.name);
                    return Err(Error::runtime(message));
                }
                (Some(value), None) => value,
                (None, Some(named)) => args.named.remove(named).1,
                (None, None) if i >= first_default => self.eval(&def.defaults[i - first_default])?,
                (None, None) => Value::undefined(format!("parameter '{param}' was not provided")),
            };
            self.scopes.set(self.scope, param, value);
        }
        self.extra_arguments(def, positional.collect(), args.named, caller)?;
        let mut text = String::new();
        self.captures += 1;
        self.exec(&def.body, &mut text)?;
        self.captures -= 1;
        self.scopes.close(self.scope);
        self.scope = outer;
        self.budget.text(text)
    }

    /// Arguments beyond the parameters: `varargs`, `kwargs` and `caller`, if the macro wants them.
    fn extra_arguments(
        &mut self,
        def: &Macro,
        positional: Vec<Value>,
        mut named: Vec<(Name, Value)>,
        caller: Option<Value>,
    ) -> Res<()> {
        let by_name = named.iter().position(|(name, _)| &**name == "caller");
        let caller = caller.or_else(|| by_name.map(|i| named.remove(i).1));
        if def.takes_caller {
            let caller = caller.unwrap_or_else(|| Value::undefined("no caller defined"));
            self.scopes.set(self.scope, &"caller".into(), caller);
        } else if caller.is_some() {
            let message = format!("macro '{}' was invoked with a call block it does not use", def.name);
            return Err(Error::runtime(message));
        }
        if def.takes_varargs {
            let value = Value::seq(SeqKind::Tuple, positional, self.budget)?;
            self.scopes.set(self.scope, &"varargs".into(), value);
        } else if !positional.is_empty() {
            let (name, most) = (&def.name, def.params.len());
            let message = format!("macro '{name}' takes not more than {most} argument(s)");
            return Err(Error::runtime(message));
        }
        if def.takes_kwargs {
            let entries = named.into_iter().map(|(name, value)| (Value::Str(name), value));
            let value = Value::dict(entries.collect(), self.budget)?;
            self.scopes.set(self.scope, &"kwargs".into(), value);
        } else if let Some((extra, _)) = named.first() {
            let message = format!("macro '{}' takes no keyword argument '{extra}'", def.name);
            return Err(Error::runtime(message));
        }
        Ok(())
    }
}

fn range(args: &CallArgs, budget: &Budget) -> Res<Value> {
    let [first, second, third] = args.bind("range", ["start", "stop", "step"])?;
    let number = |value: Option<Value>| int_arg("range", value);
    let first = number(first)?.ok_or_else(|| Error::runtime("range() takes an int"))?;
    let (start, stop) = match number(second)? {
        Some(stop) => (first, stop),
        None => (0, first),
    };
    let step = number(third)?.unwrap_or(1);
    if step == 0 {
        return Err(Error::runtime("range() step must not be zero"));
    }
    let (low, high) = if step > 0 { (start, stop) } else { (stop, start) };
    let span = if high > low { high.abs_diff(low) } else { 0 };
    let count = span.div_ceil(step.unsigned_abs());
    if count > RANGE_MAX {
        return Err(Error::limit(format!("range too big: {count} items, at most {RANGE_MAX}")));
    }
    budget.alloc(count as usize * ENTRY_BYTES)?;
    // Wrapping: the products may overflow where the sums do not.
    let item = |i: i128| start.wrapping_add(i.wrapping_mul(step));
    let items = (0..count as i128).map(|i| Value::Int(item(i)));
    Value::list(items.collect(), budget)
}
