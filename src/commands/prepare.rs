//! A run before its first byte is written: everything resolved, opened and checked.

use super::adapted::{self, Adapted};
use super::exact_match::Exam;
use super::run_data::{self, RunData};
use super::run_length::{Counting, RunLength, run_length};
use super::setup::{self, FoundTokenizer, Initial, LazyHub, ModelPlan};
use super::{device, quickstart, shape};
use crate::config::{
    DType, DataSource, ExampleColumns, OptimizerSettings, RunConfig, ScheduleConfig, ScheduleName, Settings, Source,
};
use crate::data::{ChatTemplate, Pass, TextTokenizer};
use crate::model::ModelShape;
use crate::ops::product::Precision;
use crate::optim::{OptimizerConfig, Schedule, Value};
use crate::params::Layout;
use anyhow::{Context, Result, bail};
use candle_core::Device;
use std::path::{Path, PathBuf};

/// A run, checked and opened; nothing is written yet.
pub struct Prepared {
    pub config: RunConfig,
    pub model: ModelShape,
    pub initial: Initial,
    /// Where adapters are trained: what they are, and their base.
    pub adapted: Option<Adapted>,
    pub tokenizer: Option<TextTokenizer>,
    pub tokenizer_files: TokenizerFiles,
    pub data: RunData,
    pub optimizer: OptimizerConfig,
    pub steps: u64,
    /// The length of a pass over the data, where `steps` follows from it.
    pub pass: Option<Pass>,
    pub schedule: Schedule,
    pub device: Device,
    pub precision: Precision,
    /// Lines about the choices that were made, with their reasons.
    pub reasons: Vec<String>,
    /// What the config asks for and gets nothing of.
    pub warnings: Vec<String>,
    /// What held-out problems are asked at each evaluation.
    pub exam: Option<Exam>,
    /// The chat template of a tokenizer that has none of its own.
    pub plain_chat_template: Option<String>,
    /// The quickstart's problems, where that is what runs.
    pub held_out: Option<quickstart::HeldOut>,
}

/// Where the tokenizer that goes into the run folder comes from.
pub enum TokenizerFiles {
    None,
    Copy(Vec<PathBuf>),
    /// The quickstart's own.
    Trained,
}

impl Prepared {
    /// The trainable layout: the model's own, or that of its adapters.
    pub fn layout(&self) -> Result<Layout> {
        match &self.adapted {
            Some(adapted) => adapted.layout(&self.model),
            None => Ok(Layout::new(self.model.parameter_specs())),
        }
    }

    /// Fills `numbers` (a flat storage of `layout`) with what a fresh run begins with.
    pub fn initialize(&self, layout: &Layout, numbers: &mut [f32]) -> Result<()> {
        match &self.adapted {
            Some(adapted) => adapted.initialize(layout, self.config.seed, numbers),
            None => self.initial.load(&self.model, layout, self.config.seed, numbers),
        }
    }

    /// FLOPs of one token's forward and backward pass. A frozen matrix costs two products instead of three.
    pub fn flops_per_token(&self, layout: &Layout) -> f64 {
        let time = self.config.train.sequence_length;
        match &self.adapted {
            None => self.model.flops_per_token(time),
            Some(_) => self.model.flops_per_token_frozen(time) + 6.0 * layout.count() as f64,
        }
    }
}

/// Resolves and opens everything that the config names. `stored` is a resumed run's own folder of model and tokenizer,
/// given when its weights come from a checkpoint: then nothing is asked of `model.init` and `tokenizer.source`.
/// `counting` says how exactly the length of `train.epochs` must be known.
pub fn prepare(mut config: RunConfig, stored: Option<&Path>, counting: Counting<'_>) -> Result<Prepared> {
    let hub = LazyHub::with_cache_gib(config.data.cache_gib);
    let mut reasons = Vec::new();
    let settings = config.settings.0.clone();
    let (optimizer, warnings) = optimizer_of(&mut config.optimizer, &settings)?;
    let device = device::choose(&mut config, &mut reasons)?;
    let precision = precision(&mut config, &device, &mut reasons)?;

    if config.data.examples.is_some() && config.tokenizer.is_none() {
        // Examples are written in the model's own tokens.
        config.tokenizer = config.model.init.clone();
    }
    let (mut made, mut folder) = (None, None);
    let (found, tokenizer_files) = if config.data.source == DataSource::Quickstart && config.data.examples.is_none() {
        let (tokenizer, quickstart) = quickstart::prepare(&config)?;
        made = Some(quickstart);
        (Some(tokenizer), TokenizerFiles::Trained)
    } else {
        let source = match stored {
            Some(folder) if config.tokenizer.is_some() => Some(Source::Path(folder.to_owned())),
            _ => config.tokenizer.clone(),
        };
        match source.map(|source| setup::tokenizer(&source, &hub)).transpose()? {
            Some(FoundTokenizer { tokenizer, folder: own, files }) => {
                folder = Some(own);
                (Some(tokenizer), TokenizerFiles::Copy(files))
            }
            None => (None, TokenizerFiles::None),
        }
    };
    let vocabulary = found.as_ref().map(TextTokenizer::vocabulary_size);
    let plan = || setup::model_plan(&config.model, &hub, vocabulary, config.train.sequence_length);
    let ModelPlan { config: model, initial } = match stored {
        Some(folder) => {
            let shape = setup::read_model_config(&folder.join("config.json"))?;
            // Adapters need their base again; whether it is still the same, the checkpoint's sha256 tells.
            let initial = if config.lora.is_some() { plan()?.initial } else { Initial::Checkpoint };
            ModelPlan { config: shape, initial }
        }
        None => plan()?,
    };
    check_fit(&config, &model, vocabulary, &device)?;
    if config.lora.is_some() && !device.is_cpu() {
        let message = "`[lora]`: adapters are trained on the CPU alone in this version: set `train.device` = \"cpu\"";
        return Err(config.settings.0.error("train.device", message).into());
    }
    let (initial, adapted) = match config.lora {
        None => (initial, None),
        Some(_) => (Initial::Checkpoint, adapted::resolve(&config, &model, initial, &hub, stored)?),
    };
    shape::complete(&mut config.model, &model);
    if let (DataSource::Quickstart, Some(examples)) = (&config.data.source, &config.data.examples) {
        let tokenizer = found.as_ref().context("fine-tuning needs a tokenizer")?;
        made = Some(quickstart::prepare_examples(&config, examples, tokenizer, model.vocab_size())?);
    }
    run_data::settle_date(&mut config, folder.as_deref())?;
    let (data, held_out) = match made {
        Some(quickstart::Made { data, held_out }) => (data, Some(held_out)),
        None => {
            let data = run_data::run_data(&config, &hub, found.as_ref(), folder.as_deref(), model.vocab_size())?;
            (data, None)
        }
    };
    let exam = Exam::new(&config, &data, found.as_ref())?;
    let plain_chat_template = plain_chat_template(&config, found.as_ref(), folder.as_deref())?;
    let RunLength { steps, pass } = run_length(&config, &data, found.as_ref(), model.vocab_size(), counting)?;
    let horizon = *config.schedule.steps.get_or_insert(steps);
    let schedule = schedule_of(&config.schedule, &settings, horizon)?;
    Ok(Prepared {
        config,
        model,
        initial,
        adapted,
        tokenizer: found,
        tokenizer_files,
        data,
        optimizer,
        steps,
        pass,
        schedule,
        device,
        precision,
        reasons,
        warnings,
        exam,
        plain_chat_template,
        held_out,
    })
}

/// The optimizer's own checks; the config gets the complete list of its keys. With it: a line for each key that was given
/// and has no effect.
pub fn optimizer_of(config: &mut OptimizerSettings, settings: &Settings) -> Result<(OptimizerConfig, Vec<String>)> {
    let mut keys = Vec::new();
    for (key, value) in &config.keys {
        let value = match value {
            toml::Value::Boolean(truth) => Value::Bool(*truth),
            toml::Value::String(text) => Value::Text(text.clone().into()),
            toml::Value::Integer(number) => Value::Number(*number as f64),
            toml::Value::Float(number) => Value::Number(*number),
            _ => bail!("`optimizer.{key}` has a type that no optimizer takes"),
        };
        keys.push((key.clone(), value));
    }
    let optimizer = OptimizerConfig::from_keys(&config.name, &keys).map_err(|error| {
        let key = format!("optimizer.{}", error.key.as_deref().unwrap_or("name"));
        settings.error(&key, error.to_string())
    })?;
    let idle = optimizer.without_effect(&keys).into_iter().map(|(key, reason)| {
        let key = format!("optimizer.{key}");
        settings.error(&key, format!("`{key}` {reason}")).to_string()
    });
    let warnings = idle.collect();
    let resolved = optimizer.resolved().iter().map(|(key, value)| {
        let value = match value {
            Value::Number(number) => toml::Value::Float(*number),
            Value::Bool(truth) => toml::Value::Boolean(*truth),
            Value::Text(text) => toml::Value::String(text.to_string()),
        };
        ((*key).to_owned(), value)
    });
    config.keys = resolved.collect();
    Ok((optimizer, warnings))
}

/// Chooses the precision of the products and writes down which one it became, and why.
fn precision(config: &mut RunConfig, device: &Device, reasons: &mut Vec<String>) -> Result<Precision> {
    let native = device.is_cpu() && Precision::bf16_is_native();
    let why_not =
        if device.is_cpu() { Precision::bf16_reason() } else { "this device has no bf16 product of ours".into() };
    let (precision, reason) = match config.train.dtype {
        DType::F32 => (Precision::F32, "f32 (as asked)".to_owned()),
        DType::Auto if native => {
            (Precision::Bf16, format!("bf16 products, f32 weights and sums ({})", Precision::bf16_reason()))
        }
        DType::Tf32 => {
            let key = |why| config.settings.0.error("train.dtype", format!("`train.dtype` = \"tf32\": {why}"));
            device::allow_tf32(device).map_err(key)?;
            reasons.push("precision  tf32 products, f32 weights and sums (as asked)".into());
            return Ok(Precision::F32);
        }
        DType::Auto if device.is_cuda() => {
            (Precision::F32, "f32 (\"tf32\" is faster and rounds what the products read to 11 bits)".into())
        }
        DType::Auto => (Precision::F32, format!("f32 ({why_not})")),
        DType::Bf16 if native => (Precision::Bf16, "bf16 products, f32 weights and sums (as asked)".into()),
        DType::Bf16 => {
            let message = format!("`train.dtype` = \"bf16\": {why_not}; use \"f32\" or \"auto\"");
            return Err(config.settings.0.error("train.dtype", message).into());
        }
    };
    config.train.dtype = match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::Bf16,
    };
    reasons.push(format!("precision  {reason}"));
    Ok(precision)
}

/// The template that goes into the run folder of a chat whose tokenizer has none.
fn plain_chat_template(
    config: &RunConfig,
    tokenizer: Option<&TextTokenizer>,
    folder: Option<&Path>,
) -> Result<Option<String>> {
    let is_chat =
        matches!(&config.data.examples, Some(examples) if matches!(examples.format, ExampleColumns::Chat { .. }));
    match (tokenizer, folder) {
        (Some(tokenizer), Some(folder)) if is_chat && ChatTemplate::load(folder)?.is_none() => {
            run_data::plain_chat_template(tokenizer).map(Some)
        }
        _ => Ok(None),
    }
}

/// Whether tokenizer, rows and model fit one another.
fn check_fit(config: &RunConfig, model: &ModelShape, vocabulary: Option<usize>, device: &Device) -> Result<()> {
    let settings = &config.settings.0;
    if let Some(vocabulary) = vocabulary
        && vocabulary > model.vocab_size()
    {
        let key = if settings.is_set("model.vocab_size") { "model.vocab_size" } else { "tokenizer.source" };
        let message = format!(
            "the tokenizer has {vocabulary} tokens, the model only {} (`model.vocab_size`)",
            model.vocab_size()
        );
        return Err(settings.error(key, message).into());
    }
    if config.train.sequence_length > model.n_positions() {
        let message = format!(
            "`train.sequence_length` = {} is more than the model's {} positions (`model.n_positions`)",
            config.train.sequence_length,
            model.n_positions()
        );
        return Err(settings.error("train.sequence_length", message).into());
    }
    if model.vocab_size() > u32::MAX as usize - 1 {
        return Err(settings.error("model.vocab_size", "`model.vocab_size` is too large").into());
    }
    if config.model.dropout > 0.0 && !device.is_cpu() {
        let message = "`model.dropout` works on the CPU alone; leave it at 0, or set train.device = \"cpu\"";
        return Err(settings.error("model.dropout", message).into());
    }
    Ok(())
}

/// The schedule over `horizon` steps.
pub fn schedule_of(given: &ScheduleConfig, settings: &Settings, horizon: u64) -> Result<Schedule> {
    let (name, decay_ratio) = match given.name {
        ScheduleName::Cosine => ("cosine", None),
        ScheduleName::Linear => ("linear", None),
        ScheduleName::Constant => ("constant", None),
        ScheduleName::WarmupStableDecay => ("wsd", Some(given.decay_ratio)),
        ScheduleName::RangeTest => ("range_test", None),
    };
    Schedule::new(name, given.warmup_steps, given.min_lr_ratio, horizon, decay_ratio).map_err(|error| {
        let key = format!("schedule.{}", error.key.as_deref().unwrap_or("name"));
        settings.error(&key, error.to_string()).into()
    })
}
