//! Products of tiles with many tokens where there is AMX.
//!
//! The whole scale of a group is multiplied into its codes, so that a chunk's sum is one product of 256 numbers. These
//! are too large for a byte, so they become two planes: `code * scale = low + 128 * high`. All sums are whole
//! numbers, hence the same as without AMX.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::pack::{CODES, Form, PLANE, SCALES};
use super::tiles::{Next, add_chunk, add_mins, from_whole};
use super::{CHUNK, Rounded};
use crate::simd::amx::{ROWS, Tiles};
use crate::simd::{Avx512, Simd};

/// From this many tokens on tiles of activations pay.
pub(super) const FROM: usize = 24;

/// The rows that blocks of so many tokens need: as even as can be.
pub(super) fn block_rows(tokens: usize) -> usize {
    tokens.div_ceil(tokens.div_ceil(ROWS))
}

/// Codes times scales, as two planes; the lower takes the place of the codes. Meanwhile what comes next is asked for, a little at a time.
///
/// # Safety
/// The machine must have AVX-512; `packed` must be a chunk of [`packed_len`](super::packed_len) values whose groups have whole scales.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn split_planes(packed: *mut f32, form: Form, next: Next) {
    if form.signed { split::<true>(packed, form, next) } else { split::<false>(packed, form, next) }
}

/// [`split_planes`] of codes that are signed or not.
#[inline(always)]
unsafe fn split<const SIGNED: bool>(packed: *mut f32, form: Form, next: Next) {
    let low_bytes = _mm512_set1_epi16(0xff);
    let seven = _mm512_set1_epi8(0x7f);
    for g in 0..form.groups {
        for half in 0..2 {
            next.prefetch::<Avx512>(2 * g + half, 2 * form.groups);
            let at = |unit: usize| packed.add((2 * unit + half) * 16).cast::<__m512i>();
            let scale = _mm512_cvtps_epi32(_mm512_load_ps(at(SCALES + g).cast()));
            let scale = _mm512_mask_mov_epi16(scale, 0xaaaa_aaaa, _mm512_slli_epi32::<16>(scale));
            for u in g * form.group / 4..(g + 1) * form.group / 4 {
                let codes = _mm512_load_si512(at(CODES + u));
                let (even, odd) = if SIGNED {
                    (_mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(codes)), _mm512_srai_epi16::<8>(codes))
                } else {
                    (_mm512_and_si512(codes, low_bytes), _mm512_srli_epi16::<8>(codes))
                };
                let (even, odd) = (_mm512_mullo_epi16(even, scale), _mm512_mullo_epi16(odd, scale));
                // The lower byte of each half of `a`, and the upper of `b`.
                let join = |a, b| _mm512_ternarylogic_epi32::<0b1100_1010>(low_bytes, a, b);
                let low = _mm512_and_si512(join(even, _mm512_slli_epi16::<8>(odd)), seven);
                let high = join(_mm512_srli_epi16::<7>(even), _mm512_add_epi16(odd, odd));
                _mm512_store_si512(at(CODES + u), low);
                _mm512_store_si512(at(PLANE + u), high);
            }
        }
    }
}

/// Some tokens' codes, one row of 256 each.
#[repr(align(64))]
struct Rows(#[allow(dead_code, reason = "read through pointers")] [i8; CHUNK * ROWS]);

/// Sums by plane, half, token and row.
#[repr(align(64))]
struct Sums(#[allow(dead_code, reason = "read through pointers")] [i32; 64 * ROWS]);

/// Adds the products of a packed chunk in planes to `out`.
///
/// # Safety
/// The machine must have AMX; otherwise as for [`multiply_rounded`](super::multiply_rounded), with whole chunks. `tiles` must be
/// for [`block_rows`] of the tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn multiply_chunk(
    tiles: &Tiles,
    packed: *const f32,
    form: Form,
    x: &[*const Rounded],
    chunk: usize,
    out: *mut f32,
) {
    let planes = [CODES, PLANE].map(|unit| packed.add(2 * unit * Avx512::LANES).cast::<u8>());
    let (mut rows, mut sums) = (MaybeUninit::<Rows>::uninit(), MaybeUninit::<[Sums; 2]>::uninit());
    let (rows, sums) = (rows.as_mut_ptr().cast::<u8>(), sums.as_mut_ptr().cast::<i32>());
    let (each, blocks) = (tiles.rows(), x.len().div_ceil(tiles.rows()));
    // The last block begins early enough to have all its rows; what it has in common with the one before is added once.
    let first_of = |block: usize| (block * each).min(x.len() - each);
    let sums_of = |block: usize| sums.add(block % 2 * 64 * ROWS);
    // A block's sums are joined while the next block's are formed.
    for block in 0..=blocks {
        if block < blocks {
            let x = &x[first_of(block)..][..each];
            let (codes, stride) = match even_stride(x) {
                Some(stride) => (Rounded::codes(x[0].add(chunk)), stride),
                None => {
                    for (i, x) in x.iter().enumerate() {
                        std::ptr::copy_nonoverlapping(Rounded::codes(x.add(chunk)), rows.add(i * CHUNK), CHUNK);
                    }
                    (rows.cast_const(), CHUNK)
                }
            };
            tiles.multiply(codes, stride, planes, sums_of(block));
        }
        let Some(done) = block.checked_sub(1) else { continue };
        let (first, mut t) = (first_of(done), done * each);
        let end = first + each;
        macro_rules! finish {
            ($n:literal) => {
                while end - t >= $n {
                    let tokens = std::array::from_fn(|i| x[t + i].add(chunk));
                    finish::<$n>(packed, form, tokens, sums_of(done), t - first, out.add(t * 2 * Avx512::LANES));
                    t += $n;
                }
            };
        }
        finish!(4);
        finish!(1);
    }
}

/// Joins the sums of both planes of some tokens, from the `row`-th on, and adds them to `out`.
#[inline(always)]
unsafe fn finish<const M: usize>(
    packed: *const f32,
    form: Form,
    tokens: [*const Rounded; M],
    sums: *const i32,
    row: usize,
    out: *mut f32,
) {
    let zero = _mm512_setzero_si512();
    let (mut all, mut less) = ([[zero; 2]; M], [[zero; 2]; M]);
    for t in 0..M {
        for half in 0..2 {
            let of = |plane: usize| _mm512_load_si512(sums.add(((2 * plane + half) * ROWS + row + t) * 16).cast());
            all[t][half] = _mm512_add_epi32(of(0), _mm512_slli_epi32::<7>(of(1)));
        }
    }
    if form.mins {
        add_mins::<Avx512, M>(packed, form, tokens, &mut less);
    }
    add_chunk::<Avx512, M>(packed, form, tokens, &from_whole::<Avx512, M>(&all), &less, out);
}

/// The bytes from each of some rows to the next, if they are all the same.
fn even_stride(x: &[*const Rounded]) -> Option<usize> {
    let (&first, rest) = x.split_first()?;
    let stride = rest.first().map_or(0, |next| (*next as usize).wrapping_sub(first as usize));
    let even = |(i, next): (usize, &*const Rounded)| *next as usize == (first as usize).wrapping_add((i + 1) * stride);
    rest.iter().enumerate().all(even).then_some(stride)
}
