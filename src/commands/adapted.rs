//! Runs that train adapters: what `[lora]` asks for, the frozen base, and what a checkpoint records of it.

use super::setup::{Initial, LazyHub};
use crate::config::{Quantization, RunConfig, Source};
use crate::hub::{RepoId, RepoKind};
use crate::model::adapter::{self, AdapterSettings, Adapters, Scaling, peft};
use crate::model::{BaseSource, ModelShape, freeze_bytes, load_base};
use crate::params::{Adaptation, Frozen, Layout};
use crate::train::checkpoint::{BaseRecord, sha256_of};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The adapters of a run and their base.
pub struct Adapted {
    pub settings: AdapterSettings,
    pub dropout: f64,
    pub quantization: Quantization,
    pub base: Base,
    /// PEFT's file of the adapters to begin with; `None`: fresh ones.
    pub init: Option<PathBuf>,
}

/// Where the base's weights lie.
pub enum Base {
    /// Drawn from a seed.
    Scratch { seed: u64 },
    /// `name` is what a person calls it: a hub id or a folder.
    Stored { name: String, weights: Initial },
}

impl Base {
    /// The weight files; none for a base from scratch.
    fn files(&self) -> Result<Vec<PathBuf>> {
        match self {
            Self::Scratch { .. } => Ok(Vec::new()),
            Self::Stored { weights, .. } => weights.files(),
        }
    }
}

/// What `[lora]` asks for, checked against the model; `None` where every weight is trained. `stored` is a resumed run's
/// own folder of model and tokenizer.
pub fn resolve(
    config: &RunConfig,
    model: &ModelShape,
    initial: Initial,
    hub: &LazyHub,
    stored: Option<&Path>,
) -> Result<Option<Adapted>> {
    let Some(lora) = &config.lora else { return Ok(None) };
    let (settings, init) = match (stored, &lora.init) {
        (Some(folder), _) => (peft::read_config_file(&folder.join(peft::CONFIG))?, None),
        (None, Some(source)) => {
            let (folder_config, file) =
                adapter_files(source, hub).with_context(|| format!("`lora.init` = {source}"))?;
            (peft::read_config_file(&folder_config)?, Some(file))
        }
        (None, None) => {
            let missing = "fresh adapters need rank, alpha and targets";
            let rslora = lora.rslora.unwrap_or(false);
            let settings = AdapterSettings {
                rank: lora.rank.context(missing)?,
                alpha: lora.alpha.context(missing)?,
                targets: lora.targets.clone().context(missing)?,
                scaling: if rslora { Scaling::RootOfRank } else { Scaling::Rank },
            };
            (settings, None)
        }
    };
    if let Err(stranger) = model.adapter_specs(&settings) {
        let key = if lora.init.is_some() { "lora.init" } else { "lora.targets" };
        let words = model.target_words().join("\", \"");
        let message = format!(
            "`{key}`: the model has no layer {stranger:?} that could have an adapter; it has \"{words}\" (or \
             \"{}\" for all of them)",
            adapter::ALL_LINEAR
        );
        return Err(config.settings.0.error(key, message).into());
    }
    let base = match &config.model.init {
        None => Base::Scratch { seed: config.seed },
        Some(source) => {
            // Of a run the very checkpoint: the run may go on.
            let name = match &initial {
                Initial::OtherRun(folder) => folder.display().to_string(),
                _ => source.to_string(),
            };
            Base::Stored { name, weights: initial }
        }
    };
    Ok(Some(Adapted { settings, dropout: lora.dropout, quantization: lora.quantize, base, init }))
}

/// The config and the weights of an adapter in PEFT's format.
fn adapter_files(source: &Source, hub: &LazyHub) -> Result<(PathBuf, PathBuf)> {
    match source {
        Source::Path(folder) => {
            ensure!(folder.is_dir(), "there is no folder {}", folder.display());
            Ok((folder.join(peft::CONFIG), folder.join(peft::WEIGHTS)))
        }
        Source::Hub(id) => {
            let hub = hub.get()?;
            let repo = RepoId::parse(RepoKind::Model, id)?;
            Ok((hub.download(&repo, peft::CONFIG)?, hub.download(&repo, peft::WEIGHTS)?))
        }
    }
}

impl Adapted {
    /// The trainable layout.
    pub fn layout(&self, model: &ModelShape) -> Result<Layout> {
        let specs = model.adapter_specs(&self.settings);
        let specs = specs.map_err(|stranger| anyhow::anyhow!("the model has no layer {stranger:?} for an adapter"))?;
        Ok(Layout::new(specs))
    }

    /// Reads (or draws) the base.
    pub fn load_base(&self, model: &ModelShape) -> Result<Arc<Frozen>> {
        let adaptation = Adaptation { scaling: self.settings.factor(), dropout: self.dropout };
        let files = self.base.files()?;
        let source = match &self.base {
            Base::Scratch { seed } => BaseSource::Scratch { seed: *seed },
            Base::Stored { .. } => BaseSource::Files(&files),
        };
        Ok(Arc::new(load_base(model, source, self.quantization, adaptation).context("cannot load the frozen base")?))
    }

    /// What checkpoints say of the base; reads its files for their sha256.
    pub fn record(&self) -> Result<BaseRecord> {
        let mut sha256 = BTreeMap::new();
        for file in self.base.files()? {
            let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let hash = sha256_of(&file).with_context(|| format!("cannot read {}", file.display()))?;
            sha256.insert(name, hash);
        }
        let (source, seed) = match &self.base {
            Base::Scratch { seed } => (None, Some(*seed)),
            Base::Stored { name, .. } => (Some(name.clone()), None),
        };
        let quantize = match self.quantization {
            Quantization::None => None,
            Quantization::Nf4 => Some("nf4".to_owned()),
        };
        Ok(BaseRecord { source, seed, quantize, sha256 })
    }

    /// Initial adapters in `numbers`, a flat storage of `layout`.
    pub fn initialize(&self, layout: &Layout, seed: u64, numbers: &mut [f32]) -> Result<()> {
        match &self.init {
            None => adapter::initialize(layout, seed, numbers),
            Some(file) => peft::load(file, layout, numbers).context("cannot load `lora.init`")?,
        }
        Ok(())
    }

    /// PEFT's adapter_config.json.
    pub fn peft_config(&self, model: &ModelShape) -> serde_json::Value {
        let base = match &self.base {
            Base::Scratch { .. } => "",
            Base::Stored { name, .. } => name,
        };
        peft::config(model, &self.settings, self.dropout, base)
    }

    /// Bytes that the frozen base takes.
    pub fn base_bytes(&self, model: &ModelShape) -> Result<usize> {
        let file_bytes = match &self.base {
            Base::Scratch { .. } => None,
            Base::Stored { weights, .. } => {
                let count = Layout::new(model.parameter_specs()).count() as f64;
                // f32, f16 or bf16: what is stored in f64 becomes f32.
                Some(((weights.weight_bytes()? as f64 / count).round() as usize).clamp(2, 4))
            }
        };
        Ok(freeze_bytes(model, self.quantization, file_bytes))
    }

    /// Bytes of working memory that adapters need besides the model's.
    pub fn working_bytes(&self, model: &ModelShape, tokens: usize) -> Result<usize> {
        let (_, adapters) = Adapters::of(model, &Arc::new(self.layout(model)?));
        Ok(size_of::<f32>() * adapters.map_or(0, |adapters| adapters.scratch_len(tokens, self.dropout > 0.0)))
    }

    /// One line for people.
    pub fn describe(&self, trainable: usize, model: &ModelShape) -> String {
        let AdapterSettings { rank, alpha, targets, scaling } = &self.settings;
        let total = Layout::new(model.parameter_specs()).count();
        let root = if *scaling == Scaling::RootOfRank { " over the rank's root" } else { "" };
        let base = match self.quantization {
            Quantization::None => "frozen base as it is stored",
            Quantization::Nf4 => "frozen base in NF4",
        };
        format!(
            "rank {rank}, alpha {alpha}{root}, dropout {}, on {}: {trainable} parameters ({:.2}% of {total}); {base}",
            self.dropout,
            targets.join(", "),
            100.0 * trainable as f64 / total as f64
        )
    }
}

/// The adapters of a checkpoint, from what the run and the checkpoint say; the base must be what it was.
pub fn of_checkpoint(model_folder: &Path, record: &BaseRecord) -> Result<Adapted> {
    let path = model_folder.join(peft::CONFIG);
    let settings = peft::read_config_file(&path)?;
    let quantization = match record.quantize.as_deref() {
        None => Quantization::None,
        Some("nf4") => Quantization::Nf4,
        Some(other) => {
            anyhow::bail!("the checkpoint's base is quantized as {other:?}, which this vrtrain does not know")
        }
    };
    let base = match (&record.source, record.seed) {
        (Some(name), _) => {
            let weights = match Source::parse(name, Path::new("")) {
                Source::Path(folder) => Initial::Folder(folder),
                Source::Hub(id) => Initial::Hub(Box::new(super::setup::hub_model(LazyHub::default().get()?, &id)?)),
            };
            Base::Stored { name: name.clone(), weights }
        }
        (None, Some(seed)) => Base::Scratch { seed },
        (None, None) => anyhow::bail!("the checkpoint does not say what its adapters' base is"),
    };
    // Dropout plays no part outside of training.
    let adapted = Adapted { settings, dropout: 0.0, quantization, base, init: None };
    refuse_changed_base(&adapted, record)?;
    Ok(adapted)
}

/// Refuses a base whose files are not those that the adapters were trained on.
pub fn refuse_changed_base(adapted: &Adapted, record: &BaseRecord) -> Result<()> {
    let now = adapted.record().context("cannot find the adapters' base")?;
    if now.sha256 == record.sha256 {
        return Ok(());
    }
    let changed: Vec<&str> = record
        .sha256
        .iter()
        .filter(|(name, hash)| now.sha256.get(*name) != Some(*hash))
        .map(|(name, _)| name.as_str())
        .chain(now.sha256.keys().filter(|name| !record.sha256.contains_key(*name)).map(String::as_str))
        .collect();
    anyhow::bail!(
        "the adapters' base {} has changed since they were trained ({} has another sha256): put the old files back",
        record.source.as_deref().unwrap_or("(from scratch)"),
        changed.join(", ")
    )
}
