//! What weights take in types of blocks: bytes that follow from shapes alone.

use crate::GgmlType;

/// A choice of types for a model's matrices. Vectors and routers stay F32, as they are held in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantisation {
    /// Its name.
    pub name: &'static str,
    /// Type of the routed experts.
    pub experts: GgmlType,
    /// Type of all other matrices.
    pub others: GgmlType,
}

/// What is worth a line in a table, from the largest to the smallest. With MXFP4 experts all else is Q8_0, as in llama.cpp's
/// recipe of that name.
pub static QUANTISATIONS: &[Quantisation] = &[
    all("F32", GgmlType::F32),
    all("BF16", GgmlType::BF16),
    all("F16", GgmlType::F16),
    all("Q8_0", GgmlType::Q8_0),
    all("Q6_K", GgmlType::Q6_K),
    all("Q5_K", GgmlType::Q5_K),
    all("Q5_0", GgmlType::Q5_0),
    all("Q4_1", GgmlType::Q4_1),
    all("Q4_K", GgmlType::Q4_K),
    all("Q4_0", GgmlType::Q4_0),
    all("IQ4_NL", GgmlType::IQ4_NL),
    all("IQ4_XS", GgmlType::IQ4_XS),
    Quantisation { name: "MXFP4", experts: GgmlType::MXFP4, others: GgmlType::Q8_0 },
    all("Q3_K", GgmlType::Q3_K),
    all("IQ3_XXS", GgmlType::IQ3_XXS),
    all("Q2_K", GgmlType::Q2_K),
    all("IQ2_XXS", GgmlType::IQ2_XXS),
];

const fn all(name: &'static str, of: GgmlType) -> Quantisation {
    Quantisation { name, experts: of, others: of }
}

impl Quantisation {
    /// The quantisation of a name; capitals do not count, and neither does what stands behind the type's name as in
    /// `Q4_K_M`, because the mixed recipes differ in few matrices.
    pub fn find(name: &str) -> Option<Quantisation> {
        let plain = |name: &str| QUANTISATIONS.iter().find(|q| q.name.eq_ignore_ascii_case(name)).copied();
        plain(name).or_else(|| {
            let (type_name, mix) = name.rsplit_once('_')?;
            matches!(mix, "S" | "M" | "L" | "s" | "m" | "l").then(|| plain(type_name))?
        })
    }

    /// Bytes of the rows of a matrix `[.., columns]`, of a routed expert or not.
    pub fn bytes(self, shape: &[usize], expert: bool) -> u64 {
        let columns = shape.last().copied().unwrap_or(1) as u64;
        let rows: u64 = shape.iter().rev().skip(1).map(|&n| n as u64).product();
        let (block, bytes) = stored_as(if expert { self.experts } else { self.others }, columns).block();
        rows * (columns / block) * bytes
    }
}

/// The type in which rows of that width are stored if that one was asked for: rows that are no whole blocks take a type
/// of smaller blocks, as llama.cpp has it, and F16 at last.
pub fn stored_as(asked: GgmlType, columns: u64) -> GgmlType {
    let fits = |of: GgmlType| columns.is_multiple_of(of.block().0);
    if fits(asked) {
        return asked;
    }
    let smaller = match asked {
        GgmlType::Q4_K => GgmlType::Q5_0,
        GgmlType::Q5_K => GgmlType::Q5_1,
        GgmlType::Q6_K => GgmlType::Q8_0,
        GgmlType::TQ1_0 | GgmlType::TQ2_0 => GgmlType::Q4_0,
        _ => GgmlType::IQ4_NL,
    };
    if fits(smaller) { smaller } else { GgmlType::F16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_follow_from_blocks() {
        let of = |name: &str, shape: &[usize]| Quantisation::find(name).unwrap().bytes(shape, true);
        assert_eq!(of("q4_k", &[3, 512]), 3 * 2 * 144);
        assert_eq!(of("Q4_K_M", &[3, 512]), 3 * 2 * 144);
        assert_eq!(of("BF16", &[3, 5]), 30);
        // 2880 columns are no whole blocks of 256, but 90 of 32.
        assert_eq!(of("Q4_K", &[1, 2880]), 90 * 22);
        assert_eq!(of("Q6_K", &[1, 2880]), 90 * 34);
        assert_eq!(of("Q2_K", &[1, 2880]), 90 * 18);
        assert_eq!(of("Q4_K", &[1, 33]), 66, "F16 at last");
        assert_eq!(Quantisation::find("MXFP4").unwrap().bytes(&[2, 64], false), 2 * 2 * 34);
        assert!(Quantisation::find("Q4_K_X").is_none() && Quantisation::find("Q9").is_none());
    }
}
