//! GPT-2's forward and backward on the CPU: explicit, block by block, in buffers that live as long as the run.
//!
//! A block keeps what its backward pass needs ([`Saved`]); weight gradients go straight into the flat gradients. With
//! [`Recompute::Block`] only each block's input is kept and the block runs forward again before it runs backward.

use super::Gpt2Config;
use super::block::{Model, Saved, Shared};
use crate::config::Recompute;
use crate::model::adapter::Adapters;
use crate::model::dropout::Site;
use crate::model::extent::{Extent, Rows, place};
use crate::model::prompts::Fill;
use crate::model::stored::{Stored, fit, stored_size};
use crate::model::{Batch, Documents, Labels, LossSum, ModelShape};
use crate::ops::dropout::{self, Draw};
use crate::ops::product::Precision;
use crate::ops::profile::{Part, timed};
use crate::ops::{Gradient, attention, cross_entropy, embedding, layer_norm};
use crate::params::{GradientSlots, Layout, Weights};
use anyhow::Result;
use std::sync::Arc;

/// The engine: the model's shape, and its buffers.
pub struct Gpt2Cpu {
    pub(in crate::model) model: Model,
    recompute: Recompute,
    pub(super) buffers: Buffers,
    /// The working memory of a decoding step.
    pub(super) decoding: super::decode::Rows,
    /// What dropout draws in the next backward passes.
    pub draw: Option<Draw>,
}

/// All working memory. Lengths are those of the last micro-batch, capacities those of the largest.
pub struct Buffers {
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
    /// [R, C]: gradient of the residual stream; empty until the first backward pass.
    d_stream: Vec<f32>,
    shared: Shared,
}

/// Width of [`Shared::raw`]: in the forward pass of a bf16 model the widest result of a product, in the backward pass
/// the MLP or the stream.
fn raw_width(config: &Gpt2Config, precision: Precision) -> usize {
    match precision {
        Precision::F32 => config.n_inner.max(config.n_embd),
        Precision::Bf16 => config.n_inner.max(3 * config.n_embd),
    }
}

impl Buffers {
    fn new(config: &Gpt2Config, recompute: Recompute, precision: Precision) -> Self {
        let stored = || Stored::new(precision);
        let saved = || Saved {
            normed_1: stored(),
            mean_1: Vec::new(),
            rstd_1: Vec::new(),
            qkv: stored(),
            mixed: stored(),
            log_sum_exp: Vec::new(),
            middle: Vec::new(),
            normed_2: stored(),
            mean_2: Vec::new(),
            rstd_2: Vec::new(),
            hidden: stored(),
        };
        let blocks = if recompute == Recompute::Block { 1 } else { config.n_layer };
        Self {
            extent: Extent::default(),
            positions: Vec::new(),
            stream: vec![Vec::new(); config.n_layer + 1],
            saved: std::iter::repeat_with(saved).take(blocks).collect(),
            normed: Vec::new(),
            mean: Vec::new(),
            rstd: Vec::new(),
            nll: Vec::new(),
            d_stream: Vec::new(),
            shared: Shared {
                activated: stored(),
                raw: Vec::new(),
                d_narrow: Vec::new(),
                d_qkv: Vec::new(),
                d_hidden: stored(),
                scratch: Vec::new(),
            },
        }
    }

    fn fit_forward(&mut self, model: &Model, extent: Extent) {
        let (tokens, width, inner) = (extent.tokens(), model.config.n_embd, model.config.n_inner);
        let narrow = tokens * width;
        self.extent = extent;
        self.stream.iter_mut().for_each(|buffer| fit([buffer], narrow));
        for saved in &mut self.saved {
            let Saved { normed_1, mean_1, rstd_1, qkv, mixed, log_sum_exp, middle, .. } = saved;
            [normed_1, mixed, &mut saved.normed_2].into_iter().for_each(|buffer| buffer.fit(narrow));
            fit([mean_1, rstd_1, &mut saved.mean_2, &mut saved.rstd_2], tokens);
            fit([middle], narrow);
            qkv.fit(3 * narrow);
            fit([log_sum_exp], tokens * model.config.n_head);
            saved.hidden.fit(tokens * inner);
        }
        fit([&mut self.normed], narrow);
        fit([&mut self.mean, &mut self.rstd], tokens);
        self.nll.resize(tokens, 0.0);
        self.shared.activated.fit(tokens * inner);
        if model.precision == Precision::Bf16 {
            fit([&mut self.shared.raw], tokens * raw_width(&model.config, model.precision));
        }
    }

    fn fit_scratch(&mut self, len: usize) {
        if self.shared.scratch.len() < len {
            fit([&mut self.shared.scratch], len);
        }
    }

    fn fit_backward(&mut self, model: &Model) {
        let tokens = self.extent.tokens();
        let narrow = tokens * model.config.n_embd;
        let Shared { raw, d_narrow, d_qkv, d_hidden, .. } = &mut self.shared;
        fit([&mut self.d_stream, d_narrow], narrow);
        fit([d_qkv], 3 * narrow);
        fit([raw], tokens * raw_width(&model.config, model.precision));
        d_hidden.fit(tokens * model.config.n_inner);
    }

    /// Bytes of all buffers, to check [`Gpt2Cpu::working_bytes`] with.
    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        let Self { positions, stream, saved, normed, mean, rstd, nll, d_stream, shared, .. } = self;
        let of = |buffers: &[&Vec<f32>]| buffers.iter().map(|buffer| size_of_val(&buffer[..])).sum::<usize>();
        let stored = |buffers: &[&Stored]| buffers.iter().map(|buffer| buffer.bytes()).sum::<usize>();
        let saved = saved.iter().map(|saved| {
            let Saved { normed_1, mean_1, rstd_1, qkv, mixed, log_sum_exp, middle, .. } = saved;
            let Saved { normed_2, mean_2, rstd_2, hidden, .. } = saved;
            of(&[mean_1, rstd_1, log_sum_exp, middle, mean_2, rstd_2])
                + stored(&[normed_1, qkv, mixed, normed_2, hidden])
        });
        let Shared { activated, raw, d_narrow, d_qkv, d_hidden, scratch } = shared;
        let shared = of(&[raw, d_narrow, d_qkv, scratch]) + stored(&[activated, d_hidden]);
        let stream = stream.iter().map(|stream| of(&[stream])).sum::<usize>();
        let around = of(&[normed, mean, rstd, d_stream]) + size_of_val(&positions[..]) + size_of_val(&nll[..]);
        stream + saved.sum::<usize>() + shared + around
    }
}

/// The scratch that a training step needs.
fn training_scratch_len(model: &Model, extent: Extent) -> usize {
    attention::scratch_len(model.attention(extent))
        .max(cross_entropy::scratch_len(extent.tokens(), model.config.vocab_size, model.config.n_embd))
        .max(layer_norm::scratch_len(extent.tokens(), model.config.n_embd))
}

impl Gpt2Cpu {
    pub fn new(config: Gpt2Config, layout: Arc<Layout>, recompute: Recompute, precision: Precision) -> Self {
        let (layout, adapters) = Adapters::of(&ModelShape::Gpt2(config.clone()), &layout);
        let parameters = config.parameters(&layout);
        let buffers = Buffers::new(&config, recompute, precision);
        let model = Model { config, layout, adapters, dropout: 0.0, parameters, precision };
        Self { model, recompute, buffers, decoding: Default::default(), draw: None }
    }

    /// Bytes of working memory of a training step: what [`Buffers::fit_forward`] and [`Buffers::fit_backward`] make.
    pub fn working_bytes(config: &Gpt2Config, extent: Extent, recompute: Recompute, precision: Precision) -> usize {
        let layout = Arc::new(Layout::new(config.parameter_specs()));
        let parameters = config.parameters(&layout);
        let (width, inner, layers) = (config.n_embd, config.n_inner, config.n_layer);
        let blocks = if recompute == Recompute::Block { 1 } else { layers };
        // Numbers a token, in the precision's kind and in f32.
        let stored = blocks * (6 * width + inner) + 2 * inner;
        let saved = blocks * (width + 4 + config.n_head);
        let around = (layers + 2) * width + 2;
        let backward = 5 * width + raw_width(config, precision);
        let a_token = stored_size(precision) * stored
            + size_of::<f32>() * (saved + around + backward)
            + size_of::<u32>()
            + size_of::<f64>();
        let model = Model { config: config.clone(), layout, adapters: None, dropout: 0.0, parameters, precision };
        extent.tokens() * a_token + size_of::<f32>() * training_scratch_len(&model, extent)
    }

    /// Runs all blocks and the final norm; the results stay in the buffers, keys and values go where `fill` says.
    pub(super) fn forward(
        &mut self,
        weights: Weights,
        inputs: &[u32],
        extent: Extent,
        documents: Documents,
        draw: Option<Draw>,
        mut fill: Option<Fill>,
    ) -> Result<()> {
        let Self { model, buffers, .. } = self;
        buffers.fit_forward(model, extent);
        buffers.fit_scratch(attention::scratch_len(model.attention(extent.attended(documents))));
        let Buffers { positions, stream, saved, normed, mean, rstd, shared, .. } = buffers;
        place(documents, extent, positions);
        let rows = Rows { extent, positions, documents, draw };
        let table = model.weight(weights, model.parameters.position_embedding);
        let positions = embedding::Positions { table, places: positions };
        let table = model.table(weights, model.parameters.token_embedding);
        let width = model.config.n_embd;
        timed(Part::Embedding, || embedding::forward(inputs, table, Some(positions), width, &mut stream[0]))?;
        let mask = Site::Embedding.mask(draw, model.dropout);
        if let Some(mask) = mask {
            timed(Part::Embedding, || dropout::in_place(mask, width, &mut stream[0]));
        }
        for layer in 0..model.config.n_layer {
            let (x, y) = neighbours(stream, layer);
            let place = layer.min(saved.len() - 1);
            model.block_forward(weights, layer, rows, x, &mut saved[place], y, shared);
            if let Some(fill) = &mut fill {
                let qkv = saved[place].qkv.values().to_f32();
                fill.keep(layer, qkv.chunks_exact(3 * width).map(|row| row[width..].split_at(width)));
            }
        }
        model.norm(weights, model.parameters.norm_final, &stream[model.config.n_layer], normed, mean, rstd);
        Ok(())
    }

    /// The loss alone; each target's negative log-likelihood is in the slice that is given back (0 where ignored).
    pub fn loss(&mut self, weights: Weights, batch: Batch) -> Result<(LossSum, &[f64])> {
        let extent = batch.extent();
        self.forward(weights, batch.inputs, extent, batch.documents, None, None)?;
        let Self { model, buffers, .. } = self;
        let config = &model.config;
        buffers.fit_scratch(cross_entropy::scratch_len(extent.tokens(), config.vocab_size, config.n_embd));
        let Buffers { normed, nll, shared, .. } = buffers;
        let head = model.head(weights);
        let loss = timed(Part::Head, || cross_entropy::forward(normed, head, batch.targets, nll, &mut shared.scratch))?;
        Ok((loss.into(), nll))
    }

    /// The loss, and its gradient written or added to the slots.
    pub fn gradients(
        &mut self,
        weights: Weights,
        slots: &mut GradientSlots,
        batch: Batch,
        labels: Labels,
    ) -> Result<LossSum> {
        let (extent, draw) = (batch.extent(), self.draw);
        self.forward(weights, batch.inputs, extent, batch.documents, draw, None)?;
        let Self { model, recompute, buffers, .. } = self;
        buffers.fit_backward(model);
        buffers.fit_scratch(training_scratch_len(model, extent));
        let Buffers { positions, stream, saved, normed, mean, rstd, nll, d_stream, shared, .. } = buffers;
        let rows = Rows { extent, positions, documents: batch.documents, draw };
        let layers = model.config.n_layer;

        let labels = match labels {
            Labels::Data => cross_entropy::Labels::Given(batch.targets),
            Labels::Sampled(generator) => cross_entropy::Labels::Sampled { mask: batch.targets, generator },
        };
        let Shared { d_narrow, scratch, .. } = shared;
        let loss = timed(Part::Head, || {
            let d_head = model.adapters.is_none().then(|| slots.slot(model.parameters.head).into());
            cross_entropy::forward_backward(normed, model.head(weights), labels, nll, d_narrow, d_head, scratch)
        })?;
        let (norm, statistics) = (model.parameters.norm_final, (&mean[..], &rstd[..]));
        let d_last = Gradient::overwrite(d_stream);
        model.norm_backward(weights, slots, norm, &stream[layers], statistics, d_narrow, d_last, scratch);

        for layer in (0..layers).rev() {
            let (x, y) = neighbours(stream, layer);
            let place = layer.min(saved.len() - 1);
            let saved = &mut saved[place];
            // The last block's values are still there.
            if *recompute == Recompute::Block && layer + 1 < layers {
                model.block_forward(weights, layer, rows, x, saved, y, shared);
            }
            model.block_backward(weights, slots, layer, rows, x, saved, d_stream, shared);
        }

        if model.adapters.is_none() {
            let width = model.config.n_embd;
            if let Some(mask) = Site::Embedding.mask(draw, model.dropout) {
                timed(Part::Embedding, || dropout::in_place(mask, width, d_stream));
            }
            let d_tokens = slots.slot(model.parameters.token_embedding).into();
            timed(Part::Embedding, || embedding::backward(batch.inputs, d_stream, width, d_tokens))?;
            let d_positions = slots.slot(model.parameters.position_embedding).into();
            timed(Part::Embedding, || embedding::backward(positions, d_stream, width, d_positions))?;
        }
        Ok(loss.into())
    }

    /// The final norm's output [rows * time, C] for `inputs`.
    pub fn hidden(&mut self, weights: Weights, inputs: &[u32], rows: usize) -> Result<&[f32]> {
        let extent = Extent { rows, time: inputs.len() / rows.max(1) };
        self.forward(weights, inputs, extent, Documents::Whole, None, None)?;
        Ok(self.normed())
    }

    /// The final norm's output [R, C] of the last pass.
    pub(super) fn normed(&self) -> &[f32] {
        &self.buffers.normed
    }
}

/// The residual stream before and after block `layer`.
fn neighbours(stream: &mut [Vec<f32>], layer: usize) -> (&[f32], &mut [f32]) {
    let (before, after) = stream.split_at_mut(layer + 1);
    (&before[layer], &mut after[0])
}
