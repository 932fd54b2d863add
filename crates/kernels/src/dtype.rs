//! How weights lie in memory: element types, their blocks, and a matrix of them.

use crate::KernelError;

/// Defines [`DType`] from rows of name, values in a block, bytes of a block.
macro_rules! dtypes {
    ($($(#[$doc:meta])* $name:ident $len:literal $bytes:literal,)*) => {
        /// The type of a weight matrix. Rows are whole numbers of blocks; all values are little
        /// endian. The block types are those of ggml's files, each named as there.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(non_camel_case_types, reason = "the usual names")]
        #[non_exhaustive]
        pub enum DType {
            $($(#[$doc])* $name,)*
        }

        impl DType {
            /// All types.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Values in a block.
            pub const fn block_len(self) -> usize {
                match self {
                    $(Self::$name => $len,)*
                }
            }

            /// Bytes of a block.
            pub const fn block_bytes(self) -> usize {
                match self {
                    $(Self::$name => $bytes,)*
                }
            }

            /// The usual name, as in `Q8_0`.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)*
                }
            }
        }
    };
}

dtypes! {
    /// IEEE single precision.
    F32 1 4,
    /// IEEE half precision.
    F16 1 2,
    /// The upper half of a single.
    BF16 1 2,
    /// 4-bit codes less 8, a scale.
    Q4_0 32 18,
    /// 4-bit codes, a scale and an offset.
    Q4_1 32 20,
    /// 5-bit codes less 16, a scale.
    Q5_0 32 22,
    /// 5-bit codes, a scale and an offset.
    Q5_1 32 24,
    /// Signed bytes, a scale.
    Q8_0 32 34,
    /// 2-bit codes; 4-bit scales and offsets for every 16.
    Q2_K 256 84,
    /// 3-bit codes less 4; 6-bit scales for every 16.
    Q3_K 256 110,
    /// 4-bit codes; 6-bit scales and offsets for every 32.
    Q4_K 256 144,
    /// 5-bit codes; 6-bit scales and offsets for every 32.
    Q5_K 256 176,
    /// 6-bit codes less 32; 8-bit scales for every 16.
    Q6_K 256 210,
    /// 4-bit codes of a table of signed bytes, a scale.
    IQ4_NL 32 18,
    /// As `IQ4_NL`, with 6-bit scales for every 32.
    IQ4_XS 256 136,
    /// 4-bit floats, a power of two.
    MXFP4 32 17,
    /// Codebook of 256 groups of eight, signs of even parity; 4-bit scales for every 32.
    IQ2_XXS 256 66,
    /// Codebook of 512 groups of eight, signs of even parity; 4-bit scales for every 16.
    IQ2_XS 256 74,
    /// Codebook of 1024 groups of eight, signs; 4-bit scales for every 16.
    IQ2_S 256 82,
    /// Codebook of 256 groups of four, signs of even parity; 4-bit scales for every 32.
    IQ3_XXS 256 98,
    /// Codebook of 512 groups of four, signs; 4-bit scales for every 32.
    IQ3_S 256 110,
    /// Codebook of 2048 groups of eight; 3-bit scales and a shift for every 32.
    IQ1_S 256 50,
    /// As `IQ1_S`, with scales for every 16 and a shift for every 8.
    IQ1_M 256 56,
}

impl DType {
    /// Whether values come in blocks, as rounded codes with scales.
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// Bytes of a row of `cols` values; `None` if that is no whole number of blocks, or overflows.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if cols.is_multiple_of(self.block_len()) {
            (cols / self.block_len()).checked_mul(self.block_bytes())
        } else {
            None
        }
    }
}

/// A borrowed matrix of weights, row after row. `data` may lie at any address.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a> {
    /// Type of the elements.
    pub dtype: DType,
    /// Rows: outputs of the product.
    pub rows: usize,
    /// Columns: inputs of the product.
    pub cols: usize,
    /// `rows` times `dtype.row_bytes(cols)` bytes.
    pub data: &'a [u8],
}

impl<'a> MatRef<'a> {
    /// A matrix over `data`.
    ///
    /// # Errors
    /// If a row is no whole number of blocks, or `data` has not exactly the length of the shape.
    pub fn new(dtype: DType, rows: usize, cols: usize, data: &'a [u8]) -> Result<Self, KernelError> {
        let row_bytes = dtype.row_bytes(cols).ok_or(KernelError::RowLength { dtype, cols })?;
        let expected = rows.checked_mul(row_bytes).ok_or(KernelError::RowLength { dtype, cols })?;
        if data.len() != expected {
            let found = data.len();
            return Err(KernelError::DataLength { dtype, rows, cols, expected, found });
        }
        Ok(Self { dtype, rows, cols, data })
    }

    /// A matrix over values.
    ///
    /// # Panics
    /// If the number of values is not `rows * cols`.
    pub fn of_f32(rows: usize, cols: usize, values: &'a [f32]) -> Self {
        assert_eq!(rows.checked_mul(cols), Some(values.len()), "values of a {rows} x {cols} matrix");
        // SAFETY: every f32 is four bytes without padding, the length is that of the values, and bytes need no alignment.
        let data = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
        Self { dtype: DType::F32, rows, cols, data }
    }

    /// Bytes of one row.
    ///
    /// # Panics
    /// If the fields were set to a shape that [`MatRef::new`] refuses.
    pub fn row_bytes(&self) -> usize {
        let bytes = self.dtype.row_bytes(self.cols).expect("a row is whole blocks");
        assert_eq!(bytes.checked_mul(self.rows), Some(self.data.len()), "bytes of the matrix");
        bytes
    }
}
