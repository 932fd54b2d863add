//! Products of rows of blocks with a few tokens, two rows at once: what has to be done for every block besides its codes
//! (levels, mins, factors) is done for two.

#![allow(clippy::needless_range_loop, reason = "loops over registers are unrolled by their counters")]

mod avx2;
mod avx512;

use std::arch::x86_64::*;

use super::{CHUNK, Quant, Rounded, chunk_bytes};
use crate::simd::{Isa, MAX_LANES};

/// How far ahead weights are asked for, in bytes: into the nearest cache, and before that twice into the next one, since a processor
/// forgets what it is asked for while it waits for too much else (measured on Zen 4, see docs/performance.md).
const AHEAD: [usize; 3] = [2048, 4096, 8192];

/// How far ahead that is in each of two streams.
type Ahead = [[usize; 2]; 3];

/// What all the work on a block but that on its codes needs, of two rows: half of a vector is of one.
#[derive(Clone, Copy)]
pub(crate) struct TwinLevels {
    /// Bytes as in [`Levels::scales`](super::Levels::scales), and as its mins: 16 of each row.
    pub scales: __m256i,
    pub mins: __m256i,
    /// The halves `d` and `dmin` of the first row, and of the second.
    pub factors: __m128i,
}

impl TwinLevels {
    /// What [`Quant::levels`] gives for each row.
    #[inline(always)]
    pub(super) unsafe fn of<Q: Quant>(p: [*const u8; 2]) -> TwinLevels {
        let (a, b) = (Q::levels(p[0]), Q::levels(p[1]));
        let bytes = |a: [u64; 2], b: [u64; 2]| _mm256_set_epi64x(b[1] as i64, b[0] as i64, a[1] as i64, a[0] as i64);
        let pair = |d: u16, dmin: u16| (u32::from(d) | u32::from(dmin) << 16) as i32;
        let factors = _mm_set_epi32(0, 0, pair(b.d, b.dmin), pair(a.d, a.dmin));
        TwinLevels { scales: bytes(a.scales, b.scales), mins: bytes(a.mins, b.mins), factors }
    }

    /// Of blocks that begin with two halves and twelve bytes of scales and mins of 6 bits.
    #[inline(always)]
    pub(super) unsafe fn of_six_bit_pairs(p: [*const u8; 2]) -> TwinLevels {
        let head = |p: *const u8| _mm_loadu_si128(p.cast());
        let heads = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(head(p[0])), head(p[1]));
        // Of each row: four scales' low bits, four's nibbles, and the same of mins; then the two upper bits of those with nibbles.
        let low = _mm256_broadcastsi128_si256(_mm_setr_epi8(4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15));
        let top = _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, -1, -1, -1, 4, 5, 6, 7, -1, -1, -1, -1, 8, 9, 10, 11));
        let words = |a: i32, b: i32, c: i32, d: i32| _mm256_setr_epi32(a, b, c, d, a, b, c, d);
        let low = _mm256_srlv_epi32(_mm256_shuffle_epi8(heads, low), words(0, 0, 0, 4));
        let low = _mm256_and_si256(low, words(0x3f3f_3f3f, 0x0f0f_0f0f, 0x3f3f_3f3f, 0x0f0f_0f0f));
        let top = _mm256_srli_epi32::<2>(_mm256_shuffle_epi8(heads, top));
        let both = _mm256_or_si256(low, _mm256_and_si256(top, _mm256_set1_epi8(0x30)));
        let halves = |p: *const u8| p.cast::<i32>().read_unaligned();
        TwinLevels {
            scales: both,
            mins: _mm256_bsrli_epi128::<8>(both),
            factors: _mm_set_epi32(0, 0, halves(p[1]), halves(p[0])),
        }
    }
}

/// How a set takes two rows.
///
/// # Safety
/// As for [`Simd`](crate::simd::Simd).
#[allow(clippy::missing_safety_doc, reason = "stated once, above")]
trait TwoRows {
    /// Parts of a product of each row, as they are gathered.
    type Parts: Copy;

    /// Rows of half a tile.
    const HALF: usize;

    unsafe fn zero() -> Self::Parts;
    /// Adds the products of the block of each row at `p` with the chunks at `x`.
    unsafe fn add<Q: Quant, const T: usize>(p: [*const u8; 2], x: [*const Rounded; T], parts: &mut [Self::Parts; T]);
    /// Eight parts in all: half of them belong to the first row.
    unsafe fn sum<Q: Quant>(parts: Self::Parts) -> __m256;
    /// Stores the products of so many first and second rows.
    unsafe fn store(sums: &mut [__m256; MAX_LANES], rows: [usize; 2], out: [*mut f32; 2]);
    /// Asks for what lies so far ahead of a cache line, as [`AHEAD`] has it.
    unsafe fn ask(line: *const u8, ahead: [usize; 3]);
}

/// The products of bytes of each row, which `high` makes words, with the sums of the groups of `x`: the lower four are of the first row.
#[inline(always)]
unsafe fn of_groups<Q: Quant>(bytes: __m256i, high: __m256i, x: *const Rounded) -> __m256i {
    let part = |words: __m256i, i: usize| {
        let sums = _mm_loadu_si128(Rounded::sums(x, Q::GROUP).add(8 * i).cast());
        _mm256_madd_epi16(words, _mm256_broadcastsi128_si256(sums))
    };
    let first = part(_mm256_unpacklo_epi8(bytes, high), 0);
    if Q::GROUP == 32 { first } else { _mm256_add_epi32(first, part(_mm256_unpackhi_epi8(bytes, high), 1)) }
}

/// Rows that are multiplied side by side: of two matrices, or of the halves of one. Each stream is read in order.
pub(super) struct Streams {
    pub start: [*const u8; 2],
    /// Rows of each, the first having as many or one more.
    pub rows: [usize; 2],
    pub stride: usize,
    pub cols: usize,
    /// Where the products with the first token go, and how far from there those with the next.
    pub out: [*mut f32; 2],
    pub width: usize,
    /// Where reading goes on behind their ends.
    pub next: [*const u8; 2],
}

impl Streams {
    /// How far ahead of row `r` is asked for, in each stream, if it is so many rows. It changes twice or so in a stream, and the
    /// loop over its rows needs the registers.
    #[inline(never)]
    fn ahead(&self, r: usize, rows: [usize; 3]) -> Ahead {
        rows.map(|rows| {
            [0, 1].map(|i| {
                let jump = (self.next[i] as usize).wrapping_sub(self.start[i] as usize + self.rows[i] * self.stride);
                let behind_the_end = r + rows >= self.rows[i];
                (rows * self.stride).wrapping_add(if behind_the_end { jump } else { 0 })
            })
        })
    }
}

/// [`rounded_dots`](super::rounded_dots) of two streams with the first `T` tokens, of types whose codes are unsigned and whose
/// scales are levels.
///
/// # Safety
/// As for [`rounded_dots`](super::rounded_dots); the set must be one that [takes two rows](Isa::takes_two_rows).
pub(super) unsafe fn dots<Q: Quant, const T: usize>(isa: Isa, streams: &Streams, x: [*const Rounded; 4]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,gfni,avx2,fma,f16c")]
    unsafe fn wide_gfni<Q: Quant, const T: usize>(streams: &Streams, x: [*const Rounded; 4]) {
        tiles::<avx512::Twin<true>, Q, T>(streams, x);
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn wide<Q: Quant, const T: usize>(streams: &Streams, x: [*const Rounded; 4]) {
        tiles::<avx512::Twin<false>, Q, T>(streams, x);
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn narrow<Q: Quant, const T: usize>(streams: &Streams, x: [*const Rounded; 4]) {
        tiles::<avx2::Twin, Q, T>(streams, x);
    }
    match isa {
        Isa::Avx2 => narrow::<Q, T>(streams, x),
        _ if is_x86_feature_detected!("gfni") => wide_gfni::<Q, T>(streams, x),
        _ => wide::<Q, T>(streams, x),
    }
}

/// All products, some rows of each stream at a time.
#[inline(always)]
unsafe fn tiles<S: TwoRows, Q: Quant, const T: usize>(streams: &Streams, x: [*const Rounded; 4]) {
    let rows_ahead = AHEAD.map(|bytes| bytes.div_ceil(streams.stride));
    let mut ahead = streams.ahead(0, rows_ahead);
    for start in (0..streams.rows[0]).step_by(S::HALF) {
        let mut all = [[_mm256_setzero_ps(); MAX_LANES]; T];
        let count = streams.rows.map(|rows| (rows - start.min(rows)).min(S::HALF));
        for i in 0..count[0] {
            let r = start + i;
            let mut rows = streams.start.map(|start| start.wrapping_add(r * streams.stride));
            if i == count[1] {
                // An odd row is its own second.
                rows[1] = rows[0];
            }
            if rows_ahead.iter().any(|ahead| streams.rows.contains(&(r + ahead))) {
                ahead = streams.ahead(r, rows_ahead);
            }
            let sums = two_rows::<S, Q, T>(rows, streams.cols, ahead, x);
            for t in 0..T {
                all[t][i] = sums[t];
            }
        }
        for t in 0..T {
            S::store(&mut all[t], count, streams.out.map(|out| out.wrapping_add(t * streams.width + start)));
        }
    }
}

/// Asks for what lies ahead of these cache lines.
#[inline(always)]
unsafe fn ask<S: TwoRows>(lines: [*const u8; 2], [near, middle, far]: Ahead) {
    for i in 0..2 {
        S::ask(lines[i], [near[i], middle[i], far[i]]);
    }
}

/// The products of two rows with `T` tokens, in parts.
#[inline(always)]
unsafe fn two_rows<S: TwoRows, Q: Quant, const T: usize>(
    rows: [*const u8; 2],
    cols: usize,
    ahead: Ahead,
    x: [*const Rounded; 4],
) -> [__m256; T] {
    let mut parts = [S::zero(); T];
    for c in 0..cols / CHUNK {
        let p = rows.map(|row| row.add(c * chunk_bytes::<Q>()));
        // As many cache lines as the chunk has, and now and then one more (a loop whose end varies costs more than it spares).
        let bytes = const { chunk_bytes::<Q>() };
        let line = c * bytes / 64;
        let lines = rows.map(|row| row.wrapping_add(64 * line));
        for i in 0..bytes / 64 {
            ask::<S>(lines.map(|at| at.wrapping_add(64 * i)), ahead);
        }
        if (c + 1) * bytes / 64 - line > bytes / 64 {
            ask::<S>(lines.map(|at| at.wrapping_add(bytes / 64 * 64)), ahead);
        }
        S::add::<Q, T>(p, std::array::from_fn(|t| x[t].add(c)), &mut parts);
    }
    // Rows that begin within a cache line may reach into one more.
    let rest = cols / CHUNK * chunk_bytes::<Q>() / 64 * 64;
    ask::<S>(rows.map(|row| row.wrapping_add(rest)), ahead);
    // A loop, since a closure given to a library function need not become part of the kernel.
    let mut sums = [_mm256_setzero_ps(); T];
    for t in 0..T {
        sums[t] = S::sum::<Q>(parts[t]);
    }
    sums
}
