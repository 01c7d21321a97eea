//! One optimizer step: micro-batches, gradients, audit, update.

use super::view;
use super::{Record, Run};
use crate::data;
use crate::model::{Draw, Engine, Labels as ModelLabels, LossSum};
use crate::optim::{GradientSource, Labels, OptimError, StepInput};
use crate::params::ParameterStore;
use crate::random::{Stream, generator};
use anyhow::{Context, Result};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};
use std::time::Instant;

/// Why a step cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error(
        "the loss of step {step} is {loss}: micro-batch {micro_batch}, the {rows} rows from {place} on; \
         nothing of this step was saved (a lower optimizer.lr, more warm-up or a tighter train.grad_clip may help)"
    )]
    LossNotFinite { step: u64, loss: f64, micro_batch: usize, rows: usize, place: String },
    #[error(
        "the gradient of step {step} is not finite; its last micro-batch begins at {place}; nothing of this step was saved"
    )]
    GradientNotFinite { step: u64, place: String, source: OptimError },
    #[error(
        "the update of step {step} has overflowed: ||v||^2 is {velocity_sq}; nothing of this step was saved, the last \
         checkpoint stands (a lower optimizer.lr, more warm-up or a tighter train.grad_clip may help)"
    )]
    UpdateNotFinite { step: u64, velocity_sq: f64 },
    #[error("step {step} gave no gradient to {}: {}", names.len(), names.join(", "))]
    NoGradient { step: u64, names: Vec<String> },
}

/// The micro-batches of a step, for optimizers that look at them twice (SAM, SophiaG).
struct StepBatches<'a> {
    engine: &'a mut Engine,
    batches: &'a [data::Batch],
    generator: ChaCha8Rng,
    /// What dropout draws in the first micro-batch.
    draw: Draw,
}

impl GradientSource for StepBatches<'_> {
    fn recompute(&mut self, store: &mut ParameterStore, labels: Labels) -> Result<()> {
        store.start_gradients();
        for (micro_batch, batch) in self.batches.iter().enumerate() {
            self.engine.draw(Draw { micro_batch: micro_batch as u64, ..self.draw });
            let labels = match labels {
                Labels::Data => ModelLabels::Data,
                Labels::Sampled => ModelLabels::Sampled(&mut self.generator),
            };
            self.engine.gradients(store, view(batch), labels)?;
        }
        Ok(())
    }
}

/// Takes a micro-batch into the hash of its step.
fn hash_batch(hasher: &mut Sha256, batch: &data::Batch) {
    hasher.update((batch.rows as u64).to_le_bytes());
    hasher.update(bytemuck::cast_slice::<u32, u8>(&batch.inputs));
    hasher.update(bytemuck::cast_slice::<u32, u8>(&batch.targets));
    if let Some(places) = &batch.places {
        hasher.update(bytemuck::cast_slice::<u32, u8>(places));
    }
}

impl Run<'_> {
    /// Takes one step and describes it.
    pub(super) fn one_step(&mut self, started: Instant) -> Result<Record> {
        let step = self.step + 1;
        self.store.start_gradients();
        let (mut loss, mut tokens) = (LossSum::default(), 0);
        // Only optimizers with a second pass need the batches again.
        let keep = self.optimizer.needs_second_pass();
        let (mut batches, mut hasher) = (Vec::new(), Sha256::new());
        for micro_batch in 0..self.micro_batches {
            let batch = self.stream.next_batch(self.micro_batch).context("cannot read the training data")?;
            hash_batch(&mut hasher, &batch);
            self.engine.draw(Draw { seed: self.seed, step, micro_batch: micro_batch as u64 });
            let part = self.engine.gradients(&mut self.store, view(&batch), ModelLabels::Data)?;
            if !part.sum.is_finite() {
                let place = self.stream.describe_position();
                let (rows, loss) = (batch.rows, part.mean());
                return Err(StepError::LossNotFinite { step, loss, micro_batch: micro_batch + 1, rows, place }.into());
            }
            loss += part;
            tokens += (batch.inputs.len() - batch.padding) as u64;
            if keep {
                batches.push(batch);
            }
        }
        // Costs nothing, so every step is audited, not the first alone.
        let names: Vec<String> = self.store.without_gradient().into_iter().map(str::to_owned).collect();
        if !names.is_empty() {
            return Err(StepError::NoGradient { step, names }.into());
        }

        let lr = self.schedule.lr(self.peak_lr, self.step);
        let input = StepInput { scheduled_lr: lr, gradient_scale: 1.0 / loss.count as f64, grad_clip: self.grad_clip };
        let mut generator = generator(self.seed, Stream::SampledLabels);
        // The stream's place is a function of the step, so that a checkpoint holds no generator.
        generator.set_word_pos(u128::from(step) << 40);
        let mut source = StepBatches {
            engine: &mut self.engine,
            batches: &batches,
            generator,
            draw: Draw { seed: self.seed, step, micro_batch: 0 },
        };
        let report = self.optimizer.step(&mut self.store, &input, &mut source).map_err(|source| match source {
            source if source.is_about_gradients() => {
                StepError::GradientNotFinite { step, place: self.stream.describe_position(), source }.into()
            }
            other => anyhow::Error::from(other),
        })?;
        if !report.velocity_sq.is_finite() {
            return Err(StepError::UpdateNotFinite { step, velocity_sq: report.velocity_sq }.into());
        }

        self.step = step;
        self.tokens += tokens;
        let seconds = started.elapsed().as_secs_f64();
        Ok(Record {
            step,
            tokens: self.tokens,
            loss: loss.mean(),
            grad_norm: report.grad_norm,
            lr,
            eta: report.eta,
            gate: report.gate,
            velocity_sq: report.velocity_sq,
            step_ms: 1e3 * seconds,
            tokens_per_s: tokens as f64 / seconds,
            batch: Some(hasher.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()),
            ..Record::default()
        })
    }
}
