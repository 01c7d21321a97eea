//! The subcommands, one file each: the only place where data, model, optimizer and loop meet.

mod adapted;
pub mod bench;
pub mod chat;
pub mod compare;
mod device;
pub mod doctor;
pub mod eval;
mod exact_match;
pub mod export;
pub mod finetune;
pub mod generate;
pub mod lab;
pub mod plan;
mod prepare;
pub mod pretrain;
mod quickstart;
pub mod report;
mod run_data;
mod run_length;
pub mod runs;
mod setup;
mod shape;
pub mod sharpness;
mod stop_signal;
mod study_base;
mod target;
pub mod task;
pub mod tokenizer;
pub mod tune;
pub mod watch;
mod workers;

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
    /// Stopped by Ctrl-C while it wrote text, of which there is nothing to save.
    Stopped,
}

pub use stop_signal::EXIT_CODE as STOPPED_EXIT_CODE;

/// Which config a command works on.
#[derive(Clone, Debug, Default)]
pub struct ConfigChoice {
    /// `None`: the embedded quickstart.
    pub file: Option<PathBuf>,
    pub embedded: Embedded,
    pub assignments: Vec<String>,
}

/// Which of the embedded quickstarts runs without a config.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Embedded {
    #[default]
    Pretrain,
    Finetune,
}

impl Embedded {
    /// The config and the name that its runs get.
    fn config(self) -> (&'static str, &'static str) {
        match self {
            Self::Pretrain => (include_str!("../../configs/quickstart.toml"), "quickstart"),
            Self::Finetune => (include_str!("../../configs/quickstart-finetune.toml"), "quickstart-finetune"),
        }
    }
}

impl ConfigChoice {
    /// Reads and resolves the config.
    pub fn load(&self) -> Result<RunConfig, ConfigError> {
        match &self.file {
            Some(path) => RunConfig::load(path, &self.assignments),
            None => {
                let (text, name) = self.embedded.config();
                RunConfig::from_toml(text, "the quickstart", name, Path::new(""), &self.assignments)
            }
        }
    }
}

/// Says on stderr, whatever else is kept quiet, what is asked for and has no effect.
fn warn(warnings: &[String]) {
    warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
}

/// Prints a value as one line of JSON on stdout.
fn print_json(value: &serde_json::Value) -> anyhow::Result<()> {
    use std::io::Write;
    writeln!(std::io::stdout(), "{value}").map_err(|error| anyhow::anyhow!("cannot write to stdout: {error}"))
}
