//! What the fall-back engines of both models share: parameters as tensors for the twins (plain views for a forward
//! pass, temporary variables for a backward one), and the loss of given or drawn labels.

use super::twin::loss_sum;
use super::{Batch, IGNORE, Labels};
use crate::params::{ParameterStore, on_cpu};
use crate::random::uniform;
use candle_core::{Result, Tensor, Var, bail};
use rand_chacha::ChaCha8Rng;

/// Views of parameters as plain tensors: nothing of the forward pass is tracked.
pub fn views<const N: usize>(store: &ParameterStore, indices: [usize; N]) -> Result<[Tensor; N]> {
    let views: Vec<Tensor> = indices.iter().map(|&index| store.view(store.weights(), index)).collect::<Result<_>>()?;
    Ok(std::array::from_fn(|place| views[place].clone()))
}

/// Token ids as a tensor [rows, time] on the store's device.
pub fn ids_on(store: &ParameterStore, ids: &[u32], rows: usize) -> Result<Tensor> {
    Tensor::from_slice(ids, (rows, ids.len() / rows.max(1)), store.device())
}

/// Temporary variables made of some parameters, and where their gradients go.
pub struct Variables<const N: usize> {
    indices: [usize; N],
    variables: Vec<Var>,
}

impl<const N: usize> Variables<N> {
    pub fn new(store: &ParameterStore, indices: [usize; N]) -> Result<Self> {
        let variables = views(store, indices)?.iter().map(Var::from_tensor).collect::<Result<_>>()?;
        Ok(Self { indices, variables })
    }

    pub fn tensors(&self) -> [Tensor; N] {
        std::array::from_fn(|place| self.variables[place].as_tensor().clone())
    }

    /// Adds the gradients of `loss` to the store's; gives the gradient of `input`.
    pub fn backward(&self, store: &mut ParameterStore, loss: &Tensor, input: Option<&Var>) -> Result<Option<Tensor>> {
        let gradients = loss.backward()?;
        for (index, variable) in self.indices.iter().zip(&self.variables) {
            // A variable without a gradient stays unmarked, so the step's audit names it.
            if let Some(gradient) = gradients.get(variable) {
                add_gradient(store, *index, gradient)?;
            }
        }
        Ok(input.and_then(|input| gradients.get(input).cloned()))
    }
}

/// Writes or adds `gradient` into the flat gradients at parameter `index`.
fn add_gradient(store: &mut ParameterStore, index: usize, gradient: &Tensor) -> Result<()> {
    let accumulate = store.mark_written(index);
    let parameter = store.layout().parameters()[index].clone();
    let gradient = gradient.contiguous()?.flatten_all()?;
    let slot = store.gradients().narrow(0, parameter.offset, parameter.len)?;
    let sum = if accumulate { (slot + gradient)? } else { gradient };
    store.gradients().slice_set(&sum, 0, parameter.offset)
}

/// Refuses ids outside the vocabulary: a device would read past its tables without a word. Where labels are drawn, the
/// targets only say which rows count.
pub fn check_ids(batch: Batch, labels: &Labels, vocabulary: usize) -> Result<()> {
    let targets = if matches!(labels, Labels::Data) { batch.targets } else { &[] };
    let wrong = batch.inputs.iter().chain(targets).find(|&&id| id as usize >= vocabulary && id != IGNORE);
    if let Some(id) = wrong.or_else(|| batch.inputs.iter().find(|&&id| id == IGNORE)) {
        bail!(
            "the batch has the token {id}, but the model's vocabulary has {vocabulary} tokens: check that the \
             data was tokenised with the model's tokenizer"
        )
    }
    Ok(())
}

/// The sum of the losses of `logits` [N, V], and the number of targets that count.
pub fn label_loss(logits: &Tensor, batch: Batch, labels: Labels) -> Result<(Tensor, u64)> {
    match labels {
        Labels::Data => loss_sum(logits, batch.targets, IGNORE),
        Labels::Sampled(generator) => {
            let vocabulary = logits.dim(1)?;
            let drawn = on_cpu(&logits.detach(), |logits| draw(logits, vocabulary, batch.targets, generator))?;
            loss_sum(logits, &drawn, IGNORE)
        }
    }
}

/// A label for each row of `logits` [N, V] whose mask is not [`IGNORE`], drawn by its probability.
pub fn draw(logits: &[f32], vocabulary: usize, mask: &[u32], generator: &mut ChaCha8Rng) -> Vec<u32> {
    let label = |(row, &mask): (&[f32], &u32)| {
        if mask == IGNORE {
            return IGNORE;
        }
        let greatest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: f32| f64::from((logit - greatest).exp());
        let mut left = f64::from(uniform(generator)) * row.iter().map(|&logit| weight(logit)).sum::<f64>();
        let passed = row.iter().position(|&logit| {
            left -= weight(logit);
            left < 0.0
        });
        // Rounding, or NaN: the last label will do; the loss is refused later where it is not finite.
        passed.unwrap_or(vocabulary - 1) as u32
    };
    logits.chunks_exact(vocabulary).zip(mask).map(label).collect()
}
