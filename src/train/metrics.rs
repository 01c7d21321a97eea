//! `metrics.jsonl`: one JSON object a step, steps counted from 1, cut back to the checkpoint on resume.

use super::checkpoint::replace_file;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What one step measured. Floats keep full precision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Steps done, this one included.
    pub step: u64,
    /// Training tokens seen, this step's included.
    pub tokens: u64,
    /// Mean loss of the step's tokens before its update, nats.
    pub loss: f64,
    /// Global norm of the gradient before the clip.
    pub grad_norm: f64,
    /// Scheduled learning rate.
    pub lr: f64,
    /// Learning rate after the gate.
    pub eta: f64,
    /// eta / lr
    pub gate: f64,
    /// ||v||^2 of this step, raw.
    pub velocity_sq: f64,
    pub step_ms: f64,
    pub tokens_per_s: f64,
    /// Validation loss after this step, where one was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val_loss: Option<f64>,
}

/// The open metrics file of a run.
pub struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Opens the file of a run that has done `step` steps: records after that step are cut off, and a line torn by a
    /// crash goes with them.
    pub fn open(run: &Path, step: u64) -> Result<Self> {
        let path = run.join("metrics.jsonl");
        if path.exists() {
            let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let kept = kept_prefix(&text, step);
            if kept < text.len() {
                replace_file(&path, &text[..kept])?;
            }
        }
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { path, file })
    }

    /// Appends one record as one write.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        self.file.write_all(&line).with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Makes what was appended survive a power cut.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// Length of the leading whole lines that are records of steps up to `step`.
fn kept_prefix(text: &[u8], step: u64) -> usize {
    let mut kept = 0;
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        let whole = line.ends_with(b"\n");
        match serde_json::from_slice::<Record>(line) {
            Ok(record) if whole && record.step <= step => kept += line.len(),
            _ => break,
        }
    }
    kept
}

/// Reads all records of a run.
pub fn read(run: &Path) -> Result<Vec<Record>> {
    let path = run.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut records = Vec::new();
    for (number, line) in text.lines().enumerate() {
        match serde_json::from_str(line) {
            Ok(record) => records.push(record),
            Err(error) => bail!("{}:{}: not a record: {error}", path.display(), number + 1),
        }
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> Record {
        Record {
            step,
            tokens: step * 64,
            loss: 0.1 + 0.2,
            grad_norm: 1.0 / 3.0,
            lr: 6e-4,
            eta: 5e-4,
            gate: 5.0 / 6.0,
            velocity_sq: 1e-7,
            step_ms: 12.5,
            tokens_per_s: 5120.0,
            val_loss: (step == 2).then_some(3.25),
        }
    }

    #[test]
    fn reopening_cuts_back_to_the_step_and_drops_a_torn_line() -> Result<()> {
        let run = tempfile::tempdir()?;
        let mut metrics = Metrics::open(run.path(), 0)?;
        (1..=5).try_for_each(|step| metrics.append(&record(step)))?;
        metrics.file.write_all(br#"{"step":6,"tok"#)?;
        drop(metrics);
        let mut metrics = Metrics::open(run.path(), 3)?;
        metrics.append(&record(4))?;
        let read = read(run.path())?;
        assert_eq!(read, (1..=4).map(record).collect::<Vec<_>>());
        Ok(())
    }
}
