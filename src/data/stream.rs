//! The stream of rows that a trainer takes its batches from: T+1 tokens each, with stride T, epoch after epoch.

use super::data_set::{Contents, DataSet, hexadecimal};
use super::order::Order;
use super::pipeline::{Delivery, Pipeline, Plan, Segment};
use super::position::{IDENTITY_VERSION, Identity, Position};
use super::tokenizer::TextTokenizer;
use anyhow::{Context, Result, bail, ensure};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Token files of no more ids than this are checked against the vocabulary at once, larger ones as they are read.
const CHECK_TOKENS: u64 = 8 << 20;

/// How a stream is cut and read.
#[derive(Clone, Debug)]
pub struct StreamSettings {
    /// T: a row has T inputs and T targets.
    pub sequence_length: usize,
    pub order: Order,
    /// Ids must be smaller than this.
    pub vocabulary_size: usize,
    /// Threads that tokenize.
    pub threads: usize,
    /// About how many tokens are kept ready ahead of the trainer.
    pub queue_tokens: usize,
}

/// Rows of token ids; row r's inputs are `inputs[r * sequence_length..][..sequence_length]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// [rows, sequence_length]
    pub inputs: Vec<u32>,
    /// [rows, sequence_length]: the token that follows each input.
    pub targets: Vec<u32>,
    pub rows: usize,
    pub sequence_length: usize,
    /// [rows, sequence_length]: each token's place in its example, from 0 on; `None`: a row is one text.
    pub places: Option<Vec<u32>>,
    /// Positions that hold no token of the data.
    pub padding: usize,
}

impl Batch {
    pub fn with_capacity(rows: usize, sequence_length: usize) -> Self {
        let len = rows * sequence_length;
        let (inputs, targets) = (Vec::with_capacity(len), Vec::with_capacity(len));
        Self { inputs, targets, rows: 0, sequence_length, places: None, padding: 0 }
    }

    /// Adds a row of `sequence_length` + 1 tokens.
    pub fn push(&mut self, row: &[u32]) {
        assert_eq!(row.len(), self.sequence_length + 1, "a row's length");
        self.inputs.extend_from_slice(&row[..self.sequence_length]);
        self.targets.extend_from_slice(&row[1..]);
        self.rows += 1;
    }
}

/// How the arriving segments become rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cutting {
    /// Documents are put end to end and cut into rows that overlap by one token.
    Concatenated,
    /// A segment is a row.
    Rows,
}

/// Rows of a data set, read and tokenized ahead by threads that end with this value.
///
/// An epoch visits every document once. Its last tokens that do not fill a row are dropped, and the next epoch begins
/// with row 0 of its own order.
pub struct TokenStream {
    pipeline: Pipeline,
    plan: Arc<Plan>,
    identity: Identity,
    cutting: Cutting,
    epoch: u64,
    /// Segments that have arrived, each with its unit's place in the epoch's order.
    segments: VecDeque<(u64, Segment)>,
    /// Tokens of the first segment that lie before the next row.
    offset: usize,
    /// Tokens in `segments`.
    buffered: usize,
    /// The next row's unit and document while `segments` is empty.
    place: (u64, u64),
    /// What the first segment after a resume must be.
    resumed_at: Option<Position>,
    /// Where the last batch began: epoch, unit, document, token.
    batch_start: (u64, u64, u64, u64),
    rows_in_epoch: u64,
    tokens_in_epoch: u64,
    /// Epochs in a row that ended without giving one row.
    empty_epochs: u32,
}

impl TokenStream {
    /// Starts reading `data` at its beginning, or at `from`: a position of equal data and settings, or it is refused.
    ///
    /// Texts need a `tokenizer`, token files do not use it. Null texts are skipped and counted.
    pub fn open(
        data: Arc<DataSet>,
        tokenizer: Option<&TextTokenizer>,
        settings: &StreamSettings,
        from: Option<&Position>,
    ) -> Result<Self> {
        ensure!(settings.sequence_length > 0 && settings.threads > 0, "sequence_length and threads must be at least 1");
        let (tokenizer, cutting) = match &data.contents {
            Contents::Documents(_) => {
                (Some(tokenizer.context("the data are texts: set [tokenizer] source")?), Cutting::Concatenated)
            }
            Contents::Tokens(_) => (None, Cutting::Rows),
        };
        check_vocabulary(&data, tokenizer, settings)?;
        let identity = identity(&data, tokenizer, settings);
        let plan = Arc::new(Plan {
            data,
            order: settings.order,
            sequence_length: settings.sequence_length,
            vocabulary_size: settings.vocabulary_size,
            encoder: tokenizer.map(TextTokenizer::document_encoder).transpose()?,
            nulls: AtomicUsize::new(0),
        });
        let units = plan.units();
        let resumed_at = match from {
            Some(position) => {
                position.check(&identity)?;
                let inside = (position.unit as usize) < units;
                ensure!(
                    inside,
                    "the checkpoint's place, unit {}, lies outside the data's {units} units",
                    position.unit
                );
                position.clone()
            }
            None => Position { epoch: 0, unit: 0, document: 0, token: 0, identity: identity.clone() },
        };
        let pipeline = Pipeline::start(plan.clone(), &resumed_at, settings.threads, settings.queue_tokens)?;
        Ok(Self {
            pipeline,
            plan,
            identity,
            cutting,
            epoch: resumed_at.epoch,
            segments: VecDeque::new(),
            offset: resumed_at.token as usize,
            buffered: 0,
            place: (resumed_at.unit, resumed_at.document),
            batch_start: (resumed_at.epoch, resumed_at.unit, resumed_at.document, resumed_at.token),
            resumed_at: Some(resumed_at).filter(|position| position.token > 0),
            rows_in_epoch: 0,
            tokens_in_epoch: 0,
            empty_epochs: 0,
        })
    }

    /// The next `rows` rows, waited for if they are not ready. They may lie in two epochs.
    pub fn next_batch(&mut self, rows: usize) -> Result<Batch> {
        let mut batch = Batch::with_capacity(rows, self.plan.sequence_length);
        let mut row = Vec::with_capacity(self.plan.sequence_length + 1);
        for index in 0..rows {
            self.wait_for_row()?;
            if index == 0 {
                let (unit, document) = self.next_place();
                self.batch_start = (self.epoch, unit, document, self.offset as u64);
            }
            self.take_row(&mut row);
            batch.push(&row);
        }
        Ok(batch)
    }

    /// The epoch of the next row, counted from 0. Waits for that row, so an error in the first data shows here too.
    pub fn epoch(&mut self) -> Result<u64> {
        self.wait_for_row()?;
        Ok(self.epoch)
    }

    /// Unit and document that the next row begins in.
    fn next_place(&self) -> (u64, u64) {
        match (self.cutting, self.segments.front()) {
            // The place alone: the front segment, if it is here yet, may be called by another name.
            (Cutting::Rows, _) | (_, None) => self.place,
            (Cutting::Concatenated, Some((unit, segment))) => (*unit, segment.document),
        }
    }

    /// For a message: where the batch that [`Self::next_batch`] gave last begins.
    pub fn describe_position(&self) -> String {
        let (epoch, unit, document, token) = self.batch_start;
        let document = self.plan.describe(epoch, unit, document);
        format!("token {token} of {document} (in epoch {epoch}, where it is unit {unit} of the visit's order)")
    }

    /// The place of the next row.
    pub fn position(&self) -> Position {
        let (unit, document) = self.next_place();
        Position { epoch: self.epoch, unit, document, token: self.offset as u64, identity: self.identity.clone() }
    }

    /// Seconds that the trainer has waited for rows.
    pub fn waited(&self) -> f64 {
        self.pipeline.waited().as_secs_f64()
    }

    /// How full the queue ahead of the trainer is, from 0 to 1.
    pub fn queue_fill(&self) -> f64 {
        self.pipeline.fill()
    }

    /// Null texts skipped since the stream was opened, by the reader, which is ahead of the trainer.
    pub fn skipped_nulls(&self) -> usize {
        self.plan.nulls.load(Ordering::Relaxed)
    }

    /// Tokens of the epoch that the stream stands at the beginning of, counted by tokenising all of it. `told` hears how
    /// many there are so far, and which part of the epoch, from 0 to 1, has been read.
    pub(super) fn count_epoch(mut self, told: &mut dyn FnMut(u64, f64)) -> Result<u64> {
        let units = self.plan.units() as f64;
        let mut tokens = 0;
        while let Delivery::Segments { unit, segments } = self.pipeline.next()? {
            tokens += tokens_of(&segments);
            told(tokens, unit as f64 / units);
        }
        Ok(tokens)
    }

    /// About how many tokens the epoch has, from the first unit that holds any.
    pub(super) fn estimate_epoch(mut self) -> Result<u64> {
        let (mut tokens, mut last) = (0, 0);
        loop {
            match self.pipeline.next()? {
                Delivery::Segments { unit, segments } if unit == last || tokens == 0 => {
                    (tokens, last) = (tokens + tokens_of(&segments), unit);
                }
                Delivery::Segments { .. } => break,
                Delivery::EpochEnd => return Ok(tokens),
            }
        }
        let visited = self.plan.order.units(self.epoch, self.plan.units());
        let read: u64 = visited[..=last as usize].iter().map(|&unit| self.plan.unit_bytes(unit)).sum();
        Ok((tokens as f64 * self.plan.data.summary().read_bytes as f64 / read.max(1) as f64) as u64)
    }

    fn has_row(&self) -> bool {
        match self.cutting {
            Cutting::Concatenated => self.buffered > self.offset + self.plan.sequence_length,
            Cutting::Rows => !self.segments.is_empty(),
        }
    }

    fn wait_for_row(&mut self) -> Result<()> {
        while !self.has_row() {
            match self.pipeline.next()? {
                Delivery::Segments { unit, segments } => {
                    if let Some(first) = segments.first() {
                        self.check_resumed(Some((unit, first)))?;
                    }
                    let tokens = tokens_of(&segments);
                    self.buffered += tokens as usize;
                    self.tokens_in_epoch += tokens;
                    self.segments.extend(segments.into_iter().map(|segment| (unit, segment)));
                }
                Delivery::EpochEnd => self.end_epoch()?,
            }
        }
        Ok(())
    }

    /// Drops what does not fill a row.
    fn end_epoch(&mut self) -> Result<()> {
        self.check_resumed(None)?;
        self.empty_epochs = if self.rows_in_epoch == 0 { self.empty_epochs + 1 } else { 0 };
        // After a resume near the end one epoch may well give no row; the one after it is complete.
        if self.empty_epochs == 2 {
            bail!(too_few(&self.plan.data, self.tokens_in_epoch, self.plan.sequence_length));
        }
        (self.rows_in_epoch, self.tokens_in_epoch) = (0, 0);
        self.segments.clear();
        (self.offset, self.buffered) = (0, 0);
        self.epoch += 1;
        self.place = (0, 0);
        Ok(())
    }

    /// Takes the next row, which has arrived, and steps to the one after it.
    fn take_row(&mut self, row: &mut Vec<u32>) {
        self.rows_in_epoch += 1;
        row.clear();
        let length = self.plan.sequence_length;
        match self.cutting {
            Cutting::Rows => {
                if let Some((unit, segment)) = self.segments.pop_front() {
                    self.buffered -= segment.ids.len();
                    self.place = (unit, segment.document + 1);
                    *row = segment.ids;
                }
            }
            Cutting::Concatenated => {
                let mut skip = self.offset;
                for (_, segment) in &self.segments {
                    let ids = segment.ids.get(skip..).unwrap_or_default();
                    row.extend_from_slice(&ids[..ids.len().min(length + 1 - row.len())]);
                    skip = skip.saturating_sub(segment.ids.len());
                    if row.len() == length + 1 {
                        break;
                    }
                }
                self.offset += length;
                while let Some((_, segment)) = self.segments.front()
                    && self.offset >= segment.ids.len()
                {
                    (self.offset, self.buffered) = (self.offset - segment.ids.len(), self.buffered - segment.ids.len());
                    self.segments.pop_front();
                }
            }
        }
    }

    /// The first segment after a resume must be the document that the position names, and be long enough.
    fn check_resumed(&mut self, first: Option<(u64, &Segment)>) -> Result<()> {
        if let Some(position) = self.resumed_at.take() {
            let found = first.is_some_and(|(unit, segment)| {
                (unit, segment.document) == (position.unit, position.document)
                    && segment.ids.len() as u64 > position.token
            });
            ensure!(
                found,
                "the checkpoint's place (unit {}, document {}, token {}) is not in the data: they have changed since",
                position.unit,
                position.document,
                position.token
            );
        }
        Ok(())
    }
}

/// What decides the rows of a stream.
pub(super) fn identity(data: &DataSet, tokenizer: Option<&TextTokenizer>, settings: &StreamSettings) -> Identity {
    // Token files use no tokenizer.
    let tokenizer = tokenizer.filter(|_| matches!(data.contents, Contents::Documents(_)));
    Identity {
        version: IDENTITY_VERSION,
        files: data.summary().files as u64,
        content: data.digest().to_string(),
        text_column: data.text_column().map(String::from),
        tokenizer: tokenizer.map(|tokenizer| hexadecimal(&tokenizer.digest())),
        begin_of_text: tokenizer.map(TextTokenizer::begin_of_text),
        sequence_length: settings.sequence_length as u64,
        shuffle_seed: match settings.order {
            Order::Sequential => None,
            Order::Shuffled { seed } => Some(seed),
        },
    }
}

fn tokens_of(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| segment.ids.len() as u64).sum()
}

/// What is said of data that give no row.
pub(super) fn too_few(data: &DataSet, tokens: u64, sequence_length: usize) -> String {
    format!(
        "the data ({}) hold {tokens} tokens, but a row takes {} (sequence_length + 1): use more data or shorter sequences",
        data.describe(),
        sequence_length + 1
    )
}

/// Ids that the model has no row for are an error before training, as far as they can be found at once.
fn check_vocabulary(data: &DataSet, tokenizer: Option<&TextTokenizer>, settings: &StreamSettings) -> Result<()> {
    let StreamSettings { vocabulary_size, sequence_length, .. } = *settings;
    if let Some(tokenizer) = tokenizer {
        ensure!(
            tokenizer.vocabulary_size() <= vocabulary_size,
            "the tokenizer has {} ids, but the model's vocabulary {vocabulary_size}: set vocab_size to at least {}",
            tokenizer.vocabulary_size(),
            tokenizer.vocabulary_size()
        );
    }
    if let Contents::Tokens(files) = &data.contents {
        ensure!(files.rows(sequence_length) > 0, too_few(data, files.tokens(), sequence_length));
        if files.tokens() <= CHECK_TOKENS {
            files.read(0..files.tokens(), vocabulary_size)?;
        }
    }
    Ok(())
}
