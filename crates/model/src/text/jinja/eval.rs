//! Runs a template: statements write into a text, expressions give values.

mod functions;
mod loops;

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use super::ast::{Args, CmpOp, Const, Expr, FilterCall, Name, Node, Stmt, Target};
use super::calls::CallArgs;
use super::scope::Scopes;
use super::value::{SeqKind, Value};
use super::{Budget, Error, Moment, Rendered, Res, filters, ops, predicates};

/// Nested evaluations; bounds the stack that a render needs, macros that call themselves included.
const DEPTH_MAX: u32 = 200;

/// How a list of statements ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    Done,
    Break,
    Continue,
}

type NamespaceCell = Rc<RefCell<Vec<(Name, Value)>>>;

/// The state of one render.
pub(super) struct Interp<'b> {
    budget: &'b Budget,
    now: Option<Moment>,
    scopes: Scopes,
    scope: usize,
    depth: u32,
    /// How many captured texts (macros, set blocks) are being written.
    captures: u32,
    generated: Vec<Range<usize>>,
    /// All namespaces made. They may refer to each other in a circle, so the render empties them.
    namespaces: Vec<NamespaceCell>,
    loop_name: Name,
}

impl Drop for Interp<'_> {
    fn drop(&mut self) {
        for namespace in &self.namespaces {
            namespace.take();
        }
    }
}

impl<'b> Interp<'b> {
    pub(super) fn new(budget: &'b Budget, now: Option<Moment>, variables: Vec<(String, Value)>) -> Res<Self> {
        let mut root: HashMap<Name, Value> = HashMap::new();
        for name in functions::NAMES {
            root.insert(name.into(), Value::Function(name));
        }
        if now.is_none() {
            // Templates that ask `strftime_now is defined` fall back to a date of their own.
            let complaint = "'strftime_now' is undefined: the template asks for the time and none was given";
            root.insert("strftime_now".into(), Value::undefined(complaint));
        }
        root.extend(variables.into_iter().map(|(name, value)| (name.into(), value)));
        Ok(Self {
            budget,
            now,
            scopes: Scopes::new(root),
            scope: 0,
            depth: 0,
            captures: 0,
            generated: Vec::new(),
            namespaces: Vec::new(),
            loop_name: "loop".into(),
        })
    }

    pub(super) fn run(mut self, body: &[Stmt]) -> Res<Rendered> {
        let mut text = String::new();
        self.exec(body, &mut text)?;
        Ok(Rendered { text, generated: std::mem::take(&mut self.generated) })
    }

    fn deeper(&mut self) -> Res<()> {
        self.budget.step(1)?;
        if self.depth == DEPTH_MAX {
            return Err(Error::limit("the template calls itself too deeply"));
        }
        self.depth += 1;
        Ok(())
    }

    fn exec(&mut self, body: &[Stmt], out: &mut String) -> Res<Flow> {
        self.deeper()?;
        for stmt in body {
            let flow = self.exec_one(stmt, out)?;
            if flow != Flow::Done {
                self.depth -= 1;
                return Ok(flow);
            }
        }
        self.depth -= 1;
        Ok(Flow::Done)
    }

    /// Runs statements in a scope of their own.
    fn exec_scoped(&mut self, body: &[Stmt], out: &mut String) -> Res<Flow> {
        let outer = self.scope;
        self.scope = self.scopes.open(outer, self.budget)?;
        let flow = self.exec(body, out)?;
        self.scopes.close(self.scope);
        self.scope = outer;
        Ok(flow)
    }

    /// Runs statements and keeps what they write.
    fn capture(&mut self, body: &[Stmt]) -> Res<Value> {
        let mut text = String::new();
        self.captures += 1;
        self.exec_scoped(body, &mut text)?;
        self.captures -= 1;
        self.budget.text(text)
    }

    fn exec_one(&mut self, stmt: &Stmt, out: &mut String) -> Res<Flow> {
        match stmt {
            Stmt::Text(text) => self.budget.push(out, text)?,
            Stmt::Emit(expr) => {
                let value = self.eval(expr)?;
                value.write_str(out, self.budget).map_err(|error| error.at(expr.line))?;
            }
            Stmt::If(branches, otherwise) => {
                for (test, body) in branches {
                    if self.eval(test)?.truth() {
                        return self.exec(body, out);
                    }
                }
                return self.exec(otherwise, out);
            }
            Stmt::For(def) => {
                let items = self.eval(&def.iter)?;
                return self.run_loop(def, &items, 0, out);
            }
            Stmt::Set(target, expr) => {
                let value = self.eval(expr)?;
                self.assign(target, value).map_err(|error| error.at(expr.line))?;
            }
            Stmt::SetBlock(target, chain, body) => {
                let text = self.capture(body)?;
                let value = self.apply_chain(text, chain)?;
                self.assign(target, value)?;
            }
            Stmt::With(assignments, body) => return self.with(assignments, body, out),
            Stmt::Macro(def) => {
                self.scopes.pin(self.scope);
                let value = Value::Macro(def.clone(), self.scope);
                self.scopes.set(self.scope, &def.name, value);
            }
            Stmt::CallBlock(block, call) => {
                self.scopes.pin(self.scope);
                let caller = Value::Macro(block.clone(), self.scope);
                if let Node::Call(callee, args) = &*call.node {
                    let value = self.call(callee, args, Some(caller));
                    value.map_err(|error| error.at(call.line))?.write_str(out, self.budget)?;
                }
            }
            Stmt::FilterBlock(chain, body) => {
                let text = self.capture(body)?;
                self.apply_chain(text, chain)?.write_str(out, self.budget)?;
            }
            Stmt::Generation(body) => {
                let start = out.len();
                let flow = self.exec_scoped(body, out)?;
                if self.captures == 0 {
                    self.generated.push(start..out.len());
                }
                return Ok(flow);
            }
            Stmt::Break => return Ok(Flow::Break),
            Stmt::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Done)
    }

    fn with(&mut self, assignments: &[(Target, Expr)], body: &[Stmt], out: &mut String) -> Res<Flow> {
        let values: Vec<_> = assignments.iter().map(|(_, expr)| self.eval(expr)).collect::<Res<_>>()?;
        let outer = self.scope;
        self.scope = self.scopes.open(outer, self.budget)?;
        for ((target, _), value) in assignments.iter().zip(values) {
            self.assign(target, value)?;
        }
        let flow = self.exec(body, out)?;
        self.scopes.close(self.scope);
        self.scope = outer;
        Ok(flow)
    }

    fn assign(&mut self, target: &Target, value: Value) -> Res<()> {
        match target {
            Target::Name(name) => self.scopes.set(self.scope, name, value),
            Target::Attr(name, attribute) => {
                let Some(Value::Namespace(cell)) = self.scopes.get(self.scope, name) else {
                    return Err(Error::runtime(format!(
                        "cannot assign attribute '{attribute}' on '{name}': it is no namespace"
                    )));
                };
                functions::set_attribute(&mut cell.borrow_mut(), attribute, value, self.budget)?;
            }
            Target::Tuple(targets) => {
                let values = value.iterate(self.budget)?;
                let (wanted, given) = (targets.len(), values.len());
                if given != wanted {
                    let message = match given < wanted {
                        true => format!("not enough values to unpack (expected {wanted}, got {given})"),
                        false => format!("too many values to unpack (expected {wanted})"),
                    };
                    return Err(Error::runtime(message));
                }
                for (target, value) in targets.iter().zip(values) {
                    self.assign(target, value)?;
                }
            }
        }
        Ok(())
    }

    fn apply_chain(&mut self, mut value: Value, chain: &[FilterCall]) -> Res<Value> {
        for call in chain {
            let args = self.args(&call.args)?;
            value = filters::apply(&call.name, &value, &args, self.budget).map_err(|error| error.at(call.line))?;
        }
        Ok(value)
    }

    fn eval(&mut self, expr: &Expr) -> Res<Value> {
        self.deeper()?;
        let value = self.eval_node(expr).map_err(|error| error.at(expr.line))?;
        self.depth -= 1;
        Ok(value)
    }

    fn eval_all(&mut self, exprs: &[Expr]) -> Res<Vec<Value>> {
        exprs.iter().map(|expr| self.eval(expr)).collect()
    }

    fn eval_node(&mut self, expr: &Expr) -> Res<Value> {
        Ok(match &*expr.node {
            Node::Const(literal) => constant(literal),
            Node::Name(name) => match self.scopes.get(self.scope, name) {
                Some(value) => value.clone(),
                None => Value::undefined(format!("'{name}' is undefined")),
            },
            Node::List(items) => Value::list(self.eval_all(items)?, self.budget)?,
            Node::Tuple(items) => Value::seq(SeqKind::Tuple, self.eval_all(items)?, self.budget)?,
            Node::Dict(pairs) => {
                let pair = |(key, value): &(Expr, Expr)| Ok((self.eval(key)?, self.eval(value)?));
                let pairs = pairs.iter().map(pair).collect::<Res<_>>()?;
                Value::dict(pairs, self.budget)?
            }
            Node::Not(inner) => Value::Bool(!self.eval(inner)?.truth()),
            Node::Neg(inner) | Node::Pos(inner) => self.signed(expr, inner)?,
            Node::And(left, right) => match self.eval(left)? {
                left if left.truth() => self.eval(right)?,
                left => left,
            },
            Node::Or(left, right) => match self.eval(left)? {
                left if left.truth() => left,
                _ => self.eval(right)?,
            },
            Node::Binary(op, left, right) => {
                let (left, right) = (self.eval(left)?, self.eval(right)?);
                ops::binary(*op, &left, &right, self.budget)?
            }
            Node::Compare(first, rest) => self.compare(first, rest)?,
            Node::Concat(parts) => {
                let mut text = String::new();
                for part in parts {
                    self.eval(part)?.write_str(&mut text, self.budget)?;
                }
                self.budget.text(text)?
            }
            Node::Cond { test, then, other } => match (self.eval(test)?.truth(), other) {
                (true, _) => self.eval(then)?,
                (false, Some(other)) => self.eval(other)?,
                (false, None) => {
                    Value::undefined("the inline if-expression evaluated to false and has no else section")
                }
            },
            Node::Attr(of, name) => ops::attribute(&self.eval(of)?, name, self.budget)?,
            Node::Item(of, key) => {
                let (of, key) = (self.eval(of)?, self.eval(key)?);
                ops::item(&of, &key, self.budget)?
            }
            Node::Slice(of, bounds) => self.slice(of, bounds)?,
            Node::Call(callee, args) => self.call(callee, args, None)?,
            Node::Filter(of, call) => {
                let value = self.eval(of)?;
                self.apply_chain(value, std::slice::from_ref(call))?
            }
            Node::Test(of, name, args) => {
                let value = self.eval(of)?;
                let args = self.args(args)?;
                Value::Bool(predicates::test(name, &value, &args, self.budget)?)
            }
        })
    }

    fn compare(&mut self, first: &Expr, rest: &[(CmpOp, Expr)]) -> Res<Value> {
        let mut left = self.eval(first)?;
        for (op, right) in rest {
            let right = self.eval(right)?;
            if !ops::compare(*op, &left, &right, self.budget)? {
                return Ok(Value::Bool(false));
            }
            left = right;
        }
        Ok(Value::Bool(true))
    }

    fn slice(&mut self, of: &Expr, bounds: &[Option<Expr>; 3]) -> Res<Value> {
        let of = self.eval(of)?;
        let mut values = [const { None }; 3];
        for (value, bound) in values.iter_mut().zip(bounds) {
            *value = bound.as_ref().map(|bound| self.eval(bound)).transpose()?;
        }
        ops::slice(&of, values, self.budget)
    }

    fn signed(&mut self, expr: &Expr, inner: &Expr) -> Res<Value> {
        let minus = matches!(&*expr.node, Node::Neg(_));
        let value = self.eval(inner)?;
        match (&value, value.as_int()) {
            (Value::Float(float), _) => Ok(Value::Float(if minus { -float } else { *float })),
            (_, Some(int)) => Ok(Value::Int(if minus { int.saturating_neg() } else { int })),
            (Value::Undefined(why), _) => Err(Error::runtime(&**why)),
            (other, None) => {
                let (sign, name) = (if minus { '-' } else { '+' }, other.type_name());
                Err(Error::runtime(format!("bad operand type for unary {sign}: '{name}'")))
            }
        }
    }

    fn args(&mut self, args: &Args) -> Res<CallArgs> {
        let mut values = CallArgs { positional: self.eval_all(&args.positional)?, named: Vec::new() };
        for (name, expr) in &args.named {
            values.named.push((name.clone(), self.eval(expr)?));
        }
        if let Some(star) = &args.star {
            values.positional.extend(self.eval(star)?.iterate(self.budget)?);
        }
        if let Some(double_star) = &args.double_star {
            let Value::Dict(dict) = self.eval(double_star)? else {
                return Err(Error::runtime("argument after ** must be a mapping"));
            };
            for (key, value) in dict.entries() {
                let Value::Str(name) = key else {
                    return Err(Error::runtime("keywords must be strings"));
                };
                values.named.push((name.clone(), value.clone()));
            }
        }
        Ok(values)
    }
}

fn constant(literal: &Const) -> Value {
    match literal {
        Const::None => Value::None,
        Const::Bool(value) => Value::Bool(*value),
        Const::Int(value) => Value::Int(*value),
        Const::Float(value) => Value::Float(*value),
        Const::Str(text) => Value::Str(text.clone()),
    }
}
