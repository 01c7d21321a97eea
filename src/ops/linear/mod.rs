//! The linear layer: y = x W + bias (+ residual), and its gradients.
//!
//! x [R, I], y [R, O]; W is stored [I, O] (GPT-2's Conv1D) or [O, I] (LLaMA, PyTorch), and is never transposed in
//! memory. Backward: dx = dy W^T, dW = x^T dy (in W's own orientation), dbias = sum over rows of dy.
//!
//! x and W are f32 or stored as bf16. The products follow the contract of [`super::product`]; the reference is the definition, in [`reference`].

mod cpu;
mod few_rows;
#[cfg(target_arch = "x86_64")]
mod few_rows_x86;
pub mod reference;

use super::product::{Numbers, Precision};
pub use cpu::{backward_input, backward_weight, forward, forward_rounded, rows_keep_their_bits};
pub use few_rows::FEW_ROWS;

/// How a weight lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Orientation {
    /// [I, O].
    InOut,
    /// [O, I].
    OutIn,
}

/// Sizes of a weight, and how it is multiplied.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    pub inputs: usize,
    pub outputs: usize,
    pub orientation: Orientation,
    /// What the operands of all three products are rounded to: x, W and dy, but never bias, residual and results.
    pub precision: Precision,
}

/// A weight and its sizes.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    /// The f32 weight, or its copy in bf16.
    pub data: Numbers<'a>,
    pub dims: Dims,
}
