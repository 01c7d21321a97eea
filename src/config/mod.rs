//! Run configuration: one complete TOML file a run, closed (an unknown key is an error), resolved before any work.

mod compare;
mod examples;
mod resolve;
mod schema;
mod settings;
mod source;
mod task;
mod write;

pub use compare::changed_mathematics;
pub use examples::{ExampleColumns, ExamplesConfig, TooLong};
pub use settings::{Origin, Settings};
pub use source::{Source, looks_like_hub_id};
pub use task::{
    GridTask, ImageNetwork, ImageObjective, ImageTask, SharpnessConfig, Task, TaskRunConfig, with_optimizer,
};

use std::path::{Path, PathBuf};

/// A wrong config or command line: the process exits with code 2.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{origin}: {message}")]
pub struct ConfigError {
    origin: String,
    message: String,
}

impl ConfigError {
    /// An error at `origin` (a line of a file or a flag).
    pub fn new(origin: &Origin, message: String) -> Self {
        Self { origin: origin.0.clone(), message }
    }

    /// An error about a flag or an argument.
    pub fn flag(flag: &str, message: impl Into<String>) -> Self {
        Self { origin: flag.to_owned(), message: message.into() }
    }
}

/// A resolved run: every default filled in, every path absolute.
#[derive(Clone, Debug, PartialEq)]
pub struct RunConfig {
    /// The config's name (its file name without extension), from which a run folder is named.
    pub name: String,
    pub seed: u64,
    pub model: ModelConfig,
    pub tokenizer: Option<Source>,
    pub data: DataConfig,
    pub optimizer: OptimizerSettings,
    pub schedule: ScheduleConfig,
    pub train: TrainConfig,
    /// `None`: every weight is trained.
    pub lora: Option<LoraConfig>,
    /// What the user gave and where, for later error messages.
    pub settings: SettingsOrigin,
}

/// The raw settings behind a resolved config; equal to any other, since it changes nothing about the run.
#[derive(Clone, Debug, Default)]
pub struct SettingsOrigin(pub Settings);

impl PartialEq for SettingsOrigin {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// The model's family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    Gpt2,
    Llama,
}

impl Architecture {
    /// What `model.arch` calls it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Gpt2 => "gpt2",
            Self::Llama => "llama",
        }
    }
}

/// The model: loaded from `init`, or built from scratch with the given shape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelConfig {
    /// `None`: the one that `init` is of.
    pub arch: Option<Architecture>,
    /// Hub id or folder of the initial weights; its config.json gives the shape.
    pub init: Option<Source>,
    pub n_layer: Option<usize>,
    pub n_head: Option<usize>,
    /// Heads of keys and values (LLaMA).
    pub n_kv_head: Option<usize>,
    pub n_embd: Option<usize>,
    pub n_inner: Option<usize>,
    pub n_positions: Option<usize>,
    pub vocab_size: Option<usize>,
    /// Whether the head is the token embedding's matrix.
    pub tie_word_embeddings: Option<bool>,
    /// GPT-2's.
    pub layer_norm_epsilon: Option<f64>,
    /// LLaMA's.
    pub rms_norm_epsilon: Option<f64>,
    pub rope_theta: Option<f64>,
    pub dropout: f64,
}

/// Where the training tokens come from.
#[derive(Clone, Debug, PartialEq)]
pub struct DataConfig {
    pub source: DataSource,
    /// Globs that choose files of the source; empty: all that can be read.
    pub files: Vec<String>,
    pub text_column: String,
    /// `None`: running text.
    pub examples: Option<ExamplesConfig>,
    pub shuffle: bool,
    pub tokenizer_threads: usize,
    /// Bound of the on-disk cache of hub shards, in GiB.
    pub cache_gib: f64,
    pub validation: Option<ValidationConfig>,
}

/// A data source.
#[derive(Clone, Debug, PartialEq)]
pub enum DataSource {
    /// The generator of the embedded quickstart.
    Quickstart,
    /// A hub data set, or local files and folders.
    Files(Vec<Source>),
}

/// Where the validation tokens come from.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidationConfig {
    /// `None`: the training source.
    pub source: Option<DataSource>,
    pub files: Vec<String>,
    /// How many tokens are scored at most.
    pub tokens: u64,
    /// How many examples are scored at most; `None`: all.
    pub examples: Option<usize>,
}

/// `[optimizer]` as given; the optimizer that `name` chooses checks the keys.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerSettings {
    pub name: String,
    pub keys: Vec<(String, toml::Value)>,
}

/// The shape of the learning rate over the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScheduleName {
    Cosine,
    Linear,
    Constant,
    WarmupStableDecay,
    /// From the floor up to the peak, exponentially: the learning-rate range test.
    RangeTest,
}

/// The learning-rate schedule; it multiplies `optimizer.lr`.
#[derive(Clone, Debug, PartialEq)]
pub struct ScheduleConfig {
    pub name: ScheduleName,
    pub warmup_steps: u64,
    pub min_lr_ratio: f64,
    /// The share of the horizon in which `wsd` decays.
    pub decay_ratio: f64,
    /// The horizon; `None` until the length of the run is known.
    pub steps: Option<u64>,
}

/// How long a run is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Duration {
    Steps(u64),
    Tokens(u64),
    Epochs(f64),
}

/// The number format of products and stored activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    Auto,
    F32,
    Bf16,
    /// f32 whose products round what they read to 11 bits: for CUDA cards.
    Tf32,
}

/// What the backward pass computes again instead of keeping it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    None,
    Block,
}

/// Where the run computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    Auto,
    Cpu,
    Cuda(usize),
}

impl std::str::FromStr for DeviceChoice {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, String> {
        match given {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => match given.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok()) {
                Some(ordinal) => Ok(Self::Cuda(ordinal)),
                None => Err(format!("must be \"auto\", \"cpu\" or \"cuda:N\", found {given:?}")),
            },
        }
    }
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, to: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Auto => to.write_str("auto"),
            Self::Cpu => to.write_str("cpu"),
            Self::Cuda(ordinal) => write!(to, "cuda:{ordinal}"),
        }
    }
}

/// How the frozen base of adapters is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantization {
    /// As its files have it.
    None,
    /// Matrices of the blocks in 4 bits.
    Nf4,
}

/// Low-rank adapters: they are trained, the model is frozen.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Adapters to begin with, in PEFT's format; they say rank, alpha, rslora and targets. `None`: fresh ones.
    pub init: Option<Source>,
    pub rank: Option<usize>,
    pub alpha: Option<f64>,
    /// Whether alpha is divided by the rank's square root instead of the rank.
    pub rslora: Option<bool>,
    /// Names of the layers that get an adapter.
    pub targets: Option<Vec<String>>,
    /// Of the adapters' inputs.
    pub dropout: f64,
    pub quantize: Quantization,
}

/// The loop: batch sizes, lengths, intervals.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainConfig {
    pub duration: Duration,
    /// T: tokens of a row that are predicted.
    pub sequence_length: usize,
    /// Rows of one forward and backward pass.
    pub micro_batch: usize,
    /// Tokens of one optimizer step.
    pub tokens_per_step: usize,
    /// Bound of the gradient's global norm; `None`: no clip.
    pub grad_clip: Option<f64>,
    pub dtype: DType,
    pub recompute: Recompute,
    pub device: DeviceChoice,
    /// 0: never before the end.
    pub eval_every: u64,
    /// 0: never.
    pub sample_every: u64,
    pub sample_prompt: Option<String>,
    /// 0: only the last checkpoint.
    pub checkpoint_every: u64,
    /// Checkpoints kept; at least 1.
    pub keep_last: usize,
    /// Whether the checkpoint of the lowest validation loss is kept besides.
    pub keep_best: bool,
    /// Held-out examples that are answered at each evaluation; 0: none.
    pub eval_exact_match: usize,
    /// Tokens of such an answer at most.
    pub exact_match_tokens: usize,
    /// Whether TensorBoard's event files are written beside metrics.jsonl.
    pub tensorboard: bool,
}

impl TrainConfig {
    /// Micro-batches of one optimizer step.
    pub fn micro_batches(&self) -> usize {
        self.tokens_per_step / (self.micro_batch * self.sequence_length)
    }
}

impl RunConfig {
    /// Reads `path`, applies the `--set` assignments and resolves everything that the config alone can tell.
    ///
    /// # Errors
    /// When the file cannot be read, a key is unknown, a value has the wrong type or range, or two keys conflict.
    pub fn load(path: &Path, assignments: &[String]) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::flag("--config", format!("cannot read {}: {error}", path.display())))?;
        let name = path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into());
        let base = path.parent().map(Path::to_owned).unwrap_or_default();
        let stem = path.file_stem().map_or_else(|| "run".into(), |stem| stem.to_string_lossy().into_owned());
        Self::from_toml(&text, &name, &stem, &base, assignments)
    }

    /// As [`Self::load`], from text; relative paths start at `base`.
    pub fn from_toml(
        text: &str,
        file_name: &str,
        run_name: &str,
        base: &Path,
        assignments: &[String],
    ) -> Result<Self, ConfigError> {
        let mut settings = Settings::from_toml(text, file_name)?;
        for assignment in assignments {
            settings.set(assignment)?;
        }
        resolve::resolve(settings, run_name, base)
    }

    /// The complete config as TOML: read again, it gives the same run.
    pub fn to_toml(&self) -> String {
        write::to_toml(self)
    }
}

/// `path` from `base`, made absolute without asking the file system for links.
fn absolute(base: &Path, path: &str) -> PathBuf {
    let joined = base.join(path);
    std::path::absolute(&joined).unwrap_or(joined)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMPLETE: &str = r#"
        seed = 3
        model = { arch = "gpt2", n_layer = 2, n_head = 2, n_embd = 8, vocab_size = 300, n_positions = 16 }
        tokenizer.source = "openai-community/gpt2"
        data = { source = "HuggingFaceFW/fineweb-edu", files = "sample/10BT/*.parquet", validation = { files = "x.parquet" } }
        optimizer = { name = "vradam", lr = 6e-4, beta3 = 1 }
        schedule = { name = "wsd", warmup_steps = 0 }
        train = { tokens = 4096, sequence_length = 16, micro_batch = 2, tokens_per_step = 64, grad_clip = 1.0 }
    "#;

    fn load(text: &str, assignments: &[&str]) -> Result<RunConfig, ConfigError> {
        let assignments: Vec<String> = assignments.iter().map(|&a| a.to_owned()).collect();
        RunConfig::from_toml(text, "run.toml", "run", Path::new("/base"), &assignments)
    }

    #[test]
    fn a_resolved_config_read_again_is_the_same_run() -> Result<(), ConfigError> {
        let config = load(COMPLETE, &[])?;
        assert_eq!(config.train.micro_batches(), 2);
        let again = load(&config.to_toml(), &[])?;
        assert_eq!(changed_mathematics(&config, &again), []);
        assert_eq!(config.train, again.train);
        Ok(())
    }

    #[test]
    fn conflicts_and_bad_values_are_named() {
        let message = |assignments: &[&str]| load(COMPLETE, assignments).expect_err("wrong config").to_string();
        assert!(message(&["train.steps=5", "train.tokens=9"]).contains("`train.tokens` conflicts with `train.steps`"));
        assert!(message(&["train.tokens_per_step=63"]).contains("must be a multiple"));
        assert!(message(&["model.n_head=3"]).contains("must be a multiple of `model.n_head` = 3"));
        assert!(message(&["model.init=a/b"]).contains("conflicts with `model.init`"));
        assert!(message(&["schedule.name=cosin"]).contains("did you mean \"cosine\""));
        assert!(message(&["data.source='/no/such/file.bin'"]).contains("there is no file or folder /no/such/file.bin"));
        assert!(message(&["train.micro_batch=0"]).contains("at least 1"));
        assert!(message(&["model.dropout=1.5"]).contains("between 0 and 0.99"));
        assert!(message(&["train.device=gpu"]).contains("cuda:N"));
    }

    #[test]
    fn a_length_on_the_command_line_stands_in_place_of_the_files_in_another_unit() -> Result<(), ConfigError> {
        assert!(matches!(load(COMPLETE, &[])?.train.duration, Duration::Tokens(_)));
        assert_eq!(load(COMPLETE, &["train.steps=5"])?.train.duration, Duration::Steps(5));
        assert_eq!(load(COMPLETE, &["train.epochs=2"])?.train.duration, Duration::Epochs(2.0));
        let twice = COMPLETE.replace("tokens = 4096,", "tokens = 4096, steps = 5,");
        assert!(load(&twice, &[]).expect_err("two lengths in the file").to_string().contains("conflicts"));
        Ok(())
    }

    #[test]
    fn an_architecture_takes_its_own_keys_only() -> Result<(), ConfigError> {
        let llama = ["model.arch=llama", "model.n_kv_head=1", "model.rope_theta=5e5", "model.rms_norm_epsilon=1e-6"];
        let config = load(COMPLETE, &llama)?;
        assert_eq!((config.model.n_kv_head, config.model.rope_theta), (Some(1), Some(5e5)));
        let again = load(&config.to_toml(), &[])?;
        assert_eq!(changed_mathematics(&config, &again), []);
        let message = |assignments: &[&str]| load(COMPLETE, assignments).expect_err("wrong config").to_string();
        assert!(
            message(&["model.n_kv_head=1"]).contains("`model.n_kv_head` has no meaning for `model.arch` = \"gpt2\"")
        );
        assert!(message(&["model.rope_theta=1e4"]).contains("rope_theta"));
        assert!(message(&["model.arch=llama", "model.layer_norm_epsilon=1e-5"]).contains("layer_norm_epsilon"));
        assert!(message(&["model.arch=llama", "model.n_head=4", "model.n_kv_head=3"]).contains("n_kv_head"));
        assert!(message(&["model.arch=llama", "model.n_head=8"]).contains("even"));
        assert!(message(&["model.arch=lama"]).contains("did you mean \"llama\""));
        Ok(())
    }

    #[test]
    fn only_lengths_and_intervals_may_change_on_resume() -> Result<(), ConfigError> {
        let old = load(COMPLETE, &[])?;
        assert_eq!(changed_mathematics(&old, &load(COMPLETE, &["train.tokens=9999999", "train.keep_last=9"])?), []);
        let changed = changed_mathematics(&old, &load(COMPLETE, &["optimizer.lr=1e-3"])?);
        assert_eq!(changed.len(), 1);
        assert_eq!(changed[0].0, "optimizer.lr");
        Ok(())
    }
}
