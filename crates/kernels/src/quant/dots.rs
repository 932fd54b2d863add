//! Products of rows of blocks with a few tokens, straight from the blocks: each code is unpacked
//! once, into a register. What this costs is reading the weights.

#[cfg(target_arch = "x86_64")]
use super::twin::{self, Streams};
use super::{CHUNK, GROUPS, Levels, Quant, Rounded, Sink, blocks_of, chunk_bytes, with_quant};
use crate::simd::{Isa, Simd, kernel};
use crate::tile::{AHEAD, Rows};

/// Some neighbouring rows of one matrix, or of two of the same shape.
#[derive(Clone, Copy)]
pub(crate) struct Piece {
    pub weights: [Option<Rows>; 2],
    pub first: usize,
    pub count: usize,
}

impl Piece {
    /// Both matrices, if they can be multiplied side by side.
    #[cfg(target_arch = "x86_64")]
    fn both(&self) -> Option<[Rows; 2]> {
        match self.weights {
            [Some(a), Some(b)] if a.dtype == b.dtype => Some([a, b]),
            _ => None,
        }
    }

    /// Where the two streams of this piece begin: the rows of both matrices, or else the halves of the first.
    #[cfg(target_arch = "x86_64")]
    unsafe fn streams(&self) -> Option<[*const u8; 2]> {
        Some(match self.both() {
            Some(both) => both.map(|w| w.row(self.first)),
            None => {
                let w = self.weights[0].as_ref()?;
                [w.row(self.first), w.row(self.first + self.count.div_ceil(2))]
            }
        })
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
    let x = [0, 1, 2, 3].map(|t: usize| x[t.min(last)]);
    #[cfg(target_arch = "x86_64")]
    if isa.takes_two_rows() {
        return side_by_side(isa, piece, next, [last, width], x, out);
    }
    let _ = next;
    for (w, out) in piece.weights.iter().zip(out) {
        match w {
            Some(w) if w.dtype.is_quantized() => one_by_one(isa, w, [piece.first, piece.count], [last, width], x, out),
            _ => {}
        }
    }
}

/// [`rounded_dots`] with sets that take two rows at once.
#[cfg(target_arch = "x86_64")]
unsafe fn side_by_side(
    isa: Isa,
    piece: &Piece,
    next: Option<&Piece>,
    [last, width]: [usize; 2],
    x: [*const Rounded; 4],
    out: [*mut f32; 2],
) {
    let Piece { first, count, .. } = *piece;
    let next = next.and_then(|next| next.streams());
    let twins = |w: &Rows, start: [*const u8; 2], rows: [usize; 2], next: [*const u8; 2], out: [*mut f32; 2]| {
        let streams = Streams { start, rows, stride: w.stride, cols: w.cols, out, width, next };
        with_quant!(w.dtype, Q => if const { sums_whole::<Q>() } {
            match last {
                0 => twin::dots::<Q, 1>(isa, &streams, x),
                1 => twin::dots::<Q, 2>(isa, &streams, x),
                _ => twin::dots::<Q, 4>(isa, &streams, x),
            }
            return true;
        }, else {});
        false
    };
    // With AVX2 streams go through two tiles at a time, so that they are near each other: on Zen 4 with its instructions reading was
    // a fifth slower otherwise, and other orders were not measured on processors without AVX-512.
    let (far_apart, step) = if isa == Isa::Avx2 { (false, 2 * isa.tile_rows()) } else { (true, count) };
    if let Some(both) = piece.both().filter(|_| far_apart) {
        let start = both.map(|w| w.row(first));
        if twins(&both[0], start, [count; 2], next.unwrap_or(start), out) {
            return;
        }
    }
    for (w, out) in piece.weights.iter().zip(out) {
        let Some(w) = w.as_ref().filter(|w| w.dtype.is_quantized()) else { continue };
        for at in (0..count).step_by(step) {
            let tile = Piece { weights: [Some(*w), None], first: first + at, count: step.min(count - at) };
            let Some(start) = tile.streams() else { continue };
            // With nothing to come it is what is near already.
            let next = match at + step {
                at if at < count => start.map(|start| start.wrapping_add(step * w.stride)),
                _ => next.unwrap_or(start),
            };
            let half = tile.count.div_ceil(2);
            let outs = [out.add(at), out.add(at + half)];
            if !twins(w, start, [half, tile.count - half], next, outs) {
                one_by_one(isa, w, [tile.first, tile.count], [last, width], x, outs[0]);
            }
        }
    }
}

/// The products of `count` rows from `first` on with `last + 1` tokens, one row at a time.
unsafe fn one_by_one(
    isa: Isa,
    w: &Rows,
    [first, count]: [usize; 2],
    [last, width]: [usize; 2],
    x: [*const Rounded; 4],
    out: *mut f32,
) {
    with_quant!(w.dtype, Q => match last {
        0 => dots::<Q, 1>(isa, w, first, count, x, out, width),
        1 => dots::<Q, 2>(isa, w, first, count, x, out, width),
        _ => dots::<Q, 4>(isa, w, first, count, x, out, width),
    }, else unreachable!("{} has no blocks", w.dtype.name()));
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
