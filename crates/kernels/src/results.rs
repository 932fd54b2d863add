//! Room for results, which is not cleared before they are written: one thread would do that, and it took 3 % of a prompt's time and more
//! (docs/performance.md).

use std::mem::MaybeUninit;

use crate::pool::SendPtr;

/// Makes each of `ys` as many values as `lens` says, which `write` writes; what they held is gone, their memory is used again. If
/// `write` panics, they are empty.
///
/// # Safety
/// `write` must write every value.
pub(crate) unsafe fn fill_each<const N: usize>(
    mut ys: [&mut Vec<f32>; N],
    lens: [usize; N],
    write: impl FnOnce([SendPtr; N]),
) {
    for (y, len) in ys.iter_mut().zip(lens) {
        y.clear();
        y.reserve_exact(len);
    }
    write(std::array::from_fn(|i| SendPtr(ys[i].as_mut_ptr())));
    for (y, len) in ys.into_iter().zip(lens) {
        y.set_len(len);
    }
}

/// The same of one.
///
/// # Safety
/// As there.
pub(crate) unsafe fn fill(y: &mut Vec<f32>, len: usize, write: impl FnOnce(&mut [MaybeUninit<f32>])) {
    fill_each([y], [len], |[y]| write(std::slice::from_raw_parts_mut(y.get().cast(), len)));
}

/// Zeros.
pub(crate) fn zeros(y: &mut [MaybeUninit<f32>]) -> &mut [f32] {
    y.fill(MaybeUninit::new(0.0));
    // SAFETY: all were written just now, and a `MaybeUninit` lies in memory as its value does.
    unsafe { &mut *(std::ptr::from_mut(y) as *mut [f32]) }
}

/// The values of `x`, which must be as many.
pub(crate) fn copied<'a>(y: &'a mut [MaybeUninit<f32>], x: &[f32]) -> &'a mut [f32] {
    assert_eq!(y.len(), x.len(), "values to copy");
    // SAFETY: both have so many values and do not overlap, and then all of `y` are written; a `MaybeUninit` lies in memory
    // as its value does.
    unsafe {
        std::ptr::copy_nonoverlapping(x.as_ptr(), y.as_mut_ptr().cast(), x.len());
        &mut *(std::ptr::from_mut(y) as *mut [f32])
    }
}
