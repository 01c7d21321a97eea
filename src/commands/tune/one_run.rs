//! What `tune lr` and `tune gate` share: a folder with a single run, made or taken up, and the keys that they set themselves.

use crate::commands::Ending;
use crate::commands::study_base::{Base, absolute};
use crate::commands::workers::Job;
use crate::config::{ConfigError, Settings};
use crate::train::checkpoint::replace_file;
use crate::train::is_run;
use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Refuses what `--set` gives and the command sets itself; `own` are the keys, each with what to do instead.
pub(super) fn refuse_own_keys(assignments: &[String], own: &[(&str, &str)]) -> Result<(), ConfigError> {
    for assignment in assignments {
        let mut given = Settings::default();
        given.set(assignment)?;
        for key in given.keys() {
            if let Some((_, instead)) = own.iter().find(|(name, _)| *name == key) {
                let message = format!("this command sets `{key}` itself: leave it out; {instead}");
                return Err(ConfigError::flag(&format!("--set {assignment}"), message));
            }
        }
    }
    Ok(())
}

/// Says that the run is saved.
pub(super) fn interrupted() -> Ending {
    eprintln!("interrupted: the same command goes on where the run was left");
    Ending::Interrupted
}

/// What was asked for, in a study's folder.
const REQUEST: &str = "request.json";
/// What came of it; a folder that has it is finished.
const RESULT: &str = "result.json";

/// The folder of a command that makes a single run and reads it.
pub(super) struct OneRun {
    pub folder: PathBuf,
    pub job: Job,
}

impl OneRun {
    /// Makes the folder, or takes up the unfinished run that the same command has left in it.
    ///
    /// # Errors
    /// When the folder holds something else, a finished study, or another one's run.
    pub fn open(out: &Path, command: &str, base: &Base, assignments: &[String]) -> Result<Self> {
        let folder = absolute(out);
        let (config, run) = (folder.join("base.toml"), folder.join("run"));
        let request = json!({"command": command, "config": base.text, "set": assignments});
        let refuse = |why: String| ConfigError::flag("--out", format!("{} {why}: give another", folder.display()));
        let path = folder.join(REQUEST);
        match std::fs::read_to_string(&path) {
            Ok(text) => {
                let found: Value = serde_json::from_str(&text).unwrap_or_default();
                if folder.join(RESULT).exists() {
                    let name = found["command"].as_str().unwrap_or("study");
                    return Err(refuse(format!("holds the result of a finished `{name}`")).into());
                }
                // A request whose run was refused before it began stands in nobody's way.
                if found != request && is_run(&run) {
                    return Err(refuse("holds the unfinished run of another config or of other flags".into()).into());
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                match std::fs::read_dir(&folder) {
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) => return Err(refuse(format!("cannot be used ({error})")).into()),
                    Ok(mut entries) => {
                        // A process that was killed at its very beginning leaves no more than a temporary file.
                        let own = |name: &str| name.starts_with(".tmp");
                        if entries.any(|entry| !entry.is_ok_and(|entry| own(&entry.file_name().to_string_lossy()))) {
                            return Err(refuse("exists and is not empty".into()).into());
                        }
                    }
                }
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        replace_file(&path, &serde_json::to_vec_pretty(&request)?)?;
        base.write(&config)?;
        Ok(Self { job: base.job(command, &config, &run, assignments), folder })
    }

    /// The error of a run that failed otherwise than by divergence.
    pub fn failure(&self, why: &str) -> anyhow::Error {
        anyhow!(
            "the run failed: {why} (its whole output: {}); the same command goes on where it was left",
            self.job.log.display()
        )
    }

    /// Keeps the result.
    pub fn finish(&self, result: &Value) -> Result<()> {
        replace_file(&self.folder.join(RESULT), &serde_json::to_vec_pretty(result)?)
    }
}
