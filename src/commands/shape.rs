//! The shape of a model from scratch: what the config leaves out, and what it then says in full.

use crate::config::{Architecture, ConfigError, ModelConfig};
use crate::model::gpt2::Gpt2Config;
use crate::model::llama::{LlamaConfig, SpecialIds};
use crate::model::{Head, ModelShape};
use crate::ops::rotary::Scaling;
use anyhow::{Context, Result};

/// LLaMA's width of the MLP: 8/3 of the stream's, rounded up to a multiple of 256.
fn llama_inner(n_embd: usize) -> usize {
    (8 * n_embd).div_ceil(3).next_multiple_of(256)
}

/// The shape of a model from scratch. `vocabulary` is the tokenizer's, `sequence_length` the run's.
pub fn from_scratch(model: &ModelConfig, vocabulary: Option<usize>, sequence_length: usize) -> Result<ModelShape> {
    // The config has refused a model from scratch without these.
    let missing = "a model from scratch needs n_layer, n_head and n_embd";
    let (n_layer, n_head) = (model.n_layer.context(missing)?, model.n_head.context(missing)?);
    let n_embd = model.n_embd.context(missing)?;
    let n_positions = model.n_positions.unwrap_or(sequence_length);
    let vocab_size =
        model.vocab_size.or(vocabulary).context("`model.vocab_size` is missing: token files do not tell it")?;
    check_sizes(model, vocab_size, n_positions)?;
    let head = |tied| if model.tie_word_embeddings.unwrap_or(tied) { Head::Tied } else { Head::Untied };
    Ok(match model.arch.unwrap_or(Architecture::Gpt2) {
        Architecture::Gpt2 => ModelShape::Gpt2(Gpt2Config {
            n_layer,
            n_head,
            n_embd,
            n_inner: model.n_inner.unwrap_or(4 * n_embd),
            n_positions,
            vocab_size,
            layer_norm_epsilon: model.layer_norm_epsilon.unwrap_or(1e-5),
            head: head(true),
        }),
        Architecture::Llama => ModelShape::Llama(LlamaConfig {
            n_layer,
            n_head,
            n_kv_head: model.n_kv_head.unwrap_or(n_head),
            head_dim: n_embd / n_head,
            n_embd,
            n_inner: model.n_inner.unwrap_or(llama_inner(n_embd)),
            n_positions,
            vocab_size,
            rms_norm_epsilon: model.rms_norm_epsilon.unwrap_or(1e-5),
            rope_theta: model.rope_theta.unwrap_or(10_000.0),
            rope_scaling: Scaling::None,
            head: head(false),
            special_ids: SpecialIds::default(),
        }),
    })
}

/// Refuses sizes of which a product would overflow or a list of parameters alone fill the memory, before anything is made
/// of them.
fn check_sizes(model: &ModelConfig, vocab_size: usize, n_positions: usize) -> Result<()> {
    const MOST_LAYERS: usize = 1 << 16;
    const MOST: usize = 1 << 32;
    // 4 TiB of weights.
    const MOST_PARAMETERS: f64 = (1u64 << 40) as f64;
    let [n_layer, n_embd] = [model.n_layer, model.n_embd].map(|size| size.unwrap_or(0));
    let n_inner = model.n_inner.unwrap_or(0);
    for (key, size, most) in [
        ("model.n_layer", n_layer, MOST_LAYERS),
        ("model.n_embd", n_embd, MOST),
        ("model.n_inner", n_inner, MOST),
        ("model.n_positions", n_positions, MOST),
        ("model.vocab_size", vocab_size, MOST),
    ] {
        if size > most {
            return Err(ConfigError::flag(key, format!("`{key}` = {size} is too large: at most {most}")).into());
        }
    }
    let [layers, width, inner] = [n_layer, n_embd, n_inner.max(2 * n_embd)].map(|size| size as f64);
    let rows = vocab_size as f64 + n_positions as f64;
    let parameters = layers * (2.0 * width * width + 2.0 * width * inner) + width * rows;
    if parameters > MOST_PARAMETERS {
        let message = format!("a model of {parameters:.1e} parameters: make n_layer, n_embd or vocab_size smaller");
        return Err(ConfigError::flag("[model]", message).into());
    }
    Ok(())
}

/// Writes into `config` what the shape has settled: the architecture, and for a model from scratch every size.
pub fn complete(config: &mut ModelConfig, shape: &ModelShape) {
    config.arch = Some(shape.architecture());
    if config.init.is_some() {
        return;
    }
    config.n_positions = Some(shape.n_positions());
    config.vocab_size = Some(shape.vocab_size());
    match shape {
        ModelShape::Gpt2(shape) => {
            config.n_inner = Some(shape.n_inner);
            config.tie_word_embeddings = Some(shape.head == Head::Tied);
            config.layer_norm_epsilon = Some(shape.layer_norm_epsilon);
        }
        ModelShape::Llama(shape) => {
            config.n_kv_head = Some(shape.n_kv_head);
            config.n_inner = Some(shape.n_inner);
            config.tie_word_embeddings = Some(shape.head == Head::Tied);
            config.rms_norm_epsilon = Some(shape.rms_norm_epsilon);
            config.rope_theta = Some(shape.rope_theta);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::llama_inner;

    #[test]
    fn the_default_width_of_the_mlp_is_that_of_the_published_models() {
        // LLaMA 7B, 13B, 33B and SmolLM 135M.
        for (n_embd, n_inner) in [(4096, 11008), (5120, 13824), (6656, 17920), (576, 1536)] {
            assert_eq!(llama_inner(n_embd), n_inner);
        }
    }
}
