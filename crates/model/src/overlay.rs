//! Weights that lie over a model's own: replaced ones and low-rank terms, for training, adapters and edits. The files and
//! the weights in memory stay as they are; taking the overlay off gives the model back.

use std::collections::{BTreeMap, HashMap};

use candle_core::Tensor;
use quorate_formats::Role;
use quorate_formats::shape::expected_shape;
use quorate_formats::spec::ModelSpec;
use quorate_residency::Matrix;

use crate::ModelError;
use crate::ops::values;

/// A change to one weight.
#[derive(Clone, Debug)]
pub enum Patch {
    /// This tensor in the weight's place, of the same shape.
    Replace(Tensor),
    /// `W + scale B A`, computed as `y = W x + scale B (A x)`.
    LowRank(LowRank),
}

/// A term of low rank on a matrix `[out, in]`.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// `[r, in]`.
    pub a: Tensor,
    /// `[out, r]`.
    pub b: Tensor,
    /// Factor on the product.
    pub scale: f32,
}

/// Changes to a model's weights, by role.
///
/// A tensor that is tracked (a `Var`, or computed from one) gets its gradient from the forward pass, and what an optimizer
/// writes into a `Var` takes effect at once. Others are taken as they are when the overlay is put on, and cost nothing more
/// than the weight they replace.
#[derive(Clone, Debug, Default)]
pub struct Overlay {
    patches: BTreeMap<Role, Patch>,
}

impl Overlay {
    /// No changes.
    pub fn new() -> Overlay {
        Overlay::default()
    }

    /// Changes a weight; returns the change that it had before.
    pub fn insert(&mut self, role: Role, patch: Patch) -> Option<Patch> {
        self.patches.insert(role, patch)
    }

    /// Takes one change out.
    pub fn remove(&mut self, role: Role) -> Option<Patch> {
        self.patches.remove(&role)
    }

    /// The change of a weight.
    pub fn get(&self, role: Role) -> Option<&Patch> {
        self.patches.get(&role)
    }

    /// All changes, in the order of roles.
    pub fn iter(&self) -> impl Iterator<Item = (Role, &Patch)> {
        self.patches.iter().map(|(role, patch)| (*role, patch))
    }

    /// Whether nothing is changed.
    pub fn is_empty(&self) -> bool {
        self.patches.is_empty()
    }

    /// The same values without gradients, independent of what an optimizer writes later.
    ///
    /// # Errors
    /// A tensor that cannot be copied.
    pub fn detached(&self) -> Result<Overlay, ModelError> {
        let copy = |tensor: &Tensor| tensor.detach().copy();
        let patch = |patch: &Patch| {
            Ok::<_, ModelError>(match patch {
                Patch::Replace(tensor) => Patch::Replace(copy(tensor)?),
                Patch::LowRank(LowRank { a, b, scale }) => {
                    Patch::LowRank(LowRank { a: copy(a)?, b: copy(b)?, scale: *scale })
                }
            })
        };
        let patches = self.patches.iter().map(|(role, p)| Ok((*role, patch(p)?)));
        Ok(Overlay { patches: patches.collect::<Result<_, ModelError>>()? })
    }
}

impl FromIterator<(Role, Patch)> for Overlay {
    fn from_iter<I: IntoIterator<Item = (Role, Patch)>>(patches: I) -> Overlay {
        Overlay { patches: patches.into_iter().collect() }
    }
}

/// A matrix as the pass multiplies with it.
#[derive(Clone, Copy)]
pub(crate) enum Weight<'a> {
    Stored(&'a Matrix),
    /// `[out, in]`, f32, contiguous.
    Open(&'a Tensor),
}

impl Weight<'_> {
    /// Outputs and inputs.
    pub(crate) fn shape(&self) -> Result<(usize, usize), ModelError> {
        match self {
            Weight::Stored(matrix) => Ok((matrix.rows, matrix.cols)),
            Weight::Open(tensor) => Ok(tensor.dims2()?),
        }
    }
}

/// A matrix with the low-rank term that lies over it.
#[derive(Clone, Copy)]
pub(crate) struct Linear<'a> {
    pub weight: Weight<'a>,
    pub low_rank: Option<&'a LowRank>,
}

impl<'a> Linear<'a> {
    /// The matrix, if it is all there is.
    pub(crate) fn stored(&self) -> Option<&'a Matrix> {
        match (self.weight, self.low_rank) {
            (Weight::Stored(matrix), None) => Some(matrix),
            _ => None,
        }
    }
}

/// A norm or a bias.
#[derive(Clone, Copy)]
pub(crate) enum Vector<'a> {
    Stored(&'a [f32]),
    Open(&'a Tensor),
}

/// An overlay that was checked against a model.
#[derive(Debug, Default)]
pub(crate) struct Installed {
    pub overlay: Overlay,
    matrices: HashMap<Role, Matrix>,
    vectors: HashMap<Role, Vec<f32>>,
}

impl Installed {
    /// Checks an overlay, and turns what is not tracked into weights as the kernels take them.
    pub(crate) fn new(spec: &ModelSpec, overlay: Overlay) -> Result<Installed, ModelError> {
        let mut installed = Installed::default();
        for (role, patch) in overlay.iter() {
            check(spec, role, patch)?;
            match patch {
                Patch::Replace(tensor) if !tensor.track_op() => {
                    let values = values(tensor)?;
                    match *tensor.dims() {
                        [rows, cols] if !role.is_vector() => {
                            drop(installed.matrices.insert(role, Matrix::from_f32(rows, cols, &values)?))
                        }
                        _ => drop(installed.vectors.insert(role, values.to_vec())),
                    }
                }
                _ => {}
            }
        }
        installed.overlay = overlay;
        Ok(installed)
    }

    /// What lies over a matrix; `stored` is the model's own.
    pub(crate) fn matrix<'a>(&'a self, role: Role, stored: &'a Matrix) -> Linear<'a> {
        if self.overlay.is_empty() {
            return Linear { weight: Weight::Stored(stored), low_rank: None };
        }
        match (self.matrices.get(&role), self.overlay.get(role)) {
            (Some(matrix), _) => Linear { weight: Weight::Stored(matrix), low_rank: None },
            (None, Some(Patch::Replace(tensor))) => Linear { weight: Weight::Open(tensor), low_rank: None },
            (None, Some(Patch::LowRank(term))) => Linear { weight: Weight::Stored(stored), low_rank: Some(term) },
            (None, None) => Linear { weight: Weight::Stored(stored), low_rank: None },
        }
    }

    /// What lies over a vector.
    pub(crate) fn vector<'a>(&'a self, role: Role, stored: &'a [f32]) -> Vector<'a> {
        match (self.vectors.get(&role), self.overlay.get(role)) {
            (Some(vector), _) => Vector::Stored(vector),
            (None, Some(Patch::Replace(tensor))) => Vector::Open(tensor),
            (None, _) => Vector::Stored(stored),
        }
    }
}

fn check(spec: &ModelSpec, role: Role, patch: &Patch) -> Result<(), ModelError> {
    let refuse = |problem: String| Err(ModelError::Overlay { role, problem });
    let Some(shape) = expected_shape(spec, role) else {
        let tied = role == Role::LmHead && spec.tie_word_embeddings;
        let help =
            if tied { "it is tied to the token embedding; help: change that" } else { "the model has no such weight" };
        return refuse(help.to_string());
    };
    let tensors = match patch {
        Patch::Replace(tensor) => vec![("the tensor", tensor, shape)],
        Patch::LowRank(LowRank { a, b, scale }) => {
            let [out, inner] = shape[..] else {
                return refuse("a low-rank term lies over matrices only; help: replace the vector".to_string());
            };
            if role == Role::Embed {
                let problem = "a low-rank term cannot lie over the embedding, which is looked up; help: replace it";
                return refuse(problem.to_string());
            }
            if !scale.is_finite() {
                return refuse(format!("the factor of the low-rank term is {scale}"));
            }
            let r = a.dims().first().copied().unwrap_or(0).max(1);
            vec![("A", a, vec![r, inner]), ("B", b, vec![out, r])]
        }
    };
    for (name, tensor, shape) in tensors {
        if tensor.dims() != shape {
            return refuse(format!("{name} is {:?}, {shape:?} expected", tensor.dims()));
        }
        match values(tensor) {
            Err(error) => return refuse(format!("{name} cannot be used: {error}")),
            Ok(values) if values.iter().any(|v| !v.is_finite()) => {
                return refuse(format!("{name} has values that are not numbers"));
            }
            Ok(_) => {}
        }
    }
    Ok(())
}
