//! Hugging Face LLaMA weights: which names they may carry, and what is ignored.

use super::LlamaConfig;
use crate::model::Head;
use crate::model::weights::{self, HEAD, Stored};
use crate::params::Layout;
use anyhow::{Result, ensure};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Fills `out` (a flat storage of `layout`, which is `config`'s) from weight files.
///
/// Names with and without the prefix `model.` are accepted, the rotation's frequencies that old files carry are passed
/// over, and a head in the file of a tied model must equal the token embedding.
///
/// # Errors
/// When a file is torn, a parameter is missing or of another shape, a number is not finite, or a tensor is left over.
pub fn load(config: &LlamaConfig, layout: &Layout, files: &[PathBuf], out: &mut [f32]) -> Result<()> {
    let mut stored: BTreeMap<String, Stored> = BTreeMap::new();
    for (name, place) in weights::headers(files)? {
        if name.ends_with("rotary_emb.inv_freq") {
            continue;
        }
        let full = if name == HEAD || name.starts_with("model.") { name.clone() } else { format!("model.{name}") };
        ensure!(stored.insert(full, place).is_none(), "the weights hold {name} twice, with and without a prefix");
    }
    let tied_to = (config.head == Head::Tied).then(|| config.parameters(layout).token_embedding);
    weights::load_exactly(layout, stored, tied_to, out)
}
