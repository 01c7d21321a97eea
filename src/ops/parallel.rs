//! How operations share work among threads: in pieces whose borders never depend on the number of threads.

use super::simd::kernel;
use super::{Gradient, Into};
use rayon::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Elements of an element-wise pass in one piece: 64 KiB, enough to hide what handing it to a thread costs.
pub const PIECE: usize = 16_384;

/// Rows of `width` elements in one piece of a pass over rows.
pub fn rows_a_piece(width: usize) -> usize {
    (PIECE / width.max(1)).max(1)
}

/// Rows of one partial sum of a parameter's gradient: at most 64 parts, each worth the rows of sums that it costs.
pub fn rows_a_part(rows: usize) -> usize {
    rows.div_ceil(64).max(16)
}

kernel! {
    /// Adds columns from..from+C of every part, in order, into `target` [C].
    pub fn add_parts(parts: &[f32], part_len: usize, from: usize, target: Gradient) {
        let width = target.data.len();
        if target.into == Into::Overwrite {
            target.data.fill(0.0);
        }
        for part in parts.chunks_exact(part_len) {
            for (sum, value) in target.data.iter_mut().zip(&part[from..from + width]) {
                *sum += value;
            }
        }
    }
}

/// Runs `task` for 0..tasks, in any order, on as many threads as `scratch` has parts of `part` elements; a task gets
/// the part of the thread that runs it, with whatever the last task left there.
///
/// # Panics
/// When `scratch` has not a single part.
pub fn for_each_with_scratch(tasks: usize, part: usize, scratch: &mut [f32], task: impl Fn(usize, &mut [f32]) + Sync) {
    assert!(part > 0 && scratch.len() >= part, "scratch of {} elements for parts of {part}", scratch.len());
    let parts = (scratch.len() / part).min(tasks);
    let next = AtomicUsize::new(0);
    scratch.par_chunks_exact_mut(part).take(parts).with_max_len(1).for_each(|scratch| {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= tasks {
                return;
            }
            task(index, scratch);
        }
    });
}

/// A matrix that several threads write at once, each to segments of its own.
pub struct SharedRows<'a> {
    data: *mut f32,
    len: usize,
    row_stride: usize,
    exclusive: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer stands for the exclusive borrow in `exclusive`; `write` asks its callers to keep segments apart.
unsafe impl Sync for SharedRows<'_> {}

impl<'a> SharedRows<'a> {
    pub fn new(data: &'a mut [f32], row_stride: usize) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), row_stride, exclusive: std::marker::PhantomData }
    }

    /// Copies `values` to `row`, from `column` on.
    ///
    /// # Safety
    /// No other thread writes any of these elements while this `SharedRows` lives.
    pub unsafe fn write(&self, row: usize, column: usize, values: &[f32]) {
        let start = row * self.row_stride + column;
        assert!(start + values.len() <= self.len, "a segment lies outside its matrix");
        // SAFETY: the segment lies inside the borrowed slice, and nobody else touches it meanwhile.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.data.add(start), values.len()) }
    }
}
