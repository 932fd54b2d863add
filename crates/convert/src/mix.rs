//! Which type each tensor gets: the rules of llama.cpp's `llama-quantize`, so that a name means what its users expect.

use quorate_kernels::DType;

/// A named choice of types.
#[derive(Debug)]
pub struct Mix {
    /// Its name, as users and files write it.
    pub name: &'static str,
    /// The type of most matrices.
    pub base: DType,
    /// `general.file_type` of files.
    pub file_type: u64,
    rule: Rule,
}

/// What some matrices get in place of the base type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// All the same, but for the output.
    Plain,
    /// Stacked experts get it, all others `Q8_0`.
    Experts,
    Q2K,
    Q3KS,
    Q3KM,
    Q3KL,
    Q4KS,
    Q4KM,
    Q5KM,
    /// With importance the first downs get the type with an offset.
    Small,
    Iq4,
}

const fn mix(name: &'static str, base: DType, file_type: u64, rule: Rule) -> Mix {
    Mix { name, base, file_type, rule }
}

/// All mixes. `Q4_K`, `Q5_K` and `Q6_K` are those types throughout (the output is `Q6_K`).
pub static MIXES: &[Mix] = &[
    mix("F32", DType::F32, 0, Rule::Plain),
    mix("F16", DType::F16, 1, Rule::Plain),
    mix("BF16", DType::BF16, 32, Rule::Plain),
    mix("Q8_0", DType::Q8_0, 7, Rule::Plain),
    mix("Q6_K", DType::Q6_K, 18, Rule::Plain),
    mix("Q5_K_M", DType::Q5_K, 17, Rule::Q5KM),
    mix("Q5_K_S", DType::Q5_K, 16, Rule::Plain),
    mix("Q5_K", DType::Q5_K, 16, Rule::Plain),
    mix("Q4_K_M", DType::Q4_K, 15, Rule::Q4KM),
    mix("Q4_K_S", DType::Q4_K, 14, Rule::Q4KS),
    mix("Q4_K", DType::Q4_K, 14, Rule::Plain),
    mix("Q3_K_L", DType::Q3_K, 13, Rule::Q3KL),
    mix("Q3_K_M", DType::Q3_K, 12, Rule::Q3KM),
    mix("Q3_K_S", DType::Q3_K, 11, Rule::Q3KS),
    mix("Q2_K", DType::Q2_K, 10, Rule::Q2K),
    mix("Q5_1", DType::Q5_1, 9, Rule::Plain),
    mix("Q5_0", DType::Q5_0, 8, Rule::Small),
    mix("Q4_1", DType::Q4_1, 3, Rule::Plain),
    mix("Q4_0", DType::Q4_0, 2, Rule::Small),
    mix("IQ4_NL", DType::IQ4_NL, 25, Rule::Iq4),
    mix("MXFP4_MOE", DType::MXFP4, 38, Rule::Experts),
];

/// What the rules ask of a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct About {
    pub layers: usize,
    pub experts: usize,
    /// Query heads for each key/value head.
    pub group: usize,
    /// The output matrix is the embedding.
    pub tied: bool,
    /// Tensors that are value projections, or hold one.
    pub values: usize,
    pub importance: bool,
}

/// A tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    pub name: &'a str,
    /// Outermost dimension first.
    pub shape: &'a [usize],
    /// How many value projections come before it.
    pub values_before: usize,
}

impl Place<'_> {
    fn layer(&self) -> usize {
        let number = self.name.strip_prefix("blk.").and_then(|rest| rest.split('.').next());
        number.and_then(|n| n.parse().ok()).unwrap_or(0)
    }

    pub(crate) fn is_value(&self) -> bool {
        ["attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight"].iter().any(|end| self.name.ends_with(end))
    }

    pub(crate) fn is_experts(&self) -> bool {
        self.name.ends_with("_exps.weight")
    }

    /// Vectors, and matrices that are small and matter much, are kept as they are (or F32).
    pub(crate) fn is_kept(&self) -> bool {
        let small = ["_norm.weight", "ffn_gate_inp", "ssm_conv1d", "position_embd", "rope_f"];
        let vector = self.shape.iter().filter(|&&n| n > 1).count() < 2;
        vector || !self.name.ends_with("weight") || small.iter().any(|part| self.name.contains(part))
    }
}

impl Mix {
    /// The mix of that name, in upper or lower case.
    pub fn named(name: &str) -> Option<&'static Mix> {
        MIXES.iter().find(|mix| mix.name.eq_ignore_ascii_case(name))
    }

    /// The type of a matrix.
    pub(crate) fn of(&self, about: &About, place: &Place<'_>) -> DType {
        if !self.base.is_quantized() {
            return self.base;
        }
        let cols = place.shape.last().copied().unwrap_or(1);
        let output = place.name == "output.weight" || (about.tied && place.name == "token_embd.weight");
        if output {
            return match self.base {
                DType::Q8_0 | DType::MXFP4 => DType::Q8_0,
                base if !cols.is_multiple_of(base.block_len()) => DType::Q8_0,
                _ => fitting(DType::Q6_K, cols),
            };
        }
        let more = |i: usize, n: usize| i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2;
        let eight = about.experts == 8;
        let ends = |end: &str| place.name.ends_with(end);
        let layer = place.layer();
        let dtype = if self.rule == Rule::Experts {
            if place.is_experts() { DType::MXFP4 } else { DType::Q8_0 }
        } else if place.is_value() {
            let i = place.values_before;
            let by_rule = match self.rule {
                Rule::Q2K if about.group >= 4 => DType::Q4_K,
                Rule::Q2K => DType::Q3_K,
                Rule::Q3KM if i < 2 => DType::Q5_K,
                Rule::Q3KM => DType::Q4_K,
                Rule::Q3KL => DType::Q5_K,
                Rule::Q4KM | Rule::Q5KM if more(i, about.values) => DType::Q6_K,
                Rule::Q4KS if i < 4 => DType::Q5_K,
                Rule::Iq4 if about.group >= 4 => DType::Q5_K,
                _ => self.base,
            };
            if eight { DType::Q8_0 } else { by_rule }
        } else if ends("attn_k.weight") && eight {
            DType::Q8_0
        } else if place.name.contains("ffn_down") {
            match self.rule {
                Rule::Q2K => DType::Q3_K,
                Rule::Q3KM if layer < about.layers / 16 => DType::Q5_K,
                Rule::Q3KM => DType::Q4_K,
                Rule::Q3KL => DType::Q5_K,
                Rule::Q4KM | Rule::Q5KM if more(layer, about.layers) => DType::Q6_K,
                Rule::Q4KS if layer < about.layers / 8 => DType::Q5_K,
                Rule::Iq4 if layer < about.layers / 8 && !about.importance => DType::Q5_K,
                Rule::Small if layer < about.layers / 8 && about.importance => match self.base {
                    DType::Q4_0 => DType::Q4_1,
                    _ => DType::Q5_1,
                },
                _ => self.base,
            }
        } else if ends("attn_output.weight") {
            match self.rule {
                Rule::Q2K | Rule::Q3KS | Rule::Q3KM | Rule::Q4KS | Rule::Q4KM | Rule::Iq4 if eight => DType::Q5_K,
                Rule::Q2K if !eight => DType::Q3_K,
                Rule::Q3KM if !eight => DType::Q4_K,
                Rule::Q3KL if !eight => DType::Q5_K,
                _ => self.base,
            }
        } else {
            self.base
        };
        fitting(dtype, cols)
    }
}

/// The type, or where rows are no whole blocks of it, the next one that fits.
pub(crate) fn fitting(dtype: DType, cols: usize) -> DType {
    if cols.is_multiple_of(dtype.block_len()) {
        return dtype;
    }
    let small = match dtype {
        DType::Q2_K | DType::Q3_K => DType::Q4_0,
        DType::Q4_K => DType::Q5_0,
        DType::Q5_K => DType::Q5_1,
        DType::Q6_K => DType::Q8_0,
        _ => DType::F16,
    };
    if cols.is_multiple_of(small.block_len()) { small } else { DType::F16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn types(mix: &str, about: About, name: &str, shape: &[usize]) -> Vec<DType> {
        let of = |l: usize| {
            let name = format!("blk.{l}.{name}");
            Mix::named(mix).unwrap().of(&about, &Place { name: &name, shape, values_before: l })
        };
        (0..about.layers).map(of).collect()
    }

    /// By hand: with 32 layers the first 4, the last 4 and every third between get more bits.
    #[test]
    fn the_mixes_alternate() {
        use DType::{Q4_K, Q5_K, Q6_K};
        let about = About { layers: 32, experts: 0, group: 4, tied: false, values: 32, importance: false };
        let down = types("q4_k_m", about, "ffn_down.weight", &[4096, 11008]);
        let expected: Vec<DType> =
            (0..32).map(|l| if !(4..28).contains(&l) || (l - 4) % 3 == 2 { Q6_K } else { Q4_K }).collect();
        assert_eq!(down, expected);
        assert_eq!(types("Q4_K_M", about, "attn_v.weight", &[1024, 4096]), expected);
        let down = types("Q4_K_S", about, "ffn_down_exps.weight", &[8, 4096, 11008]);
        assert_eq!(down, (0..32).map(|l| if l < 4 { Q5_K } else { Q4_K }).collect::<Vec<_>>());
        assert!(types("Q5_K_M", about, "ffn_up.weight", &[4096, 4096]).iter().all(|t| *t == Q5_K));
    }

    #[test]
    fn eight_experts_and_odd_widths() {
        let about = About { layers: 2, experts: 8, group: 4, tied: false, values: 2, importance: false };
        assert_eq!(types("Q4_K_M", about, "attn_v.weight", &[64, 256]), [DType::Q8_0; 2]);
        assert_eq!(types("Q4_K_M", about, "attn_output.weight", &[256, 256]), [DType::Q5_K; 2]);
        assert_eq!(types("Q4_K", about, "ffn_up_exps.weight", &[8, 256, 96]), [DType::Q5_0; 2]);
        assert_eq!(types("Q6_K", about, "attn_q.weight", &[8, 20]), [DType::F16; 2]);
        let output = |mix: &str, cols: usize, tied: bool| {
            let name = if tied { "token_embd.weight" } else { "output.weight" };
            let place = Place { name, shape: &[100, cols], values_before: 0 };
            Mix::named(mix).unwrap().of(&About { tied, ..about }, &place)
        };
        assert_eq!([output("Q4_0", 256, false), output("Q4_0", 256, true)], [DType::Q6_K; 2]);
        assert_eq!([output("Q8_0", 256, false), output("Q4_K", 96, false)], [DType::Q8_0; 2]);
    }

    #[test]
    fn names_are_given_once() {
        let mut names: Vec<_> = MIXES.iter().map(|m| m.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), MIXES.len());
        assert!(Mix::named("Q9_K").is_none());
    }
}
