//! Products of tiles of rows of blocks with many tokens: a chunk of a tile is unpacked and turned,
//! so that a vector holds four columns of all its rows, and then multiplied with every token while
//! it is in the nearest cache.

use super::{CHUNK, GROUPS, Quant, Rounded, Store, blocks_of, chunk_bytes, with_quant};
use crate::simd::{Isa, MAX_LANES, Simd, kernel, transpose};
use crate::tile::Rows;

/// Units of a row of a packed chunk: codes (four to a unit), scales, mins.
const UNITS: usize = CHUNK / 4 + 2 * GROUPS;

/// What makes signed bytes unsigned.
const BIAS: u8 = 128;

/// Values that a packed chunk takes.
pub(crate) const fn packed_len(isa: Isa) -> usize {
    UNITS * isa.tile_rows()
}

/// Tokens that are multiplied at once: their sums stay in registers.
const fn tokens_at_once(isa: Isa) -> usize {
    if isa.registers() == 32 { 6 } else { 3 }
}

/// `out[t * tile_rows + r]` is the product of row `first + r` and token `x[t]`, for all `r` below
/// `tile_rows`; behind the last row it is repeated.
///
/// # Safety
/// The machine must have `isa`; `w` must be valid, of a type with blocks, and have row `first`; each
/// of `x` must hold `cols` values in chunks, `packed` [`packed_len`] values, and `out` a row of
/// `tile_rows` for each token.
pub(crate) unsafe fn multiply_rounded(
    isa: Isa,
    w: &Rows,
    first: usize,
    x: &[*const Rounded],
    packed: *mut f32,
    out: *mut f32,
) {
    std::slice::from_raw_parts_mut(out, x.len() * isa.tile_rows()).fill(0.0);
    for chunk in 0..w.cols.div_ceil(CHUNK) {
        let cols = (w.cols - chunk * CHUNK).min(CHUNK);
        let form = with_quant!(w.dtype, Q => {
            pack_chunk::<Q>(isa, w, first, chunk, packed);
            Form { group: Q::GROUP, groups: cols / Q::GROUP, signed: Q::SIGNED, offset: Q::OFFSET, mins: Q::MINS }
        }, else unreachable!("{} has no blocks", w.dtype.name()));
        multiply_chunk(isa, packed, form, x, chunk, out);
    }
}

/// What the codes of a packed chunk mean.
#[derive(Clone, Copy)]
struct Form {
    /// Values in a group, and groups in the chunk.
    group: usize,
    groups: usize,
    signed: bool,
    /// What is taken from all codes.
    offset: u8,
    mins: bool,
}

/// A row of a chunk, unpacked.
#[repr(C, align(64))]
struct Unpacked {
    codes: Store,
    scales: [f32; GROUPS],
    mins: [f32; GROUPS],
}

impl Unpacked {
    const ZERO: Self = Self { codes: Store([0; CHUNK]), scales: [0.0; GROUPS], mins: [0.0; GROUPS] };
}

kernel! {
    /// Packs a chunk of the tile that begins at row `first`: `packed[u * tile_rows + r]` is unit `u` of row `first + r`.
    ///
    /// # Safety
    /// As for [`multiply_rounded`].
    unsafe fn pack_chunk<S, Q: Quant>(w: &Rows, first: usize, chunk: usize, packed: *mut f32) {
        let n = blocks_of::<Q>((w.cols - chunk * CHUNK).min(CHUNK));
        let mut rows = [const { Unpacked::ZERO }; MAX_LANES];
        for half in 0..2 {
            for (r, row) in rows[..S::LANES].iter_mut().enumerate() {
                unpack::<S, Q>(w.row(first + half * S::LANES + r).add(chunk * chunk_bytes::<Q>()), n, row);
            }
            let units = if Q::MINS { UNITS } else { UNITS - GROUPS };
            for u in (0..units).step_by(S::LANES) {
                let mut v = [S::zero(); MAX_LANES];
                for r in 0..S::LANES {
                    v[r] = S::load((&raw const rows[r]).cast::<f32>().add(u));
                }
                transpose::<S>(&mut v);
                for i in 0..S::LANES {
                    S::store(packed.add((2 * (u + i) + half) * S::LANES), v[i]);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn unpack<S: Simd, Q: Quant>(p: *const u8, n: usize, row: &mut Unpacked) {
    Q::scales::<S>(p, n, &mut row.scales, &mut row.mins);
    Q::codes::<S>(p, n, &mut row.codes);
    if Q::SIGNED && S::BIASED {
        for code in &mut row.codes.0 {
            *code ^= BIAS;
        }
    }
}

kernel! {
    /// Adds the products of a packed chunk to `out`.
    ///
    /// # Safety
    /// As for [`multiply_rounded`].
    unsafe fn multiply_chunk<S>(
        packed: *const f32, form: Form, x: &[*const Rounded], chunk: usize, out: *mut f32,
    ) {
        let mut form = form;
        if form.signed && S::BIASED {
            form = Form { signed: false, offset: BIAS, ..form };
        }
        let most = const { tokens_at_once(S::ISA) };
        let blocks = x.len().div_ceil(most);
        let mut start = 0;
        for block in 0..blocks {
            let end = (block + 1) * x.len() / blocks;
            let (x, out) = (&x[start..end], out.add(start * 2 * S::LANES));
            macro_rules! by_tokens {
                ($($m:literal)*) => {
                    match (x.len(), form.signed) {
                        $(($m, false) if $m <= most => {
                            outer::<S, $m, false>(packed, form, x, chunk, out);
                        })*
                        $(($m, true) if $m <= most => {
                            outer::<S, $m, true>(packed, form, x, chunk, out);
                        })*
                        _ => {}
                    }
                };
            }
            by_tokens!(1 2 3 4 5 6);
            start = end;
        }
    }
}

/// [`multiply_chunk`] for `M` tokens.
#[inline(always)]
unsafe fn outer<S: Simd, const M: usize, const SIGNED: bool>(
    packed: *const f32,
    form: Form,
    x: &[*const Rounded],
    chunk: usize,
    out: *mut f32,
) {
    let width = 2 * S::LANES;
    let mut tokens = [std::ptr::null(); M];
    let mut sums = [[S::zero(); 2]; M];
    for t in 0..M {
        tokens[t] = x[t].add(chunk);
        for half in 0..2 {
            sums[t][half] = S::load(out.add(t * width + half * S::LANES));
        }
    }
    let Form { group, groups, mins, .. } = form;
    let offset = i32::from(form.offset);
    for g in 0..groups {
        let mut whole = [[S::splat_i32(0); 2]; M];
        for t in 0..M {
            whole[t] = [S::splat_i32(-offset * *Rounded::sums(tokens[t], group).add(g)); 2];
        }
        for c in (g * group..(g + 1) * group).step_by(4) {
            let codes = packed.add(c / 4 * width).cast::<u8>();
            let codes = [S::load_i32(codes), S::load_i32(codes.add(4 * S::LANES))];
            for t in 0..M {
                let x = S::splat_i32(Rounded::codes(tokens[t]).add(c).cast::<i32>().read());
                for half in 0..2 {
                    whole[t][half] = S::dot4::<SIGNED>(whole[t][half], codes[half], x);
                }
            }
        }
        let scales = packed.add((CHUNK / 4 + g) * width);
        for half in 0..2 {
            let scale = S::load(scales.add(half * S::LANES));
            for t in 0..M {
                let (worth, _) = Rounded::scales(tokens[t], group);
                let scale = S::mul(scale, S::splat(*worth.add(g)));
                sums[t][half] = S::fma(S::from_i32(whole[t][half]), scale, sums[t][half]);
            }
            if mins {
                let min = S::load(scales.add(GROUPS * width + half * S::LANES));
                for t in 0..M {
                    let (_, less) = Rounded::scales(tokens[t], group);
                    sums[t][half] = S::fma(min, S::splat(*less.add(g)), sums[t][half]);
                }
            }
        }
    }
    for t in 0..M {
        for half in 0..2 {
            S::store(out.add(t * width + half * S::LANES), sums[t][half]);
        }
    }
}
