//! The stream of batches of examples: epoch after epoch in an order of its own, to be taken up at any row.

use super::{Examples, Packing};
use crate::data::order::Order;
use crate::data::position::{IDENTITY_VERSION, Identity, Position};
use crate::data::stream::Batch;
use anyhow::{Result, ensure};
use std::sync::Arc;

/// Rows of a set of examples.
pub struct ExampleStream {
    examples: Arc<Examples>,
    order: Order,
    row_length: usize,
    packing: Packing,
    identity: Identity,
    epoch: u64,
    /// The epoch's rows of example indices, and the next of them.
    rows: Vec<Vec<usize>>,
    next: usize,
    /// Epoch and row that the last batch begins with.
    batch_start: (u64, usize),
}

impl ExampleStream {
    /// Starts at the beginning, or at `from`: a position of equal examples and settings, or it is refused.
    pub fn open(
        examples: Arc<Examples>,
        order: Order,
        row_length: usize,
        packing: Packing,
        from: Option<&Position>,
    ) -> Result<Self> {
        let identity = Identity {
            version: IDENTITY_VERSION,
            files: examples.files as u64,
            content: format!("{:?} {}", packing, examples.digest),
            text_column: None,
            // The digest is of the ids, so it stands for the tokenizer too.
            tokenizer: None,
            begin_of_text: None,
            sequence_length: row_length as u64,
            shuffle_seed: match order {
                Order::Sequential => None,
                Order::Shuffled { seed } => Some(seed),
            },
        };
        let (epoch, next) = match from {
            Some(position) => {
                position.check(&identity)?;
                (position.epoch, position.unit as usize)
            }
            None => (0, 0),
        };
        let rows = Vec::new();
        let mut stream =
            Self { examples, order, row_length, packing, identity, epoch, rows, next, batch_start: (epoch, next) };
        stream.rows = stream.epoch_rows(epoch);
        let count = stream.rows.len();
        ensure!(next < count, "the checkpoint's place, row {next}, lies outside the epoch's {count} rows");
        Ok(stream)
    }

    fn epoch_rows(&self, epoch: u64) -> Vec<Vec<usize>> {
        let order = self.order.units(epoch, self.examples.list.len());
        self.examples.rows(&order, self.row_length, self.packing)
    }

    /// Rows of the first `epochs` epochs, of the last one as large a share as asked for.
    pub fn rows_of_epochs(&self, epochs: f64) -> u64 {
        let whole = epochs.floor() as u64;
        let counted: u64 = (0..whole).map(|epoch| self.epoch_rows(epoch).len() as u64).sum();
        let share = epochs - whole as f64;
        let rest = if share > 0.0 { (share * self.epoch_rows(whole).len() as f64).round() as u64 } else { 0 };
        counted + rest
    }

    /// The next `rows` rows, which may lie in two epochs.
    pub fn next_batch(&mut self, rows: usize) -> Batch {
        self.batch_start = (self.epoch, self.next);
        let mut chosen = Vec::with_capacity(rows);
        for _ in 0..rows {
            chosen.push(std::mem::take(&mut self.rows[self.next]));
            self.next += 1;
            if self.next == self.rows.len() {
                (self.epoch, self.next) = (self.epoch + 1, 0);
                self.rows = self.epoch_rows(self.epoch);
            }
        }
        self.examples.batch(&chosen)
    }

    /// For a message: where the batch that [`Self::next_batch`] gave last begins.
    pub fn describe_position(&self) -> String {
        let (epoch, row) = self.batch_start;
        format!("row {row} of epoch {epoch}")
    }

    /// The place of the next row.
    pub fn position(&self) -> Position {
        let unit = self.next as u64;
        Position { epoch: self.epoch, unit, document: 0, token: 0, identity: self.identity.clone() }
    }
}
