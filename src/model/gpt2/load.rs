//! Hugging Face GPT-2 weights: which names they may carry, and what is ignored.

use super::Gpt2Config;
use crate::model::Head;
use crate::model::weights::{self, Stored, StoredModel};
use crate::params::Layout;
use anyhow::{Result, ensure};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Causal-mask buffers that old files carry: no weights.
fn is_mask_buffer(name: &str) -> bool {
    let inside = name.strip_prefix("h.").and_then(|rest| rest.split_once('.'));
    inside.is_some_and(|(layer, rest)| {
        layer.chars().all(|c| c.is_ascii_digit()) && matches!(rest, "attn.bias" | "attn.masked_bias")
    })
}

/// Finds every parameter in weight files.
///
/// Names with and without the prefix `transformer.` are accepted, mask buffers are passed over, and a head in the file
/// of a tied model must equal the token embedding.
///
/// # Errors
/// When a file is torn or holds a tensor twice.
pub fn stored(config: &Gpt2Config, layout: &Layout, files: &[PathBuf]) -> Result<StoredModel> {
    let mut tensors: BTreeMap<String, Stored> = BTreeMap::new();
    for (name, place) in weights::headers(files)? {
        let plain = name.strip_prefix("transformer.").unwrap_or(&name).to_owned();
        if is_mask_buffer(&plain) {
            continue;
        }
        ensure!(tensors.insert(plain, place).is_none(), "the weights hold {name} twice, with and without a prefix");
    }
    let tied_to = (config.head == Head::Tied).then(|| config.parameters(layout).token_embedding);
    Ok(StoredModel { tensors, tied_to })
}

#[cfg(test)]
mod tests {
    use super::is_mask_buffer;

    #[test]
    fn only_the_mask_buffers_are_ignored() {
        assert!(is_mask_buffer("h.11.attn.bias") && is_mask_buffer("h.0.attn.masked_bias"));
        assert!(
            !is_mask_buffer("h.0.attn.c_attn.bias") && !is_mask_buffer("attn.bias") && !is_mask_buffer("h.x.attn.bias")
        );
    }
}
