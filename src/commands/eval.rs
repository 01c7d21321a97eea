//! `vrtrain eval`: perplexity of a run or a model on files.

use super::setup::{self, LazyHub};
use super::target::Target;
use super::{Ending, print_json};
use crate::config::{ConfigError, Recompute, Source};
use crate::data::documents_as_ids;
use crate::eval::perplexity;
use crate::model::{Engine, LossSum};
use crate::ops::product::Precision;
use anyhow::{Result, ensure};
use candle_core::Device;
use serde_json::json;
use std::path::Path;

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub target: String,
    /// A file, a folder or a hub data set.
    pub data: String,
    /// Globs that choose files of it.
    pub files: Vec<String>,
    pub text_column: String,
    pub window: Option<usize>,
    pub max_tokens: Option<u64>,
    pub json: bool,
}

/// The largest default window.
const DEFAULT_WINDOW: usize = 2048;

/// Scores the file and prints the result.
pub fn run(options: &Options) -> Result<Ending> {
    let target = Target::open(&options.target)?;
    let context = target.config.n_positions();
    let window = options.window.unwrap_or(context.min(DEFAULT_WINDOW));
    if window == 0 || window > context {
        return Err(
            ConfigError::flag("--window", format!("the window must be between 1 and the context, {context}")).into()
        );
    }
    let source = Source::parse(&options.data, Path::new(""));
    if let Source::Path(path) = &source
        && !path.exists()
    {
        let message = format!("there is no file, folder or hub data set (owner/name) {}", options.data);
        return Err(ConfigError::flag("--data", message).into());
    }
    let tokenizer = target.tokenizer()?;
    let files = setup::source_files(&[source], &options.files, &LazyHub::default(), "--data")?;
    let documents = documents_as_ids(files, &options.text_column, tokenizer.as_ref(), target.config.vocab_size())?;
    let store = target.load()?;
    let mut engine = Engine::new(&target.config, store.layout(), &Device::Cpu, Recompute::None, Precision::F32);
    let (mut total, mut left) = (LossSum::default(), options.max_tokens.unwrap_or(u64::MAX));
    for document in documents {
        let part = perplexity::score(&mut engine, &store, &document?, window, left)?;
        left -= part.count;
        total += part;
        if left == 0 {
            break;
        }
    }
    ensure!(total.count > 0, "{} has no token to score (a text needs at least two)", options.data);
    let nll = total.mean();
    ensure!(nll.is_finite(), "the loss is {nll}: the weights are poisoned");
    if options.json {
        print_json(&json!({ "nll_per_token": nll, "perplexity": nll.exp(), "tokens": total.count }))?;
    } else {
        println!("{:.4} nats per token, perplexity {:.4}, over {} tokens", nll, nll.exp(), total.count);
    }
    Ok(Ending::Done)
}
