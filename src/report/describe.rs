//! What a run is, besides its numbers: name, state, config, samples.

use super::find::Found;
use super::state::{State, state};
use crate::train::{Phase, Sample, Status, read_samples};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::path::Path;

/// What is known about a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    /// The path as it was given; it tells runs apart.
    pub id: String,
    pub name: String,
    pub state: State,
    /// The run's last step, where it is known.
    pub steps: Option<u64>,
    /// Why it failed.
    pub error: Option<String>,
    /// The resolved config by full key, as TOML values, in the order of the file.
    pub config: Vec<(String, String)>,
    pub samples: Vec<Sample>,
}

/// Samples beyond this are passed over evenly.
const MOST_SAMPLES: usize = 200;

impl Description {
    pub fn read(found: &Found) -> Result<Self> {
        let path = &found.path;
        let status = Status::read(path)?;
        let config = config_entries(path)?;
        let error = match status.as_ref().map(|status| &status.phase) {
            Some(Phase::Failed { error }) => Some(error.clone()),
            _ => None,
        };
        let steps = status.as_ref().map(|status| status.steps).or_else(|| steps_of(&config));
        let all = read_samples(path)?;
        let every = all.len().div_ceil(MOST_SAMPLES).max(1);
        let count = all.len();
        // Counted from the end, so that the newest one stays.
        let kept = all.into_iter().enumerate().filter(|(index, _)| (count - 1 - index).is_multiple_of(every));
        Ok(Self {
            id: path.display().to_string(),
            name: found.name.clone(),
            state: state(path, status.as_ref(), steps),
            steps,
            error,
            config,
            samples: kept.map(|(_, sample)| sample).collect(),
        })
    }

    pub fn to_json(&self) -> Value {
        let config: serde_json::Map<String, Value> =
            self.config.iter().map(|(key, value)| (key.clone(), Value::String(value.clone()))).collect();
        json!({
            "id": self.id, "name": self.name, "state": self.state.word(), "steps": self.steps, "error": self.error,
            "config": config, "samples": self.samples,
        })
    }
}

/// `train.steps` of a config.
fn steps_of(config: &[(String, String)]) -> Option<u64> {
    config.iter().find(|(key, _)| key == "train.steps").and_then(|(_, value)| value.parse().ok())
}

/// The keys and values of a run's config.toml.
pub fn config_entries(run: &Path) -> Result<Vec<(String, String)>> {
    let path = run.join("config.toml");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let table: toml::Table = text.parse().with_context(|| format!("{} is not valid TOML", path.display()))?;
    let mut entries = Vec::new();
    flatten("", &table, &mut entries);
    Ok(entries)
}

fn flatten(prefix: &str, table: &toml::Table, out: &mut Vec<(String, String)>) {
    for (key, value) in table {
        let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            toml::Value::Table(inner) => flatten(&key, inner, out),
            toml::Value::String(text) => out.push((key, text.clone())),
            other => out.push((key, other.to_string())),
        }
    }
}

/// The keys in which runs differ, with the value of each run, `None` where it has none.
pub fn differences(runs: &[&Description]) -> Vec<(String, Vec<Option<String>>)> {
    let mut keys: Vec<&String> = Vec::new();
    for (key, _) in runs.iter().flat_map(|run| &run.config) {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    let value = |run: &Description, key: &str| run.config.iter().find(|(own, _)| own == key).map(|(_, v)| v.clone());
    let rows = keys.into_iter().map(|key| (key.clone(), runs.iter().map(|run| value(run, key)).collect::<Vec<_>>()));
    rows.filter(|(_, values)| values.iter().any(|value| *value != values[0])).collect()
}
