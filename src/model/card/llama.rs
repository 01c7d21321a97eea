//! LLaMA's blocks: x [N, C] + attention + MLP, each behind a root-mean-square norm. Linear weights are [outputs, inputs].

use super::attention;
use super::passes::{Angles, Card, Columns, NormKept};
use super::{Blocks, Norm, Step};
use crate::model::llama::{LlamaConfig, LlamaParameters};
use crate::ops::rotary::Table;
use candle_core::{Result, Tensor};

/// A LLaMA, and the angles of a batch's positions.
pub struct Model<'a> {
    config: &'a LlamaConfig,
    parameters: &'a LlamaParameters,
    angles: Angles,
}

pub struct Kept {
    x: Tensor,
    norm_1: NormKept,
    normed_1: Tensor,
    attention: attention::Kept,
    mixed: Tensor,
    middle: Tensor,
    norm_2: NormKept,
    normed_2: Tensor,
    gate: Tensor,
    up: Tensor,
    hidden: Tensor,
}

/// x [N, I] times the transpose of w [O, I].
fn linear(step: &Step, index: usize, x: &Tensor) -> Result<Tensor> {
    x.matmul(&step.weight(index)?.t()?)
}

/// The gradient of a linear layer's input; that of its weight goes to the store.
fn linear_backward(step: &mut Step, index: usize, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    step.add_gradient(index, &dy.t()?.matmul(x)?)?;
    dy.matmul(&step.weight(index)?)
}

impl<'a> Model<'a> {
    pub fn new(
        config: &'a LlamaConfig,
        parameters: &'a LlamaParameters,
        card: &Card,
        positions: &[u32],
    ) -> Result<Self> {
        let reached = positions.iter().max().map_or(0, |&last| last as usize + 1);
        let table = Table::new(config.rope_theta, config.head_dim, reached, config.rope_scaling);
        let (mut cosines, mut sines) = (Vec::new(), Vec::new());
        for &position in positions {
            let (row_cosines, row_sines) = table.row(position as usize);
            cosines.extend_from_slice(row_cosines);
            sines.extend_from_slice(row_sines);
        }
        let angles = Angles { cosines: card.numbers(&cosines)?, sines: card.numbers(&sines)? };
        Ok(Self { config, parameters, angles })
    }

    fn norm(&self, weight: usize) -> Norm {
        Norm { weight, bias: None, epsilon: self.config.rms_norm_epsilon }
    }

    fn query_heads(&self) -> Columns {
        let LlamaConfig { n_head: heads, head_dim: dim, .. } = *self.config;
        Columns { heads, dim, group: 1, row_stride: self.config.query_width(), first_column: 0 }
    }

    /// The heads of keys or values, each for a group of query heads.
    fn shared_heads(&self) -> Columns {
        let group = self.config.n_head / self.config.n_kv_head;
        Columns { group, row_stride: self.config.kv_width(), ..self.query_heads() }
    }
}

impl Blocks for Model<'_> {
    type Kept = Kept;

    fn layers(&self) -> usize {
        self.config.n_layer
    }

    fn embed(&self, step: &Step) -> Result<Tensor> {
        step.card.embed(&step.ids, &step.weight(self.parameters.token_embedding)?, None)
    }

    fn embed_backward(&self, step: &mut Step, gradient: &Tensor) -> Result<()> {
        let inputs = step.batch.inputs;
        step.add_rows(self.parameters.token_embedding, inputs, gradient)
    }

    fn forward(&self, step: &Step, layer: usize, x: &Tensor) -> Result<(Tensor, Kept)> {
        let (block, card, standing) = (&self.parameters.blocks[layer], step.card, &step.standing);
        let (angles, shared) = (Some(&self.angles), self.shared_heads());
        let (normed_1, norm_1) = step.norm(self.norm(block.norm_1), x)?;
        let query = linear(step, block.query, &normed_1)?;
        let query = card.heads_apart(&query, None, angles, self.query_heads(), standing)?;
        let key = card.heads_apart(&linear(step, block.key, &normed_1)?, None, angles, shared, standing)?;
        let value = card.heads_apart(&linear(step, block.value, &normed_1)?, None, None, shared, standing)?;
        let (mixed, attention) = attention::forward(card, standing, [query, key, value])?;
        let mixed = card.heads_together(&mixed, None, self.query_heads(), standing)?;
        let middle = card.add(&linear(step, block.output, &mixed)?, None, Some(x))?;

        let (normed_2, norm_2) = step.norm(self.norm(block.norm_2), &middle)?;
        let (gate, up) = (linear(step, block.gate, &normed_2)?, linear(step, block.up, &normed_2)?);
        let hidden = card.swiglu(&gate, &up)?;
        let y = card.add(&linear(step, block.down, &hidden)?, None, Some(&middle))?;
        let x = x.clone();
        Ok((y, Kept { x, norm_1, normed_1, attention, mixed, middle, norm_2, normed_2, gate, up, hidden }))
    }

    fn backward(&self, step: &mut Step, layer: usize, kept: &Kept, dy: &Tensor) -> Result<Tensor> {
        let (block, card) = (&self.parameters.blocks[layer], step.card);
        let gradient = linear_backward(step, block.down, &kept.hidden, dy)?;
        let (gate, up) = card.swiglu_gradients(&kept.gate, &kept.up, &gradient)?;
        let gradient = linear_backward(step, block.gate, &kept.normed_2, &gate)?;
        let gradient = card.add(&linear_backward(step, block.up, &kept.normed_2, &up)?, None, Some(&gradient))?;
        let norm_2 = self.norm(block.norm_2);
        let middle = step.norm_backward(norm_2, &gradient, &kept.middle, &kept.norm_2, Some(dy))?;

        let gradient = linear_backward(step, block.output, &kept.mixed, &middle)?;
        let gradient = card.heads_apart(&gradient, None, None, self.query_heads(), &step.standing)?;
        let [query, key, value] = attention::backward(card, &step.standing, &kept.attention, &gradient)?;
        let (angles, shared) = (Some(&self.angles), self.shared_heads());
        let query = card.heads_together(&query, angles, self.query_heads(), &step.standing)?;
        let key = card.heads_together(&key, angles, shared, &step.standing)?;
        let value = card.heads_together(&value, None, shared, &step.standing)?;
        let mut gradient = linear_backward(step, block.query, &kept.normed_1, &query)?;
        for (index, part) in [(block.key, key), (block.value, value)] {
            gradient = card.add(&linear_backward(step, index, &kept.normed_1, &part)?, None, Some(&gradient))?;
        }
        step.norm_backward(self.norm(block.norm_1), &gradient, &kept.x, &kept.norm_1, Some(&middle))
    }

    fn last_norm(&self) -> Norm {
        self.norm(self.parameters.norm_final)
    }

    fn head(&self) -> usize {
        self.parameters.head
    }

    fn vocabulary(&self) -> usize {
        self.config.vocab_size
    }
}
