//! `--task perplexity`: nats a token over windows of the context.

use super::{Options, Progress};
use crate::commands::setup::{self, LazyHub};
use crate::commands::target::Target;
use crate::commands::{Ending, print_json};
use crate::config::{ConfigError, Recompute, Source};
use crate::data::documents_as_ids;
use crate::eval::perplexity::{self, Windows};
use crate::model::{Engine, LossSum};
use crate::ops::product::Precision;
use anyhow::{Result, ensure};
use candle_core::Device;
use serde_json::json;
use std::path::Path;

/// The largest default window.
const DEFAULT_WINDOW: usize = 2048;

/// Scores the files and prints the result.
pub fn run(options: &Options) -> Result<Ending> {
    let target = Target::open(&options.target)?;
    let context = target.config.n_positions();
    let window = options.window.unwrap_or(context.min(DEFAULT_WINDOW));
    if window == 0 || window > context {
        return Err(
            ConfigError::flag("--window", format!("the window must be between 1 and the context, {context}")).into()
        );
    }
    let stride = options.stride.unwrap_or(window);
    if stride == 0 || stride > window {
        let message = format!("the stride must be between 1 and the window, {window}");
        return Err(ConfigError::flag("--stride", message).into());
    }
    let Some(data) = &options.data else {
        return Err(ConfigError::flag("--data", "say what to score: a file, a folder or a hub data set").into());
    };
    let source = Source::parse(data, Path::new(""));
    if let Source::Path(path) = &source
        && !path.exists()
    {
        let message = format!("there is no file, folder or hub data set (owner/name) {data}");
        return Err(ConfigError::flag("--data", message).into());
    }
    setup::refuse_idle_globs(&source, &options.files)?;
    let tokenizer = target.tokenizer()?;
    let files = setup::source_files(&[source], &options.files, &LazyHub::default(), "--data")?;
    let column = options.text_column.as_deref().unwrap_or(setup::DEFAULT_COLUMN);
    setup::refuse_idle_column(&files, column, "--text-column")?;
    let documents = documents_as_ids(files, column, tokenizer.as_ref(), target.config.vocab_size())?;
    let mut store = target.load()?;
    if options.precision == Precision::Bf16 {
        store.keep_rounded()?;
    }
    let mut engine = Engine::new(&target.config, store.layout(), &Device::Cpu, Recompute::None, options.precision);
    let (mut total, mut left) = (LossSum::default(), options.max_tokens.unwrap_or(u64::MAX));
    let windows = Windows { window, stride };
    let mut progress = Progress::start();
    for document in documents {
        let part = perplexity::score(&mut engine, &store, &document?, windows, left)?;
        left -= part.count;
        total += part;
        progress.tell(|_| format!("{} tokens: {:.4} nats a token so far", total.count, total.mean()));
        if left == 0 {
            break;
        }
    }
    ensure!(total.count > 0, "{data} has no token to score (a text needs at least two)");
    let nll = total.mean();
    ensure!(nll.is_finite(), "the loss is {nll}: the weights are poisoned");
    if options.json {
        print_json(&json!({ "nll_per_token": nll, "perplexity": nll.exp(), "tokens": total.count }))?;
    } else {
        println!("{:.4} nats per token, perplexity {:.4}, over {} tokens", nll, nll.exp(), total.count);
    }
    Ok(Ending::Done)
}
