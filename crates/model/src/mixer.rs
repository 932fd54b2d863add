//! The attention block of a pass: projections, norms and RoPE of every kind of attention, and the sites on the way.

use candle_core::Tensor;
use quorate_formats::Role;
use quorate_formats::spec::{AttnExtra, AttnSpec, QkNorm};
use quorate_kernels::{self as kernels, Turn};

use crate::attention::{Attention, kernel_shape};
use crate::forward::{Exit, Here, Pass};
use crate::ops::{self, values};
use crate::overlay::Vector;
use crate::{KvCache, ModelError, Site};

impl Pass<'_> {
    /// Attention on `h [N, d]`, the block's input.
    pub fn attention(&mut self, here: Here, attn: &AttnSpec, h: &Tensor, cache: &mut KvCache) -> Result<Tensor, Exit> {
        let l = here.layer;
        let (q, k, v, gate) = match &attn.mla {
            Some(mla) => {
                if let Some(unfolding) = self.stays_latent(here, h, cache)? {
                    return self.latent_attention(here, attn, mla, unfolding, h, cache);
                }
                self.keep_in_full(l, attn, mla, cache)?;
                let (q, c, shared) = self.latents(l, attn, mla, h)?;
                let (k, v) = self.unfolded(l, attn, mla, &c, &shared)?;
                (q, k, v, None)
            }
            None if self.can_attend_at_once(here, attn, h) => {
                let z = self.attended_at_once(l, attn, h, cache)?;
                return self.gathered(here, attn, z);
            }
            None => self.projections(l, attn, h)?,
        };
        let q = self.visit(here, Site::AttnQ, q, None)?;
        let k = self.visit(here, Site::AttnK, k, None)?;
        let v = self.visit(here, Site::AttnV, v, None)?;
        let (q, k) = (self.turned(attn, &q)?, self.turned(attn, &k)?);
        let (mut q, mut k) = match attn.extra.norm_after_rope {
            true => (self.head_norm(attn, q, Role::QNorm(l))?, self.head_norm(attn, k, Role::KNorm(l))?),
            false => (q, k),
        };
        if let Some((floor, scale)) = attn.extra.temperature {
            let factor = |&p: &usize| 1.0 + scale * ((p as f32 + 1.0) / floor).floor().ln_1p();
            q = ops::rows_scaled(&q, self.rows.position.iter().map(factor).collect())?;
        }
        q = self.visit(here, Site::AttnQRot, q, None)?;
        k = self.visit(here, Site::AttnKRot, k, None)?;

        self.append(l, [attn.n_kv_heads * attn.head_dim, attn.n_kv_heads * attn.v_head_dim()], &k, &v, cache)?;
        let z = self.weighted(here, attn, [&q, &k, &v], cache)?;
        let z = match gate {
            Some(gate) => ops::sigmoid_gated(&z, &gate)?,
            None => z,
        };
        self.gathered(here, attn, z)
    }

    /// What the heads gather from the cache, `[N, H, v_head_dim]`.
    pub fn weighted(
        &mut self,
        here: Here,
        attn: &AttnSpec,
        [q, k, v]: [&Tensor; 3],
        cache: &KvCache,
    ) -> Result<Tensor, Exit> {
        let (model, l) = (self.model, here.layer);
        let attention = Attention { pool: model.pool(), spec: attn, rows: self.rows, cache, layer: l };
        let watched = here.sites.contains(Site::AttnScores) || here.sites.contains(Site::AttnPattern);
        if watched || !attention.is_plain() {
            let scores = attention.capped(attention.scores(q, k)?)?;
            let scores = self.visit(here, Site::AttnScores, scores, None)?;
            let sinks = if attn.extra.sinks { Some(model.weights().vector(Role::Sinks(l))?) } else { None };
            let pattern = self.visit(here, Site::AttnPattern, attention.pattern(&scores, sinks)?, None)?;
            Ok(attention.mix(&pattern, v)?)
        } else {
            Ok(attention.at_once(q, k, v)?)
        }
    }

    /// The block's output from its heads'.
    pub fn gathered(&mut self, here: Here, attn: &AttnSpec, z: Tensor) -> Result<Tensor, Exit> {
        let (model, l) = (self.model, here.layer);
        let z = self.visit(here, Site::Z, z, None)?;
        let z = z.reshape((self.rows.len(), attn.n_heads * attn.v_head_dim()))?;
        let bias = if attn.o_bias { Some(model.vector(Role::OBias(l))?) } else { None };
        Ok(ops::linear(model.pool(), self.pack, &z, &model.matrix(Role::O(l))?, bias)?)
    }

    /// What the matrices of queries, keys and values make of `h`, `[N, heads * head_dim]` each.
    fn products(&self, l: usize, attn: &AttnSpec, h: &Tensor) -> Result<[Tensor; 3], ModelError> {
        let model = self.model;
        let factor = |w: Role, bias: Role| -> Result<_, ModelError> {
            Ok((model.matrix(w)?, if attn.qkv_bias { Some(model.vector(bias)?) } else { None }))
        };
        let [q, k, v] = [
            factor(Role::Q(l), Role::QBias(l))?,
            factor(Role::K(l), Role::KBias(l))?,
            factor(Role::V(l), Role::VBias(l))?,
        ];
        ops::linear_each(model.pool(), self.pack, h, [q, k, v])
    }

    /// Whether [`Pass::attended_at_once`] does all that this attention is, and nobody watches what happens in between.
    fn can_attend_at_once(&self, here: Here, attn: &AttnSpec, h: &Tensor) -> bool {
        const BETWEEN: [Site; 7] = [
            Site::AttnQ,
            Site::AttnK,
            Site::AttnV,
            Site::AttnQRot,
            Site::AttnKRot,
            Site::AttnScores,
            Site::AttnPattern,
        ];
        let plain = attn.extra == AttnExtra::default() && attn.clip_qkv.is_none() && attn.qk_norm != QkNorm::Unit;
        let watched = BETWEEN.iter().any(|site| here.sites.contains(*site)) || h.track_op();
        self.rows.len() == 1 && plain && !attn.rope.interleaved && !watched && self.model.overlay().is_empty()
    }

    /// What the heads gather for the one token of a pass, `[1, H, head_dim]`, its key and value being appended to the cache: the same, to
    /// the bit, as step by step, in less time.
    fn attended_at_once(
        &self,
        l: usize,
        attn: &AttnSpec,
        h: &Tensor,
        cache: &mut KvCache,
    ) -> Result<Tensor, ModelError> {
        let (model, dim) = (self.model, attn.head_dim);
        let [q, k, v] = self.products(l, attn, h)?;
        let norms = match attn.qk_norm {
            // `Unit` does not come here.
            QkNorm::None | QkNorm::Unit => None,
            QkNorm::Whole | QkNorm::PerHead => {
                Some([model.weights().vector(Role::QNorm(l))?, model.weights().vector(Role::KNorm(l))?])
            }
        };
        let turn = Turn { norms, eps: model.spec().norm_eps, cos: &self.angles.cos, sin: &self.angles.sin };
        let (q, k, v) = (values(&q)?, values(&k)?, values(&v)?);
        let mut z = Vec::new();
        let pages = cache.layer_mut(self.rows.spans[0].slot, l);
        kernels::attention_of_next(model.pool(), &kernel_shape(attn), &turn, [&q, &k, &v], pages, &mut z);
        ops::tensor(z, &[1, attn.n_heads, dim])
    }

    /// Queries, keys and values `[N, heads, head_dim]` before RoPE, and the gate of the heads' outputs if there is one.
    fn projections(
        &self,
        l: usize,
        attn: &AttnSpec,
        h: &Tensor,
    ) -> Result<(Tensor, Tensor, Tensor, Option<Tensor>), ModelError> {
        let (n, dim) = (self.rows.len(), attn.head_dim);
        let [mut q, k, v] = self.products(l, attn, h)?;
        let mut gate = None;
        let shaped = |y: Tensor, norm: Option<Role>, heads: usize| -> Result<Tensor, ModelError> {
            let mut y = match norm {
                Some(norm) if !attn.extra.norm_after_rope => self.head_norm(attn, y, norm)?,
                _ => y,
            };
            if let Some(c) = attn.clip_qkv {
                y = ops::clip(&y, c)?;
            }
            Ok(y.reshape((n, heads, dim))?)
        };
        if attn.extra.gated {
            let both = q.reshape((n, attn.n_heads, 2 * dim))?;
            gate = Some(both.narrow(2, dim, dim)?.contiguous()?);
            q = both.narrow(2, 0, dim)?.contiguous()?.reshape((n, attn.n_heads * dim))?;
        }
        let q = shaped(q, Some(Role::QNorm(l)), attn.n_heads)?;
        let k = shaped(k, Some(Role::KNorm(l)), attn.n_kv_heads)?;
        Ok((q, k, shaped(v, None, attn.n_kv_heads)?, gate))
    }

    /// The norm of queries or keys, over each head or over all together.
    fn head_norm(&self, attn: &AttnSpec, x: Tensor, weight: Role) -> Result<Tensor, ModelError> {
        let (model, eps) = (self.model, self.model.spec().norm_eps);
        match attn.qk_norm {
            QkNorm::None => Ok(x),
            QkNorm::Whole | QkNorm::PerHead => ops::rms_norm(model.pool(), &x, model.vector(weight)?, eps),
            QkNorm::Unit => {
                let ones = vec![1.0; attn.head_dim];
                ops::rms_norm(model.pool(), &x, Vector::Stored(&ones), eps)
            }
        }
    }

    /// `x [N, heads, head_dim]` turned by the rows' positions.
    pub fn turned(&self, attn: &AttnSpec, x: &Tensor) -> Result<Tensor, ModelError> {
        let dim = attn.rope.dim;
        if dim == 0 {
            return Ok(x.clone());
        }
        let Some(mla) = &attn.mla else { return self.rotated(attn, x) };
        let still = x.narrow(2, 0, mla.nope_dim)?;
        let moving = x.narrow(2, mla.nope_dim, dim)?.contiguous()?;
        Ok(Tensor::cat(&[&still, &self.rotated(attn, &moving)?], 2)?.contiguous()?)
    }

    /// RoPE on the first coordinates of each head.
    pub fn rotated(&self, attn: &AttnSpec, x: &Tensor) -> Result<Tensor, ModelError> {
        let (pool, dim, turn) = (self.model.pool(), attn.rope.dim, &self.angles);
        match attn.rope.interleaved {
            true => ops::rope_interleaved(x, dim, turn),
            false => ops::rope(pool, x, dim, turn),
        }
    }

    pub fn append(
        &self,
        l: usize,
        widths: [usize; 2],
        k: &Tensor,
        v: &Tensor,
        cache: &mut KvCache,
    ) -> Result<(), ModelError> {
        let (k, v) = (values(k)?, values(v)?);
        for span in &self.rows.spans {
            let [of_k, of_v] = widths.map(|width| span.row0 * width..(span.row0 + span.len) * width);
            cache.append(span.slot, l, &k[of_k], &v[of_v]);
        }
        Ok(())
    }
}
