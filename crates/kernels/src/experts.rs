//! The experts' feed-forward networks over tokens grouped by expert.
//!
//! A slot is one choice of one token: slot `t * k + j` is token `t`'s choice `j`, and `ids[slot]`
//! the expert chosen, or [`NO_EXPERT`].

use std::mem::MaybeUninit;

use crate::math::Act;
use crate::pool::{Part, Pool, Progress, SendPtr};
use crate::product::{PLAIN_ROWS, Pack, Product, RoundedRows, Work, as_rows, plain_products};
use crate::quant::{CHUNK, Piece, Rounding, round_row, rounding};
use crate::results::{fill, zeros};
use crate::rows::add_scaled;
use crate::scratch;
use crate::simd::Isa;
use crate::tile::{DOT_TOKENS, Finish};
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

/// One token through its experts at once: `y = sum over j of gates[j] down_j (act(gate_j x) * (up_j x))`, where `x` and `y` have `d`
/// values. It gives what [`expert_hidden`], [`expert_down`] and [`combine`] give one after another, to the bit, but nobody
/// waits in between: an expert's inner activations are rounded by who computed the last of them, and rows of the sum are a thread's
/// own.
///
/// # Panics
/// If the experts differ in shape, or a slice has not the length of its shape.
pub fn expert_ffn(pool: &Pool, experts: &[ExpertRef<'_>], gates: &[f32], x: &[f32], act: Act, y: &mut Vec<f32>) {
    let (k, d, width) = (experts.len(), x.len(), experts.first().map_or(0, |e| e.gate.rows));
    assert_eq!(gates.len(), k, "gates of {k} experts");
    if k * width * d == 0 {
        // SAFETY: zeros are written everywhere.
        return unsafe {
            fill(y, d, |y| {
                zeros(y);
            })
        };
    }
    let mut how = None::<Rounding>;
    for down in experts.iter().map(|e| e.down) {
        assert_eq!((down.rows, down.cols), (d, width), "shape of the weights");
        down.row_bytes();
        if down.dtype.is_quantized() {
            let this = rounding(down.dtype, false);
            how = Some(how.map_or(this, |other| other.and(this)));
        }
    }
    let isa = pool.isa();
    let (each, tiles) = (how.map_or(0, |_| width.div_ceil(CHUNK)), width.div_ceil(isa.tile_rows()));
    let done: Vec<Progress> = (0..k).map(|_| Progress::none()).collect();
    // Each expert is a group of one slot.
    scratch::indices(2 * k + 1, |numbers| {
        numbers.iter_mut().enumerate().for_each(|(i, number)| *number = (i % (k + 1)) as u32);
        let (bounds, order) = numbers.split_at(k + 1);
        let product = Product {
            bounds,
            order: Some(order),
            slots: k,
            x,
            cols: d,
            per_row: k,
            pack: Pack::BySize,
            transposed: false,
        };
        scratch::shared(k * width, |hidden| {
            let hidden = SendPtr(hidden.as_mut_ptr());
            let work = |j: usize| {
                let ExpertRef { gate, up, .. } = experts[j];
                assert_eq!(gate.rows, width, "rows of expert {j}");
                Work { w: gate, other: Some(up), finish: Finish::Gated(act), y: hidden }
            };
            let cost = product.cost(isa, work);
            let inputs = product.rounded_len(cost.rounded);
            scratch::rounded(inputs + k * each, |chunks| {
                let (inputs, chunks) = chunks.split_at_mut(inputs);
                let inputs = product.round(pool, cost.rounded, inputs);
                let rounded = SendPtr(chunks.as_mut_ptr());
                let gated = |part: Part| {
                    let _unless = Progress::unless_panicking(&done);
                    let round = |j: usize| {
                        let Some(how) = how else { return };
                        // SAFETY: the set was detected; all of the expert's activations are there, and nobody else rounds them.
                        unsafe { round_row(isa, hidden.get().add(j * width), width, how, rounded.get().add(j * each)) }
                    };
                    let advance = |j: usize, cells: usize| done[j].add(cells, tiles, || round(j));
                    // SAFETY: each expert has one slot of its own; `cost` and `inputs` are of this product.
                    unsafe { product.part(isa, &cost, part, work, inputs, advance) }
                };
                let down =
                    Down { experts, gates, done: &done, hidden, rounded: RoundedRows(rounded.get()), width, each };
                let sums = |y: &mut [MaybeUninit<f32>]| {
                    let y = SendPtr(y.as_mut_ptr().cast());
                    pool.run_stages([cost.operations, k * d * width], |stage, part| match stage {
                        0 => gated(part),
                        // SAFETY: lengths were checked, and the rows of different parts do not overlap.
                        _ => unsafe { down.part(isa, part, d, y) },
                    });
                };
                // SAFETY: the parts have all rows.
                unsafe { fill(y, d, sums) }
            });
        });
    });
}

/// The second half of [`expert_ffn`].
struct Down<'a> {
    experts: &'a [ExpertRef<'a>],
    gates: &'a [f32],
    /// Of each expert: whether its inner activations are there.
    done: &'a [Progress],
    /// `[k, width]`, and the same rounded, `each` chunks a row.
    hidden: SendPtr,
    rounded: RoundedRows,
    width: usize,
    each: usize,
}

impl Down<'_> {
    /// Writes a part of the `d` rows of the gated sum.
    ///
    /// # Safety
    /// All lengths must fit, `y` have `d` values, and nobody else touch these rows.
    unsafe fn part(&self, isa: Isa, part: Part, d: usize, y: SendPtr) {
        let rows = |part: Part| part.split(d, isa.tile_rows());
        let (own, then) = (rows(part), rows(part.following()));
        let piece = |expert: &ExpertRef<'_>, first: usize, end: usize| Piece {
            w: as_rows(&expert.down),
            other: None,
            first,
            count: PLAIN_ROWS.min(end - first),
        };
        let room = PLAIN_ROWS.min(d.next_multiple_of(isa.tile_rows()));
        scratch::floats((DOT_TOKENS + 1) * room, |scratch| {
            let (total, sums) = scratch.split_at_mut(room);
            for first in own.clone().step_by(PLAIN_ROWS) {
                let count = PLAIN_ROWS.min(own.end - first);
                let total = &mut total[..count];
                total.fill(0.0);
                // Behind these rows of the last expert.
                let behind = if first + count < own.end { first + count..own.end } else { then.clone() };
                for (j, (expert, gate)) in self.experts.iter().zip(self.gates).enumerate() {
                    let this = piece(expert, first, own.end);
                    let next = match self.experts.get(j + 1) {
                        Some(next) => piece(next, first, own.end),
                        None => piece(&self.experts[0], behind.start, behind.end),
                    };
                    self.done[j].wait();
                    let x = [self.hidden.get().add(j * self.width).cast_const()];
                    let rounded = [self.rounded.0.wrapping_add(j * self.each)];
                    let out = [sums.as_mut_ptr(); 2];
                    plain_products(isa, &this, Some(&next), &x, &rounded, out, room);
                    add_scaled(isa, total, *gate, &sums[..count]);
                }
                std::ptr::copy_nonoverlapping(total.as_ptr(), y.get().add(first), count);
            }
        });
    }
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
