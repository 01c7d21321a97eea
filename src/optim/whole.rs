//! Passes over whole flat buffers, on the CPU and on a CUDA device, for the methods that need more than their rule.

use super::cuda;
use super::kernel::{self, Level};
use crate::params::{slice, slice_mut};
use candle_core::{Result, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Sum of the squares of each of two adjoining ranges that begin the buffer and end it.
pub(super) fn squares(numbers: &Tensor, ranges: &[Range<usize>; 2]) -> Result<[f64; 2]> {
    if !numbers.device().is_cpu() {
        return cuda::squares(numbers, ranges);
    }
    let sums = slice(numbers, |numbers| kernel::reduce(Level::best(), ranges, numbers, None))?;
    Ok([sums[0].gradient_sq, sums[1].gradient_sq])
}

/// target += scale * source
pub(super) fn add_scaled(target: &Tensor, scale: f32, source: &Tensor) -> Result<()> {
    if !target.device().is_cpu() {
        return cuda::add_scaled(target, scale, source);
    }
    slice(source, |source| {
        slice_mut(target, |target| {
            target.par_iter_mut().zip(source).for_each(|(target, source)| *target += scale * source);
        })
    })?
}

/// target = keep * target + take * (scale * source)^2
pub(super) fn blend_square(target: &Tensor, keep: f32, take: f32, scale: f32, source: &Tensor) -> Result<()> {
    if !target.device().is_cpu() {
        return cuda::blend_square(target, keep, take, scale, source);
    }
    slice(source, |source| {
        slice_mut(target, |target| {
            target.par_iter_mut().zip(source).for_each(|(target, source)| {
                let scaled = scale * source;
                *target = keep * *target + take * (scaled * scaled);
            });
        })
    })?
}

/// target = source; they share no memory.
pub(super) fn copy(target: &Tensor, source: &Tensor) -> Result<()> {
    if !target.device().is_cpu() {
        return if target.elem_count() == 0 { Ok(()) } else { target.slice_set(source, 0, 0) };
    }
    slice(source, |source| slice_mut(target, |target| target.copy_from_slice(source)))?
}
