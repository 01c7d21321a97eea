//! `vrtrain export`: a folder that transformers' from_pretrained loads.

use super::Ending;
use super::target::{Target, Weights};
use crate::model::weights;
use crate::params::Layout;
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use std::fs;
use std::path::Path;

/// Which checkpoint of a run is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    Newest,
    /// The one of the lowest validation loss.
    Best,
}

/// Writes a checkpoint of `target` to `out`, whole or not at all.
pub fn run(target: &str, choice: Choice, out: &Path) -> Result<Ending> {
    let target = match choice {
        Choice::Newest => Target::open(target)?,
        Choice::Best => Target::open_best(target)?,
    };
    let Weights::Checkpoint(checkpoint) = &target.weights else {
        bail!("{} is a model already; export takes a run or a checkpoint", target.name)
    };
    if out.exists() {
        let mut entries = fs::read_dir(out).with_context(|| format!("--out {} is not a folder", out.display()))?;
        ensure!(entries.next().is_none(), "--out {} is not empty: give another folder", out.display());
    }
    let layout = Layout::new(target.config.parameter_specs());
    let mut numbers = vec![0.0; layout.len()];
    crate::train::checkpoint::read_weights(checkpoint, &layout, &mut numbers)?;

    let absolute = std::path::absolute(out)?;
    let parent = absolute.parent().context("--out has no parent folder")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let temporary = tempfile::Builder::new().prefix(".vrtrain-export-").tempdir_in(parent);
    let temporary = temporary.with_context(|| format!("cannot write into {}", parent.display()))?;
    let folder = temporary.path().join("model");
    fs::create_dir(&folder)?;

    weights::write(&folder.join(weights::SINGLE), &layout, &numbers, target.config.name_prefix())?;
    let config = target.config.to_hugging_face(target.text_marks());
    fs::write(folder.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
    let generation = json!({ "bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"] });
    fs::write(folder.join("generation_config.json"), serde_json::to_vec_pretty(&generation)?)?;
    for file in target.tokenizer_files() {
        let name = file.file_name().context("a tokenizer file without a name")?;
        fs::copy(&file, folder.join(name)).with_context(|| format!("cannot copy {}", file.display()))?;
    }
    if out.exists() {
        fs::remove_dir(out).with_context(|| format!("cannot replace {}", out.display()))?;
    }
    fs::rename(&folder, out).with_context(|| format!("cannot write {}", out.display()))?;
    eprintln!("exported {} ({} parameters) to {}", checkpoint.display(), layout.count(), out.display());
    Ok(Ending::Done)
}
