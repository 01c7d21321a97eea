//! Hugging Face GPT-2 weights: which names they may carry, and what is ignored.

use super::Gpt2Config;
use crate::model::Head;
use crate::model::weights::{self, Stored};
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

/// Fills `out` (a flat storage of `layout`, which is `config`'s) from weight files.
///
/// Names with and without the prefix `transformer.` are accepted, mask buffers are passed over, and a head in the file
/// of a tied model must equal the token embedding.
///
/// # Errors
/// When a file is torn, a parameter is missing or of another shape, a number is not finite, or a tensor is left over.
pub fn load(config: &Gpt2Config, layout: &Layout, files: &[PathBuf], out: &mut [f32]) -> Result<()> {
    let mut stored: BTreeMap<String, Stored> = BTreeMap::new();
    for (name, place) in weights::headers(files)? {
        let plain = name.strip_prefix("transformer.").unwrap_or(&name).to_owned();
        if is_mask_buffer(&plain) {
            continue;
        }
        ensure!(stored.insert(plain, place).is_none(), "the weights hold {name} twice, with and without a prefix");
    }
    let tied_to = (config.head == Head::Tied).then(|| config.parameters(layout).token_embedding);
    weights::load_exactly(layout, stored, tied_to, out)
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
