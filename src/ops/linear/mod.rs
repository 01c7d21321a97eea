//! The linear layer: y = x W + bias (+ residual), and its gradients.
//!
//! x [R, I], y [R, O]; W is stored [I, O] (GPT-2's Conv1D) or [O, I] (LLaMA, PyTorch), and is never transposed in
//! memory. Backward: dx = dy W^T, dW = x^T dy (in W's own orientation), dbias = sum over rows of dy.
//!
//! The products follow the contract of [`super::product`]; the reference is the definition, in [`reference`].

mod cpu;
pub mod reference;

pub use cpu::{backward_input, backward_weight, forward};

/// How a weight lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Orientation {
    /// [I, O].
    InOut,
    /// [O, I].
    OutIn,
}

/// Sizes of a weight.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    pub inputs: usize,
    pub outputs: usize,
    pub orientation: Orientation,
}

/// A weight and its sizes.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    pub data: &'a [f32],
    pub dims: Dims,
}
