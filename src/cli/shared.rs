//! Arguments that several commands share.

use crate::commands::{ConfigChoice, Embedded};
use crate::ops::product::Precision;
use clap::Args;
use std::path::PathBuf;

/// Flags that choose a config.
#[derive(Args)]
pub(super) struct ConfigArgs {
    /// The run's config (TOML); left out: the embedded quickstart.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Override one key, e.g. optimizer.beta3=20; may be given several times.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    assignments: Vec<String>,
}

impl ConfigArgs {
    pub fn choice(self) -> ConfigChoice {
        ConfigChoice { file: self.config, embedded: Embedded::Pretrain, assignments: self.assignments }
    }
}

/// Where a run is, whether it goes on, and what it says.
#[derive(Args)]
pub(super) struct RunArgs {
    /// The run folder; left out: a fresh runs/<config name>-N.
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Continue from the newest valid checkpoint of --run-dir.
    #[arg(long)]
    pub resume: bool,
    /// No progress, only errors and warnings.
    #[arg(long)]
    pub quiet: bool,
}

/// How tokens are drawn.
#[derive(Args)]
pub(super) struct SamplingArgs {
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Draw among the k likeliest tokens only.
    #[arg(long)]
    pub top_k: Option<usize>,
    /// Draw among the likeliest tokens whose probabilities reach p.
    #[arg(long, allow_negative_numbers = true)]
    pub top_p: Option<f64>,
}

impl SamplingArgs {
    /// A flag that was given and does nothing, for greedy choice looks at the likeliest token alone.
    pub(super) fn unused(&self) -> Option<&'static str> {
        let given = [("--top-k", self.top_k.is_some()), ("--top-p", self.top_p.is_some())];
        given.into_iter().find(|(_, given)| *given && self.temperature == 0.0).map(|(flag, _)| flag)
    }
}

/// What the products are made in.
#[derive(Args)]
pub(super) struct PrecisionArgs {
    /// f32, or bf16: weights and operands of the products are rounded to bf16, which is quicker.
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16"])]
    dtype: String,
}

impl PrecisionArgs {
    pub fn precision(&self) -> Precision {
        precision(&self.dtype)
    }
}

/// The precision of a word that clap has let through.
pub(super) fn precision(word: &str) -> Precision {
    if word == "bf16" { Precision::Bf16 } else { Precision::F32 }
}

/// A size on the command line.
pub(super) fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(_) => Err("it must be a whole number".into()),
    }
}
