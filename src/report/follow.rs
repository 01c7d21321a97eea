//! Following files that a trainer appends to, and cuts back when it resumes.

use super::rows::{Rows, Telemetry};
use anyhow::{Context, Result};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// What has become of a file since the last look: whole lines only.
#[derive(Debug, PartialEq, Eq)]
enum Growth {
    Same,
    Appended(String),
    /// It is not what it was: cut back or replaced. All of its lines.
    Restarted(String),
}

/// A place in a growing file of lines.
struct Tail {
    path: PathBuf,
    offset: u64,
    /// The end of what has been read: if other bytes stand there now, the file was replaced.
    anchor: Vec<u8>,
}

/// Bytes of the anchor: a record's times make it unlike any other.
const ANCHOR: usize = 512;

impl Tail {
    fn new(path: PathBuf) -> Self {
        Self { path, offset: 0, anchor: Vec::new() }
    }

    fn poll(&mut self) -> Result<Growth> {
        self.read().with_context(|| format!("cannot read {}", self.path.display()))
    }

    fn read(&mut self) -> std::io::Result<Growth> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let known = std::mem::take(&mut self.offset) > 0;
                self.anchor.clear();
                return Ok(if known { Growth::Restarted(String::new()) } else { Growth::Same });
            }
            Err(error) => return Err(error),
        };
        let length = file.metadata()?.len();
        let restarted = self.offset > 0 && (length < self.offset || !self.is_anchored(&mut file)?);
        if restarted {
            self.offset = 0;
            self.anchor.clear();
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        bytes.truncate(bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1));
        self.offset += bytes.len() as u64;
        if !bytes.is_empty() {
            self.anchor = bytes[bytes.len().saturating_sub(ANCHOR)..].to_vec();
        }
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Ok(match (restarted, text.is_empty()) {
            (true, _) => Growth::Restarted(text),
            (false, true) => Growth::Same,
            (false, false) => Growth::Appended(text),
        })
    }

    fn is_anchored(&self, file: &mut File) -> std::io::Result<bool> {
        file.seek(SeekFrom::Start(self.offset - self.anchor.len() as u64))?;
        let mut bytes = vec![0; self.anchor.len()];
        file.read_exact(&mut bytes)?;
        Ok(bytes == self.anchor)
    }
}

/// What has become of a run's numbers.
#[derive(Debug, PartialEq)]
pub enum Change {
    None,
    /// Rows that follow those already given.
    More(Rows),
    /// All rows, for the first time or because what was given before no longer holds.
    All(Rows),
}

/// A run whose numbers are followed.
pub struct Follower {
    run: PathBuf,
    metrics: Tail,
    telemetry: Tail,
    telemetry_is: Telemetry,
    pending: Rows,
    given: Given,
}

/// Whether any rows have been given.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Given {
    Nothing,
    Some,
}

impl Follower {
    /// Nothing has been read yet: the first change brings all there is.
    pub fn new(run: &Path) -> Self {
        Self {
            run: run.to_owned(),
            metrics: Tail::new(run.join("metrics.jsonl")),
            telemetry: Tail::new(run.join("telemetry.jsonl")),
            telemetry_is: Telemetry::None,
            pending: Rows::default(),
            given: Given::Nothing,
        }
    }

    /// Looks for news.
    pub fn poll(&mut self) -> Result<Change> {
        // The telemetry first: a trainer writes a step's metrics before its telemetry.
        let (telemetry, metrics) = (self.telemetry.poll()?, self.metrics.poll()?);
        if matches!(telemetry, Growth::Restarted(_)) || matches!(metrics, Growth::Restarted(_)) {
            // Both files are read again from their beginnings, so that neither misses a line.
            *self = Self::new(&self.run);
            return Ok(match self.poll()? {
                Change::None => Change::All(Rows::default()),
                change => change,
            });
        }
        if let Growth::Appended(lines) = metrics {
            for line in lines.lines() {
                self.pending.push(line).with_context(|| format!("{}: not a record", self.metrics.path.display()))?;
            }
        }
        if let Growth::Appended(lines) = telemetry {
            self.telemetry_is = Telemetry::Written;
            for line in lines.lines() {
                let bad = || format!("{}: not a record", self.telemetry.path.display());
                self.pending.complete(line).with_context(bad)?;
            }
        }
        let rows = self.pending.take_complete(self.telemetry_is);
        if rows.is_empty() {
            return Ok(Change::None);
        }
        Ok(match std::mem::replace(&mut self.given, Given::Some) {
            Given::Nothing => Change::All(rows),
            Given::Some => Change::More(rows),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn append(path: &Path, text: &str) -> Result<()> {
        Ok(File::options().create(true).append(true).open(path)?.write_all(text.as_bytes())?)
    }

    fn steps(change: Change) -> (&'static str, Vec<f64>) {
        let of = |rows: Rows| rows.column("step").map(<[f64]>::to_vec).unwrap_or_default();
        match change {
            Change::None => ("none", Vec::new()),
            Change::More(rows) => ("more", of(rows)),
            Change::All(rows) => ("all", of(rows)),
        }
    }

    #[test]
    fn a_run_is_followed_through_growth_torn_lines_and_a_resume_that_cuts_it_back() -> Result<()> {
        let run = tempfile::tempdir()?;
        let (metrics, telemetry) = (run.path().join("metrics.jsonl"), run.path().join("telemetry.jsonl"));
        let mut follower = Follower::new(run.path());
        assert_eq!(steps(follower.poll()?), ("none", vec![]));
        append(&metrics, "{\"step\":1,\"loss\":3.5}\n{\"step\":2,\"lo")?;
        assert_eq!(steps(follower.poll()?), ("all", vec![1.0]));
        append(&metrics, "ss\":3.25}\n")?;
        append(&telemetry, "{\"step\":1,\"time\":7}\n{\"step\":2,\"time\":8}\n")?;
        assert_eq!(steps(follower.poll()?), ("more", vec![2.0]));
        // The telemetry of step 3 is still to come.
        append(&metrics, "{\"step\":3,\"loss\":3.0}\n")?;
        assert_eq!(steps(follower.poll()?), ("none", vec![]));
        append(&telemetry, "{\"step\":3,\"time\":9}\n")?;
        assert_eq!(steps(follower.poll()?), ("more", vec![3.0]));
        // Cut back to step 1, and already as long as before.
        std::fs::write(&metrics, "{\"step\":1,\"loss\":3.5}\n{\"step\":2,\"loss\":2.25}\n{\"step\":3,\"loss\":2.0}\n")?;
        std::fs::write(&telemetry, "{\"step\":1,\"time\":7}\n{\"step\":2,\"time\":18}\n{\"step\":3,\"time\":19}\n")?;
        let Change::All(rows) = follower.poll()? else { anyhow::bail!("the cut was missed") };
        assert_eq!(rows.column("loss"), Some(&[3.5, 2.25, 2.0][..]));
        std::fs::remove_file(&metrics)?;
        assert_eq!(steps(follower.poll()?), ("all", vec![]));
        Ok(())
    }
}
