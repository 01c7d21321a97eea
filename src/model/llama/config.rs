//! LLaMA's shape and its parameters.

use crate::model::weights::HEAD;
use crate::model::{Extent, Head};
use crate::ops::attention;
use crate::ops::rotary::Scaling;
use crate::params::{Layout, ParameterSpec};

/// The shape of a LLaMA (Touvron et al. 2023): pre-norm blocks of grouped-query attention with rotary positions and of
/// a SwiGLU MLP, root mean square norms, no biases.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    pub n_layer: usize,
    /// Heads of queries.
    pub n_head: usize,
    /// Heads of keys and values; divides `n_head`.
    pub n_kv_head: usize,
    /// Even, since the rotation turns pairs.
    pub head_dim: usize,
    pub n_embd: usize,
    /// Width of the MLP's hidden layer.
    pub n_inner: usize,
    pub n_positions: usize,
    pub vocab_size: usize,
    pub rms_norm_epsilon: f64,
    pub rope_theta: f64,
    pub rope_scaling: Scaling,
    pub head: Head,
    pub special_ids: SpecialIds,
}

/// Token ids that a config.json names, kept for its export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialIds {
    pub begin_of_text: Option<u32>,
    /// Any of them ends a text.
    pub end_of_text: Vec<u32>,
    pub padding: Option<u32>,
}

/// Places of one block's parameters in the layout. Matrices are stored [outputs, inputs].
#[derive(Clone, Copy, Debug)]
pub struct BlockParameters {
    /// [n_embd]
    pub norm_1: usize,
    /// [n_head * head_dim, n_embd]
    pub query: usize,
    /// [n_kv_head * head_dim, n_embd]
    pub key: usize,
    /// [n_kv_head * head_dim, n_embd]
    pub value: usize,
    /// [n_embd, n_head * head_dim]
    pub output: usize,
    /// [n_embd]
    pub norm_2: usize,
    /// [n_inner, n_embd]
    pub gate: usize,
    /// [n_inner, n_embd]
    pub up: usize,
    /// [n_embd, n_inner]
    pub down: usize,
}

impl BlockParameters {
    /// All of them, in the order of the fields.
    pub fn all(&self) -> [usize; 9] {
        let Self { norm_1, query, key, value, output, norm_2, gate, up, down } = *self;
        [norm_1, query, key, value, output, norm_2, gate, up, down]
    }
}

/// Places of all parameters in the layout.
#[derive(Clone, Debug)]
pub struct LlamaParameters {
    /// [vocab_size, n_embd]
    pub token_embedding: usize,
    pub blocks: Vec<BlockParameters>,
    /// [n_embd]
    pub norm_final: usize,
    /// [vocab_size, n_embd]; the token embedding where tied.
    pub head: usize,
}

const TOKEN_EMBEDDING: &str = "model.embed_tokens.weight";
const NORM_FINAL: &str = "model.norm.weight";

impl LlamaConfig {
    /// Numbers in a position's queries.
    pub fn query_width(&self) -> usize {
        self.n_head * self.head_dim
    }

    /// Numbers in a position's keys, and in its values.
    pub fn kv_width(&self) -> usize {
        self.n_kv_head * self.head_dim
    }

    /// The sizes of attention over a micro-batch.
    pub fn attention(&self, extent: Extent) -> attention::Shape {
        attention::Shape {
            batch: extent.rows,
            sequence: extent.time,
            heads: self.n_head,
            kv_heads: self.n_kv_head,
            head_dim: self.head_dim,
        }
    }

    /// Every parameter under its Hugging Face name; tensors of two dimensions or more decay.
    pub fn parameter_specs(&self) -> Vec<ParameterSpec> {
        let (embd, inner) = (self.n_embd, self.n_inner);
        let mut specs = Vec::with_capacity(9 * self.n_layer + 3);
        let mut add = |name: String, shape: &[usize]| {
            specs.push(ParameterSpec { name, shape: shape.to_vec(), decays: shape.len() >= 2 });
        };
        add(TOKEN_EMBEDDING.into(), &[self.vocab_size, embd]);
        for layer in 0..self.n_layer {
            let mut of = |name: &str, shape: &[usize]| add(format!("model.layers.{layer}.{name}.weight"), shape);
            of("input_layernorm", &[embd]);
            of("self_attn.q_proj", &[self.query_width(), embd]);
            of("self_attn.k_proj", &[self.kv_width(), embd]);
            of("self_attn.v_proj", &[self.kv_width(), embd]);
            of("self_attn.o_proj", &[embd, self.query_width()]);
            of("post_attention_layernorm", &[embd]);
            of("mlp.gate_proj", &[inner, embd]);
            of("mlp.up_proj", &[inner, embd]);
            of("mlp.down_proj", &[embd, inner]);
        }
        add(NORM_FINAL.into(), &[embd]);
        if self.head == Head::Untied {
            add(HEAD.into(), &[self.vocab_size, embd]);
        }
        specs
    }

    /// Looks every parameter up in a layout made of [`Self::parameter_specs`].
    ///
    /// # Panics
    /// When the layout is another model's: a defect of the caller.
    pub fn parameters(&self, layout: &Layout) -> LlamaParameters {
        let index = |name: &str| layout.index_of(name).unwrap_or_else(|| panic!("no parameter {name} in the layout"));
        let blocks = (0..self.n_layer).map(|layer| {
            let of = |name: &str| index(&format!("model.layers.{layer}.{name}.weight"));
            BlockParameters {
                norm_1: of("input_layernorm"),
                query: of("self_attn.q_proj"),
                key: of("self_attn.k_proj"),
                value: of("self_attn.v_proj"),
                output: of("self_attn.o_proj"),
                norm_2: of("post_attention_layernorm"),
                gate: of("mlp.gate_proj"),
                up: of("mlp.up_proj"),
                down: of("mlp.down_proj"),
            }
        });
        let token_embedding = index(TOKEN_EMBEDDING);
        LlamaParameters {
            token_embedding,
            blocks: blocks.collect(),
            norm_final: index(NORM_FINAL),
            head: if self.head == Head::Untied { index(HEAD) } else { token_embedding },
        }
    }
}
