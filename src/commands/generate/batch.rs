//! `vrtrain generate --prompts FILE`: many prompts, several at a time, one JSON object each.

use super::{Options, sampling};
use crate::commands::target::Target;
use crate::commands::{Ending, print_json};
use crate::config::ConfigError;
use crate::data::{Record, SourceFile, TextTokenizer, records};
use crate::generate::{
    Completion, Flow, Limits, Sampler, Scanned, SpecialTokens, StopScanner, TextStream, complete_in_turn,
};
use crate::ops::linear::FEW_ROWS;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

/// What is kept of a prompt while its completion is written.
struct Written<'a> {
    text: Option<(TextStream<'a>, StopScanner)>,
    collected: String,
    stopped: bool,
}

impl<'a> Written<'a> {
    fn new(tokenizer: Option<&'a TextTokenizer>, prompt: &[u32], stops: &[String]) -> Result<Self> {
        let start = |tokenizer: &'a TextTokenizer| -> Result<_> {
            let stream = TextStream::after(tokenizer.tokenizer(), SpecialTokens::Show, prompt)?;
            Ok((stream, StopScanner::new(stops.to_vec())?))
        };
        Ok(Self { text: tokenizer.map(start).transpose()?, collected: String::new(), stopped: false })
    }

    fn push(&mut self, token: u32) -> Result<Flow> {
        let Some((stream, scanner)) = &mut self.text else { return Ok(Flow::Continue) };
        Ok(match scanner.push(&stream.push(token)?) {
            Scanned::More(text) => {
                self.collected += &text;
                Flow::Continue
            }
            Scanned::Stopped(text) => {
                self.collected += &text;
                self.stopped = true;
                Flow::Stop
            }
        })
    }

    /// The whole text, if there is a tokenizer.
    fn finish(mut self) -> Result<Option<String>> {
        let Some((stream, mut scanner)) = self.text.take() else { return Ok(None) };
        if !self.stopped {
            match scanner.push(&stream.finish()?) {
                Scanned::Stopped(text) => self.collected += &text,
                Scanned::More(text) => {
                    self.collected += &text;
                    self.collected += &scanner.finish();
                }
            }
        }
        Ok(Some(self.collected))
    }
}

/// Completes every prompt of the file; the objects come in its order.
pub fn run(options: &Options, path: &Path) -> Result<Ending> {
    let batch = options.batch.unwrap_or(16);
    if batch == 0 || batch > FEW_ROWS {
        return Err(ConfigError::flag("--batch", format!("it must be between 1 and {FEW_ROWS}")).into());
    }
    if !path.is_file() {
        return Err(ConfigError::flag("--prompts", format!("there is no file {}", path.display())).into());
    }
    let target = Target::open(&options.target)?;
    let tokenizer = target.tokenizer()?;
    let tokenizer = tokenizer.as_ref();
    super::check_stops(options, tokenizer)?;
    let rows = records(&[SourceFile::local(path)?])?;
    let prompts: Vec<Vec<u32>> = rows.iter().map(|row| prompt_ids(row, tokenizer)).collect::<Result<_>>()?;
    let vocabulary = target.config.vocab_size();
    let drawn = tokenizer.map_or(vocabulary, |tokenizer| tokenizer.vocabulary_size().min(vocabulary));
    // Each prompt has draws of its own, so that the others and their number change nothing.
    let sampler = |index: usize| Sampler::new(sampling(options), drawn, options.seed.wrapping_add(index as u64));
    sampler(0).map_err(|error| ConfigError::flag("generate", error.to_string()))?;
    let (store, mut model) = target.load_decoder(options.precision)?;
    let end_of_text = super::ends(&target, tokenizer);
    let limits = Limits { max_new_tokens: options.max_new_tokens, end_of_text: &end_of_text };

    let mut samplers: Vec<Option<Sampler>> = vec![None; prompts.len()];
    let written: RefCell<Vec<Option<Written>>> = RefCell::new((0..prompts.len()).map(|_| None).collect());
    let mut waiting: BTreeMap<usize, Value> = BTreeMap::new();
    let mut next = 0;
    let mut on_end = |index: usize, completion: Completion| -> Result<()> {
        let text = written.borrow_mut()[index].take();
        let text = text.map_or_else(|| Written::new(tokenizer, &prompts[index], &[]), Ok)?.finish()?;
        let object = json!({
            "index": index,
            "prompt": rows[index].get("prompt"),
            "prompt_ids": prompts[index],
            "ids": completion.ids,
            "text": text,
            "end": completion.end.word(),
        });
        waiting.insert(index, object);
        while let Some(object) = waiting.remove(&next) {
            print_json(&object)?;
            next += 1;
        }
        Ok(())
    };
    store.read(|weights| {
        complete_in_turn(
            &mut model,
            weights,
            &prompts,
            batch,
            limits,
            &mut |index, logits| {
                let slot = &mut samplers[index];
                let sampler = match slot {
                    Some(sampler) => sampler,
                    None => slot.insert(sampler(index)?),
                };
                Ok(sampler.next(logits)?)
            },
            &mut |index, token| {
                let slot = &mut written.borrow_mut()[index];
                let written = match slot {
                    Some(written) => written,
                    None => slot.insert(Written::new(tokenizer, &prompts[index], &options.stop)?),
                };
                written.push(token)
            },
            &mut on_end,
        )
    })??;
    Ok(Ending::Done)
}

/// The ids of a row: its `prompt_ids`, or its `prompt` tokenised.
fn prompt_ids(row: &Record, tokenizer: Option<&TextTokenizer>) -> Result<Vec<u32>> {
    if let Some(ids) = row.get("prompt_ids") {
        ensure!(row.get("prompt").is_none(), "{}: both `prompt` and `prompt_ids`: give one", row.place());
        let ids: Option<Vec<u32>> = serde_json::from_value(ids.clone()).ok();
        return ids
            .filter(|ids| !ids.is_empty())
            .with_context(|| format!("{}: `prompt_ids` is not a list of token ids", row.place()));
    }
    let text = row.text("prompt")?;
    let tokenizer = tokenizer.with_context(|| {
        format!("{}: the model has no tokenizer, so give `prompt_ids` instead of `prompt`", row.place())
    })?;
    super::text_ids(text, tokenizer)
}
