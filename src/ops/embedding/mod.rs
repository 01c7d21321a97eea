//! Token and position embeddings: rows gathered from tables, and gradients scattered back.
//!
//! y[r] = tokens[ids[r]] (+ positions[places[r]]), [N, C]. Backward: dtokens[id] = sum of dy[r] over the rows r with that
//! id, in the order of r; dpositions[p] likewise, with the places as ids.

mod cpu;
pub mod reference;

pub use cpu::{backward, forward};

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
    /// [P, C]
    pub table: &'a [f32],
    /// [N]: the position of each row, smaller than P.
    pub places: &'a [u32],
}
