//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 §2.1): keys and values follow from one latent vector of each
//! token, `c = norm(W_a h)`, per head `[k | v] = W_b c`, and one rotated key `r` for all heads.
//!
//! A query meets a key as `q . W_k c + q_r . r = (W_k^T q) . c + q_r . r`, and a sum of values is `W_v` of the sum of
//! latent vectors. So attention is that of a single head of keys `[c | r]`, which are its values too, and the cache keeps
//! just these. Keys and values themselves are made only where someone wants them: a lens on their sites, a gradient, an
//! overlay on `W_b`.

use candle_core::Tensor;
use quorate_formats::Role;
use quorate_formats::spec::{AttnSpec, MlaSpec};
use quorate_kernels::{self as kernels, MatRef};

use crate::forward::{Exit, Here, Pass};
use crate::ops::{self, tensor, values};
use crate::{KvCache, ModelError, Site};

/// Epsilon of the norms of latent vectors, whatever the model's own.
const LATENT_EPS: f32 = 1e-6;

impl<'a> Pass<'a> {
    /// `W_b`, if this pass can do without keys and values.
    pub fn stays_latent(&self, here: Here, h: &Tensor, cache: &KvCache) -> Result<Option<MatRef<'a>>, ModelError> {
        let watched = [Site::AttnK, Site::AttnV, Site::AttnKRot].iter().any(|&site| here.sites.contains(site));
        if watched || h.track_op() || !self.rows.spans.iter().all(|span| cache.is_latent(span.slot, here.layer)) {
            return Ok(None);
        }
        Ok(self.model.matrix(Role::KvB(here.layer))?.stored().map(|matrix| matrix.as_ref()))
    }

    /// Attention on latent vectors.
    pub fn latent_attention(
        &mut self,
        here: Here,
        attn: &AttnSpec,
        mla: &MlaSpec,
        unfolding: MatRef<'_>,
        h: &Tensor,
        cache: &mut KvCache,
    ) -> Result<Tensor, Exit> {
        let (l, n, rank) = (here.layer, self.rows.len(), mla.kv_lora_rank);
        let (q, c, shared) = self.latents(l, attn, mla, h)?;
        let q = self.visit(here, Site::AttnQ, q, None)?;
        let q = self.turned(attn, &q)?;
        let q = self.visit(here, Site::AttnQRot, q, None)?;
        let shared = self.rotated(attn, &shared)?;
        let rows = Tensor::cat(&[&c.reshape((n, 1, rank))?, &shared], 2)?.contiguous()?;
        let width = rank + attn.rope.dim;
        let none = tensor(Vec::new(), &[n, 1, 0])?;
        self.append(l, [width, 0], &rows, &none, cache)?;

        let still = self.per_head(unfolding, mla, &q.narrow(2, 0, mla.nope_dim)?, Part::Keys)?;
        let moving = q.narrow(2, mla.nope_dim, attn.rope.dim)?;
        let q = Tensor::cat(&[&still, &moving], 2)?.contiguous()?;
        let one_head = AttnSpec { n_kv_heads: 1, head_dim: width, mla: None, ..attn.clone() };
        let z = self.weighted(here, &one_head, [&q, &rows, &rows], cache)?;
        let z = self.per_head(unfolding, mla, &z.narrow(2, 0, rank)?, Part::Values)?;
        self.gathered(here, attn, z)
    }

    /// Queries `[N, H, head_dim]` before RoPE, latent vectors `[N, rank]`, and shared keys `[N, 1, rope.dim]` before RoPE.
    pub fn latents(
        &self,
        l: usize,
        attn: &AttnSpec,
        mla: &MlaSpec,
        h: &Tensor,
    ) -> Result<(Tensor, Tensor, Tensor), ModelError> {
        let (model, n, rope) = (self.model, self.rows.len(), attn.rope.dim);
        let product = |x: &Tensor, w: Role| ops::linear(model.pool(), self.pack, x, &model.matrix(w)?, None);
        let latent_norm = |x: &Tensor, w: Role| ops::rms_norm(model.pool(), x, model.vector(w)?, LATENT_EPS);
        let q = match mla.q_lora_rank {
            Some(_) => product(&latent_norm(&product(h, Role::QA(l))?, Role::QANorm(l))?, Role::Q(l))?,
            None => product(h, Role::Q(l))?,
        };
        let q = q.reshape((n, attn.n_heads, attn.head_dim))?;
        let both = product(h, Role::KvA(l))?;
        let c = latent_norm(&both.narrow(1, 0, mla.kv_lora_rank)?.contiguous()?, Role::KvANorm(l))?;
        let shared = both.narrow(1, mla.kv_lora_rank, rope)?.contiguous()?.reshape((n, 1, rope))?;
        Ok((q, c, shared))
    }

    /// Keys `[N, H, head_dim]` and values `[N, H, v_head_dim]` of latent vectors and shared keys.
    pub fn unfolded(
        &self,
        l: usize,
        attn: &AttnSpec,
        mla: &MlaSpec,
        c: &Tensor,
        shared: &Tensor,
    ) -> Result<(Tensor, Tensor), ModelError> {
        let (n, heads) = (c.dim(0)?, attn.n_heads);
        let kv = ops::linear(self.model.pool(), self.pack, c, &self.model.matrix(Role::KvB(l))?, None)?;
        let kv = kv.reshape((n, heads, mla.nope_dim + mla.v_head_dim))?;
        let shared = shared.broadcast_as((n, heads, attn.rope.dim))?;
        let k = Tensor::cat(&[&kv.narrow(2, 0, mla.nope_dim)?, &shared], 2)?;
        let v = kv.narrow(2, mla.nope_dim, mla.v_head_dim)?;
        Ok((k.contiguous()?, v.contiguous()?))
    }

    /// Makes keys and values of all latent vectors that the cache holds of this pass's sequences.
    pub fn keep_in_full(
        &self,
        l: usize,
        attn: &AttnSpec,
        mla: &MlaSpec,
        cache: &mut KvCache,
    ) -> Result<(), ModelError> {
        let width = mla.kv_lora_rank + attn.rope.dim;
        for span in self.rows.spans.iter().filter(|span| cache.is_latent(span.slot, l)).copied().collect::<Vec<_>>() {
            // Shared keys in the cache are rotated already.
            let mut held = cache.layer(span.slot, l).0.values();
            held.truncate(span.pos0 * width);
            if span.pos0 == 0 {
                cache.keep_in_full(span.slot, l, &[], &[]);
                continue;
            }
            let rows = tensor(held, &[span.pos0, width])?;
            let c = rows.narrow(1, 0, mla.kv_lora_rank)?.contiguous()?;
            let shared = rows.narrow(1, mla.kv_lora_rank, attn.rope.dim)?.contiguous()?;
            let (k, v) = self.unfolded(l, attn, mla, &c, &shared.reshape((span.pos0, 1, attn.rope.dim))?)?;
            cache.keep_in_full(span.slot, l, &values(&k)?, &values(&v)?);
        }
        Ok(())
    }

    /// Each head's part of `W_b` on its own rows: `W_k^T q`, `[N, H, rank]`, or `W_v z`, `[N, H, v_head_dim]`.
    fn per_head(&self, matrix: MatRef<'_>, mla: &MlaSpec, x: &Tensor, part: Part) -> Result<Tensor, ModelError> {
        let (n, heads, inner) = x.dims3()?;
        let (first, count, outer) = match part {
            Part::Keys => (0, mla.nope_dim, mla.kv_lora_rank),
            Part::Values => (mla.nope_dim, mla.v_head_dim, mla.v_head_dim),
        };
        let row = matrix.data.len() / matrix.rows;
        // Head by head: [H, N, inner] to [H, N, outer].
        let x = x.transpose(0, 1)?.contiguous()?;
        let (x, mut y, mut one) = (values(&x)?, Vec::with_capacity(heads * n * outer), Vec::new());
        for (h, x) in x.chunks_exact(n * inner).enumerate() {
            let start = h * (mla.nope_dim + mla.v_head_dim) + first;
            let data = &matrix.data[start * row..(start + count) * row];
            let w = MatRef::new(matrix.dtype, count, matrix.cols, data)?;
            match part {
                Part::Keys => kernels::matmul_transposed(self.model.pool(), w, x, n, &mut one),
                Part::Values => kernels::matmul(self.model.pool(), self.pack, w, x, n, None, &mut one),
            }
            y.extend_from_slice(&one);
        }
        Ok(tensor(y, &[heads, n, outer])?.transpose(0, 1)?.contiguous()?)
    }
}

/// Rows of a head in `W_b`.
#[derive(Clone, Copy)]
enum Part {
    Keys,
    Values,
}
