//! GPT-2's forward and backward through the twin: any device, one block at a time.
//!
//! The forward pass keeps the input of each block and nothing else. The backward pass runs a block's twin again on
//! temporary variables, takes candle's gradient of sum(y * dy), and adds the results to the flat gradients.

use super::twin;
use super::{Gpt2Config, Gpt2Parameters};
use crate::model::fall_back::{Variables, check_ids, ids_on, label_loss, views};
use crate::model::twin::Places;
use crate::model::{Batch, Labels, LossSum};
use crate::params::ParameterStore;
use candle_core::{DType, Result, Tensor, Var, bail};

/// The twin as an engine. Holds no buffers.
pub struct Gpt2Generic {
    pub config: Gpt2Config,
    pub parameters: Gpt2Parameters,
}

impl Gpt2Generic {
    /// The input of every block and of the final norm: [B, T, C] each.
    fn forward(&self, store: &ParameterStore, ids: &Tensor, places: &Places) -> Result<Vec<Tensor>> {
        let [tokens, positions] = views(store, [self.parameters.token_embedding, self.parameters.position_embedding])?;
        let mut inputs = vec![twin::embed(&tokens, &positions, ids, places)?];
        for (layer, block) in self.parameters.blocks.iter().enumerate() {
            let tensors = views(store, block.all())?.into();
            inputs.push(twin::block(&self.config, places, &tensors, &inputs[layer])?);
        }
        Ok(inputs)
    }

    /// Logits [rows * time, V]; the targets play no part.
    pub fn logits(&self, store: &ParameterStore, batch: Batch) -> Result<Tensor> {
        let places = Places::new(batch.documents, batch.extent(), DType::F32, store.device())?;
        let hidden = self.forward(store, &ids_on(store, batch.inputs, batch.rows)?, &places)?;
        let norm = self.parameters.norm_final;
        let [weight, bias, head] = views(store, [norm.weight, norm.bias, self.parameters.head])?;
        twin::logits(&self.config, &[weight, bias], &head, &hidden[self.config.n_layer])
    }

    /// The loss alone.
    pub fn loss(&self, store: &ParameterStore, batch: Batch) -> Result<LossSum> {
        check_ids(batch, &Labels::Data, self.config.vocab_size)?;
        let logits = self.logits(store, batch)?;
        let (sum, count) = label_loss(&logits, batch, Labels::Data)?;
        Ok(LossSum { sum: f64::from(sum.to_scalar::<f32>()?), count })
    }

    /// The loss, and its gradient added to the store's.
    pub fn gradients(&self, store: &mut ParameterStore, batch: Batch, labels: Labels) -> Result<LossSum> {
        check_ids(batch, &labels, self.config.vocab_size)?;
        let ids = ids_on(store, batch.inputs, batch.rows)?;
        let places = Places::new(batch.documents, batch.extent(), DType::F32, store.device())?;
        let hidden = self.forward(store, &ids, &places)?;
        let norm = self.parameters.norm_final;

        let head = Variables::new(store, [norm.weight, norm.bias, self.parameters.head])?;
        let [weight, bias, matrix] = head.tensors();
        let input = Var::from_tensor(&hidden[self.config.n_layer])?;
        let logits = twin::logits(&self.config, &[weight, bias], &matrix, input.as_tensor())?;
        let (sum, count) = label_loss(&logits, batch, labels)?;
        let Some(mut gradient) = head.backward(store, &sum, Some(&input))? else {
            bail!("the head's twin gave no gradient to its input")
        };
        let loss = LossSum { sum: f64::from(sum.to_scalar::<f32>()?), count };

        for (layer, block) in self.parameters.blocks.iter().enumerate().rev() {
            let variables = Variables::new(store, block.all())?;
            let input = Var::from_tensor(&hidden[layer])?;
            let output = twin::block(&self.config, &places, &variables.tensors().into(), input.as_tensor())?;
            let weighted = (output * gradient.detach())?.sum_all()?;
            let Some(next) = variables.backward(store, &weighted, Some(&input))? else {
                bail!("the twin of block {layer} gave no gradient to its input")
            };
            gradient = next;
        }

        let tables = Variables::new(store, [self.parameters.token_embedding, self.parameters.position_embedding])?;
        let [tokens, positions] = tables.tensors();
        let output = twin::embed(&tokens, &positions, &ids, &places)?;
        tables.backward(store, &(output * gradient.detach())?.sum_all()?, None)?;
        Ok(loss)
    }
}
