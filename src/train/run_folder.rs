//! The run folder: where it is, whether it may be used, and the lock that keeps two processes out of one run.

use super::checkpoint::replace_file;
use crate::params::{ParameterStore, on_cpu};
use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// What a run folder may hold before its config is written.
const OWN_FIRST_FILES: &[&str] = &[".lock", "model"];

/// A run folder that this process holds.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    /// Held for the life of the run; the operating system releases it however the process ends.
    _lock: File,
}

/// Whether a run begins or goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    Fresh,
    Resume,
}

impl RunFolder {
    /// Refuses a path that a fresh run may not take, before anything is made.
    pub fn check_fresh(path: &Path) -> Result<()> {
        if is_run(path) {
            bail!("{} is a run already: continue it with --resume, or give another --run-dir", path.display());
        }
        let occupied = match fs::read_dir(path) {
            Ok(entries) => {
                let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
                let names: std::io::Result<Vec<String>> = names.collect();
                let names = names.with_context(|| format!("cannot list {}", path.display()))?;
                // A run that was killed before it had a config is none, and may begin again.
                names.iter().any(|name| !OWN_FIRST_FILES.contains(&name.as_str()) && !name.starts_with(".tmp"))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
            Err(error) => return Err(error).with_context(|| format!("cannot use {} as a run folder", path.display())),
        };
        if occupied {
            bail!("{} exists and is not empty: give another --run-dir", path.display());
        }
        Ok(())
    }

    /// Creates (or opens) and locks the folder.
    pub fn open(path: &Path) -> Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("cannot create the run folder {}", path.display()))?;
        let lock_path = path.join(".lock");
        let lock = File::options().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.with_context(|| format!("cannot write into the run folder {}", path.display()))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(fs::TryLockError::WouldBlock) => bail!("{} is in use by another vrtrain", path.display()),
            Err(fs::TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("cannot lock {}", lock_path.display()))
            }
        }
    }

    /// Whether a process holds the run at `path` now.
    pub fn is_in_use(path: &Path) -> bool {
        let lock = File::options().write(true).open(path.join(".lock"));
        lock.is_ok_and(|lock| matches!(lock.try_lock(), Err(fs::TryLockError::WouldBlock)))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the resolved config.
    pub fn write_config(&self, text: &str) -> Result<()> {
        replace_file(&self.path.join("config.toml"), text.as_bytes())
    }

    /// Writes down the hash of the weights that the run begins with, so that runs can be known to begin alike.
    pub fn write_initial_hash(&self, weights: &ParameterStore) -> Result<()> {
        let digest = on_cpu(weights.weights(), |weights| Sha256::digest(bytemuck::cast_slice::<f32, u8>(weights)))?;
        let hash: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        replace_file(&self.path.join("initial.sha256"), format!("{hash}\n").as_bytes())
    }
}

/// Whether `path` holds a run.
pub fn is_run(path: &Path) -> bool {
    path.join("config.toml").is_file()
}

/// The first free `runs/<name>-N` below `base`.
pub fn fresh_path(base: &Path, name: &str) -> PathBuf {
    let mut number = 1u64;
    loop {
        let path = base.join("runs").join(format!("{name}-{number}"));
        if !path.exists() {
            return path;
        }
        number += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_in_use_or_with_other_things_in_it_is_refused() -> Result<()> {
        let base = tempfile::tempdir()?;
        let path = fresh_path(base.path(), "demo");
        assert!(path.ends_with("runs/demo-1"));
        RunFolder::check_fresh(&path)?;
        assert!(!RunFolder::is_in_use(&path));
        let run = RunFolder::open(&path)?;
        assert!(RunFolder::is_in_use(&path));
        assert!(RunFolder::open(&path).unwrap_err().to_string().contains("in use"));
        RunFolder::check_fresh(&path)?;
        fs::write(path.join("thesis.txt"), "mine")?;
        assert!(RunFolder::check_fresh(&path).unwrap_err().to_string().contains("not empty"));
        run.write_config("seed = 1\n")?;
        assert!(RunFolder::check_fresh(&path).unwrap_err().to_string().contains("--resume"));
        drop(run);
        assert!(!RunFolder::is_in_use(&path));
        RunFolder::open(&path)?;
        assert!(fresh_path(base.path(), "demo").ends_with("runs/demo-2"));
        Ok(())
    }
}
