//! Generation on the CPU, and the logits of whole sequences.

use super::block::Past;
use super::cpu::LlamaCpu;
use crate::model::prompts::{Fill, passes};
use crate::model::{Documents, Extent, KeyValueCache, Prompt};
use crate::ops::linear::{self, FEW_ROWS};
use crate::params::Weights;
use anyhow::Result;

impl LlamaCpu {
    /// An empty cache for `batch` sequences of at most `capacity` tokens.
    pub fn cache(&self, batch: usize, capacity: usize) -> KeyValueCache {
        let config = &self.model.config;
        KeyValueCache::new(config.n_layer, batch, capacity.min(config.n_positions), config.kv_width())
    }

    /// As [`crate::model::Decoder::prefill`].
    pub fn prefill(
        &mut self,
        weights: Weights,
        cache: &mut KeyValueCache,
        prompts: &[Prompt],
        logits: &mut [f32],
    ) -> Result<()> {
        let (width, vocabulary) = (self.model.config.n_embd, self.model.config.vocab_size);
        for prompt in prompts {
            cache.restart(prompt.sequence, prompt.tokens.len())?;
        }
        let mut last = vec![0.0; prompts.len() * width];
        for pass in passes(prompts, |few, many| self.model.rows_keep_their_bits(few, many)) {
            let (tokens, lengths) = (pass.tokens(), pass.lengths());
            let extent = Extent { rows: 1, time: tokens.len() };
            let past = &mut Past::Fill(Fill { cache: &mut *cache, prompts: &pass.prompts });
            self.forward(weights, &tokens, extent, Documents::Apart(&lengths), None, past)?;
            pass.last_rows(&self.buffers.normed, width, &mut last);
        }
        for (last, logits) in last.chunks(FEW_ROWS * width).zip(logits.chunks_mut(FEW_ROWS * vocabulary)) {
            self.head_logits(weights, last, logits);
        }
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
