//! Examples to fine-tune on: prompts with the answers that the loss is taken of, tokenised once and kept in memory.
//!
//! A row of a batch holds one example or, packed, several; each token's place in its own example goes with it, so that
//! the model attends inside examples only and a packed row has the loss of its examples one by one. Targets outside the
//! answers are [`NOT_COUNTED`].

mod chat;
mod completion;
mod oasst;
mod pack;
mod read;
mod stream;
#[cfg(test)]
mod tests;

pub use chat::plain_template;
pub use completion::Template;
pub use pack::Packing;
pub use read::{ChatFormat, CompletionFormat, ExampleFormat, ExampleLimits};
pub use stream::ExampleStream;

use super::data_set::hexadecimal;
use super::files::SourceFile;
use super::stream::Batch;
use super::validation::ValidationSet;
use sha2::{Digest, Sha256};
use std::ops::Range;

/// The target of a position that has no loss.
pub const NOT_COUNTED: u32 = u32::MAX;

/// One tokenised example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    pub ids: Vec<u32>,
    /// What the model learns to write: ranges of `ids`, in order and apart, none empty; never the first token.
    pub answers: Vec<Range<usize>>,
}

impl Example {
    /// Positions that it takes in a row: every token but the last is an input.
    pub fn positions(&self) -> usize {
        self.ids.len() - 1
    }

    /// Targets that count.
    pub fn answer_tokens(&self) -> usize {
        self.answers.iter().map(ExactSizeIterator::len).sum()
    }

    /// What stands before the first answer, and that answer without its last token, which ends it.
    pub fn question_and_answer(&self) -> (&[u32], &[u32]) {
        let first = &self.answers[0];
        (&self.ids[..first.start], &self.ids[first.start..first.end - 1])
    }
}

/// What became of the records that were read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExampleCounts {
    /// Rows, lines or threads.
    pub records: usize,
    /// Left out: a text of theirs is null.
    pub nulls: usize,
    /// Left out: they have no answer, or nothing of it was left after the cut.
    pub without_answer: usize,
    /// Conversations whose last user turn, which has no reply, was taken off.
    pub unanswered: usize,
    /// Left out for their length.
    pub dropped: usize,
    /// Cut at the row's length.
    pub truncated: usize,
    /// Messages whose parent is not in the files, and trees that are not ready for export (OASST).
    pub orphans: usize,
    pub unready_trees: usize,
    pub tokens: u64,
    pub answer_tokens: u64,
    /// Tokens of the longest example that is used.
    pub longest: usize,
}

/// The examples of a run, in the order of the files.
pub struct Examples {
    list: Vec<Example>,
    counts: ExampleCounts,
    /// SHA-256 over all ids and answers.
    digest: String,
    files: usize,
    bytes: u64,
    /// Pads rows: its loss never counts and nothing attends to it.
    padding: u32,
}

impl Examples {
    fn new(list: Vec<Example>, counts: ExampleCounts, files: &[SourceFile], padding: u32) -> Self {
        let mut digest = Sha256::new();
        for example in &list {
            digest.update((example.ids.len() as u64).to_le_bytes());
            example.ids.iter().for_each(|id| digest.update(id.to_le_bytes()));
            digest.update((example.answers.len() as u64).to_le_bytes());
            for answer in &example.answers {
                [answer.start, answer.end].iter().for_each(|place| digest.update((*place as u64).to_le_bytes()));
            }
        }
        let bytes = files.iter().map(|file| file.bytes.len()).sum();
        let digest = hexadecimal(&digest.finalize());
        Self { list, counts, digest, files: files.len(), bytes, padding }
    }

    pub fn list(&self) -> &[Example] {
        &self.list
    }

    pub fn counts(&self) -> &ExampleCounts {
        &self.counts
    }

    /// Bytes of the files that were read.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Everything that was counted, as one line; what was left out is never missing from it.
    pub fn describe(&self) -> String {
        let counts = &self.counts;
        let mut line = format!(
            "{} examples, {} tokens, {} of them answers; the longest has {}",
            self.list.len(),
            counts.tokens,
            counts.answer_tokens,
            counts.longest
        );
        for (count, what) in [
            (counts.truncated, "cut at the row's length"),
            (counts.dropped, "left out: longer than a row"),
            (counts.without_answer, "left out: nothing to learn from"),
            (counts.nulls, "left out: a text is null"),
            (counts.unanswered, "conversations without their last user turn, which has no reply"),
            (counts.unready_trees, "trees left out: not ready for export"),
            (counts.orphans, "messages left out: their parent is missing"),
        ] {
            if count > 0 {
                line += &format!("; {count} {what}");
            }
        }
        line
    }

    /// Rows of at most `row_length` positions that hold every example once, in the order given.
    fn rows(&self, order: &[usize], row_length: usize, packing: Packing) -> Vec<Vec<usize>> {
        let lengths: Vec<usize> = self.list.iter().map(Example::positions).collect();
        pack::rows(&lengths, order, row_length, packing)
    }

    /// Examples in fixed batches of `rows` rows, of which the last may have fewer: in the order of the files, as many
    /// as it takes to score `tokens` targets.
    pub fn validation_set(&self, row_length: usize, packing: Packing, rows: usize, tokens: u64) -> ValidationSet {
        let mut scored = 0;
        let wanted = self.list.iter().take_while(|example| {
            let before = scored;
            scored += example.answer_tokens() as u64;
            before < tokens
        });
        let order: Vec<usize> = (0..wanted.count()).collect();
        let all = self.rows(&order, row_length, packing);
        ValidationSet { batches: all.chunks(rows.max(1)).map(|rows| self.batch(rows)).collect() }
    }

    /// A batch of rows of examples, as long as its longest row.
    fn batch(&self, rows: &[Vec<usize>]) -> Batch {
        let used = |row: &Vec<usize>| row.iter().map(|&index| self.list[index].positions()).sum::<usize>();
        let length = rows.iter().map(used).max().unwrap_or(0);
        let mut batch = Batch::with_capacity(rows.len(), length);
        let mut places = Vec::with_capacity(rows.len() * length);
        for row in rows {
            for example in row.iter().map(|&index| &self.list[index]) {
                let first = batch.targets.len();
                batch.inputs.extend_from_slice(&example.ids[..example.positions()]);
                batch.targets.resize(batch.inputs.len(), NOT_COUNTED);
                for answer in &example.answers {
                    let targets = &mut batch.targets[first + answer.start - 1..first + answer.end - 1];
                    targets.copy_from_slice(&example.ids[answer.clone()]);
                }
                places.extend(0..example.positions() as u32);
            }
            let end = (batch.rows + 1) * length;
            batch.padding += end - batch.inputs.len();
            batch.inputs.resize(end, self.padding);
            batch.targets.resize(end, NOT_COUNTED);
            // Every token of the padding is a document of its own.
            places.resize(end, 0);
            batch.rows += 1;
        }
        batch.places = Some(places);
        batch
    }
}
