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
    /// As for [`Self::segment`].
    pub unsafe fn write(&self, row: usize, column: usize, values: &[f32]) {
        // SAFETY: the caller keeps the segment to itself.
        unsafe { self.segment(row, column, values.len()) }.copy_from_slice(values);
    }

    /// The `len` elements of `row` from `column` on.
    ///
    /// # Safety
    /// Nobody else reads or writes any of these elements while the result lives, and no other thread does while this
    /// `SharedRows` lives.
    #[allow(clippy::mut_from_ref, reason = "handing out disjoint segments is what the type is for")]
    pub unsafe fn segment(&self, row: usize, column: usize, len: usize) -> &mut [f32] {
        let start = row * self.row_stride + column;
        assert!(start + len <= self.len, "a segment lies outside its matrix");
        // SAFETY: the segment lies inside the borrowed slice, and the caller has it alone.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whether_scratch_is_scarce_or_plenty() {
        for (tasks, scratch_len) in [(0, 4), (1, 4), (100, 4), (100, 11), (3, 400)] {
            let mut results = vec![0.0f32; 2 * tasks];
            let shared = SharedRows::new(&mut results, 2);
            for_each_with_scratch(tasks, 4, &mut vec![0.0; scratch_len], |task, scratch| {
                assert_eq!(scratch.len(), 4);
                // SAFETY: each task has a row of its own.
                unsafe { shared.write(task, 1, &[task as f32 + 1.0]) };
            });
            let expected: Vec<f32> = (0..tasks).flat_map(|task| [0.0, task as f32 + 1.0]).collect();
            assert_eq!(results, expected, "{tasks} tasks, {scratch_len} elements");
        }
    }

    #[test]
    #[should_panic(expected = "outside its matrix")]
    fn a_segment_outside_the_matrix_is_refused() {
        let mut matrix = [0.0; 6];
        // SAFETY: there is one thread.
        unsafe { SharedRows::new(&mut matrix, 3).write(1, 2, &[1.0, 2.0]) };
    }
}
