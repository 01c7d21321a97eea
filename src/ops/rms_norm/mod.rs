//! Root mean square normalisation over the last dimension, with a weight.
//!
//! For each row x of C elements: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + epsilon). Source: Zhang, Sennrich,
//! "Root Mean Square Layer Normalization", 2019.
//!
//! Backward, with n = x * rstd and g = dy * weight: dx = rstd * (g - n * mean(g * n)), dweight = sum over rows of dy * n.

mod cpu;
pub mod reference;

pub use cpu::{backward, forward, scratch_len};

/// What [`forward`] was given and found, for [`backward`].
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    /// The rows that were normalised, [R, C].
    pub x: &'a [f32],
    /// [C].
    pub weight: &'a [f32],
    /// 1 / root mean square, [R].
    pub rstd: &'a [f32],
}
