//! Activations: GELU in its tanh form, and SwiGLU.
//!
//! gelu(x) = x/2 * (1 + tanh(u)), u = sqrt(2/pi) * (x + 0.044715 x^3) (Hendrycks, Gimpel, 2016; GPT-2's "gelu_new").
//! Computed as x / (1 + e^(-2u)), the same function without the cancellation of 1 + tanh where x is negative.
//!
//! swiglu(gate, up) = gate / (1 + e^-gate) * up (Shazeer, "GLU Variants Improve Transformer", 2020; LLaMA).
//!
//! At -inf both are NaN, as in PyTorch; large finite x give 0 or x, and slopes of 0 or 1.

mod cpu;
pub mod reference;

pub use cpu::{SwigluGradients, gelu, gelu_backward, swiglu, swiglu_backward};
