//! A model that generates: token by token on the CPU, with keys and values kept.

use super::gpt2::Gpt2Cpu;
use super::llama::LlamaCpu;
use super::prompts::passes;
use super::{KeyValueCache, ModelShape, Prompt};
use crate::config::Recompute;
use crate::ops::linear::FEW_ROWS;
use crate::ops::product::Precision;
use crate::params::{Layout, Weights};
use anyhow::Result;
use std::sync::Arc;

/// Either architecture's CPU engine, as generation and scoring use it.
pub enum Decoder {
    Gpt2(Box<Gpt2Cpu>),
    Llama(Box<LlamaCpu>),
}

impl Decoder {
    /// One that generates in f32.
    pub fn new(shape: &ModelShape, layout: &Arc<Layout>) -> Self {
        Self::with_precision(shape, layout, Precision::F32)
    }

    /// One that generates and scores; its blocks keep nothing.
    pub fn with_precision(shape: &ModelShape, layout: &Arc<Layout>, precision: Precision) -> Self {
        let (layout, recompute) = (Arc::clone(layout), Recompute::Block);
        match shape {
            ModelShape::Gpt2(config) => {
                Self::Gpt2(Box::new(Gpt2Cpu::new(config.clone(), layout, recompute, precision)))
            }
            ModelShape::Llama(config) => {
                Self::Llama(Box::new(LlamaCpu::new(config.clone(), layout, recompute, precision)))
            }
        }
    }

    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Gpt2(model) => model.config().vocab_size,
            Self::Llama(model) => model.config().vocab_size,
        }
    }

    /// C.
    fn width(&self) -> usize {
        match self {
            Self::Gpt2(model) => model.config().n_embd,
            Self::Llama(model) => model.config().n_embd,
        }
    }

    /// The longest sequence.
    pub fn n_positions(&self) -> usize {
        match self {
            Self::Gpt2(model) => model.config().n_positions,
            Self::Llama(model) => model.config().n_positions,
        }
    }

    /// An empty cache for `batch` sequences of at most `capacity` tokens (the context, if that is less).
    pub fn cache(&self, batch: usize, capacity: usize) -> KeyValueCache {
        match self {
            Self::Gpt2(model) => model.cache(batch, capacity),
            Self::Llama(model) => model.cache(batch, capacity),
        }
    }

    /// Reads the whole of each prompt into its sequence of the cache and gives the logits [prompts, V] of what follows.
    ///
    /// Several prompts share a pass, so that the weights are read once for all of them, where that changes no bit: keys,
    /// values and logits of a prompt are those that it has when it is read alone.
    ///
    /// # Errors
    /// When a prompt is empty, longer than the cache, or holds an id outside the vocabulary.
    pub fn prefill<'a>(
        &mut self,
        weights: impl Into<Weights<'a>>,
        cache: &mut KeyValueCache,
        prompts: &[Prompt],
        logits: &mut [f32],
    ) -> Result<()> {
        let weights = weights.into();
        let (width, vocabulary) = (self.width(), self.vocab_size());
        // Inside the pool: an operation called from outside would wake it up each time.
        rayon::scope(|_| {
            for prompt in prompts {
                cache.restart(prompt.sequence, prompt.tokens.len())?;
            }
            let mut last = vec![0.0; prompts.len() * width];
            for pass in passes(prompts, |few, many| self.rows_keep_their_bits(few, many)) {
                let normed = match self {
                    Self::Gpt2(model) => model.read(weights, cache, &pass)?,
                    Self::Llama(model) => model.read(weights, cache, &pass)?,
                };
                pass.last_rows(normed, width, &mut last);
            }
            // As many rows at a time as the head's bits do not depend on.
            for (last, logits) in last.chunks(FEW_ROWS * width).zip(logits.chunks_mut(FEW_ROWS * vocabulary)) {
                match self {
                    Self::Gpt2(model) => model.head_logits(weights, last, logits),
                    Self::Llama(model) => model.head_logits(weights, last, logits),
                }
            }
            Ok(())
        })
    }

    fn rows_keep_their_bits(&self, few: usize, many: usize) -> bool {
        match self {
            Self::Gpt2(model) => model.rows_keep_their_bits(few, many),
            Self::Llama(model) => model.rows_keep_their_bits(few, many),
        }
    }

    /// Appends one token to every sequence and gives the logits [B, V] of what follows.
    ///
    /// # Errors
    /// When a sequence is full, or an id lies outside the vocabulary.
    pub fn decode<'a>(
        &mut self,
        weights: impl Into<Weights<'a>>,
        cache: &mut KeyValueCache,
        tokens: &[u32],
        logits: &mut [f32],
    ) -> Result<()> {
        let weights = weights.into();
        rayon::scope(|_| match self {
            Self::Gpt2(model) => model.decode(weights, cache, tokens, logits),
            Self::Llama(model) => model.decode(weights, cache, tokens, logits),
        })
    }

    /// Logits [rows * time, V] of every position of whole sequences.
    pub fn logits<'a>(&mut self, weights: impl Into<Weights<'a>>, inputs: &[u32], rows: usize) -> Result<Vec<f32>> {
        let weights = weights.into();
        rayon::scope(|_| match self {
            Self::Gpt2(model) => model.logits(weights, inputs, rows),
            Self::Llama(model) => model.logits(weights, inputs, rows),
        })
    }

    /// Logits [places.len(), V] of some positions of whole sequences: `places` counts in [rows * time].
    pub fn logits_at(&mut self, weights: Weights, inputs: &[u32], rows: usize, places: &[usize]) -> Result<Vec<f32>> {
        rayon::scope(|_| match self {
            Self::Gpt2(model) => model.logits_at(weights, inputs, rows, places),
            Self::Llama(model) => model.logits_at(weights, inputs, rows, places),
        })
    }
}
