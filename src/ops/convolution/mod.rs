//! Two-dimensional convolution (cross-correlation, as PyTorch has it) and its gradients, channels last.
//!
//! x [B, H, W, I], weight [O, k, k, I], bias [O], y [B, H', W', O] with H' = (H + 2 padding - k) / stride + 1:
//!
//! ```text
//! y[b, i, j, o] = bias[o] + sum over (u, v, c) of x[b, i s + u - p, j s + v - p, c] weight[o, u, v, c]
//! ```
//!
//! where x is 0 outside. Backward: dx, dweight and dbias of sum(y dy). A few rows at a time are copied with zeros around
//! them and multiplied where they lie, window by window; the gradient of x is the same with dy, spread out by the stride,
//! and the mirrored weight. Sums over the batch are taken in parts whose borders do not depend on the number of threads.

mod block;
mod cpu;
#[cfg(test)]
pub mod reference;

pub use cpu::{backward_input, backward_weight, forward, scratch_len};

/// Sizes of a convolution with a square kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub batch: usize,
    /// H, W of x.
    pub height: usize,
    pub width: usize,
    /// I: channels of x.
    pub inputs: usize,
    /// O: channels of y.
    pub outputs: usize,
    /// k
    pub kernel: usize,
    pub stride: usize,
    pub padding: usize,
}

impl Shape {
    /// H'
    pub fn out_height(&self) -> usize {
        (self.height + 2 * self.padding - self.kernel) / self.stride + 1
    }

    /// W'
    pub fn out_width(&self) -> usize {
        (self.width + 2 * self.padding - self.kernel) / self.stride + 1
    }

    /// Elements of x.
    pub fn x_len(&self) -> usize {
        self.batch * self.height * self.width * self.inputs
    }

    /// Elements of y.
    pub fn y_len(&self) -> usize {
        self.batch * self.out_height() * self.out_width() * self.outputs
    }

    /// Elements of the weight.
    pub fn weight_len(&self) -> usize {
        self.outputs * self.kernel * self.kernel * self.inputs
    }
}
