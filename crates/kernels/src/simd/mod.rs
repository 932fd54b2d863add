//! One vector type per instruction set, and the choice between them at run time.
//!
//! A kernel is written once, over [`Simd`], inside [`kernel!`]; the macro compiles it for each
//! instruction set and gives it a leading argument of type [`Isa`].

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
mod bytes;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neon_bytes;
mod portable;
mod portable_bytes;
#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(target_arch = "x86_64")]
mod x86_bytes;

pub(crate) use bytes::{Bytes, Codes, Turned, Upright};
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

use std::sync::OnceLock;

use crate::KernelError;

/// See [`Isa::best`].
static BEST: OnceLock<Isa> = OnceLock::new();

/// The most lanes of any vector.
pub(crate) const MAX_LANES: usize = 16;

/// A set of vector instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// x86-64 with all of [`Isa::Avx512`], and tiles of whole numbers: AMX-INT8 (Linux).
    Amx,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI; where there is GFNI that unpacks codes, with the same results.
    Avx512,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// 64-bit ARM.
    Neon,
    /// Whatever the compiler makes of plain loops.
    Portable,
}

impl Isa {
    /// The widest set that this machine has, or the one that was chosen.
    pub fn best() -> Self {
        *BEST.get_or_init(Self::widest)
    }

    /// The widest set that this machine has. Asked for once: on a virtual machine the processor's answer takes microseconds.
    pub(crate) fn widest() -> Self {
        static WIDEST: OnceLock<Isa> = OnceLock::new();
        *WIDEST.get_or_init(|| Self::available().next().unwrap_or(Self::Portable))
    }

    /// Has [`Isa::best`] be the set of this name (`amx`, `avx512`, `avx2`, `neon`, `portable`), before it is asked for the
    /// first time: to compare sets, or to have the same last bits on different machines.
    ///
    /// # Errors
    /// [`KernelError::Instructions`] if there is no such set, this machine has it not, or another one is in use.
    pub fn choose(name: &str) -> Result<(), KernelError> {
        let isa = Self::available().find(|isa| isa.name() == name);
        let isa = isa.filter(|&isa| *BEST.get_or_init(|| isa) == isa);
        isa.map(|_| ()).ok_or_else(|| KernelError::Instructions { name: name.into() })
    }

    /// Its name, in small letters.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Neon => "neon",
            Self::Portable => "portable",
        }
    }

    /// All that this machine has, the widest first.
    pub fn available() -> impl Iterator<Item = Self> {
        [Self::Amx, Self::Avx512, Self::Avx2, Self::Neon, Self::Portable].into_iter().filter(|i| i.detect())
    }

    fn detect(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512.detect() && amx::permitted(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
                    && Self::Avx2.detect()
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            Self::Portable => true,
            #[allow(unreachable_patterns, reason = "which sets are left depends on the machine")]
            _ => false,
        }
    }

    /// Lanes of an `f32` vector.
    pub(crate) const fn lanes(self) -> usize {
        match self {
            Self::Amx | Self::Avx512 => 16,
            Self::Avx2 => 8,
            Self::Neon | Self::Portable => 4,
        }
    }

    /// Whether its vectors have [`Bytes::dot_halves`].
    pub(crate) const fn gathers_halves(self) -> bool {
        matches!(self, Self::Avx2)
    }

    /// Whether whole sums of few tokens are formed for two rows at once (`quant/twin`).
    #[cfg(target_arch = "x86_64")]
    pub(crate) const fn takes_two_rows(self) -> bool {
        matches!(self, Self::Amx | Self::Avx512 | Self::Avx2)
    }

    /// Vector registers.
    pub(crate) const fn registers(self) -> usize {
        match self {
            Self::Amx | Self::Avx512 | Self::Neon => 32,
            Self::Avx2 | Self::Portable => 16,
        }
    }
}

/// A vector of `f32`. Pointers may lie at any address.
///
/// # Safety
/// Each function demands that the machine has the instruction set `ISA`, and that a pointer is
/// good for the bytes of all lanes.
#[allow(clippy::missing_safety_doc, reason = "stated once, above")]
pub(crate) trait Simd: Bytes {
    /// The vector.
    type V: Copy;
    /// What it is made of.
    const ISA: Isa;
    /// Values in a vector.
    const LANES: usize = Self::ISA.lanes();

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// Widens `LANES` halves.
    unsafe fn load_f16(p: *const u8) -> Self::V;
    /// Widens `LANES` bfloats.
    unsafe fn load_bf16(p: *const u8) -> Self::V;
    /// Widens the bfloats in the lower and in the upper half of each lane.
    unsafe fn split_bf16(v: Self::V) -> (Self::V, Self::V);
    /// Widens `LANES` signed bytes.
    unsafe fn load_i8(p: *const u8) -> Self::V;
    /// Widens whole numbers; exact up to 2^24.
    unsafe fn from_i32(v: Self::I) -> Self::V;
    /// The nearest whole numbers.
    unsafe fn to_i32(v: Self::V) -> Self::I;
    /// The same bits.
    unsafe fn as_i32(v: Self::V) -> Self::I;
    /// The same bits.
    unsafe fn as_f32(v: Self::I) -> Self::V;
    /// Rounds to the nearest whole numbers, ties to even, and stores them as `LANES` signed bytes; any, if they do not fit.
    unsafe fn store_i8(p: *mut u8, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`; rounded once, except in portable code.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The greater; if `b` is no number, that.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The lesser; if `b` is no number, that.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// `v`, but 0 where `a < b`.
    unsafe fn zero_if_less(a: Self::V, b: Self::V, v: Self::V) -> Self::V;
    /// `v * 2^n` for whole `n` in -126..=254.
    unsafe fn scale_pow2(v: Self::V, n: Self::V) -> Self::V;
    /// One step of a transposition: lanes `i` with bit `L` set of `a` change places with
    /// lanes `i - L` of `b`.
    unsafe fn swap<const L: usize>(a: Self::V, b: Self::V) -> (Self::V, Self::V);

    /// Zero in all lanes.
    #[inline(always)]
    unsafe fn zero() -> Self::V {
        Self::splat(0.0)
    }

    /// Loads `n < LANES` values and zeros behind them.
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self::V {
        let mut buffer = [0.0; MAX_LANES];
        std::ptr::copy_nonoverlapping(p.cast::<u8>(), buffer.as_mut_ptr().cast(), 4 * n);
        Self::load(buffer.as_ptr())
    }

    /// Stores the first `n < LANES` values.
    #[inline(always)]
    unsafe fn store_part(p: *mut f32, v: Self::V, n: usize) {
        let mut buffer = [0.0; MAX_LANES];
        Self::store(buffer.as_mut_ptr(), v);
        std::ptr::copy_nonoverlapping(buffer.as_ptr(), p, n);
    }

    /// Stores the first `n` values, up to `LANES`.
    #[inline(always)]
    unsafe fn store_part_or_all(p: *mut f32, v: Self::V, n: usize) {
        if n == Self::LANES { Self::store(p, v) } else { Self::store_part(p, v, n) }
    }

    /// The sum of all lanes.
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        let mut v = [v; MAX_LANES];
        reduce::<Self>(&mut v, 1);
        Self::first(v[0])
    }

    /// The first lane.
    #[inline(always)]
    unsafe fn first(v: Self::V) -> f32 {
        let mut buffer = [0.0; MAX_LANES];
        Self::store(buffer.as_mut_ptr(), v);
        buffer[0]
    }

    /// The greatest of all lanes.
    #[inline(always)]
    unsafe fn greatest(v: Self::V) -> f32 {
        let (a, b) = Self::swap::<1>(v, v);
        let (a, b) = Self::swap::<2>(Self::max(a, b), Self::max(a, b));
        let mut v = Self::max(a, b);
        if Self::LANES > 4 {
            let (a, b) = Self::swap::<4>(v, v);
            v = Self::max(a, b);
        }
        if Self::LANES > 8 {
            let (a, b) = Self::swap::<8>(v, v);
            v = Self::max(a, b);
        }
        Self::first(v)
    }

    /// Asks for the cache line at `p`, which need not be readable.
    unsafe fn prefetch(p: *const u8);
    /// The same, into a cache that is farther from the arithmetic and can wait for more of memory at once.
    unsafe fn prefetch_far(p: *const u8);
    /// Asks for the cache line at `p` to write to it: others give up theirs. Not one by one then, as it is written.
    unsafe fn prefetch_to_write(p: *const u8);
}

/// Transposes the square of the first `LANES` vectors.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(crate) unsafe fn transpose<S: Simd>(v: &mut [S::V; MAX_LANES]) {
    #[inline(always)]
    unsafe fn step<S: Simd, const L: usize>(v: &mut [S::V; MAX_LANES]) {
        if L < S::LANES {
            for i in 0..S::LANES {
                if i & L == 0 {
                    (v[i], v[i | L]) = S::swap::<L>(v[i], v[i | L]);
                }
            }
        }
    }
    step::<S, 1>(v);
    step::<S, 2>(v);
    step::<S, 4>(v);
    step::<S, 8>(v);
}

/// One step of [`fold_lanes`], of lanes that are `L` apart.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(crate) unsafe fn fold_step<S: Simd, const L: usize>(
    v: &mut [S::V; MAX_LANES],
    n: usize,
    join: impl Fn(S::V, S::V) -> S::V,
) {
    if L < S::LANES {
        let pairs = n / (2 * L);
        if pairs == 0 {
            let (a, b) = S::swap::<L>(v[0], v[0]);
            v[0] = join(a, b);
        }
        for i in 0..pairs {
            let (a, b) = S::swap::<L>(v[2 * i], v[2 * i + 1]);
            v[i] = join(a, b);
        }
    }
}

/// Sums the lanes of each of the first `n` vectors, a power of two up to `LANES`, into the first
/// `n` lanes of `v[0]`. The order of the additions is the same for every `n`.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(crate) unsafe fn reduce<S: Simd>(v: &mut [S::V; MAX_LANES], n: usize) {
    fold_lanes::<S>(v, n, |a, b| S::add(a, b));
}

/// As [`reduce`], with another way to join two vectors.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(crate) unsafe fn fold_lanes<S: Simd>(
    v: &mut [S::V; MAX_LANES],
    n: usize,
    join: impl Fn(S::V, S::V) -> S::V + Copy,
) {
    fold_step::<S, 1>(v, n, join);
    fold_step::<S, 2>(v, n, join);
    fold_step::<S, 4>(v, n, join);
    fold_step::<S, 8>(v, n, join);
}

/// Defines `unsafe fn name<S>(args) -> R { .. }` as a kernel: the body is compiled once per
/// instruction set `S: Simd`, and `name(isa, args)` calls the one asked for. Other parameters may
/// follow `S`: types with their trait, and behind a semicolon numbers (`usize`).
///
/// The caller promises that the machine has `isa`, and what the body demands of its arguments.
macro_rules! kernel {
    ($(#[$doc:meta])* $vis:vis unsafe fn $name:ident<
        $S:ident $(, $T:ident : $bound:ident)* $(; $N:ident)*
    >(
        $($arg:ident : $ty:ty),* $(,)?
    ) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments, reason = "kernels take plain arguments")]
        $vis unsafe fn $name<$($T: $bound,)* $(const $N: usize),*>(isa: $crate::simd::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            unsafe fn body<$S: $crate::simd::Simd, $($T: $bound,)* $(const $N: usize),*>(
                $($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
            unsafe fn avx512<$($T: $bound,)* $(const $N: usize),*>($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::simd::Avx512, $($T,)* $($N),*>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2<$($T: $bound,)* $(const $N: usize),*>($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::simd::Avx2, $($T,)* $($N),*>($($arg),*)
            }
            #[cfg(target_arch = "aarch64")]
            #[target_feature(enable = "neon")]
            unsafe fn neon<$($T: $bound,)* $(const $N: usize),*>($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::simd::Neon, $($T,)* $($N),*>($($arg),*)
            }
            match isa {
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Isa::Amx | $crate::simd::Isa::Avx512 => avx512::<$($T,)* $($N),*>($($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Isa::Avx2 => avx2::<$($T,)* $($N),*>($($arg),*),
                #[cfg(target_arch = "aarch64")]
                $crate::simd::Isa::Neon => neon::<$($T,)* $($N),*>($($arg),*),
                _ => body::<$crate::simd::Portable, $($T,)* $($N),*>($($arg),*),
            }
        }
    };
}
pub(crate) use kernel;
