//! The validation loss.

use super::{Interrupt, view};
use crate::data::ValidationSet;
use crate::model::{Engine, LossSum};
use crate::params::ParameterStore;
use anyhow::{Result, ensure};

/// The end of an evaluation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Evaluation {
    Done(LossSum),
    Interrupted,
}

/// Mean loss over the whole validation set; a signal ends it between two batches.
pub fn evaluate(
    engine: &mut Engine,
    store: &ParameterStore,
    validation: &ValidationSet,
    interrupt: &Interrupt,
) -> Result<Evaluation> {
    let mut total = LossSum::default();
    for batch in &validation.batches {
        if interrupt.requested() {
            return Ok(Evaluation::Interrupted);
        }
        total += engine.loss(store, view(batch))?;
    }
    ensure!(
        total.sum.is_finite(),
        "the validation loss is {}: the last update has spoilt the weights, and no checkpoint of them is written (a lower \
         optimizer.lr, more warm-up or a tighter train.grad_clip may help)",
        total.mean()
    );
    Ok(Evaluation::Done(total))
}
