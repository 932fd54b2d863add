//! Tiles of rows of blocks, a chunk at a time: unpacked and turned upright, so that a vector holds four columns of all rows.

use super::{CHUNK, GROUPS, Quant, Sink, Store, blocks_of, chunk_bytes};
use crate::simd::{Isa, MAX_LANES, Simd, Turned, Upright, kernel, transpose};
use crate::tile::Rows;

/// A packed chunk is made of units, each a value of four bytes of every row. First the codes, four to a unit.
pub(super) const CODES: usize = 0;

/// Of every group the scale, `f32`; with [`Form::halves`] twice in the halves of a whole number.
pub(super) const SCALES: usize = CHUNK / 4;

/// Without levels, mins: `f32`, of every group of 32.
pub(super) const MINS: usize = SCALES + 8;

/// What every group's sum of products begins with (see [`Form::signed`]).
pub(super) const STARTS: usize = SCALES + GROUPS;

/// With levels, whole mins: two groups to a unit.
pub(super) const MIN_PAIRS: usize = STARTS + GROUPS;

/// With levels, the factors of scales and of mins, `f32`.
pub(super) const FACTOR: usize = MIN_PAIRS + GROUPS / 2;
pub(super) const MIN_FACTOR: usize = FACTOR + 1;

const UNITS: usize = FACTOR + 2;

/// With AMX, the upper plane of codes times scales, as the lower one takes the place of codes: four to a unit.
#[cfg(target_arch = "x86_64")]
pub(super) const PLANE: usize = UNITS;

/// Values that a packed chunk takes.
pub(crate) const fn packed_len(isa: Isa) -> usize {
    let planes = if matches!(isa, Isa::Amx) { CHUNK / 4 } else { 0 };
    (UNITS + planes) * isa.tile_rows()
}

/// What a packed chunk holds.
#[derive(Clone, Copy)]
pub(super) struct Form {
    /// Values in a group, and groups in the chunk.
    pub group: usize,
    pub groups: usize,
    /// Whether codes are signed. Where instructions want activations with 128 added then, sums begin with
    /// -128 times that of the codes.
    pub signed: bool,
    pub mins: bool,
    pub levels: bool,
    /// With levels: units of unsigned codes whose products fit halves when they are added up; 0 if that is not done. Scales are
    /// pairs of halves then, and what is taken from codes is in the whole mins: minus scale times [`Quant::OFFSET`].
    pub halves: usize,
    pub offset: bool,
    /// Whether a chunk's sums are to be whole numbers, since with AMX they are with many tokens.
    pub whole: bool,
}

impl Form {
    pub(super) const fn of<Q: Quant>(isa: Isa, cols: usize) -> Self {
        let halves = if isa.gathers_halves() { halves::<Q>() } else { 0 };
        let offset = Q::OFFSET > 0;
        let signed = Q::SIGNED || offset && halves == 0;
        let whole = matches!(isa, Isa::Amx);
        Self {
            whole,
            group: Q::GROUP,
            groups: cols / Q::GROUP,
            signed,
            mins: Q::MINS,
            levels: Q::LEVELS,
            halves,
            offset,
        }
    }
}

/// See [`Form::halves`].
const fn halves<Q: Quant>() -> usize {
    if !Q::LEVELS || Q::SIGNED {
        return 0;
    }
    // Each half gets two products from a unit.
    let (fit, group) = (i16::MAX as usize / (2 * 127 * Q::MOST as usize), Q::GROUP / 4);
    if fit >= group { group } else { 1 << fit.ilog2() }
}

/// Whether packed codes are as in the file, and not signed.
const fn in_halves<S: Simd, Q: Quant>() -> bool {
    S::ISA.gathers_halves() && halves::<Q>() > 0
}

/// What a row of a chunk has besides codes: 64 bytes, of which those without a meaning are whatever they were.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
union Record {
    /// Scales, and from the ninth on mins (types with mins have eight groups).
    plain: [f32; GROUPS],
    levels: LevelRecord,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct LevelRecord {
    scales: [u64; 2],
    mins: [u64; 2],
}

kernel! {
    /// Packs a chunk of the tile that begins at row `first`: `packed[u * tile_rows + r]` is unit `u` of row `first + r`.
    /// Behind the last row it is repeated.
    ///
    /// # Safety
    /// The machine must have the set of `S`; `w` must be valid, of type `Q`, and have this row and chunk, and `packed` hold
    /// [`packed_len`] values.
    pub(super) unsafe fn pack_chunk<S, Q: Quant>(w: &Rows, first: usize, chunk: usize, packed: *mut f32) {
        let (n, bytes) = (blocks_of::<Q>((w.cols - chunk * CHUNK).min(CHUNK)), const { chunk_bytes::<Q>() });
        for half in 0..2 {
            let packed = packed.add(half * S::LANES);
            let mut rows = [w.data; MAX_LANES];
            for (r, row) in rows[..S::LANES].iter_mut().enumerate() {
                *row = w.row(first + half * S::LANES + r).add(chunk * bytes);
            }
            let mut sums = [S::splat_i32(0); GROUPS];
            if Q::TURNS {
                let mut sink = Columns::<S, Q> { packed, sums, of: std::marker::PhantomData };
                Q::turned::<S>(Upright::new(&rows), n, &mut sink);
                sums = sink.sums;
            } else {
                turn_stored::<S, Q>(&rows, n, packed, &mut sums);
            }
            pack_records::<S, Q>(&rows, n, packed, &sums);
        }
    }
}

/// What is added to an upright vector's group sums: 128 times -1, or nothing.
#[inline(always)]
unsafe fn start<S: Simd>(sum: S::I) -> S::I {
    S::mul_i32(sum, S::splat_i32(if S::BIASED { -128 } else { 0 }))
}

/// Whether the sums of codes are wanted.
const fn sums_wanted<S: Simd, Q: Quant>() -> bool {
    S::BIASED && (Q::SIGNED || Q::OFFSET > 0)
}

/// Stores turned codes, and adds up those of each group.
struct Columns<S: Simd, Q> {
    packed: *mut f32,
    sums: [S::I; GROUPS],
    of: std::marker::PhantomData<Q>,
}

impl<S: Simd, Q: Quant> Sink<Turned<S>> for Columns<S, Q> {
    #[inline(always)]
    unsafe fn take(&mut self, i: usize, codes: [S::I; 8]) {
        for u in 0..8 {
            let mut code = codes[u];
            if Q::OFFSET > 0 && !in_halves::<S, Q>() {
                code = S::sub_bytes_i32(code, S::splat_i32(i32::from_ne_bytes([Q::OFFSET; 4])));
            }
            S::store_i32(self.packed.add((CODES + 8 * i + u) * 2 * S::LANES).cast(), code);
            if sums_wanted::<S, Q>() {
                add_code::<S, Q>(&mut self.sums, 8 * i + u, code);
            }
        }
    }
}

/// Adds the four codes of a unit to their group's sum.
#[inline(always)]
unsafe fn add_code<S: Simd, Q: Quant>(sums: &mut [S::I; GROUPS], unit: usize, code: S::I) {
    let sum = &mut sums[4 * unit / Q::GROUP];
    // With ones for activations, which are unsigned where sums are wanted.
    *sum = S::dot4::<true>(*sum, code, S::splat_i32(0x0101_0101));
}

/// Codes of types that unpack only along their rows.
#[inline(always)]
unsafe fn turn_stored<S: Simd, Q: Quant>(
    rows: &[*const u8; MAX_LANES],
    n: usize,
    packed: *mut f32,
    sums: &mut [S::I; GROUPS],
) {
    let mut codes = [const { Store([0; CHUNK]) }; MAX_LANES];
    for (row, codes) in rows[..S::LANES].iter().zip(&mut codes) {
        Q::codes::<S>(*row, n, codes);
        if Q::OFFSET > 0 && !in_halves::<S, Q>() {
            codes.0.iter_mut().for_each(|code| *code = code.wrapping_sub(Q::OFFSET));
        }
    }
    for u in (0..CHUNK / 4).step_by(S::LANES) {
        let mut v = [S::zero(); MAX_LANES];
        for r in 0..S::LANES {
            v[r] = S::load(codes[r].0.as_ptr().cast::<f32>().add(u));
        }
        transpose::<S>(&mut v);
        for i in 0..S::LANES {
            let at = packed.add((CODES + u + i) * 2 * S::LANES);
            S::store(at, v[i]);
            if sums_wanted::<S, Q>() {
                add_code::<S, Q>(sums, u + i, S::load_i32(at.cast()));
            }
        }
    }
}

/// Scales and mins, and what sums begin with.
#[inline(always)]
unsafe fn pack_records<S: Simd, Q: Quant>(
    rows: &[*const u8; MAX_LANES],
    n: usize,
    packed: *mut f32,
    sums: &[S::I; GROUPS],
) {
    let mut records = [Record { plain: [0.0; GROUPS] }; MAX_LANES];
    let (mut factors, mut min_factors) = ([0_u16; MAX_LANES], [0_u16; MAX_LANES]);
    for (r, (row, record)) in rows[..S::LANES].iter().zip(&mut records).enumerate() {
        if Q::LEVELS {
            let levels = Q::levels(*row);
            record.levels = LevelRecord { scales: levels.scales, mins: levels.mins };
            (factors[r], min_factors[r]) = (levels.d, levels.dmin);
        } else {
            let mut mins = [0.0; GROUPS];
            Q::scales::<S>(*row, n, &mut record.plain, &mut mins);
            if Q::MINS {
                record.plain[8..].copy_from_slice(&mins[..8]);
            }
        }
    }
    let mut upright = [S::splat_i32(0); GROUPS];
    for u in (0..GROUPS).step_by(S::LANES) {
        let mut v = [S::zero(); MAX_LANES];
        for r in 0..S::LANES {
            v[r] = S::load((&raw const records[r]).cast::<f32>().add(u));
        }
        transpose::<S>(&mut v);
        for i in 0..S::LANES {
            upright[u + i] = S::as_i32(v[i]);
        }
    }
    let put = |unit: usize, v: S::I| S::store_i32(packed.add(unit * 2 * S::LANES).cast(), v);
    // Whole numbers as the two halves of their lanes.
    let pair_of = |low: S::I, high: S::I| S::or_i32(S::and_i32(low, S::splat_i32(0xffff)), S::shl_i32(high, 16));
    if !Q::LEVELS {
        for (i, v) in upright.into_iter().enumerate() {
            put(SCALES + i, v);
        }
        if sums_wanted::<S, Q>() {
            for g in 0..CHUNK / Q::GROUP {
                put(STARTS + g, start::<S>(sums[g]));
            }
        }
        return;
    }
    let mut less = [S::splat_i32(0); GROUPS];
    for g in 0..CHUNK / Q::GROUP {
        // The byte with its sign.
        let scale = S::sar_i32(S::shl_i32(upright[g / 4], 24 - 8 * (g % 4) as i32), 24);
        put(SCALES + g, if in_halves::<S, Q>() { pair_of(scale, scale) } else { S::as_i32(S::from_i32(scale)) });
        less[g] = S::mul_i32(scale, S::splat_i32(-i32::from(Q::OFFSET)));
        if sums_wanted::<S, Q>() {
            put(STARTS + g, start::<S>(sums[g]));
        }
    }
    if in_halves::<S, Q>() && Q::OFFSET > 0 {
        for pair in 0..CHUNK / Q::GROUP / 2 {
            put(MIN_PAIRS + pair, pair_of(less[2 * pair], less[2 * pair + 1]));
        }
    }
    if Q::MINS {
        for pair in 0..CHUNK / Q::GROUP / 2 {
            let two = S::shr_i32(upright[4 + pair / 2], 16 * (pair % 2) as i32);
            let byte = S::splat_i32(0xff);
            put(MIN_PAIRS + pair, pair_of(S::and_i32(two, byte), S::and_i32(S::shr_i32(two, 8), byte)));
        }
        put(MIN_FACTOR, S::as_i32(S::load_f16(min_factors.as_ptr().cast())));
    }
    put(FACTOR, S::as_i32(S::load_f16(factors.as_ptr().cast())));
}
