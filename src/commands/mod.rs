//! The subcommands, one file each: the only place where data, model, optimizer and loop meet.

mod adapted;
pub mod bench;
mod device;
pub mod doctor;
pub mod eval;
pub mod export;
pub mod generate;
pub mod lab;
pub mod plan;
mod prepare;
pub mod pretrain;
mod quickstart;
mod setup;
mod shape;
mod target;

use crate::config::{ConfigError, RunConfig};
use std::path::{Path, PathBuf};

/// How a command that did not fail ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Done,
    /// It did its work and what it found is bad (`doctor`).
    Failed,
    /// Stopped by a signal, everything saved.
    Interrupted,
}

/// Which config a command works on.
#[derive(Clone, Debug, Default)]
pub struct ConfigChoice {
    /// `None`: the embedded quickstart.
    pub file: Option<PathBuf>,
    pub assignments: Vec<String>,
}

/// The embedded quickstart's config.
const QUICKSTART: &str = include_str!("../../configs/quickstart.toml");

impl ConfigChoice {
    /// Reads and resolves the config.
    pub fn load(&self) -> Result<RunConfig, ConfigError> {
        match &self.file {
            Some(path) => RunConfig::load(path, &self.assignments),
            None => RunConfig::from_toml(QUICKSTART, "the quickstart", "quickstart", Path::new(""), &self.assignments),
        }
    }
}

/// Prints a value as one line of JSON on stdout.
fn print_json(value: &serde_json::Value) -> anyhow::Result<()> {
    use std::io::Write;
    writeln!(std::io::stdout(), "{value}").map_err(|error| anyhow::anyhow!("cannot write to stdout: {error}"))
}
