//! Which weights are trained, and in what form.

use std::collections::BTreeSet;
use std::ops::Range;

use candle_core::{Device, Tensor, Var};
use quorate_formats::Role;
use quorate_formats::shape::{expected_shape, roles};
use quorate_formats::spec::ModelSpec;
use quorate_model::{LowRank, Model, Overlay, Patch, ops};

use crate::TrainError;
use crate::state::Random;

/// How a weight is trained.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// All its values.
    Full,
    /// These rows only, e.g. of a router those of some experts. The others stay as they are.
    Rows(Vec<usize>),
    /// A term `scale B A` of rank `rank` with `scale = alpha / rank`; `A` begins random and `B` zero, as in LoRA
    /// (Hu et al. 2021, section 4.1).
    LowRank {
        /// Rank.
        rank: usize,
        /// Numerator of the scale.
        alpha: f32,
    },
}

/// The weights of a model for which `form` gives one, in the order of roles.
pub fn select(spec: &ModelSpec, form: impl Fn(Role) -> Option<Form>) -> Vec<(Role, Form)> {
    roles(spec).filter_map(|role| Some((role, form(role)?))).collect()
}

/// One tensor that the optimizer changes.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// A name that is unique among the parameters, e.g. `layer 0 router` or `layer 3 query projection A`.
    pub name: String,
    /// The values. Whoever holds a clone sees what the optimizer writes.
    pub var: Var,
    /// Whether weight decay applies.
    pub decays: bool,
    /// Values that are trained, as ranges of the flat tensor.
    pub trained: Vec<Range<usize>>,
}

/// What is trained.
#[derive(Clone, Debug, Default)]
pub struct Parameters {
    all: Vec<Parameter>,
    overlay: Overlay,
}

impl Parameters {
    /// Parameters for weights of a model. They begin where the model is: with its own weights or, where its overlay has a
    /// patch of the same form, with that one. Other patches of the overlay stay in force, untrained.
    ///
    /// # Errors
    /// A weight that the model has not, or not in memory, or a form that does not fit it.
    pub fn new(model: &Model, targets: &[(Role, Form)], seed: u64) -> Result<Parameters, TrainError> {
        let mut parameters = Parameters { all: Vec::new(), overlay: model.overlay().detached()? };
        let mut random = Random::new(seed, 0);
        for (i, (role, form)) in targets.iter().enumerate() {
            let refuse = |problem: String| TrainError::Parameter { role: *role, problem };
            let shape = expected_shape(model.spec(), *role).ok_or_else(|| refuse("the model has none".to_string()))?;
            if targets[..i].iter().any(|(other, _)| other == role) {
                return Err(refuse("it is named twice".to_string()));
            }
            let patch = match form {
                Form::Full => parameters.full(model, *role, &shape, None)?,
                Form::Rows(rows) => parameters.full(model, *role, &shape, Some(rows))?,
                Form::LowRank { rank, alpha } => {
                    let [out, inner] = shape[..] else {
                        return Err(refuse("a vector has no low-rank form".to_string()));
                    };
                    if *rank == 0 || *rank > out.min(inner) {
                        return Err(refuse(format!("rank {rank} is not in 1..={} of its shape", out.min(inner))));
                    }
                    parameters.low_rank(model, *role, (out, inner), *rank, alpha / *rank as f32, &mut random)?
                }
            };
            parameters.overlay.insert(*role, patch);
        }
        Ok(parameters)
    }

    fn full(
        &mut self,
        model: &Model,
        role: Role,
        shape: &[usize],
        rows: Option<&Vec<usize>>,
    ) -> Result<Patch, TrainError> {
        let refuse = |problem: String| TrainError::Parameter { role, problem };
        let values = match self.overlay.get(role) {
            Some(Patch::Replace(tensor)) => ops::values(tensor)?.to_vec(),
            Some(Patch::LowRank(_)) => {
                return Err(refuse("it has a low-rank term already; help: train that, or take it off".to_string()));
            }
            None => stored(model, role)?,
        };
        let width: usize = shape[1..].iter().product();
        let trained = match rows {
            None => std::iter::once(0..values.len()).collect(),
            Some(rows) => {
                if let Some(row) = rows.iter().find(|&&row| row >= shape[0]) {
                    return Err(refuse(format!("it has no row {row}, only {}", shape[0])));
                }
                let rows: BTreeSet<usize> = rows.iter().copied().collect();
                rows.into_iter().map(|row| row * width..(row + 1) * width).collect()
            }
        };
        let var = Var::from_vec(values, shape, &Device::Cpu)?;
        let tensor = var.as_tensor().clone();
        self.all.push(Parameter { name: role.to_string(), var, decays: !role.is_vector(), trained });
        Ok(Patch::Replace(tensor))
    }

    fn low_rank(
        &mut self,
        model: &Model,
        role: Role,
        (out, inner): (usize, usize),
        rank: usize,
        scale: f32,
        random: &mut Random,
    ) -> Result<Patch, TrainError> {
        let refuse = |problem: &str| TrainError::Parameter { role, problem: problem.to_string() };
        let (a, b, scale) = match self.overlay.get(role) {
            Some(Patch::LowRank(term)) if term.a.dims() == [rank, inner] => {
                (term.a.clone(), term.b.clone(), term.scale)
            }
            Some(_) => return Err(refuse("its patch has another form; help: train that, or take it off")),
            None => {
                stored_shape(model, role)?;
                // Uniform within 1 / sqrt(in), as torch initialises a linear layer and PEFT the factor A.
                let bound = (inner as f32).powf(-0.5);
                let values = (0..rank * inner).map(|_| bound * (2.0 * random.unit() - 1.0)).collect();
                (ops::tensor(values, &[rank, inner])?, ops::tensor(vec![0.0; out * rank], &[out, rank])?, scale)
            }
        };
        let mut var = |part: &str, tensor: &Tensor| -> Result<Tensor, TrainError> {
            let (name, var) = (format!("{role} {part}"), Var::from_tensor(tensor)?);
            let (tensor, whole) = (var.as_tensor().clone(), 0..tensor.elem_count());
            self.all.push(Parameter { name, var, decays: true, trained: vec![whole] });
            Ok(tensor)
        };
        Ok(Patch::LowRank(LowRank { a: var("A", &a)?, b: var("B", &b)?, scale }))
    }

    /// Adds a parameter that is no weight of the model, for an objective or lens that uses the variable.
    ///
    /// # Errors
    /// The name is taken.
    pub fn add(&mut self, name: &str, var: Var) -> Result<(), TrainError> {
        if self.all.iter().any(|p| p.name == name) {
            return Err(TrainError::Options(format!("there are two parameters {name}")));
        }
        let trained = std::iter::once(0..var.elem_count()).collect();
        self.all.push(Parameter { name: name.to_string(), var, decays: true, trained });
        Ok(())
    }

    /// The parameters, in a fixed order.
    pub fn all(&self) -> &[Parameter] {
        &self.all
    }

    /// Number of values that are trained.
    pub fn count(&self) -> usize {
        self.all.iter().flat_map(|p| &p.trained).map(Range::len).sum()
    }

    /// The overlay that puts them over the model, tracked.
    pub fn overlay(&self) -> &Overlay {
        &self.overlay
    }

    /// The values of all parameters.
    ///
    /// # Errors
    /// A variable that is not plain f32.
    pub fn values(&self) -> Result<Vec<Vec<f32>>, TrainError> {
        self.all.iter().map(|p| Ok(ops::values(p.var.as_tensor())?.to_vec())).collect()
    }

    /// Sets all parameters.
    ///
    /// # Errors
    /// Values that do not fit.
    pub fn set(&self, values: &[Vec<f32>]) -> Result<(), TrainError> {
        if values.len() != self.all.len() {
            return Err(TrainError::Options(format!("{} values for {} parameters", values.len(), self.all.len())));
        }
        for (parameter, values) in self.all.iter().zip(values) {
            parameter.set(values.clone())?;
        }
        Ok(())
    }
}

impl Parameter {
    /// Sets its values.
    ///
    /// # Errors
    /// The number of values does not fit.
    pub fn set(&self, values: Vec<f32>) -> Result<(), TrainError> {
        Ok(self.var.set(&Tensor::from_vec(values, self.var.shape(), &Device::Cpu)?)?)
    }
}

/// A model's own weight, in f32.
fn stored(model: &Model, role: Role) -> Result<Vec<f32>, TrainError> {
    let weights = model.weights();
    let of_expert = |l, e| {
        let absent = || TrainError::Parameter { role, problem: "it is not in memory; help: load it".to_string() };
        weights.expert(l, e).ok_or_else(absent)
    };
    let residency = |error| TrainError::Model(quorate_model::ModelError::from(error));
    Ok(match role {
        Role::ExpertGate(l, e) => of_expert(l, e)?.gate.to_f32(),
        Role::ExpertUp(l, e) => of_expert(l, e)?.up.to_f32(),
        Role::ExpertDown(l, e) => of_expert(l, e)?.down.to_f32(),
        role if role.is_vector() => weights.vector(role).map_err(residency)?.to_vec(),
        role => weights.matrix(role).map_err(residency)?.to_f32(),
    })
}

/// Whether a weight is in memory.
fn stored_shape(model: &Model, role: Role) -> Result<(), TrainError> {
    match role {
        Role::ExpertGate(l, e) | Role::ExpertUp(l, e) | Role::ExpertDown(l, e)
            if model.weights().expert(l, e).is_none() =>
        {
            Err(TrainError::Parameter { role, problem: "it is not in memory; help: load it".to_string() })
        }
        _ => Ok(()),
    }
}
