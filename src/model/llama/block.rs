//! One LLaMA block on the CPU, forward and backward.

use super::{LlamaConfig, LlamaParameters};
use crate::model::KeyValueCache;
use crate::model::adapter::Adapters;
use crate::model::dropout::{Site, dropped};
use crate::model::extent::Rows;
use crate::model::projection::Projection;
use crate::model::prompts::Fill;
use crate::model::reading;
use crate::model::stored::Stored;
use crate::ops::dropout::Draw;
use crate::ops::product::{Numbers, Precision};
use crate::ops::profile::{Part, timed};
use crate::ops::rotary::{self, Direction};
use crate::ops::{Gradient, ValuesMut, activation, attention, cross_entropy, linear, rms_norm};
use crate::params::{GradientSlots, Layout, Weights};
use std::sync::Arc;

/// The model without its buffers.
pub struct Model {
    pub config: LlamaConfig,
    /// The model's own, whether it is trained or frozen.
    pub layout: Arc<Layout>,
    /// What is trained beside frozen weights.
    pub adapters: Option<Adapters>,
    /// The probability with which a number is dropped at each [`Site`] in training.
    pub dropout: f64,
    pub parameters: LlamaParameters,
    /// At least as many positions as the longest sequence so far.
    pub rotation: rotary::Table,
    /// What the operands of the linear layers' and the head's products are rounded to.
    pub precision: Precision,
}

/// What the rows attend to.
pub enum Past<'a> {
    /// Their own documents, which begin with them.
    None,
    /// The same, and their keys and values are kept as those of sequences of the cache.
    Fill(Fill<'a>),
    /// The cache's sequences, to each of which one row is added.
    Extend(&'a mut KeyValueCache),
}

/// What one block keeps for its backward pass. R = rows * time, C = n_embd, I = n_inner; Q and K are the widths of
/// queries and of keys.
pub struct Saved {
    /// [R, C]: output of the first norm, and [R].
    pub normed_1: Stored,
    pub rstd_1: Vec<f32>,
    /// [R, Q] and [R, K], both rotated, and [R, K].
    pub query: Stored,
    pub key: Stored,
    pub value: Stored,
    /// [R, Q]: the heads' outputs, before the projection.
    pub mixed: Stored,
    /// [rows, heads, time]
    pub log_sum_exp: Vec<f32>,
    /// [R, C]: the residual stream after attention.
    pub middle: Vec<f32>,
    /// [R, C]: output of the second norm, and [R].
    pub normed_2: Stored,
    pub rstd_2: Vec<f32>,
    /// [R, I] each.
    pub gate: Stored,
    pub up: Stored,
}

/// Working memory that all blocks share. The gradients are empty until the first backward pass.
pub struct Shared {
    /// [R, I]: the hidden layer, formed again in the backward pass.
    pub activated: Stored,
    /// [R, the widest]: results of products on their way to bf16; in the backward pass the gradient of `activated`.
    pub raw: Vec<f32>,
    /// [R, C]
    pub d_normed: Vec<f32>,
    /// [R, Q] each.
    pub d_mixed: Vec<f32>,
    pub d_query: Vec<f32>,
    /// [R, K] each.
    pub d_key: Vec<f32>,
    pub d_value: Vec<f32>,
    /// [R, I] each.
    pub d_gate: Stored,
    pub d_up: Stored,
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
        past: &mut Past,
        x: &[f32],
        saved: &mut Saved,
        y: &mut [f32],
        shared: &mut Shared,
    ) {
        let (block, draw) = (&self.parameters.blocks[layer], rows.draw);
        let project = |index| self.projection(weights, index, draw);
        let Shared { activated, raw, scratch, .. } = shared;
        self.norm(weights, block.norm_1, x, &mut saved.normed_1, &mut saved.rstd_1);
        let rotate = |rows: Rows, heads: &mut [f32]| {
            timed(Part::AttentionForward, || {
                rotary::rotate(&self.rotation, Direction::Forward, rows.positions, heads);
            });
        };
        for (to, from) in [(&mut saved.query, block.query), (&mut saved.key, block.key)] {
            to.fill(raw, |to| {
                project(from).forward(&saved.normed_1, None, to);
                rotate(rows, to);
            });
        }
        project(block.value).forward_stored(&saved.normed_1, &mut saved.value, raw);
        timed(Part::AttentionForward, || self.attend(layer, rows, past, saved, raw, scratch));
        let mask = Site::AfterAttention(layer).mask(draw, self.dropout);
        project(block.output).forward_onto(&saved.mixed, mask, x, &mut saved.middle);

        self.norm(weights, block.norm_2, &saved.middle, &mut saved.normed_2, &mut saved.rstd_2);
        project(block.gate).forward_stored(&saved.normed_2, &mut saved.gate, raw);
        project(block.up).forward_stored(&saved.normed_2, &mut saved.up, raw);
        timed(Part::Activation, || activation::swiglu(&saved.gate, &saved.up, &mut *activated));
        let mask = Site::AfterMlp(layer).mask(draw, self.dropout);
        project(block.down).forward_onto(&*activated, mask, &saved.middle, y);
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
        let Shared { activated, raw, d_normed, d_mixed, d_query, d_key, d_value, d_gate, d_up, scratch } = shared;
        use Gradient as To;
        let (block, draw, width) = (&self.parameters.blocks[layer], rows.draw, self.config.n_embd);
        let project = |index| self.projection(weights, index, draw);
        let dy = dropped(Site::AfterMlp(layer).mask(draw, self.dropout), d_stream, width, d_normed);
        let d_activated = &mut raw[..activated.values().len()];
        if self.adapters.is_some() {
            // What passes through an adapter depends on the layer's input.
            timed(Part::Activation, || activation::swiglu(&saved.gate, &saved.up, &mut *activated));
        }
        let to = To::overwrite(d_activated);
        project(block.down).input_gradient(slots, &*activated, dy, to);
        timed(Part::Activation, || {
            let (dgate, dup, y) = (d_gate.values_mut(), d_up.values_mut(), activated.values_mut());
            activation::swiglu_backward(
                &saved.gate,
                &saved.up,
                d_activated,
                activation::SwigluGradients { dgate, dup, y },
            );
        });
        project(block.down).weight_gradient(slots, &*activated, dy);
        project(block.gate).input_gradient(slots, &saved.normed_2, &*d_gate, To::overwrite(d_normed));
        project(block.gate).weight_gradient(slots, &saved.normed_2, &*d_gate);
        project(block.up).input_gradient(slots, &saved.normed_2, &*d_up, To::accumulate(d_normed));
        project(block.up).weight_gradient(slots, &saved.normed_2, &*d_up);
        let input = (&saved.middle[..], &saved.rstd_2[..]);
        self.norm_backward(weights, slots, block.norm_2, input, d_normed, To::accumulate(d_stream), scratch);

        let dy = dropped(Site::AfterAttention(layer).mask(draw, self.dropout), d_stream, width, raw);
        project(block.output).input_gradient(slots, &saved.mixed, dy, To::overwrite(d_mixed));
        project(block.output).weight_gradient(slots, &saved.mixed, dy);
        timed(Part::AttentionBackward, || {
            let shape = self.config.attention(rows.extent);
            let (inputs, y) = (saved.attention_inputs(), saved.mixed.values());
            let gradients = attention::InputGradients::Separate { dq: d_query, dk: d_key, dv: d_value };
            let saved =
                attention::Saved { inputs, pattern: self.pattern(rows, layer), y, log_sum_exp: &saved.log_sum_exp };
            attention::backward(shape, shape.scale(), saved, d_mixed, gradients, scratch);
            rotary::rotate(&self.rotation, Direction::Backward, rows.positions, d_query);
            rotary::rotate(&self.rotation, Direction::Backward, rows.positions, d_key);
        });
        let inputs = [(block.query, &*d_query), (block.key, &*d_key), (block.value, &*d_value)];
        for (place, (index, dy)) in inputs.into_iter().enumerate() {
            let to = Gradient { data: d_normed, into: (place > 0).into() };
            project(index).input_gradient(slots, &saved.normed_1, dy, to);
            project(index).weight_gradient(slots, &saved.normed_1, dy);
        }
        let input = (x, &saved.rstd_1[..]);
        self.norm_backward(weights, slots, block.norm_1, input, d_normed, To::accumulate(d_stream), scratch);
    }

    /// Mixes the values into `saved.mixed`.
    fn attend(
        &self,
        layer: usize,
        rows: Rows,
        past: &mut Past,
        saved: &mut Saved,
        raw: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (shape, width) = (self.config.attention(rows.extent), self.config.kv_width());
        if !matches!(past, Past::None) {
            let (key, value) = (saved.key.values().to_f32(), saved.value.values().to_f32());
            let key_values = key.chunks_exact(width).zip(value.chunks_exact(width));
            match past {
                Past::None => {}
                Past::Fill(fill) => fill.keep(layer, key_values),
                Past::Extend(cache) => {
                    let newest: Vec<(usize, usize)> = cache.newest().collect();
                    for ((key, value), (sequence, position)) in key_values.zip(newest) {
                        cache.put(layer, sequence, position, key, value);
                    }
                    let query = saved.query.values().to_f32();
                    saved.mixed.fill(raw, |mixed| {
                        attention::decode(shape, shape.scale(), &query, cache.layer(layer), mixed, scratch);
                    });
                    return;
                }
            }
        }
        let Saved { query, key, value, mixed, log_sum_exp, .. } = saved;
        let inputs = attention::Inputs::Separate { q: query.values(), k: key.values(), v: value.values() };
        mixed.fill(raw, |mixed| {
            attention::forward(shape, shape.scale(), inputs, self.pattern(rows, layer), mixed, log_sum_exp, scratch);
        });
    }
}

impl Saved {
    fn attention_inputs(&self) -> attention::Inputs<'_> {
        attention::Inputs::Separate { q: self.query.values(), k: self.key.values(), v: self.value.values() }
    }
}

impl Model {
    fn pattern<'a>(&self, rows: Rows<'a>, layer: usize) -> attention::Pattern<'a> {
        let dropout = Site::Probabilities(layer).mask(rows.draw, self.dropout);
        attention::Pattern { documents: rows.documents, dropout }
    }

    /// Whether a row of a pass has the same bits among `many` rows as among `few` (at most as many).
    pub fn rows_keep_their_bits(&self, few: usize, many: usize) -> bool {
        // All blocks have the same sizes.
        let blocks = self.parameters.blocks.iter().take(1);
        let mut layers = blocks.flat_map(|b| [b.query, b.key, b.value, b.output, b.gate, b.up, b.down]);
        layers.all(|layer| linear::rows_keep_their_bits(self.dims(layer), few, many))
            && self.adapters.as_ref().is_none_or(|adapters| adapters.rows_keep_their_bits(few, many))
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
    fn projection<'a>(&'a self, weights: Weights<'a>, index: usize, draw: Option<Draw>) -> Projection<'a> {
        Projection {
            weights,
            index,
            weight: self.linear_weight(weights, index),
            bias: None,
            adapters: self.adapters.as_ref(),
            draw,
        }
    }

    pub fn linear_weight<'a>(&self, weights: Weights<'a>, index: usize) -> linear::Weight<'a> {
        linear::Weight { data: self.matrix(weights, index), dims: self.dims(index) }
    }

    fn dims(&self, index: usize) -> linear::Dims {
        let shape = &self.layout.parameters()[index].shape;
        linear::Dims {
            inputs: shape[1],
            outputs: shape[0],
            orientation: linear::Orientation::OutIn,
            precision: self.precision,
        }
    }

    pub fn head<'a>(&self, weights: Weights<'a>) -> cross_entropy::Head<'a> {
        cross_entropy::Head {
            weight: self.matrix(weights, self.parameters.head),
            vocabulary: self.config.vocab_size,
            width: self.config.n_embd,
            precision: self.precision,
        }
    }

    pub fn norm<'a>(&self, weights: Weights, norm: usize, x: &[f32], y: impl Into<ValuesMut<'a>>, rstd: &mut [f32]) {
        let (weight, epsilon) = (self.weight(weights, norm), self.config.rms_norm_epsilon as f32);
        timed(Part::Norm, || rms_norm::forward(x, weight, epsilon, y, rstd));
    }

    #[allow(clippy::too_many_arguments, reason = "a norm's input and rstd, its gradients and scratch")]
    pub fn norm_backward(
        &self,
        weights: Weights,
        slots: &mut GradientSlots,
        norm: usize,
        (x, rstd): (&[f32], &[f32]),
        dy: &[f32],
        dx: Gradient,
        scratch: &mut [f32],
    ) {
        let saved = rms_norm::Saved { x, weight: self.weight(weights, norm), rstd };
        let d_weight = self.adapters.is_none().then(|| slots.slot(norm).into());
        timed(Part::Norm, || rms_norm::backward(saved, dy, dx, d_weight, scratch));
    }
}
