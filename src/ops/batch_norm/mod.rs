//! Batch normalisation with what follows it in a network: y = act((x - mean) rstd weight + bias + residual).
//!
//! x [R, C], R the pixels of the batch. In training mean and variance (biased) are the batch's, per channel, and move
//! the running statistics by PyTorch's rule: running = (1 - momentum) running + momentum new, the new variance unbiased.
//! act is the identity or max(0, .); the residual may be left out.
//!
//! Backward, with g = dy where y > 0 (identity: dy), xhat = (x - mean) rstd: dbias = sum g, dweight = sum g xhat,
//! dx = weight rstd (g - dbias/R - xhat dweight/R), dresidual = g.

mod cpu;
#[cfg(test)]
pub mod reference;

pub use cpu::{backward, forward_running, forward_training, scratch_len};

/// PyTorch's defaults.
pub const EPSILON: f32 = 1e-5;
pub const MOMENTUM: f64 = 0.1;

/// What is done to the normalised numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    Identity,
    Relu,
}

/// Mean and variance of every channel, [C] each.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    pub mean: Vec<f32>,
    pub variance: Vec<f32>,
}

impl Statistics {
    /// Those of an untrained network.
    pub fn new(channels: usize) -> Self {
        Self { mean: vec![0.0; channels], variance: vec![1.0; channels] }
    }
}

/// What [`backward`] needs of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a> {
    pub x: &'a [f32],
    /// The result, where the activation is [`Activation::Relu`].
    pub y: &'a [f32],
    pub weight: &'a [f32],
    pub mean: &'a [f32],
    pub rstd: &'a [f32],
    pub activation: Activation,
}
