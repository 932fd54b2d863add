//! Products of many tokens with one or many matrices, shared among the threads by cost.

use crate::MatRef;
use crate::math::Act;
use crate::pool::{Pool, SendPtr, Share, split};
use crate::scratch;
use crate::simd::Isa;
use crate::tile::{Columns, DOT_TOKENS, Finish, MAX_TOKENS, Rows, dots, finish_tile, multiply, pack, pack_columns};

/// From this many tokens on a tile is packed.
const PACK_FROM: usize = 12;

/// Whether weights are multiplied from packed tiles, or straight from their rows by dot products. The two add in different
/// orders, so that the last bits of a result differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pack {
    /// Whichever is faster for the number of tokens that share the weights.
    #[default]
    BySize,
    /// Always packed: a token's results do not depend on which other tokens are in the batch.
    Always,
}

impl Pack {
    fn packs(self, tokens: usize) -> bool {
        self == Pack::Always || tokens >= PACK_FROM
    }
}

/// The most tokens of a cell, the unit of sharing.
const CELL_TOKENS: usize = 96;

/// The cost of packing a tile, in tokens' worth of multiplying it.
const PACK_COST: usize = 8;

/// `y[s] = finish(w x[s / per_row])` for the slots `s` of each group, with the group's own `w`.
pub(crate) struct Product<'a> {
    /// Group `g` has the slots `order[bounds[g]..bounds[g + 1]]`.
    pub bounds: &'a [u32],
    /// All slots, by group; if there is none, they are in order.
    pub order: Option<&'a [u32]>,
    /// Slots there are, also of no group.
    pub slots: usize,
    /// Rows of `cols` values.
    pub x: &'a [f32],
    pub cols: usize,
    /// Slots that share a row of `x`.
    pub per_row: usize,
    /// A row of `rows` values per slot.
    pub y: &'a mut [f32],
    pub rows: usize,
    pub finish: Finish<'a>,
    pub pack: Pack,
    /// Whether the weights are `[cols, rows]` and to be read column by column: the product with their transpose.
    pub transposed: bool,
}

/// What is to be done for one group.
struct Group {
    /// Its first place in the order of slots, and how many it has.
    start: usize,
    tokens: usize,
    /// Cells are numbered tile by tile; a tile has one for each chunk of tokens.
    chunks: usize,
    cells: usize,
    cost: u64,
}

impl Product<'_> {
    fn group(&self, isa: Isa, g: usize) -> Group {
        let start = self.bounds[g] as usize;
        let tokens = self.bounds[g + 1] as usize - start;
        let packed = self.packs(tokens);
        let chunks = if packed { tokens.div_ceil(CELL_TOKENS) } else { tokens.min(1) };
        let cells = self.rows.div_ceil(isa.tile_rows()) * chunks;
        let cost = tokens.div_ceil(chunks.max(1)) + if packed { PACK_COST } else { 1 };
        Group { start, tokens, chunks, cells, cost: cost as u64 }
    }

    /// Columns are only ever multiplied from packed tiles.
    fn packs(&self, tokens: usize) -> bool {
        self.transposed || self.pack.packs(tokens)
    }

    fn slot(&self, i: usize) -> usize {
        self.order.map_or(i, |order| order[i] as usize)
    }

    /// Computes the product, with the one or two matrices that `weights(g)` gives for a group
    /// that has slots.
    ///
    /// # Panics
    /// If a length does not fit.
    pub(crate) fn run<'w, F>(self, pool: &Pool, weights: F)
    where
        F: Fn(usize) -> (MatRef<'w>, Option<MatRef<'w>>) + Sync,
    {
        let isa = pool.isa();
        let groups = self.bounds.len() - 1;
        let (slots, rows, cols) = (self.slots, self.rows, self.cols);
        assert_eq!(self.y.len(), slots * rows, "results: {slots} rows of {rows}");
        assert_eq!(self.x.len() * self.per_row, slots * cols, "inputs: rows of {cols}");
        let mut total = 0;
        for g in 0..groups {
            let group = self.group(isa, g);
            total += group.cells as u64 * group.cost;
            if group.tokens > 0 {
                let (w, other) = weights(g);
                for w in [Some(w), other].into_iter().flatten() {
                    let shape = if self.transposed { (w.cols, w.rows) } else { (w.rows, w.cols) };
                    assert_eq!(shape, (rows, cols), "shape of the weights");
                    w.row_bytes();
                }
            }
        }
        let operations = (total as usize).saturating_mul(isa.tile_rows() * cols);
        let y = SendPtr(self.y.as_mut_ptr());
        pool.run_parts(operations, |part, parts| {
            let mut share = Share::new(total, part, parts);
            for g in 0..groups {
                let group = self.group(isa, g);
                let cells = share.take(group.cells, group.cost);
                if !cells.is_empty() {
                    let (w, other) = weights(g);
                    let rows = [Some(w), other].map(|w| w.map(|w| as_rows(&w)));
                    // SAFETY: lengths were checked above; no two cells have the same outputs,
                    // since a slot is in one group and a cell in one part.
                    unsafe { self.cells(isa, &group, cells, rows, y) }
                }
            }
        });
    }

    /// Does some cells of a group.
    ///
    /// # Safety
    /// The weights must be valid, all lengths fit, and nobody else touch the cells' outputs.
    unsafe fn cells(
        &self,
        isa: Isa,
        group: &Group,
        cells: std::ops::Range<usize>,
        weights: [Option<Rows>; 2],
        y: SendPtr,
    ) {
        let (width, k) = (isa.tile_rows(), self.cols);
        let packed = self.packs(group.tokens);
        let most = if packed { isa.tile_tokens() } else { DOT_TOKENS };
        let (tile_len, sums_len) = (if packed { k * width } else { 0 }, MAX_TOKENS * width);
        scratch::floats(2 * (tile_len + sums_len), |scratch| {
            let tile = [scratch.as_mut_ptr(), scratch.as_mut_ptr().add(tile_len)];
            let sums = tile[1].add(tile_len);
            let sums = [sums, sums.add(sums_len)];
            let mut packed_tile = usize::MAX;
            for cell in cells {
                let first = cell / group.chunks * width;
                let count = width.min(self.rows - first);
                if packed && packed_tile != first {
                    packed_tile = first;
                    for (w, tile) in weights.iter().zip(tile) {
                        match w {
                            Some(w) if self.transposed => pack_columns(isa, w, first, tile),
                            Some(w) => pack(isa, w, first, tile),
                            None => {}
                        }
                    }
                }
                let tokens = split(group.tokens, cell % group.chunks, group.chunks, 1);
                let blocks = tokens.len().div_ceil(most);
                for block in 0..blocks {
                    let part = split(tokens.len(), block, blocks, 1);
                    let mut x = [std::ptr::null(); MAX_TOKENS];
                    let mut out = [std::ptr::null_mut(); MAX_TOKENS];
                    for (i, t) in part.clone().enumerate() {
                        let slot = self.slot(group.start + tokens.start + t);
                        x[i] = self.x.as_ptr().add(slot / self.per_row * k);
                        out[i] = y.get().add(slot * self.rows);
                    }
                    let (x, out) = (&x[..part.len()], &out[..part.len()]);
                    for (i, w) in weights.iter().enumerate() {
                        let Some(w) = w else { continue };
                        if packed {
                            let b = Columns { data: tile[i], stride: width, k };
                            multiply(isa, &b, x, sums[i], width, false);
                        } else {
                            dots(isa, w, first, count, x, sums[i], width);
                        }
                    }
                    finish_tile(isa, sums[0], sums[1], out, first, count, self.finish);
                }
            }
        });
    }
}

fn as_rows(w: &MatRef<'_>) -> Rows {
    let stride = w.row_bytes();
    Rows { dtype: w.dtype, data: w.data.as_ptr(), stride, rows: w.rows, cols: w.cols }
}

/// `y[t, r] = sum over c of w[r, c] x[t, c]`, plus `bias[r]`: `x` is `[n, cols]`, `y` is
/// `[n, rows]`. Weights are widened exactly; all arithmetic is in `f32`.
///
/// # Panics
/// If a slice has not the length of its shape.
#[allow(clippy::too_many_arguments, reason = "kernels take plain arguments")]
pub fn matmul(pool: &Pool, pack: Pack, w: MatRef<'_>, x: &[f32], n: usize, bias: Option<&[f32]>, y: &mut [f32]) {
    assert!(bias.is_none_or(|b| b.len() == w.rows), "bias of {} rows", w.rows);
    dense(pool, pack, w, None, x, n, Finish::Bias(bias), y);
}

/// `y[t, c] = sum over r of w[r, c] x[t, r]`, the product with the transpose of `w`: `x` is `[n, rows]`, `y` is `[n, cols]`.
/// It is how a gradient goes back through [`matmul`]. A row's result does not depend on the other rows.
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn matmul_transposed(pool: &Pool, w: MatRef<'_>, x: &[f32], n: usize, y: &mut [f32]) {
    let bounds = [0, u32::try_from(n).expect("fewer than 2^32 tokens")];
    let (rows, cols, finish) = (w.cols, w.rows, Finish::Bias(None));
    let (pack, transposed) = (Pack::Always, true);
    Product { bounds: &bounds, order: None, slots: n, x, cols, per_row: 1, y, rows, finish, pack, transposed }
        .run(pool, |_| (w, None));
}

/// `hidden[t] = act(gate x[t]) * (up x[t])`: `gate` and `up` are `[I, d]`, `x` is `[n, d]`,
/// `hidden` is `[n, I]`.
///
/// # Panics
/// If a slice or matrix has not the length of its shape.
#[allow(clippy::too_many_arguments, reason = "kernels take plain arguments")]
pub fn gated_hidden(
    pool: &Pool,
    pack: Pack,
    gate: MatRef<'_>,
    up: MatRef<'_>,
    x: &[f32],
    n: usize,
    act: Act,
    hidden: &mut [f32],
) {
    dense(pool, pack, gate, Some(up), x, n, Finish::Gated(act), hidden);
}

#[allow(clippy::too_many_arguments, reason = "kernels take plain arguments")]
fn dense(
    pool: &Pool,
    pack: Pack,
    w: MatRef<'_>,
    other: Option<MatRef<'_>>,
    x: &[f32],
    n: usize,
    finish: Finish<'_>,
    y: &mut [f32],
) {
    let bounds = [0, u32::try_from(n).expect("fewer than 2^32 tokens")];
    let (rows, cols) = (w.rows, w.cols);
    let transposed = false;
    Product { bounds: &bounds, order: None, slots: n, x, cols, per_row: 1, y, rows, finish, pack, transposed }
        .run(pool, |_| (w, other));
}
