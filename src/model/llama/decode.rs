//! Generation on the CPU, and the logits of whole sequences.

use super::block::Past;
use super::cpu::LlamaCpu;
use crate::model::prompts::{Fill, Pass};
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

    /// Reads the prompts of a pass into the cache and gives the final norm's output [R, C].
    pub(in crate::model) fn read(
        &mut self,
        weights: Weights,
        cache: &mut KeyValueCache,
        pass: &Pass,
    ) -> Result<&[f32]> {
        let (tokens, lengths) = (pass.tokens(), pass.lengths());
        let extent = Extent { rows: 1, time: tokens.len() };
        let past = &mut Past::Fill(Fill { cache, prompts: &pass.prompts });
        self.forward(weights, &tokens, extent, Documents::Apart(&lengths), None, past)?;
        Ok(&self.buffers.normed)
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
    pub(in crate::model) fn head_logits(&self, weights: Weights, hidden: &[f32], logits: &mut [f32]) {
        let head = self.model.linear_weight(weights, self.model.parameters.head);
        linear::forward(hidden, head, None, None, logits);
    }
}
