//! Products of rows of blocks with a few tokens, two rows at once, where vectors have 64 bytes: what has to be done
//! for every block besides its codes (levels, mins, factors) is done for two.

#![allow(clippy::needless_range_loop, reason = "loops over registers are unrolled by their counters")]

use std::arch::x86_64::*;

use super::dots::AHEAD;
use super::{CHUNK, Quant, Rounded, Sink, chunk_bytes};
use crate::simd::{Avx512, MAX_LANES, Simd, Twin};
use crate::tile::Rows;

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

    /// The scales as words, so that the `i`-th of every quarter belong to the `i`-th 32 codes: those of a row are the same
    /// in both of its quarters, or with groups of 16 the even and the odd ones.
    #[inline(always)]
    unsafe fn by_codes<Q: Quant>(&self) -> __m512i {
        if Q::GROUP == 32 {
            let twice = _mm512_castsi256_si512(self.scales);
            let twice = _mm512_shuffle_i32x4::<0b01_01_00_00>(twice, twice);
            let widen = _mm_setr_epi8(0, -1, 1, -1, 2, -1, 3, -1, 4, -1, 5, -1, 6, -1, 7, -1);
            _mm512_shuffle_epi8(twice, _mm512_broadcast_i32x4(widen))
        } else {
            let sort = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
            _mm512_cvtepi8_epi16(_mm256_shuffle_epi8(self.scales, _mm256_broadcastsi128_si256(sort)))
        }
    }
}

/// The words that the halves of a quarter become, for the `i`-th pair of 32 codes.
static WORDS: [[[u8; 2]; 8]; 4] = {
    let mut all = [[[0; 2]; 8]; 4];
    let mut i = 0;
    while i < 32 {
        let word = 2 * (i / 8) + i % 8 / 4;
        all[i / 8][i % 8] = [2 * word as u8, 2 * word as u8 + 1];
        i += 1;
    }
    all
};

/// [`rounded_dots`](super::rounded_dots) for the first `T` tokens, of types whose codes are unsigned and whose scales are levels.
///
/// # Safety
/// The machine must have AVX-512; otherwise as for [`rounded_dots`](super::rounded_dots).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn dots<Q: Quant, const T: usize>(
    w: &Rows,
    first: usize,
    count: usize,
    x: [*const Rounded; 4],
    out: *mut f32,
    width: usize,
) {
    // Each half is read in order, so that the processor sees two streams that go on from row to row.
    let half = count.div_ceil(2);
    let mut all = [[_mm512_setzero_ps(); MAX_LANES]; T];
    // How many rows ahead of each is asked for: whole tiles, in which a stream goes on in the same half, and rows.
    let ahead = AHEAD.map(|bytes| bytes.div_ceil(w.stride)).map(|rows| (rows / half * count, rows % half));
    for r in 0..half {
        let other = (r + half).min(count - 1);
        let ahead = ahead.map(|(tiles, rows)| {
            let skipped = if r + rows < half { 0 } else { count - half };
            (tiles + rows + skipped) * w.stride
        });
        let sums = two_rows::<Q, T>([w.row(first + r), w.row(first + other)], w.cols, ahead, x);
        for t in 0..T {
            all[t][r] = sums[t];
        }
    }
    for t in 0..T {
        let [low, high] = sum_halves(&mut all[t]);
        let out = out.add(t * width);
        _mm512_mask_storeu_ps(out, ((1_u32 << half) - 1) as u16, low);
        _mm512_mask_storeu_ps(out.add(half), ((1_u32 << (count - half)) - 1) as u16, high);
    }
}

/// The sums of the lower halves of sixteen vectors, and of the upper ones.
#[inline(always)]
unsafe fn sum_halves(v: &mut [__m512; MAX_LANES]) -> [__m512; 2] {
    macro_rules! join {
        ($lanes:literal, $pairs:literal) => {
            for i in 0..$pairs {
                let (a, b) = Avx512::swap::<$lanes>(v[2 * i], v[2 * i + 1]);
                v[i] = _mm512_add_ps(a, b);
            }
        };
    }
    join!(1, 8);
    join!(2, 4);
    join!(4, 2);
    [_mm512_shuffle_f32x4::<0b01_00_01_00>(v[0], v[1]), _mm512_shuffle_f32x4::<0b11_10_11_10>(v[0], v[1])]
}

/// Asks for what lies ahead of these cache lines, as far as [`AHEAD`] says.
#[inline(always)]
unsafe fn ask(lines: [*const u8; 2], ahead: [usize; 2]) {
    for line in lines {
        Avx512::prefetch(line.wrapping_add(ahead[0]));
        Avx512::prefetch_far(line.wrapping_add(ahead[1]));
    }
}

/// The products of two rows with `T` tokens, in eight parts each.
#[inline(always)]
unsafe fn two_rows<Q: Quant, const T: usize>(
    rows: [*const u8; 2],
    cols: usize,
    ahead: [usize; 2],
    x: [*const Rounded; 4],
) -> [__m512; T] {
    let mut sums = [_mm512_setzero_ps(); T];
    for c in 0..cols / CHUNK {
        let p = rows.map(|row| row.add(c * chunk_bytes::<Q>()));
        // As many cache lines as the chunk has, and now and then one more (a loop whose end varies costs more than it spares).
        let bytes = const { chunk_bytes::<Q>() };
        let line = c * bytes / 64;
        let lines = rows.map(|row| row.wrapping_add(64 * line));
        for i in 0..bytes / 64 {
            ask(lines.map(|at| at.wrapping_add(64 * i)), ahead);
        }
        if (c + 1) * bytes / 64 - line > bytes / 64 {
            ask(lines.map(|at| at.wrapping_add(bytes / 64 * 64)), ahead);
        }
        let levels = Q::twin_levels(p);
        let mut dot = Dot::<Q, T> {
            x: std::array::from_fn(|t| Rounded::codes(x[t].add(c))),
            levels: levels.by_codes::<Q>(),
            even: [_mm512_setzero_si512(); T],
            sums: [_mm512_setzero_si512(); T],
            of: std::marker::PhantomData,
        };
        Q::twins(p, &mut dot);
        let factors = _mm512_castps128_ps512(_mm_cvtph_ps(levels.factors));
        let which = |i: i32| _mm512_mask_mov_epi32(_mm512_set1_epi32(i), 0xff00, _mm512_set1_epi32(i + 2));
        let d = _mm512_permutexvar_ps(which(0), factors);
        for t in 0..T {
            let x = x[t].add(c);
            let worth = _mm512_set1_ps(Rounded::scale(x));
            let of_groups = || {
                if Q::GROUP == 32 {
                    _mm512_broadcast_i32x4(_mm_loadu_si128(Rounded::sums(x, 32).cast()))
                } else {
                    _mm512_broadcast_i64x4(_mm256_loadu_si256(Rounded::sums(x, 16).cast()))
                }
            };
            let mut all = dot.sums[t];
            if Q::OFFSET > 0 {
                let less = _mm512_madd_epi16(_mm512_cvtepi8_epi16(levels.scales), of_groups());
                all = _mm512_sub_epi32(all, _mm512_mullo_epi32(less, _mm512_set1_epi32(i32::from(Q::OFFSET))));
            }
            let mut sum = _mm512_mul_ps(_mm512_cvtepi32_ps(all), d);
            if Q::MINS {
                let mins = _mm512_cvtepu8_epi16(levels.mins);
                let less = _mm512_cvtepi32_ps(_mm512_madd_epi16(mins, of_groups()));
                sum = _mm512_fnmadd_ps(less, _mm512_permutexvar_ps(which(1), factors), sum);
            }
            sums[t] = _mm512_fmadd_ps(sum, worth, sums[t]);
        }
    }
    // Rows that begin within a cache line may reach into one more.
    let rest = cols / CHUNK * chunk_bytes::<Q>() / 64 * 64;
    ask(rows.map(|row| row.wrapping_add(rest)), ahead);
    sums
}

/// The bytes of every quarter that `which` names. The intrinsic will not do: the compiler knows `which` and takes two shuffles of
/// words instead, each of which costs as much as this one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn shuffled(bytes: __m512i, which: __m512i) -> __m512i {
    let out;
    // SAFETY: the processor has it, and nothing but registers is touched.
    std::arch::asm!("vpshufb {}, {}, {}", out(zmm_reg) out, in(zmm_reg) bytes, in(zmm_reg) which,
        options(pure, nomem, nostack, preserves_flags));
    out
}

/// Adds the products of pairs of words. The compiler makes two instructions of the intrinsic, a product and a sum.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn dot_words(mut sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: as above.
    std::arch::asm!("vpdpwssd {}, {}, {}", inout(zmm_reg) sum, in(zmm_reg) a, in(zmm_reg) b,
        options(pure, nomem, nostack, preserves_flags));
    sum
}

/// Multiplies codes of two rows with `T` tokens, and sums with the levels of their groups.
struct Dot<Q, const T: usize> {
    x: [*const u8; T],
    /// As [`TwinLevels::by_codes`] gives them.
    levels: __m512i,
    /// The products of the last codes of an even number, each four added.
    even: [__m512i; T],
    sums: [__m512i; T],
    of: std::marker::PhantomData<Q>,
}

impl<Q: Quant, const T: usize> Sink<Twin> for Dot<Q, T> {
    #[inline(always)]
    unsafe fn take(&mut self, i: usize, codes: __m512i) {
        const { assert!(Q::SIGNED || 4 * Q::MOST as i32 * 127 <= i16::MAX as i32, "four products fit 16 bits") };
        let fours: [__m512i; T] = std::array::from_fn(|t| {
            let x = _mm512_broadcast_i64x4(_mm256_loadu_si256(self.x[t].add(32 * i).cast()));
            _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x)
        });
        if i.is_multiple_of(2) {
            self.even = fours;
            return;
        }
        let which = _mm512_broadcast_i32x4(_mm_loadu_si128(WORDS[i / 2].as_ptr().cast()));
        let levels = shuffled(self.levels, which);
        for t in 0..T {
            self.sums[t] = dot_words(self.sums[t], _mm512_packs_epi32(self.even[t], fours[t]), levels);
        }
    }
}
