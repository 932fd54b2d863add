//! AMX: registers that hold a tile of 16 rows of 64 bytes, and one instruction that multiplies two of them.
//!
//! Rust has no stable functions for it, so the instructions are written out. The compiler knows nothing of tiles and never
//! uses them itself; what a thread's tiles hold matters only within one block of instructions.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};

/// Rows of a tile.
pub(crate) const ROWS: usize = 16;

/// Bytes of a row.
const ROW_BYTES: usize = 64;

/// Whether the processor has AMX-INT8 and the system lets this process use it. The system is asked for leave, since a
/// thread's state becomes 8 KiB larger.
pub(super) fn permitted() -> bool {
    const TILE_AND_INT8: u32 = 0b11 << 24;
    if __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & TILE_AND_INT8 != TILE_AND_INT8 {
        return false;
    }
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        // SAFETY: it takes two numbers, and changes nothing but what this process may use; systems that do not know it refuse.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    false
}

/// The shapes of the eight tiles, as the processor reads them.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    unused: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// While it lives this thread's tiles are shaped for [`Tiles::multiply`].
pub(crate) struct Tiles {
    rows: usize,
}

impl Tiles {
    /// For products with up to `rows` rows of activations, at most [`ROWS`].
    ///
    /// # Safety
    /// The machine must have [`Isa::Amx`](super::Isa::Amx), and this thread no other of these.
    pub(crate) unsafe fn new(rows: usize) -> Self {
        assert!((1..=ROWS).contains(&rows), "{rows} rows of a tile");
        let mut shapes = Shapes { palette: 1, start_row: 0, unused: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for tile in 0..8 {
            shapes.row_bytes[tile] = ROW_BYTES as u16;
            // The first five have a row for each of activations.
            shapes.rows[tile] = if tile < 5 { rows } else { ROWS } as u8;
        }
        // SAFETY: the processor has it and reads 64 bytes, which these are.
        asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, preserves_flags, readonly));
        Self { rows }
    }

    /// The rows it is for.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// The products of [`Tiles::rows`] rows of 256 signed bytes, `stride` bytes apart at `x`, with two planes of signed bytes: `out[p][h][r][c]` is
    /// the sum over `k` of `x[r][k]` and byte `k % 4` of lane `c` of the vector of 64 bytes at `planes[p] + 64 (2 (k / 4) + h)`.
    ///
    /// # Safety
    /// `x` must hold the rows, each of `planes` 128 vectors, and `out` 64.
    #[inline(always)]
    pub(crate) unsafe fn multiply(&self, x: *const u8, stride: usize, planes: [*const u8; 2], out: *mut i32) {
        // SAFETY: what is read and written is what the caller promises; tiles are of no use to anybody else.
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            // Sixteen vectors of four bytes to a lane are 64 bytes of a row.
            "tileloadd tmm4, [{x} + {stride}]",
            "tileloadd tmm5, [{low} + {pair}]",
            "tileloadd tmm6, [{low} + {pair} + 64]",
            "tdpbssd tmm0, tmm4, tmm5",
            "tileloadd tmm7, [{high} + {pair}]",
            "tdpbssd tmm1, tmm4, tmm6",
            "tileloadd tmm5, [{high} + {pair} + 64]",
            "tdpbssd tmm2, tmm4, tmm7",
            "tileloadd tmm6, [{low} + {pair} + 2048]",
            "tdpbssd tmm3, tmm4, tmm5",
            "tileloadd tmm4, [{x} + {stride} + 64]",
            "tileloadd tmm7, [{low} + {pair} + 2112]",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{high} + {pair} + 2048]",
            "tdpbssd tmm1, tmm4, tmm7",
            "tileloadd tmm6, [{high} + {pair} + 2112]",
            "tdpbssd tmm2, tmm4, tmm5",
            "tileloadd tmm7, [{low} + {pair} + 4096]",
            "tdpbssd tmm3, tmm4, tmm6",
            "tileloadd tmm4, [{x} + {stride} + 128]",
            "tileloadd tmm5, [{low} + {pair} + 4160]",
            "tdpbssd tmm0, tmm4, tmm7",
            "tileloadd tmm6, [{high} + {pair} + 4096]",
            "tdpbssd tmm1, tmm4, tmm5",
            "tileloadd tmm7, [{high} + {pair} + 4160]",
            "tdpbssd tmm2, tmm4, tmm6",
            "tileloadd tmm5, [{low} + {pair} + 6144]",
            "tdpbssd tmm3, tmm4, tmm7",
            "tileloadd tmm4, [{x} + {stride} + 192]",
            "tileloadd tmm6, [{low} + {pair} + 6208]",
            "tdpbssd tmm0, tmm4, tmm5",
            "tileloadd tmm7, [{high} + {pair} + 6144]",
            "tdpbssd tmm1, tmm4, tmm6",
            "tileloadd tmm5, [{high} + {pair} + 6208]",
            "tilestored [{out} + {line}], tmm0",
            "tdpbssd tmm2, tmm4, tmm7",
            "tilestored [{out} + {line} + 1024], tmm1",
            "tdpbssd tmm3, tmm4, tmm5",
            "tilestored [{out} + {line} + 2048], tmm2",
            "tilestored [{out} + {line} + 3072], tmm3",
            x = in(reg) x,
            stride = in(reg) stride,
            low = in(reg) planes[0],
            high = in(reg) planes[1],
            pair = in(reg) 2 * ROW_BYTES,
            out = in(reg) out,
            line = in(reg) ROW_BYTES,
            options(nostack, preserves_flags),
        );
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: it was made, so the processor has it. Without shapes the system need not keep this thread's tiles.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) }
    }
}
