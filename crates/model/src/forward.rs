//! The one forward pass. It is driven by [`ModelSpec`] and calls a lens at the sites
//! that the lens has declared.

use std::sync::Arc;

use candle_core::Tensor;
use quorate_formats::Role;
use quorate_formats::spec::{Activation, FfnSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm};
use quorate_kernels::{self as kernels, NO_EXPERT, Pack};

use crate::attention::Attention;
use crate::ffn::{self, Gated};
use crate::ops::{self, Angles, values};
use crate::overlay::Weight;
use crate::routing::{Keep, route};
use crate::{At, Flow, KvCache, Lens, Model, ModelError, Routing, Rows, Segment, Site, SiteSet};

/// What a forward pass returns.
#[derive(Debug)]
pub struct Forward {
    /// Context of the rows; `rows.logit_rows` maps rows of `logits` to token rows.
    pub rows: Rows,
    /// Logits `[M, V]`; `None` if none were wanted or a lens stopped the pass.
    pub logits: Option<Tensor>,
}

/// A lens stopped the pass, or something failed. `?` carries both out of the layers.
pub(crate) enum Exit {
    Stop,
    Error(ModelError),
}

impl<E: Into<ModelError>> From<E> for Exit {
    fn from(error: E) -> Exit {
        Exit::Error(error.into())
    }
}

/// One pass under way: what every step needs at hand.
struct Pass<'a> {
    model: &'a Model,
    rows: &'a Rows,
    lens: &'a mut dyn Lens,
    pack: Pack,
    angles: Arc<Angles>,
}

/// One layer of a pass.
#[derive(Clone, Copy)]
struct Here {
    layer: usize,
    sites: SiteSet,
}

impl Model {
    /// Runs new tokens of one or several sequences through the model and appends them to `cache`.
    ///
    /// When a segment has more than one token, every row's values are the same whatever else is in the batch.
    ///
    /// Gradients go from the logits back to every value that is tracked: one to which a lens added a `Var` (see
    /// [`crate::Taps`]), or a weight of the [`crate::Overlay`]. The values computed are the same with and without.
    ///
    /// # Errors
    /// Tokens outside the vocabulary, slots that do not exist, experts that are not loaded, and whatever the lens reports.
    /// After an error, and after a lens stopped the pass, the cache's sequences are as long as before.
    pub fn forward(
        &self,
        segments: &[Segment],
        cache: &mut KvCache,
        lens: &mut dyn Lens,
    ) -> Result<Forward, ModelError> {
        let rows = Rows::of(segments, &cache.lengths(), self.spec().vocab_size)?;
        if rows.is_empty() {
            return Ok(Forward { rows, logits: None });
        }
        // With prompts among them, rows do not depend on their neighbours; pure decoding takes the faster way.
        let pack = if rows.spans.iter().all(|s| s.len == 1) { Pack::BySize } else { Pack::Always };
        let outcome = Pass { model: self, rows: &rows, lens, pack, angles: Arc::default() }.run(cache);
        let logits = match outcome {
            Ok(logits) => {
                rows.spans.iter().for_each(|s| cache.advance(s.slot, &rows.token[s.row0..s.row0 + s.len]));
                logits
            }
            Err(Exit::Stop) => None,
            Err(Exit::Error(error)) => return Err(error),
        };
        Ok(Forward { rows, logits })
    }
}

impl Pass<'_> {
    fn run(&mut self, cache: &mut KvCache) -> Result<Option<Tensor>, Exit> {
        let model = self.model;
        let spec = model.spec();
        let mut x = self.embed()?;
        for (layer, layer_spec) in spec.layers.iter().enumerate() {
            let here = Here { layer, sites: self.lens.sites(layer) };
            if layer == 0 || spec.layers[layer - 1].attn.rope != layer_spec.attn.rope {
                self.rotations(layer_spec);
            }
            x = self.layer(here, layer_spec, x, cache)?;
        }
        if self.rows.logit_rows.is_empty() {
            return Ok(None);
        }
        let last = Here { layer: spec.layers.len(), sites: self.lens.sites(spec.layers.len()) };
        let picked = self.pick_logit_rows(&x)?;
        let norm = ops::rms_norm(model.pool(), &picked, model.vector(Role::FinalNorm)?, spec.norm_eps)?;
        let norm = self.visit(last, Site::FinalNorm, norm, None)?;
        let head = if spec.tie_word_embeddings { Role::Embed } else { Role::LmHead };
        let logits = ops::linear(model.pool(), self.pack, &norm, &model.matrix(head)?, None)?;
        Ok(Some(self.visit(last, Site::Logits, logits, None)?))
    }

    /// Embedding rows of the tokens, `[N, d]`.
    fn embed(&self) -> Result<Tensor, Exit> {
        let matrix = match self.model.matrix(Role::Embed)?.weight {
            Weight::Stored(matrix) => matrix,
            Weight::Open(tensor) => {
                let rows: Vec<usize> = self.rows.token.iter().map(|&token| token as usize).collect();
                return Ok(ops::pick_rows(tensor, &rows)?);
            }
        };
        let (d, row_bytes) = (matrix.cols, matrix.data().len() / matrix.rows);
        let mut x = vec![0.0; self.rows.len() * d];
        for (row, &token) in x.chunks_exact_mut(d).zip(&self.rows.token) {
            let start = token as usize * row_bytes;
            kernels::dequantize(matrix.dtype, &matrix.data()[start..start + row_bytes], row);
        }
        Ok(ops::tensor(x, &[self.rows.len(), d])?)
    }

    /// Turns by every row's position.
    fn rotations(&mut self, spec: &LayerSpec) {
        let rope = &spec.attn.rope;
        let mut angles = Angles::default();
        for &position in &self.rows.position {
            for &f in &rope.inv_freq {
                let (sin, cos) = (position as f32 * f).sin_cos();
                angles.cos.push(cos * rope.attention_factor);
                angles.sin.push(sin * rope.attention_factor);
            }
        }
        self.angles = Arc::new(angles);
    }

    fn layer(&mut self, here: Here, spec: &LayerSpec, x: Tensor, cache: &mut KvCache) -> Result<Tensor, Exit> {
        let model = self.model;
        let x = self.visit(here, Site::ResidPre, x, None)?;
        let attn = self.attention(here, spec, &x, cache)?;
        let x = ops::add(model.pool(), &x, &attn)?;
        let x = self.visit(here, Site::ResidMid, x, None)?;
        let norm = model.vector(Role::FfnNorm(here.layer))?;
        let ffn_in = ops::rms_norm(model.pool(), &x, norm, model.spec().norm_eps)?;
        let ffn_in = self.visit(here, Site::FfnIn, ffn_in, None)?;
        let out = match &spec.ffn {
            FfnSpec::Dense { act, .. } => {
                let roles = [Role::DenseGate(here.layer), Role::DenseUp(here.layer), Role::DenseDown(here.layer)];
                self.dense(here, roles, *act, &ffn_in)?
            }
            FfnSpec::Moe(moe) => self.moe(here, moe, &ffn_in)?,
        };
        let out = self.visit(here, Site::MlpOut, out, None)?;
        let x = ops::add(model.pool(), &x, &out)?;
        self.visit(here, Site::ResidPost, x, None)
    }

    fn attention(&mut self, here: Here, spec: &LayerSpec, x: &Tensor, cache: &mut KvCache) -> Result<Tensor, Exit> {
        let (model, l, attn) = (self.model, here.layer, &spec.attn);
        let (n, dim) = (self.rows.len(), attn.head_dim);
        let eps = model.spec().norm_eps;
        let h = ops::rms_norm(model.pool(), x, model.vector(Role::AttnNorm(l))?, eps)?;
        let h = self.visit(here, Site::AttnIn, h, None)?;

        let pack = self.pack;
        let project = |w, bias, norm: Option<Role>, heads: usize| -> Result<Tensor, ModelError> {
            let bias = if attn.qkv_bias { Some(model.vector(bias)?) } else { None };
            let mut y = ops::linear(model.pool(), pack, &h, &model.matrix(w)?, bias)?;
            if let (Some(norm), QkNorm::Whole | QkNorm::PerHead) = (norm, attn.qk_norm) {
                y = ops::rms_norm(model.pool(), &y, model.vector(norm)?, eps)?;
            }
            if let Some(c) = attn.clip_qkv {
                y = ops::clip(&y, c)?;
            }
            Ok(y.reshape((n, heads, dim))?)
        };
        let q = project(Role::Q(l), Role::QBias(l), Some(Role::QNorm(l)), attn.n_heads)?;
        let k = project(Role::K(l), Role::KBias(l), Some(Role::KNorm(l)), attn.n_kv_heads)?;
        let v = project(Role::V(l), Role::VBias(l), None, attn.n_kv_heads)?;
        let q = self.visit(here, Site::AttnQ, q, None)?;
        let k = self.visit(here, Site::AttnK, k, None)?;
        let v = self.visit(here, Site::AttnV, v, None)?;
        let q = ops::rope(model.pool(), &q, attn.rope.dim, &self.angles)?;
        let k = ops::rope(model.pool(), &k, attn.rope.dim, &self.angles)?;
        let q = self.visit(here, Site::AttnQRot, q, None)?;
        let k = self.visit(here, Site::AttnKRot, k, None)?;

        self.append(l, attn.n_kv_heads * dim, &k, &v, cache)?;
        let attention = Attention { pool: model.pool(), spec: attn, rows: self.rows, cache, layer: l };
        let z = if here.sites.contains(Site::AttnScores) || here.sites.contains(Site::AttnPattern) {
            let scores = self.visit(here, Site::AttnScores, attention.scores(&q, &k)?, None)?;
            let pattern = self.visit(here, Site::AttnPattern, attention.pattern(&scores)?, None)?;
            attention.mix(&pattern, &v)?
        } else {
            attention.at_once(&q, &k, &v)?
        };
        let z = self.visit(here, Site::Z, z, None)?;
        let z = z.reshape((n, attn.n_heads * dim))?;
        let bias = if attn.o_bias { Some(model.vector(Role::OBias(l))?) } else { None };
        let out = ops::linear(model.pool(), self.pack, &z, &model.matrix(Role::O(l))?, bias)?;
        self.visit(here, Site::AttnOut, out, None)
    }

    fn append(&self, l: usize, width: usize, k: &Tensor, v: &Tensor, cache: &mut KvCache) -> Result<(), ModelError> {
        let (k, v) = (values(k)?, values(v)?);
        for span in &self.rows.spans {
            let range = span.row0 * width..(span.row0 + span.len) * width;
            cache.append(span.slot, l, &k[range.clone()], &v[range]);
        }
        Ok(())
    }

    /// A dense gated FFN with weights `[gate, up, down]`.
    fn dense(&mut self, here: Here, roles: [Role; 3], act: Activation, x: &Tensor) -> Result<Tensor, Exit> {
        let model = self.model;
        let [gate, up, down] = roles;
        let weights = Gated { gate: model.matrix(gate)?, up: model.matrix(up)?, down: model.matrix(down)? };
        let hidden = ffn::hidden(model.pool(), self.pack, &weights, act, x)?;
        let hidden = self.visit(here, Site::MlpHidden, hidden, None)?;
        Ok(ops::linear(model.pool(), self.pack, &hidden, &weights.down, None)?)
    }

    fn moe(&mut self, here: Here, moe: &MoeSpec, x: &Tensor) -> Result<Tensor, Exit> {
        let (model, l, n) = (self.model, here.layer, self.rows.len());
        let logits = ops::linear(model.pool(), self.pack, x, &model.matrix(Role::Router(l))?, None)?;
        let logits = self.visit(here, Site::RouterLogits, logits, None)?;
        let mut selection = None;
        if here.sites.contains(Site::Selection) {
            let zeros = ops::tensor(vec![0.0; n * moe.n_experts], &[n, moe.n_experts])?;
            selection = Some(self.visit(here, Site::Selection, zeros, None)?);
        }
        let selection = selection.as_ref().map(values).transpose()?;
        let keep = model.kept(l).map(|kept| Keep { kept, mode: model.routing_mode() });
        let mut routing = route(moe, l, &logits, selection.as_deref(), keep)?;
        if here.sites.contains(Site::Routing) {
            let at = At { site: Site::Routing, layer: l, rows: self.rows, routing: None };
            let flow = self.lens.routing(&at, &mut routing)?;
            check_routing(&routing, l, n, moe)?;
            if flow == Flow::Stop {
                return Err(Exit::Stop);
            }
        }
        let out = self.experts(here, moe, x, &routing)?;
        let Some(shared) = &moe.shared else { return Ok(out) };
        let roles = [Role::SharedGate(l), Role::SharedUp(l), Role::SharedDown(l)];
        let mut always = self.dense(here, roles, moe.act, x)?;
        if shared.gated {
            let gate = ops::linear(model.pool(), self.pack, x, &model.matrix(Role::SharedExpertGate(l))?, None)?;
            always = ops::sigmoid_gated(&always, &gate)?;
        }
        Ok(ops::add(model.pool(), &out, &always)?)
    }

    /// The chosen experts on `x [N, d]`, gated and summed, `[N, d]`.
    fn experts(&mut self, here: Here, moe: &MoeSpec, x: &Tensor, routing: &Routing) -> Result<Tensor, Exit> {
        let (model, l, d) = (self.model, here.layer, self.model.spec().hidden_size);
        let experts: Vec<Option<Gated<'_>>> = (0..moe.n_experts).map(|e| model.expert(l, e)).collect();
        if let Some(&id) = routing.ids.iter().find(|&&id| id != NO_EXPERT && experts[id as usize].is_none()) {
            return Err(ModelError::ExpertNotLoaded { layer: l, expert: id }.into());
        }
        let (pool, pack) = (model.pool(), self.pack);
        let hidden = ffn::expert_hidden(pool, pack, &experts, moe.act, moe.intermediate_size, x, routing)?;
        let hidden = self.visit(here, Site::ExpertHidden, hidden, Some(routing))?;
        let slots = ffn::expert_down(pool, pack, &experts, d, &hidden, routing)?;
        let slots = self.visit(here, Site::ExpertOut, slots, Some(routing))?;
        self.visit(here, Site::MoeOut, ffn::combine(pool, &slots, routing)?, Some(routing))
    }

    fn pick_logit_rows(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let picked = &self.rows.logit_rows;
        if picked.len() == self.rows.len() {
            return Ok(x.clone());
        }
        ops::pick_rows(x, picked)
    }

    /// Shows a value to the lens if the lens has declared the site; the value goes on as the lens leaves it.
    fn visit(&mut self, here: Here, site: Site, mut value: Tensor, routing: Option<&Routing>) -> Result<Tensor, Exit> {
        if !here.sites.contains(site) {
            return Ok(value);
        }
        let shape = value.shape().clone();
        let at = At { site, layer: here.layer, rows: self.rows, routing };
        let flow = self.lens.tensor(&at, &mut value)?;
        if *value.shape() != shape {
            let (expected, found) = (shape.dims().to_vec(), value.dims().to_vec());
            return Err(ModelError::LensShape { site, layer: here.layer, expected, found }.into());
        }
        if flow == Flow::Stop {
            return Err(Exit::Stop);
        }
        let value = if value.is_contiguous() { value } else { value.contiguous()? };
        if values(&value).is_err() {
            return Err(ModelError::LensType { site, layer: here.layer, dtype: value.dtype().as_str() }.into());
        }
        Ok(value)
    }
}

fn check_routing(routing: &Routing, layer: usize, n: usize, moe: &MoeSpec) -> Result<(), ModelError> {
    let (slots, ids, gates) = (n * routing.k, routing.ids.len(), routing.gates.elem_count());
    let bad_id = routing.ids.iter().copied().find(|&id| id != NO_EXPERT && id as usize >= moe.n_experts);
    if ids != slots || gates != slots || bad_id.is_some() {
        return Err(ModelError::LensRouting { layer, slots, ids, gates, bad_id });
    }
    Ok(())
}

/// Bytes that a process holds, about, besides weights and KV cache: the program itself and the buffers of a forward pass
/// over [`PREFILL_CHUNK`](crate::PREFILL_CHUNK) tokens with logits of `logit_rows` of them.
pub fn buffer_bytes(spec: &ModelSpec, logit_rows: usize) -> u64 {
    let widest = (spec.moe_layers().iter().filter_map(|&l| spec.moe(l)))
        .map(|moe| moe.top_k * (spec.hidden_size + moe.intermediate_size) + moe.n_experts)
        .max()
        .unwrap_or(0);
    let rows = crate::PREFILL_CHUNK * (12 * spec.hidden_size + widest);
    (16 << 20) + 4 * (rows + 3 * (logit_rows + 1) * spec.vocab_size) as u64
}
