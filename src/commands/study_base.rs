//! What `compare` and `tune` begin with: a config or a preset, which command runs it, and variants of it as files.

use super::workers::Job;
use crate::config::{ConfigError, RunConfig, Settings, TaskRunConfig, with_optimizer};
use crate::train::RunFolder;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A task that has a config of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preset {
    pub name: &'static str,
    file: &'static str,
    text: &'static str,
}

/// Every preset.
pub const PRESETS: &[Preset] = &[
    preset("wikitext2", "wikitext2.toml", include_str!("../../configs/lab/wikitext2.toml")),
    preset("cifar10-resnet32", "cifar10-resnet32.toml", include_str!("../../configs/lab/cifar10-resnet32.toml")),
    preset("cifar10-cnn", "cifar10-cnn.toml", include_str!("../../configs/lab/cifar10-cnn.toml")),
    preset("gridworld", "gridworld.toml", include_str!("../../configs/lab/gridworld.toml")),
    preset("gpt2", "gpt2-124m.toml", include_str!("../../configs/gpt2-124m.toml")),
    preset("gsm8k", "gpt2-large-gsm8k.toml", include_str!("../../configs/gpt2-large-gsm8k.toml")),
    preset("oasst2", "llama-7b-oasst2-qlora.toml", include_str!("../../configs/llama-7b-oasst2-qlora.toml")),
];

const fn preset(name: &'static str, file: &'static str, text: &'static str) -> Preset {
    Preset { name, file, text }
}

/// Which command runs a config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Runner {
    Pretrain,
    Finetune,
    Task,
}

/// A resolved config that variants are made of.
#[derive(Clone, Debug)]
pub struct Base {
    pub name: String,
    /// The resolved config: complete, paths absolute.
    pub text: String,
    runner: Runner,
    /// What the command line sets in `[optimizer]`: it holds for every optimizer that the config is given.
    optimizer_assignments: Vec<String>,
    /// What [`Self::check`] found to have no effect.
    pub warnings: Vec<String>,
}

impl Base {
    /// Resolves a config file.
    pub fn load(path: &Path, assignments: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::flag("--config", format!("cannot read {}: {error}", path.display())))?;
        let file = path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into());
        let stem = path.file_stem().map_or_else(|| "run".into(), |stem| stem.to_string_lossy().into_owned());
        Self::resolve(&text, &file, &stem, path.parent().unwrap_or(Path::new("")), assignments)
    }

    /// Resolves a preset; its relative paths start at the working directory.
    ///
    /// # Errors
    /// For an unknown name: the message lists the presets.
    pub fn preset(name: &str, assignments: &[String]) -> Result<Self> {
        let Some(preset) = PRESETS.iter().find(|preset| preset.name == name) else {
            let names: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
            return Err(ConfigError::flag(
                "--task",
                format!("no task is named {name:?}; it is one of {}", names.join(", ")),
            )
            .into());
        };
        Self::resolve(preset.text, preset.file, preset.name, Path::new(""), assignments)
    }

    fn resolve(text: &str, file: &str, name: &str, folder: &Path, assignments: &[String]) -> Result<Self> {
        let mut settings = Settings::from_toml(text, file)?;
        for assignment in assignments {
            settings.set(assignment)?;
        }
        let (runner, text) = if settings.is_set("task.name") {
            let config = TaskRunConfig::from_settings(settings, name, folder)?;
            (Runner::Task, config.to_toml())
        } else {
            let runner = if settings.is_set("data.format") { Runner::Finetune } else { Runner::Pretrain };
            (runner, RunConfig::from_toml(text, file, name, folder, assignments)?.to_toml())
        };
        let of_optimizer = |text: &&String| {
            let key = text.split('=').next().unwrap_or_default().trim();
            key == "optimizer" || key.starts_with("optimizer.") && key != "optimizer.name"
        };
        let optimizer_assignments = assignments.iter().filter(of_optimizer).cloned().collect();
        Ok(Self { name: name.to_owned(), text, runner, optimizer_assignments, warnings: Vec::new() })
    }

    /// The number that the resolved config gives `key`, if it is there.
    pub fn number(&self, key: &str) -> Option<f64> {
        let table: toml::Table = self.text.parse().ok()?;
        let mut value = &toml::Value::Table(table);
        for word in key.split('.') {
            value = value.get(word)?;
        }
        value.as_float().or_else(|| value.as_integer().map(|whole| whole as f64))
    }

    pub fn optimizer(&self) -> Option<String> {
        let table: toml::Table = self.text.parse().ok()?;
        Some(table.get("optimizer")?.get("name")?.as_str()?.to_owned())
    }

    /// The same config with another optimizer, whose keys are its defaults and what the command line sets; the config's
    /// own keeps its keys.
    pub fn with_optimizer(&self, name: &str) -> Result<Self> {
        if self.optimizer().as_deref() == Some(name) {
            return Ok(self.clone());
        }
        let text = with_optimizer(&self.text, name, &[])?.to_string();
        if self.optimizer_assignments.is_empty() {
            return Ok(Self { text, ..self.clone() });
        }
        Self::resolve(&text, &self.name, &self.name, Path::new(""), &self.optimizer_assignments)
    }

    /// The config with `assignments`, checked as far as it tells by itself: a study must not find out in the middle.
    pub fn check(&self, assignments: &[String]) -> Result<Self> {
        let mut settings = Settings::from_toml(&self.text, &self.name)?;
        for assignment in assignments {
            settings.set(assignment)?;
        }
        let (text, mut optimizer) = if self.runner == Runner::Task {
            let config = TaskRunConfig::from_settings(settings.clone(), &self.name, Path::new(""))?;
            super::task::refuse_unfit_optimizer(&config, &settings)?;
            (config.to_toml(), config.optimizer)
        } else {
            let config = RunConfig::from_toml(&self.text, &self.name, &self.name, Path::new(""), assignments)?;
            if config.data.validation.is_none() {
                let message = "the config has no validation data, and studies go by the validation loss: set \
                               data.validation.files or data.validation.source";
                return Err(ConfigError::flag("[data]", message).into());
            }
            (config.to_toml(), config.optimizer)
        };
        let (_, warnings) = super::prepare::optimizer_of(&mut optimizer, &settings)?;
        Ok(Self { text, warnings, ..self.clone() })
    }

    /// A run of the config at `config` (this one's text, or of the same kind) in the folder `run`; it goes on where it
    /// was left.
    pub fn job(&self, label: &str, config: &Path, run: &Path, assignments: &[String]) -> Job {
        let words: &[&str] = match self.runner {
            Runner::Pretrain => &["pretrain"],
            Runner::Finetune => &["finetune"],
            Runner::Task => &["lab", "train"],
        };
        let mut arguments: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        for (flag, path) in [("--config", config), ("--run-dir", run)] {
            arguments.extend([flag.to_owned(), path.to_string_lossy().into_owned()]);
        }
        arguments.extend(["--resume".to_owned(), "--quiet".to_owned()]);
        arguments.extend(assignments.iter().flat_map(|assignment| ["--set".to_owned(), assignment.clone()]));
        Job { label: label.to_owned(), arguments, run: run.to_owned(), log: beside(run, ".log") }
    }

    /// Writes the config for `job` to read.
    pub fn write(&self, path: &Path) -> Result<()> {
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        crate::train::checkpoint::replace_file(path, self.text.as_bytes())
    }
}

/// The file beside a run's folder that has its name and `suffix`. The name may have dots of its own.
pub fn beside(run: &Path, suffix: &str) -> PathBuf {
    let mut path = run.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// Takes the folder of a study for this process alone, which must be empty or hold the study's own file `head`.
pub fn take_folder(out: &Path, head: &str, what: &str) -> Result<RunFolder> {
    let names: Vec<String> = match std::fs::read_dir(out) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<std::io::Result<_>>()
            .with_context(|| format!("cannot list {}", out.display()))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| format!("cannot use {}", out.display())),
    };
    // What a process leaves that is killed before it has written the head.
    let is_left = |name: &String| name == ".lock" || name.starts_with(".tmp");
    if !names.iter().any(|name| name == head) && !names.iter().all(is_left) {
        let message = format!("{} is not empty and holds no {what} ({head}): give another folder", out.display());
        return Err(ConfigError::flag("--out", message).into());
    }
    RunFolder::open(out)
}

/// Refuses assignments of `seed`, which `why` says how to give.
pub fn refuse_seed(flag: &str, assignments: &[String], why: &str) -> Result<(), ConfigError> {
    for assignment in assignments {
        let mut settings = Settings::default();
        settings.set(assignment)?;
        if settings.is_set("seed") {
            return Err(ConfigError::flag(flag, format!("{assignment}: {why}")));
        }
    }
    Ok(())
}

/// Every key of a resolved config with its value.
pub fn keys_of(text: &str) -> Result<BTreeMap<String, String>> {
    let mut keys = BTreeMap::new();
    let mut sections = vec![(String::new(), text.parse::<toml::Table>()?)];
    while let Some((prefix, table)) = sections.pop() {
        for (key, value) in table {
            let key = format!("{prefix}{key}");
            match value {
                toml::Value::Table(inner) => sections.push((key + ".", inner)),
                value => drop(keys.insert(key, value.to_string())),
            }
        }
    }
    Ok(keys)
}

/// `--out`, made absolute: runs have working directories of their own.
pub fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
