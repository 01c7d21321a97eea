//! Generation on the CPU, and the logits of whole sequences.

use super::block::Past;
use super::cpu::LlamaCpu;
use crate::model::{Documents, Extent, KeyValueCache};
use crate::ops::linear;
use crate::params::Weights;
use anyhow::Result;

impl LlamaCpu {
    /// An empty cache for `batch` sequences of at most `capacity` tokens.
    pub fn cache(&self, batch: usize, capacity: usize) -> KeyValueCache {
        let config = &self.model.config;
        KeyValueCache::new(config.n_layer, batch, capacity.min(config.n_positions), config.kv_width())
    }

    /// Runs the whole of `prompt` for one sequence of the cache and gives the logits [V] of what follows it.
    ///
    /// # Errors
    /// When the prompt is empty, longer than the cache, or holds an id outside the vocabulary.
    pub fn prefill(
        &mut self,
        weights: Weights,
        cache: &mut KeyValueCache,
        sequence: usize,
        prompt: &[u32],
        logits: &mut [f32],
    ) -> Result<()> {
        cache.restart(sequence, prompt.len())?;
        let extent = Extent { rows: 1, time: prompt.len() };
        self.forward(weights, prompt, extent, Documents::Whole, None, &mut Past::Fill { cache, sequence })?;
        let normed = &self.buffers.normed;
        self.head_logits(weights, &normed[normed.len() - self.model.config.n_embd..], logits);
        Ok(())
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
        let extent = Extent { rows: tokens.len(), time: 1 };
        self.forward(weights, tokens, extent, Documents::Whole, None, &mut Past::Extend(cache))?;
        self.head_logits(weights, &self.buffers.normed, logits);
        Ok(())
    }

    /// Logits [rows * time, V] of every position.
    pub fn logits(&mut self, weights: Weights, inputs: &[u32], rows: usize) -> Result<Vec<f32>> {
        let extent = Extent { rows, time: inputs.len() / rows.max(1) };
        self.forward(weights, inputs, extent, Documents::Whole, None, &mut Past::None)?;
        let mut logits = vec![0.0; inputs.len() * self.model.config.vocab_size];
        self.head_logits(weights, &self.buffers.normed, &mut logits);
        Ok(logits)
    }

    /// Logits [places.len(), V] of some positions, which count in [rows * time].
    pub fn logits_at(&mut self, weights: Weights, inputs: &[u32], rows: usize, places: &[usize]) -> Result<Vec<f32>> {
        let width = self.model.config.n_embd;
        let extent = Extent { rows, time: inputs.len() / rows.max(1) };
        self.forward(weights, inputs, extent, Documents::Whole, None, &mut Past::None)?;
        let hidden = &self.buffers.normed;
        let chosen: Vec<f32> = places.iter().flat_map(|&place| &hidden[place * width..][..width]).copied().collect();
        let mut logits = vec![0.0; places.len() * self.model.config.vocab_size];
        self.head_logits(weights, &chosen, &mut logits);
        Ok(logits)
    }

    /// Logits [R, V] of `hidden` [R, C], the final norm's output.
    fn head_logits(&self, weights: Weights, hidden: &[f32], logits: &mut [f32]) {
        let head = self.model.linear_weight(weights, self.model.parameters.head);
        linear::forward(hidden, head, None, None, logits);
    }
}
