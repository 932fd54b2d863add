//! Weights from outside the forward pass: experts applied to any input, weights exchanged.

use candle_core::Tensor;
use quorate_formats::Role;
use quorate_formats::spec::{MoeSpec, NormKind};
use quorate_kernels::{self as kernels, Pack};
use quorate_residency::{Expert, Matrix};

use crate::ffn::{self, Experts};
use crate::ops::{self, tensor, values};
use crate::routing::{Keep, Learned, route};
use crate::{Model, ModelError, Routing, RoutingMode};

impl Model {
    /// Outputs, before any gate, of all routed experts of decoder layer `layer` for inputs `x [n, d]` (values of the site
    /// `ffn_in`): `[n, E, d]`, each expert applied to each row whatever the router would choose.
    ///
    /// # Errors
    /// A layer without experts, or experts that are not in memory.
    pub fn all_expert_outputs(&self, layer: usize, x: &Tensor) -> Result<Tensor, ModelError> {
        let moe = self.spec().moe(layer).ok_or(ModelError::NoExperts { layer })?;
        let (n, d) = x.dims2()?;
        let e = moe.n_experts;
        let ids: Vec<u32> = (0..n).flat_map(|_| (0..e).filter_map(|e| u32::try_from(e).ok())).collect();
        let experts = Experts::loaded(self, layer, e, &ids);
        let (pool, pack) = (self.pool(), Pack::Always);
        let hidden = ffn::expert_hidden(pool, pack, &experts, moe.act, moe.intermediate_size, x, (e, &ids))?;
        ffn::expert_down(pool, pack, &experts, d, &hidden, &ids)
    }

    /// How tokens with router logits `logits [n, E]` (values of the site `router_logits`) would be routed in decoder layer
    /// `layer` with the experts that `kept [E]` flags, `None` for all, whatever the model keeps now.
    ///
    /// # Errors
    /// A layer without experts, flags or logits of another number of experts, or logits that are NaN.
    pub fn route(
        &self,
        layer: usize,
        logits: &[f32],
        kept: Option<&[bool]>,
        mode: RoutingMode,
    ) -> Result<Routing, ModelError> {
        let moe = self.spec().moe(layer).ok_or(ModelError::NoExperts { layer })?;
        if !logits.len().is_multiple_of(moe.n_experts) || kept.is_some_and(|k| k.len() != moe.n_experts) {
            let (experts, flags) = (moe.n_experts, kept.map_or(0, <[bool]>::len));
            let message = format!(
                "layer {layer} has {experts} experts; {} logits and {flags} flags do not fit them",
                logits.len()
            );
            return Err(ModelError::Keep(message));
        }
        let logits = tensor(logits.to_vec(), &[logits.len() / moe.n_experts, moe.n_experts])?;
        let learned = self.learned(layer, moe)?;
        route(moe, layer, &logits, learned, None, kept.map(|kept| Keep { kept, mode }))
    }

    /// Activations `act(gate x)` of all routed experts of decoder layer `layer` for inputs `x [n, d]` (values of the site
    /// `ffn_in`): `[n, E, I]`, before they meet `up x`.
    ///
    /// # Errors
    /// A layer without experts, or experts that are not in memory.
    pub fn all_expert_activations(&self, layer: usize, x: &Tensor) -> Result<Tensor, ModelError> {
        let moe = self.spec().moe(layer).ok_or(ModelError::NoExperts { layer })?;
        let (n, _) = x.dims2()?;
        let (e, width) = (moe.n_experts, moe.intermediate_size);
        let x = values(x)?;
        let (mut out, mut one) = (vec![0.0; n * e * width], Vec::new());
        for expert in 0..e {
            let gate = self.expert_weights(layer, expert)?.gate.as_ref();
            kernels::matmul(self.pool(), Pack::Always, gate, &x, n, None, &mut one);
            for (t, row) in one.chunks_exact(width).enumerate() {
                out[(t * e + expert) * width..][..width].copy_from_slice(row);
            }
        }
        ffn::activated(self.pool(), &tensor(out, &[n, e, width])?, moe.act)
    }

    /// A router's learned vectors.
    pub(crate) fn learned(&self, layer: usize, moe: &MoeSpec) -> Result<Learned<'_>, ModelError> {
        let extra = &moe.router.extra;
        let vector =
            |there: bool, role: Role| if there { Some(self.weights().vector(role)).transpose() } else { Ok(None) };
        Ok(Learned {
            selection_bias: vector(extra.selection_bias, Role::SelectionBias(layer))?,
            expert_scale: vector(extra.expert_scale, Role::ExpertScale(layer))?,
        })
    }

    /// Logits `[n, V]` of residual streams `x [n, d]` of any layer: final norm and output matrix, as the logit lens
    /// (nostalgebraist 2020) reads them. An overlay counts.
    ///
    /// # Errors
    /// Rows of another width.
    pub fn unembed(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let (_, d) = x.dims2()?;
        if d != self.spec().hidden_size {
            return Err(ModelError::Lens(format!("rows of {d} values cannot be read as the residual stream")));
        }
        let norm = self.norm(x, Role::FinalNorm, Role::FinalNormBias)?;
        self.head(&norm, Pack::Always)
    }

    /// The norm of the residual stream.
    pub(crate) fn norm(&self, x: &Tensor, weight: Role, bias: Role) -> Result<Tensor, ModelError> {
        let eps = self.spec().norm_eps;
        if self.spec().norm == NormKind::Layer {
            let weights = self.weights();
            return ops::layer_norm(x, weights.vector(weight)?, weights.vector(bias)?, eps);
        }
        ops::rms_norm(self.pool(), x, self.vector(weight)?, eps)
    }

    /// Logits from what the final norm gives.
    pub(crate) fn head(&self, norm: &Tensor, pack: Pack) -> Result<Tensor, ModelError> {
        let spec = self.spec();
        let head = if spec.tie_word_embeddings { Role::Embed } else { Role::LmHead };
        let bias = if spec.lm_head_bias { Some(self.vector(Role::LmHeadBias)?) } else { None };
        let logits = ops::linear(self.pool(), pack, norm, &self.matrix(head)?, bias)?;
        let logits = ops::scaled(logits, spec.scales.logits)?;
        match spec.scales.logit_softcap {
            Some(c) => ops::softcap(logits, c),
            None => Ok(logits),
        }
    }

    /// The weights of a routed expert in memory.
    ///
    /// # Errors
    /// It is not in memory, or there is none.
    pub fn expert_weights(&self, layer: usize, expert: usize) -> Result<&Expert, ModelError> {
        let id = u32::try_from(expert).unwrap_or(u32::MAX);
        self.weights().expert(layer, expert).ok_or(ModelError::ExpertNotLoaded { layer, expert: id })
    }

    /// The router's rows of a MoE layer, `[E, d]`, in f32.
    ///
    /// # Errors
    /// A layer without experts.
    pub fn router_weight(&self, layer: usize) -> Result<&Matrix, ModelError> {
        self.spec().moe(layer).ok_or(ModelError::NoExperts { layer })?;
        Ok(self.weights().matrix(Role::Router(layer))?)
    }

    /// Puts another expert in the place of one that is in memory, until its experts are loaded anew. The files stay as
    /// they are.
    ///
    /// # Errors
    /// It is not in memory, or its matrices have other shapes.
    pub fn replace_expert(&mut self, layer: usize, expert: usize, new: Expert) -> Result<Expert, ModelError> {
        Ok(self.weights_mut().replace_expert(layer, expert, new)?)
    }

    /// Puts another matrix in the place of one outside the routed experts. The files stay as they are.
    ///
    /// # Errors
    /// It is not in memory, or has another shape.
    pub fn replace_matrix(&mut self, role: Role, new: Matrix) -> Result<Matrix, ModelError> {
        Ok(self.weights_mut().replace_matrix(role, new)?)
    }
}
