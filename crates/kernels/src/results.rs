//! Room for results, which is not cleared before they are written: of a prompt that would cost a tenth of the time and more.

use std::mem::MaybeUninit;

/// Makes `y` `len` values, which `write` writes; what `y` held is gone, its memory is used again. If `write` panics, `y` is
/// empty.
///
/// # Safety
/// `write` must write every value.
pub(crate) unsafe fn fill<R>(y: &mut Vec<f32>, len: usize, write: impl FnOnce(&mut [MaybeUninit<f32>]) -> R) -> R {
    y.clear();
    y.reserve_exact(len);
    let result = write(&mut y.spare_capacity_mut()[..len]);
    y.set_len(len);
    result
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
