//! Element types of GGUF tensors.

macro_rules! ggml_types {
    ($($variant:ident $id:literal $name:literal $block:literal $bytes:literal),* $(,)?) => {
        /// Element type of a GGUF tensor: numbers come in blocks of a fixed size.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(non_camel_case_types, reason = "the format's own names")]
        pub enum GgmlType {
            $(#[doc = concat!("`", $name, "`.")] $variant),*
        }

        impl GgmlType {
            /// The type of that number.
            pub fn of(id: u32) -> Option<GgmlType> {
                match id { $($id => Some(GgmlType::$variant),)* _ => None }
            }

            /// Its number.
            pub fn id(self) -> u32 {
                match self { $(GgmlType::$variant => $id),* }
            }

            /// Its name.
            pub fn name(self) -> &'static str {
                match self { $(GgmlType::$variant => $name),* }
            }

            /// Numbers in a block, and bytes of it.
            pub fn block(self) -> (u64, u64) {
                match self { $(GgmlType::$variant => ($block, $bytes)),* }
            }
        }
    };
}

ggml_types! {
    F32 0 "F32" 1 4, F16 1 "F16" 1 2, Q4_0 2 "Q4_0" 32 18, Q4_1 3 "Q4_1" 32 20, Q5_0 6 "Q5_0" 32 22, Q5_1 7 "Q5_1" 32 24,
    Q8_0 8 "Q8_0" 32 34, Q8_1 9 "Q8_1" 32 36, Q2_K 10 "Q2_K" 256 84, Q3_K 11 "Q3_K" 256 110, Q4_K 12 "Q4_K" 256 144,
    Q5_K 13 "Q5_K" 256 176, Q6_K 14 "Q6_K" 256 210, Q8_K 15 "Q8_K" 256 292, IQ2_XXS 16 "IQ2_XXS" 256 66,
    IQ2_XS 17 "IQ2_XS" 256 74, IQ3_XXS 18 "IQ3_XXS" 256 98, IQ1_S 19 "IQ1_S" 256 50, IQ4_NL 20 "IQ4_NL" 32 18,
    IQ3_S 21 "IQ3_S" 256 110, IQ2_S 22 "IQ2_S" 256 82, IQ4_XS 23 "IQ4_XS" 256 136, I8 24 "I8" 1 1, I16 25 "I16" 1 2,
    I32 26 "I32" 1 4, I64 27 "I64" 1 8, F64 28 "F64" 1 8, IQ1_M 29 "IQ1_M" 256 56, BF16 30 "BF16" 1 2,
    TQ1_0 34 "TQ1_0" 256 54, TQ2_0 35 "TQ2_0" 256 66, MXFP4 39 "MXFP4" 32 17,
}

impl GgmlType {
    /// Bytes of a tensor, its shape given innermost dimension first; `None` on overflow, or if rows are no whole blocks.
    pub fn bytes_of(self, shape: &[u64]) -> Option<u64> {
        let (block, bytes) = self.block();
        if !shape.first().copied().unwrap_or(1).is_multiple_of(block) {
            return None;
        }
        let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d))?;
        (elements / block).checked_mul(bytes)
    }
}
