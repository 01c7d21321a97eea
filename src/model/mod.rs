//! The models: which parameters they have, and what a batch's loss and gradients are.

pub mod adapter;
mod base;
mod cache;
#[cfg(feature = "cuda")]
mod card;
mod decoder;
mod dropout;
mod engine;
mod extent;
mod fall_back;
pub mod gpt2;
mod init;
pub mod llama;
#[cfg(test)]
mod precision_tests;
mod projection;
mod prompts;
mod reading;
mod shape;
mod stored;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod together_tests;
mod twin;
pub mod weights;

pub use base::{BaseSource, freeze_bytes, load_base};
pub use cache::KeyValueCache;
pub use decoder::Decoder;
pub use engine::Engine;
pub use extent::Extent;
pub use prompts::Prompt;
pub use shape::ModelShape;

pub use crate::ops::attention::Documents;
pub use crate::ops::dropout::Draw;

use crate::ops::cross_entropy;
use rand_chacha::ChaCha8Rng;

/// A target that counts nothing: no loss, no gradient.
pub const IGNORE: u32 = cross_entropy::IGNORE;

/// Whether the head shares the token embedding's matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    Tied,
    /// `lm_head.weight` [vocab_size, n_embd] of its own.
    Untied,
}

/// The ids that stand before and after a text; GPT-2 has one for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextMarks {
    pub begin: u32,
    pub end: u32,
}

/// Token ids of a micro-batch: `rows` rows of equal length, and the id that follows each of them.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// [rows, time]
    pub inputs: &'a [u32],
    /// [rows, time]; [`IGNORE`] masks.
    pub targets: &'a [u32],
    pub rows: usize,
    /// Attention stays inside a document, where positions count from 0.
    pub documents: Documents<'a>,
}

impl Batch<'_> {
    pub fn extent(&self) -> Extent {
        Extent { rows: self.rows, time: self.sequence_length() }
    }

    pub fn sequence_length(&self) -> usize {
        self.inputs.len() / self.rows.max(1)
    }
}

/// Whose labels the loss is taken of.
pub enum Labels<'a> {
    /// The batch's targets.
    Data,
    /// Drawn from the model's own distribution (SophiaG's estimate of the Hessian's diagonal).
    Sampled(&'a mut ChaCha8Rng),
}

/// A loss as a sum over targets, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSum {
    pub sum: f64,
    pub count: u64,
}

impl LossSum {
    pub fn mean(self) -> f64 {
        self.sum / self.count as f64
    }
}

impl std::ops::AddAssign for LossSum {
    fn add_assign(&mut self, other: Self) {
        self.sum += other.sum;
        self.count += other.count;
    }
}

impl From<cross_entropy::Loss> for LossSum {
    fn from(loss: cross_entropy::Loss) -> Self {
        Self { sum: loss.sum, count: loss.count as u64 }
    }
}
