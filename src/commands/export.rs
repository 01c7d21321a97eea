//! `vrtrain export`: a folder that transformers' from_pretrained loads.

use super::Ending;
use super::adapted::Adapted;
use super::target::{Target, Weights};
use crate::config::ConfigError;
use crate::model::adapter::{merge, peft};
use crate::model::weights;
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use std::fs;
use std::path::Path;

/// What is written of a run that trained adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A model; of adapters the adapters alone, in PEFT's format.
    AsTrained,
    /// A model with its adapters merged in.
    Merged,
}

/// Which checkpoint of a run is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    Newest,
    /// The one of the lowest validation loss.
    Best,
}

/// Writes a checkpoint of `target` to `out`, whole or not at all.
pub fn run(target: &str, choice: Choice, form: Form, out: &Path) -> Result<Ending> {
    let target = match choice {
        Choice::Newest => Target::open(target)?,
        Choice::Best => Target::open_best(target)?,
    };
    let Weights::Checkpoint(checkpoint) = &target.weights else {
        bail!("{} is a model already; export takes a run or a checkpoint", target.name)
    };
    if form == Form::Merged && target.adapted.is_none() {
        let message = format!("{} has no adapters to merge: every weight was trained; leave --merge out", target.name);
        return Err(ConfigError::flag("--merge", message).into());
    }
    if out.exists() {
        let mut entries = fs::read_dir(out).with_context(|| format!("--out {} is not a folder", out.display()))?;
        ensure!(entries.next().is_none(), "--out {} is not empty: give another folder", out.display());
    }
    let absolute = std::path::absolute(out)?;
    let parent = absolute.parent().context("--out has no parent folder")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let temporary = tempfile::Builder::new().prefix(".vrtrain-export-").tempdir_in(parent);
    let temporary = temporary.with_context(|| format!("cannot write into {}", parent.display()))?;
    let folder = temporary.path().join("model");
    fs::create_dir(&folder)?;

    let what = match &target.adapted {
        Some(adapted) if form == Form::AsTrained => write_adapters(&target, adapted, checkpoint, &folder)?,
        _ => write_model(&target, &folder)?,
    };
    for file in target.tokenizer_files() {
        let name = file.file_name().context("a tokenizer file without a name")?;
        fs::copy(&file, folder.join(name)).with_context(|| format!("cannot copy {}", file.display()))?;
    }
    if out.exists() {
        fs::remove_dir(out).with_context(|| format!("cannot replace {}", out.display()))?;
    }
    fs::rename(&folder, out).with_context(|| format!("cannot write {}", out.display()))?;
    eprintln!("exported {} ({what}) to {}", checkpoint.display(), out.display());
    Ok(Ending::Done)
}

/// Writes PEFT's two files; says what they are.
fn write_adapters(target: &Target, adapted: &Adapted, checkpoint: &Path, folder: &Path) -> Result<String> {
    let layout = adapted.layout(&target.config)?;
    let mut numbers = vec![0.0; layout.len()];
    crate::train::checkpoint::read_weights(checkpoint, &layout, &mut numbers)?;
    peft::write(folder, &adapted.peft_config(&target.config), &layout, &numbers)?;
    Ok(format!("adapters in PEFT's format, {} parameters; --merge writes the whole model", layout.count()))
}

/// Writes a model's weights and configs; says what they are.
fn write_model(target: &Target, folder: &Path) -> Result<String> {
    let store = target.load()?;
    let (path, prefix) = (folder.join(weights::SINGLE), target.config.name_prefix());
    let (count, merged) = store.read(|numbers| match numbers.frozen {
        None => {
            weights::write(&path, store.layout(), numbers.exact, prefix)?;
            Ok::<_, anyhow::Error>((store.layout().count(), ""))
        }
        Some(frozen) => {
            merge::write(&path, &target.config, frozen, store.layout(), numbers.exact, prefix)?;
            Ok((frozen.layout().count(), ", adapters merged"))
        }
    })??;
    let config = target.config.to_hugging_face(target.text_marks());
    fs::write(folder.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
    let generation = json!({ "bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"] });
    fs::write(folder.join("generation_config.json"), serde_json::to_vec_pretty(&generation)?)?;
    Ok(format!("{count} parameters{merged}"))
}
