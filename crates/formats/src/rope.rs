//! Rotary position embedding: inverse frequencies after scaling.

use std::f64::consts::PI;

use crate::config::{HEAD_DIM_MAX, POSITIONS_MAX, Section};
use crate::spec::{LongRope, RopeSpec};
use crate::{Config, Result};

/// How the frequencies of the default embedding are changed for longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// YaRN: high frequencies kept, low ones divided, a ramp between.
    Yarn {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Context length of the training before extension.
        original_positions: f64,
        /// Rotations within that context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations within that context below which a frequency is divided.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
        /// Factor on cos and sin.
        attention_factor: f64,
    },
    /// Llama 3: by wavelength, with a smooth middle band.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Context length of the training before extension.
        original_positions: f64,
        /// Wavelengths above `original / low` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high` are kept.
        high_freq_factor: f64,
    },
    /// Each frequency divided by a factor of its own (longrope, for sequences up to the original length).
    PerPair {
        /// The divisors, one for each pair.
        factors: Vec<f64>,
        /// Factor on cos and sin.
        attention_factor: f64,
    },
    /// The base multiplied by `alpha^(dim / (dim - 2))` (Hunyuan).
    Dynamic {
        /// alpha.
        alpha: f64,
    },
}

/// What a configuration says of scaling, in its old or new form; of several kinds of layers, of full attention.
pub(crate) fn section(config: &Config) -> Result<Option<Section>> {
    let scaling = config.opt_section("rope_scaling")?.filter(|s| !s.json().is_empty());
    let section = match scaling {
        Some(scaling) => Some(scaling),
        None => config.opt_section("rope_parameters")?,
    };
    match section {
        Some(section) => Ok(section.opt_section("full_attention")?.or(Some(section))),
        None => Ok(None),
    }
}

/// The embedding that a configuration asks for, in its old (`rope_theta`, `rope_scaling`) or new form
/// (`rope_parameters`).
///
/// # Errors
/// A type that is not known, or values that cannot be.
pub fn from_config(config: &Config, head_dim: usize, default_theta: f64) -> Result<RopeSpec> {
    let section = section(config)?;
    let own = |key: &str| section.as_ref().map_or(Ok(None), |s| s.opt_positive(key));
    let theta = match own("rope_theta")? {
        Some(theta) => theta,
        None => config.opt_positive("rope_theta")?.unwrap_or(default_theta),
    };
    if theta <= 1.0 {
        return Err(config.refuse("rope_theta", "a number above 1 expected"));
    }
    let partial = match own("partial_rotary_factor")? {
        Some(partial) => partial,
        None => config.opt_positive("partial_rotary_factor")?.unwrap_or(1.0),
    };
    let dim = (head_dim as f64 * partial) as usize;
    if partial > 1.0 || dim < 2 || !dim.is_multiple_of(2) || dim > HEAD_DIM_MAX {
        let problem = format!("{dim} of {head_dim} dimensions of a head would rotate; an even number expected");
        return Err(config.refuse("partial_rotary_factor", problem));
    }
    let (scaling, long) = match &section {
        Some(section) if is_longrope(section)? => {
            let (short, long) = longrope(config, section, dim, theta)?;
            (short, Some(long))
        }
        Some(section) => (scaling_of(config, section)?, None),
        None => (RopeScaling::Default, None),
    };
    Ok(RopeSpec {
        dim,
        inv_freq: inverse_frequencies(dim, theta, &scaling),
        attention_factor: match scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::PerPair { attention_factor, .. } => {
                attention_factor as f32
            }
            _ => 1.0,
        },
        interleaved: false,
        long,
    })
}

fn is_longrope(section: &Section) -> Result<bool> {
    let key = if section.get("rope_type").is_some() { "rope_type" } else { "type" };
    Ok(matches!(section.opt_text(key)?, Some("longrope" | "su")))
}

/// Phi-3's scaling: factors for sequences up to the original length, and others beyond.
fn longrope(config: &Config, section: &Section, dim: usize, theta: f64) -> Result<(RopeScaling, LongRope)> {
    let original = original_positions(config, section)?;
    let positions = config.count("max_position_embeddings", POSITIONS_MAX)? as f64;
    let factor = section.opt_positive("factor")?.unwrap_or(positions / original);
    let common = match section.opt_positive("attention_factor")? {
        Some(given) => given,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / original.ln()).sqrt(),
    };
    let list = |key: &str| {
        let list = section.opt_numbers(key)?.ok_or_else(|| section.missing(key))?;
        if list.len() != dim / 2 || list.iter().any(|f| *f <= 0.0) {
            return Err(section.refuse(key, format!("{} numbers above 0 expected", dim / 2)));
        }
        Ok(list)
    };
    let short = RopeScaling::PerPair {
        factors: list("short_factor")?,
        attention_factor: section.opt_positive("short_mscale")?.unwrap_or(common),
    };
    let long = RopeScaling::PerPair { factors: list("long_factor")?, attention_factor: common };
    let long = LongRope {
        above: original as usize,
        inv_freq: inverse_frequencies(dim, theta, &long),
        attention_factor: section.opt_positive("long_mscale")?.unwrap_or(common) as f32,
    };
    Ok((short, long))
}

/// YaRN's `0.1 mscale_all_dim ln(factor) + 1`, by whose square DeepSeek multiplies the softmax's factor; else 1.
///
/// # Errors
/// Values that are no numbers.
pub fn mscale_all_dim(config: &Config) -> Result<f64> {
    let section = match config.opt_section("rope_scaling")? {
        Some(section) => Some(section),
        None => config.opt_section("rope_parameters")?,
    };
    let Some(section) = section else { return Ok(1.0) };
    match (section.opt_number("mscale_all_dim")?, section.opt_positive("factor")?) {
        (Some(m), Some(factor)) if m != 0.0 && factor > 1.0 => Ok(0.1 * m * factor.ln() + 1.0),
        _ => Ok(1.0),
    }
}

fn scaling_of(config: &Config, section: &Section) -> Result<RopeScaling> {
    let key = if section.get("rope_type").is_some() { "rope_type" } else { "type" };
    match section.opt_text(key)?.unwrap_or("default") {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear { factor: section.positive("factor")? }),
        "yarn" => yarn(config, section),
        "llama3" => {
            let (low, high) = (section.positive("low_freq_factor")?, section.positive("high_freq_factor")?);
            if low > high {
                return Err(section.refuse("high_freq_factor", format!("at least low_freq_factor {low} expected")));
            }
            Ok(RopeScaling::Llama3 {
                factor: section.positive("factor")?,
                original_positions: original_positions(config, section)?,
                low_freq_factor: low,
                high_freq_factor: high,
            })
        }
        "dynamic" if section.get("alpha").is_some() => Ok(RopeScaling::Dynamic { alpha: section.positive("alpha")? }),
        _ => {
            Err(section
                .refuse(key, "not supported; known: default, dynamic with alpha, linear, llama3, longrope, yarn"))
        }
    }
}

fn original_positions(config: &Config, section: &Section) -> Result<f64> {
    let key = "original_max_position_embeddings";
    let own = section.opt_count(key, POSITIONS_MAX)?;
    let of_model = || config.opt_count(key, POSITIONS_MAX);
    let positions = own.map_or_else(of_model, |n| Ok(Some(n)))?;
    Ok(match positions {
        Some(n) => n,
        None => config.count("max_position_embeddings", POSITIONS_MAX)?,
    } as f64)
}

fn yarn(config: &Config, section: &Section) -> Result<RopeScaling> {
    let original_positions = original_positions(config, section)?;
    let factor = match section.opt_positive("factor")? {
        Some(factor) => factor,
        None => config.count("max_position_embeddings", POSITIONS_MAX)? as f64 / original_positions,
    };
    let nonzero = |key| Ok::<_, crate::FormatError>(section.opt_number(key)?.filter(|&m| m != 0.0));
    let mscale = |m: f64| {
        if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
    };
    let attention_factor = match section.opt_positive("attention_factor")? {
        Some(given) => given,
        None => match (nonzero("mscale")?, nonzero("mscale_all_dim")?) {
            (Some(m), Some(all)) => mscale(m) / mscale(all),
            _ => mscale(1.0),
        },
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_positions,
        beta_fast: section.opt_positive("beta_fast")?.unwrap_or(32.0),
        beta_slow: section.opt_positive("beta_slow")?.unwrap_or(1.0),
        truncate: section.flag("truncate", true)?,
        attention_factor,
    })
}

/// Inverse frequency of each of the `dim / 2` pairs: `theta^(-2j/dim)`, then scaled.
pub fn inverse_frequencies(dim: usize, theta: f64, scaling: &RopeScaling) -> Vec<f32> {
    let ramp = yarn_ramp(dim, theta, scaling);
    let theta = match *scaling {
        RopeScaling::Dynamic { alpha } if dim > 2 => theta * alpha.powf(dim as f64 / (dim as f64 - 2.0)),
        _ => theta,
    };
    let frequency = |j: usize| {
        let f = theta.powf(-2.0 * j as f64 / dim as f64);
        match scaling {
            RopeScaling::Default | RopeScaling::Dynamic { .. } => f,
            RopeScaling::PerPair { factors, .. } => f / factors.get(j).copied().unwrap_or(1.0),
            RopeScaling::Linear { factor } => f / factor,
            RopeScaling::Yarn { factor, .. } => {
                let (low, high) = ramp;
                let divided = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
                f / factor * divided + f * (1.0 - divided)
            }
            &RopeScaling::Llama3 { factor, original_positions, low_freq_factor, high_freq_factor } => {
                let wavelength = 2.0 * PI / f;
                if wavelength < original_positions / high_freq_factor {
                    f
                } else if wavelength > original_positions / low_freq_factor {
                    f / factor
                } else {
                    let smooth =
                        (original_positions / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    // With equal factors the band is one point, and either end is right.
                    let smooth = if smooth.is_finite() { smooth } else { 1.0 };
                    (1.0 - smooth) * f / factor + smooth * f
                }
            }
        }
    };
    (0..dim / 2).map(|j| frequency(j) as f32).collect()
}

/// The pairs between which YaRN goes from kept to divided frequencies.
fn yarn_ramp(dim: usize, theta: f64, scaling: &RopeScaling) -> (f64, f64) {
    let RopeScaling::Yarn { original_positions, beta_fast, beta_slow, truncate, .. } = *scaling else {
        return (0.0, 1.0);
    };
    let pair_with =
        |rotations: f64| dim as f64 * (original_positions / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (pair_with(beta_fast), pair_with(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    (low, high)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_divides_all_frequencies() {
        let plain = inverse_frequencies(8, 10_000.0, &RopeScaling::Default);
        let scaled = inverse_frequencies(8, 10_000.0, &RopeScaling::Linear { factor: 4.0 });
        assert_eq!(plain, [1.0, 0.1, 0.01, 0.001]);
        assert_eq!(scaled, [0.25, 0.025, 0.0025, 0.00025]);
    }

    #[test]
    fn llama3_with_an_empty_middle_band_is_finite() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            original_positions: 2.0 * PI,
            low_freq_factor: 1.0,
            high_freq_factor: 1.0,
        };
        // The first pair's wavelength 2 pi lies exactly on the border.
        let frequencies = inverse_frequencies(4, 10_000.0, &scaling);
        assert_eq!(frequencies, [1.0, 0.01 / 8.0]);
    }
}
