//! The shape of a model of either architecture: what the rest of the program needs to know of it.

use super::gpt2::{self, Gpt2Config, Gpt2Cpu};
use super::init::Initializer;
use super::llama::{self, LlamaConfig, LlamaCpu};
use super::weights::{self, NamePrefix, StoredModel};
use super::{Batch, Extent, Head, TextMarks};
use crate::config::{Architecture, Recompute};
use crate::ops::product::Precision;
use crate::params::{Layout, ParameterSpec};
use anyhow::Result;
use candle_core::Tensor;
use serde_json::Value;
use std::path::PathBuf;

/// Logits that a card forms at once, at most (1 GiB).
pub(super) const CARD_LOGITS: usize = 1 << 28;

/// A model's architecture and shape.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelShape {
    Gpt2(Gpt2Config),
    Llama(LlamaConfig),
}

impl ModelShape {
    /// Reads a Hugging Face `config.json`; its `model_type` says the architecture (none: GPT-2, as in old files).
    ///
    /// # Errors
    /// A message naming the entry, when one is missing, malformed, or asks for what the architecture does not have here.
    pub fn from_hugging_face(config: &Value) -> Result<Self, String> {
        match config.get("model_type").and_then(Value::as_str) {
            None | Some("gpt2") => Gpt2Config::from_hugging_face(config).map(Self::Gpt2),
            Some("llama") => LlamaConfig::from_hugging_face(config).map(Self::Llama),
            Some(other) => {
                Err(format!("`model_type` is {other:?}, which is not supported (only \"gpt2\" and \"llama\")"))
            }
        }
    }

    /// The `config.json` that transformers reads; `marks` are the tokenizer's, if there is one.
    pub fn to_hugging_face(&self, marks: Option<TextMarks>) -> Value {
        match self {
            Self::Gpt2(config) => config.to_hugging_face(marks),
            Self::Llama(config) => config.to_hugging_face(marks),
        }
    }

    pub fn architecture(&self) -> Architecture {
        match self {
            Self::Gpt2(_) => Architecture::Gpt2,
            Self::Llama(_) => Architecture::Llama,
        }
    }

    /// The sum of the losses of a batch from candle primitives, a function of `tensors`, the parameters in the layout's
    /// order and in any one dtype; and the number of its targets.
    pub fn twin_loss(&self, layout: &Layout, tensors: &[Tensor], batch: Batch) -> candle_core::Result<(Tensor, u64)> {
        match self {
            Self::Gpt2(config) => gpt2::twin::loss(config, layout, tensors, batch),
            Self::Llama(config) => llama::twin::loss(config, layout, tensors, batch),
        }
    }

    /// Every parameter under its Hugging Face name.
    pub fn parameter_specs(&self) -> Vec<ParameterSpec> {
        match self {
            Self::Gpt2(config) => config.parameter_specs(),
            Self::Llama(config) => config.parameter_specs(),
        }
    }

    /// The longest sequence.
    pub fn n_positions(&self) -> usize {
        match self {
            Self::Gpt2(config) => config.n_positions,
            Self::Llama(config) => config.n_positions,
        }
    }

    /// Ids that end a text, as the model's config.json names them; GPT-2's is its tokenizer's.
    pub fn end_of_text(&self) -> &[u32] {
        match self {
            Self::Gpt2(_) => &[],
            Self::Llama(config) => &config.special_ids.end_of_text,
        }
    }

    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Gpt2(config) => config.vocab_size,
            Self::Llama(config) => config.vocab_size,
        }
    }

    /// FLOPs of one token's forward and backward pass at sequence length `time`: 6N + 12 L H Q T.
    ///
    /// N counts the parameters that multiply: without a position table, and of the two matrices of an untied vocabulary
    /// the head alone (PaLM, Chowdhery et al. 2022, appendix B).
    pub fn flops_per_token(&self, time: usize) -> f64 {
        self.flops(6.0, time)
    }

    /// As [`Self::flops_per_token`], for a frozen model whose weights need no gradient: 4N + 12 L H Q T.
    pub fn flops_per_token_frozen(&self, time: usize) -> f64 {
        self.flops(4.0, time)
    }

    fn flops(&self, of_a_weight: f64, time: usize) -> f64 {
        let count = Layout::new(self.parameter_specs()).count();
        let table = |head: Head, len: usize| if head == Head::Untied { len } else { 0 };
        let (layers, mixed_width, looked_up) = match self {
            Self::Gpt2(c) => (c.n_layer, c.n_embd, c.n_positions * c.n_embd + table(c.head, c.vocab_size * c.n_embd)),
            Self::Llama(c) => (c.n_layer, c.n_head * c.head_dim, table(c.head, c.vocab_size * c.n_embd)),
        };
        of_a_weight * (count - looked_up) as f64 + 12.0 * (layers * mixed_width * time) as f64
    }

    /// One line for people: architecture, sizes.
    pub fn describe(&self) -> String {
        let heads = match self {
            Self::Gpt2(config) => {
                format!("GPT-2, {} layers x {}, {} heads", config.n_layer, config.n_embd, config.n_head)
            }
            Self::Llama(config) => format!(
                "LLaMA, {} layers x {}, {} heads ({} of keys and values)",
                config.n_layer, config.n_embd, config.n_head, config.n_kv_head
            ),
        };
        format!("{heads}, context {}, vocabulary {}", self.n_positions(), self.vocab_size())
    }

    /// Bytes of working memory of a training step on the CPU.
    pub fn working_bytes(&self, extent: Extent, recompute: Recompute, precision: Precision) -> usize {
        match self {
            Self::Gpt2(config) => Gpt2Cpu::working_bytes(config, extent, recompute, precision),
            Self::Llama(config) => LlamaCpu::working_bytes(config, extent, recompute, precision),
        }
    }

    /// Bytes of working memory of a training step on a CUDA card (src/model/card): what blocks keep, the largest of what
    /// comes and goes, and the logits that are formed at once.
    pub fn working_bytes_on_card(&self, extent: Extent, recompute: Recompute) -> usize {
        // Of one token and block: x, the norms' results and the stream between; queries, keys, values and what they mix to;
        // the MLP's hidden layers.
        let (layers, width, hidden, heads, query, vocabulary) = match self {
            Self::Gpt2(c) => (c.n_layer, c.n_embd, 2 * c.n_inner, c.n_head, c.n_embd, c.vocab_size),
            Self::Llama(c) => (c.n_layer, c.n_embd, 3 * c.n_inner, c.n_head, c.query_width(), c.vocab_size),
        };
        let probabilities = heads * extent.time;
        let block = 4 * width + 4 * query + hidden + probabilities;
        let kept = if recompute == Recompute::Block { layers * width + block } else { layers * block };
        let passing = probabilities + hidden + 4 * width;
        let logits = (extent.tokens() * vocabulary).min(CARD_LOGITS.max(vocabulary));
        4 * (extent.tokens() * (kept + passing) + logits + vocabulary * width)
    }

    /// Fills `weights` (a flat storage of `layout`, which is this shape's) with initial weights drawn from `seed`.
    pub fn initialize(&self, layout: &Layout, seed: u64, weights: &mut [f32]) {
        let mut initializer = self.initializer(seed);
        for parameter in layout.parameters() {
            initializer.fill(parameter, &mut weights[parameter.range()]);
        }
    }

    /// What gives every parameter, in the layout's order, its initial numbers.
    pub(super) fn initializer(&self, seed: u64) -> Initializer<'static> {
        match self {
            Self::Gpt2(config) => Initializer::new(config.n_layer, &["c_proj.weight"], seed),
            Self::Llama(config) => Initializer::new(config.n_layer, &["o_proj.weight", "down_proj.weight"], seed),
        }
    }

    /// Fills `numbers` (a flat storage of `layout`, which is this shape's) from weight files in the hub's layout.
    ///
    /// # Errors
    /// When a file is torn, a parameter is missing or of another shape, a number is not finite, or a tensor is left over.
    pub fn load(&self, layout: &Layout, files: &[PathBuf], numbers: &mut [f32]) -> Result<()> {
        weights::each_exactly(layout, self.stored(layout, files)?, |parameter, place| {
            weights::read(&parameter.name, place, &mut numbers[parameter.range()])
        })
    }

    /// Every parameter's place in weight files in the hub's layout.
    pub(super) fn stored(&self, layout: &Layout, files: &[PathBuf]) -> Result<StoredModel> {
        match self {
            Self::Gpt2(config) => gpt2::stored(config, layout, files),
            Self::Llama(config) => llama::stored(config, layout, files),
        }
    }

    /// What stands before the parameters' names in a file that transformers reads.
    pub fn name_prefix(&self) -> NamePrefix {
        match self {
            // A head of its own stands outside the module `transformer`, so then every name says where it belongs.
            Self::Gpt2(config) if config.head == Head::Untied => NamePrefix::Transformer,
            Self::Gpt2(_) | Self::Llama(_) => NamePrefix::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_model_type_says_the_architecture_and_another_is_refused_by_name() -> Result<(), String> {
        let gpt2 = json!({"n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 4, "vocab_size": 5});
        assert_eq!(ModelShape::from_hugging_face(&gpt2)?.architecture(), Architecture::Gpt2);
        let llama = json!({
            "model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
            "intermediate_size": 12, "vocab_size": 5
        });
        let shape = ModelShape::from_hugging_face(&llama)?;
        assert_eq!((shape.architecture(), shape.n_positions(), shape.vocab_size()), (Architecture::Llama, 2048, 5));
        let error = ModelShape::from_hugging_face(&json!({"model_type": "mamba"})).expect_err("unknown");
        assert!(error.contains("mamba") && error.contains("llama"), "{error}");
        Ok(())
    }

    #[test]
    fn work_counts_the_matrices_that_multiply() {
        let llama = json!({
            "model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
            "num_hidden_layers": 30, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": true
        });
        let tied = ModelShape::from_hugging_face(&llama).expect("a LLaMA");
        let expected = 6.0 * 134_515_008.0 + 12.0 * 30.0 * 576.0 * 512.0;
        assert_eq!(tied.flops_per_token(512), expected);
        let mut own_head = llama;
        own_head["tie_word_embeddings"] = json!(false);
        let untied = ModelShape::from_hugging_face(&own_head).expect("a LLaMA");
        assert_eq!(untied.flops_per_token(512), expected, "a table that is only looked up costs no products");
    }
}
