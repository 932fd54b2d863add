//! The experts' feed-forward networks over tokens grouped by expert.
//!
//! A slot is one choice of one token: slot `t * k + j` is token `t`'s choice `j`, and `ids[slot]`
//! the expert chosen, or [`NO_EXPERT`].

use std::mem::MaybeUninit;

use crate::math::Act;
use crate::pool::{Pool, SendPtr};
use crate::product::{Pack, Product, Work};
use crate::results::{fill, zeros};
use crate::rows::add_scaled;
use crate::scratch;
use crate::tile::Finish;
use crate::{KernelError, MatRef};

/// The id of an empty slot. Its rows of results are zero.
pub const NO_EXPERT: u32 = u32::MAX;

/// The weights of one expert.
#[derive(Clone, Copy, Debug)]
pub struct ExpertRef<'a> {
    /// `[I, d]`: what is activated.
    pub gate: MatRef<'a>,
    /// `[I, d]`: what the activation multiplies.
    pub up: MatRef<'a>,
    /// `[d, I]`: back to the width of the model.
    pub down: MatRef<'a>,
}

/// `hidden[s] = act(gate x[t]) * (up x[t])` for every slot `s` of token `t`, with the weights of
/// its expert: `x` is `[n, d]`, `ids` is `[n, k]`, `hidden` becomes `[n * k, width]`.
///
/// # Errors
/// [`KernelError::MissingExpert`] if an id names no expert, or one that is `None`. `hidden` is
/// untouched then.
///
/// # Panics
/// If a slice or matrix has not the length of its shape.
#[allow(clippy::too_many_arguments, reason = "kernels take plain arguments")]
pub fn expert_hidden(
    pool: &Pool,
    pack: Pack,
    experts: &[Option<ExpertRef<'_>>],
    x: &[f32],
    n: usize,
    k: usize,
    ids: &[u32],
    act: Act,
    width: usize,
    hidden: &mut Vec<f32>,
) -> Result<(), KernelError> {
    assert_eq!(ids.len(), n * k, "ids of {n} x {k} slots");
    each_slot(pool, pack, Side::Rows, experts, |e| (e.gate, Some(e.up)), x, k, ids, Finish::Gated(act), width, hidden)
}

/// `out[s] = down hidden[s]` for every slot `s`, with the weights of its expert: `hidden` is
/// `[n * k, I]`, `ids` is `[n, k]`, `out` becomes `[n * k, d]`.
///
/// # Errors
/// As for [`expert_hidden`].
///
/// # Panics
/// If a slice or matrix has not the length of its shape.
#[allow(clippy::too_many_arguments, reason = "kernels take plain arguments")]
pub fn expert_down(
    pool: &Pool,
    pack: Pack,
    experts: &[Option<ExpertRef<'_>>],
    hidden: &[f32],
    n: usize,
    k: usize,
    ids: &[u32],
    d: usize,
    out: &mut Vec<f32>,
) -> Result<(), KernelError> {
    assert_eq!(ids.len(), n * k, "ids of {n} x {k} slots");
    each_slot(pool, pack, Side::Rows, experts, |e| (e.down, None), hidden, 1, ids, Finish::Bias(None), d, out)
}

/// Whether a product is with matrices or with their transposes, through which gradients go back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// `w x`.
    Rows,
    /// The transpose of `w` times `x`.
    Columns,
}

/// `y[s] = w[ids[s]] x[s / per_row]`, or with the transpose, for every slot `s`; zero for empty slots. `y` becomes rows of `width`.
///
/// # Errors
/// As for [`expert_hidden`].
///
/// # Panics
/// If a slice or matrix has not the length of its shape.
#[allow(clippy::too_many_arguments, reason = "kernels take plain arguments")]
pub fn slot_products(
    pool: &Pool,
    side: Side,
    weights: &[Option<MatRef<'_>>],
    x: &[f32],
    per_row: usize,
    ids: &[u32],
    width: usize,
    y: &mut Vec<f32>,
) -> Result<(), KernelError> {
    let finish = Finish::Bias(None);
    each_slot(pool, Pack::Always, side, weights, |w| (*w, None), x, per_row, ids, finish, width, y)
}

/// `y[s] = finish(w x[s / per_row])` with the weights of each slot's expert, zero for empty slots.
#[allow(clippy::too_many_arguments, reason = "kernels take plain arguments")]
fn each_slot<'w, E: Sync>(
    pool: &Pool,
    pack: Pack,
    side: Side,
    experts: &[Option<E>],
    weights: impl Fn(&E) -> (MatRef<'w>, Option<MatRef<'w>>) + Sync,
    x: &[f32],
    per_row: usize,
    ids: &[u32],
    finish: Finish<'_>,
    rows: usize,
    y: &mut Vec<f32>,
) -> Result<(), KernelError> {
    let slots = ids.len();
    if slots == 0 {
        y.clear();
        return Ok(());
    }
    let cols = x.len() * per_row / slots;
    scratch::indices(experts.len() + 3 + slots, |buffer| {
        let (bounds, order) = buffer.split_at_mut(experts.len() + 3);
        sort_slots(experts, ids, bounds, order)?;
        // SAFETY: every slot is of one of the groups, or empty and zero; all groups have rows as long as there is room for.
        unsafe {
            fill(y, slots * rows, |y| {
                for &slot in &order[bounds[experts.len()] as usize..] {
                    zeros(&mut y[slot as usize * rows..][..rows]);
                }
                let y = SendPtr(y.as_mut_ptr().cast());
                let bounds = &bounds[..=experts.len()];
                let transposed = side == Side::Columns;
                Product { bounds, order: Some(order), slots, x, cols, per_row, pack, transposed }.run(pool, |e| {
                    let (w, other) = weights(experts[e].as_ref().expect("the sort found it"));
                    assert_eq!(if transposed { w.cols } else { w.rows }, rows, "rows of expert {e}");
                    Work { w, other, finish, y }
                });
            });
        }
        Ok(())
    })
}

/// Sorts the slots by expert, keeping their order within one: expert `e` gets
/// `order[bounds[e]..bounds[e + 1]]`, and the empty slots come last.
fn sort_slots<E>(experts: &[Option<E>], ids: &[u32], bounds: &mut [u32], order: &mut [u32]) -> Result<(), KernelError> {
    let group = |id: u32| if id == NO_EXPERT { experts.len() } else { id as usize };
    for (slot, &expert) in ids.iter().enumerate() {
        if expert != NO_EXPERT && !matches!(experts.get(expert as usize), Some(Some(_))) {
            return Err(KernelError::MissingExpert { expert, slot });
        }
        bounds[group(expert) + 2] += 1;
    }
    for g in 2..bounds.len() {
        bounds[g] += bounds[g - 1];
    }
    // Here `bounds[g + 1]` is where group `g` begins; it moves to where it ends.
    for (slot, &expert) in ids.iter().enumerate() {
        let end = &mut bounds[group(expert) + 1];
        order[*end as usize] = slot as u32;
        *end += 1;
    }
    Ok(())
}

/// `y[t] = sum over j of gates[t, j] slots[t, j]`, added in the order of `j`, without the empty
/// slots: `slots` is `[n * k, d]`, `gates` and `ids` are `[n, k]`, `y` becomes `[n, d]`.
///
/// # Panics
/// If a slice has not the length of its shape.
#[allow(clippy::too_many_arguments, reason = "kernels take plain arguments")]
pub fn combine(pool: &Pool, slots: &[f32], gates: &[f32], ids: &[u32], n: usize, k: usize, d: usize, y: &mut Vec<f32>) {
    assert_eq!(slots.len(), n * k * d, "rows of {n} x {k} slots, of {d}");
    assert_eq!((gates.len(), ids.len()), (n * k, n * k), "gates and ids of {n} x {k} slots");
    if n * d == 0 {
        return y.clear();
    }
    let rows = |y: &mut [MaybeUninit<f32>], start: usize| {
        for (i, y) in y.chunks_exact_mut(d).enumerate() {
            let (y, first) = (zeros(y), (start / d + i) * k);
            for s in (first..first + k).filter(|&s| ids[s] != NO_EXPERT) {
                add_scaled(pool.isa(), y, gates[s], &slots[s * d..][..d]);
            }
        }
    };
    // SAFETY: the shares are all of `y`, in whole rows.
    unsafe { fill(y, n * d, |y| pool.rows(y, d, k, rows)) }
}
