//! `metrics.jsonl`: one JSON object a step, steps counted from 1: what the mathematics gave.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What one step measured. Floats keep full precision.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
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
    /// Share of held-out problems answered right after this step, where they were asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exact_match: Option<f64>,
    /// First 16 digits of the SHA-256 of this step's batch: runs with equal ones saw the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<String>,
    /// Small tasks: the share of validation images classified rightly, and the L1 distance of a learned distribution.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val_accuracy: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val_distance: Option<f64>,
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
