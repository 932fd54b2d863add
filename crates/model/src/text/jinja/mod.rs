//! A small Jinja interpreter for chat templates.
//!
//! It does what the sandboxed Jinja environment of transformers does, down to how Python prints
//! values, for the part of the language that chat templates use; what it does not know it refuses by
//! name. General engines leave two holes that untrusted templates can use: one operation may build
//! arbitrarily much (`s + s` in a loop), and one may take arbitrarily long (comparing, printing).
//! Here every operation pays from a [`Budget`], so both are closed.
//!
//! `lexer` → `parser` → `ast` → `eval`; values and Python's rules for them are in `value`, `ops`, `repr`, `pystr`, `pyfmt`,
//! `methods`, `filters`, `predicates` (tests) and `json`.
//!
//! Known differences from Jinja, none met in released templates but the first: text marked `safe` is not remembered, so
//! adding to it escapes nothing; generators can be iterated more than once; template inheritance, `do`, `loop.changed` and
//! the filters for web pages are not there.

mod ast;
mod budget;
mod calls;
mod eval;
mod filters;
mod json;
mod lexer;
mod literals;
mod methods;
mod ops;
mod parser;
mod predicates;
mod pyfmt;
mod pystr;
mod repr;
mod scope;
mod strftime;
mod value;

use std::ops::Range;

pub(crate) use budget::Budget;
pub(crate) use strftime::Moment;
pub(crate) use value::Value;

/// Why a template failed, and on which of its lines (0: unknown).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Error {
    pub(crate) kind: ErrorKind,
    pub(crate) message: String,
    pub(crate) line: u32,
}

/// The class of a template's failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ErrorKind {
    /// The source is not a template.
    Syntax,
    /// An operation failed.
    Runtime,
    /// The template called `raise_exception`; the message is its own.
    Raised,
    /// The budget is used up.
    Limit,
}

impl Error {
    fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), line: 0 }
    }

    fn runtime(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Runtime, message)
    }

    fn limit(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Limit, message)
    }

    /// Names the line unless an inner place has named one.
    fn at(mut self, line: u32) -> Self {
        if self.line == 0 {
            self.line = line;
        }
        self
    }
}

type Res<T> = Result<T, Error>;

/// A parsed template.
pub(crate) struct Template {
    body: Vec<ast::Stmt>,
}

/// What a template wrote.
pub(crate) struct Rendered {
    pub(crate) text: String,
    /// Byte ranges of the `{% generation %}` blocks.
    pub(crate) generated: Vec<Range<usize>>,
}

impl Template {
    /// Parses a template.
    pub(crate) fn parse(source: &str) -> Res<Self> {
        Ok(Self { body: parser::parse(source)? })
    }

    /// Renders with these variables. `now` is what `strftime_now` tells; without it there is none.
    pub(crate) fn render(
        &self,
        variables: Vec<(String, Value)>,
        now: Option<Moment>,
        budget: &Budget,
    ) -> Res<Rendered> {
        eval::Interp::new(budget, now, variables)?.run(&self.body)
    }
}
