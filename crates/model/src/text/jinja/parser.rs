//! Tokens to statements. Expressions are in [`expressions`].

mod expressions;

use std::sync::Arc;

use super::ast::{FilterCall, ForLoop, Macro, Name, Stmt, Target};
use super::lexer::{Tok, Token, tokenize};
use super::{Error, ErrorKind, Res};

/// Blocks and parentheses inside each other. Bounds the stack that parsing needs.
const NESTING_MAX: u32 = 60;

/// Parses a template's source.
pub(super) fn parse(source: &str) -> Res<Vec<Stmt>> {
    let mut parser = Parser { tokens: tokenize(source)?, pos: 0, nesting: 0, seen: Seen::default() };
    let (body, _) = parser.block(&[])?;
    Ok(body)
}

/// Which of the special names the block being parsed mentions.
#[derive(Default, Clone, Copy)]
struct Seen {
    varargs: bool,
    kwargs: bool,
    caller: bool,
    loop_: bool,
}

struct Parser {
    tokens: Vec<Token>,
    pos: usize,
    nesting: u32,
    seen: Seen,
}

impl Parser {
    fn peek(&self) -> &Tok {
        &self.tokens[self.pos].tok
    }

    fn peek_second(&self) -> &Tok {
        &self.tokens[(self.pos + 1).min(self.tokens.len() - 1)].tok
    }

    fn line(&self) -> u32 {
        self.tokens[self.pos].line
    }

    /// Takes the current token. The last one, `Eof`, stays.
    fn next(&mut self) -> Tok {
        let tok = self.tokens[self.pos].tok.clone();
        self.pos = (self.pos + 1).min(self.tokens.len() - 1);
        tok
    }

    fn error<T>(&self, message: impl Into<String>) -> Res<T> {
        Err(Error::new(ErrorKind::Syntax, message).at(self.line()))
    }

    fn unexpected<T>(&self, wanted: &str) -> Res<T> {
        let found = match self.peek() {
            Tok::Data(_) => "text".to_owned(),
            Tok::VarBegin => "'{{'".to_owned(),
            Tok::VarEnd => "'}}'".to_owned(),
            Tok::BlockBegin => "'{%'".to_owned(),
            Tok::BlockEnd => "'%}'".to_owned(),
            Tok::Name(name) => format!("'{name}'"),
            Tok::Str(_) => "a string".to_owned(),
            Tok::Int(_) | Tok::Float(_) => "a number".to_owned(),
            Tok::Op(op) => format!("'{op}'"),
            Tok::Eof => "the end of the template".to_owned(),
        };
        self.error(format!("expected {wanted}, found {found}"))
    }

    fn at_op(&self, op: &str) -> bool {
        matches!(self.peek(), Tok::Op(found) if *found == op)
    }

    fn at_name(&self, name: &str) -> bool {
        matches!(self.peek(), Tok::Name(found) if found == name)
    }

    fn skip_op(&mut self, op: &str) -> bool {
        let found = self.at_op(op);
        if found {
            self.next();
        }
        found
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let found = self.at_name(name);
        if found {
            self.next();
        }
        found
    }

    fn expect_op(&mut self, op: &str) -> Res<()> {
        if self.skip_op(op) { Ok(()) } else { self.unexpected(&format!("'{op}'")) }
    }

    fn expect_name(&mut self, what: &str) -> Res<Name> {
        match self.peek() {
            Tok::Name(name) => {
                let name = Name::from(name.as_str());
                self.next();
                Ok(name)
            }
            _ => self.unexpected(what),
        }
    }

    fn expect(&mut self, tok: &Tok, text: &str) -> Res<()> {
        if self.peek() == tok {
            self.next();
            Ok(())
        } else {
            self.unexpected(text)
        }
    }

    /// Goes one level deeper for the time of `parse`.
    fn nested<T>(&mut self, parse: impl FnOnce(&mut Self) -> Res<T>) -> Res<T> {
        if self.nesting == NESTING_MAX {
            return self.error("the template nests too deeply");
        }
        self.nesting += 1;
        let parsed = parse(self);
        self.nesting -= 1;
        parsed
    }

    /// Statements up to one of the tags in `ends` (whose name is consumed and returned), or, with no
    /// `ends`, up to the end of the template.
    fn block(&mut self, ends: &[&'static str]) -> Res<(Vec<Stmt>, &'static str)> {
        let mut body = Vec::new();
        loop {
            match self.next() {
                Tok::Data(text) => body.push(Stmt::Text(text.into())),
                Tok::VarBegin => {
                    body.push(Stmt::Emit(self.tuple_expression(true)?));
                    self.expect(&Tok::VarEnd, "'}}'")?;
                }
                Tok::BlockBegin => {
                    if let Some(end) = ends.iter().find(|end| self.at_name(end)) {
                        self.next();
                        return Ok((body, end));
                    }
                    let stmt = self.nested(Self::statement)?;
                    body.push(stmt);
                    self.expect(&Tok::BlockEnd, "'%}'")?;
                }
                _ if ends.is_empty() => return Ok((body, "")),
                _ => return self.error(format!("the template ends before '{}'", ends.join("' or '"))),
            }
        }
    }

    /// The rest of a tag, its body, and the name of the tag that ends it.
    fn body(&mut self, ends: &[&'static str]) -> Res<(Vec<Stmt>, &'static str)> {
        self.skip_op(":");
        self.expect(&Tok::BlockEnd, "'%}'")?;
        self.block(ends)
    }

    fn statement(&mut self) -> Res<Stmt> {
        let line = self.line();
        let tag = self.expect_name("a tag name")?;
        match &*tag {
            "if" => self.if_statement(),
            "for" => self.for_statement(),
            "set" => self.set_statement(),
            "with" => self.with_statement(),
            "macro" => {
                let name = self.expect_name("the macro's name")?;
                Ok(Stmt::Macro(Arc::new(self.macro_rest(name, "endmacro")?.0)))
            }
            "call" => self.call_statement(),
            "filter" => {
                let filters = self.filter_chain(true)?;
                Ok(Stmt::FilterBlock(filters, self.body(&["endfilter"])?.0))
            }
            "generation" => Ok(Stmt::Generation(self.body(&["endgeneration"])?.0)),
            "break" => Ok(Stmt::Break),
            "continue" => Ok(Stmt::Continue),
            other => Err(Error::new(ErrorKind::Syntax, format!("unknown tag '{other}'")).at(line)),
        }
    }

    fn if_statement(&mut self) -> Res<Stmt> {
        let mut branches = Vec::new();
        loop {
            let test = self.tuple_expression(false)?;
            let (body, end) = self.body(&["elif", "else", "endif"])?;
            branches.push((test, body));
            match end {
                "elif" => {}
                "else" => return Ok(Stmt::If(branches, self.body(&["endif"])?.0)),
                _ => return Ok(Stmt::If(branches, Vec::new())),
            }
        }
    }

    fn for_statement(&mut self) -> Res<Stmt> {
        let target = self.target(false)?;
        if !self.skip_name("in") {
            return self.unexpected("'in'");
        }
        let iter = self.tuple_expression(false)?;
        let test = if self.skip_name("if") { Some(self.expression()?) } else { None };
        let recursive = self.skip_name("recursive");
        let outer = self.seen.loop_;
        self.seen.loop_ = recursive;
        let (body, end) = self.body(&["else", "endfor"])?;
        let uses_loop = std::mem::replace(&mut self.seen.loop_, outer);
        let otherwise = if end == "else" { self.body(&["endfor"])?.0 } else { Vec::new() };
        Ok(Stmt::For(Arc::new(ForLoop { target, iter, test, recursive, uses_loop, body, otherwise })))
    }

    fn set_statement(&mut self) -> Res<Stmt> {
        let target = self.target(true)?;
        if self.skip_op("=") {
            return Ok(Stmt::Set(target, self.tuple_expression(true)?));
        }
        let filters = self.filter_chain(false)?;
        Ok(Stmt::SetBlock(target, filters, self.body(&["endset"])?.0))
    }

    fn with_statement(&mut self) -> Res<Stmt> {
        let mut assignments = Vec::new();
        while *self.peek() != Tok::BlockEnd {
            if !assignments.is_empty() {
                self.expect_op(",")?;
            }
            let target = self.target(false)?;
            self.expect_op("=")?;
            assignments.push((target, self.expression()?));
        }
        Ok(Stmt::With(assignments, self.body(&["endwith"])?.0))
    }

    fn call_statement(&mut self) -> Res<Stmt> {
        // The signature comes before the call it is for, the body after it.
        let (params, defaults) = if self.at_op("(") { self.signature()? } else { (Vec::new(), Vec::new()) };
        let call = self.expression()?;
        if !matches!(*call.node, super::ast::Node::Call(..)) {
            return self.error("expected a call after 'call'");
        }
        let (body, _) = self.body(&["endcall"])?;
        let block = Macro {
            name: "caller".into(),
            params,
            defaults,
            body,
            takes_varargs: false,
            takes_kwargs: false,
            takes_caller: false,
        };
        Ok(Stmt::CallBlock(Arc::new(block), call))
    }

    fn macro_rest(&mut self, name: Name, end: &'static str) -> Res<(Macro, &'static str)> {
        let (params, defaults) = self.signature()?;
        let outer = std::mem::take(&mut self.seen);
        let (body, end) = self.body(&[end])?;
        let seen = std::mem::replace(&mut self.seen, outer);
        let block = Macro {
            name,
            params,
            defaults,
            body,
            takes_varargs: seen.varargs,
            takes_kwargs: seen.kwargs,
            takes_caller: seen.caller,
        };
        Ok((block, end))
    }

    /// `(a, b=1)`
    fn signature(&mut self) -> Res<(Vec<Name>, Vec<super::ast::Expr>)> {
        let (mut params, mut defaults) = (Vec::new(), Vec::new());
        self.expect_op("(")?;
        while !self.at_op(")") {
            if !params.is_empty() {
                self.expect_op(",")?;
            }
            params.push(self.expect_name("a parameter name")?);
            if self.skip_op("=") {
                defaults.push(self.expression()?);
            } else if !defaults.is_empty() {
                return self.error("a parameter without default follows one with default");
            }
        }
        self.expect_op(")")?;
        Ok((params, defaults))
    }

    /// What is assigned to: `a`, `a, b`, `(a, b)`, and in `set` also `ns.a`.
    fn target(&mut self, with_attr: bool) -> Res<Target> {
        let mut parts = Vec::new();
        let mut is_tuple = false;
        loop {
            if !parts.is_empty() && (self.at_name("in") || self.at_op("=") || self.at_op(")")) {
                break;
            }
            parts.push(self.nested(|parser| parser.single_target(with_attr))?);
            if !self.skip_op(",") {
                break;
            }
            is_tuple = true;
        }
        match parts.pop() {
            Some(only) if !is_tuple && parts.is_empty() => Ok(only),
            Some(last) => {
                parts.push(last);
                Ok(Target::Tuple(parts))
            }
            None => self.unexpected("a name to assign to"),
        }
    }

    fn single_target(&mut self, with_attr: bool) -> Res<Target> {
        if self.skip_op("(") {
            let target = self.target(with_attr)?;
            self.expect_op(")")?;
            return Ok(target);
        }
        let name = self.expect_name("a name to assign to")?;
        if matches!(&*name, "true" | "false" | "none" | "True" | "False" | "None") {
            return self.error(format!("cannot assign to '{name}'"));
        }
        if with_attr && self.skip_op(".") {
            return Ok(Target::Attr(name, self.expect_name("an attribute name")?));
        }
        Ok(Target::Name(name))
    }

    /// `| a | b(c)`, or `a | b(c)` where the chain opens a block.
    fn filter_chain(&mut self, inline: bool) -> Res<Vec<FilterCall>> {
        let mut chain = Vec::new();
        while (inline && chain.is_empty()) || self.skip_op("|") {
            chain.push(self.filter_call()?);
        }
        Ok(chain)
    }
}
