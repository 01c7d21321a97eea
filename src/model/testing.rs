//! Small models of both architectures for tests.

use super::{Decoder, ModelShape};
use crate::ops::product::Precision;
use crate::params::{Layout, ParameterStore};
use crate::random::{Stream, below, generator};
use anyhow::Result;
use candle_core::Device;
use serde_json::json;
use std::sync::Arc;

/// The sizes of a model of two layers.
#[derive(Clone, Copy, Debug)]
pub struct Small {
    pub width: usize,
    pub heads: usize,
    pub inner: usize,
    pub context: usize,
    pub vocabulary: usize,
}

impl Small {
    /// A GPT-2, and a LLaMA with half as many heads for keys and values.
    pub fn shapes(self) -> [ModelShape; 2] {
        let Self { width, heads, inner, context, vocabulary } = self;
        let gpt2 = json!({
            "n_embd": width, "n_head": heads, "n_layer": 2, "n_inner": inner, "n_positions": context,
            "vocab_size": vocabulary
        });
        let llama = json!({
            "model_type": "llama", "hidden_size": width, "num_attention_heads": heads,
            "num_key_value_heads": heads / 2, "num_hidden_layers": 2, "intermediate_size": inner,
            "vocab_size": vocabulary, "max_position_embeddings": context
        });
        [gpt2, llama].map(|config| ModelShape::from_hugging_face(&config).expect("a model's config"))
    }

    /// Prompts of these lengths, the same each time.
    pub fn prompts(self, lengths: &[usize]) -> Vec<Vec<u32>> {
        let mut random = generator(5, Stream::Generate);
        let mut ids = |length| (0..length).map(|_| below(&mut random, self.vocabulary as u64) as u32).collect();
        lengths.iter().map(|&length| ids(length)).collect()
    }
}

/// Initial weights times `factor` (above 1, so that every layer matters), and a decoder for them.
pub fn decoder(shape: &ModelShape, precision: Precision, factor: f32) -> Result<(ParameterStore, Decoder)> {
    let layout = Arc::new(Layout::new(shape.parameter_specs()));
    let mut store = ParameterStore::new(Arc::clone(&layout), &Device::Cpu)?;
    let mut weights = vec![0.0; layout.len()];
    shape.initialize(&layout, 3, &mut weights);
    weights.iter_mut().for_each(|weight| *weight *= factor);
    store.set_weights(weights)?;
    if precision == Precision::Bf16 {
        store.keep_rounded()?;
    }
    Ok((store, Decoder::with_precision(shape, &layout, precision)))
}
