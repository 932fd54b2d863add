//! Keys or values of a sequence in one layer, page by page.

use std::ops::Range;

use crate::DType;
use crate::pool::SendPtr;
use crate::rows::ask_to_write;
use crate::tile::Rows;
use crate::weight::{dequantize, quantize};

/// Keys or values of some positions: `[pages, heads, 64, head_dim]`. What a head has of neighbouring positions lies side by side,
/// and behind it what the next head has of the same positions, so that attention reads memory in order. The last page has room
/// for 64 positions as well.
#[derive(Clone, Debug)]
pub struct KvPages {
    dtype: DType,
    heads: usize,
    head_dim: usize,
    len: usize,
    data: Vec<u8>,
}

impl KvPages {
    /// Positions of a page: a multiple of every tile's rows.
    pub const PAGE: usize = 64;

    /// No positions, whose heads have `head_dim` numbers each, kept as `dtype`.
    ///
    /// # Panics
    /// If a head is no whole number of the type's blocks.
    pub fn new(dtype: DType, heads: usize, head_dim: usize) -> Self {
        assert!(head_dim.is_multiple_of(dtype.block_len()), "heads of {head_dim} as {}", dtype.name());
        Self { dtype, heads, head_dim, len: 0, data: Vec::new() }
    }

    /// Type of the numbers.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Heads of each position.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Numbers of each head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Positions there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all but the first `len` positions; their memory is kept for others.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.data.truncate(self.len.div_ceil(Self::PAGE) * self.page_bytes());
    }

    /// Appends positions, `[n, heads, head_dim]`, rounded to the type.
    ///
    /// # Panics
    /// If there is a part of a position.
    pub fn extend(&mut self, rows: &[f32]) {
        let width = self.heads * self.head_dim;
        assert!(rows.len().is_multiple_of(width), "{} numbers as positions of {width}", rows.len());
        if width == 0 {
            return;
        }
        self.make_room(rows.len() / width);
        for row in rows.chunks_exact(width) {
            self.len += 1;
            (0..self.heads).for_each(|head| self.ask_for_last(head));
            for (head, x) in row.chunks_exact(self.head_dim).enumerate() {
                let (at, bytes) = (self.offset(head, self.len - 1), self.head_bytes());
                quantize(self.dtype, x, &mut self.data[at..at + bytes]);
            }
        }
    }

    fn make_room(&mut self, positions: usize) {
        self.data.resize((self.len + positions).div_ceil(Self::PAGE) * self.page_bytes(), 0);
    }

    /// Appends a position, whose numbers are then written by [`KvPages::put`] through what this gives.
    pub(crate) fn grow(&mut self) -> SendPtr<u8> {
        self.make_room(1);
        self.len += 1;
        SendPtr(self.data.as_mut_ptr())
    }

    /// Asks for the place of what a head has of the last position, to write there: it is far from what is near.
    pub(crate) fn ask_for_last(&self, head: usize) {
        assert!(head < self.heads && self.len > 0, "head {head} of the last position");
        let place = self.data.as_ptr().wrapping_add(self.offset(head, self.len - 1));
        ask_to_write(place, self.head_bytes().div_ceil(64));
    }

    /// Writes what a head has of the last position, rounded to the type.
    ///
    /// # Safety
    /// `data` must be what [`KvPages::grow`] gave the last time, and nobody else touch this head's place.
    pub(crate) unsafe fn put(&self, data: SendPtr<u8>, head: usize, x: &[f32]) {
        assert!(head < self.heads && x.len() == self.head_dim && self.len > 0, "head {head} of the last position");
        let place = data.get().add(self.offset(head, self.len - 1));
        quantize(self.dtype, x, std::slice::from_raw_parts_mut(place, self.head_bytes()));
    }

    /// All positions as plain numbers, `[len, heads, head_dim]`.
    pub fn values(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.len * self.heads * self.head_dim];
        for (i, x) in values.chunks_exact_mut(self.head_dim.max(1)).enumerate() {
            let at = self.offset(i % self.heads, i / self.heads);
            dequantize(self.dtype, &self.data[at..at + self.head_bytes()], x);
        }
        values
    }

    /// What a head has of some positions of one page.
    ///
    /// # Panics
    /// If they are not of one page, or not there.
    pub(crate) fn rows(&self, head: usize, positions: &Range<usize>) -> Rows {
        let (first, end) = (positions.start, positions.end);
        assert!(first < end && end <= self.len && head < self.heads, "{positions:?} of {} positions", self.len);
        assert!(end <= (first / Self::PAGE + 1) * Self::PAGE, "{positions:?} of one page");
        // A pointer, not a slice: another thread may be writing other heads' numbers.
        let data = self.data.as_ptr().wrapping_add(self.offset(head, first));
        Rows { dtype: self.dtype, data, stride: self.head_bytes(), rows: end - first, cols: self.head_dim, then: None }
    }

    fn head_bytes(&self) -> usize {
        self.head_dim / self.dtype.block_len() * self.dtype.block_bytes()
    }

    fn page_bytes(&self) -> usize {
        Self::PAGE * self.heads * self.head_bytes()
    }

    fn offset(&self, head: usize, position: usize) -> usize {
        let row = head * Self::PAGE + position % Self::PAGE;
        position / Self::PAGE * self.page_bytes() + row * self.head_bytes()
    }
}
