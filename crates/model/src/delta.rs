//! Linear attention by the gated delta rule (Qwen3-Next): a causal convolution, then a matrix state per value head that each
//! token decays, corrects and reads.

use candle_core::Tensor;
use quorate_formats::Role;
use quorate_formats::spec::{DeltaLayout, DeltaSpec};
use quorate_kernels as kernels;

use crate::cache::State;
use crate::forward::{Exit, Here, Pass};
use crate::ops::{self, values};
use crate::{KvCache, ModelError, Site};

/// What the projections give for every row.
struct Inputs {
    /// q, k, v before the convolution, `[N, 2 Nk dk + Nv dv]`.
    qkv: Vec<f32>,
    /// Gate of the output, `[N, Nv dv]`.
    z: Vec<f32>,
    /// Logit of the step size, `[N, Nv]`.
    b: Vec<f32>,
    /// Input of the decay, `[N, Nv]`.
    a: Vec<f32>,
}

/// The learned vectors of a layer.
struct Learned<'a> {
    conv: &'a [f32],
    a_log: &'a [f32],
    dt_bias: &'a [f32],
}

impl Pass<'_> {
    /// The block on its input `h [N, d]`. Sequences go token by token, since each changes the state that the next one reads.
    pub fn delta(&mut self, here: Here, spec: &DeltaSpec, h: &Tensor, cache: &mut KvCache) -> Result<Tensor, Exit> {
        if h.track_op() {
            return Err(ModelError::NoGradient { layer: here.layer, what: "linear attention" }.into());
        }
        let (model, l, n) = (self.model, here.layer, self.rows.len());
        let inputs = self.delta_inputs(l, spec, h)?;
        let weights = model.weights();
        let learned = Learned {
            conv: weights.vector(Role::DeltaConv(l))?,
            a_log: weights.vector(Role::DeltaALog(l))?,
            dt_bias: weights.vector(Role::DeltaDtBias(l))?,
        };
        let width = spec.n_value_heads * spec.value_dim;
        let mut out = vec![0.0; n * width];
        for span in &self.rows.spans {
            let mut state = cache.state(span.slot, l).clone();
            for row in span.row0..span.row0 + span.len {
                step(spec, &learned, &inputs, row, &mut state, &mut out[row * width..(row + 1) * width]);
            }
            cache.set_next_state(span.slot, l, state);
        }
        let norm = model.vector(Role::DeltaNorm(l))?;
        let normed = ops::rms_norm(
            model.pool(),
            &ops::tensor(out, &[n * spec.n_value_heads, spec.value_dim])?,
            norm,
            model.spec().norm_eps,
        )?;
        let silu = |z: f32| z / (1.0 + (-z).exp());
        let z: Vec<f32> = values(&normed)?.iter().zip(&inputs.z).map(|(o, z)| o * silu(*z)).collect();
        let z = self.visit(here, Site::Z, ops::tensor(z, &[n, spec.n_value_heads, spec.value_dim])?, None)?;
        let z = z.reshape((n, width))?;
        Ok(ops::linear(model.pool(), self.pack, &z, &model.matrix(Role::DeltaOut(l))?, None)?)
    }

    fn delta_inputs(&self, l: usize, spec: &DeltaSpec, h: &Tensor) -> Result<Inputs, ModelError> {
        let project = |role: Role| -> Result<Vec<f32>, ModelError> {
            let y = ops::linear(self.model.pool(), self.pack, h, &self.model.matrix(role)?, None)?;
            Ok(values(&y)?.to_vec())
        };
        if spec.layout != DeltaLayout::Grouped {
            let (qkv, z) = (project(Role::DeltaQkv(l))?, project(Role::DeltaZ(l))?);
            return Ok(Inputs { qkv, z, b: project(Role::DeltaBa(l))?, a: project(Role::DeltaA(l))? });
        }
        let (qkvz, ba) = (project(Role::DeltaQkv(l))?, project(Role::DeltaBa(l))?);
        Ok(ungroup(spec, self.rows.len(), &qkvz, &ba))
    }
}

/// From projections grouped by key head (q, k, values, gates; and steps, decays) to all q, all k, all v.
fn ungroup(spec: &DeltaSpec, n: usize, qkvz: &[f32], ba: &[f32]) -> Inputs {
    let (dk, each) = (spec.key_dim, spec.n_value_heads / spec.n_key_heads);
    let (keys, values) = (spec.n_key_heads * dk, spec.n_value_heads * spec.value_dim);
    let (dv, group) = (each * spec.value_dim, 2 * dk + 2 * each * spec.value_dim);
    let mut inputs = Inputs { qkv: vec![0.0; n * (2 * keys + values)], z: Vec::new(), b: Vec::new(), a: Vec::new() };
    let rows = qkvz.chunks_exact(keys * 2 + values * 2).zip(ba.chunks_exact(2 * spec.n_value_heads));
    for (out, (row, ba)) in inputs.qkv.chunks_exact_mut(2 * keys + values).zip(rows) {
        for (g, part) in row.chunks_exact(group).enumerate() {
            out[g * dk..(g + 1) * dk].copy_from_slice(&part[..dk]);
            out[keys + g * dk..keys + (g + 1) * dk].copy_from_slice(&part[dk..2 * dk]);
            out[2 * keys + g * dv..2 * keys + (g + 1) * dv].copy_from_slice(&part[2 * dk..2 * dk + dv]);
            inputs.z.extend_from_slice(&part[2 * dk + dv..]);
        }
        for part in ba.chunks_exact(2 * each) {
            inputs.b.extend_from_slice(&part[..each]);
            inputs.a.extend_from_slice(&part[each..]);
        }
    }
    inputs
}

/// One token: `S *= exp(g); S += k (beta (v - S^T k))^T; o = S^T q`, for every value head.
fn step(spec: &DeltaSpec, learned: &Learned<'_>, inputs: &Inputs, row: usize, state: &mut State, out: &mut [f32]) {
    let (dk, dv, heads) = (spec.key_dim, spec.value_dim, spec.n_value_heads);
    let keys = spec.n_key_heads * dk;
    let channels = 2 * keys + heads * dv;
    let mut mixed = convolved(spec, learned.conv, &inputs.qkv[row * channels..(row + 1) * channels], state);
    let (queries_keys, values) = mixed.split_at_mut(2 * keys);
    queries_keys.chunks_exact_mut(dk).for_each(unit);
    let (queries, key_vectors) = queries_keys.split_at(keys);
    if state.matrices.is_empty() {
        state.matrices = vec![0.0; heads * dk * dv];
    }
    let scale = (dk as f32).powf(-0.5);
    for (h, o) in out.chunks_exact_mut(dv).enumerate() {
        let of_key =
            dk * if spec.layout == DeltaLayout::Tiled { h % spec.n_key_heads } else { h / (heads / spec.n_key_heads) };
        let (q, k) = (&queries[of_key..of_key + dk], &key_vectors[of_key..of_key + dk]);
        let s = &mut state.matrices[h * dk * dv..(h + 1) * dk * dv];
        let at = row * heads + h;
        let beta = 1.0 / (1.0 + (-inputs.b[at]).exp());
        let g = -learned.a_log[h].exp() * softplus(inputs.a[at] + learned.dt_bias[h]);
        let decay = g.exp();
        s.iter_mut().for_each(|s| *s *= decay);
        let mut u = values[h * dv..(h + 1) * dv].to_vec();
        for (s, k) in s.chunks_exact(dv).zip(k) {
            u.iter_mut().zip(s).for_each(|(u, s)| *u -= k * s);
        }
        u.iter_mut().for_each(|u| *u *= beta);
        for ((s, k), q) in s.chunks_exact_mut(dv).zip(k).zip(q) {
            for ((s, u), o) in s.iter_mut().zip(&u).zip(o.iter_mut()) {
                *s += k * u;
                *o += scale * q * *s;
            }
        }
    }
}

/// The causal convolution over the last positions, channel by channel, then SiLU; the window moves on.
fn convolved(spec: &DeltaSpec, conv: &[f32], new: &[f32], state: &mut State) -> Vec<f32> {
    let (channels, kernel) = (new.len(), spec.conv_kernel);
    if state.window.is_empty() {
        state.window = vec![0.0; (kernel - 1) * channels];
    }
    let mut y = Vec::with_capacity(channels);
    for (c, (weights, new_value)) in conv.chunks_exact(kernel).zip(new).enumerate() {
        let old = (0..kernel - 1).map(|t| weights[t] * state.window[t * channels + c]).sum::<f32>();
        let x = old + weights[kernel - 1] * new_value;
        y.push(x / (1.0 + (-x).exp()));
    }
    state.window.drain(..channels.min(state.window.len()));
    if kernel > 1 {
        state.window.extend_from_slice(new);
    }
    y
}

/// `x / sqrt(sum x^2 + 1e-6)`.
fn unit(x: &mut [f32]) {
    let r = 1.0 / (kernels::norm_sq(x) + 1e-6).sqrt();
    x.iter_mut().for_each(|x| *x *= r);
}

fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Value heads in tiled order, with all that belongs to them, give the same outputs in that order.
    #[test]
    fn tiled_heads_are_the_split_ones_in_another_order() {
        let (nk, nv, dk, dv, kernel) = (2, 6, 3, 2, 4);
        let spec = |layout| DeltaSpec {
            n_key_heads: nk,
            n_value_heads: nv,
            key_dim: dk,
            value_dim: dv,
            conv_kernel: kernel,
            layout,
        };
        let noise = |seed: usize, n: usize| {
            (0..n).map(|i| ((i * 37 + seed * 101) % 97) as f32 / 48.0 - 1.0).collect::<Vec<f32>>()
        };
        // Tiled head `t` is head `t % nk * (nv / nk) + t / nk` of the original.
        let heads: Vec<usize> = (0..nv).map(|t| t % nk * (nv / nk) + t / nk).collect();
        let turned = |x: &[f32], width: usize| -> Vec<f32> {
            heads.iter().flat_map(|&h| x[h * width..(h + 1) * width].iter().copied()).collect()
        };
        let keys = 2 * nk * dk;
        let values_turned = |x: &[f32], width: usize| {
            let (keys, values) = x.split_at(keys * width);
            [keys, &turned(values, dv * width)].concat()
        };
        let (conv, a_log, dt_bias) = (noise(1, (keys + nv * dv) * kernel), noise(2, nv), noise(3, nv));
        let mut states = [State::default(), State::default()];
        for token in 0..5 {
            let inputs = Inputs {
                qkv: noise(10 + token, keys + nv * dv),
                z: Vec::new(),
                b: noise(20 + token, nv),
                a: noise(30 + token, nv),
            };
            let tiled = Inputs {
                qkv: values_turned(&inputs.qkv, 1),
                z: Vec::new(),
                b: turned(&inputs.b, 1),
                a: turned(&inputs.a, 1),
            };
            let mut out = [vec![0.0; nv * dv], vec![0.0; nv * dv]];
            let learned = Learned { conv: &conv, a_log: &a_log, dt_bias: &dt_bias };
            step(&spec(DeltaLayout::Split), &learned, &inputs, 0, &mut states[0], &mut out[0]);
            let (conv, a_log, dt_bias) = (values_turned(&conv, kernel), turned(&a_log, 1), turned(&dt_bias, 1));
            let learned = Learned { conv: &conv, a_log: &a_log, dt_bias: &dt_bias };
            step(&spec(DeltaLayout::Tiled), &learned, &tiled, 0, &mut states[1], &mut out[1]);
            assert_eq!(turned(&out[0], dv), out[1]);
            assert_ne!(out[0], out[1]);
        }
    }
}
