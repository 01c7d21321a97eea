//! LLaMA's forward and backward on the CPU: explicit, block by block, in buffers that live as long as the run.
//!
//! A block keeps what its backward pass needs ([`Saved`]); weight gradients go straight into the flat gradients. With
//! [`Recompute::Block`] only each block's input is kept and the block runs forward again before it runs backward.

use super::LlamaConfig;
use super::block::{Model, Past, Saved, Shared};
use crate::config::Recompute;
use crate::model::adapter::Adapters;
use crate::model::dropout::Site;
use crate::model::extent::{Rows, place};
use crate::model::stored::{Stored, fit, stored_size};
use crate::model::{Batch, Documents, Extent, Labels, LossSum, ModelShape};
use crate::ops::dropout::{self, Draw};
use crate::ops::product::Precision;
use crate::ops::profile::{Part, timed};
use crate::ops::{Gradient, attention, cross_entropy, embedding, rms_norm, rotary};
use crate::params::{GradientSlots, Layout, Weights};
use anyhow::{Result, ensure};
use std::sync::Arc;

/// The engine: the model's shape, and its buffers.
pub struct LlamaCpu {
    pub(in crate::model) model: Model,
    recompute: Recompute,
    pub(super) buffers: Buffers,
    /// What dropout draws in the next backward passes.
    pub draw: Option<Draw>,
}

/// All working memory. Lengths are those of the last micro-batch, capacities those of the largest.
pub struct Buffers {
    /// [R]: where each row stands in its sequence.
    positions: Vec<u32>,
    /// [L + 1][R, C]: the residual stream before each block, and after the last.
    stream: Vec<Vec<f32>>,
    /// One a block; with recomputation one for all.
    saved: Vec<Saved>,
    /// Final norm: [R, C], [R].
    pub normed: Vec<f32>,
    rstd: Vec<f32>,
    /// [R]: each target's negative log-likelihood.
    nll: Vec<f64>,
    /// [R, C]: gradient of the residual stream; empty until the first backward pass.
    d_stream: Vec<f32>,
    shared: Shared,
}

/// Sizes of the buffers' rows.
struct Widths {
    /// Rows.
    tokens: usize,
    /// Residual stream, queries, keys, MLP.
    stream: usize,
    query: usize,
    key: usize,
    inner: usize,
}

impl Widths {
    fn of(config: &LlamaConfig, extent: Extent) -> Self {
        let (query, key) = (config.query_width(), config.kv_width());
        Self { tokens: extent.tokens(), stream: config.n_embd, query, key, inner: config.n_inner }
    }
}

/// Width of [`Shared::raw`]: in the forward pass of a bf16 model the widest result of a product, in the backward pass
/// the MLP or the stream.
fn raw_width(config: &LlamaConfig, precision: Precision) -> usize {
    match precision {
        Precision::F32 => config.n_inner.max(config.n_embd),
        Precision::Bf16 => config.n_inner.max(config.n_embd).max(config.query_width()),
    }
}

impl Buffers {
    fn new(config: &LlamaConfig, recompute: Recompute, precision: Precision) -> Self {
        let stored = || Stored::new(precision);
        let saved = || Saved {
            normed_1: stored(),
            rstd_1: Vec::new(),
            query: stored(),
            key: stored(),
            value: stored(),
            mixed: stored(),
            log_sum_exp: Vec::new(),
            middle: Vec::new(),
            normed_2: stored(),
            rstd_2: Vec::new(),
            gate: stored(),
            up: stored(),
        };
        let blocks = if recompute == Recompute::Block { 1 } else { config.n_layer };
        Self {
            positions: Vec::new(),
            stream: vec![Vec::new(); config.n_layer + 1],
            saved: std::iter::repeat_with(saved).take(blocks).collect(),
            normed: Vec::new(),
            rstd: Vec::new(),
            nll: Vec::new(),
            d_stream: Vec::new(),
            shared: Shared {
                activated: stored(),
                raw: Vec::new(),
                d_normed: Vec::new(),
                d_mixed: Vec::new(),
                d_query: Vec::new(),
                d_key: Vec::new(),
                d_value: Vec::new(),
                d_gate: stored(),
                d_up: stored(),
                scratch: Vec::new(),
            },
        }
    }

    fn fit_forward(&mut self, config: &LlamaConfig, extent: Extent, precision: Precision) {
        let Widths { tokens, stream, query, key, inner } = Widths::of(config, extent);
        self.stream.iter_mut().for_each(|buffer| fit([buffer], tokens * stream));
        for saved in &mut self.saved {
            let widths = [
                (&mut saved.normed_1, stream),
                (&mut saved.normed_2, stream),
                (&mut saved.query, query),
                (&mut saved.mixed, query),
                (&mut saved.key, key),
                (&mut saved.value, key),
                (&mut saved.gate, inner),
                (&mut saved.up, inner),
            ];
            widths.into_iter().for_each(|(buffer, width)| buffer.fit(tokens * width));
            fit([&mut saved.middle], tokens * stream);
            fit([&mut saved.rstd_1, &mut saved.rstd_2], tokens);
            fit([&mut saved.log_sum_exp], tokens * config.n_head);
        }
        fit([&mut self.normed], tokens * stream);
        fit([&mut self.rstd], tokens);
        self.shared.activated.fit(tokens * inner);
        if precision == Precision::Bf16 {
            fit([&mut self.shared.raw], tokens * raw_width(config, precision));
        }
    }

    fn fit_backward(&mut self, config: &LlamaConfig, extent: Extent, precision: Precision) {
        let Widths { tokens, stream, query, key, inner } = Widths::of(config, extent);
        let shared = &mut self.shared;
        fit([&mut self.d_stream, &mut shared.d_normed], tokens * stream);
        fit([&mut shared.d_mixed, &mut shared.d_query], tokens * query);
        fit([&mut shared.d_key, &mut shared.d_value], tokens * key);
        fit([&mut shared.raw], tokens * raw_width(config, precision));
        [&mut shared.d_gate, &mut shared.d_up].into_iter().for_each(|buffer| buffer.fit(tokens * inner));
    }

    fn fit_scratch(&mut self, len: usize) {
        if self.shared.scratch.len() < len {
            fit([&mut self.shared.scratch], len);
        }
    }

    /// Bytes of all buffers, to check [`LlamaCpu::working_bytes`] with.
    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        let Self { positions, stream, saved, normed, rstd, nll, d_stream, shared } = self;
        let of = |buffers: &[&Vec<f32>]| buffers.iter().map(|buffer| size_of_val(&buffer[..])).sum::<usize>();
        let stored = |buffers: &[&Stored]| buffers.iter().map(|buffer| buffer.bytes()).sum::<usize>();
        let Shared { activated, raw, d_normed, d_mixed, d_query, d_key, d_value, d_gate, d_up, scratch } = shared;
        let saved = saved.iter().map(|saved| {
            let Saved { normed_1, rstd_1, query, key, value, mixed, .. } = saved;
            let Saved { log_sum_exp, middle, normed_2, rstd_2, gate, up, .. } = saved;
            of(&[rstd_1, log_sum_exp, middle, rstd_2])
                + stored(&[normed_1, query, key, value, mixed, normed_2, gate, up])
        });
        let shared = of(&[raw, d_normed, d_mixed, d_query, d_key, d_value, scratch]);
        let shared = shared + stored(&[activated, d_gate, d_up]);
        let stream = stream.iter().map(|stream| of(&[stream])).sum::<usize>();
        let around = of(&[normed, rstd, d_stream]) + size_of_val(&positions[..]) + size_of_val(&nll[..]);
        stream + saved.sum::<usize>() + shared + around
    }
}

/// The scratch that a training step needs.
fn training_scratch_len(config: &LlamaConfig, extent: Extent) -> usize {
    attention::scratch_len(config.attention(extent))
        .max(cross_entropy::scratch_len(extent.tokens(), config.vocab_size, config.n_embd))
        .max(rms_norm::scratch_len(extent.tokens(), config.n_embd))
}

impl LlamaCpu {
    pub fn new(config: LlamaConfig, layout: Arc<Layout>, recompute: Recompute, precision: Precision) -> Self {
        let (layout, adapters) = Adapters::of(&ModelShape::Llama(config.clone()), &layout);
        let parameters = config.parameters(&layout);
        let rotation = rotary::Table::new(config.rope_theta, config.head_dim, 0, config.rope_scaling);
        let buffers = Buffers::new(&config, recompute, precision);
        let model = Model { config, layout, adapters, dropout: 0.0, parameters, rotation, precision };
        Self { model, recompute, buffers, draw: None }
    }

    /// The model's shape.
    pub fn config(&self) -> &LlamaConfig {
        &self.model.config
    }

    /// Bytes of working memory of a training step: what [`Buffers::fit_forward`] and [`Buffers::fit_backward`] make.
    pub fn working_bytes(config: &LlamaConfig, extent: Extent, recompute: Recompute, precision: Precision) -> usize {
        let Widths { tokens, stream, query, key, inner } = Widths::of(config, extent);
        let blocks = if recompute == Recompute::Block { 1 } else { config.n_layer };
        // Numbers a token, in the precision's kind and in f32.
        let stored = blocks * (2 * stream + 2 * query + 2 * key + 2 * inner) + 3 * inner;
        let saved = blocks * (stream + 2 + config.n_head);
        let around = (config.n_layer + 2) * stream + 1;
        let backward = 2 * stream + 2 * query + 2 * key + raw_width(config, precision);
        let a_token = stored_size(precision) * stored
            + size_of::<f32>() * (saved + around + backward)
            + size_of::<u32>()
            + size_of::<f64>();
        tokens * a_token + size_of::<f32>() * training_scratch_len(config, extent)
    }

    /// Makes the rotation's table reach `positions` positions; it grows by doubling.
    fn reach(&mut self, positions: usize) -> Result<()> {
        let Model { config, rotation, .. } = &mut self.model;
        let most = config.n_positions;
        ensure!(positions <= most, "a sequence has {positions} tokens, the model's context holds {most}");
        if rotation.positions() < positions {
            let positions = positions.next_power_of_two().min(most);
            *rotation = rotary::Table::new(config.rope_theta, config.head_dim, positions, config.rope_scaling);
        }
        Ok(())
    }

    /// Runs all blocks and the final norm; the results stay in the buffers.
    pub(super) fn forward(
        &mut self,
        weights: Weights,
        inputs: &[u32],
        extent: Extent,
        documents: Documents,
        draw: Option<Draw>,
        past: &mut Past,
    ) -> Result<()> {
        let scratch_len = match past {
            Past::Extend(cache) => {
                cache.lengthen(extent.rows)?;
                self.reach(cache.newest().map(|(_, position)| position + 1).max().unwrap_or(0))?;
                self.buffers.positions = cache.newest().map(|(_, position)| position as u32).collect();
                attention::decode_scratch_len(cache.capacity())
            }
            Past::None | Past::Fill(_) => {
                let attended = extent.attended(documents);
                self.reach(attended.time)?;
                place(documents, extent, &mut self.buffers.positions);
                attention::scratch_len(self.model.config.attention(attended))
            }
        };
        let Self { model, buffers, .. } = self;
        buffers.fit_forward(&model.config, extent, model.precision);
        buffers.fit_scratch(scratch_len);
        let Buffers { positions, stream, saved, normed, rstd, shared, .. } = buffers;
        let rows = Rows { extent, positions, documents, draw };
        let table = model.table(weights, model.parameters.token_embedding);
        timed(Part::Embedding, || embedding::forward(inputs, table, None, model.config.n_embd, &mut stream[0]))?;
        if let Some(mask) = Site::Embedding.mask(draw, model.dropout) {
            timed(Part::Embedding, || dropout::in_place(mask, model.config.n_embd, &mut stream[0]));
        }
        for layer in 0..model.config.n_layer {
            let (x, y) = neighbours(stream, layer);
            let place = layer.min(saved.len() - 1);
            model.block_forward(weights, layer, rows, past, x, &mut saved[place], y, shared);
        }
        model.norm(weights, model.parameters.norm_final, &stream[model.config.n_layer], normed, rstd);
        Ok(())
    }

    /// The loss alone; each target's negative log-likelihood is in the slice that is given back (0 where ignored).
    pub fn loss(&mut self, weights: Weights, batch: Batch) -> Result<(LossSum, &[f64])> {
        let extent = batch.extent();
        self.forward(weights, batch.inputs, extent, batch.documents, None, &mut Past::None)?;
        let Self { model, buffers, .. } = self;
        let config = &model.config;
        buffers.fit_scratch(cross_entropy::scratch_len(extent.tokens(), config.vocab_size, config.n_embd));
        let Buffers { normed, nll, shared, .. } = buffers;
        nll.resize(extent.tokens(), 0.0);
        let loss = timed(Part::Head, || {
            cross_entropy::forward(normed, model.head(weights), batch.targets, nll, &mut shared.scratch)
        })?;
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
        self.forward(weights, batch.inputs, extent, batch.documents, draw, &mut Past::None)?;
        let Self { model, recompute, buffers, .. } = self;
        buffers.fit_backward(&model.config, extent, model.precision);
        buffers.fit_scratch(training_scratch_len(&model.config, extent));
        let Buffers { positions, stream, saved, normed, rstd, nll, d_stream, shared } = buffers;
        nll.resize(extent.tokens(), 0.0);
        let rows = Rows { extent, positions, documents: batch.documents, draw };
        let (layers, width) = (model.config.n_layer, model.config.n_embd);

        let labels = match labels {
            Labels::Data => cross_entropy::Labels::Given(batch.targets),
            Labels::Sampled(generator) => cross_entropy::Labels::Sampled { mask: batch.targets, generator },
        };
        let Shared { d_normed, scratch, .. } = shared;
        let loss = timed(Part::Head, || {
            let d_head = model.adapters.is_none().then(|| slots.slot(model.parameters.head).into());
            cross_entropy::forward_backward(normed, model.head(weights), labels, nll, d_normed, d_head, scratch)
        })?;
        let (norm, input) = (model.parameters.norm_final, (&stream[layers][..], &rstd[..]));
        model.norm_backward(weights, slots, norm, input, d_normed, Gradient::overwrite(d_stream), scratch);

        for layer in (0..layers).rev() {
            let (x, y) = neighbours(stream, layer);
            let place = layer.min(saved.len() - 1);
            let saved = &mut saved[place];
            // The last block's values are still there.
            if *recompute == Recompute::Block && layer + 1 < layers {
                model.block_forward(weights, layer, rows, &mut Past::None, x, saved, y, shared);
            }
            model.block_backward(weights, slots, layer, rows, x, saved, d_stream, shared);
        }
        if model.adapters.is_none() {
            if let Some(mask) = Site::Embedding.mask(draw, model.dropout) {
                timed(Part::Embedding, || dropout::in_place(mask, width, d_stream));
            }
            let d_tokens = slots.slot(model.parameters.token_embedding).into();
            timed(Part::Embedding, || embedding::backward(batch.inputs, d_stream, width, d_tokens))?;
        }
        Ok(loss.into())
    }
}

/// The residual stream before and after block `layer`.
fn neighbours(stream: &mut [Vec<f32>], layer: usize) -> (&[f32], &mut [f32]) {
    let (before, after) = stream.split_at_mut(layer + 1);
    (&before[layer], &mut after[0])
}
