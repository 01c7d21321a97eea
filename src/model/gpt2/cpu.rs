//! GPT-2's forward and backward on the CPU: explicit, block by block, in buffers that live as long as the run.
//!
//! A block keeps what its backward pass needs ([`Saved`]); weight gradients go straight into the flat gradients. With
//! [`Recompute::Block`] only each block's input is kept and the block runs forward again before it runs backward.

use super::{BlockParameters, Gpt2Config, Gpt2Parameters, LinearParameters, NormParameters};
use crate::config::Recompute;
use crate::model::extent::{Extent, Rows, place};
use crate::model::{Batch, Documents, Labels, LossSum};
use crate::ops::product::{Numbers, Precision};
use crate::ops::profile::{Part, timed};
use crate::ops::{Gradient, activation, attention, cross_entropy, embedding, layer_norm, linear};
use crate::params::{GradientSlots, Layout, Weights};
use anyhow::Result;
use std::sync::Arc;

/// The engine: the model's shape, and its buffers.
pub struct Gpt2Cpu {
    pub(super) model: Model,
    recompute: Recompute,
    buffers: Buffers,
    /// The working memory of a decoding step.
    pub(super) decoding: super::decode::Rows,
}

/// What never changes.
pub(super) struct Model {
    pub config: Gpt2Config,
    layout: Arc<Layout>,
    pub parameters: Gpt2Parameters,
    /// What the operands of the linear layers' and the head's products are rounded to.
    pub precision: Precision,
}

/// What one block keeps for its backward pass. R = rows * time.
#[derive(Default)]
struct Saved {
    /// [R, C]: output of the first norm.
    normed_1: Vec<f32>,
    /// [R] each.
    mean_1: Vec<f32>,
    rstd_1: Vec<f32>,
    /// [R, 3C]
    qkv: Vec<f32>,
    /// [R, C]: the heads' outputs, before the projection.
    mixed: Vec<f32>,
    /// [rows, heads, time]
    log_sum_exp: Vec<f32>,
    /// [R, C]: the residual stream after attention.
    middle: Vec<f32>,
    /// [R, C]: output of the second norm.
    normed_2: Vec<f32>,
    mean_2: Vec<f32>,
    rstd_2: Vec<f32>,
    /// [R, I]: before and after GELU.
    hidden: Vec<f32>,
    activated: Vec<f32>,
}

/// All working memory, sized for the largest micro-batch seen.
#[derive(Default)]
struct Buffers {
    extent: Extent,
    /// [R]: where each token stands in its document.
    positions: Vec<u32>,
    /// [L + 1][R, C]: the residual stream before each block, and after the last.
    stream: Vec<Vec<f32>>,
    /// One a block; with recomputation one for all.
    saved: Vec<Saved>,
    /// Final norm: [R, C], [R], [R].
    normed: Vec<f32>,
    mean: Vec<f32>,
    rstd: Vec<f32>,
    /// [R]: each target's negative log-likelihood.
    nll: Vec<f64>,
    /// [R, C]: gradient of the residual stream.
    d_stream: Vec<f32>,
    /// [R, C], [R, 3C], [R, I]: gradients inside a block; empty until the first backward pass.
    d_narrow: Vec<f32>,
    d_qkv: Vec<f32>,
    d_hidden: Vec<f32>,
    scratch: Vec<f32>,
}

impl Model {
    pub fn weight<'a>(&self, weights: Weights<'a>, index: usize) -> &'a [f32] {
        &weights.exact[self.layout.parameters()[index].range()]
    }

    /// As a product of this model's precision reads it: from the bf16 copy, if there is one.
    pub fn matrix<'a>(&self, weights: Weights<'a>, index: usize) -> Numbers<'a> {
        let range = self.layout.parameters()[index].range();
        match (self.precision, weights.rounded) {
            (Precision::Bf16, Some(rounded)) => rounded[range].into(),
            _ => weights.exact[range].into(),
        }
    }

    fn linear_weight<'a>(&self, weights: Weights<'a>, layer: LinearParameters) -> linear::Weight<'a> {
        let shape = &self.layout.parameters()[layer.weight].shape;
        linear::Weight {
            data: self.matrix(weights, layer.weight),
            dims: linear::Dims {
                inputs: shape[0],
                outputs: shape[1],
                orientation: linear::Orientation::InOut,
                precision: self.precision,
            },
        }
    }

    fn head<'a>(&self, weights: Weights<'a>) -> cross_entropy::Head<'a> {
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

    pub fn norm(
        &self,
        weights: Weights,
        norm: NormParameters,
        x: &[f32],
        y: &mut [f32],
        mean: &mut [f32],
        rstd: &mut [f32],
    ) {
        let epsilon = self.config.layer_norm_epsilon as f32;
        let (weight, bias) = (self.weight(weights, norm.weight), self.weight(weights, norm.bias));
        timed(Part::Norm, || layer_norm::forward(x, weight, bias, epsilon, y, mean, rstd));
    }

    pub fn project(
        &self,
        weights: Weights,
        layer: LinearParameters,
        x: &[f32],
        residual: Option<&[f32]>,
        y: &mut [f32],
    ) {
        timed(Part::LinearForward, || {
            linear::forward(x, self.linear_weight(weights, layer), Some(self.weight(weights, layer.bias)), residual, y)
        });
    }

    /// One block: `x` [R, C] -> `y` [R, C].
    #[allow(clippy::too_many_arguments, reason = "inputs, outputs and scratch of one block")]
    fn block_forward(
        &self,
        weights: Weights,
        block: &BlockParameters,
        rows: Rows,
        x: &[f32],
        saved: &mut Saved,
        y: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (tokens, width) = (rows.extent.tokens(), self.config.n_embd);
        let Saved {
            normed_1,
            mean_1,
            rstd_1,
            qkv,
            mixed,
            log_sum_exp,
            middle,
            normed_2,
            mean_2,
            rstd_2,
            hidden,
            activated,
        } = saved;
        let (narrow, inner) = (tokens * width, tokens * self.config.n_inner);
        let shape = self.attention(rows.extent);

        self.norm(weights, block.norm_1, x, &mut normed_1[..narrow], &mut mean_1[..tokens], &mut rstd_1[..tokens]);
        self.project(weights, block.attention_in, &normed_1[..narrow], None, &mut qkv[..3 * narrow]);
        let inputs = attention::Inputs::Fused(&qkv[..3 * narrow]);
        let lse = &mut log_sum_exp[..tokens * self.config.n_head];
        timed(Part::AttentionForward, || {
            attention::forward(shape, shape.scale(), inputs, rows.documents, &mut mixed[..narrow], lse, scratch)
        });
        self.project(weights, block.attention_out, &mixed[..narrow], Some(x), &mut middle[..narrow]);

        let middle = &middle[..narrow];
        self.norm(weights, block.norm_2, middle, &mut normed_2[..narrow], &mut mean_2[..tokens], &mut rstd_2[..tokens]);
        self.project(weights, block.mlp_in, &normed_2[..narrow], None, &mut hidden[..inner]);
        timed(Part::Activation, || activation::gelu(&hidden[..inner], &mut activated[..inner]));
        self.project(weights, block.mlp_out, &activated[..inner], Some(middle), y);
    }

    /// Gradients of a linear layer's weight and bias, and of its input.
    fn project_backward(
        &self,
        weights: Weights,
        slots: &mut GradientSlots,
        layer: LinearParameters,
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
    ) {
        let weight = self.linear_weight(weights, layer);
        timed(Part::LinearInputGradient, || linear::backward_input(dy, weight, Gradient::overwrite(dx)));
        let (dweight, dbias) = slots.pair(layer.weight, layer.bias);
        timed(Part::LinearWeightGradient, || {
            linear::backward_weight(x, dy, weight.dims, dweight.into(), Some(dbias.into()))
        });
    }

    #[allow(clippy::too_many_arguments, reason = "a norm's saved values, its gradients and scratch")]
    fn norm_backward(
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
        let (dweight, dbias) = slots.pair(norm.weight, norm.bias);
        timed(Part::Norm, || layer_norm::backward(saved, dy, dx, dweight.into(), dbias.into(), scratch));
    }
}

/// The gradients inside a block.
struct Inner<'a> {
    d_narrow: &'a mut [f32],
    d_qkv: &'a mut [f32],
    d_hidden: &'a mut [f32],
    scratch: &'a mut [f32],
}

impl Model {
    /// Turns `d_stream`, the gradient of the block's output, into the gradient of its input `x`.
    #[allow(clippy::too_many_arguments, reason = "inputs, outputs and scratch of one block")]
    fn block_backward(
        &self,
        weights: Weights,
        slots: &mut GradientSlots,
        block: &BlockParameters,
        rows: Rows,
        x: &[f32],
        saved: &Saved,
        d_stream: &mut [f32],
        inner: Inner,
    ) {
        let Inner { d_narrow, d_qkv, d_hidden, scratch } = inner;
        let tokens = rows.extent.tokens();
        let (narrow, wide) = (tokens * self.config.n_embd, tokens * self.config.n_inner);
        let shape = self.attention(rows.extent);

        self.project_backward(weights, slots, block.mlp_out, &saved.activated[..wide], d_stream, d_hidden);
        timed(Part::Activation, || activation::gelu_backward(&saved.hidden[..wide], d_hidden));
        self.project_backward(weights, slots, block.mlp_in, &saved.normed_2[..narrow], d_hidden, d_narrow);
        let statistics = (&saved.mean_2[..tokens], &saved.rstd_2[..tokens]);
        let d_middle = Gradient::accumulate(&mut *d_stream);
        self.norm_backward(
            weights,
            slots,
            block.norm_2,
            &saved.middle[..narrow],
            statistics,
            d_narrow,
            d_middle,
            scratch,
        );

        self.project_backward(weights, slots, block.attention_out, &saved.mixed[..narrow], d_stream, d_narrow);
        let attention_saved = attention::Saved {
            inputs: attention::Inputs::Fused(&saved.qkv[..3 * narrow]),
            documents: rows.documents,
            y: &saved.mixed[..narrow],
            log_sum_exp: &saved.log_sum_exp[..tokens * self.config.n_head],
        };
        let gradients = attention::InputGradients::Fused(&mut *d_qkv);
        timed(Part::AttentionBackward, || {
            attention::backward(shape, shape.scale(), attention_saved, d_narrow, gradients, scratch)
        });
        self.project_backward(weights, slots, block.attention_in, &saved.normed_1[..narrow], d_qkv, d_narrow);
        let statistics = (&saved.mean_1[..tokens], &saved.rstd_1[..tokens]);
        let d_input = Gradient::accumulate(d_stream);
        self.norm_backward(weights, slots, block.norm_1, x, statistics, d_narrow, d_input, scratch);
    }
}

/// Makes `buffer` at least `len` long; buffers only grow.
fn grow<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        *buffer = vec![T::default(); len];
    }
}

impl Buffers {
    fn grow_forward(&mut self, model: &Model, extent: Extent, recompute: Recompute) {
        let (tokens, width, inner) = (extent.tokens(), model.config.n_embd, model.config.n_inner);
        let narrow = tokens * width;
        self.stream.resize_with(model.config.n_layer + 1, Vec::new);
        self.stream.iter_mut().for_each(|stream| grow(stream, narrow));
        self.saved.resize_with(if recompute == Recompute::Block { 1 } else { model.config.n_layer }, Saved::default);
        for saved in &mut self.saved {
            for buffer in [&mut saved.normed_1, &mut saved.mixed, &mut saved.middle, &mut saved.normed_2] {
                grow(buffer, narrow);
            }
            for buffer in [&mut saved.mean_1, &mut saved.rstd_1, &mut saved.mean_2, &mut saved.rstd_2] {
                grow(buffer, tokens);
            }
            grow(&mut saved.qkv, 3 * narrow);
            grow(&mut saved.log_sum_exp, tokens * model.config.n_head);
            grow(&mut saved.hidden, tokens * inner);
            grow(&mut saved.activated, tokens * inner);
        }
        grow(&mut self.normed, narrow);
        grow(&mut self.mean, tokens);
        grow(&mut self.rstd, tokens);
        grow(&mut self.nll, tokens);
        grow(&mut self.scratch, Self::scratch_len(model, extent));
        self.extent = extent;
    }

    /// Numbers that all buffers hold after a backward pass over `extent`; [`Self::grow_forward`] and
    /// [`Self::grow_backward`] say of what.
    fn numbers(model: &Model, extent: Extent, recompute: Recompute) -> usize {
        let (tokens, width, inner) = (extent.tokens(), model.config.n_embd, model.config.n_inner);
        let layers = model.config.n_layer;
        let saved = tokens * (7 * width + 4 + model.config.n_head + 2 * inner);
        let blocks = if recompute == Recompute::Block { 1 } else { layers };
        let around = tokens * (1 + (layers + 1 + 1) * width + 2 + 2);
        let backward = tokens * (5 * width + inner);
        blocks * saved + around + backward + Self::scratch_len(model, extent)
    }

    fn scratch_len(model: &Model, extent: Extent) -> usize {
        attention::scratch_len(model.attention(extent))
            .max(cross_entropy::scratch_len(extent.tokens(), model.config.vocab_size))
            .max(layer_norm::scratch_len(extent.tokens(), model.config.n_embd))
    }

    fn grow_backward(&mut self, model: &Model) {
        let tokens = self.extent.tokens();
        let narrow = tokens * model.config.n_embd;
        grow(&mut self.d_stream, narrow);
        grow(&mut self.d_narrow, narrow);
        grow(&mut self.d_qkv, 3 * narrow);
        grow(&mut self.d_hidden, tokens * model.config.n_inner);
    }
}

impl Gpt2Cpu {
    pub fn new(config: Gpt2Config, layout: Arc<Layout>, recompute: Recompute, precision: Precision) -> Self {
        let parameters = config.parameters(&layout);
        Self {
            model: Model { config, layout, parameters, precision },
            recompute,
            buffers: Buffers::default(),
            decoding: Default::default(),
        }
    }

    /// Bytes of working memory of a training step on `rows` rows of `time` tokens.
    pub fn working_bytes(config: &Gpt2Config, rows: usize, time: usize, recompute: Recompute) -> usize {
        let layout = Arc::new(Layout::new(config.parameter_specs()));
        let parameters = config.parameters(&layout);
        let model = Model { config: config.clone(), layout, parameters, precision: Precision::F32 };
        size_of::<f32>() * Buffers::numbers(&model, Extent { rows, time }, recompute)
    }

    /// Runs all blocks and the final norm; the results stay in the buffers.
    fn forward(&mut self, weights: Weights, inputs: &[u32], extent: Extent, documents: Documents) -> Result<()> {
        let Self { model, recompute, buffers, .. } = self;
        buffers.grow_forward(model, extent, *recompute);
        let (tokens, width) = (extent.tokens(), model.config.n_embd);
        let narrow = tokens * width;
        let Buffers { positions, stream, saved, normed, mean, rstd, scratch, .. } = buffers;
        place(documents, extent, positions);
        let rows = Rows { extent, positions, documents };
        let table = model.weight(weights, model.parameters.position_embedding);
        let positions = embedding::Positions { table, places: positions };
        let table = model.weight(weights, model.parameters.token_embedding);
        timed(Part::Embedding, || embedding::forward(inputs, table, Some(positions), width, &mut stream[0][..narrow]))?;
        for (layer, block) in model.parameters.blocks.iter().enumerate() {
            let [x, y] = stream.get_disjoint_mut([layer, layer + 1]).expect("two neighbours of the stream");
            let place = layer.min(saved.len() - 1);
            model.block_forward(weights, block, rows, &x[..narrow], &mut saved[place], &mut y[..narrow], scratch);
        }
        let last = &stream[model.config.n_layer][..narrow];
        model.norm(
            weights,
            model.parameters.norm_final,
            last,
            &mut normed[..narrow],
            &mut mean[..tokens],
            &mut rstd[..tokens],
        );
        Ok(())
    }

    /// The loss alone; each target's negative log-likelihood is in the slice that is given back (0 where ignored).
    pub fn loss(&mut self, weights: Weights, batch: Batch) -> Result<(LossSum, &[f64])> {
        let extent = batch.extent();
        self.forward(weights, batch.inputs, extent, batch.documents)?;
        let (tokens, narrow) = (extent.tokens(), extent.tokens() * self.model.config.n_embd);
        let Buffers { normed, nll, scratch, .. } = &mut self.buffers;
        let head = self.model.head(weights);
        let loss = timed(Part::Head, || {
            cross_entropy::forward(&normed[..narrow], head, batch.targets, &mut nll[..tokens], scratch)
        })?;
        Ok((loss.into(), &nll[..tokens]))
    }

    /// The loss, and its gradient written or added to the slots.
    pub fn gradients(
        &mut self,
        weights: Weights,
        slots: &mut GradientSlots,
        batch: Batch,
        labels: Labels,
    ) -> Result<LossSum> {
        let extent = batch.extent();
        self.forward(weights, batch.inputs, extent, batch.documents)?;
        let Self { model, recompute, buffers, .. } = self;
        buffers.grow_backward(model);
        let tokens = extent.tokens();
        let (narrow, wide) = (tokens * model.config.n_embd, tokens * model.config.n_inner);
        let Buffers { positions, stream, saved, normed, mean, rstd, nll, .. } = buffers;
        let Buffers { d_stream, d_narrow, d_qkv, d_hidden, scratch, .. } = buffers;
        let rows = Rows { extent, positions, documents: batch.documents };
        let d_stream = &mut d_stream[..narrow];

        let labels = match labels {
            Labels::Data => cross_entropy::Labels::Given(batch.targets),
            Labels::Sampled(generator) => cross_entropy::Labels::Sampled { mask: batch.targets, generator },
        };
        let loss = timed(Part::Head, || {
            cross_entropy::forward_backward(
                &normed[..narrow],
                model.head(weights),
                labels,
                &mut nll[..tokens],
                &mut d_narrow[..narrow],
                Some(slots.slot(model.parameters.head).into()),
                scratch,
            )
        })?;
        let (last, statistics) = (&stream[model.config.n_layer][..narrow], (&mean[..tokens], &rstd[..tokens]));
        let gradient = Gradient::overwrite(d_stream);
        model.norm_backward(
            weights,
            slots,
            model.parameters.norm_final,
            last,
            statistics,
            &d_narrow[..narrow],
            gradient,
            scratch,
        );

        for (layer, block) in model.parameters.blocks.iter().enumerate().rev() {
            let [x, y] = stream.get_disjoint_mut([layer, layer + 1]).expect("two neighbours of the stream");
            let place = layer.min(saved.len() - 1);
            let saved = &mut saved[place];
            // The last block's values are still there.
            if *recompute == Recompute::Block && layer + 1 < model.config.n_layer {
                model.block_forward(weights, block, rows, &x[..narrow], saved, &mut y[..narrow], scratch);
            }
            let inner = Inner {
                d_narrow: &mut d_narrow[..narrow],
                d_qkv: &mut d_qkv[..3 * narrow],
                d_hidden: &mut d_hidden[..wide],
                scratch,
            };
            model.block_backward(weights, slots, block, rows, &x[..narrow], saved, d_stream, inner);
        }

        let width = model.config.n_embd;
        timed(Part::Embedding, || {
            embedding::backward(batch.inputs, d_stream, width, slots.slot(model.parameters.token_embedding).into())
        })?;
        let d_positions = slots.slot(model.parameters.position_embedding).into();
        timed(Part::Embedding, || embedding::backward(positions, d_stream, width, d_positions))?;
        Ok(loss.into())
    }

    /// The final norm's output [rows * time, C] for `inputs`.
    pub fn hidden(&mut self, weights: Weights, inputs: &[u32], rows: usize) -> Result<&[f32]> {
        let extent = Extent { rows, time: inputs.len() / rows.max(1) };
        self.forward(weights, inputs, extent, Documents::Whole)?;
        Ok(&self.buffers.normed[..extent.tokens() * self.model.config.n_embd])
    }

    /// Keys and values that the last forward pass made in `layer`: the fused buffer [R, 3C].
    pub fn fused_qkv(&self, layer: usize) -> &[f32] {
        &self.buffers.saved[layer].qkv[..3 * self.buffers.extent.tokens() * self.model.config.n_embd]
    }
}
