//! A low-rank adapter beside a linear layer whose own weight is frozen (Hu et al., "LoRA", 2021).
//!
//! y [R, O] += s * (d(x) A^T) B^T with x [R, I], A [r, I], B [O, r], d dropout or nothing. Backward, with u = d(x) A^T:
//! dB += s * dy^T u, du = s * dy B, dA += du^T d(x), dx += d'(du A). u is formed again in the backward pass: it costs
//! r / O of the layer's own product, and nothing is kept. A and B lie as PEFT stores them, whichever way the layer's own
//! weight lies. All in f32.

mod cpu;
pub mod reference;

use super::dropout;
pub use cpu::{backward, forward, rows_keep_their_bits, scratch_len};

/// One layer's adapter.
#[derive(Clone, Copy, Debug)]
pub struct Adapter<'a> {
    /// [r, I]
    pub a: &'a [f32],
    /// [O, r]
    pub b: &'a [f32],
    pub rank: usize,
    pub inputs: usize,
    pub outputs: usize,
    /// s: alpha / r, or alpha / sqrt(r).
    pub scaling: f32,
    /// d: what is dropped of the adapter's input, while training.
    pub dropout: Option<dropout::Mask>,
}
