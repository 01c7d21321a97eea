//! One JSON object a problem, in the problems' order, written as soon as all before it are there.

use crate::config::ConfigError;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Where the samples go; without a path nowhere.
pub struct Samples {
    file: Option<(File, PathBuf)>,
    next: usize,
    /// Those whose predecessors are not there yet.
    waiting: BTreeMap<usize, Value>,
}

impl Samples {
    /// A new file.
    ///
    /// # Errors
    /// When it exists already.
    pub fn create(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self { file: None, next: 0, waiting: BTreeMap::new() }) };
        check_is_new(path)?;
        let file = OpenOptions::new().write(true).create_new(true).open(path);
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { file: Some((file, path.to_owned())), next: 0, waiting: BTreeMap::new() })
    }

    /// A file whose first samples are there already; a line that was cut off is cut off for good.
    pub fn go_on(path: &Path, present: &Present) -> Result<Self> {
        let context = || format!("cannot write {}", path.display());
        let mut file = OpenOptions::new().write(true).open(path).with_context(context)?;
        file.set_len(present.bytes).with_context(context)?;
        std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).with_context(context)?;
        Ok(Self { file: Some((file, path.to_owned())), next: present.samples.len(), waiting: BTreeMap::new() })
    }

    pub fn put(&mut self, index: usize, sample: Value) -> Result<()> {
        let Some((file, path)) = &mut self.file else { return Ok(()) };
        self.waiting.insert(index, sample);
        while let Some(sample) = self.waiting.remove(&self.next) {
            writeln!(file, "{sample}").with_context(|| format!("cannot write {}", path.display()))?;
            self.next += 1;
        }
        Ok(())
    }
}

/// Refuses a path that is taken, before any work is done.
pub fn check_is_new(path: &Path) -> Result<(), ConfigError> {
    if path.exists() {
        let message = format!("{} exists: name another file, or give --resume to go on with it", path.display());
        return Err(ConfigError::flag("--samples", message));
    }
    Ok(())
}

/// The samples that a file holds.
pub struct Present {
    pub samples: Vec<Value>,
    /// Length of the whole lines.
    bytes: u64,
}

/// Reads a file of samples. A last line without its line break was cut off: it does not count.
pub fn read(path: &Path) -> Result<Present> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    let mut samples = Vec::new();
    for (index, line) in text[..whole].lines().enumerate() {
        let place = || format!("line {} of {}", index + 1, path.display());
        let sample: Value = serde_json::from_str(line).with_context(|| format!("{} is not JSON", place()))?;
        if sample["index"] != index || !sample["right"].is_boolean() {
            bail!("{} is not the sample of problem {index}: it was not written by --samples", place());
        }
        samples.push(sample);
    }
    Ok(Present { samples, bytes: whole as u64 })
}

/// The SHA-256 of a text, in hexadecimal.
pub fn digest(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}
