//! The training loop, and beside it checkpoints, metrics, the run folder, signals and the display.

pub mod checkpoint;
mod evaluate;
mod event_file;
mod journal;
mod log;
mod metrics;
mod progress;
mod run_folder;
mod signals;
mod status;
mod step;

pub use evaluate::{Evaluation, evaluate};
pub use journal::Journal;
pub use log::{Events, RunLog, Sample, Telemetry, read_samples, read_telemetry, unix_time};
pub use metrics::{Record, read as read_metrics};
pub use progress::{GIB, Peak, Progress, Stage, StepLines, Verbosity, human_duration, peak_memory_bytes, short};
pub use run_folder::{RunFolder, Start, fresh_path, is_run};
pub use signals::Interrupt;
pub use status::{Liveness, Phase, Status};
pub use step::StepError;

use crate::data::{self, Feed, ValidationSet};
use crate::model::{Batch, Documents, Engine};
use crate::optim::{Optimizer, Schedule};
use crate::params::ParameterStore;
use anyhow::Result;
use checkpoint::{BaseRecord, Best, Checkpoints, State};
use std::time::Instant;

/// A batch of data as the model takes it.
pub fn view(batch: &data::Batch) -> Batch<'_> {
    let documents = batch.places.as_deref().map_or(Documents::Whole, Documents::Packed);
    Batch { inputs: &batch.inputs, targets: &batch.targets, rows: batch.rows, documents }
}

/// A text that the model writes after a step, made by the caller; `None`: it cannot write any.
pub type Sampler<'a> = dyn FnMut(&ParameterStore, u64) -> Result<Option<Sample>> + 'a;

/// Answers held-out problems after a step: the share of right answers, or `None` if a signal ended it.
pub type Examiner<'a> = dyn FnMut(&ParameterStore) -> Result<Option<f64>> + 'a;

/// What the caller does for the loop: it knows texts.
pub struct Hooks<'a> {
    pub sampler: &'a mut Sampler<'a>,
    /// `None`: no problems are asked.
    pub examiner: Option<&'a mut Examiner<'a>>,
}

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
    pub stream: Feed,
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
    /// The frozen base, where the store holds adapters.
    pub base: Option<BaseRecord>,
    /// Whether the checkpoint of the lowest validation loss is kept, and which it is so far.
    pub keep_best: bool,
    pub best: Option<Best>,
    pub events: Events,
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
    pub fn train(&mut self, progress: &mut Progress, hooks: &mut Hooks) -> Result<Outcome> {
        let checkpoints = Checkpoints::of_run(self.folder.path());
        // A pending record is written when its evaluation ends; it may stand there already if that was interrupted too.
        let recorded = self.step - u64::from(self.pending.is_some());
        let mut log = RunLog::open(self.folder.path(), recorded, self.events)?;
        let mut saved_at = (self.step > 0).then_some(self.step);
        self.best = self.best.filter(|best| checkpoints.has(best.step));
        checkpoints.settle(self.step, self.best.map(|best| best.step), self.keep_last)?;

        if let Some(record) = self.pending.take() {
            if self.conclude(record, 0.0, &mut log, progress, hooks)? == Outcome::Interrupted {
                return Ok(Outcome::Interrupted);
            }
            // With the record's journals its sample was cut off; and the checkpoint still says that the record is owed.
            self.take_sample(&mut log, progress, hooks)?;
            saved_at = None;
        }
        while self.step < self.steps {
            let started = Instant::now();
            let waited_before = self.stream.waited();
            let record = self.one_step(started)?;
            let waited = self.stream.waited() - waited_before;
            let ended = self.conclude_step(record, waited, &mut log, progress, hooks)?;
            self.take_sample(&mut log, progress, hooks)?;
            if ended == Outcome::Interrupted || self.is_due(self.checkpoint_every, true) || self.is_best() {
                progress.stage(Stage::Saving);
                log.sync()?;
                self.save(&checkpoints)?;
                saved_at = Some(self.step);
            }
            if ended == Outcome::Interrupted {
                return Ok(Outcome::Interrupted);
            }
            progress.stage(Stage::Training);
        }
        if saved_at != Some(self.step) {
            log.sync()?;
            self.save(&checkpoints)?;
        }
        let nulls = self.stream.skipped_nulls();
        if nulls > 0 {
            progress.note(&format!("{nulls} texts of the data were null and have been passed over"));
        }
        Ok(Outcome::Finished)
    }

    /// Lets the model write something, where that is due.
    fn take_sample(&self, log: &mut RunLog, progress: &mut Progress, hooks: &mut Hooks) -> Result<()> {
        if self.is_due(self.sample_every, false) {
            progress.stage(Stage::Sampling);
            if let Some(sample) = (hooks.sampler)(&self.store, self.step)? {
                progress.note(&format!("step {} sample: {:?} -> {:?}", sample.step, sample.prompt, sample.text));
                log.sample(&sample)?;
            }
        }
        Ok(())
    }

    /// Takes the validation loss and the exact match before the first step, for people to see what the run begins with.
    pub fn look_first(&mut self, progress: &mut Progress, hooks: &mut Hooks) -> Result<Option<f64>> {
        let Some(validation) = &self.validation else { return Ok(None) };
        progress.stage(Stage::Validating);
        let Evaluation::Done(loss) = evaluate(&mut self.engine, &self.store, validation, &self.interrupt)? else {
            return Ok(None);
        };
        let right = match &mut hooks.examiner {
            Some(examiner) => examiner(&self.store)?,
            None => None,
        };
        let right = right.map_or(String::new(), |share| format!(", exact match {:.1}%", 100.0 * share));
        progress.note(&format!("before the first step: validation loss {:.4}{right}", loss.mean()));
        progress.stage(Stage::Training);
        Ok(Some(loss.mean()))
    }

    /// Whether this step has the lowest validation loss of a run that keeps that checkpoint.
    fn is_best(&self) -> bool {
        self.best.is_some_and(|best| best.step == self.step)
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
        log: &mut RunLog,
        progress: &mut Progress,
        hooks: &mut Hooks,
    ) -> Result<Outcome> {
        if self.validation.is_some() && self.is_due(self.eval_every, true) {
            return self.conclude(record, waited, log, progress, hooks);
        }
        self.write_down(&record, waited, log, progress)
    }

    /// Takes the validation loss and the exact match that belong to `record` and writes it.
    fn conclude(
        &mut self,
        mut record: Record,
        waited: f64,
        log: &mut RunLog,
        progress: &mut Progress,
        hooks: &mut Hooks,
    ) -> Result<Outcome> {
        progress.stage(Stage::Validating);
        if let Some(validation) = &self.validation {
            match evaluate(&mut self.engine, &self.store, validation, &self.interrupt) {
                Ok(Evaluation::Done(loss)) => record.val_loss = Some(loss.mean()),
                Err(error) => {
                    // The step itself was taken, and its record belongs to what explains the failure.
                    self.write_down(&record, waited, log, progress)?;
                    return Err(error.context(format!("cannot validate step {}", record.step)));
                }
                Ok(Evaluation::Interrupted) => {
                    self.pending = Some(record);
                    return Ok(Outcome::Interrupted);
                }
            }
        }
        if let Some(examiner) = &mut hooks.examiner {
            record.exact_match = examiner(&self.store)?;
            if record.exact_match.is_none() {
                // Taken anew, with its loss, when the run goes on.
                record.val_loss = None;
                self.pending = Some(record);
                return Ok(Outcome::Interrupted);
            }
            let percent = 100.0 * record.exact_match.unwrap_or(0.0);
            progress.note(&format!("step {} exact match {percent:.1}% of the held-out problems", record.step));
        }
        if let Some(val_loss) = record.val_loss
            && self.keep_best
            && self.best.is_none_or(|best| val_loss < best.val_loss)
        {
            self.best = Some(Best { step: record.step, val_loss });
        }
        progress.stage(Stage::Training);
        self.write_down(&record, waited, log, progress)
    }

    /// Shows a complete record and writes it down.
    fn write_down(&self, record: &Record, waited: f64, log: &mut RunLog, progress: &mut Progress) -> Result<Outcome> {
        let telemetry = log.telemetry(record.step, self.stream.queue_fill(), waited);
        progress.step(record, &telemetry);
        log.step(record, &telemetry)?;
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
            base: self.base.clone(),
            best: self.best,
        };
        checkpoints.write(self.store.layout(), self.store.weights(), &optimizer, &state, self.keep_last)?;
        Ok(())
    }
}
