//! The validation set: the first tokens of its files, tokenized once and kept.

use super::data_set::DataSet;
use super::examples::NOT_COUNTED;
use super::stream::{Batch, StreamSettings, TokenStream};
use super::tokenizer::TextTokenizer;
use anyhow::{Context, Result, ensure};
use std::sync::Arc;

/// Fixed batches, the same for every evaluation.
#[derive(Clone, Debug)]
pub struct ValidationSet {
    pub batches: Vec<Batch>,
}

impl ValidationSet {
    /// The first `tokens` targets of `data` in the order of the files (at least one row, no more than there are), in
    /// batches of `rows` rows of which the last may have fewer. `settings.order` should be sequential.
    pub fn open(
        data: Arc<DataSet>,
        tokenizer: Option<&TextTokenizer>,
        settings: &StreamSettings,
        tokens: u64,
        rows: usize,
    ) -> Result<Self> {
        ensure!(rows > 0, "a validation batch needs at least one row");
        let names = data.names().join(", ");
        let wanted = (tokens / settings.sequence_length as u64).max(1);
        let read = || -> Result<Vec<Batch>> {
            // What would lie in the queue at the end is thrown away.
            let settings =
                StreamSettings { queue_tokens: settings.queue_tokens.min(tokens as usize), ..settings.clone() };
            let mut stream = TokenStream::open(data, tokenizer, &settings, None)?;
            let mut batches: Vec<Batch> = Vec::new();
            for _ in 0..wanted {
                if stream.epoch()? > 0 {
                    break;
                }
                let row = stream.next_batch(1)?;
                match batches.last_mut().filter(|batch| batch.rows < rows) {
                    Some(batch) => {
                        batch.inputs.extend(row.inputs);
                        batch.targets.extend(row.targets);
                        batch.rows += 1;
                    }
                    None => batches.push(row),
                }
            }
            Ok(batches)
        };
        let batches = read().with_context(|| format!("reading the validation data ({names})"))?;
        ensure!(!batches.is_empty(), "the validation data ({names}) hold less than one row");
        Ok(Self { batches })
    }

    /// Number of targets that count.
    pub fn tokens(&self) -> u64 {
        let counted = |batch: &Batch| batch.targets.iter().filter(|&&target| target != NOT_COUNTED).count() as u64;
        self.batches.iter().map(counted).sum()
    }
}
