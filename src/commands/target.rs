//! What `eval`, `generate` and `export` work on: a run, a checkpoint, a model folder or a hub id.

use super::adapted::{self, Adapted};
use super::setup;
use crate::config::{ConfigError, looks_like_hub_id};
use crate::data::{ChatTemplate, Template, TextTokenizer};
use crate::hub::Hub;
use crate::model::weights::SINGLE;
use crate::model::{Decoder, ModelShape, TextMarks};
use crate::ops::product::Precision;
use crate::params::{Layout, ParameterStore, slice_mut};
use crate::train::{checkpoint, is_run};
use anyhow::{Context, Result, anyhow, bail};
use candle_core::Device;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where the weights are.
pub enum Weights {
    /// A verified checkpoint folder.
    Checkpoint(PathBuf),
    /// Files in the hub's layout.
    Files(Vec<PathBuf>),
}

/// An opened target: its shape is known, its weights are not read yet.
pub struct Target {
    pub name: String,
    pub config: ModelShape,
    pub weights: Weights,
    /// The adapters and their base, where the weights are a checkpoint of adapters.
    pub adapted: Option<Adapted>,
    /// The folder with config.json and tokenizer files.
    folder: PathBuf,
}

/// The folder of a run that holds its model's config and tokenizer.
pub fn model_folder(run: &Path) -> PathBuf {
    run.join("model")
}

/// Whether `folder` is the model's folder of a run.
fn is_run_model(folder: &Path) -> bool {
    folder.parent().is_some_and(|run| is_run(run) && model_folder(run) == folder)
}

/// The checkpoint that a run's file `best` or `latest` names.
fn named_checkpoint(file: &Path) -> Result<PathBuf> {
    let name = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(file.with_file_name("checkpoints").join(name.trim()))
}

impl Target {
    /// The checkpoint of a run's lowest validation loss.
    ///
    /// # Errors
    /// When the run keeps none.
    pub fn open_best(run: &str) -> Result<Self> {
        let best = Path::new(run).join("best");
        if !best.is_file() {
            let message = format!(
                "{run} has no best checkpoint: it keeps one where `train.keep_best` is true and a validation loss was \
                 taken"
            );
            return Err(ConfigError::flag("--best", message).into());
        }
        Self::open(&best.to_string_lossy())
    }

    /// Finds out what `text` names.
    ///
    /// # Errors
    /// When nothing is there, a run has no valid checkpoint, or a model's config cannot be used.
    pub fn open(text: &str) -> Result<Self> {
        let path = Path::new(text);
        if is_run(path) {
            let (newest, rejected) = checkpoint::Checkpoints::of_run(path).newest_valid()?;
            rejected.iter().for_each(|why| eprintln!("passing over a checkpoint that is not valid: {why}"));
            let Some(newest) = newest else { bail!("the run {text} has no valid checkpoint yet") };
            return Self::of_checkpoint(text, path, newest);
        }
        if path.file_name().is_some_and(|name| name == "best" || name == "latest") && path.is_file() {
            let folder = named_checkpoint(path)?;
            return Self::open(&folder.to_string_lossy());
        }
        if path.join("manifest.json").is_file() || path.join("state.json").is_file() {
            checkpoint::verify(path).with_context(|| format!("the checkpoint {text} is not valid"))?;
            let absolute = std::fs::canonicalize(path).with_context(|| format!("cannot open {text}"))?;
            let run =
                absolute.parent().and_then(Path::parent).with_context(|| format!("{text} is in no run folder"))?;
            return Self::of_checkpoint(text, run, absolute.clone());
        }
        if path.is_dir() {
            let config = setup::read_model_config(&path.join("config.json"))?;
            let files = crate::model::weights::files_of_folder(path)?;
            let folder = path.to_owned();
            return Ok(Self::model(text, config, files, folder));
        }
        if path.exists() || !looks_like_hub_id(text) {
            let message = format!("{text} is no run folder, checkpoint, model folder or hub id (owner/name)");
            return Err(ConfigError::flag("RUN|MODEL", message).into());
        }
        let hub = Hub::from_env()?;
        let model = setup::hub_model(&hub, text)?;
        let files = model.download_weights(&hub)?;
        Ok(Self::model(text, model.config, files, model.folder))
    }

    /// A whole model in the hub's layout.
    fn model(name: &str, config: ModelShape, files: Vec<PathBuf>, folder: PathBuf) -> Self {
        Self { name: name.to_owned(), config, weights: Weights::Files(files), adapted: None, folder }
    }

    fn of_checkpoint(name: &str, run: &Path, checkpoint: PathBuf) -> Result<Self> {
        let folder = model_folder(run);
        let config = setup::read_model_config(&folder.join("config.json"))?;
        let record = checkpoint::read_state(&checkpoint)?.base;
        let adapted = record.map(|record| adapted::of_checkpoint(&folder, &record)).transpose()?;
        Ok(Self { name: name.to_owned(), config, weights: Weights::Checkpoint(checkpoint), adapted, folder })
    }

    /// Reads the weights into a store on the CPU.
    pub fn load(&self) -> Result<ParameterStore> {
        let layout = match &self.adapted {
            Some(adapted) => adapted.layout(&self.config)?,
            None => Layout::new(self.config.parameter_specs()),
        };
        let layout = Arc::new(layout);
        let frozen = self.adapted.as_ref().map(|adapted| adapted.load_base(&self.config)).transpose()?;
        let store = ParameterStore::new(Arc::clone(&layout), &Device::Cpu)?.beside(frozen);
        slice_mut(store.weights(), |numbers| match &self.weights {
            Weights::Checkpoint(folder) => checkpoint::read_weights(folder, &layout, numbers),
            Weights::Files(files) => self.config.load(&layout, files, numbers),
        })?
        .with_context(|| format!("cannot load the weights of {}", self.name))?;
        Ok(store)
    }

    /// sha256 of the weights' files, in hexadecimal: of several, of their sums one after the other.
    pub fn weights_sha256(&self) -> Result<String> {
        let files = match &self.weights {
            Weights::Checkpoint(folder) => vec![folder.join(SINGLE)],
            Weights::Files(files) => files.clone(),
        };
        let sums = files.iter().map(|file| checkpoint::sha256_of(file)).collect::<Result<Vec<_>>>()?;
        match &sums[..] {
            [one] => Ok(one.clone()),
            several => Ok(Sha256::digest(several.concat()).iter().map(|byte| format!("{byte:02x}")).collect()),
        }
    }

    /// Reads the weights, rounded too where products read them so, and makes the code that generates with them.
    pub fn load_decoder(&self, precision: Precision) -> Result<(ParameterStore, Decoder)> {
        let mut store = self.load()?;
        if precision == Precision::Bf16 {
            store.keep_rounded()?;
        }
        let decoder = Decoder::with_precision(&self.config, store.layout(), precision);
        Ok((store, decoder))
    }

    /// The template of the model's conversations, if it has one.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        ChatTemplate::load(&self.folder)
    }

    /// The text that a run was fine-tuned on (`data.template` of its config), up to the completion; none for other targets.
    pub fn training_template(&self) -> Result<Option<String>> {
        let config = self.folder.parent().map(|run| run.join("config.toml"));
        let Some(path) = config.filter(|path| is_run_model(&self.folder) && path.is_file()) else { return Ok(None) };
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let config: toml::Table = toml::from_str(&text).with_context(|| format!("cannot read {}", path.display()))?;
        let template = config.get("data").and_then(|data| data.get("template")).and_then(toml::Value::as_str);
        let question = |template| {
            let parsed =
                Template::parse(template).map_err(|why| anyhow!("`data.template` in {}: {why}", path.display()));
            parsed.map(|template| template.question("{prompt}"))
        };
        template.map(question).transpose()
    }

    /// The tokenizer's files that go with the weights.
    pub fn tokenizer_files(&self) -> Vec<PathBuf> {
        setup::TOKENIZER_FILES.iter().map(|name| self.folder.join(name)).filter(|path| path.is_file()).collect()
    }

    /// The tokenizer, if the target has one.
    pub fn tokenizer(&self) -> Result<Option<TextTokenizer>> {
        if self.tokenizer_files().is_empty() {
            return Ok(None);
        }
        TextTokenizer::load(&self.folder).map(Some)
    }

    /// The ids around a text, where they are known.
    pub fn text_marks(&self) -> Option<TextMarks> {
        self.tokenizer().ok().flatten().as_ref().map(setup::text_marks)
    }
}
