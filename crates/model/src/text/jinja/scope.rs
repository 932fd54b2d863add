//! Variables. A scope sees those around it; loops, macros and blocks open new ones.

use std::collections::HashMap;

use super::ast::Name;
use super::value::Value;
use super::{Budget, Res};

/// What a scope is charged, so that templates cannot open them without end.
const SCOPE_BYTES: usize = 128;

struct Scope {
    parent: Option<usize>,
    variables: HashMap<Name, Value>,
}

/// All scopes alive, in the order they were opened.
pub(super) struct Scopes {
    scopes: Vec<Scope>,
    /// Scopes below this are kept: a macro defined in one of them may still be called.
    pinned: usize,
}

impl Scopes {
    /// One scope, the root, with these variables.
    pub(super) fn new(variables: HashMap<Name, Value>) -> Self {
        Self { scopes: vec![Scope { parent: None, variables }], pinned: 1 }
    }

    /// Opens a scope inside `parent`; [`Scopes::close`] wants the answer.
    pub(super) fn open(&mut self, parent: usize, budget: &Budget) -> Res<usize> {
        budget.alloc(SCOPE_BYTES)?;
        self.scopes.push(Scope { parent: Some(parent), variables: HashMap::new() });
        Ok(self.scopes.len() - 1)
    }

    /// Drops `scope` and those opened after it, as far as no macro needs them.
    pub(super) fn close(&mut self, scope: usize) {
        self.scopes.truncate(scope.max(self.pinned));
    }

    /// Keeps `scope` and those around it to the end.
    pub(super) fn pin(&mut self, scope: usize) {
        self.pinned = self.pinned.max(scope + 1);
    }

    /// The value of a variable as seen from `scope`.
    pub(super) fn get(&self, scope: usize, name: &str) -> Option<&Value> {
        let mut at = Some(scope);
        while let Some(scope) = at.and_then(|at| self.scopes.get(at)) {
            if let Some(value) = scope.variables.get(name) {
                return Some(value);
            }
            at = scope.parent;
        }
        None
    }

    /// Sets a variable of `scope`.
    pub(super) fn set(&mut self, scope: usize, name: &Name, value: Value) {
        if let Some(scope) = self.scopes.get_mut(scope) {
            scope.variables.insert(name.clone(), value);
        }
    }
}
