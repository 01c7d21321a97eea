//! Generation on the CPU: keys and values of the past are kept, so that each new token costs one row.

use super::Gpt2Cpu;
use super::cpu::Extent;
use crate::ops::{activation, attention, embedding, linear};
use anyhow::{Result, ensure};

/// Keys and values of a batch of sequences, layer by layer.
pub struct KeyValueCache {
    /// [L][B, capacity, C] each.
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    capacity: usize,
    /// [B]: positions filled.
    lengths: Vec<usize>,
    rows: Rows,
}

/// One row a sequence: the working memory of a decoding step.
#[derive(Default)]
struct Rows {
    stream: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    mixed: Vec<f32>,
    hidden: Vec<f32>,
    statistics: [Vec<f32>; 2],
    scratch: Vec<f32>,
}

impl KeyValueCache {
    /// Forgets the past of one sequence.
    pub fn rewind(&mut self, place: usize) {
        self.lengths[place] = 0;
    }
}

impl Gpt2Cpu {
    /// An empty cache for `batch` sequences of at most `capacity` tokens.
    pub fn cache(&self, batch: usize, capacity: usize) -> KeyValueCache {
        let config = &self.model.config;
        let capacity = capacity.min(config.n_positions);
        let layer = || vec![0.0; batch * capacity * config.n_embd];
        let width = batch * config.n_embd;
        let rows = Rows {
            stream: vec![0.0; width],
            normed: vec![0.0; width],
            qkv: vec![0.0; 3 * width],
            mixed: vec![0.0; width],
            hidden: vec![0.0; batch * config.n_inner],
            statistics: [vec![0.0; batch], vec![0.0; batch]],
            scratch: vec![0.0; attention::decode_scratch_len(capacity)],
        };
        KeyValueCache {
            keys: (0..config.n_layer).map(|_| layer()).collect(),
            values: (0..config.n_layer).map(|_| layer()).collect(),
            capacity,
            lengths: vec![0; batch],
            rows,
        }
    }

    /// Runs the whole of `prompt` for sequence `place` and gives the logits [V] of what follows it.
    ///
    /// # Errors
    /// When the prompt is empty, longer than the cache, or holds an id outside the vocabulary.
    pub fn prefill(
        &mut self,
        weights: &[f32],
        cache: &mut KeyValueCache,
        place: usize,
        prompt: &[u32],
        logits: &mut [f32],
    ) -> Result<()> {
        let (time, capacity) = (prompt.len(), cache.capacity);
        ensure!(time > 0, "the prompt is empty: give at least one token");
        ensure!(time <= capacity, "the prompt has {time} tokens, the context holds {capacity}");
        let width = self.model.config.n_embd;
        let hidden = self.hidden(weights, prompt, 1)?;
        let last: Vec<f32> = hidden[(time - 1) * width..time * width].to_vec();
        for layer in 0..self.model.config.n_layer {
            let qkv = self.fused_qkv(layer);
            for (position, row) in qkv.chunks_exact(3 * width).enumerate() {
                let slot = (place * capacity + position) * width;
                cache.keys[layer][slot..slot + width].copy_from_slice(&row[width..2 * width]);
                cache.values[layer][slot..slot + width].copy_from_slice(&row[2 * width..]);
            }
        }
        cache.lengths[place] = time;
        self.head_logits(weights, &last, logits);
        Ok(())
    }

    /// Appends one token to every sequence and gives the logits [B, V] of what follows.
    ///
    /// # Errors
    /// When a sequence is full, or an id lies outside the vocabulary.
    pub fn decode(
        &mut self,
        weights: &[f32],
        cache: &mut KeyValueCache,
        tokens: &[u32],
        logits: &mut [f32],
    ) -> Result<()> {
        let model = &self.model;
        let (batch, width, capacity) = (tokens.len(), model.config.n_embd, cache.capacity);
        let KeyValueCache { keys, values, lengths, rows, .. } = cache;
        let Rows { stream, normed, qkv, mixed, hidden, statistics: [mean, rstd], scratch } = rows;
        ensure!(lengths.iter().all(|&length| length < capacity), "a sequence has reached the end of the context");
        let table = model.weight(weights, model.parameters.position_embedding);
        let token_table = model.weight(weights, model.parameters.token_embedding);
        for (sequence, row) in stream.chunks_exact_mut(width).enumerate() {
            let positions = embedding::Positions { table, sequence: 1, first: lengths[sequence] };
            embedding::forward(&tokens[sequence..=sequence], token_table, Some(positions), width, row)?;
        }
        lengths.iter_mut().for_each(|length| *length += 1);
        let shape = model.attention(Extent { rows: batch, time: 1 });

        for (layer, block) in model.parameters.blocks.iter().enumerate() {
            model.norm(weights, block.norm_1, stream, normed, mean, rstd);
            model.project(weights, block.attention_in, normed, None, qkv);
            for (sequence, row) in qkv.chunks_exact(3 * width).enumerate() {
                let slot = (sequence * capacity + lengths[sequence] - 1) * width;
                keys[layer][slot..slot + width].copy_from_slice(&row[width..2 * width]);
                values[layer][slot..slot + width].copy_from_slice(&row[2 * width..]);
                normed[sequence * width..][..width].copy_from_slice(&row[..width]);
            }
            let past = attention::Cache { keys: &keys[layer], values: &values[layer], capacity, lengths };
            attention::decode(shape, shape.scale(), normed, past, mixed, scratch);
            let residual = stream.clone();
            model.project(weights, block.attention_out, mixed, Some(&residual), stream);
            model.norm(weights, block.norm_2, stream, normed, mean, rstd);
            model.project(weights, block.mlp_in, normed, None, hidden);
            let before = hidden.clone();
            activation::gelu(&before, hidden);
            let residual = stream.clone();
            model.project(weights, block.mlp_out, hidden, Some(&residual), stream);
        }
        model.norm(weights, model.parameters.norm_final, stream, normed, mean, rstd);
        let normed = std::mem::take(normed);
        self.head_logits(weights, &normed, logits);
        cache.rows.normed = normed;
        Ok(())
    }

    /// Logits [R, V] of `hidden` [R, C], the final norm's output.
    fn head_logits(&self, weights: &[f32], hidden: &[f32], logits: &mut [f32]) {
        let config = &self.model.config;
        let head = linear::Weight {
            data: self.model.weight(weights, self.model.parameters.head).into(),
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
    pub fn logits(&mut self, weights: &[f32], inputs: &[u32], rows: usize) -> Result<Vec<f32>> {
        let hidden = self.hidden(weights, inputs, rows)?.to_vec();
        let mut logits = vec![0.0; inputs.len() * self.model.config.vocab_size];
        self.head_logits(weights, &hidden, &mut logits);
        Ok(logits)
    }

    /// The model's shape.
    pub fn config(&self) -> &super::Gpt2Config {
        &self.model.config
    }
}
