//! Where a trainer takes its batches from: running text, or examples.

use super::examples::ExampleStream;
use super::position::Position;
use super::stream::{Batch, TokenStream};
use anyhow::Result;

/// The batches of a run.
pub enum Feed {
    /// Documents put end to end, and rows cut from them.
    Text(Box<TokenStream>),
    /// Examples, packed or padded.
    Examples(Box<ExampleStream>),
}

impl Feed {
    /// The next `rows` rows, waited for if they are not ready.
    pub fn next_batch(&mut self, rows: usize) -> Result<Batch> {
        match self {
            Self::Text(stream) => stream.next_batch(rows),
            Self::Examples(stream) => Ok(stream.next_batch(rows)),
        }
    }

    /// Null texts that have been passed over since the feed was opened.
    pub fn skipped_nulls(&self) -> usize {
        match self {
            Self::Text(stream) => stream.skipped_nulls(),
            Self::Examples(_) => 0,
        }
    }

    /// For a message: where the last batch begins.
    pub fn describe_position(&self) -> String {
        match self {
            Self::Text(stream) => stream.describe_position(),
            Self::Examples(stream) => stream.describe_position(),
        }
    }

    /// How full the queue ahead of the trainer is, from 0 to 1; examples are all there.
    pub fn queue_fill(&self) -> f64 {
        match self {
            Self::Text(stream) => stream.queue_fill(),
            Self::Examples(_) => 1.0,
        }
    }

    /// The place of the next row.
    pub fn position(&self) -> Position {
        match self {
            Self::Text(stream) => stream.position(),
            Self::Examples(stream) => stream.position(),
        }
    }

    /// Seconds that the trainer has waited for rows.
    pub fn waited(&self) -> f64 {
        match self {
            Self::Text(stream) => stream.waited(),
            Self::Examples(_) => 0.0,
        }
    }
}
