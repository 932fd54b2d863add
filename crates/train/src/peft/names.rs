//! Module names of transformers and roles.

use std::collections::HashMap;

use quorate_formats::shape::roles;
use quorate_formats::{Checkpoint, Role};

/// What a module name means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Module {
    /// A module with one weight.
    One(Role),
    /// All experts of a decoder layer in stacked parameters, as transformers 5 has them.
    Experts(usize),
}

/// The modules of a model by name.
pub(super) struct Modules {
    by_name: HashMap<String, Module>,
}

impl Modules {
    pub fn of(checkpoint: &Checkpoint) -> Modules {
        let (spec, names) = (checkpoint.spec(), &checkpoint.family().names);
        let mut by_name = HashMap::new();
        for l in spec.moe_layers() {
            // Transformers 5 gave the blocks of all families one name.
            by_name.insert(format!("model.layers.{l}.mlp.experts"), Module::Experts(l));
            by_name.insert(format!("model.layers.{l}.mlp.gate"), Module::One(Role::Router(l)));
        }
        for role in roles(spec) {
            if let Some(module) = names.of(role).strip_suffix(".weight") {
                by_name.insert(module.to_string(), Module::One(role));
            }
        }
        Modules { by_name }
    }

    /// What the module is.
    pub fn get(&self, name: &str) -> Option<Module> {
        self.by_name.get(name).copied()
    }
}

/// The module that holds a role's tensor; `None` for biases, which are no weight of a module.
pub(super) fn module_of(checkpoint: &Checkpoint, role: Role) -> Option<String> {
    Some(checkpoint.family().names.of(role).strip_suffix(".weight")?.to_string())
}
