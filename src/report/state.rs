//! The state of a run, and the line that a list of runs shows of it.

use super::describe::config_entries;
use super::find::Found;
use super::rows::{Rows, whole_lines};
use crate::train::{Liveness, Phase, Status, unix_time};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Running,
    Finished,
    /// Stopped by a signal, everything saved.
    Interrupted,
    /// Ended with an error.
    Failed,
    /// Its process is gone without a word: killed, or the machine went down.
    Dead,
    /// It runs, or ran, on another machine, and has written nothing for a while.
    Silent,
    /// Nothing tells.
    Unknown,
}

/// A run on another machine that has written nothing for so long counts as silent, seconds.
const SILENCE_S: f64 = 600.0;

impl State {
    pub fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Finished => "finished",
            Self::Interrupted => "interrupted",
            Self::Failed => "failed",
            Self::Dead => "dead",
            Self::Silent => "silent",
            Self::Unknown => "unknown",
        }
    }
}

/// The state of the run in a folder; `steps` is its last step, where that is known.
pub fn state(run: &Path, status: Option<&Status>, steps: Option<u64>) -> State {
    let all_done = || newest_checkpoint(run).zip(steps).is_some_and(|(step, steps)| step >= steps);
    let Some(status) = status else { return if all_done() { State::Finished } else { State::Unknown } };
    match &status.phase {
        Phase::Finished => State::Finished,
        Phase::Interrupted => State::Interrupted,
        Phase::Failed { .. } => State::Failed,
        Phase::Running => match status.liveness() {
            Liveness::Alive => State::Running,
            // Ended after its last checkpoint: nothing is missing.
            Liveness::Gone if all_done() => State::Finished,
            Liveness::Gone => State::Dead,
            Liveness::Elsewhere if unix_time() - last_seen(run, Some(status)) < SILENCE_S => State::Running,
            Liveness::Elsewhere => State::Silent,
        },
    }
}

/// The step of the newest checkpoint, as the run's `latest` names it.
fn newest_checkpoint(run: &Path) -> Option<u64> {
    let latest = std::fs::read_to_string(run.join("latest")).ok()?;
    latest.trim().strip_prefix("step-")?.parse().ok()
}

/// When the run last wrote something, seconds since 1970.
fn last_seen(run: &Path, status: Option<&Status>) -> f64 {
    let modified = |name: &str| {
        let modified = std::fs::metadata(run.join(name)).and_then(|metadata| metadata.modified()).ok()?;
        Some(modified.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs_f64())
    };
    let files = ["metrics.jsonl", "telemetry.jsonl", "config.toml"].into_iter().filter_map(modified);
    files.fold(status.map_or(0.0, |status| status.time), f64::max)
}

/// A run in one line.
#[derive(Clone, Debug)]
pub struct Summary {
    pub path: String,
    pub name: String,
    pub state: State,
    pub step: u64,
    pub steps: Option<u64>,
    pub loss: Option<f64>,
    pub val_loss: Option<f64>,
    /// Median over the last steps.
    pub tokens_per_s: Option<f64>,
    /// Seconds since 1970.
    pub last_seen: f64,
    pub error: Option<String>,
}

impl Summary {
    /// Reads the end of a run's metrics, however long they are.
    pub fn read(found: &Found) -> Result<Self> {
        let status = Status::read(&found.path)?;
        let rows = last_rows(&found.path.join("metrics.jsonl"))?;
        let steps = match &status {
            Some(status) => Some(status.steps),
            None => {
                let config = config_entries(&found.path)?;
                let given = config.into_iter().find(|(key, _)| key == "train.steps");
                given.and_then(|(_, value)| value.parse().ok())
            }
        };
        let error = match status.as_ref().map(|status| &status.phase) {
            Some(Phase::Failed { error }) => Some(error.clone()),
            _ => None,
        };
        Ok(Self {
            path: found.path.display().to_string(),
            name: found.name.clone(),
            state: state(&found.path, status.as_ref(), steps),
            step: rows.last("step").unwrap_or(0.0) as u64,
            steps,
            loss: rows.last("loss"),
            val_loss: rows.last("val_loss"),
            tokens_per_s: rows
                .column("tokens_per_s")
                .and_then(|values| median(&values[values.len().saturating_sub(20)..])),
            last_seen: last_seen(&found.path, status.as_ref()),
            error,
        })
    }

    pub fn to_json(&self) -> Value {
        json!({
            "path": self.path, "name": self.name, "state": self.state.word(), "step": self.step, "steps": self.steps,
            "loss": self.loss, "val_loss": self.val_loss, "tokens_per_s": self.tokens_per_s,
            "last_seen": self.last_seen, "error": self.error,
        })
    }
}

/// The middle one of some values; of none there is none.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|value| !value.is_nan()).collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

/// The last rows of a metrics file: as many as it takes to see a validation loss, or all.
fn last_rows(path: &Path) -> Result<Rows> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Rows::default()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let mut window = 64 << 10;
    loop {
        let read = |file: &mut File| -> std::io::Result<(bool, Vec<u8>)> {
            let length = file.metadata()?.len();
            let from = length.saturating_sub(window);
            file.seek(SeekFrom::Start(from))?;
            let mut bytes = Vec::new();
            file.take(length - from).read_to_end(&mut bytes)?;
            Ok((from == 0, bytes))
        };
        let (whole, bytes) = read(&mut file).with_context(|| format!("cannot read {}", path.display()))?;
        let text = String::from_utf8_lossy(&bytes);
        // A window in the middle of the file begins in the middle of a line.
        let text = if whole { &text } else { text.split_once('\n').map_or("", |(_, rest)| rest) };
        let mut rows = Rows::default();
        for line in whole_lines(text) {
            rows.push(line).with_context(|| format!("{}: a line is not a record", path.display()))?;
        }
        if whole || rows.last("val_loss").is_some() {
            return Ok(rows);
        }
        window *= 8;
    }
}
