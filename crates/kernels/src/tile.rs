//! Products of a tile of weight rows with a few tokens: the innermost loops.
//!
//! With many tokens a tile is packed once (widened, and turned so that a vector holds one column
//! of all its rows), and [`multiply`] forms outer products. With few tokens that would not pay:
//! [`dots`] works on the rows as they lie. Both add up each result in an order that depends on
//! the length of the rows alone.

#![allow(clippy::needless_range_loop, reason = "loops over registers are unrolled by their counters")]

use crate::DType;
use crate::math::{Act, activate};
use crate::quant::CHUNK;
use crate::simd::{Isa, MAX_LANES, Simd, kernel, reduce, transpose};
use crate::weight::{Weight, widen, with_weight};

impl Isa {
    /// Weight rows in a tile: two vectors.
    pub(crate) const fn tile_rows(self) -> usize {
        2 * self.lanes()
    }

    /// The most tokens that [`multiply`] keeps in registers.
    pub(crate) const fn tile_tokens(self) -> usize {
        if self.registers() == 32 { MAX_TOKENS } else { 6 }
    }
}

/// The most that [`Isa::tile_tokens`] is.
pub(crate) const MAX_TOKENS: usize = 12;

/// How far ahead weights are asked for, in bytes: into the nearest cache, and before that into the next one.
pub(crate) const AHEAD: [usize; 2] = [3072, 8192];

/// The most tokens that [`dots`] takes.
pub(crate) const DOT_TOKENS: usize = 4;

/// Rows of weights somewhere in memory.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub dtype: DType,
    pub data: *const u8,
    /// Bytes from one row to the next.
    pub stride: usize,
    pub rows: usize,
    pub cols: usize,
    /// What is read then, if it is not what lies behind them: as many rows of the same kind.
    pub then: Option<*const u8>,
}

impl Rows {
    /// The `r`-th row, or the last if there are fewer.
    #[inline(always)]
    pub(crate) unsafe fn row(&self, r: usize) -> *const u8 {
        self.data.add(r.min(self.rows - 1) * self.stride)
    }

    /// How far ahead rows are asked for, in bytes, if `together` of them are multiplied at once: into the nearest cache, and before
    /// that into the next one. Long rows go on by themselves; otherwise it is rows that will be wanted, which processors do not guess.
    #[inline(always)]
    pub(crate) fn ahead(&self, together: usize) -> [usize; 2] {
        if let Some(then) = self.then {
            return [0, (then as usize).wrapping_sub(self.data as usize)];
        }
        let rows = |bytes: usize| bytes.div_ceil(self.stride.max(1)).next_multiple_of(together) * self.stride;
        let [near, far] = AHEAD;
        [if self.stride < near { rows(near) } else { near }, rows(far)]
    }

    /// These rows, of which those from row `first` on are read before those of `then` from row `at` on.
    pub(crate) fn followed_by(self, first: usize, then: Option<Rows>, at: usize) -> Rows {
        let start = |then: Rows| then.data.wrapping_add(at * then.stride).wrapping_sub(first * self.stride);
        Rows { then: then.map(start), ..self }
    }

    /// Asks for what lies so far ahead of column `c` of `row`; once per cache line is enough.
    #[inline(always)]
    pub(crate) unsafe fn prefetch<S: Simd, W: Weight>(row: *const u8, c: usize, ahead: [usize; 2]) {
        let at = row.wrapping_add(c * W::DTYPE.block_bytes() / W::DTYPE.block_len());
        S::prefetch(at.wrapping_add(ahead[0]));
        S::prefetch_far(at.wrapping_add(ahead[1]));
    }
}

kernel! {
    /// Packs the tile that begins at row `first`: `packed[c * tile_rows + r]` is the value of row
    /// `first + r` at column `c`. Behind the last row it is repeated. What is read then is asked for, if it was said.
    ///
    /// # Safety
    /// `w` must be valid and have row `first`; `packed` must hold `cols * tile_rows` values.
    pub(crate) unsafe fn pack<S>(w: &Rows, first: usize, packed: *mut f32) {
        with_weight!(w.dtype, W => {
            pack_half::<S, W>(w, first, packed);
            pack_half::<S, W>(w, first + S::LANES, packed.add(S::LANES));
        });
    }
}

#[inline(always)]
unsafe fn pack_half<S: Simd, W: Weight>(w: &Rows, first: usize, packed: *mut f32) {
    let stride = 2 * S::LANES;
    let mut rows = [w.data; MAX_LANES];
    for i in 0..S::LANES {
        rows[i] = w.row(first + i);
    }
    // Where that is, seen from here.
    let then = w.then.map(|then| (then as usize).wrapping_sub(w.data as usize));
    let size = const { W::DTYPE.block_bytes() / W::DTYPE.block_len() };
    let ask = |row: *const u8, c: usize| {
        if let Some(then) = then {
            S::prefetch_far(row.wrapping_add(then).wrapping_add(c * size));
        }
    };
    let mut v = [S::zero(); MAX_LANES];
    let mut start = 0;
    if matches!(W::DTYPE, DType::BF16) {
        // Two bfloats to a lane halve the work of turning them.
        while start + 2 * S::LANES <= w.cols {
            for i in 0..S::LANES {
                ask(rows[i], start);
                v[i] = S::load(rows[i].add(2 * start).cast());
            }
            transpose::<S>(&mut v);
            for i in 0..S::LANES {
                let (even, odd) = S::split_bf16(v[i]);
                S::store(packed.add((start + 2 * i) * stride), even);
                S::store(packed.add((start + 2 * i + 1) * stride), odd);
            }
            start += 2 * S::LANES;
        }
    }
    while start + S::LANES <= w.cols {
        for i in 0..S::LANES {
            ask(rows[i], start);
            v[i] = W::load::<S>(rows[i], start);
        }
        transpose::<S>(&mut v);
        for i in 0..S::LANES {
            S::store(packed.add((start + i) * stride), v[i]);
        }
        start += S::LANES;
    }
    if start < w.cols {
        for i in 0..S::LANES {
            v[i] = W::load_part::<S>(rows[i], start, w.cols - start);
        }
        transpose::<S>(&mut v);
        for i in 0..S::LANES {
            if start + i < w.cols {
                S::store(packed.add((start + i) * stride), v[i]);
            }
        }
    }
}

/// Packs the tile that begins at column `first`: `packed[r * tile_rows + c]` is the value of row `r` at column
/// `first + c`, zero behind the last column.
///
/// # Safety
/// The machine must have `isa`; `w` must be valid and have column `first`, which must be a multiple of `tile_rows`;
/// `packed` must hold `rows * tile_rows` values.
pub(crate) unsafe fn pack_columns(isa: Isa, w: &Rows, first: usize, packed: *mut f32) {
    if !w.dtype.is_quantized() {
        return pack_plain_columns(isa, w, first, packed);
    }
    // A block has a whole number of tiles' columns.
    let (width, len) = (isa.tile_rows(), w.dtype.block_len());
    let mut values = [0.0; CHUNK];
    for r in 0..w.rows {
        widen(isa, w.dtype, w.row(r).add(first / len * w.dtype.block_bytes()), &mut values[..len]);
        std::ptr::copy_nonoverlapping(values[first % len..].as_ptr(), packed.add(r * width), width);
    }
}

kernel! {
    /// [`pack_columns`] of a type without blocks.
    ///
    /// # Safety
    /// As for [`pack_columns`].
    unsafe fn pack_plain_columns<S>(w: &Rows, first: usize, packed: *mut f32) {
        with_weight!(w.dtype, W => {
            for (half, start) in [first, first + S::LANES].into_iter().enumerate() {
                let count = w.cols.saturating_sub(start);
                for r in 0..w.rows {
                    let row = w.row(r);
                    let v = match count {
                        0 => S::zero(),
                        n if n < S::LANES => W::load_part::<S>(row, start, n),
                        _ => W::load::<S>(row, start),
                    };
                    S::store(packed.add((2 * r + half) * S::LANES), v);
                }
            }
        });
    }
}

/// Columns of two vectors' width: `k` of them, `stride` values apart.
#[derive(Clone, Copy)]
pub(crate) struct Columns {
    pub data: *const f32,
    pub stride: usize,
    pub k: usize,
}

kernel! {
    /// `out[t * width + r] = sum over c of b[c * stride + r] * x[t][c]`, for all tokens in `x` and
    /// `r` in `0..tile_rows`; added to what is in `out` if `add`.
    ///
    /// # Safety
    /// `b` must be valid, each of `x` hold `k` values and `out` a row of `width` for each.
    pub(crate) unsafe fn multiply<S>(
        b: &Columns, x: &[*const f32], out: *mut f32, width: usize, add: bool,
    ) {
        let blocks = x.len().div_ceil(S::ISA.tile_tokens());
        let mut start = 0;
        for block in 0..blocks {
            let end = (block + 1) * x.len() / blocks;
            let (x, out) = (&x[start..end], out.add(start * width));
            macro_rules! by_tokens {
                ($($m:literal)*) => {
                    match x.len() {
                        $($m if $m <= S::ISA.tile_tokens() => {
                            outer::<S, $m>(b, x, out, width, add);
                        })*
                        _ => {}
                    }
                };
            }
            by_tokens!(1 2 3 4 5 6 7 8 9 10 11 12);
            start = end;
        }
    }
}

/// [`multiply`] for `M` tokens.
#[inline(always)]
unsafe fn outer<S: Simd, const M: usize>(b: &Columns, x: &[*const f32], out: *mut f32, width: usize, add: bool) {
    let mut rows = [std::ptr::null(); M];
    rows.copy_from_slice(x);
    let mut sums = [[S::zero(); 2]; M];
    if add {
        for t in 0..M {
            sums[t][0] = S::load(out.add(t * width));
            sums[t][1] = S::load(out.add(t * width + S::LANES));
        }
    }
    for c in 0..b.k {
        let column = b.data.add(c * b.stride);
        let (low, high) = (S::load(column), S::load(column.add(S::LANES)));
        for t in 0..M {
            let x = S::splat(*rows[t].add(c));
            sums[t][0] = S::fma(x, low, sums[t][0]);
            sums[t][1] = S::fma(x, high, sums[t][1]);
        }
    }
    for t in 0..M {
        S::store(out.add(t * width), sums[t][0]);
        S::store(out.add(t * width + S::LANES), sums[t][1]);
    }
}

kernel! {
    /// `out[t * width + r]` is the product of row `first + r` and token `x[t]`, for `r` in
    /// `0..count`, and anything from there to the next multiple of 8.
    ///
    /// # Safety
    /// `w` must be valid and have row `first`; there may be up to [`DOT_TOKENS`] tokens, each of
    /// `cols` values; `out` must have a row of `width` for each, and `width` be enough.
    pub(crate) unsafe fn dots<S>(
        w: &Rows, first: usize, count: usize, x: &[*const f32], out: *mut f32, width: usize,
    ) {
        let many = S::ISA.registers() == 32;
        with_weight!(w.dtype, W => match x.len() {
            1 if S::ISA == Isa::Avx512 && w.stride <= SHORT && w.cols.is_multiple_of(8 * S::LANES) => {
                dot_short::<S, W, 8>(w, first, count, x[0], out)
            }
            1 if S::ISA == Isa::Avx512 && w.stride <= SHORT && w.cols.is_multiple_of(2 * S::LANES) => {
                dot_short::<S, W, 2>(w, first, count, x[0], out)
            }
            1 if many => dot_rows::<S, W, 8, 1>(w, first, count, x, out, width),
            1 => dot_rows::<S, W, 4, 1>(w, first, count, x, out, width),
            2 => dot_rows::<S, W, 4, 2>(w, first, count, x, out, width),
            3 if many => dot_rows::<S, W, 4, 3>(w, first, count, x, out, width),
            4 if many => dot_rows::<S, W, 4, 4>(w, first, count, x, out, width),
            3 => dot_rows::<S, W, 2, 3>(w, first, count, x, out, width),
            4 => dot_rows::<S, W, 2, 4>(w, first, count, x, out, width),
            _ => {}
        });
    }
}

/// Bytes of rows that are short, so that reading some columns of one after another is reading in order. With AVX2, whose registers
/// hold less of a token, this way was slower (kernels' benchmark, attention).
const SHORT: usize = 1024;

/// [`dots`] for one token and short rows, whose columns are read in order, `C` vectors of the token being kept in registers.
#[inline(always)]
unsafe fn dot_short<S: Simd, W: Weight, const C: usize>(
    w: &Rows,
    first: usize,
    count: usize,
    x: *const f32,
    out: *mut f32,
) {
    let ahead = w.ahead(1);
    for start in (0..count).step_by(S::LANES) {
        let n = S::LANES.min(count - start);
        let mut sums = [S::zero(); MAX_LANES];
        for c in (0..w.cols).step_by(C * S::LANES) {
            let mut token = [S::zero(); C];
            for i in 0..C {
                token[i] = S::load(x.add(c + i * S::LANES));
            }
            for r in 0..n {
                let row = w.data.add((first + start + r) * w.stride);
                let mut sum = sums[r];
                for i in 0..C {
                    let at = c + i * S::LANES;
                    if i * const { S::LANES * W::DTYPE.block_bytes() / W::DTYPE.block_len() } % 64 == 0 {
                        Rows::prefetch::<S, W>(row, at, ahead);
                    }
                    sum = S::fma(W::load::<S>(row, at), token[i], sum);
                }
                sums[r] = sum;
            }
        }
        reduce::<S>(&mut sums, S::LANES);
        S::store_part_or_all(out.add(start), sums[0], n);
    }
}

/// [`dots`] for `T` tokens, `R` rows at a time.
#[inline(always)]
unsafe fn dot_rows<S: Simd, W: Weight, const R: usize, const T: usize>(
    w: &Rows,
    first: usize,
    count: usize,
    x: &[*const f32],
    out: *mut f32,
    width: usize,
) {
    let mut tokens = [std::ptr::null(); T];
    tokens.copy_from_slice(x);
    let (whole, ahead) = (w.cols - w.cols % S::LANES, w.ahead(R));
    for r in (0..count).step_by(R) {
        let mut rows = [w.data; R];
        for i in 0..R {
            rows[i] = w.row(first + r + i);
        }
        let mut sums = [[S::zero(); R]; T];
        // A cache line of each row at a time.
        let line = const { 64 * W::DTYPE.block_len() / W::DTYPE.block_bytes() };
        let lines = whole - whole % line;
        let mut c = 0;
        while c < lines {
            for i in 0..R {
                Rows::prefetch::<S, W>(rows[i], c, ahead);
            }
            for c in (c..c + line).step_by(S::LANES) {
                add_column::<S, W, R, T>(&rows, &tokens, c, &mut sums);
            }
            c += line;
        }
        while c < whole {
            add_column::<S, W, R, T>(&rows, &tokens, c, &mut sums);
            c += S::LANES;
        }
        if whole < w.cols {
            for t in 0..T {
                let x = S::load_part(tokens[t].add(whole), w.cols - whole);
                for i in 0..R {
                    let v = W::load_part::<S>(rows[i], whole, w.cols - whole);
                    sums[t][i] = S::fma(v, x, sums[t][i]);
                }
            }
        }
        for t in 0..T {
            store_sums::<S, R>(&sums[t], out.add(t * width + r));
        }
    }
}

/// Adds the products of a vector of columns.
#[inline(always)]
unsafe fn add_column<S: Simd, W: Weight, const R: usize, const T: usize>(
    rows: &[*const u8; R],
    tokens: &[*const f32; T],
    c: usize,
    sums: &mut [[S::V; R]; T],
) {
    let mut v = [S::zero(); R];
    for i in 0..R {
        v[i] = W::load::<S>(rows[i], c);
    }
    for t in 0..T {
        let x = S::load(tokens[t].add(c));
        for i in 0..R {
            sums[t][i] = S::fma(v[i], x, sums[t][i]);
        }
    }
}

/// Stores the sum of the lanes of each vector.
#[inline(always)]
unsafe fn store_sums<S: Simd, const R: usize>(sums: &[S::V; R], out: *mut f32) {
    let step = if R < S::LANES { R } else { S::LANES };
    let mut i = 0;
    while i < R {
        let mut v = [S::zero(); MAX_LANES];
        v[..step].copy_from_slice(&sums[i..i + step]);
        reduce::<S>(&mut v, step);
        S::store_part(out.add(i), v[0], step);
        i += step;
    }
}

/// What becomes of sums before they are stored.
#[derive(Clone, Copy)]
pub(crate) enum Finish<'a> {
    /// Adds a bias per row, if there is one.
    Bias(Option<&'a [f32]>),
    /// Multiplies the activation of the first product by the second.
    Gated(Act),
}

kernel! {
    /// Finishes sums, `sums[0][t * width + r]`, and stores them: token `t` goes to `out[t]`, rows
    /// `first..first + count`. The sums of the second product, if `finish` has two, are `sums[1]`.
    ///
    /// # Safety
    /// `sums` must hold `width` values per token, no fewer than `count` up to a multiple of the
    /// vector; each of `out` and a bias `first + count`.
    pub(crate) unsafe fn finish_tile<S>(
        sums: [*mut f32; 2], width: usize, out: &[*mut f32], first: usize, count: usize, finish: Finish<'_>,
    ) {
        for (t, &out) in out.iter().enumerate() {
            for r in (0..count).step_by(S::LANES) {
                let at = t * width + r;
                let n = count - r;
                let sum = S::load(sums[0].add(at));
                let sum = match finish {
                    Finish::Bias(None) => sum,
                    Finish::Bias(Some(bias)) => {
                        let bias = bias.as_ptr().add(first + r);
                        let whole = n >= S::LANES;
                        S::add(sum, if whole { S::load(bias) } else { S::load_part(bias, n) })
                    }
                    Finish::Gated(act) => {
                        S::mul(activate::<S>(act, sum), S::load(sums[1].add(at)))
                    }
                };
                let out = out.add(first + r);
                if n >= S::LANES { S::store(out, sum) } else { S::store_part(out, sum, n) }
            }
        }
    }
}
