//! Attention on the CPU. A task is a head of a sequence (or a share of its rows); every thread has scratch of its own.

mod backward;
mod forward;
mod parts;
#[cfg(test)]
mod tests;

use super::Shape;
use crate::ops::simd::LANES;

pub use backward::backward;
pub use forward::forward;

/// Length of the scratch that [`forward`] and [`backward`] need with the current pool. A shorter one (of a smaller
/// pool) is right too, and leaves threads idle.
pub fn scratch_len(shape: Shape) -> usize {
    rayon::current_num_threads() * forward::forward_part(shape).max(backward::backward_part(shape)) + LANES
}
