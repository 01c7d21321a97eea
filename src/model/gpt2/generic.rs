//! GPT-2's forward and backward through the twin: any device, one block at a time.
//!
//! The forward pass keeps the input of each block and nothing else. The backward pass runs a block's twin again on
//! temporary variables, takes candle's gradient of sum(y * dy), and adds the results to the flat gradients.

use super::twin::{self, BlockTensors};
use super::{Gpt2Config, Gpt2Parameters, LossSum};
use crate::model::{Batch, IGNORE, Labels};
use crate::params::{ParameterStore, on_cpu};
use crate::random::uniform;
use candle_core::{Result, Tensor, Var, bail};
use rand_chacha::ChaCha8Rng;

/// The twin as an engine. Holds no buffers.
pub struct Gpt2Generic {
    pub config: Gpt2Config,
    pub parameters: Gpt2Parameters,
}

/// Temporary variables made of some parameters, and where their gradients go.
struct Variables(Vec<(usize, Var)>);

impl Variables {
    fn new(store: &ParameterStore, indices: &[usize]) -> Result<Self> {
        let variable = |&index: &usize| Ok((index, Var::from_tensor(&store.view(store.weights(), index)?)?));
        Ok(Self(indices.iter().map(variable).collect::<Result<_>>()?))
    }

    fn tensor(&self, place: usize) -> Tensor {
        self.0[place].1.as_tensor().clone()
    }

    fn pair(&self, first: usize) -> [Tensor; 2] {
        [self.tensor(first), self.tensor(first + 1)]
    }

    /// Adds the gradients of `loss` to the store's; gives the gradient of `input`.
    fn backward(&self, store: &mut ParameterStore, loss: &Tensor, input: Option<&Var>) -> Result<Option<Tensor>> {
        let gradients = loss.backward()?;
        for (index, variable) in &self.0 {
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

impl Gpt2Generic {
    fn block_indices(&self, layer: usize) -> [usize; 12] {
        let block = &self.parameters.blocks[layer];
        [
            block.norm_1.weight,
            block.norm_1.bias,
            block.attention_in.weight,
            block.attention_in.bias,
            block.attention_out.weight,
            block.attention_out.bias,
            block.norm_2.weight,
            block.norm_2.bias,
            block.mlp_in.weight,
            block.mlp_in.bias,
            block.mlp_out.weight,
            block.mlp_out.bias,
        ]
    }

    fn block_tensors(variables: &Variables) -> BlockTensors {
        BlockTensors {
            norm_1: variables.pair(0),
            attention_in: variables.pair(2),
            attention_out: variables.pair(4),
            norm_2: variables.pair(6),
            mlp_in: variables.pair(8),
            mlp_out: variables.pair(10),
        }
    }

    /// Views of parameters as plain tensors: nothing of the forward pass is tracked.
    fn views(store: &ParameterStore, indices: &[usize]) -> Result<Vec<Tensor>> {
        indices.iter().map(|&index| store.view(store.weights(), index)).collect()
    }

    /// The input of every block and of the final norm: [B, T, C] each.
    fn forward(&self, store: &ParameterStore, ids: &Tensor) -> Result<Vec<Tensor>> {
        let tables = Self::views(store, &[self.parameters.token_embedding, self.parameters.position_embedding])?;
        let mut inputs = vec![twin::embed(&tables[0], &tables[1], ids)?];
        for layer in 0..self.config.n_layer {
            let views = Self::views(store, &self.block_indices(layer))?;
            let pair = |first: usize| [views[first].clone(), views[first + 1].clone()];
            let tensors = BlockTensors {
                norm_1: pair(0),
                attention_in: pair(2),
                attention_out: pair(4),
                norm_2: pair(6),
                mlp_in: pair(8),
                mlp_out: pair(10),
            };
            inputs.push(twin::block(&self.config, &tensors, &inputs[layer])?);
        }
        Ok(inputs)
    }

    fn ids(store: &ParameterStore, inputs: &[u32], rows: usize, time: usize) -> Result<Tensor> {
        Tensor::from_slice(inputs, (rows, time), store.device())
    }

    /// Logits [rows * time, V].
    pub fn logits(&self, store: &ParameterStore, inputs: &[u32], rows: usize, time: usize) -> Result<Tensor> {
        let hidden = self.forward(store, &Self::ids(store, inputs, rows, time)?)?;
        let norm = self.parameters.norm_final;
        let views = Self::views(store, &[norm.weight, norm.bias, self.parameters.head])?;
        twin::logits(&self.config, &[views[0].clone(), views[1].clone()], &views[2], &hidden[self.config.n_layer])
    }

    /// The loss alone.
    pub fn loss(&self, store: &ParameterStore, batch: Batch) -> Result<LossSum> {
        self.check(batch, batch.targets)?;
        let logits = self.logits(store, batch.inputs, batch.rows, batch.sequence_length())?;
        let (sum, count) = twin::loss_sum(&logits, batch.targets, IGNORE)?;
        Ok(LossSum { sum: f64::from(sum.to_scalar::<f32>()?), count })
    }

    /// Refuses ids outside the vocabulary: a device would read past its tables without a word.
    fn check(&self, batch: Batch, targets: &[u32]) -> Result<()> {
        let vocabulary = self.config.vocab_size as u32;
        let wrong = batch.inputs.iter().chain(targets).find(|&&id| id >= vocabulary && id != IGNORE);
        if let Some(id) = wrong.or_else(|| batch.inputs.iter().find(|&&id| id == IGNORE)) {
            bail!(
                "the batch has the token {id}, but the model's vocabulary has {vocabulary} tokens: check that the \
                 data was tokenised with the model's tokenizer"
            )
        }
        Ok(())
    }

    /// The loss, and its gradient added to the store's.
    pub fn gradients(&self, store: &mut ParameterStore, batch: Batch, labels: Labels) -> Result<LossSum> {
        let ids = Self::ids(store, batch.inputs, batch.rows, batch.sequence_length())?;
        // Where labels are sampled, the targets only say which rows count.
        self.check(batch, if matches!(labels, Labels::Data) { batch.targets } else { &[] })?;
        let hidden = self.forward(store, &ids)?;
        let norm = self.parameters.norm_final;

        let head = Variables::new(store, &[norm.weight, norm.bias, self.parameters.head])?;
        let input = Var::from_tensor(&hidden[self.config.n_layer])?;
        let logits = twin::logits(&self.config, &head.pair(0), &head.tensor(2), input.as_tensor())?;
        let (sum, count) = match labels {
            Labels::Data => twin::loss_sum(&logits, batch.targets, IGNORE)?,
            Labels::Sampled(generator) => {
                let width = self.config.vocab_size;
                let drawn = on_cpu(&logits.detach(), |logits| draw(logits, width, batch.targets, generator))?;
                twin::loss_sum(&logits, &drawn, IGNORE)?
            }
        };
        let Some(mut gradient) = head.backward(store, &sum, Some(&input))? else {
            bail!("the head's twin gave no gradient to its input")
        };
        let loss = LossSum { sum: f64::from(sum.to_scalar::<f32>()?), count };

        for layer in (0..self.config.n_layer).rev() {
            let variables = Variables::new(store, &self.block_indices(layer))?;
            let input = Var::from_tensor(&hidden[layer])?;
            let output = twin::block(&self.config, &Self::block_tensors(&variables), input.as_tensor())?;
            let weighted = (output * gradient.detach())?.sum_all()?;
            let Some(next) = variables.backward(store, &weighted, Some(&input))? else {
                bail!("the twin of block {layer} gave no gradient to its input")
            };
            gradient = next;
        }

        let tables = Variables::new(store, &[self.parameters.token_embedding, self.parameters.position_embedding])?;
        let output = twin::embed(&tables.tensor(0), &tables.tensor(1), &ids)?;
        tables.backward(store, &(output * gradient.detach())?.sum_all()?, None)?;
        Ok(loss)
    }
}

/// A label for each row of `logits` [N, V] whose mask is not [`IGNORE`], drawn by its probability.
fn draw(logits: &[f32], vocabulary: usize, mask: &[u32], generator: &mut ChaCha8Rng) -> Vec<u32> {
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
