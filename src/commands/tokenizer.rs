//! `vrtrain lab tokenizer`: a byte-level BPE trained on one's own texts, for small studies that need no 50,257 tokens.

use super::Ending;
use super::setup::{LazyHub, refuse_idle_column, refuse_idle_globs, source_files};
use crate::config::{ConfigError, Source};
use crate::data::DataSet;
use crate::quickstart::tokenizer::{TokenizerError, save, train_with};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub data: String,
    pub files: Vec<String>,
    pub text_column: String,
    pub vocabulary: usize,
    pub out: PathBuf,
}

/// The 256 bytes and end of text.
const SMALLEST: usize = 257;

/// Trains and writes the tokenizer's files.
pub fn run(options: &Options) -> Result<Ending> {
    let Options { data, files, text_column, vocabulary, out } = options;
    if !(SMALLEST..=1_000_000).contains(vocabulary) {
        let message =
            format!("{vocabulary} tokens cannot be: it takes {SMALLEST} (every byte and end of text) or more");
        return Err(ConfigError::flag("--vocabulary", message).into());
    }
    let refuse = |flag: &str, message: String| Err(ConfigError::flag(flag, message).into());
    let free = match std::fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_none(),
        Err(_) => !out.exists(),
    };
    if !free {
        return refuse("--out", format!("{} exists and is not an empty folder: give another", out.display()));
    }
    let source = Source::parse(data, Path::new(""));
    refuse_idle_globs(&source, files)?;
    let found = source_files(&[source], files, &LazyHub::default(), "--data")?;
    refuse_idle_column(&found, text_column, "--text-column")?;
    let texts = DataSet::open(found, text_column)?.texts()?;
    let trained = train_with(*vocabulary, texts.iter().map(String::as_str)).map_err(|error| match error {
        TokenizerError::SmallSample { found, .. } => ConfigError::flag(
            "--vocabulary",
            format!("the texts give {found} tokens only, {vocabulary} are asked for: ask for fewer or give more text"),
        )
        .into(),
        other => anyhow::Error::from(other),
    })?;
    std::fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    save(&trained, out, usize::MAX >> 12)?;
    let bytes: usize = texts.iter().map(String::len).sum();
    eprintln!("{vocabulary} tokens from {} texts of {bytes} bytes: {}", texts.len(), out.display());
    Ok(Ending::Done)
}
