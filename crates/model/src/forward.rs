//! The one forward pass. It is driven by [`ModelSpec`] and calls a lens at the sites
//! that the lens has declared.

use std::sync::Arc;

use candle_core::Tensor;
use quorate_formats::Role;
use quorate_formats::spec::{Activation, FfnSpec, LayerSpec, ModelSpec, NormPlacement};
use quorate_kernels::{self as kernels, Pack};

use crate::ffn::{self, Gated, is_clamped};
use crate::ops::{self, Angles, values};
use crate::overlay::Weight;
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
pub(crate) struct Pass<'a> {
    pub model: &'a Model,
    pub rows: &'a Rows,
    pub lens: &'a mut dyn Lens,
    pub pack: Pack,
    /// Turns of the rows by the RoPE of the layer under way.
    pub angles: Arc<Angles>,
}

/// One layer of a pass.
#[derive(Clone, Copy)]
pub(crate) struct Here {
    pub layer: usize,
    pub sites: SiteSet,
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
        let norm = self.model.norm(&picked, Role::FinalNorm, Role::FinalNormBias)?;
        let norm = self.visit(last, Site::FinalNorm, norm, None)?;
        let logits = model.head(&norm, self.pack)?;
        Ok(Some(self.visit(last, Site::Logits, logits, None)?))
    }

    /// What enters the first layer, `[N, d]`.
    fn embed(&self) -> Result<Tensor, Exit> {
        let spec = self.model.spec();
        let x = ops::scaled(self.embedding_rows()?, spec.scales.embed)?;
        if !spec.learned_positions {
            return Ok(x);
        }
        let (d, table) = (spec.hidden_size, self.model.weights().vector(Role::PositionEmbed)?);
        let mut positions = Vec::with_capacity(self.rows.len() * d);
        for &position in &self.rows.position {
            let row = table.get(position * d..(position + 1) * d);
            let (tokens, context) = (position + 1, spec.max_position_embeddings);
            positions.extend_from_slice(row.ok_or(ModelError::PromptTooLong { tokens, context })?);
        }
        Ok(ops::add(self.model.pool(), &x, &ops::tensor(positions, &[self.rows.len(), d])?)?)
    }

    /// Embedding rows of the tokens, `[N, d]`.
    fn embedding_rows(&self) -> Result<Tensor, ModelError> {
        let matrix = match self.model.matrix(Role::Embed)?.weight {
            Weight::Stored(matrix) => matrix,
            Weight::Open(tensor) => {
                let rows: Vec<usize> = self.rows.token.iter().map(|&token| token as usize).collect();
                return ops::pick_rows(tensor, &rows);
            }
        };
        let (d, row_bytes) = (matrix.cols, matrix.data().len() / matrix.rows);
        let mut x = vec![0.0; self.rows.len() * d];
        for (row, &token) in x.chunks_exact_mut(d).zip(&self.rows.token) {
            let start = token as usize * row_bytes;
            kernels::dequantize(matrix.dtype, &matrix.data()[start..start + row_bytes], row);
        }
        ops::tensor(x, &[self.rows.len(), d])
    }

    /// Turns by every row's position.
    fn rotations(&mut self, spec: &LayerSpec) {
        let rope = &spec.attn.rope;
        let mut angles = Angles::default();
        for span in &self.rows.spans {
            let length = span.pos0 + span.len;
            let long = rope.long.as_ref().filter(|long| length > long.above);
            let (inv_freq, factor) = match long {
                Some(long) => (&long.inv_freq, long.attention_factor),
                None => (&rope.inv_freq, rope.attention_factor),
            };
            for (position, f) in (span.pos0..length).flat_map(|p| inv_freq.iter().map(move |f| (p, f))) {
                let (sin, cos) = (position as f32 * f).sin_cos();
                angles.cos.push(cos * factor);
                angles.sin.push(sin * factor);
            }
        }
        self.angles = Arc::new(angles);
    }

    fn layer(&mut self, here: Here, spec: &LayerSpec, x: Tensor, cache: &mut KvCache) -> Result<Tensor, Exit> {
        let l = here.layer;
        let (before, after) = (spec.norms != NormPlacement::After, spec.norms != NormPlacement::Before);
        let x = self.visit(here, Site::ResidPre, x, None)?;
        let h = if before { self.model.norm(&x, Role::AttnNorm(l), Role::AttnNormBias(l))? } else { x.clone() };
        let h = self.visit(here, Site::AttnIn, h, None)?;
        let attn = match &spec.delta {
            Some(delta) => self.delta(here, delta, &h, cache)?,
            None => self.attention(here, &spec.attn, &h, cache)?,
        };
        let attn = self.visit(here, Site::AttnOut, attn, None)?;
        let x = self.added(&x, attn, after.then_some(Role::AttnPostNorm(l)))?;
        let x = self.visit(here, Site::ResidMid, x, None)?;

        let ffn_in = if before { self.model.norm(&x, Role::FfnNorm(l), Role::FfnNormBias(l))? } else { x.clone() };
        let ffn_in = self.visit(here, Site::FfnIn, ffn_in, None)?;
        let out = match &spec.ffn {
            FfnSpec::Dense { act, plain: true, .. } => self.plain_dense(here, *act, &ffn_in)?,
            FfnSpec::Dense { act, .. } => {
                self.dense(here, [Role::DenseGate(l), Role::DenseUp(l), Role::DenseDown(l)], *act, &ffn_in)?
            }
            FfnSpec::Moe(moe) => self.moe(here, moe, &x, &ffn_in)?,
        };
        let out = self.visit(here, Site::MlpOut, out, None)?;
        let x = self.added(&x, out, after.then_some(Role::FfnPostNorm(l)))?;
        self.visit(here, Site::ResidPost, x, None)
    }

    /// The residual stream with what a block adds, through the norm behind the block if there is one.
    fn added(&self, x: &Tensor, mut block: Tensor, norm: Option<Role>) -> Result<Tensor, ModelError> {
        if let Some(norm) = norm {
            block = self.model.norm(&block, norm, norm)?;
        }
        let block = ops::scaled(block, self.model.spec().scales.residual)?;
        ops::add(self.model.pool(), x, &block)
    }

    /// An FFN without a gate, with biases.
    fn plain_dense(&mut self, here: Here, act: Activation, x: &Tensor) -> Result<Tensor, Exit> {
        let (model, l) = (self.model, here.layer);
        let (up, bias) = (model.matrix(Role::DenseUp(l))?, model.vector(Role::DenseUpBias(l))?);
        let hidden = ffn::activated(model.pool(), &ops::linear(model.pool(), self.pack, x, &up, Some(bias))?, act)?;
        let hidden = self.visit(here, Site::MlpHidden, hidden, None)?;
        let (down, bias) = (model.matrix(Role::DenseDown(l))?, model.vector(Role::DenseDownBias(l))?);
        Ok(ops::linear(model.pool(), self.pack, &hidden, &down, Some(bias))?)
    }

    /// A dense gated FFN with weights `[gate, up, down]`.
    pub fn dense(&mut self, here: Here, roles: [Role; 3], act: Activation, x: &Tensor) -> Result<Tensor, Exit> {
        let model = self.model;
        let [gate, up, down] = roles;
        let (gate, up, down) = (model.matrix(gate)?, model.matrix(up)?, model.matrix(down)?);
        let weights = Gated { gate, up, down, biases: None, clamped: is_clamped(act) };
        let hidden = ffn::hidden(model.pool(), self.pack, &weights, act, x)?;
        let hidden = self.visit(here, Site::MlpHidden, hidden, None)?;
        Ok(ops::linear(model.pool(), self.pack, &hidden, &weights.down, None)?)
    }

    fn pick_logit_rows(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let picked = &self.rows.logit_rows;
        if picked.len() == self.rows.len() {
            return Ok(x.clone());
        }
        ops::pick_rows(x, picked)
    }

    /// Shows a value to the lens if the lens has declared the site; the value goes on as the lens leaves it.
    pub fn visit(
        &mut self,
        here: Here,
        site: Site,
        mut value: Tensor,
        routing: Option<&Routing>,
    ) -> Result<Tensor, Exit> {
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

/// Bytes, about, of the buffers of a forward pass over [`PREFILL_CHUNK`](crate::PREFILL_CHUNK) tokens with logits of
/// `logit_rows` of them.
pub fn buffer_bytes(spec: &ModelSpec, logit_rows: usize) -> u64 {
    let widest = (spec.moe_layers().iter().filter_map(|&l| spec.moe(l)))
        .map(|moe| moe.top_k * (spec.hidden_size + moe.intermediate_size) + moe.n_experts)
        .max()
        .unwrap_or(0);
    // Queries of latent attention are as wide as the latent vector, in every head.
    let latent = |l: &LayerSpec| l.attn.mla.map(|mla| 4 * l.attn.n_heads * (mla.kv_lora_rank + l.attn.rope.dim));
    let latent = spec.layers.iter().filter_map(latent).max().unwrap_or(0);
    let rows = crate::PREFILL_CHUNK * (12 * spec.hidden_size + widest + latent);
    4 * (rows + 3 * (logit_rows + 1) * spec.vocab_size) as u64
}
