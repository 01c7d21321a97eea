//! `vrtrain generate`: continue a prompt, streamed to the terminal or as one JSON object.

mod batch;

use super::stop_signal::StopSignal;
use super::target::Target;
use super::{Ending, print_json};
use crate::config::ConfigError;
use crate::data::TextTokenizer;
use crate::generate::{
    End, Flow, Limits, Sampler, SamplingOptions, Scanned, SpecialTokens, StopScanner, TextStream, complete,
};
use crate::ops::product::Precision;
use anyhow::{Context, Result};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub target: String,
    pub prompt: Option<String>,
    pub prompt_ids: Option<Vec<u32>>,
    /// Many prompts: a jsonl file.
    pub prompts: Option<PathBuf>,
    /// How many of them at a time.
    pub batch: Option<usize>,
    pub max_new_tokens: usize,
    pub temperature: f64,
    pub top_k: Option<usize>,
    pub top_p: Option<f64>,
    pub seed: u64,
    pub stop: Vec<String>,
    pub precision: Precision,
    pub json: bool,
}

/// Loads the target and writes what follows the prompt.
pub fn run(options: &Options) -> Result<Ending> {
    if let Some(path) = &options.prompts {
        return batch::run(options, path);
    }
    if options.batch.is_some() {
        return Err(ConfigError::flag("--batch", "it goes with --prompts").into());
    }
    let target = Target::open(&options.target)?;
    let tokenizer = target.tokenizer()?;
    let prompt = prompt_ids(options, tokenizer.as_ref())?;
    let vocabulary = target.config.vocab_size();
    // Ids that the tokenizer cannot write are never drawn.
    let drawn = tokenizer.as_ref().map_or(vocabulary, |tokenizer| tokenizer.vocabulary_size().min(vocabulary));
    let mut sampler = Sampler::new(sampling(options), drawn, options.seed)
        .map_err(|error| ConfigError::flag("generate", error.to_string()))?;
    let mut output = Output::new(options, tokenizer.as_ref(), &prompt)?;

    let (store, mut model) = target.load_decoder(options.precision)?;
    let end_of_text = ends(&target, tokenizer.as_ref());
    let limits = Limits { max_new_tokens: options.max_new_tokens, end_of_text: &end_of_text };
    let prompts = [prompt];
    // Until here a signal ends the process; from here on it ends the text.
    let stop = StopSignal::install()?;
    let mut on_token = |_: usize, token: u32| {
        let flow = output.push(token)?;
        Ok(if stop.requested() { Flow::Stop } else { flow })
    };
    let completions =
        store.read(|weights| complete(&mut model, weights, &prompts, limits, &mut sampler, &mut on_token))??;
    let stopped = stop.requested();
    let completion = completions.first().context("no completion was made")?;
    let text = output.finish()?;
    if options.json {
        print_json(&json!({
            "prompt_ids": prompts[0],
            "ids": completion.ids,
            "text": text,
            "end": if stopped { "interrupted" } else { completion.end.word() },
        }))?;
    } else if completion.end == End::Context {
        eprintln!("(the model's context of {} tokens is full)", target.config.n_positions());
    }
    Ok(if stopped { Ending::Stopped } else { Ending::Done })
}

/// How tokens are drawn.
fn sampling(options: &Options) -> SamplingOptions {
    SamplingOptions { temperature: options.temperature, top_k: options.top_k, top_p: options.top_p }
}

/// The ids that end a text.
fn ends(target: &Target, tokenizer: Option<&TextTokenizer>) -> Vec<u32> {
    let mut ends = target.config.end_of_text().to_vec();
    ends.extend(tokenizer.map(TextTokenizer::end_of_text));
    ends
}

/// A text as ids, with what the tokenizer's own template puts around one. An empty one begins with the end-of-text token,
/// as a document does.
fn text_ids(text: &str, tokenizer: &TextTokenizer) -> Result<Vec<u32>> {
    let ids = tokenizer.encode_with_template(text)?;
    Ok(if ids.is_empty() { vec![tokenizer.begin_of_text()] } else { ids })
}

/// Refuses stop texts that cannot stop anything.
fn check_stops(options: &Options, tokenizer: Option<&TextTokenizer>) -> Result<(), ConfigError> {
    if tokenizer.is_none() && !options.stop.is_empty() {
        return Err(ConfigError::flag("--stop", "this model has no tokenizer, so there is no text to stop at"));
    }
    if options.stop.iter().any(String::is_empty) {
        return Err(ConfigError::flag("--stop", "a stop text must not be empty"));
    }
    Ok(())
}

/// The prompt as ids, with what the tokenizer's own template puts around a text (LLaMA's begin-of-text; nothing for
/// GPT-2). An empty one begins with the begin-of-text token, as a document does.
fn prompt_ids(options: &Options, tokenizer: Option<&TextTokenizer>) -> Result<Vec<u32>> {
    if let Some(ids) = &options.prompt_ids {
        if ids.is_empty() {
            return Err(ConfigError::flag("--prompt-ids", "give at least one id").into());
        }
        return Ok(ids.clone());
    }
    let Some(tokenizer) = tokenizer else {
        let message = format!("{} has no tokenizer: give --prompt-ids instead of a text", options.target);
        return Err(ConfigError::flag("--prompt", message).into());
    };
    let text = options.prompt.as_deref().unwrap_or("");
    let encoding = tokenizer.tokenizer().encode_fast(text, true).map_err(|error| anyhow::anyhow!(error));
    let ids = encoding.context("cannot tokenize the prompt")?.get_ids().to_vec();
    Ok(if ids.is_empty() { vec![tokenizer.begin_of_text()] } else { ids })
}

/// Turns tokens into what the user sees, as they come.
struct Output<'a> {
    json: bool,
    text: Option<(TextStream<'a>, StopScanner)>,
    /// Text for JSON output.
    collected: String,
    stopped: bool,
    ids: Vec<u32>,
}

impl<'a> Output<'a> {
    fn new(options: &Options, tokenizer: Option<&'a TextTokenizer>, prompt: &[u32]) -> Result<Self> {
        if tokenizer.is_none() && !options.stop.is_empty() {
            return Err(
                ConfigError::flag("--stop", "this model has no tokenizer, so there is no text to stop at").into()
            );
        }
        let text = tokenizer.map(|tokenizer| {
            let scanner = StopScanner::new(options.stop.clone())
                .map_err(|_| ConfigError::flag("--stop", "a stop text must not be empty"))?;
            let stream = TextStream::after(tokenizer.tokenizer(), SpecialTokens::Show, prompt)?;
            Ok::<_, anyhow::Error>((stream, scanner))
        });
        let (json, text) = (options.json, text.transpose()?);
        if !json && let Some(prompt) = &options.prompt {
            print(prompt)?;
        }
        Ok(Self { json, text, collected: String::new(), stopped: false, ids: Vec::new() })
    }

    fn push(&mut self, token: u32) -> Result<Flow> {
        self.ids.push(token);
        let Some((stream, scanner)) = &mut self.text else { return Ok(Flow::Continue) };
        let piece = stream.push(token)?;
        match scanner.push(&piece) {
            Scanned::More(text) => {
                self.show(&text)?;
                Ok(Flow::Continue)
            }
            Scanned::Stopped(text) => {
                self.stopped = true;
                self.show(&text)?;
                Ok(Flow::Stop)
            }
        }
    }

    fn show(&mut self, text: &str) -> Result<()> {
        if self.json {
            self.collected.push_str(text);
            return Ok(());
        }
        print(text)
    }

    /// Writes what was held back; the whole text, if there is a tokenizer.
    fn finish(mut self) -> Result<Option<String>> {
        let Some((stream, mut scanner)) = self.text.take() else {
            if !self.json {
                let ids: Vec<String> = self.ids.iter().map(u32::to_string).collect();
                print(&format!("{}\n", ids.join(",")))?;
            }
            return Ok(None);
        };
        if !self.stopped {
            let rest = stream.finish()?;
            match scanner.push(&rest) {
                Scanned::Stopped(text) => self.show(&text)?,
                Scanned::More(text) => {
                    self.show(&text)?;
                    let held = scanner.finish();
                    self.show(&held)?;
                }
            }
        }
        if !self.json {
            print("\n")?;
        }
        Ok(Some(self.collected))
    }
}

fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("cannot write to stdout")
}
