//! GPT-2 and LLaMA on a CUDA device: products by cuBLAS, everything between them by kernels/model.cu, and the gradients
//! written out (candle's own differentiation would add each one to zeros first).
//!
//! Attention keeps its probabilities [B H, T, T]. The head's logits are formed for a part of the tokens at a time and
//! become their own gradient.

mod attention;
mod gpt2;
mod llama;
mod passes;

use super::fall_back::{check_ids, draw};
use super::gpt2::{Gpt2Config, Gpt2Parameters};
use super::llama::{LlamaConfig, LlamaParameters};
use super::shape::CARD_LOGITS;
use super::{Batch, IGNORE, Labels, LossSum};
use crate::config::Recompute;
use crate::model::extent::place;
use crate::params::{ParameterStore, on_cpu};
use candle_core::{CudaDevice, Result, Tensor};
use passes::{Card, NormKept, Standing};

/// A model on a card.
pub struct CardEngine {
    card: Card,
    network: Network,
    recompute: Recompute,
    /// Logits that are formed at once: those of whole rows, and of one at least.
    logits_at_once: usize,
}

/// Which model, and where its parameters lie.
pub enum Network {
    Gpt2(Gpt2Config, Gpt2Parameters),
    Llama(LlamaConfig, LlamaParameters),
}

/// A model's parts between the head's: blocks over x [N, C].
trait Blocks {
    /// What a block's backward pass needs of its forward pass.
    type Kept;

    fn layers(&self) -> usize;
    fn embed(&self, step: &Step) -> Result<Tensor>;
    fn embed_backward(&self, step: &mut Step, gradient: &Tensor) -> Result<()>;
    fn forward(&self, step: &Step, layer: usize, x: &Tensor) -> Result<(Tensor, Self::Kept)>;
    /// The gradient of the block's input; those of its parameters go to the store.
    fn backward(&self, step: &mut Step, layer: usize, kept: &Self::Kept, dy: &Tensor) -> Result<Tensor>;
    fn last_norm(&self) -> Norm;
    /// Place of the head [V, C].
    fn head(&self) -> usize;
    fn vocabulary(&self) -> usize;
}

/// Places of a norm's parameters; a layer norm has a bias.
#[derive(Clone, Copy)]
struct Norm {
    weight: usize,
    bias: Option<usize>,
    epsilon: f64,
}

/// A pass over one micro-batch.
struct Step<'a> {
    card: &'a Card,
    store: &'a ParameterStore,
    /// Parameters whose gradient something has been written to.
    written: Vec<bool>,
    batch: Batch<'a>,
    positions: &'a [u32],
    ids: Tensor,
    standing: Standing,
}

impl Step<'_> {
    fn weight(&self, index: usize) -> Result<Tensor> {
        self.store.view(self.store.weights(), index)
    }

    fn weight_of(&self, index: Option<usize>) -> Result<Option<Tensor>> {
        index.map(|index| self.weight(index)).transpose()
    }

    /// Where a parameter's gradient lies, and whether something has been written there in this step.
    fn slot(&mut self, index: usize) -> Result<(Tensor, bool)> {
        let accumulate = std::mem::replace(&mut self.written[index], true);
        Ok((self.store.view(self.store.gradients(), index)?, accumulate))
    }

    fn add_gradient(&mut self, index: usize, gradient: &Tensor) -> Result<()> {
        let (slot, accumulate) = self.slot(index)?;
        self.card.accumulate_into(Some(gradient), &slot, accumulate)
    }

    /// The gradient [C] whose sums over chunks of rows these are.
    fn add_sums(&mut self, index: usize, sums: &Tensor) -> Result<()> {
        let (slot, accumulate) = self.slot(index)?;
        self.card.fold_columns_into(sums, &slot, accumulate)
    }

    /// The gradient of a table whose rows `ids` were read.
    fn add_rows(&mut self, index: usize, ids: &[u32], gradient: &Tensor) -> Result<()> {
        let (slot, accumulate) = self.slot(index)?;
        if !accumulate {
            self.card.accumulate_into(None, &slot, false)?;
        }
        self.card.add_rows_by_id(ids, gradient, &slot)
    }

    fn norm(&self, norm: Norm, x: &Tensor) -> Result<(Tensor, NormKept)> {
        let (weight, bias) = (self.weight(norm.weight)?, self.weight_of(norm.bias)?);
        self.card.norm(x, &weight, bias.as_ref(), norm.epsilon, norm.bias.is_some())
    }

    /// The gradient of a norm's input, with `residual` added; those of its parameters go to the store.
    fn norm_backward(
        &mut self,
        norm: Norm,
        dy: &Tensor,
        x: &Tensor,
        kept: &NormKept,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (weight_sums, bias_sums) = self.card.norm_parameter_sums(dy, x, kept)?;
        self.add_sums(norm.weight, &weight_sums)?;
        if let (Some(index), Some(sums)) = (norm.bias, bias_sums) {
            self.add_sums(index, &sums)?;
        }
        self.card.norm_input_gradient(dy, x, &self.weight(norm.weight)?, kept, residual)
    }
}

impl CardEngine {
    pub fn new(device: &CudaDevice, network: Network, recompute: Recompute) -> Self {
        Self { card: Card::new(device), network, recompute, logits_at_once: CARD_LOGITS }
    }

    /// The loss alone.
    pub fn loss(&self, store: &ParameterStore, batch: Batch) -> Result<LossSum> {
        Ok(self.run(store, batch, None)?.0)
    }

    /// The loss, and its gradient added to the store's.
    pub fn gradients(&self, store: &mut ParameterStore, batch: Batch, labels: Labels) -> Result<LossSum> {
        let (loss, written) = self.run(store, batch, Some(labels))?;
        for index in (0..written.len()).filter(|&index| written[index]) {
            store.mark_written(index);
        }
        Ok(loss)
    }

    /// The loss, and which parameters' gradients have been written by now.
    fn run(&self, store: &ParameterStore, batch: Batch, labels: Option<Labels>) -> Result<(LossSum, Vec<bool>)> {
        let mut positions = Vec::new();
        place(batch.documents, batch.extent(), &mut positions);
        match &self.network {
            Network::Gpt2(config, parameters) => self.pass(&(config, parameters), store, batch, &positions, labels),
            Network::Llama(config, parameters) => {
                let model = llama::Model::new(config, parameters, &self.card, &positions)?;
                self.pass(&model, store, batch, &positions, labels)
            }
        }
    }

    /// A forward pass and, where labels are given, a backward pass.
    fn pass<B: Blocks>(
        &self,
        model: &B,
        store: &ParameterStore,
        batch: Batch,
        positions: &[u32],
        labels: Option<Labels>,
    ) -> Result<(LossSum, Vec<bool>)> {
        check_ids(batch, labels.as_ref().unwrap_or(&Labels::Data), model.vocabulary())?;
        let card = &self.card;
        let standing = Standing { positions: card.ids(positions)?, rows: batch.rows, time: batch.sequence_length() };
        let (ids, written) = (card.ids(batch.inputs)?, store.written().to_vec());
        let step = &mut Step { card, store, written, batch, positions, ids, standing };

        let mut x = model.embed(step)?;
        // Each block's input, and what it keeps.
        let mut blocks = Vec::with_capacity(model.layers());
        for layer in 0..model.layers() {
            let (y, kept) = model.forward(step, layer, &x)?;
            let kept = (labels.is_some() && self.recompute == Recompute::None).then_some(kept);
            blocks.push(labels.is_some().then_some((x, kept)));
            x = y;
        }
        let (normed, kept) = step.norm(model.last_norm(), &x)?;
        let (loss, gradient) = self.head(step, model.head(), &normed, labels)?;
        let Some(gradient) = gradient else { return Ok((loss, std::mem::take(&mut step.written))) };
        let mut gradient = step.norm_backward(model.last_norm(), &gradient, &x, &kept, None)?;
        drop((normed, x, kept));
        for (layer, block) in blocks.into_iter().enumerate().rev() {
            let Some((input, kept)) = block else { continue };
            let kept = match kept {
                Some(kept) => kept,
                None => model.forward(step, layer, &input)?.1,
            };
            gradient = model.backward(step, layer, &kept, &gradient)?;
        }
        model.embed_backward(step, &gradient)?;
        Ok((loss, std::mem::take(&mut step.written)))
    }

    /// The loss of x [N, C] under the head and, where labels are given, the gradient of x.
    fn head(
        &self,
        step: &mut Step,
        index: usize,
        x: &Tensor,
        mut labels: Option<Labels>,
    ) -> Result<(LossSum, Option<Tensor>)> {
        let weight = step.weight(index)?;
        let (tokens, vocabulary) = (x.dim(0)?, weight.dim(0)?);
        let weight = step.card.filled_up(&weight, vocabulary.next_multiple_of(8))?;
        let (backward, targets) = (labels.is_some(), step.batch.targets);
        let (mut losses, mut gradients) = (Vec::new(), Vec::new());
        let rows_at_once = (self.logits_at_once / vocabulary).max(1);
        for first in (0..tokens).step_by(rows_at_once) {
            let rows = rows_at_once.min(tokens - first);
            let x = x.narrow(0, first, rows)?;
            let logits = x.matmul(&weight.t()?)?;
            let targets = &targets[first..first + rows];
            let targets = match &mut labels {
                Some(Labels::Sampled(generator)) => {
                    let known = logits.narrow(1, 0, vocabulary)?.contiguous()?;
                    step.card.ids(&on_cpu(&known, |logits| draw(logits, vocabulary, targets, generator))?)?
                }
                _ => step.card.ids(targets)?,
            };
            losses.push(step.card.cross_entropy_in_place(&logits, vocabulary, &targets, IGNORE, backward)?);
            if backward {
                step.add_gradient(index, &logits.t()?.matmul(&x)?.narrow(0, 0, vocabulary)?)?;
                gradients.push(logits.matmul(&weight)?);
            }
        }
        let count = targets.iter().filter(|&&target| target != IGNORE).count() as u64;
        let mut sum = 0.0;
        for losses in losses {
            sum += losses.to_vec1::<f64>()?.iter().sum::<f64>();
        }
        let gradient = match gradients.len() {
            0 => None,
            1 => gradients.pop(),
            _ => Some(Tensor::cat(&gradients, 0)?),
        };
        Ok((LossSum { sum, count }, gradient))
    }
}

#[cfg(test)]
mod tests;
