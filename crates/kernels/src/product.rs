//! Products of many tokens with one or many matrices, shared among the threads by cost.

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::math::Act;
use crate::pool::{Part, Pool, SendPtr, Share, split};
use crate::quant::{CHUNK, Piece, Rounded, Rounding, multiply_rounded, packed_len, round_row, rounded_dots, rounding};
use crate::results::fill_each;
use crate::scratch;
use crate::simd::Isa;
use crate::tile::{Columns, DOT_TOKENS, Finish, Rows, dots, finish_tile, multiply, pack, pack_columns};
use crate::{DType, MatRef};

/// From this many tokens on a tile is packed.
const PACK_FROM: usize = 12;

/// The same for weights in blocks.
const PACK_BLOCKS_FROM: usize = 5;

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
    fn packs(self, tokens: usize, blocks: bool) -> bool {
        self == Pack::Always || tokens >= if blocks { PACK_BLOCKS_FROM } else { PACK_FROM }
    }
}

/// The most tokens of a cell, the unit of sharing.
const CELL_TOKENS: usize = 96;

/// The same for weights in blocks, whose tiles are packed anew for each cell.
const CELL_ROUNDED: usize = 512;

/// The most rows that are multiplied at once if tiles are not packed: a multiple of all tiles.
pub(crate) const PLAIN_ROWS: usize = 1024;

/// The cost of packing a tile, in tokens' worth of multiplying it.
const PACK_COST: usize = 8;

/// The same for weights in blocks.
const PACK_BLOCKS_COST: usize = 15;

/// `y[s] = finish(w x[s / per_row])` for the slots `s` of each group, with the group's own `w`, `finish` and `y`.
pub(crate) struct Product<'a> {
    /// Group `g` has the slots `order[bounds[g]..bounds[g + 1]]`.
    pub bounds: &'a [u32],
    /// All slots, by group; if there is none, each group has all of them, in order.
    pub order: Option<&'a [u32]>,
    /// Slots there are, also of no group.
    pub slots: usize,
    /// Rows of `cols` values.
    pub x: &'a [f32],
    pub cols: usize,
    /// Slots that share a row of `x`.
    pub per_row: usize,
    pub pack: Pack,
    /// Whether the weights are `[cols, rows]` and to be read column by column: the product with their transpose.
    pub transposed: bool,
}

/// What a group's slots are multiplied with, and what becomes of it.
#[derive(Clone, Copy)]
pub(crate) struct Work<'w> {
    pub w: MatRef<'w>,
    /// A second matrix of the same shape.
    pub other: Option<MatRef<'w>>,
    pub finish: Finish<'w>,
    /// A row of results per slot: as many as the product has, also of no group.
    pub y: SendPtr,
}

/// What is to be done for one group that has tokens.
struct Group<'w> {
    work: Work<'w>,
    /// Values of a row of results.
    rows: usize,
    /// Its first place in the order of slots, and how many it has.
    start: usize,
    tokens: usize,
    /// Whether tiles are packed, and whether a matrix is multiplied with rounded tokens.
    packed: bool,
    rounded: bool,
    /// Chunks that the tokens are cut into (one, unless tiles are packed), and cells, one for each tile and chunk.
    chunks: usize,
    cells: usize,
    cost: u64,
}

impl Group<'_> {
    /// The tile and the chunk of tokens of a cell. Tiles of blocks are packed anew for each cell, so it is the tokens that stay near.
    fn place(&self, cell: usize) -> (usize, usize) {
        let tiles = self.cells / self.chunks;
        if self.rounded { (cell % tiles, cell / tiles) } else { (cell / self.chunks, cell % self.chunks) }
    }

    fn weights(&self) -> [Option<MatRef<'_>>; 2] {
        [Some(self.work.w), self.work.other]
    }
}

/// The chunks of the rounded rows, if there are any.
#[derive(Clone, Copy)]
pub(crate) struct RoundedRows(pub *const Rounded);

// SAFETY: the rounded rows are only read.
unsafe impl Sync for RoundedRows {}

/// What a product costs.
pub(crate) struct Cost {
    /// In units of [`Group::cost`].
    total: u64,
    pub operations: usize,
    /// How the inputs are wanted rounded.
    pub rounded: Option<Rounding>,
}

impl Product<'_> {
    fn group<'w>(&self, isa: Isa, g: usize, work: impl Fn(usize) -> Work<'w>) -> Group<'w> {
        let start = self.bounds[g] as usize;
        let tokens = self.bounds[g + 1] as usize - start;
        let work = work(g);
        let rows = if self.transposed { work.w.cols } else { work.w.rows };
        let rounded = [Some(work.w), work.other].iter().flatten().any(|w| self.rounds(w.dtype));
        // Columns are only ever multiplied from packed tiles.
        let packed = self.transposed || self.pack.packs(tokens, rounded);
        let most = if rounded { self.cell_rounded(isa) } else { CELL_TOKENS };
        let chunks = if packed { tokens.div_ceil(most) } else { 1 };
        let cells = rows.div_ceil(isa.tile_rows()) * chunks;
        let pack_cost = match (packed, rounded) {
            (false, _) => 1,
            (true, false) => PACK_COST,
            (true, true) => PACK_BLOCKS_COST,
        };
        let cost = (tokens.div_ceil(chunks) + pack_cost) as u64;
        Group { work, rows, start, tokens, packed, rounded, chunks, cells, cost }
    }

    /// What is multiplied at once from the first of some cells on, if tiles are not packed.
    fn piece(&self, isa: Isa, group: &Group<'_>, cells: &Range<usize>) -> Piece {
        let first = group.place(cells.start).0 * isa.tile_rows();
        let end = group.rows.min(cells.end * isa.tile_rows());
        Piece {
            w: as_rows(&group.work.w),
            other: group.work.other.map(|w| as_rows(&w)),
            first,
            count: PLAIN_ROWS.min(end.saturating_sub(first)),
        }
    }

    /// The most tokens of a cell with weights in blocks: from tile to tile they are to stay in the second cache, or in the third where
    /// what is read of them is asked for ahead.
    fn cell_rounded(&self, isa: Isa) -> usize {
        let (cache, most) = if isa == Isa::Avx512 { (4 << 20, CELL_ROUNDED) } else { (1 << 20, 192) };
        let token = self.cols.div_ceil(CHUNK) * Rounded::LINES * 64;
        (cache / token.max(1)).clamp(CELL_TOKENS, most)
    }

    /// Whether weights of this type are multiplied with rounded tokens.
    fn rounds(&self, dtype: DType) -> bool {
        dtype.is_quantized() && !self.transposed
    }

    /// The slot at a place of the order.
    fn slot(&self, group: &Group<'_>, at: usize) -> usize {
        self.order.map_or(at - group.start, |order| order[at] as usize)
    }

    /// Computes the product, with what `work(g)` gives for a group that has slots: writes all rows of their slots.
    ///
    /// # Panics
    /// If a length does not fit.
    ///
    /// # Safety
    /// Results must have room where `work` says, and no slot be in two groups whose results lie in the same place.
    pub(crate) unsafe fn run<'w, F>(self, pool: &Pool, work: F)
    where
        F: Fn(usize) -> Work<'w> + Sync,
    {
        let cost = self.cost(pool.isa(), &work);
        scratch::rounded(self.rounded_len(cost.rounded), |chunks| {
            let rounded = self.round(pool, cost.rounded, chunks);
            pool.run_parts(cost.operations, |part| self.part(pool.isa(), &cost, part, &work, rounded, |_, _| ()));
        });
    }

    /// Groups that have slots: of many experts few.
    fn groups(&self) -> impl Iterator<Item = usize> {
        (0..self.bounds.len() - 1).filter(|&g| self.bounds[g] < self.bounds[g + 1])
    }

    /// What all of it costs.
    ///
    /// # Panics
    /// If a length does not fit.
    pub(crate) fn cost<'w>(&self, isa: Isa, work: impl Fn(usize) -> Work<'w>) -> Cost {
        let (slots, cols) = (self.slots, self.cols);
        assert_eq!(self.x.len() * self.per_row, slots * cols, "inputs: rows of {cols}");
        let (mut total, mut rounded) = (0, None::<Rounding>);
        for g in self.groups() {
            let group = self.group(isa, g, &work);
            total += group.cells as u64 * group.cost;
            for w in group.weights().iter().flatten() {
                if self.rounds(w.dtype) {
                    let how = rounding(w.dtype, group.packed);
                    rounded = Some(rounded.map_or(how, |other| other.and(how)));
                }
                let shape = if self.transposed { (w.cols, w.rows) } else { (w.rows, w.cols) };
                assert_eq!(shape, (group.rows, cols), "shape of the weights");
                w.row_bytes();
            }
        }
        let operations = (total as usize).saturating_mul(isa.tile_rows() * cols);
        Cost { total, operations, rounded }
    }

    /// Does a part, and tells `done(group, cells)` of each group it had cells of; a group has one for each tile, if it has few tokens.
    ///
    /// # Safety
    /// As for [`Product::run`]; `cost` must be of this product and `work`, `rounded` what [`Product::round`] gave, and nobody else do
    /// the same part.
    pub(crate) unsafe fn part<'w>(
        &self,
        isa: Isa,
        cost: &Cost,
        part: Part,
        work: impl Fn(usize) -> Work<'w>,
        rounded: RoundedRows,
        done: impl Fn(usize, usize),
    ) {
        let [mut share, mut then] = [part, part.following()].map(|part| Share::new(cost.total, part));
        // Of each group the cells of this part, and what will come behind them.
        let groups = self.groups().filter_map(|g| {
            let group = self.group(isa, g, &work);
            let [cells, then] = [&mut share, &mut then].map(|share| share.take(group.cells, group.cost));
            (!cells.is_empty() || !then.is_empty()).then_some((g, group, cells, then))
        });
        let mut groups = groups.peekable();
        while let Some((g, group, cells, then)) = groups.next().filter(|(_, _, cells, _)| !cells.is_empty()) {
            let next = match groups.peek() {
                _ if !then.is_empty() => Some(self.piece(isa, &group, &then)),
                Some((_, group, cells, then)) => {
                    Some(self.piece(isa, group, if cells.is_empty() { then } else { cells }))
                }
                None => None,
            };
            let count = cells.len();
            // No two cells have the same outputs, since a slot is in one group and a cell in one part.
            self.cells(isa, &group, cells, next, rounded);
            done(g, count);
        }
    }

    /// Chunks of all inputs, if they are wanted rounded.
    pub(crate) fn rounded_len(&self, how: Option<Rounding>) -> usize {
        how.map_or(0, |_| self.x.len().checked_div(self.cols).unwrap_or(0) * self.cols.div_ceil(CHUNK))
    }

    /// Rounds all inputs into so many chunks, row by row, if they are wanted so.
    pub(crate) fn round(&self, pool: &Pool, how: Option<Rounding>, chunks: &mut [Rounded]) -> RoundedRows {
        let Some(how) = how else { return RoundedRows(std::ptr::null()) };
        assert_eq!(chunks.len(), self.rounded_len(Some(how)), "chunks of the inputs");
        let (x, cols, each, out) = (self.x, self.cols, self.cols.div_ceil(CHUNK), SendPtr(chunks.as_mut_ptr()));
        pool.run_parts(x.len().saturating_mul(2), |part| {
            for row in part.split(x.len().checked_div(cols).unwrap_or(0), 1) {
                let x = &x[row * cols..][..cols];
                // SAFETY: the set was detected, there is room, and the rows of different parts do not overlap.
                unsafe { round_row(pool.isa(), x.as_ptr(), cols, how, out.get().add(row * each)) }
            }
        });
        RoundedRows(out.get())
    }

    /// Does some cells of a group.
    ///
    /// # Safety
    /// The weights must be valid, all lengths fit, and nobody else touch the cells' outputs.
    unsafe fn cells(&self, isa: Isa, group: &Group<'_>, cells: Range<usize>, next: Option<Piece>, x: RoundedRows) {
        if group.packed {
            let weights = group.weights().map(|w| w.map(|w| as_rows(&w)));
            self.packed_cells(isa, group, &weights, cells, next, x);
        } else {
            self.plain_cells(isa, group, cells, next, x);
        }
    }

    /// [`Product::cells`] from packed tiles.
    ///
    /// # Safety
    /// As there.
    unsafe fn packed_cells(
        &self,
        isa: Isa,
        group: &Group<'_>,
        weights: &[Option<Rows>; 2],
        cells: Range<usize>,
        next: Option<Piece>,
        x: RoundedRows,
    ) {
        let width = isa.tile_rows();
        let next = next.map(|next| ([Some(next.w), next.other], next.first));
        let most = if group.rounded { CELL_ROUNDED } else { isa.tile_tokens() };
        let tile_len = |w: &Option<Rows>| match w {
            Some(w) if self.rounds(w.dtype) => packed_len(isa),
            Some(_) => self.cols * width,
            None => 0,
        };
        let lens = [tile_len(&weights[0]), tile_len(&weights[1])];
        scratch::floats(lens[0] + lens[1] + 2 * most * width, |scratch| {
            let tile = [scratch.as_mut_ptr(), scratch.as_mut_ptr().add(lens[0])];
            let sums = tile[1].add(lens[1]);
            let sums = [sums, sums.add(most * width)];
            let mut packed_tile = usize::MAX;
            let mut batch = Batch::new();
            for cell in cells.clone() {
                let (tile_at, chunk) = group.place(cell);
                let first = tile_at * width;
                let count = width.min(group.rows - first);
                // Behind this tile comes another one, of these weights or the next.
                let then = (cell + 1..cells.end).map(|cell| group.place(cell).0).find(|&then| then != tile_at);
                let (of, at) = then.map(|then| (*weights, then * width)).or(next).unwrap_or(([None; 2], 0));
                let weights = [0, 1].map(|i| weights[i].map(|w| w.followed_by(first, of[i], at)));
                if packed_tile != first {
                    packed_tile = first;
                    for (w, tile) in weights.iter().zip(tile) {
                        match w {
                            Some(w) if self.transposed => pack_columns(isa, w, first, tile),
                            Some(w) if !self.rounds(w.dtype) => pack(isa, w, first, tile),
                            _ => {}
                        }
                    }
                }
                let tokens = split(group.tokens, chunk, group.chunks, 1);
                let products = |_: bool, batch: &Batch| {
                    for ((w, tile), sums) in weights.iter().zip(tile).zip(sums) {
                        match w {
                            Some(w) if self.rounds(w.dtype) => {
                                multiply_rounded(isa, w, first, batch.rounded(), tile, sums);
                            }
                            Some(_) => {
                                let b = Columns { data: tile, stride: width, k: self.cols };
                                multiply(isa, &b, batch.x(), sums, width, false);
                            }
                            None => {}
                        }
                    }
                };
                let places = group.start + tokens.start..group.start + tokens.end;
                self.batches(isa, group, places, most, [first, count], width, sums, x, &mut batch, products);
            }
        });
    }

    /// [`Product::cells`] from rows as they lie, many at a time: what is done once for them is not done for each tile.
    ///
    /// # Safety
    /// As there.
    unsafe fn plain_cells(
        &self,
        isa: Isa,
        group: &Group<'_>,
        cells: Range<usize>,
        next: Option<Piece>,
        x: RoundedRows,
    ) {
        let width = PLAIN_ROWS.min(group.rows.next_multiple_of(isa.tile_rows()));
        scratch::floats(2 * DOT_TOKENS * width, |scratch| {
            let sums = [scratch.as_mut_ptr(), scratch.as_mut_ptr().add(DOT_TOKENS * width)];
            let mut batch = Batch::new();
            let step = PLAIN_ROWS / isa.tile_rows();
            for cell in cells.clone().step_by(step) {
                let from = |cell: usize| self.piece(isa, group, &(cell..cells.end));
                let piece = from(cell);
                let next = if cell + step < cells.end { Some(from(cell + step)) } else { next };
                let places = group.start..group.start + group.tokens;
                let rows = [piece.first, piece.count];
                let products = |more: bool, batch: &Batch| {
                    // The same rows, if more tokens meet them.
                    let next = if more { Some(&piece) } else { next.as_ref() };
                    plain_products(isa, &piece, next, batch.x(), batch.rounded(), sums, width);
                };
                self.batches(isa, group, places, DOT_TOKENS, rows, width, sums, x, &mut batch, products);
            }
        });
    }

    /// Multiplies some rows (the first, and how many) with the tokens at `places`, up to `most` at a time: `products(more, batch)`
    /// writes the sums of a batch, rows of `width`; there may be more batches behind it.
    ///
    /// # Safety
    /// As for [`Product::cells`]; `most` must be at most [`CELL_ROUNDED`], and each of `sums` have as many rows of `width`.
    #[allow(clippy::too_many_arguments, reason = "kernels take plain arguments")]
    unsafe fn batches(
        &self,
        isa: Isa,
        group: &Group<'_>,
        places: Range<usize>,
        most: usize,
        [first, count]: [usize; 2],
        width: usize,
        sums: [*mut f32; 2],
        x: RoundedRows,
        batch: &mut Batch,
        products: impl Fn(bool, &Batch),
    ) {
        let blocks = places.len().div_ceil(most);
        for block in 0..blocks {
            let part = split(places.len(), block, blocks, 1);
            self.gather(group, places.start + part.start..places.start + part.end, x, batch);
            products(block + 1 < blocks, batch);
            finish_tile(isa, sums, width, batch.out(), first, count, group.work.finish);
        }
    }

    /// Puts the tokens at some places of the order of slots into `batch`.
    ///
    /// # Safety
    /// There must be at most [`CELL_ROUNDED`].
    unsafe fn gather(&self, group: &Group<'_>, places: Range<usize>, x: RoundedRows, batch: &mut Batch) {
        let chunks = self.cols.div_ceil(CHUNK);
        batch.len = places.len();
        for (i, at) in places.enumerate() {
            let slot = self.slot(group, at);
            let row = slot / self.per_row;
            batch.x[i].write(self.x.as_ptr().add(row * self.cols));
            batch.rounded[i].write(x.0.wrapping_add(row * chunks));
            batch.out[i].write(group.work.y.get().add(slot * group.rows));
        }
    }
}

/// `sums[i][t * width + r]` is the product of row `r` of a piece, of its matrix `i`, with token `t` of `x`, which is `rounded` as well.
///
/// # Safety
/// As for [`rounded_dots`] and [`dots`].
pub(crate) unsafe fn plain_products(
    isa: Isa,
    piece: &Piece,
    next: Option<&Piece>,
    x: &[*const f32],
    rounded: &[*const Rounded],
    sums: [*mut f32; 2],
    width: usize,
) {
    rounded_dots(isa, piece, next, rounded, sums, width);
    for (w, sums) in [Some(piece.w), piece.other].iter().zip(sums) {
        if let Some(w) = w.as_ref().filter(|w| !w.dtype.is_quantized()) {
            dots(isa, w, piece.first, piece.count, x, sums, width);
        }
    }
}

/// Some tokens: their rows, the same rounded, and where their results go.
struct Batch {
    len: usize,
    x: [MaybeUninit<*const f32>; CELL_ROUNDED],
    rounded: [MaybeUninit<*const Rounded>; CELL_ROUNDED],
    out: [MaybeUninit<*mut f32>; CELL_ROUNDED],
}

impl Batch {
    /// No tokens.
    fn new() -> Self {
        Self {
            len: 0,
            x: [const { MaybeUninit::uninit() }; CELL_ROUNDED],
            rounded: [const { MaybeUninit::uninit() }; CELL_ROUNDED],
            out: [const { MaybeUninit::uninit() }; CELL_ROUNDED],
        }
    }

    fn x(&self) -> &[*const f32] {
        // SAFETY: the first `len` were written.
        unsafe { std::slice::from_raw_parts(self.x.as_ptr().cast(), self.len) }
    }

    fn rounded(&self) -> &[*const Rounded] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.rounded.as_ptr().cast(), self.len) }
    }

    fn out(&self) -> &[*mut f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.out.as_ptr().cast(), self.len) }
    }
}

pub(crate) fn as_rows(w: &MatRef<'_>) -> Rows {
    Rows { dtype: w.dtype, data: w.data.as_ptr(), stride: w.row_bytes(), rows: w.rows, cols: w.cols, then: None }
}

/// `y[t, r] = sum over c of w[r, c] x[t, c]`, plus `bias[r]`: `x` is `[n, cols]`, `y` becomes
/// `[n, rows]`. Weights without blocks are widened exactly, and all arithmetic is in `f32`.
///
/// With weights in blocks every 32 values of `x` are rounded to signed bytes of a common scale, so that a value is off by
/// at most 1/254 of the greatest magnitude among its 32, and codes are multiplied as whole numbers; the sums of
/// blocks are gathered in `f32`. With the K types and `IQ4_XS`, whose scales are whole numbers within a block, it is every
/// 256 values (as in llama.cpp), and a block's factor is applied to the sum of its groups. A row of `x` that is not finite gives NaN. (So does `MXFP4` with a scale
/// beyond 2^100 or so, even if all its codes are 0.)
///
/// # Panics
/// If a slice has not the length of its shape.
#[allow(clippy::too_many_arguments, reason = "kernels take plain arguments")]
pub fn matmul(pool: &Pool, pack: Pack, w: MatRef<'_>, x: &[f32], n: usize, bias: Option<&[f32]>, y: &mut Vec<f32>) {
    matmul_each(pool, pack, [(w, bias)], x, n, [y]);
}

/// [`matmul`] with several matrices and their biases, with the same results, at once: `y[i]` becomes `[n, rows]` of matrix `i`.
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn matmul_each<const N: usize>(
    pool: &Pool,
    pack: Pack,
    w: [(MatRef<'_>, Option<&[f32]>); N],
    x: &[f32],
    n: usize,
    y: [&mut Vec<f32>; N],
) {
    let chunks = |w: &MatRef<'_>| w.dtype.is_quantized().then(|| rounding(w.dtype, false).chunk);
    let mut ways = w.iter().filter_map(|(w, _)| chunks(w));
    let first = ways.next();
    if ways.any(|way| Some(way) != first) {
        // Activations are rounded in different ways.
        for ((w, bias), y) in w.into_iter().zip(y) {
            matmul(pool, pack, w, x, n, bias, y);
        }
        return;
    }
    let factors = w.map(|(w, bias)| {
        assert!(bias.is_none_or(|b| b.len() == w.rows), "bias of {} rows", w.rows);
        (w, None, Finish::Bias(bias))
    });
    dense(pool, pack, false, factors, x, n, y);
}

/// `y[t, c] = sum over r of w[r, c] x[t, r]`, the product with the transpose of `w`: `x` is `[n, rows]`, `y` becomes `[n, cols]`.
/// It is how a gradient goes back through [`matmul`]. A row's result does not depend on the other rows.
///
/// # Panics
/// If a slice has not the length of its shape.
pub fn matmul_transposed(pool: &Pool, w: MatRef<'_>, x: &[f32], n: usize, y: &mut Vec<f32>) {
    dense(pool, Pack::Always, true, [(w, None, Finish::Bias(None))], x, n, [y]);
}

/// `hidden[t] = act(gate x[t]) * (up x[t])`: `gate` and `up` are `[I, d]`, `x` is `[n, d]`,
/// `hidden` becomes `[n, I]`.
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
    hidden: &mut Vec<f32>,
) {
    dense(pool, pack, false, [(gate, Some(up), Finish::Gated(act))], x, n, [hidden]);
}

/// Products of all tokens with each of some factors: one or two matrices, or their transposes.
fn dense<'w, const N: usize>(
    pool: &Pool,
    pack: Pack,
    transposed: bool,
    factors: [(MatRef<'w>, Option<MatRef<'w>>, Finish<'w>); N],
    x: &[f32],
    n: usize,
    y: [&mut Vec<f32>; N],
) {
    assert!(u32::try_from(3 * n).is_ok() && N <= 3, "fewer than 2^30 tokens, up to three factors");
    let bounds = [0, n, 2 * n, 3 * n].map(|bound| bound as u32);
    let shape = |w: MatRef<'w>| if transposed { (w.cols, w.rows) } else { (w.rows, w.cols) };
    let (rows, cols) = (factors.map(|(w, ..)| shape(w).0), factors.first().map_or(0, |(w, ..)| shape(*w).1));
    let product = Product { bounds: &bounds[..=N], order: None, slots: n, x, cols, per_row: 1, pack, transposed };
    // SAFETY: each group has every slot, and room for each in a place of its own.
    unsafe {
        fill_each(y, rows.map(|rows| n * rows), |y| {
            product.run(pool, |g| {
                let (w, other, finish) = factors[g];
                Work { w, other, finish, y: y[g] }
            });
        });
    }
}
