//! One GPT-2 block on the CPU, forward and backward.

use super::{Gpt2Config, Gpt2Parameters, LinearParameters, NormParameters};
use crate::model::adapter::Adapters;
use crate::model::dropout::{Site, dropped};
use crate::model::extent::{Extent, Rows};
use crate::model::projection::Projection;
use crate::model::reading;
use crate::model::stored::Stored;
use crate::ops::dropout::Draw;
use crate::ops::product::{Numbers, Precision};
use crate::ops::profile::{Part, timed};
use crate::ops::{Gradient, ValuesMut, activation, attention, cross_entropy, layer_norm, linear};
use crate::params::{GradientSlots, Layout, Weights};
use std::sync::Arc;

/// The model without its buffers.
pub struct Model {
    pub config: Gpt2Config,
    /// The model's own, whether it is trained or frozen.
    pub layout: Arc<Layout>,
    /// What is trained beside frozen weights.
    pub adapters: Option<Adapters>,
    /// The probability with which a number is dropped at each [`Site`] in training.
    pub dropout: f64,
    pub parameters: Gpt2Parameters,
    /// What the operands of the products are rounded to.
    pub precision: Precision,
}

/// What one block keeps for its backward pass. R = rows * time, C = n_embd, I = n_inner.
pub struct Saved {
    /// [R, C]: output of the first norm, and [R] each.
    pub normed_1: Stored,
    pub mean_1: Vec<f32>,
    pub rstd_1: Vec<f32>,
    /// [R, 3C]
    pub qkv: Stored,
    /// [R, C]: the heads' outputs, before the projection.
    pub mixed: Stored,
    /// [rows, heads, time]
    pub log_sum_exp: Vec<f32>,
    /// [R, C]: the residual stream after attention.
    pub middle: Vec<f32>,
    /// [R, C]: output of the second norm, and [R] each.
    pub normed_2: Stored,
    pub mean_2: Vec<f32>,
    pub rstd_2: Vec<f32>,
    /// [R, I]: before GELU.
    pub hidden: Stored,
}

/// Working memory that all blocks share. The gradients are empty until the first backward pass.
pub struct Shared {
    /// [R, I]: after GELU, formed again in the backward pass.
    pub activated: Stored,
    /// [R, the widest]: results of products on their way to bf16; in the backward pass the gradient of `activated`.
    pub raw: Vec<f32>,
    /// [R, C], [R, 3C], [R, I]
    pub d_narrow: Vec<f32>,
    pub d_qkv: Vec<f32>,
    pub d_hidden: Stored,
    pub scratch: Vec<f32>,
}

impl Model {
    /// Block `layer`: `x` [R, C] -> `y` [R, C].
    #[allow(clippy::too_many_arguments, reason = "inputs, outputs and working memory of one block")]
    pub fn block_forward(
        &self,
        weights: Weights,
        layer: usize,
        rows: Rows,
        x: &[f32],
        saved: &mut Saved,
        y: &mut [f32],
        shared: &mut Shared,
    ) {
        let (block, draw) = (&self.parameters.blocks[layer], rows.draw);
        let project = |layer| self.projection(weights, layer, draw);
        let Shared { activated, raw, scratch, .. } = shared;
        self.norm(weights, block.norm_1, x, &mut saved.normed_1, &mut saved.mean_1, &mut saved.rstd_1);
        project(block.attention_in).forward_stored(&saved.normed_1, &mut saved.qkv, raw);
        timed(Part::AttentionForward, || {
            let (shape, inputs) = (self.attention(rows.extent), attention::Inputs::Fused(saved.qkv.values()));
            saved.mixed.fill(raw, |mixed| {
                let log_sum_exp = &mut saved.log_sum_exp;
                attention::forward(
                    shape,
                    shape.scale(),
                    inputs,
                    self.pattern(rows, layer),
                    mixed,
                    log_sum_exp,
                    scratch,
                );
            });
        });
        let mask = Site::AfterAttention(layer).mask(draw, self.dropout);
        project(block.attention_out).forward_onto(&saved.mixed, mask, x, &mut saved.middle);

        let middle = &saved.middle;
        self.norm(weights, block.norm_2, middle, &mut saved.normed_2, &mut saved.mean_2, &mut saved.rstd_2);
        project(block.mlp_in).forward_stored(&saved.normed_2, &mut saved.hidden, raw);
        timed(Part::Activation, || activation::gelu(&saved.hidden, &mut *activated));
        let mask = Site::AfterMlp(layer).mask(draw, self.dropout);
        project(block.mlp_out).forward_onto(&*activated, mask, middle, y);
    }

    /// Turns `d_stream`, the gradient of the block's output, into the gradient of its input `x`.
    #[allow(clippy::too_many_arguments, reason = "inputs, outputs and working memory of one block")]
    pub fn block_backward(
        &self,
        weights: Weights,
        slots: &mut GradientSlots,
        layer: usize,
        rows: Rows,
        x: &[f32],
        saved: &Saved,
        d_stream: &mut [f32],
        shared: &mut Shared,
    ) {
        let Shared { activated, raw, d_narrow, d_qkv, d_hidden, scratch } = shared;
        use Gradient as To;
        let (block, draw, width) = (&self.parameters.blocks[layer], rows.draw, self.config.n_embd);
        let project = |layer| self.projection(weights, layer, draw);
        let dy = dropped(Site::AfterMlp(layer).mask(draw, self.dropout), d_stream, width, d_narrow);
        let d_activated = &mut raw[..activated.values().len()];
        if self.adapters.is_some() {
            // What passes through an adapter depends on the layer's input.
            timed(Part::Activation, || activation::gelu(&saved.hidden, &mut *activated));
        }
        project(block.mlp_out).input_gradient(slots, &*activated, dy, To::overwrite(d_activated));
        timed(Part::Activation, || {
            activation::gelu_backward(&saved.hidden, d_activated, &mut *d_hidden, &mut *activated);
        });
        project(block.mlp_out).weight_gradient(slots, &*activated, dy);
        project(block.mlp_in).input_gradient(slots, &saved.normed_2, &*d_hidden, To::overwrite(d_narrow));
        project(block.mlp_in).weight_gradient(slots, &saved.normed_2, &*d_hidden);
        let statistics = (&saved.mean_2[..], &saved.rstd_2[..]);
        let d_middle = To::accumulate(&mut *d_stream);
        self.norm_backward(weights, slots, block.norm_2, &saved.middle, statistics, d_narrow, d_middle, scratch);

        let dy = dropped(Site::AfterAttention(layer).mask(draw, self.dropout), d_stream, width, raw);
        project(block.attention_out).input_gradient(slots, &saved.mixed, dy, To::overwrite(d_narrow));
        project(block.attention_out).weight_gradient(slots, &saved.mixed, dy);
        timed(Part::AttentionBackward, || {
            let saved = attention::Saved {
                inputs: attention::Inputs::Fused(saved.qkv.values()),
                pattern: self.pattern(rows, layer),
                y: saved.mixed.values(),
                log_sum_exp: &saved.log_sum_exp,
            };
            let (shape, gradients) = (self.attention(rows.extent), attention::InputGradients::Fused(d_qkv));
            attention::backward(shape, shape.scale(), saved, d_narrow, gradients, scratch);
        });
        project(block.attention_in).input_gradient(slots, &saved.normed_1, &*d_qkv, To::overwrite(d_narrow));
        project(block.attention_in).weight_gradient(slots, &saved.normed_1, &*d_qkv);
        let statistics = (&saved.mean_1[..], &saved.rstd_1[..]);
        self.norm_backward(weights, slots, block.norm_1, x, statistics, d_narrow, To::accumulate(d_stream), scratch);
    }
}

impl Model {
    fn pattern<'a>(&self, rows: Rows<'a>, layer: usize) -> attention::Pattern<'a> {
        let dropout = Site::Probabilities(layer).mask(rows.draw, self.dropout);
        attention::Pattern { documents: rows.documents, dropout }
    }

    pub fn weight<'a>(&self, weights: Weights<'a>, index: usize) -> &'a [f32] {
        weights.vector(&self.layout, index)
    }

    pub fn table<'a>(&self, weights: Weights<'a>, index: usize) -> Numbers<'a> {
        reading::table(&self.layout, weights, index)
    }

    pub fn matrix<'a>(&self, weights: Weights<'a>, index: usize) -> Numbers<'a> {
        reading::matrix(&self.layout, weights, self.precision, index)
    }

    /// A linear layer of a block; `draw` is what its adapter's dropout is drawn by.
    pub fn projection<'a>(
        &'a self,
        weights: Weights<'a>,
        layer: LinearParameters,
        draw: Option<Draw>,
    ) -> Projection<'a> {
        Projection {
            weights,
            index: layer.weight,
            weight: self.linear_weight(weights, layer),
            bias: Some((layer.bias, self.weight(weights, layer.bias))),
            adapters: self.adapters.as_ref(),
            draw,
        }
    }

    fn linear_weight<'a>(&self, weights: Weights<'a>, layer: LinearParameters) -> linear::Weight<'a> {
        let data = self.matrix(weights, layer.weight);
        // In NF4 it lies as a linear layer of PyTorch does.
        let quantized = matches!(data, Numbers::Nf4(_));
        let orientation = if quantized { linear::Orientation::OutIn } else { linear::Orientation::InOut };
        linear::Weight { data, dims: linear::Dims { orientation, ..self.dims(layer) } }
    }

    fn dims(&self, layer: LinearParameters) -> linear::Dims {
        let shape = &self.layout.parameters()[layer.weight].shape;
        linear::Dims {
            inputs: shape[0],
            outputs: shape[1],
            orientation: linear::Orientation::InOut,
            precision: self.precision,
        }
    }

    /// Whether a row of a pass has the same bits among `many` rows as among `few` (at most as many).
    pub fn rows_keep_their_bits(&self, few: usize, many: usize) -> bool {
        // All blocks have the same sizes.
        let blocks = self.parameters.blocks.iter().take(1);
        let mut layers = blocks.flat_map(|b| [b.attention_in, b.attention_out, b.mlp_in, b.mlp_out]);
        layers.all(|layer| linear::rows_keep_their_bits(self.dims(layer), few, many))
            && self.adapters.as_ref().is_none_or(|adapters| adapters.rows_keep_their_bits(few, many))
    }

    pub fn head<'a>(&self, weights: Weights<'a>) -> cross_entropy::Head<'a> {
        cross_entropy::Head {
            weight: self.matrix(weights, self.parameters.head),
            vocabulary: self.config.vocab_size,
            width: self.config.n_embd,
            precision: self.precision,
        }
    }

    pub fn attention(&self, extent: Extent) -> attention::Shape {
        attention::Shape {
            batch: extent.rows,
            sequence: extent.time,
            heads: self.config.n_head,
            kv_heads: self.config.n_head,
            head_dim: self.config.head_dim(),
        }
    }

    pub fn norm<'a>(
        &self,
        weights: Weights,
        norm: NormParameters,
        x: &[f32],
        y: impl Into<ValuesMut<'a>>,
        mean: &mut [f32],
        rstd: &mut [f32],
    ) {
        let epsilon = self.config.layer_norm_epsilon as f32;
        let (weight, bias) = (self.weight(weights, norm.weight), self.weight(weights, norm.bias));
        timed(Part::Norm, || layer_norm::forward(x, weight, bias, epsilon, y, mean, rstd));
    }

    #[allow(clippy::too_many_arguments, reason = "a norm's saved values, its gradients and scratch")]
    pub fn norm_backward(
        &self,
        weights: Weights,
        slots: &mut GradientSlots,
        norm: NormParameters,
        x: &[f32],
        (mean, rstd): (&[f32], &[f32]),
        dy: &[f32],
        dx: Gradient,
        scratch: &mut [f32],
    ) {
        let saved = layer_norm::Saved { x, weight: self.weight(weights, norm.weight), mean, rstd };
        let (d_weight, d_bias): (Option<Gradient>, Option<Gradient>) = match &self.adapters {
            Some(_) => (None, None),
            None => {
                let (d_weight, d_bias) = slots.pair(norm.weight, norm.bias);
                (Some(d_weight.into()), Some(d_bias.into()))
            }
        };
        timed(Part::Norm, || layer_norm::backward(saved, dy, dx, d_weight, d_bias, scratch));
    }
}
