//! The loop of a small task: the same steps, records, checkpoints and optimizers as a GPT's run, without its data path.

use super::problem::{Pass, Problem};
use super::tracking::{Point, Tracker};
use crate::data::{Identity, Position};
use crate::optim::{GradientSource, Labels, Optimizer, OptimizerState, Schedule, StepInput};
use crate::params::ParameterStore;
use crate::random::{Stream, generator};
use crate::train::checkpoint::{self, Checkpoints, State};
use crate::train::{Interrupt, Journal, Outcome, Record, RunFolder, StepError};
use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use std::path::Path;
use std::time::Instant;

/// Prefix of a problem's own state among the optimizer's tensors of a checkpoint.
const OWN_STATE: &str = "task.";

/// Everything that a run needs.
pub struct TaskRun<'a> {
    pub folder: &'a RunFolder,
    pub problem: Box<dyn Problem>,
    pub store: ParameterStore,
    pub optimizer: Box<dyn Optimizer>,
    pub optimizer_name: String,
    pub peak_lr: f64,
    pub schedule: Schedule,
    pub seed: u64,
    pub grad_clip: Option<f64>,
    /// Steps done, and the last one of this run.
    pub step: u64,
    pub steps: u64,
    /// Intervals in steps; 0: only at the end.
    pub eval_every: u64,
    pub checkpoint_every: u64,
    pub keep_last: usize,
    pub tracker: Option<Tracker>,
    pub interrupt: Interrupt,
    /// What a person sees of a step.
    pub show: &'a mut dyn FnMut(&Record),
    /// What a person is told that goes wrong with it.
    pub warn: &'a dyn Fn(&[String]),
}

/// The current batch for the optimizers that look at it twice.
struct StepBatch<'a> {
    problem: &'a mut dyn Problem,
    seed: u64,
    step: u64,
}

impl GradientSource for StepBatch<'_> {
    fn recompute(&mut self, store: &mut ParameterStore, labels: Labels) -> Result<()> {
        store.start_gradients();
        let mut generator = generator(self.seed, Stream::SampledLabels);
        generator.set_word_pos(u128::from(self.step) << 40);
        let pass = match labels {
            Labels::Data => Pass::Again,
            Labels::Sampled => Pass::Sampled(&mut generator),
        };
        self.problem.gradients(store, pass).map(|_| ())
    }
}

impl TaskRun<'_> {
    /// Trains to the last step.
    ///
    /// # Errors
    /// On a loss or gradient that is not finite, a parameter without gradient, or a refusing disk. No checkpoint is
    /// written of a step that failed.
    pub fn train(&mut self) -> Result<Outcome> {
        let checkpoints = Checkpoints::of_run(self.folder.path());
        checkpoints.settle(self.step, None, self.keep_last)?;
        let mut metrics = Journal::open_complete(&self.folder.path().join("metrics.jsonl"), self.step)?;
        let mut sharpness = match &self.tracker {
            Some(_) => Some(Tracker::journal(self.folder.path(), self.step)?),
            None => None,
        };
        let mut saved_at = (self.step > 0).then_some(self.step);
        while self.step < self.steps {
            let record = self.one_step()?;
            metrics.append(&record)?;
            (self.show)(&record);
            if let (Some(tracker), Some(journal)) = (&self.tracker, &mut sharpness)
                && self.step.is_multiple_of(tracker.every)
            {
                let point = Point { step: self.step, lr: record.lr, eta: record.eta };
                let state = self.optimizer.state();
                let warnings = tracker.measure(&*self.problem, &self.store, &state, point, journal)?;
                (self.warn)(&warnings);
            }
            let stop = self.interrupt.requested();
            if stop || self.is_due(self.checkpoint_every) {
                metrics.sync()?;
                self.save(&checkpoints)?;
                saved_at = Some(self.step);
            }
            if stop {
                return Ok(Outcome::Interrupted);
            }
        }
        if saved_at != Some(self.step) {
            metrics.sync()?;
            self.save(&checkpoints)?;
        }
        Ok(Outcome::Finished)
    }

    fn is_due(&self, interval: u64) -> bool {
        self.step == self.steps || (interval > 0 && self.step.is_multiple_of(interval))
    }

    fn one_step(&mut self) -> Result<Record> {
        let (started, step) = (Instant::now(), self.step + 1);
        let batch = self.problem.draw(step);
        self.store.start_gradients();
        let loss = self.problem.gradients(&mut self.store, Pass::First)?;
        let place = || format!("the batch {batch}");
        if !loss.sum.is_finite() {
            let rows = self.problem.batch();
            return Err(
                StepError::LossNotFinite { step, loss: loss.mean(), micro_batch: 1, rows, place: place() }.into()
            );
        }
        let names: Vec<String> = self.store.without_gradient().into_iter().map(str::to_owned).collect();
        if !names.is_empty() {
            return Err(StepError::NoGradient { step, names }.into());
        }
        let lr = self.schedule.lr(self.peak_lr, self.step);
        let input = StepInput { scheduled_lr: lr, gradient_scale: 1.0 / loss.count as f64, grad_clip: self.grad_clip };
        let mut source = StepBatch { problem: &mut *self.problem, seed: self.seed, step };
        let report = self.optimizer.step(&mut self.store, &input, &mut source).map_err(|error| match error {
            error if error.is_about_gradients() => {
                StepError::GradientNotFinite { step, place: place(), source: error }.into()
            }
            other => anyhow::Error::from(other),
        })?;
        if !report.velocity_sq.is_finite() {
            return Err(StepError::UpdateNotFinite { step, velocity_sq: report.velocity_sq }.into());
        }
        self.step = step;
        let seconds = started.elapsed().as_secs_f64();
        let examples = self.problem.batch() as u64;
        let mut record = Record {
            step,
            tokens: step * examples,
            loss: loss.mean(),
            grad_norm: report.grad_norm,
            lr,
            eta: report.eta,
            gate: report.gate,
            velocity_sq: report.velocity_sq,
            step_ms: 1e3 * seconds,
            tokens_per_s: examples as f64 / seconds,
            batch: Some(batch),
            ..Record::default()
        };
        if self.is_due(self.eval_every) {
            let scores = self.problem.evaluate(&self.store)?;
            ensure!(scores.loss.is_finite(), "the validation loss after step {step} is {}", scores.loss);
            record.val_loss = Some(scores.loss);
            (record.val_accuracy, record.val_distance) = (scores.accuracy, scores.distance);
        }
        Ok(record)
    }

    fn save(&self, checkpoints: &Checkpoints) -> Result<()> {
        let mut optimizer = self.optimizer.state();
        for (name, numbers) in self.problem.state() {
            let len = numbers.len();
            optimizer.tensors.push((format!("{OWN_STATE}{name}"), Tensor::from_vec(numbers, len, &Device::Cpu)?));
        }
        let state = State {
            format: checkpoint::FORMAT,
            step: self.step,
            tokens: self.step * self.problem.batch() as u64,
            schedule_steps: self.schedule.steps,
            seed: self.seed,
            position: position(&*self.problem, self.step),
            optimizer: self.optimizer_name.clone(),
            optimizer_scalars: optimizer.scalars.clone(),
            pending: None,
            base: None,
            best: None,
        };
        checkpoints.write(self.store.layout(), self.store.weights(), &optimizer, &state, self.keep_last)?;
        Ok(())
    }
}

/// A small task's place in its data: the step says it, and the data's hash says in what.
fn position(problem: &dyn Problem, step: u64) -> Position {
    let identity = Identity {
        version: 0,
        files: 0,
        content: problem.data_hash().to_owned(),
        text_column: None,
        tokenizer: None,
        begin_of_text: None,
        sequence_length: 0,
        shuffle_seed: None,
    };
    Position { epoch: 0, unit: 0, document: step, token: 0, identity }
}

/// A checkpoint as a small task takes it up.
pub struct Loaded {
    pub state: State,
    pub weights: Vec<f32>,
    pub optimizer: OptimizerState,
}

/// Reads the checkpoint at `folder` and gives the problem its own state back.
///
/// # Errors
/// When the checkpoint was made with other data, or a file is not what it should be.
pub fn load(folder: &Path, problem: &mut dyn Problem) -> Result<Loaded> {
    let state = checkpoint::read_state(folder)?;
    ensure!(
        state.position.identity.content == problem.data_hash(),
        "the checkpoint {} was made with other data",
        folder.display()
    );
    let layout = problem.layout().clone();
    let mut weights = vec![0.0; layout.len()];
    checkpoint::read_weights(folder, &layout, &mut weights)?;
    let mut optimizer = checkpoint::read_optimizer(folder, &state)?;
    let mut own = Vec::new();
    let mut rest = Vec::new();
    for (name, tensor) in optimizer.tensors {
        match name.strip_prefix(OWN_STATE) {
            Some(name) => own.push((name.to_owned(), tensor.flatten_all()?.to_vec1::<f32>()?)),
            None => rest.push((name, tensor)),
        }
    }
    optimizer.tensors = rest;
    problem.load_state(&own).with_context(|| format!("in {}", folder.display()))?;
    Ok(Loaded { state, weights, optimizer })
}
