//! A file of JSON lines in step order, cut back to the checkpoint on resume.

use super::checkpoint::replace_file;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// An open journal; each line is an object with a whole number `step`.
pub struct Journal {
    path: PathBuf,
    file: File,
    last: Option<String>,
}

#[derive(Deserialize)]
struct Stamp {
    step: u64,
}

impl Journal {
    /// Opens the journal of a run that has done `step` steps: lines of later steps are cut off, and a line torn by a
    /// crash goes with them.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let mut last = None;
        if path.exists() {
            let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            let kept = kept_prefix(&text, step);
            if kept < text.len() {
                replace_file(path, &text[..kept])?;
            }
            last = String::from_utf8_lossy(&text[..kept]).lines().next_back().map(str::to_owned);
        }
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { path: path.to_owned(), file, last })
    }

    /// As [`Self::open`], of a journal that has a line for every step up to `step` (the last one may still be owed): a
    /// journal that was damaged or taken away is gone on with, but not in silence.
    pub fn open_complete(path: &Path, step: u64) -> Result<Self> {
        let journal = Self::open(path, step)?;
        let last =
            journal.last().and_then(|line| serde_json::from_str::<Stamp>(line).ok()).map_or(0, |stamp| stamp.step);
        if last + 1 < step {
            tracing::warn!(
                "{}: nothing is left of steps {} to {step}, which the run has made",
                path.display(),
                last + 1
            );
        }
        Ok(journal)
    }

    /// The last line that was kept.
    pub fn last(&self) -> Option<&str> {
        self.last.as_deref()
    }

    /// Appends one object as one write.
    pub fn append(&mut self, object: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(object)?;
        line.push(b'\n');
        self.file.write_all(&line).with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Makes what was appended survive a power cut.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// Length of the leading whole lines whose steps are at most `step`.
fn kept_prefix(text: &[u8], step: u64) -> usize {
    let mut kept = 0;
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        let whole = line.ends_with(b"\n");
        match serde_json::from_slice::<Stamp>(line) {
            Ok(stamp) if whole && stamp.step <= step => kept += line.len(),
            _ => break,
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::metrics::{Record, read};

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
            ..Record::default()
        }
    }

    #[test]
    fn reopening_cuts_back_to_the_step_and_drops_a_torn_line() -> Result<()> {
        let run = tempfile::tempdir()?;
        let path = run.path().join("metrics.jsonl");
        let mut metrics = Journal::open(&path, 0)?;
        (1..=5).try_for_each(|step| metrics.append(&record(step)))?;
        metrics.file.write_all(br#"{"step":6,"tok"#)?;
        drop(metrics);
        let mut metrics = Journal::open(&path, 3)?;
        assert!(metrics.last().is_some_and(|line| line.starts_with(r#"{"step":3,"#)));
        metrics.append(&record(4))?;
        let read = read(run.path())?;
        assert_eq!(read, (1..=4).map(record).collect::<Vec<_>>());
        Ok(())
    }
}
