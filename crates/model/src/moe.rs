//! The block of routed experts in a pass: router, choice, experts in memory or as they are read, gated sum.

use candle_core::Tensor;
use quorate_formats::Role;
use quorate_formats::spec::{MoeSpec, NormPlacement};
use quorate_kernels::NO_EXPERT;
use quorate_residency::{ExpertCache, Lease};

use crate::ffn::{self, Experts};
use crate::forward::{Exit, Here, Pass};
use crate::ops::{self, values};
use crate::routing::{Keep, route};
use crate::{At, Flow, ModelError, Routing, Site};

impl Pass<'_> {
    /// The experts' block on `x [N, d]`; `residual` is the stream that `x` was made of.
    pub fn moe(&mut self, here: Here, moe: &MoeSpec, residual: &Tensor, x: &Tensor) -> Result<Tensor, Exit> {
        let (model, l, n) = (self.model, here.layer, self.rows.len());
        let logits = self.router_logits(l, moe, x)?;
        let logits = self.visit(here, Site::RouterLogits, logits, None)?;
        let mut selection = None;
        if here.sites.contains(Site::Selection) {
            let zeros = ops::tensor(vec![0.0; n * moe.n_experts], &[n, moe.n_experts])?;
            selection = Some(self.visit(here, Site::Selection, zeros, None)?);
        }
        let selection = selection.as_ref().map(values).transpose()?;
        let keep = model.kept(l).map(|kept| Keep { kept, mode: model.routing_mode() });
        let mut routing = route(moe, l, &logits, model.learned(l, moe)?, selection.as_deref(), keep)?;
        if here.sites.contains(Site::Routing) {
            let at = At { site: Site::Routing, layer: l, rows: self.rows, routing: None };
            let flow = self.lens.routing(&at, &mut routing)?;
            check_routing(&routing, l, n, moe)?;
            if flow == Flow::Stop {
                return Err(Exit::Stop);
            }
        }
        let out = self.experts(here, moe, residual, x, &routing)?;
        let Some(shared) = &moe.shared else { return Ok(out) };
        let roles = [Role::SharedGate(l), Role::SharedUp(l), Role::SharedDown(l)];
        let mut always = self.dense(here, roles, moe.act, x)?;
        if shared.gated {
            let gate = ops::linear(model.pool(), self.pack, x, &model.matrix(Role::SharedExpertGate(l))?, None)?;
            always = ops::sigmoid_gated(&always, &gate)?;
        }
        Ok(ops::add(model.pool(), &out, &always)?)
    }

    /// What the router of layer `l` says to `x [N, d]`, `[N, E]`.
    fn router_logits(&self, l: usize, moe: &MoeSpec, x: &Tensor) -> Result<Tensor, ModelError> {
        let model = self.model;
        let bias = if moe.router.extra.bias { Some(model.vector(Role::RouterBias(l))?) } else { None };
        ops::linear(model.pool(), self.pack, x, &model.matrix(Role::Router(l))?, bias)
    }

    /// The chosen experts on `x [N, d]`, gated and summed, `[N, d]`.
    fn experts(
        &mut self,
        here: Here,
        moe: &MoeSpec,
        residual: &Tensor,
        x: &Tensor,
        routing: &Routing,
    ) -> Result<Tensor, Exit> {
        let pool = self.model.pool();
        let on_input = moe.router.extra.gate_on_input;
        let watched = here.sites.contains(Site::ExpertHidden) || here.sites.contains(Site::ExpertOut);
        let whole = self.rows.len() == 1 && !watched && !on_input && self.model.weights().stream().is_none();
        let at_once = if whole { ffn::expert_ffn(self.model, here.layer, moe, x, routing)? } else { None };
        if let Some(sum) = at_once {
            return self.visit(here, Site::MoeOut, sum, Some(routing));
        }
        // With gates on the inputs, each slot has an input of its own.
        let gated = if on_input { Some(gated_inputs(x, routing)?) } else { None };
        let block = match &gated {
            Some(x) => Block { moe, x, k: 1, routing },
            None => Block { moe, x, k: routing.k, routing },
        };
        let slots = match self.model.weights().stream() {
            Some(cache) => self.streamed(here, &block, cache, residual)?,
            None => self.loaded(here, &block)?,
        };
        let slots = self.visit(here, Site::ExpertOut, slots, Some(routing))?;
        let sum = match on_input {
            true => ffn::combine(pool, &slots, &Routing { gates: routing.gates.ones_like()?, ..routing.clone() })?,
            false => ffn::combine(pool, &slots, routing)?,
        };
        self.visit(here, Site::MoeOut, sum, Some(routing))
    }

    /// The slots' outputs `[N, k, d]`, of experts that are all in memory.
    fn loaded(&mut self, here: Here, block: &Block<'_>) -> Result<Tensor, Exit> {
        let (model, l, ids) = (self.model, here.layer, &block.routing.ids);
        let experts = Experts::loaded(model, l, block.moe.n_experts, ids);
        if let Some(&id) = ids.iter().find(|&&id| id != NO_EXPERT && !experts.has(id)) {
            return Err(ModelError::ExpertNotLoaded { layer: l, expert: id }.into());
        }
        let hidden = self.hidden(block, &experts, block.x, (block.k, ids))?.reshape(block.shape()?)?;
        let hidden = self.visit(here, Site::ExpertHidden, hidden, Some(block.routing))?;
        Ok(ffn::expert_down(model.pool(), self.pack, &experts, model.spec().hidden_size, &hidden, ids)?)
    }

    /// The same of experts that are computed as they come from the disk. An expert computes all its slots at once, as if
    /// it had been in memory, so that the values are the same.
    fn streamed(
        &mut self,
        here: Here,
        block: &Block<'_>,
        cache: &ExpertCache,
        residual: &Tensor,
    ) -> Result<Tensor, Exit> {
        let (l, d) = (here.layer, self.model.spec().hidden_size);
        let (n, k, width) = block.shape()?;
        let slots_of = block.slots_of();
        let wanted: Vec<(usize, usize)> =
            slots_of.iter().enumerate().filter(|(_, s)| !s.is_empty()).map(|(e, s)| (e, s.len())).collect();
        let mut visit = cache.visit(l, &wanted, n);
        self.read_ahead(cache, l, residual)?;
        untracked(l, block.x)?;
        let mut out = vec![0.0; n * k * d];
        if !here.sites.contains(Site::ExpertHidden) {
            while let Some(lease) = visit.more()? {
                let part = Part::of(self.model, l, block, &slots_of, &lease);
                let hidden = self.part_hidden(block, &part)?;
                self.part_down(&part, &hidden, &mut out)?;
            }
            return Ok(ops::tensor(out, &[n, k, d])?);
        }
        let mut hidden = vec![0.0; n * k * width];
        while let Some(lease) = visit.more()? {
            let part = Part::of(self.model, l, block, &slots_of, &lease);
            part.put(&self.part_hidden(block, &part)?, &mut hidden)?;
        }
        drop(visit);
        let hidden = self.visit(here, Site::ExpertHidden, ops::tensor(hidden, &[n, k, width])?, Some(block.routing))?;
        untracked(l, &hidden)?;
        let hidden = hidden.reshape((n * k, width))?;
        // The lens has seen all at once, so the experts are needed again.
        let mut visit = cache.visit(l, &wanted, n);
        while let Some(lease) = visit.more()? {
            let part = Part::of(self.model, l, block, &slots_of, &lease);
            self.part_down(&part, &ops::pick_rows(&hidden, &part.slots)?, &mut out)?;
        }
        Ok(ops::tensor(out, &[n, k, d])?)
    }

    /// Inner activations of slots `(k, ids)` of `x`.
    fn hidden(
        &self,
        block: &Block<'_>,
        experts: &Experts<'_>,
        x: &Tensor,
        slots: (usize, &[u32]),
    ) -> Result<Tensor, ModelError> {
        let moe = block.moe;
        ffn::expert_hidden(self.model.pool(), self.pack, experts, moe.act, moe.intermediate_size, x, slots)
    }

    /// Inner activations of a part's slots, `[m, I]`.
    fn part_hidden(&self, block: &Block<'_>, part: &Part<'_>) -> Result<Tensor, ModelError> {
        let width = block.moe.intermediate_size;
        let hidden = if part.slots.len() == block.routing.ids.len() {
            // All in one part, in their own order.
            self.hidden(block, &part.experts, block.x, (block.k, &part.ids))?
        } else {
            let rows: Vec<usize> = part.slots.iter().map(|s| s / block.k).collect();
            self.hidden(block, &part.experts, &ops::pick_rows(block.x, &rows)?, (1, &part.ids))?
        };
        Ok(hidden.reshape((part.slots.len(), width))?)
    }

    /// Outputs of a part's slots, put where they belong.
    fn part_down(&self, part: &Part<'_>, hidden: &Tensor, out: &mut [f32]) -> Result<(), ModelError> {
        let (m, width) = hidden.dims2()?;
        let (model, d) = (self.model, self.model.spec().hidden_size);
        let hidden = hidden.reshape((m, 1, width))?;
        part.put(&ffn::expert_down(model.pool(), self.pack, &part.experts, d, &hidden, &part.ids)?, out)
    }

    /// Tells the cache what the next layer with experts is likely to want: what its router says to the residual stream
    /// as it is now, before this layer's experts have added to it.
    fn read_ahead(&self, cache: &ExpertCache, layer: usize, residual: &Tensor) -> Result<(), ModelError> {
        let (model, spec) = (self.model, self.model.spec());
        let next = (layer + 1..spec.layers.len()).find_map(|l| Some((l, spec.moe(l)?)));
        let Some((l, moe)) = next.filter(|_| cache.reads_ahead()) else { return Ok(()) };
        let x = residual.detach();
        let before = spec.layers[l].norms != NormPlacement::After;
        let h = if before { model.norm(&x, Role::FfnNorm(l), Role::FfnNormBias(l))? } else { x };
        let logits = self.router_logits(l, moe, &h)?;
        // Logits that cannot be routed are an error when they are the real ones.
        let Ok(routing) = route(moe, l, &logits, model.learned(l, moe)?, None, None) else { return Ok(()) };
        let mut uses = vec![0usize; moe.n_experts];
        routing.ids.iter().filter(|&&id| id != NO_EXPERT).for_each(|&id| uses[id as usize] += 1);
        let mut likely: Vec<usize> = (0..uses.len()).filter(|&e| uses[e] > 0).collect();
        likely.sort_by_key(|&e| std::cmp::Reverse(uses[e]));
        cache.expect(l, &likely);
        Ok(())
    }
}

/// What the experts of one layer are to compute.
struct Block<'a> {
    moe: &'a MoeSpec,
    /// Inputs, of `k` slots each.
    x: &'a Tensor,
    k: usize,
    routing: &'a Routing,
}

impl Block<'_> {
    /// `(N, k, I)`, the shape of the inner activations.
    fn shape(&self) -> Result<(usize, usize, usize), ModelError> {
        let k = self.routing.k;
        Ok((self.routing.gates.dim(0)?, k, self.moe.intermediate_size))
    }

    /// The slots of each expert.
    fn slots_of(&self) -> Vec<Vec<usize>> {
        let mut slots_of = vec![Vec::new(); self.moe.n_experts];
        for (slot, &id) in self.routing.ids.iter().enumerate().filter(|(_, id)| **id != NO_EXPERT) {
            slots_of[id as usize].push(slot);
        }
        slots_of
    }
}

/// Some experts of a layer with their slots.
struct Part<'a> {
    experts: Experts<'a>,
    /// Ascending.
    slots: Vec<usize>,
    ids: Vec<u32>,
}

impl<'a> Part<'a> {
    fn of(
        model: &'a crate::Model,
        layer: usize,
        block: &Block<'_>,
        slots_of: &[Vec<usize>],
        lease: &'a Lease<'_>,
    ) -> Part<'a> {
        let mut slots: Vec<usize> = lease.experts().flat_map(|(e, _)| slots_of[e].iter().copied()).collect();
        slots.sort_unstable();
        let ids = slots.iter().map(|&s| block.routing.ids[s]).collect();
        Part { experts: Experts::leased(model, layer, block.moe.n_experts, lease), slots, ids }
    }

    /// Puts this part's rows where they belong among all slots.
    fn put(&self, rows: &Tensor, all: &mut [f32]) -> Result<(), ModelError> {
        let rows = values(rows)?;
        let width = rows.len() / self.slots.len().max(1);
        for (row, &slot) in rows.chunks_exact(width.max(1)).zip(&self.slots) {
            all[slot * width..][..width].copy_from_slice(row);
        }
        Ok(())
    }
}

/// The way back would need every expert of the pass in memory.
fn untracked(layer: usize, x: &Tensor) -> Result<(), ModelError> {
    match x.track_op() {
        true => Err(ModelError::NoGradient { layer, what: "experts that are streamed" }),
        false => Ok(()),
    }
}

/// `gate x` for each slot of each token, `[N k, d]`.
fn gated_inputs(x: &Tensor, routing: &Routing) -> Result<Tensor, ModelError> {
    let (n, d) = x.dims2()?;
    Ok(x.unsqueeze(1)?.broadcast_mul(&routing.gates.unsqueeze(2)?)?.reshape((n * routing.k, d))?.contiguous()?)
}

fn check_routing(routing: &Routing, layer: usize, n: usize, moe: &MoeSpec) -> Result<(), ModelError> {
    let (slots, ids, gates) = (n * routing.k, routing.ids.len(), routing.gates.elem_count());
    let bad_id = routing.ids.iter().copied().find(|&id| id != NO_EXPERT && id as usize >= moe.n_experts);
    if ids != slots || gates != slots || bad_id.is_some() {
        return Err(ModelError::LensRouting { layer, slots, ids, gates, bad_id });
    }
    Ok(())
}
