//! The training loop, and beside it checkpoints, metrics, the run folder, signals and the display.

pub mod checkpoint;
mod evaluate;
mod metrics;
mod progress;
mod run_folder;
mod signals;
mod step;

pub use evaluate::{Evaluation, evaluate};
pub use metrics::{Metrics, Record, read as read_metrics};
pub use progress::{GIB, Peak, Progress, Verbosity, peak_memory_bytes, short};
pub use run_folder::{RunFolder, Start, fresh_path, is_run};
pub use signals::Interrupt;
pub use step::StepError;

use crate::data::{self, TokenStream, ValidationSet};
use crate::model::{Batch, Documents, Engine};
use crate::optim::{Optimizer, Schedule};
use crate::params::ParameterStore;
use anyhow::Result;
use checkpoint::{Checkpoints, State};
use std::time::Instant;

/// A batch of data as the model takes it.
fn view(batch: &data::Batch) -> Batch<'_> {
    let documents = batch.places.as_deref().map_or(Documents::Whole, Documents::Packed);
    Batch { inputs: &batch.inputs, targets: &batch.targets, rows: batch.rows, documents }
}

/// A text that the model writes during training, made by the caller.
pub type Sampler<'a> = dyn FnMut(&ParameterStore) -> Result<String> + 'a;

/// Everything that a run needs, resolved and loaded.
pub struct Run<'a> {
    pub folder: &'a RunFolder,
    pub engine: Engine,
    pub store: ParameterStore,
    pub optimizer: Box<dyn Optimizer>,
    pub optimizer_name: String,
    /// `optimizer.lr`: the schedule multiplies it.
    pub peak_lr: f64,
    pub schedule: Schedule,
    pub seed: u64,
    pub grad_clip: Option<f64>,
    pub stream: TokenStream,
    pub validation: Option<ValidationSet>,
    pub micro_batch: usize,
    pub micro_batches: usize,
    /// Steps done before this process, tokens seen in them, and a record whose evaluation was interrupted.
    pub step: u64,
    pub tokens: u64,
    pub pending: Option<Record>,
    /// Last step of this run.
    pub steps: u64,
    /// Intervals in steps; 0: only at the end (evaluation, checkpoint), never (samples).
    pub eval_every: u64,
    pub checkpoint_every: u64,
    pub sample_every: u64,
    pub keep_last: usize,
    pub interrupt: Interrupt,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Finished,
    /// Stopped by a signal after saving.
    Interrupted,
}

impl Run<'_> {
    /// Trains to the last step.
    ///
    /// # Errors
    /// On a non-finite loss or gradient, a parameter without gradient, unreadable data, a refusing disk. No checkpoint
    /// is written of a step that failed.
    pub fn train(&mut self, progress: &mut Progress, sampler: &mut Sampler) -> Result<Outcome> {
        let checkpoints = Checkpoints::of_run(self.folder.path());
        checkpoints.remove_leftovers()?;
        // A pending record is written when its evaluation ends; it may stand there already if that was interrupted too.
        let recorded = self.step - u64::from(self.pending.is_some());
        let mut metrics = Metrics::open(self.folder.path(), recorded)?;
        let mut saved_at = (self.step > 0).then_some(self.step);

        if let Some(record) = self.pending.take()
            && self.conclude(record, &mut metrics, progress)? == Outcome::Interrupted
        {
            return Ok(Outcome::Interrupted);
        }
        while self.step < self.steps {
            let started = Instant::now();
            let waited_before = self.stream.waited();
            let record = self.one_step(started)?;
            let waited = self.stream.waited() - waited_before;
            let ended = self.conclude_step(record, waited, &mut metrics, progress)?;
            if self.is_due(self.sample_every, false) {
                let text = sampler(&self.store)?;
                progress.note(&format!("step {} sample: {text}", self.step));
            }
            if ended == Outcome::Interrupted || self.is_due(self.checkpoint_every, true) {
                metrics.sync()?;
                self.save(&checkpoints)?;
                saved_at = Some(self.step);
            }
            if ended == Outcome::Interrupted {
                return Ok(Outcome::Interrupted);
            }
        }
        if saved_at != Some(self.step) {
            metrics.sync()?;
            self.save(&checkpoints)?;
        }
        Ok(Outcome::Finished)
    }

    /// Whether something that happens every `interval` steps happens now.
    fn is_due(&self, interval: u64, at_end: bool) -> bool {
        (interval > 0 && self.step.is_multiple_of(interval)) || (at_end && self.step == self.steps)
    }

    /// Shows the step, evaluates where that is due, and writes the record. An interrupted evaluation leaves the record
    /// pending: the checkpoint carries it, and the resumed run completes it.
    fn conclude_step(
        &mut self,
        record: Record,
        waited: f64,
        metrics: &mut Metrics,
        progress: &mut Progress,
    ) -> Result<Outcome> {
        let queue = self.stream.queue_note();
        if !(self.validation.is_some() && self.is_due(self.eval_every, true)) {
            progress.step(&record, waited, &queue);
            metrics.append(&record)?;
            return Ok(if self.interrupt.requested() { Outcome::Interrupted } else { Outcome::Finished });
        }
        self.conclude(record, metrics, progress)
    }

    /// Takes the validation loss that belongs to `record` and writes it.
    fn conclude(&mut self, mut record: Record, metrics: &mut Metrics, progress: &mut Progress) -> Result<Outcome> {
        if let Some(validation) = &self.validation {
            match evaluate(&mut self.engine, &self.store, validation, &self.interrupt)? {
                Evaluation::Done(loss) => record.val_loss = Some(loss.mean()),
                Evaluation::Interrupted => {
                    self.pending = Some(record);
                    return Ok(Outcome::Interrupted);
                }
            }
        }
        progress.step(&record, 0.0, &self.stream.queue_note());
        metrics.append(&record)?;
        Ok(if self.interrupt.requested() { Outcome::Interrupted } else { Outcome::Finished })
    }

    fn save(&self, checkpoints: &Checkpoints) -> Result<()> {
        let optimizer = self.optimizer.state();
        let state = State {
            format: checkpoint::FORMAT,
            step: self.step,
            tokens: self.tokens,
            schedule_steps: self.schedule.steps,
            seed: self.seed,
            position: self.stream.position(),
            optimizer: self.optimizer_name.clone(),
            optimizer_scalars: optimizer.scalars.clone(),
            pending: self.pending.clone(),
        };
        checkpoints.write(self.store.layout(), self.store.weights(), &optimizer, &state, self.keep_last)?;
        Ok(())
    }
}
