//! `{% for %}`.

use std::rc::Rc;
use std::sync::Arc;

use super::super::Res;
use super::super::ast::ForLoop;
use super::super::calls::LoopState;
use super::super::value::Value;
use super::{Flow, Interp};

impl Interp<'_> {
    /// Runs a loop `over` a value; `depth` is how many recursive loops are around it.
    pub(super) fn run_loop(&mut self, def: &Arc<ForLoop>, over: &Value, depth: usize, out: &mut String) -> Res<Flow> {
        let outer = self.scope;
        let mut items = over.iterate(self.budget).map_err(|error| error.at(def.iter.line))?;
        let mut lazy_test = def.test.as_ref();
        if let Some(test) = lazy_test.filter(|_| def.uses_loop) {
            // `loop` counts the items that pass, so they must be known first.
            let mut passed = Vec::new();
            for item in items {
                self.scope = self.scopes.open(outer, self.budget)?;
                self.assign(&def.target, item.clone())?;
                if self.eval(test)?.truth() {
                    passed.push(item);
                }
                self.scopes.close(self.scope);
            }
            items = passed;
            lazy_test = None;
        }
        let items = Rc::new(items);
        let mut ran = false;
        for (index, item) in items.iter().enumerate() {
            self.scope = self.scopes.open(outer, self.budget)?;
            self.assign(&def.target, item.clone())?;
            let mut flow = Flow::Continue;
            if lazy_test.map_or(Ok(true), |test| self.eval(test).map(|value| value.truth()))? {
                ran = true;
                if def.uses_loop {
                    let recursion = def.recursive.then(|| (def.clone(), outer));
                    let state = LoopState { items: items.clone(), index, depth, recursion };
                    let name = self.loop_name.clone();
                    self.scopes.set(self.scope, &name, Value::Loop(Rc::new(state)));
                }
                flow = self.exec(&def.body, out)?;
            }
            self.scopes.close(self.scope);
            self.scope = outer;
            if flow == Flow::Break {
                break;
            }
        }
        self.scope = outer;
        if ran { Ok(Flow::Done) } else { self.exec_scoped(&def.otherwise, out) }
    }
}
