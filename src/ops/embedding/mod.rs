//! Token and position embeddings: rows gathered from tables, and gradients scattered back.
//!
//! y[r] = tokens[ids[r]] (+ positions[first + r % sequence]), [N, C]. Backward: dtokens[id] = sum of dy[r] over the
//! rows r with that id, in the order of r; dpositions[p] likewise.

mod cpu;
pub mod reference;

pub use cpu::{backward, backward_positions, forward};

/// A token that the table does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the token at place {place} of the batch is {id}, but the model's vocabulary has {vocabulary} tokens: \
     check that the data was tokenised with the model's tokenizer"
)]
pub struct IdError {
    pub place: usize,
    pub id: u32,
    pub vocabulary: usize,
}

/// Which position each row stands at.
#[derive(Clone, Copy, Debug)]
pub struct Positions<'a> {
    /// [P, C], P >= first + sequence.
    pub table: &'a [f32],
    /// Rows of one sequence.
    pub sequence: usize,
    /// The position of a sequence's first row: 0 in training, further on when a text is continued.
    pub first: usize,
}
