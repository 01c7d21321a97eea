//! `vrtrain bench generate`: tokens a second of reading prompts and of writing, on a model's real weights.

use crate::commands::target::Target;
use crate::commands::{Ending, print_json};
use crate::config::ConfigError;
use crate::generate::{Sampler, SamplingOptions};
use crate::model::Prompt;
use crate::ops::linear::FEW_ROWS;
use crate::ops::product::Precision;
use crate::random::{Stream, below, generator};
use anyhow::Result;
use serde_json::json;
use std::time::Instant;

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub target: String,
    pub batch: usize,
    pub prompt_tokens: usize,
    pub new_tokens: usize,
    pub rounds: usize,
    pub precision: Precision,
    pub json: bool,
}

/// Reads random prompts and writes greedily, several times; prints the medians.
pub fn run(options: &Options) -> Result<Ending> {
    let Options { batch, prompt_tokens, new_tokens, rounds, precision, .. } = *options;
    if batch > FEW_ROWS {
        return Err(ConfigError::flag("--batch", format!("it is at most {FEW_ROWS}")).into());
    }
    let target = Target::open(&options.target)?;
    let context = target.config.n_positions();
    if prompt_tokens + new_tokens > context {
        let message = format!("prompt and new tokens are more than the context of {context}");
        return Err(ConfigError::flag("--new-tokens", message).into());
    }
    let (store, mut model) = target.load_decoder(precision)?;
    let vocabulary = target.config.vocab_size();
    let mut random = generator(1, Stream::Generate);
    let prompts: Vec<Vec<u32>> = (0..batch)
        .map(|_| (0..prompt_tokens).map(|_| below(&mut random, vocabulary as u64) as u32).collect())
        .collect();
    let read = prompts.iter().enumerate().map(|(sequence, tokens)| Prompt { sequence, tokens });
    let read: Vec<Prompt> = read.collect();
    let mut sampler = Sampler::new(SamplingOptions::GREEDY, vocabulary, 0)?;
    let (mut reading, mut writing) = (Vec::new(), Vec::new());
    // The first round warms up.
    for round in 0..=rounds {
        let times = store.read(|weights| -> Result<(f64, f64)> {
            let mut cache = model.cache(batch, prompt_tokens + new_tokens);
            let mut logits = vec![0.0; batch * vocabulary];
            let start = Instant::now();
            model.prefill(weights, &mut cache, &read, &mut logits)?;
            let read = start.elapsed().as_secs_f64();
            let start = Instant::now();
            for _ in 0..new_tokens {
                let tokens = logits.chunks_exact(vocabulary).map(|row| sampler.next(row));
                let tokens = tokens.collect::<Result<Vec<u32>, _>>()?;
                model.decode(weights, &mut cache, &tokens, &mut logits)?;
            }
            Ok((read, start.elapsed().as_secs_f64()))
        })??;
        if round > 0 {
            reading.push(times.0);
            writing.push(times.1);
        }
    }
    let rate = |times: &mut Vec<f64>, tokens: usize| {
        times.sort_by(f64::total_cmp);
        (batch * tokens) as f64 / times[times.len() / 2]
    };
    let (read, written) = (rate(&mut reading, prompt_tokens), rate(&mut writing, new_tokens));
    let dtype = if precision == Precision::Bf16 { "bf16" } else { "f32" };
    if options.json {
        print_json(&json!({
            "dtype": dtype,
            "batch": batch,
            "prompt_tokens_per_s": read,
            "new_tokens_per_s": written,
        }))?;
    } else {
        println!("{dtype}, batch {batch}: {read:.0} prompt tokens/s read, {written:.1} new tokens/s written");
    }
    Ok(Ending::Done)
}
