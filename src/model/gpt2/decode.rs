//! Generation on the CPU: keys and values of the past are kept, so that each new token costs one row.

use super::Gpt2Cpu;
use crate::model::cache::KeyValueCache;
use crate::model::extent::Extent;
use crate::model::prompts::{Fill, Pass};
use crate::ops::attention::Documents;
use crate::ops::{activation, attention, embedding, linear};
use crate::params::Weights;
use anyhow::Result;

/// One row a sequence: the working memory of a decoding step.
#[derive(Default)]
pub(super) struct Rows {
    stream: Vec<f32>,
    residual: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    query: Vec<f32>,
    mixed: Vec<f32>,
    hidden: Vec<f32>,
    activated: Vec<f32>,
    statistics: [Vec<f32>; 2],
    scratch: Vec<f32>,
}

impl Rows {
    fn resize(&mut self, batch: usize, width: usize, inner: usize, capacity: usize) {
        for buffer in [&mut self.stream, &mut self.residual, &mut self.normed, &mut self.query, &mut self.mixed] {
            buffer.resize(batch * width, 0.0);
        }
        self.qkv.resize(3 * batch * width, 0.0);
        self.hidden.resize(batch * inner, 0.0);
        self.activated.resize(batch * inner, 0.0);
        self.statistics.iter_mut().for_each(|buffer| buffer.resize(batch, 0.0));
        self.scratch.resize(attention::decode_scratch_len(capacity), 0.0);
    }
}

impl Gpt2Cpu {
    /// An empty cache for `batch` sequences of at most `capacity` tokens.
    pub fn cache(&self, batch: usize, capacity: usize) -> KeyValueCache {
        let config = &self.model.config;
        KeyValueCache::new(config.n_layer, batch, capacity.min(config.n_positions), config.n_embd)
    }

    /// Reads the prompts of a pass into the cache and gives the final norm's output [R, C].
    pub(in crate::model) fn read(
        &mut self,
        weights: Weights,
        cache: &mut KeyValueCache,
        pass: &Pass,
    ) -> Result<&[f32]> {
        let (tokens, lengths) = (pass.tokens(), pass.lengths());
        let extent = Extent { rows: 1, time: tokens.len() };
        let fill = Fill { cache, prompts: &pass.prompts };
        self.forward(weights, &tokens, extent, Documents::Apart(&lengths), None, Some(fill))?;
        Ok(self.normed())
    }

    /// Whether a row of a pass has the same bits among `many` rows as among `few` (at most as many).
    pub(in crate::model) fn rows_keep_their_bits(&self, few: usize, many: usize) -> bool {
        self.model.rows_keep_their_bits(few, many)
    }

    /// Appends one token to every sequence and gives the logits [B, V] of what follows.
    ///
    /// # Errors
    /// When a sequence is full, or an id lies outside the vocabulary.
    pub fn decode(
        &mut self,
        weights: Weights,
        cache: &mut KeyValueCache,
        tokens: &[u32],
        logits: &mut [f32],
    ) -> Result<()> {
        cache.lengthen(tokens.len())?;
        let (model, rows) = (&self.model, &mut self.decoding);
        let (batch, width) = (tokens.len(), model.config.n_embd);
        rows.resize(batch, width, model.config.n_inner, cache.capacity());
        let Rows { stream, residual, normed, qkv, query, mixed, hidden, activated, statistics, scratch } = rows;
        let [mean, rstd] = statistics;
        let table = model.weight(weights, model.parameters.position_embedding);
        let token_table = model.table(weights, model.parameters.token_embedding);
        let newest: Vec<(usize, usize)> = cache.newest().collect();
        let places: Vec<u32> = newest.iter().map(|&(_, position)| position as u32).collect();
        let positions = embedding::Positions { table, places: &places };
        embedding::forward(tokens, token_table, Some(positions), width, stream)?;
        let shape = model.attention(Extent { rows: batch, time: 1 });

        for (layer, block) in model.parameters.blocks.iter().enumerate() {
            model.norm(weights, block.norm_1, stream, &mut *normed, mean, rstd);
            model.projection(weights, block.attention_in, None).forward(&*normed, None, qkv);
            for (place, (row, &(sequence, position))) in qkv.chunks_exact(3 * width).zip(&newest).enumerate() {
                let (key, value) = row[width..].split_at(width);
                cache.put(layer, sequence, position, key, value);
                query[place * width..][..width].copy_from_slice(&row[..width]);
            }
            attention::decode(shape, shape.scale(), query, cache.layer(layer), mixed, scratch);
            model.projection(weights, block.attention_out, None).forward(&*mixed, Some(stream), residual);
            model.norm(weights, block.norm_2, residual, &mut *normed, mean, rstd);
            model.projection(weights, block.mlp_in, None).forward(&*normed, None, hidden);
            activation::gelu(&*hidden, &mut *activated);
            model.projection(weights, block.mlp_out, None).forward(&*activated, Some(residual), stream);
        }
        model.norm(weights, model.parameters.norm_final, stream, &mut *normed, mean, rstd);
        self.head_logits(weights, &self.decoding.normed, logits);
        Ok(())
    }

    /// Logits [R, V] of `hidden` [R, C], the final norm's output.
    pub(in crate::model) fn head_logits(&self, weights: Weights, hidden: &[f32], logits: &mut [f32]) {
        let config = &self.model.config;
        let head = linear::Weight {
            data: self.model.matrix(weights, self.model.parameters.head),
            dims: linear::Dims {
                inputs: config.n_embd,
                outputs: config.vocab_size,
                orientation: linear::Orientation::OutIn,
                precision: self.model.precision,
            },
        };
        linear::forward(hidden, head, None, None, logits);
    }

    /// Logits [rows * time, V] of every position.
    pub fn logits(&mut self, weights: Weights, inputs: &[u32], rows: usize) -> Result<Vec<f32>> {
        let hidden = self.hidden(weights, inputs, rows)?.to_vec();
        let mut logits = vec![0.0; inputs.len() * self.model.config.vocab_size];
        self.head_logits(weights, &hidden, &mut logits);
        Ok(logits)
    }

    /// Logits [places.len(), V] of some positions, which count in [rows * time].
    pub fn logits_at(&mut self, weights: Weights, inputs: &[u32], rows: usize, places: &[usize]) -> Result<Vec<f32>> {
        let width = self.model.config.n_embd;
        let hidden = self.hidden(weights, inputs, rows)?;
        let chosen: Vec<f32> = places.iter().flat_map(|&place| &hidden[place * width..][..width]).copied().collect();
        let mut logits = vec![0.0; places.len() * self.model.config.vocab_size];
        self.head_logits(weights, &chosen, &mut logits);
        Ok(logits)
    }

    /// The model's shape.
    pub fn config(&self) -> &super::Gpt2Config {
        &self.model.config
    }
}
