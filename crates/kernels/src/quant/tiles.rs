//! Products of tiles of rows of blocks with many tokens: a chunk of a tile is packed, and then multiplied with every token
//! while it is in the nearest cache.

use super::pack::{CODES, FACTOR, Form, MIN_FACTOR, MIN_PAIRS, MINS, SCALES, STARTS, pack_chunk};
use super::{CHUNK, Rounded, chunk_bytes, with_quant};
#[cfg(target_arch = "x86_64")]
use super::{amx, rounding};
#[cfg(target_arch = "x86_64")]
use crate::simd::amx::Tiles;
use crate::simd::{Isa, Simd, kernel};
use crate::tile::Rows;

/// Tokens that are multiplied at once: their sums stay in registers.
const fn tokens_at_once(isa: Isa, halves: bool) -> usize {
    match (isa.registers(), halves) {
        (32, _) => 6,
        (_, true) => 4,
        (_, false) => 3,
    }
}

/// `out[t * tile_rows + r]` is the product of row `first + r` and token `x[t]`, for all `r` below
/// `tile_rows`; behind the last row it is repeated.
///
/// # Safety
/// The machine must have `isa`; `w` must be valid, of a type with blocks, and have row `first`; each
/// of `x` must hold `cols` values in chunks, rounded as [`rounding`] says for the type, `packed`
/// [`packed_len`](super::packed_len) values, and `out` a row of `tile_rows` for each token.
pub(crate) unsafe fn multiply_rounded(
    isa: Isa,
    w: &Rows,
    first: usize,
    x: &[*const Rounded],
    packed: *mut f32,
    out: *mut f32,
) {
    std::slice::from_raw_parts_mut(out, x.len() * isa.tile_rows()).fill(0.0);
    #[cfg(target_arch = "x86_64")]
    let tiles = (isa == Isa::Amx && rounding(w.dtype, true).chunk && x.len() >= amx::FROM)
        .then(|| Tiles::new(amx::block_rows(x.len())));
    let after = w.then.unwrap_or(w.data.wrapping_add(isa.tile_rows() * w.stride));
    for chunk in 0..w.cols.div_ceil(CHUNK) {
        let cols = (w.cols - chunk * CHUNK).min(CHUNK);
        let (form, bytes) = with_quant!(w.dtype, Q => {
            pack_chunk::<Q>(isa, w, first, chunk, packed);
            (Form::of::<Q>(isa, cols), const { chunk_bytes::<Q>() })
        }, else unreachable!("{} has no blocks", w.dtype.name()));
        // Behind the last chunk of these rows comes the first of the next tile's.
        let data = if (chunk + 1) * CHUNK < w.cols { w.data.wrapping_add((chunk + 1) * bytes) } else { after };
        let next = Next { data: data.wrapping_add(first * w.stride), stride: w.stride, bytes };
        #[cfg(target_arch = "x86_64")]
        if let Some(tiles) = &tiles {
            amx::split_planes(packed, form, next);
            amx::multiply_chunk(tiles, packed, form, x, chunk, out);
            continue;
        }
        multiply_chunk(isa, packed, form, x, chunk, next, out);
    }
}

/// Memory that will be wanted next: so many bytes of each row of a tile. It need not be there.
#[derive(Clone, Copy)]
pub(super) struct Next {
    data: *const u8,
    stride: usize,
    bytes: usize,
}

impl Next {
    /// Asks for a part of it: with all of it at once, there would be more requests than the processor can keep.
    #[inline(always)]
    pub(super) unsafe fn prefetch<S: Simd>(&self, part: usize, parts: usize) {
        let rows = 2 * S::LANES;
        for r in part * rows / parts..(part + 1) * rows / parts {
            let row = self.data.wrapping_add(r * self.stride);
            for line in (0..self.bytes + 63).step_by(64) {
                S::prefetch(row.wrapping_add(line));
            }
        }
    }
}

kernel! {
    /// Adds the products of a packed chunk to `out`.
    ///
    /// # Safety
    /// As for [`multiply_rounded`].
    unsafe fn multiply_chunk<S>(
        packed: *const f32, form: Form, x: &[*const Rounded], chunk: usize, next: Next, out: *mut f32,
    ) {
        let most = tokens_at_once(S::ISA, form.halves > 0);
        let blocks = x.len().div_ceil(most);
        let mut start = 0;
        for block in 0..blocks {
            next.prefetch::<S>(block, blocks);
            let end = (block + 1) * x.len() / blocks;
            // Behind the last tokens come the first ones' next chunk.
            let after = Tokens { x: &x[end % x.len()..], chunk: chunk + end / x.len() };
            let (x, out) = (&x[start..end], out.add(start * 2 * S::LANES));
            macro_rules! by_tokens {
                ($($m:literal)*) => {
                    match (x.len(), form.signed) {
                        $(($m, false) if $m <= most => outer::<S, $m, false>(packed, form, x, chunk, after, out),)*
                        $(($m, true) if $m <= most => outer::<S, $m, true>(packed, form, x, chunk, after, out),)*
                        _ => {}
                    }
                };
            }
            by_tokens!(1 2 3 4 5 6);
            start = end;
        }
    }
}

/// A chunk of some tokens, which need not be there.
#[derive(Clone, Copy)]
struct Tokens<'a> {
    x: &'a [*const Rounded],
    chunk: usize,
}

/// [`multiply_chunk`] for `M` tokens; `after` are the ones that come next.
#[inline(always)]
unsafe fn outer<S: Simd, const M: usize, const SIGNED: bool>(
    packed: *const f32,
    form: Form,
    x: &[*const Rounded],
    chunk: usize,
    after: Tokens<'_>,
    out: *mut f32,
) {
    let (mut tokens, mut codes) = ([std::ptr::null(); M], [std::ptr::null(); M]);
    let mut next = [std::ptr::null(); M];
    for t in 0..M {
        tokens[t] = x[t].add(chunk);
        next[t] = after.x[t.min(after.x.len() - 1)].wrapping_add(after.chunk);
        // As `dot4` wants them.
        codes[t] = if SIGNED && S::BIASED { Rounded::biased(tokens[t]) } else { Rounded::codes(tokens[t]) };
    }
    if !SIGNED && S::ISA.gathers_halves() && form.halves > 0 {
        match form.halves {
            2 => outer_halves::<S, M, true>(packed, form, tokens, codes, out),
            _ => outer_halves::<S, M, false>(packed, form, tokens, codes, out),
        }
    } else if form.levels {
        if S::ISA == Isa::Avx512 && form.whole {
            outer_levels::<S, M, SIGNED, true>(packed, form, tokens, codes, next, out);
        } else {
            outer_levels::<S, M, SIGNED, false>(packed, form, tokens, codes, next, out);
        }
    } else {
        outer_plain::<S, M, SIGNED>(packed, form, tokens, codes, out);
    }
}

/// Adds the products of the codes of group `g` to `sums`.
#[inline(always)]
unsafe fn add_group<S: Simd, const M: usize, const SIGNED: bool>(
    packed: *const f32,
    group: usize,
    g: usize,
    codes: [*const u8; M],
    sums: &mut [[S::I; 2]; M],
) {
    for unit in g * group / 4..(g + 1) * group / 4 {
        let w = packed.add((CODES + unit) * 2 * S::LANES).cast::<u8>();
        let w = [S::load_i32(w), S::load_i32(w.add(4 * S::LANES))];
        for t in 0..M {
            let x = S::splat_i32(codes[t].add(4 * unit).cast::<i32>().read());
            for half in 0..2 {
                sums[t][half] = S::dot4::<SIGNED>(sums[t][half], w[half], x);
            }
        }
    }
}

/// Where half of a unit of a packed chunk lies.
#[inline(always)]
unsafe fn unit<S: Simd>(packed: *const f32, unit: usize, half: usize) -> *const f32 {
    packed.add((2 * unit + half) * S::LANES)
}

/// [`outer`] with a scale of its own, `f32`, for each group of weights and of activations.
#[inline(always)]
unsafe fn outer_plain<S: Simd, const M: usize, const SIGNED: bool>(
    packed: *const f32,
    form: Form,
    tokens: [*const Rounded; M],
    codes: [*const u8; M],
    out: *mut f32,
) {
    let Form { group, groups, mins, .. } = form;
    let mut sums = [[S::zero(); 2]; M];
    for t in 0..M {
        for half in 0..2 {
            sums[t][half] = S::load(out.add((2 * t + half) * S::LANES));
        }
    }
    for g in 0..groups {
        let mut whole = starts::<S, M, SIGNED>(packed, g);
        add_group::<S, M, SIGNED>(packed, group, g, codes, &mut whole);
        for half in 0..2 {
            let scale = S::load(unit::<S>(packed, SCALES + g, half));
            for t in 0..M {
                let (worth, _) = Rounded::scales(tokens[t], group);
                let scale = S::mul(scale, S::splat(*worth.add(g)));
                sums[t][half] = S::fma(S::from_i32(whole[t][half]), scale, sums[t][half]);
            }
            if mins {
                let min = S::load(unit::<S>(packed, MINS + g, half));
                for t in 0..M {
                    let (_, less) = Rounded::scales(tokens[t], group);
                    sums[t][half] = S::fma(min, S::splat(*less.add(g)), sums[t][half]);
                }
            }
        }
    }
    for t in 0..M {
        for half in 0..2 {
            S::store(out.add((2 * t + half) * S::LANES), sums[t][half]);
        }
    }
}

/// [`outer`] with whole scales for each group of weights, and one scale for all activations of the chunk. A group's sums are whole numbers;
/// with `WHOLE` so are a chunk's, and else rounded to `f32`, which is faster.
#[inline(always)]
unsafe fn outer_levels<S: Simd, const M: usize, const SIGNED: bool, const WHOLE: bool>(
    packed: *const f32,
    form: Form,
    tokens: [*const Rounded; M],
    codes: [*const u8; M],
    next: [*const Rounded; M],
    out: *mut f32,
) {
    let Form { group, groups, mins, .. } = form;
    let mut all = [[S::zero(); 2]; M];
    let mut all_whole = [[S::splat_i32(0); 2]; M];
    for g in 0..groups {
        if g < Rounded::LINES {
            for t in 0..M {
                Rounded::prefetch::<S>(next[t], SIGNED && S::BIASED, g);
            }
        }
        let mut whole = starts::<S, M, SIGNED>(packed, g);
        add_group::<S, M, SIGNED>(packed, group, g, codes, &mut whole);
        for half in 0..2 {
            let scale = S::load(unit::<S>(packed, SCALES + g, half));
            for t in 0..M {
                if WHOLE {
                    let scaled = S::mul_i32(whole[t][half], S::to_i32(scale));
                    all_whole[t][half] = S::add_i32(all_whole[t][half], scaled);
                } else {
                    all[t][half] = S::fma(S::from_i32(whole[t][half]), scale, all[t][half]);
                }
            }
        }
    }
    if WHOLE {
        all = from_whole::<S, M>(&all_whole);
    }
    let mut less = [[S::splat_i32(0); 2]; M];
    if mins {
        add_mins::<S, M>(packed, form, tokens, &mut less);
    }
    add_chunk::<S, M>(packed, form, tokens, &all, &less, out);
}

/// The same numbers, rounded to `f32`.
#[inline(always)]
pub(super) unsafe fn from_whole<S: Simd, const M: usize>(whole: &[[S::I; 2]; M]) -> [[S::V; 2]; M] {
    let mut all = [[S::zero(); 2]; M];
    for t in 0..M {
        for half in 0..2 {
            all[t][half] = S::from_i32(whole[t][half]);
        }
    }
    all
}

/// What the sums of group `g` begin with.
#[inline(always)]
unsafe fn starts<S: Simd, const M: usize, const SIGNED: bool>(packed: *const f32, g: usize) -> [[S::I; 2]; M] {
    if !(SIGNED && S::BIASED) {
        return [[S::splat_i32(0); 2]; M];
    }
    [[0, 1].map(|half| S::load_i32(unit::<S>(packed, STARTS + g, half).cast())); M]
}

/// [`outer_levels`] for unsigned codes, where products of two (if `TWO`) or more units are first added up in halves.
#[inline(always)]
unsafe fn outer_halves<S: Simd, const M: usize, const TWO: bool>(
    packed: *const f32,
    form: Form,
    tokens: [*const Rounded; M],
    codes: [*const u8; M],
    out: *mut f32,
) {
    let mut all = [[S::splat_i32(0); 2]; M];
    let (group, groups) = (form.group, form.groups);
    for g in 0..groups {
        let scale = [0, 1].map(|half| S::load_i32(unit::<S>(packed, SCALES + g, half).cast()));
        for part in 0..group / 4 / form.halves {
            let mut sums = [[S::splat_i32(0); 2]; M];
            // Two units at a time: with more of them at once, sums are gathered in another order, and not in registers.
            for two in 0..if TWO { 1 } else { form.halves / 2 } {
                let first = g * group / 4 + part * form.halves + 2 * two;
                for u in [first, first + 1] {
                    let w = [0, 1].map(|half| S::load_i32(unit::<S>(packed, CODES + u, half).cast()));
                    for t in 0..M {
                        let x = S::splat_i32(codes[t].add(4 * u).cast::<i32>().read());
                        for half in 0..2 {
                            sums[t][half] = S::dot_halves(sums[t][half], w[half], x);
                        }
                    }
                }
            }
            for t in 0..M {
                for half in 0..2 {
                    all[t][half] = S::dot2(all[t][half], sums[t][half], scale[half]);
                }
            }
        }
    }
    let mut less = [[S::splat_i32(0); 2]; M];
    if form.offset {
        add_mins::<S, M>(packed, form, tokens, &mut all);
    } else if form.mins {
        add_mins::<S, M>(packed, form, tokens, &mut less);
    }
    add_chunk::<S, M>(packed, form, tokens, &from_whole::<S, M>(&all), &less, out);
}

/// Adds the products of whole mins with the sums of activations.
#[inline(always)]
pub(super) unsafe fn add_mins<S: Simd, const M: usize>(
    packed: *const f32,
    form: Form,
    tokens: [*const Rounded; M],
    sums: &mut [[S::I; 2]; M],
) {
    for pair in 0..form.groups / 2 {
        let min = [0, 1].map(|half| S::load_i32(unit::<S>(packed, MIN_PAIRS + pair, half).cast()));
        for t in 0..M {
            let x = S::splat_i32(*Rounded::sum_pairs(tokens[t], form.group).add(pair));
            for half in 0..2 {
                sums[t][half] = S::dot2(sums[t][half], min[half], x);
            }
        }
    }
}

/// Adds a chunk's sums, of codes and (if there are mins, whole) of mins, to `out`.
#[inline(always)]
pub(super) unsafe fn add_chunk<S: Simd, const M: usize>(
    packed: *const f32,
    form: Form,
    tokens: [*const Rounded; M],
    all: &[[S::V; 2]; M],
    less: &[[S::I; 2]; M],
    out: *mut f32,
) {
    for half in 0..2 {
        let factor = S::load(unit::<S>(packed, FACTOR, half));
        let min_factor = if form.mins { S::load(unit::<S>(packed, MIN_FACTOR, half)) } else { S::zero() };
        for t in 0..M {
            let mut sum = S::mul(all[t][half], factor);
            if form.mins {
                let less = S::sub(S::zero(), S::from_i32(less[t][half]));
                sum = S::fma(less, min_factor, sum);
            }
            let at = out.add((2 * t + half) * S::LANES);
            S::store(at, S::fma(sum, S::splat(Rounded::scale(tokens[t])), S::load(at)));
        }
    }
}
