//! The length of a run in steps. `train.epochs` over running text has to know how long a pass is: a run counts the tokens
//! once, by reading and tokenising all of them before it trains, and keeps the number in its folder.

use super::run_data::{RunData, example_stream, stream_settings};
use crate::config::{Duration, RunConfig};
use crate::data::{DataSet, Pass, StreamSettings, TextTokenizer};
use crate::train::checkpoint::replace_file;
use crate::train::{Verbosity, short};
use anyhow::{Context, Result};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// Where a run folder keeps the length of a pass.
const FILE: &str = "pass.json";

/// Data of no more bytes than this are counted where an estimate would do: that takes seconds.
const COUNTED_AT_ONCE: u64 = 16 << 20;

/// How often a long count says how far it is.
const TELL_EVERY: std::time::Duration = std::time::Duration::from_secs(10);

/// How exactly the length of a pass must be known.
#[derive(Clone, Copy, Debug)]
pub enum Counting<'a> {
    /// To the token: the number that `run` keeps, or counted now.
    Exact { run: &'a Path, verbosity: Verbosity },
    /// About, without reading much: for commands that do not train.
    Estimated,
}

/// How long a run is.
pub struct RunLength {
    pub steps: u64,
    /// Where it follows from `train.epochs` over running text.
    pub pass: Option<Pass>,
}

/// The length that the config asks for. Passes end with the last whole step that lies in the last of them.
pub fn run_length(
    config: &RunConfig,
    data: &RunData,
    tokenizer: Option<&TextTokenizer>,
    vocabulary_size: usize,
    counting: Counting<'_>,
) -> Result<RunLength> {
    let train = &config.train;
    let epochs = match train.duration {
        Duration::Steps(steps) => return Ok(RunLength { steps, pass: None }),
        Duration::Tokens(tokens) => {
            return Ok(RunLength { steps: tokens.div_ceil(train.tokens_per_step as u64), pass: None });
        }
        Duration::Epochs(epochs) => epochs,
    };
    let of_passes = |rows: u64| (rows as f64 * epochs).floor() as u64;
    let (rows, pass) = match data {
        RunData::Examples { training, .. } => (example_stream(config, training, None)?.rows_of_epochs(epochs), None),
        RunData::Text { training, .. } => match training.rows(train.sequence_length) {
            Some(rows) => (of_passes(rows), None),
            None => {
                let settings = stream_settings(config, vocabulary_size);
                let pass = pass(training, tokenizer, &settings, counting);
                let pass = pass.context("counting the tokens of a pass over the data for `train.epochs`")?;
                (of_passes(pass.rows()), Some(pass))
            }
        },
    };
    let rows_per_step = (train.tokens_per_step / train.sequence_length) as u64;
    Ok(RunLength { steps: (rows / rows_per_step).max(1), pass })
}

/// Keeps the length of a pass in a run's folder, so that a resumed run need not count again.
pub fn keep(run: &Path, pass: &Pass) -> Result<()> {
    replace_file(&run.join(FILE), &serde_json::to_vec_pretty(pass)?)
}

fn pass(
    data: &Arc<DataSet>,
    tokenizer: Option<&TextTokenizer>,
    settings: &StreamSettings,
    counting: Counting<'_>,
) -> Result<Pass> {
    let bytes = data.summary().read_bytes;
    let verbosity = match counting {
        Counting::Exact { run, verbosity } => {
            if let Some(kept) = kept(run).filter(|pass| pass.is_of(data, tokenizer, settings)) {
                return Ok(kept);
            }
            verbosity
        }
        Counting::Estimated if bytes <= COUNTED_AT_ONCE => Verbosity::Quiet,
        Counting::Estimated => return Pass::estimate(data, tokenizer, settings),
    };
    // Nothing is trained meanwhile, so every core may tokenise.
    let threads = settings.threads.max(rayon::current_num_threads());
    let settings = StreamSettings { threads, ..settings.clone() };
    let says = verbosity == Verbosity::Normal;
    let start = Instant::now();
    if says {
        eprintln!(
            "counting   `train.epochs` needs the tokens of a pass: reading and tokenising {}B once before training",
            short(bytes as f64)
        );
    }
    let mut told_at = start;
    let mut told = |tokens: u64, part: f64| {
        if says && told_at.elapsed() >= TELL_EVERY {
            told_at = Instant::now();
            eprintln!("counting   {} tokens, {:.0}% read", short(tokens as f64), 100.0 * part);
        }
    };
    let pass = Pass::count(data, tokenizer, &settings, &mut told)?;
    if says {
        let seconds = start.elapsed().as_secs_f64();
        eprintln!("counting   a pass has {} tokens, {} rows ({seconds:.1} s)", pass.tokens, pass.rows());
    }
    Ok(pass)
}

/// The number in a run's folder; one that cannot be read is counted anew.
fn kept(run: &Path) -> Option<Pass> {
    serde_json::from_slice(&std::fs::read(run.join(FILE)).ok()?).ok()
}
