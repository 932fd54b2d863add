//! How weights lie in memory: element types, their blocks, and a matrix of them.

use crate::KernelError;

/// The type of a weight matrix. Rows are whole numbers of blocks; all values are little endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    BF16,
    /// ggml's `Q8_0`: a half-precision scale, then 32 signed bytes.
    Q8_0,
}

impl DType {
    /// Values in a block.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 => 32,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => 34,
        }
    }

    /// Bytes of a row of `cols` values; `None` if that is no whole number of blocks, or overflows.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if cols.is_multiple_of(self.block_len()) {
            (cols / self.block_len()).checked_mul(self.block_bytes())
        } else {
            None
        }
    }

    /// The usual name, as in `Q8_0`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8_0 => "Q8_0",
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
