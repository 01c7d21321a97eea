//! The language-model head fused with the cross-entropy loss: the logits of all rows never stand in memory at once.
//!
//! For each row x of C elements with target t: logits l = head x, [V], nll = log(sum_j e^l_j) - l_t. The loss is the SUM
//! of nll over the rows whose target is not [`IGNORE`]; with p = softmax(l), dl = p - onehot(t), dx = dl head,
//! dhead = sum over rows of dl x^T. A step divides by its number of targets once, in the optimizer.
//!
//! Only the rows that take part are multiplied. They go in chunks, each forward and backward in one sweep. Sums of e^l are taken in f64 over pieces of f32, losses
//! in f64 in the order of the rows.

mod cpu;
pub mod reference;

pub use cpu::{forward, forward_backward, scratch_len};

use super::product::{Numbers, Precision};
use rand_chacha::ChaCha8Rng;

/// A target that takes no part in the loss.
pub const IGNORE: u32 = u32::MAX;

/// The loss of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Sum of the negative log-likelihoods, in nats.
    pub sum: f64,
    /// How many targets that are.
    pub count: usize,
}

/// The matrix that turns hidden states into logits, [V, C].
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// In f32, or its copy in bf16.
    pub weight: Numbers<'a>,
    /// V: rows of `weight` that take part (a padded vocabulary's further rows do not).
    pub vocabulary: usize,
    /// C.
    pub width: usize,
    /// What the operands of the three products are rounded to (x, the head and dl); softmax and loss are f32 and f64.
    pub precision: Precision,
}

/// What the rows should have predicted.
#[derive(Debug)]
pub enum Labels<'a> {
    /// The data's targets, [N].
    Given(&'a [u32]),
    /// Labels drawn from the model's own softmax (SophiaG's estimate of the curvature), one draw of the generator a row
    /// whose `mask` [N] is not [`IGNORE`], in the order of the rows.
    Sampled { mask: &'a [u32], generator: &'a mut ChaCha8Rng },
}

/// A target that the vocabulary does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the target at place {place} of the batch is {target}, but the model's vocabulary has {vocabulary} tokens: \
     check that the data was tokenised with the model's tokenizer"
)]
pub struct TargetError {
    pub place: usize,
    pub target: u32,
    pub vocabulary: usize,
}
