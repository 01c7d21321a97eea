//! Configs of the laboratory's small tasks: `[task]` instead of `[model]`, otherwise the keys of every run.

use super::resolve::{choice, data_source, duration, globs, positive, schedule, within};
use super::*;
use toml::{Table, Value};

/// A resolved run of a small task.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskRunConfig {
    /// From which a run folder is named.
    pub name: String,
    pub seed: u64,
    pub task: Task,
    /// Images or walks of a step.
    pub batch: usize,
    pub optimizer: OptimizerSettings,
    pub schedule: ScheduleConfig,
    /// Steps, or (images) epochs.
    pub duration: Duration,
    pub grad_clip: Option<f64>,
    pub eval_every: u64,
    pub checkpoint_every: u64,
    pub keep_last: usize,
    pub sharpness: Option<SharpnessConfig>,
    pub settings: SettingsOrigin,
}

/// A small task.
#[derive(Clone, Debug, PartialEq)]
pub enum Task {
    Images(ImageTask),
    GridWorld(GridTask),
}

/// Classification of CIFAR-10's images.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageTask {
    pub network: ImageNetwork,
    pub objective: ImageObjective,
    /// Shifts by up to 4 pixels, and mirrors half of the images.
    pub augment: bool,
    pub training: DataSource,
    pub training_files: Vec<String>,
    pub validation: DataSource,
    pub validation_files: Vec<String>,
    /// The first images of each set that are used; `None`: all.
    pub examples: Option<usize>,
    pub validation_examples: Option<usize>,
}

/// Which network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageNetwork {
    ResNet32,
    Cnn,
}

/// What is minimised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageObjective {
    CrossEntropy,
    /// Mean over the classes of (logit - one hot)^2.
    SquaredError,
}

/// A GFlowNet on a grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GridTask {
    pub side: usize,
    pub layers: usize,
    pub width: usize,
}

/// Measuring sharpness during training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharpnessConfig {
    /// Steps between measurements.
    pub every: u64,
    /// Training examples (walks) of the loss that is measured.
    pub examples: usize,
    /// Lanczos iterations.
    pub iterations: usize,
}

const IMAGE_KEYS: &[&str] = &["task.loss", "task.augment", "task.examples", "task.validation_examples"];
const GRID_KEYS: &[&str] = &["task.side", "task.layers", "task.width"];
const DATA_KEYS: &[&str] = &["data.source", "data.files", "data.validation.source", "data.validation.files"];

/// Keys that a small task has besides its own.
const COMMON: &[&str] = &[
    "seed",
    "task.name",
    "task.batch",
    "task.sharpness_every",
    "task.sharpness_examples",
    "task.sharpness_iterations",
    "schedule.name",
    "schedule.warmup_steps",
    "schedule.min_lr_ratio",
    "schedule.decay_ratio",
    "schedule.steps",
    "train.steps",
    "train.epochs",
    "train.grad_clip",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_last",
];

impl TaskRunConfig {
    /// Whether the config at `path` is one of a small task.
    pub fn is_task(path: &Path) -> Result<bool, ConfigError> {
        Ok(Settings::from_file(path)?.is_set("task.name"))
    }

    /// Reads `path`, applies the assignments and resolves.
    ///
    /// # Errors
    /// As [`RunConfig::load`].
    pub fn load(path: &Path, assignments: &[String]) -> Result<Self, ConfigError> {
        let mut settings = Settings::from_file(path)?;
        for assignment in assignments {
            settings.set(assignment)?;
        }
        let name = path.file_stem().map_or_else(|| "run".into(), |stem| stem.to_string_lossy().into_owned());
        Self::from_settings(settings, &name, path.parent().unwrap_or(Path::new("")))
    }

    /// As [`Self::load`], from settings; relative paths start at `base`.
    pub fn from_settings(settings: Settings, name: &str, base: &Path) -> Result<Self, ConfigError> {
        resolve(settings, name, base)
    }

    /// The complete config as TOML: read again, it gives the same run.
    pub fn to_toml(&self) -> String {
        write::table(self.entries()).to_string()
    }

    /// The keys in which `new` differs although a resumed run must not change them: (key, old, new).
    pub fn changed_mathematics(&self, new: &Self) -> Vec<(String, String, String)> {
        let free = ["train.steps", "train.epochs", "train.eval_every", "train.checkpoint_every", "train.keep_last"];
        let (old, new) = (self.entries(), new.entries());
        let find = |list: &[(String, Value)], key: &str| {
            list.iter().find(|(name, _)| name == key).map_or("(absent)".to_owned(), |(_, value)| value.to_string())
        };
        let mut keys: Vec<&String> = old.iter().chain(&new).map(|(key, _)| key).collect();
        keys.sort();
        keys.dedup();
        let changed = keys.into_iter().map(|key| (key.clone(), find(&old, key), find(&new, key)));
        changed.filter(|(key, old, new)| old != new && !free.contains(&key.as_str())).collect()
    }

    fn entries(&self) -> Vec<(String, Value)> {
        let mut out: Vec<(String, Value)> = Vec::new();
        let mut put = |key: &str, value: Option<Value>| out.extend(value.map(|value| (key.to_owned(), value)));
        let whole = |number: u64| Some(Value::Integer(number.min(i64::MAX as u64) as i64));
        let size = |number: usize| whole(number as u64);
        let text = |text: &str| Some(Value::String(text.to_owned()));
        put("seed", whole(self.seed));
        put("task.name", text(self.task.word()));
        put("task.batch", size(self.batch));
        match &self.task {
            Task::Images(images) => {
                put("task.loss", text(images.objective.word()));
                put("task.augment", Some(Value::Boolean(images.augment)));
                put("task.examples", images.examples.and_then(size));
                put("task.validation_examples", images.validation_examples.and_then(size));
                put("data.source", Some(write::source(&images.training)));
                put("data.files", write::texts(&images.training_files));
                put("data.validation.source", Some(write::source(&images.validation)));
                put("data.validation.files", write::texts(&images.validation_files));
            }
            Task::GridWorld(grid) => {
                put("task.side", size(grid.side));
                put("task.layers", size(grid.layers));
                put("task.width", size(grid.width));
            }
        }
        if let Some(sharpness) = self.sharpness {
            put("task.sharpness_every", whole(sharpness.every));
            put("task.sharpness_examples", size(sharpness.examples));
            put("task.sharpness_iterations", size(sharpness.iterations));
        }
        put("optimizer.name", text(&self.optimizer.name));
        for (key, value) in &self.optimizer.keys {
            put(&format!("optimizer.{key}"), Some(value.clone()));
        }
        out.extend(write::schedule(&self.schedule));
        let mut put = |key: &str, value: Option<Value>| out.extend(value.map(|value| (key.to_owned(), value)));
        match self.duration {
            Duration::Steps(steps) => put("train.steps", whole(steps)),
            Duration::Tokens(tokens) => put("train.tokens", whole(tokens)),
            Duration::Epochs(epochs) => put("train.epochs", Some(Value::Float(epochs))),
        }
        put("train.grad_clip", self.grad_clip.map(Value::Float));
        put("train.eval_every", whole(self.eval_every));
        put("train.checkpoint_every", whole(self.checkpoint_every));
        put("train.keep_last", size(self.keep_last));
        out
    }
}

impl Task {
    pub fn word(&self) -> &'static str {
        match self {
            Self::Images(ImageTask { network: ImageNetwork::ResNet32, .. }) => "cifar10-resnet32",
            Self::Images(ImageTask { network: ImageNetwork::Cnn, .. }) => "cifar10-cnn",
            Self::GridWorld(_) => "gridworld",
        }
    }
}

impl ImageObjective {
    fn word(self) -> &'static str {
        match self {
            Self::CrossEntropy => "cross_entropy",
            Self::SquaredError => "squared_error",
        }
    }
}

fn resolve(settings: Settings, name: &str, base: &Path) -> Result<TaskRunConfig, ConfigError> {
    let missing = |section: &str, key: &str| ConfigError::flag(section, format!("`{key}` is missing"));
    #[derive(Clone, Copy)]
    enum Kind {
        Images(ImageNetwork),
        Grid,
    }
    let words = [
        ("cifar10-resnet32", Kind::Images(ImageNetwork::ResNet32)),
        ("cifar10-cnn", Kind::Images(ImageNetwork::Cnn)),
        ("gridworld", Kind::Grid),
    ];
    if !settings.is_set("task.name") {
        return Err(missing(name, "task.name"));
    }
    let kind = choice(&settings, "task.name", Kind::Grid, &words)?;
    let own = if matches!(kind, Kind::Grid) { vec![GRID_KEYS] } else { vec![IMAGE_KEYS, DATA_KEYS] };
    for key in settings.keys() {
        let known =
            COMMON.contains(&key) || key.starts_with("optimizer.") || own.iter().any(|keys| keys.contains(&key));
        if !known {
            let task = settings.text("task.name").unwrap_or_default();
            return Err(settings.error(key, format!("`{key}` has no meaning for the task {task:?}; leave it out")));
        }
    }
    let task = match kind {
        Kind::Images(network) => {
            let source = |key: &str| match data_source(&settings, key, base)? {
                None => Err(missing("[data]", key)),
                Some(DataSource::Quickstart) => {
                    Err(settings.error(key, format!("`{key}`: the quickstart has no images")))
                }
                Some(files) => Ok(files),
            };
            let objectives =
                [("cross_entropy", ImageObjective::CrossEntropy), ("squared_error", ImageObjective::SquaredError)];
            let [training, validation] = [source("data.source")?, source("data.validation.source")?];
            Task::Images(ImageTask {
                network,
                objective: choice(&settings, "task.loss", ImageObjective::CrossEntropy, &objectives)?,
                augment: settings.truth("task.augment").unwrap_or(true),
                training_files: globs(&settings, "data.files", "data.source", &training)?,
                training,
                validation_files: globs(&settings, "data.validation.files", "data.validation.source", &validation)?,
                validation,
                examples: positive(&settings, "task.examples")?,
                validation_examples: positive(&settings, "task.validation_examples")?,
            })
        }
        Kind::Grid => {
            let (side, layers, width) = ("task.side", "task.layers", "task.width");
            let grid = GridTask {
                side: positive(&settings, side)?.unwrap_or(8),
                layers: positive(&settings, layers)?.unwrap_or(3),
                width: positive(&settings, width)?.unwrap_or(128),
            };
            for (key, value, low, high) in
                [(side, grid.side, 2, 64), (layers, grid.layers, 1, 16), (width, grid.width, 1, 4096)]
            {
                if !(low..=high).contains(&value) {
                    return Err(settings.error(key, format!("`{key}` must be between {low} and {high}, found {value}")));
                }
            }
            Task::GridWorld(grid)
        }
    };
    let Some(batch) = positive(&settings, "task.batch")? else { return Err(missing("[task]", "task.batch")) };
    let sharpness = match settings.whole("task.sharpness_every").unwrap_or(0) {
        0 => {
            let given =
                ["task.sharpness_examples", "task.sharpness_iterations"].into_iter().find(|key| settings.is_set(key));
            if let Some(key) = given {
                return Err(settings.error(key, format!("`{key}` has no meaning without `task.sharpness_every`")));
            }
            None
        }
        every => Some(SharpnessConfig {
            every,
            examples: positive(&settings, "task.sharpness_examples")?.unwrap_or(64),
            iterations: positive(&settings, "task.sharpness_iterations")?.unwrap_or(20),
        }),
    };
    let duration = duration(&settings)?;
    if let (Duration::Epochs(_), Task::GridWorld(_)) = (duration, &task) {
        return Err(settings.error("train.epochs", "`train.epochs`: walks are drawn, not read; give `train.steps`"));
    }
    let grad_clip = within(&settings, "train.grad_clip", 0.0, 0.0, f64::MAX)?;
    let Some(optimizer_name) = settings.text("optimizer.name") else {
        return Err(missing("[optimizer]", "optimizer.name"));
    };
    Ok(TaskRunConfig {
        name: name.to_owned(),
        seed: settings.whole("seed").unwrap_or(1337),
        task,
        batch,
        optimizer: OptimizerSettings { name: optimizer_name.to_owned(), keys: settings.optimizer_keys() },
        schedule: schedule(&settings)?,
        duration,
        grad_clip: (grad_clip > 0.0).then_some(grad_clip),
        eval_every: settings.whole("train.eval_every").unwrap_or(0),
        checkpoint_every: settings.whole("train.checkpoint_every").unwrap_or(0),
        keep_last: positive(&settings, "train.keep_last")?.unwrap_or(1),
        sharpness,
        settings: SettingsOrigin(settings),
    })
}

/// A config's file with one section replaced and keys set: what `compare` and `tune` make of a base config.
///
/// `text` is a resolved config (its paths are absolute).
///
/// # Errors
/// When `text` is not TOML.
pub fn with_optimizer(text: &str, name: &str, keys: &[(String, Value)]) -> Result<Table, ConfigError> {
    let mut table: Table = text
        .parse()
        .map_err(|error| ConfigError::flag("config", format!("a resolved config does not read back: {error}")))?;
    let mut section = Table::new();
    section.insert("name".into(), Value::String(name.to_owned()));
    section.extend(keys.iter().cloned());
    table.insert("optimizer".into(), Value::Table(section));
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: &str = "seed = 2\n[task]\nname = \"gridworld\"\nbatch = 64\n[optimizer]\nname = \"vradam\"\nlr = 1e-3\n\
                        [train]\nsteps = 10\neval_every = 5\n";

    fn load(text: &str) -> Result<TaskRunConfig, ConfigError> {
        resolve(Settings::from_toml(text, "grid.toml")?, "grid", Path::new("/base"))
    }

    #[test]
    fn a_resolved_task_read_again_is_the_same_run() -> Result<(), ConfigError> {
        let config = load(GRID)?;
        assert_eq!(config.task, Task::GridWorld(GridTask { side: 8, layers: 3, width: 128 }));
        let again = load(&config.to_toml())?;
        assert_eq!(config, again);
        assert_eq!(config.changed_mathematics(&again), []);
        let other = load(&GRID.replace("1e-3", "2e-3").replace("steps = 10", "steps = 20"))?;
        assert_eq!(config.changed_mathematics(&other).len(), 1);
        Ok(())
    }

    #[test]
    fn keys_of_other_tasks_are_refused() {
        let message = |text: String| load(&text).expect_err("wrong config").to_string();
        let with = |line: &str| GRID.replace("batch = 64", &format!("batch = 64\n{line}"));
        assert!(message(with("augment = true")).contains("`task.augment` has no meaning for the task \"gridworld\""));
        assert!(message(with("side = 1")).contains("between 2 and 64"));
        assert!(message(with("sharpness_examples = 4")).contains("without `task.sharpness_every`"));
        assert!(message(GRID.replace("gridworld", "gridwordl")).contains("did you mean \"gridworld\""));
        assert!(message(GRID.replace("gridworld", "cifar10-cnn")).contains("`data.source` is missing"));
        assert!(message(GRID.replace("steps = 10", "epochs = 2")).contains("train.steps"));
        assert!(message(GRID.replace("[train]", "[model]\nn_layer = 2\n[train]")).contains("`model.n_layer`"));
    }

    #[test]
    fn the_optimizer_of_a_config_is_replaced_whole() -> Result<(), Box<dyn std::error::Error>> {
        let keys = [("momentum".to_owned(), Value::Float(0.9))];
        let table = with_optimizer(&load(GRID)?.to_toml(), "sgd", &keys)?;
        let config = load(&table.to_string())?;
        assert_eq!((config.optimizer.name.as_str(), config.optimizer.keys.len()), ("sgd", 1));
        Ok(())
    }
}
