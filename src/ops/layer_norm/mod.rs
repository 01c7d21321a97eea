//! Layer normalisation over the last dimension, with weight and bias.
//!
//! For each row x of C elements: y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(variance + epsilon), where the
//! variance is the mean of (x - mean)^2 (divided by C). Source: Ba, Kiros, Hinton, "Layer Normalization", 2016.
//!
//! Backward, with n = (x - mean) * rstd and g = dy * weight: dx = rstd * (g - mean(g) - n * mean(g * n)),
//! dweight = sum over rows of dy * n, dbias = sum over rows of dy.

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
    /// [R].
    pub mean: &'a [f32],
    /// 1 / standard deviation, [R].
    pub rstd: &'a [f32],
}
