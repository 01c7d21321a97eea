//! GPT-2's blocks: x [N, C] + attention + MLP, each behind a layer norm. Linear weights are [inputs, outputs].

use super::attention;
use super::passes::{Columns, NormKept};
use super::{Blocks, Norm, Step};
use crate::model::gpt2::{Gpt2Config, Gpt2Parameters, LinearParameters, NormParameters};
use candle_core::{Result, Tensor};

pub struct Kept {
    x: Tensor,
    norm_1: NormKept,
    normed_1: Tensor,
    attention: attention::Kept,
    mixed: Tensor,
    middle: Tensor,
    norm_2: NormKept,
    normed_2: Tensor,
    /// The MLP's hidden layer before and after its activation.
    before: Tensor,
    hidden: Tensor,
}

fn norm(config: &Gpt2Config, parameters: NormParameters) -> Norm {
    Norm { weight: parameters.weight, bias: Some(parameters.bias), epsilon: config.layer_norm_epsilon }
}

/// The heads of query, key or value (0, 1, 2) among the columns of their product.
fn heads(config: &Gpt2Config, part: usize) -> Columns {
    let width = config.n_embd;
    let (heads, dim) = (config.n_head, config.head_dim());
    Columns { heads, dim, group: 1, row_stride: 3 * width, first_column: part * width }
}

/// The heads of attention's result.
fn mixed_heads(config: &Gpt2Config) -> Columns {
    Columns { row_stride: config.n_embd, ..heads(config, 0) }
}

/// The gradient of a linear layer's input; those of its weight and bias go to the store.
fn linear_backward(step: &mut Step, layer: LinearParameters, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    step.add_sums(layer.bias, &step.card.column_sums(dy)?)?;
    step.add_gradient(layer.weight, &x.t()?.matmul(dy)?)?;
    dy.matmul(&step.weight(layer.weight)?.t()?)
}

impl Blocks for (&Gpt2Config, &Gpt2Parameters) {
    type Kept = Kept;

    fn layers(&self) -> usize {
        self.0.n_layer
    }

    fn embed(&self, step: &Step) -> Result<Tensor> {
        let (tokens, places) = (step.weight(self.1.token_embedding)?, step.weight(self.1.position_embedding)?);
        step.card.embed(&step.ids, &tokens, Some((&step.standing.positions, &places)))
    }

    fn embed_backward(&self, step: &mut Step, gradient: &Tensor) -> Result<()> {
        let (inputs, positions) = (step.batch.inputs, step.positions);
        step.add_rows(self.1.token_embedding, inputs, gradient)?;
        step.add_rows(self.1.position_embedding, positions, gradient)
    }

    fn forward(&self, step: &Step, layer: usize, x: &Tensor) -> Result<(Tensor, Kept)> {
        let (config, block, card) = (self.0, &self.1.blocks[layer], step.card);
        let (normed_1, norm_1) = step.norm(norm(config, block.norm_1), x)?;
        let product = normed_1.matmul(&step.weight(block.attention_in.weight)?)?;
        let bias = step.weight(block.attention_in.bias)?;
        let part = |part| card.heads_apart(&product, Some(&bias), None, heads(config, part), &step.standing);
        let (mixed, attention) = attention::forward(card, &step.standing, [part(0)?, part(1)?, part(2)?])?;
        let mixed = card.heads_together(&mixed, None, mixed_heads(config), &step.standing)?;
        let product = mixed.matmul(&step.weight(block.attention_out.weight)?)?;
        let middle = card.add(&product, Some(&step.weight(block.attention_out.bias)?), Some(x))?;

        let (normed_2, norm_2) = step.norm(norm(config, block.norm_2), &middle)?;
        let product = normed_2.matmul(&step.weight(block.mlp_in.weight)?)?;
        let (before, hidden) = card.gelu(&product, &step.weight(block.mlp_in.bias)?)?;
        let product = hidden.matmul(&step.weight(block.mlp_out.weight)?)?;
        let y = card.add(&product, Some(&step.weight(block.mlp_out.bias)?), Some(&middle))?;
        let x = x.clone();
        Ok((y, Kept { x, norm_1, normed_1, attention, mixed, middle, norm_2, normed_2, before, hidden }))
    }

    fn backward(&self, step: &mut Step, layer: usize, kept: &Kept, dy: &Tensor) -> Result<Tensor> {
        let (config, block, card) = (self.0, &self.1.blocks[layer], step.card);
        let gradient = linear_backward(step, block.mlp_out, &kept.hidden, dy)?;
        let gradient = card.gelu_gradient(&kept.before, &gradient)?;
        let gradient = linear_backward(step, block.mlp_in, &kept.normed_2, &gradient)?;
        let norm_2 = norm(config, block.norm_2);
        let middle = step.norm_backward(norm_2, &gradient, &kept.middle, &kept.norm_2, Some(dy))?;

        let gradient = linear_backward(step, block.attention_out, &kept.mixed, &middle)?;
        let gradient = card.heads_apart(&gradient, None, None, mixed_heads(config), &step.standing)?;
        let parts = attention::backward(card, &step.standing, &kept.attention, &gradient)?;
        // The first fills its columns of a tensor of its own, the others theirs.
        let gradient = card.heads_together(&parts[0], None, heads(config, 0), &step.standing)?;
        for part in [1, 2] {
            card.heads_together_into(&parts[part], None, heads(config, part), &step.standing, &gradient)?;
        }
        let gradient = linear_backward(step, block.attention_in, &kept.normed_1, &gradient)?;
        step.norm_backward(norm(config, block.norm_1), &gradient, &kept.x, &kept.norm_1, Some(&middle))
    }

    fn last_norm(&self) -> Norm {
        norm(self.0, self.1.norm_final)
    }

    fn head(&self) -> usize {
        self.1.head
    }

    fn vocabulary(&self) -> usize {
        self.0.vocab_size
    }
}
