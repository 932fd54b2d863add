//! Functions of one value, and the activations made of them.

use crate::pool::Pool;
use crate::simd::{Simd, kernel};

/// The activation of a gated feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Act {
    /// `x / (1 + exp(-x))`.
    Silu,
    /// The approximation of [`Act::Gelu`] by the hyperbolic tangent.
    GeluTanh,
    /// `x` times the normal distribution function of `x`.
    Gelu,
}

/// `exp(x)`, to about one unit in the last place. Results that would be subnormal are 0: they
/// take processors a hundred times as long.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // Adding and taking away 1.5 * 2^23 rounds to a whole number.
    const ROUND: f32 = 12_582_912.0;
    // Beyond these bounds the result is 0 or infinite.
    const LEAST: f32 = -87.336_54;
    let all = x;
    let x = S::min(S::splat(89.0), S::max(S::splat(LEAST), x));
    // x = n ln 2 + r; the first part of ln 2 has few bits, so that n times it is exact.
    let n = S::sub(S::fma(x, S::splat(std::f32::consts::LOG2_E), S::splat(ROUND)), S::splat(ROUND));
    let r = S::fma(n, S::splat(-0.693_359_4), x);
    let r = S::fma(n, S::splat(2.121_944_4e-4), r);
    // exp(r) = 1 + r + r^2 p(r), the polynomial of Cephes' expf.
    let mut p = S::splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = S::fma(p, r, S::splat(c));
    }
    let p = S::fma(p, S::mul(r, r), S::add(r, S::splat(1.0)));
    S::zero_if_less(all, S::splat(LEAST), S::scale_pow2(p, n))
}

/// `x / (1 + exp(-s))`: `x` times the logistic function of `s`.
#[inline(always)]
unsafe fn logistic<S: Simd>(x: S::V, s: S::V) -> S::V {
    S::div(x, S::add(S::splat(1.0), exp::<S>(S::sub(S::zero(), s))))
}

/// `max(x, 0) - |x| erfc(|x| / sqrt 2) / 2`, with the rational Chebyshev fit of erfc from
/// "Numerical Recipes" (relative error below 1.2e-7).
#[inline(always)]
unsafe fn gelu<S: Simd>(x: S::V) -> S::V {
    let abs = S::max(x, S::sub(S::zero(), x));
    let z = S::mul(abs, S::splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = S::div(S::splat(1.0), S::fma(z, S::splat(0.5), S::splat(1.0)));
    let mut p = S::splat(0.170_872_77);
    for c in [
        -0.822_152_23,
        1.488_515_9,
        -1.135_204,
        0.278_868_07,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_7,
        -1.265_512_2,
    ] {
        p = S::fma(p, t, S::splat(c));
    }
    let erfc = S::mul(t, exp::<S>(S::sub(p, S::mul(z, z))));
    S::sub(S::max(S::zero(), x), S::mul(S::mul(abs, S::splat(0.5)), erfc))
}

/// The activation of a vector.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(crate) unsafe fn activate<S: Simd>(act: Act, x: S::V) -> S::V {
    match act {
        Act::Silu => logistic::<S>(x, x),
        Act::GeluTanh => {
            // 1 + tanh(u) = 2 / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
            let cube = S::fma(S::mul(x, x), S::splat(0.044_715), S::splat(1.0));
            logistic::<S>(x, S::mul(S::mul(x, cube), S::splat(1.595_769_2)))
        }
        Act::Gelu => gelu::<S>(x),
    }
}

/// Replaces each value by its activation.
pub fn act_inplace(pool: &Pool, act: Act, x: &mut [f32]) {
    pool.rows(x, 16, 8, |x, _| {
        // SAFETY: the pool's set was detected.
        unsafe { activate_all(pool.isa(), act, x) }
    });
}

kernel! {
    unsafe fn activate_all<S>(act: Act, x: &mut [f32]) {
        let p = x.as_mut_ptr();
        let whole = x.len() - x.len() % S::LANES;
        for i in (0..whole).step_by(S::LANES) {
            S::store(p.add(i), activate::<S>(act, S::load(p.add(i))));
        }
        if whole < x.len() {
            let part = S::load_part(p.add(whole), x.len() - whole);
            S::store_part(p.add(whole), activate::<S>(act, part), x.len() - whole);
        }
    }
}

#[cfg(test)]
kernel! {
    /// The exponential of every value.
    pub(crate) unsafe fn exp_all<S>(x: &mut [f32]) {
        for x in x {
            S::store_part(x, exp::<S>(S::splat(*x)), 1);
        }
    }
}
