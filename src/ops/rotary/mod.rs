//! Rotary position embedding: pairs of a query's or key's elements are rotated by angles that grow with the position.
//!
//! The pairs are (x[i], x[i + D/2]), i < D/2 (the halves convention of Hugging Face's LLaMA), at position t by the angle
//! t * frequency_i, frequency_i = theta^(-2i/D). Source: Su et al., "RoFormer", 2021. The gradient is the rotation by
//! the negative angle.

mod cpu;
mod table;

pub use cpu::rotate;
pub use table::{Scaling, Table};

/// Which way to rotate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// By the position's angle.
    Forward,
    /// By the negative angle: turns a gradient of the result into that of the input.
    Backward,
}
