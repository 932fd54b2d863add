//! Owned weights.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

use quorate_kernels::{DType, MatRef, dequantize};

use crate::buffer::Buffer;
use crate::error::Result;

/// Shared bytes that begin at a multiple of 64, or, of an expert that is streamed, lie as in the file. A clone is another
/// handle on the same memory.
#[derive(Clone)]
pub struct Bytes {
    buffer: Arc<Buffer>,
    range: Range<usize>,
}

impl Bytes {
    /// Parts of one buffer. Each range should begin at a multiple of [`ALIGNMENT`], or cost nothing to put elsewhere.
    pub(crate) fn parts<const N: usize>(buffer: Buffer, ranges: [Range<usize>; N]) -> [Self; N] {
        let buffer = Arc::new(buffer);
        ranges.map(|range| Self { buffer: buffer.clone(), range })
    }

    pub(crate) fn whole(buffer: Buffer) -> Self {
        let range = 0..buffer.len();
        Self { buffer: Arc::new(buffer), range }
    }

    /// `len` times the same byte.
    ///
    /// # Errors
    /// The system has no memory.
    pub fn filled(len: usize, byte: u8) -> Result<Self> {
        let mut buffer = Buffer::zeroed(len)?;
        buffer.as_mut_slice().fill(byte);
        Ok(Self::whole(buffer))
    }

    /// An aligned copy.
    ///
    /// # Errors
    /// The system has no memory.
    pub fn copied(bytes: &[u8]) -> Result<Self> {
        let mut buffer = Buffer::zeroed(bytes.len())?;
        buffer.as_mut_slice().copy_from_slice(bytes);
        Ok(Self::whole(buffer))
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.buffer.as_slice()[self.range.clone()]
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({})", self.len())
    }
}

/// A weight matrix `[rows, cols]`, row after row, in the type of its file.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Element type.
    pub dtype: DType,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    data: Bytes,
}

impl Matrix {
    /// A matrix over `data`.
    ///
    /// # Panics
    /// If `data` has another length than the shape needs.
    pub fn new(dtype: DType, rows: usize, cols: usize, data: Bytes) -> Self {
        let needed = dtype.row_bytes(cols).and_then(|row| row.checked_mul(rows));
        assert_eq!(needed, Some(data.len()), "bytes of a {rows} x {cols} matrix of {}", dtype.name());
        Self { dtype, rows, cols, data }
    }

    /// An F32 matrix.
    ///
    /// # Errors
    /// The system has no memory.
    ///
    /// # Panics
    /// If the number of values is not `rows * cols`.
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Result<Self> {
        let mut buffer = Buffer::zeroed(size_of_val(values))?;
        for (bytes, value) in buffer.as_mut_slice().as_chunks_mut::<4>().0.iter_mut().zip(values) {
            *bytes = value.to_le_bytes();
        }
        Ok(Self::new(DType::F32, rows, cols, Bytes::whole(buffer)))
    }

    /// A view for the kernels.
    pub fn as_ref(&self) -> MatRef<'_> {
        MatRef { dtype: self.dtype, rows: self.rows, cols: self.cols, data: &self.data }
    }

    /// The bytes.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> u64 {
        self.data.len() as u64
    }

    /// The values, row after row.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        dequantize(self.dtype, &self.data, &mut values);
        values
    }
}

/// A routed expert: `down(act(gate x) * up x)`.
#[derive(Clone, Debug)]
pub struct Expert {
    /// Gate projection `[I, d]`.
    pub gate: Matrix,
    /// Up projection `[I, d]`.
    pub up: Matrix,
    /// Down projection `[d, I]`.
    pub down: Matrix,
}

impl Expert {
    /// The memory that the three matrices share, if nobody else holds it.
    pub(crate) fn into_buffer(self) -> Option<Buffer> {
        let shared = self.gate.data.buffer;
        drop((self.up, self.down));
        Arc::into_inner(shared)
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> u64 {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::ALIGNMENT;

    #[test]
    fn memory_is_aligned_and_shared() {
        for len in [0, 1, 63, 64, 65, 100_000, 1 << 20, (1 << 20) + 1] {
            let bytes = Bytes::copied(&vec![7; len]).unwrap();
            assert_eq!(bytes.as_ptr().addr() % ALIGNMENT, 0);
            assert_eq!(bytes.len(), len);
            assert_eq!(bytes.clone().as_ptr(), bytes.as_ptr());
            assert!(bytes.iter().all(|&b| b == 7));
        }
    }

    #[test]
    fn values_come_back() {
        let values = [1.0, -2.5, 0.0, 3.25, 1e-20, 6.0];
        let matrix = Matrix::from_f32(2, 3, &values).unwrap();
        assert_eq!(matrix.to_f32(), values);
        assert_eq!((matrix.bytes(), matrix.as_ref().rows), (24, 2));
    }

    #[test]
    #[should_panic(expected = "bytes of a 2 x 3 matrix of F32")]
    fn a_wrong_length_is_a_bug() {
        let _ = Matrix::from_f32(2, 3, &[0.0; 5]);
    }
}
