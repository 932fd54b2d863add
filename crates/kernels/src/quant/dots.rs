//! Products of rows of blocks with a few tokens, straight from the blocks: each code is unpacked
//! once, into a register. What this costs is reading the weights.

#[cfg(target_arch = "x86_64")]
use super::twin::{self, Streams};
use super::{CHUNK, GROUPS, Levels, Quant, Rounded, Sink, blocks_of, chunk_bytes, with_quant};
#[cfg(target_arch = "x86_64")]
use crate::DType;
use crate::simd::{Isa, Simd, kernel};
use crate::tile::{AHEAD, Rows};

/// Some neighbouring rows of a matrix, and the same of another one of its shape, if there is one.
#[derive(Clone, Copy)]
pub(crate) struct Piece {
    pub w: Rows,
    pub other: Option<Rows>,
    pub first: usize,
    pub count: usize,
}

impl Piece {
    /// The other matrix, if both are multiplied side by side.
    ///
    /// With AVX2 two streams of rows stay near each other: on Zen 4 with its instructions reading was a fifth slower otherwise
    /// (docs/performance.md), and other orders were not measured on processors without AVX-512.
    #[cfg(target_arch = "x86_64")]
    fn beside(&self, isa: Isa) -> Option<Rows> {
        self.other.filter(|other| isa != Isa::Avx2 && other.dtype == self.w.dtype)
    }

    /// Rows of one matrix that are taken at a time, in halves: all, or two tiles.
    #[cfg(target_arch = "x86_64")]
    fn step(&self, isa: Isa) -> usize {
        if isa == Isa::Avx2 { self.count.min(2 * isa.tile_rows()) } else { self.count }
    }

    /// Where the two streams of this piece begin: the rows of both matrices, or else the halves of what is taken first.
    #[cfg(target_arch = "x86_64")]
    unsafe fn streams(&self, isa: Isa) -> [*const u8; 2] {
        let first = self.w.row(self.first);
        match self.beside(isa) {
            Some(other) => [first, other.row(self.first)],
            None => [first, self.w.row(self.first + self.step(isa).div_ceil(2))],
        }
    }
}

/// `out[i][t * width + r]` is the product of row `first + r` of matrix `i` and token `x[t]`, for all matrices whose rows are in
/// blocks and `r` in `0..count`; `next` are rows that will be multiplied then.
///
/// # Safety
/// The machine must have `isa`; the weights must be valid and have these rows; there may be up to
/// [`DOT_TOKENS`](crate::tile::DOT_TOKENS) tokens, each of `cols` values in chunks; each of `out` must have a row of `width`,
/// which is at least `count`, for four.
pub(crate) unsafe fn rounded_dots(
    isa: Isa,
    piece: &Piece,
    next: Option<&Piece>,
    x: &[*const Rounded],
    out: [*mut f32; 2],
    width: usize,
) {
    let Some(last) = x.len().checked_sub(1) else { return };
    let tokens = Tokens { x: [0, 1, 2, 3].map(|t: usize| x[t.min(last)]), last, width };
    #[cfg(target_arch = "x86_64")]
    if let Some(other) = piece.beside(isa).filter(|w| in_pairs(isa, w.dtype)) {
        let start = piece.streams(isa);
        let next = next.map_or(start, |next| next.streams(isa));
        let streams =
            Streams { start, rows: [piece.count; 2], stride: other.stride, cols: other.cols, out, width, next };
        return twins(isa, other.dtype, &streams, &tokens);
    }
    let alone = |w| Piece { w, other: None, ..*piece };
    if piece.w.dtype.is_quantized() {
        let then = piece.other.map(alone);
        one_matrix(isa, &alone(piece.w), then.as_ref().or(next), &tokens, out[0]);
    }
    if let Some(other) = piece.other.filter(|other| other.dtype.is_quantized()) {
        one_matrix(isa, &alone(other), next, &tokens, out[1]);
    }
}

/// Up to four tokens: the number of the last, which the others behind it repeat; and how far the results of each lie apart.
struct Tokens {
    x: [*const Rounded; 4],
    last: usize,
    width: usize,
}

/// [`rounded_dots`] of a piece of one matrix.
unsafe fn one_matrix(isa: Isa, piece: &Piece, next: Option<&Piece>, tokens: &Tokens, out: *mut f32) {
    #[cfg(target_arch = "x86_64")]
    if in_pairs(isa, piece.w.dtype) {
        return halves(isa, piece, next, tokens, out);
    }
    // Rows that are taken one by one ask for what lies behind them.
    let _ = next;
    let Piece { w, first, count, .. } = piece;
    with_quant!(w.dtype, Q => match tokens.last {
        0 => dots::<Q, 1>(isa, w, *first, *count, tokens.x, out, tokens.width),
        1 => dots::<Q, 2>(isa, w, *first, *count, tokens.x, out, tokens.width),
        _ => dots::<Q, 4>(isa, w, *first, *count, tokens.x, out, tokens.width),
    }, else unreachable!("{} has no blocks", w.dtype.name()));
}

/// [`one_matrix`] in two streams.
#[cfg(target_arch = "x86_64")]
unsafe fn halves(isa: Isa, piece: &Piece, next: Option<&Piece>, tokens: &Tokens, out: *mut f32) {
    let (w, step) = (&piece.w, piece.step(isa));
    for at in (0..piece.count).step_by(step.max(1)) {
        let part = |at: usize| Piece { first: piece.first + at, count: step.min(piece.count - at), ..*piece };
        let this = part(at);
        let start = this.streams(isa);
        // With nothing to come it is what is near already.
        let next = if at + step < piece.count {
            part(at + step).streams(isa)
        } else {
            next.map_or(start, |next| next.streams(isa))
        };
        let half = this.count.div_ceil(2);
        let (rows, out) = ([half, this.count - half], [out.add(at), out.add(at + half)]);
        let streams = Streams { start, rows, stride: w.stride, cols: w.cols, out, width: tokens.width, next };
        twins(isa, w.dtype, &streams, tokens);
    }
}

/// The products of two streams of a type that is multiplied [in pairs](in_pairs) of rows.
#[cfg(target_arch = "x86_64")]
unsafe fn twins(isa: Isa, dtype: DType, streams: &Streams, tokens: &Tokens) {
    with_quant!(dtype, Q => if const { sums_whole::<Q>() } {
        match tokens.last {
            0 => twin::dots::<Q, 1>(isa, streams, tokens.x),
            1 => twin::dots::<Q, 2>(isa, streams, tokens.x),
            _ => twin::dots::<Q, 4>(isa, streams, tokens.x),
        }
    }, else {});
}

/// Whether rows of a type are multiplied two at once.
#[cfg(target_arch = "x86_64")]
fn in_pairs(isa: Isa, dtype: DType) -> bool {
    isa.takes_two_rows() && with_quant!(dtype, Q => sums_whole::<Q>(), else false)
}

/// Whether a chunk's sums are whole numbers. Signed codes would need more work for that than it saves.
pub(super) const fn sums_whole<Q: Quant>() -> bool {
    Q::LEVELS && !Q::SIGNED
}

kernel! {
    /// [`rounded_dots`] for the first `T` tokens.
    unsafe fn dots<S, Q: Quant; T>(
        w: &Rows, first: usize, count: usize, x: [*const Rounded; 4], out: *mut f32, width: usize,
    ) {
        for r in 0..count {
            let row = w.row(first + r);
            let sums = if sums_whole::<Q>() {
                row_of_levels::<S, Q, T>(row, w.cols, x)
            } else {
                row_of_scales::<S, Q, T>(row, w.cols, x)
            };
            for t in 0..T {
                *out.add(t * width + r) = S::sum8(sums[t]);
            }
        }
    }
}

/// The products of a row with `T` tokens, in eight parts each.
#[inline(always)]
unsafe fn row_of_scales<S: Simd, Q: Quant, const T: usize>(
    w: *const u8,
    cols: usize,
    x: [*const Rounded; 4],
) -> [S::F; T] {
    let halves = const { CHUNK / Q::GROUP / 8 };
    let mut sums = [S::splat8(0.0); T];
    let (mut s, mut m) = ([0.0; GROUPS], [0.0; GROUPS]);
    for c in 0..cols.div_ceil(CHUNK) {
        let p = w.add(c * chunk_bytes::<Q>());
        prefetch::<S, Q>(p);
        let n = blocks_of::<Q>((cols - c * CHUNK).min(CHUNK));
        Q::scales::<S>(p, n, &mut s, &mut m);
        let mut dot = Dot::<S, Q, T> {
            x: [std::ptr::null(); T],
            scales: [[0.0; GROUPS]; T],
            even: S::splat_byte(0),
            sums: [S::zero_pair(); T],
            of: std::marker::PhantomData,
        };
        for t in 0..T {
            let x = x[t].add(c);
            let (scale, less) = Rounded::scales(x, Q::GROUP);
            dot.x[t] = Rounded::codes(x);
            for i in 0..halves {
                let ours = S::load8(s.as_ptr().add(8 * i));
                S::store8(dot.scales[t].as_mut_ptr().add(8 * i), S::mul8(ours, S::load8(scale.add(8 * i))));
                if Q::MINS || Q::OFFSET > 0 {
                    let min = if Q::MINS {
                        S::load8(m.as_ptr().add(8 * i))
                    } else {
                        S::mul8(ours, S::splat8(f32::from(Q::OFFSET)))
                    };
                    sums[t] = S::fma8(min, S::load8(less.add(8 * i)), sums[t]);
                }
            }
        }
        // With the number of blocks known the loop over them is unrolled, and sums stay in registers.
        let full = const { blocks_of::<Q>(CHUNK) };
        if n == full {
            Q::codes::<S>(p, full, &mut dot);
        } else {
            Q::codes::<S>(p, n, &mut dot);
            dot.take(n | 1, S::splat_byte(0));
        }
        for t in 0..T {
            sums[t] = S::add8(sums[t], S::sum_pair(dot.sums[t]));
        }
    }
    sums
}

/// The same with whole scales and one scale for all activations of a chunk, so that a chunk's sums are whole numbers.
#[inline(always)]
unsafe fn row_of_levels<S: Simd, Q: Quant, const T: usize>(
    w: *const u8,
    cols: usize,
    x: [*const Rounded; 4],
) -> [S::F; T] {
    let groups = const { CHUNK / Q::GROUP };
    let mut sums = [S::splat8(0.0); T];
    for c in 0..cols / CHUNK {
        let p = w.add(c * chunk_bytes::<Q>());
        prefetch::<S, Q>(p);
        let Levels { scales, mins, d, dmin } = Q::levels(p);
        let levels = S::widen_levels(scales);
        let mut dot = WholeDot::<S, Q, T> {
            x: [std::ptr::null(); T],
            levels,
            even: S::splat_byte(0),
            sums: [S::zero_whole(); T],
            of: std::marker::PhantomData,
        };
        for t in 0..T {
            dot.x[t] = Rounded::codes(x[t].add(c));
        }
        Q::codes::<S>(p, 1, &mut dot);
        let splat = |half: u16| S::widen_f16([u64::from(half) * 0x1_0001_0001_0001; 2]);
        let (d, mins, dmin) = (splat(d), S::widen_levels(mins), splat(dmin));
        for t in 0..T {
            let x = x[t].add(c);
            let (worth, of_groups) = (S::splat8(Rounded::scale(x)), Rounded::sums(x, Q::GROUP));
            let mut sum = S::sum_whole(dot.sums[t]);
            if Q::OFFSET > 0 {
                let less = S::dot_levels(levels, of_groups, groups);
                sum = S::fma8(S::splat8(-f32::from(Q::OFFSET)), less, sum);
            }
            sum = S::mul8(d, sum);
            if Q::MINS {
                let less = S::dot_levels(mins, of_groups, groups);
                sum = S::fma8(S::mul8(dmin, S::splat8(-1.0)), less, sum);
            }
            sums[t] = S::fma8(worth, sum, sums[t]);
        }
    }
    sums
}

/// Asks for what lies [`AHEAD`] of a chunk.
#[inline(always)]
unsafe fn prefetch<S: Simd, Q: Quant>(chunk: *const u8) {
    let [near, far] = AHEAD;
    for line in (0..const { chunk_bytes::<Q>() }).step_by(64) {
        S::prefetch(chunk.wrapping_add(near + line));
        S::prefetch_far(chunk.wrapping_add(far + line));
    }
}

/// Multiplies codes with `T` tokens, and sums with the levels of their groups.
struct WholeDot<S: Simd, Q, const T: usize> {
    x: [*const u8; T],
    levels: S::H,
    /// The last codes of an even number.
    even: S::B,
    sums: [S::W; T],
    of: std::marker::PhantomData<Q>,
}

impl<S: Simd, Q: Quant, const T: usize> Sink<S> for WholeDot<S, Q, T> {
    #[inline(always)]
    unsafe fn take(&mut self, i: usize, codes: S::B) {
        if i.is_multiple_of(2) {
            self.even = codes;
            return;
        }
        let (even, levels, pair) = (self.even, self.levels, i / 2);
        for t in 0..T {
            let (sum, x) = (self.sums[t], self.x[t].add(64 * pair));
            self.sums[t] = if Q::GROUP == 16 {
                S::add_pair::<true>(sum, even, codes, x, levels, pair)
            } else {
                S::add_pair::<false>(sum, even, codes, x, levels, pair)
            };
        }
    }
}

/// Multiplies codes with `T` tokens.
struct Dot<S: Simd, Q, const T: usize> {
    x: [*const u8; T],
    scales: [[f32; GROUPS]; T],
    /// The last codes of an even number.
    even: S::B,
    sums: [S::P; T],
    of: std::marker::PhantomData<Q>,
}

impl<S: Simd, Q: Quant, const T: usize> Sink<S> for Dot<S, Q, T> {
    #[inline(always)]
    unsafe fn take(&mut self, i: usize, codes: S::B) {
        if i.is_multiple_of(2) {
            self.even = codes;
            return;
        }
        for t in 0..T {
            let (even, x) = (self.even, self.x[t].add(32 * (i - 1)));
            let scales = self.scales[t].as_ptr().add(32 / Q::GROUP * (i - 1));
            self.sums[t] = match (Q::SIGNED, Q::GROUP == 16) {
                (false, false) => S::fma_pair::<false, false>(self.sums[t], even, codes, x, scales),
                (false, true) => S::fma_pair::<false, true>(self.sums[t], even, codes, x, scales),
                (true, false) => S::fma_pair::<true, false>(self.sums[t], even, codes, x, scales),
                (true, true) => S::fma_pair::<true, true>(self.sums[t], even, codes, x, scales),
            };
        }
    }
}
