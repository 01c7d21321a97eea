//! Trained LLaMAs against numbers that other programs found with the same weights.
//!
//! The small one is a fixture. The other is SmolLM2-135M-Instruct: its folder in VRTRAIN_SMOLLM2, real texts and the
//! numbers in VRTRAIN_SHARED.

mod common;

use anyhow::{Context, Result};
use candle_core::Device;
use common::*;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vrtrain::config::Recompute;
use vrtrain::data::TextTokenizer;
use vrtrain::generate::{Flow, Limits, Sampler, SamplingOptions, complete};
use vrtrain::model::{Batch, Decoder, Documents, Engine, IGNORE, LossSum, ModelShape, weights};
use vrtrain::ops::product::Precision;
use vrtrain::params::{Layout, ParameterStore, slice, slice_mut};

struct Model {
    shape: ModelShape,
    store: ParameterStore,
    decoder: Decoder,
    engine: Engine,
    tokenizer: TextTokenizer,
}

fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_str(&text)?)
}

impl Model {
    fn open(folder: &Path) -> Result<Self> {
        let shape =
            ModelShape::from_hugging_face(&read_json(&folder.join("config.json"))?).map_err(anyhow::Error::msg)?;
        let layout = Arc::new(Layout::new(shape.parameter_specs()));
        let store = ParameterStore::new(Arc::clone(&layout), &Device::Cpu)?;
        let files = weights::files_of_folder(folder)?;
        slice_mut(store.weights(), |numbers| shape.load(&layout, &files, numbers))??;
        let decoder = Decoder::new(&shape, &layout);
        let engine = Engine::new(&shape, &layout, &Device::Cpu, Recompute::Block, Precision::F32);
        Ok(Self { shape, store, decoder, engine, tokenizer: TextTokenizer::load(folder)? })
    }

    fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        slice(self.store.weights(), |weights| self.decoder.logits(weights, ids, 1))?
    }

    /// The loss of every token of `ids` from place `from` on.
    fn loss(&mut self, ids: &[u32], from: usize) -> Result<LossSum> {
        let mut targets = ids[1..].to_vec();
        targets[..from - 1].fill(IGNORE);
        self.engine.loss(
            &self.store,
            Batch { inputs: &ids[..ids.len() - 1], targets: &targets, rows: 1, documents: Documents::Whole },
        )
    }

    /// The likeliest `count` tokens after `prompt`, with the cache of keys and values.
    fn greedy(&mut self, prompt: &[u32], count: usize) -> Result<Vec<u32>> {
        let mut sampler = Sampler::new(SamplingOptions::GREEDY, self.shape.vocab_size(), 0)?;
        let limits = Limits { max_new_tokens: count, end_of_text: &[] };
        let prompts = [prompt.to_vec()];
        let completions = slice(self.store.weights(), |weights| {
            complete(&mut self.decoder, weights, &prompts, limits, &mut sampler, &mut |_, _| Ok(Flow::Continue))
        })??;
        Ok(completions[0].ids.clone())
    }

    /// The same without a cache: the whole text again for each token.
    fn greedy_without_cache(&mut self, prompt: &[u32], count: usize) -> Result<Vec<u32>> {
        let mut ids = prompt.to_vec();
        for _ in 0..count {
            let logits = self.logits(&ids)?;
            let last = &logits[logits.len() - self.shape.vocab_size()..];
            let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).context("a vocabulary")?;
            ids.push(best as u32);
        }
        Ok(ids.split_off(prompt.len()))
    }

    /// Compares the first logits after `ids`, and what follows a prompt, with the reference's.
    fn agrees(&mut self, ids: &[u32], first_logits: &[f64], prompt: &[u32], greedy: &[u32]) -> Result<()> {
        let logits = self.logits(ids)?;
        let last = &logits[logits.len() - self.shape.vocab_size()..];
        let off = last.iter().zip(first_logits).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        eprintln!("largest difference of the reference's logits: {off:e}");
        assert!(off < 1e-3, "logits off by {off}");
        assert_eq!(&greedy[..prompt.len()], prompt);
        let expected = &greedy[prompt.len()..];
        assert_eq!(self.greedy(prompt, expected.len())?, expected);
        assert_eq!(self.greedy_without_cache(prompt, expected.len())?, expected);
        Ok(())
    }
}

fn ids(reference: &Value, key: &str) -> Result<Vec<u32>> {
    Ok(serde_json::from_value(reference[key].clone())?)
}

#[test]
fn stories_260k_gives_the_reference_logits_and_text() -> Result<()> {
    let folder = fixture("stories260K");
    let reference = read_json(&folder.join("reference.json"))?;
    let mut model = Model::open(&folder)?;
    let (prompt_text, greedy) = ("Once upon a time", ids(&reference, "greedy_ids")?);
    let encoding = model.tokenizer.tokenizer().encode(prompt_text, true).map_err(|error| anyhow::anyhow!(error))?;
    let logits: Vec<f64> = serde_json::from_value(reference["last_logits_first16"].clone())?;
    let text_ids = ids(&reference, "ids")?;
    model.agrees(&text_ids, &logits, encoding.get_ids(), &greedy)?;
    let loss = model.loss(&text_ids, 1)?.mean();
    assert!((loss - number(&reference, "mean_nll")).abs() < 1e-5, "{loss}");

    // The program itself, from text to text: the tokenizer's template puts begin-of-text before the prompt.
    let mut command = vrtrain();
    command.arg("generate").arg(&folder).args(["--prompt", prompt_text, "--max-new-tokens", "80", "--json"]);
    let output: Value = serde_json::from_str(&stdout(&succeed(&mut command)))?;
    assert_eq!(output["ids"], serde_json::json!(greedy[encoding.len()..]));
    let written = format!("{prompt_text}{}", output["text"].as_str().context("a text")?);
    assert_eq!(written, reference["greedy_after_once_upon_a_time"]);
    Ok(())
}

#[test]
fn stories_260k_gives_the_measured_loss_on_story_openings() -> Result<()> {
    let Some(shared) = shared("stories_260k_gives_the_measured_loss_on_story_openings") else { return Ok(()) };
    let mut model = Model::open(&fixture("stories260K"))?;
    let stories: Vec<String> = serde_json::from_value(read_json(&shared.join("data/webtext/tinystories_1000.json"))?)?;
    let mut total = LossSum::default();
    for story in stories.iter().take(200) {
        let encoding =
            model.tokenizer.tokenizer().encode(story.as_str(), true).map_err(|error| anyhow::anyhow!(error))?;
        let ids = encoding.get_ids();
        total += model.loss(&ids[..ids.len().min(512)], 1)?;
    }
    eprintln!("TinyStories: {:.4} nats/token over {} tokens", total.mean(), total.count);
    assert!((total.mean() - 1.733).abs() < 5e-3, "{}", total.mean());
    Ok(())
}

/// SmolLM2's folder and the shared data, where someone has both.
fn smollm2(test: &str) -> Option<(PathBuf, PathBuf)> {
    let folder = std::env::var_os("VRTRAIN_SMOLLM2").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("skipping {test}: VRTRAIN_SMOLLM2 is not set");
    }
    Some((folder?, shared(test)?.join("data")))
}

#[test]
fn smollm2_gives_the_reference_logits_and_text() -> Result<()> {
    let Some((folder, data)) = smollm2("smollm2_gives_the_reference_logits_and_text") else { return Ok(()) };
    let reference = read_json(&data.join("models/smollm2-135m-instruct/reference.json"))?;
    let mut model = Model::open(&folder)?;
    let logits: Vec<f64> = serde_json::from_value(reference["ref_last_logits_first16"].clone())?;
    let prompt = model.tokenizer.encode(reference["prompt"].as_str().context("a prompt")?)?;
    let text_ids = ids(&reference, "ref_ids")?;
    model.agrees(&text_ids, &logits, &prompt, &ids(&reference, "greedy_ids")?)?;
    let loss = model.loss(&text_ids, 1)?.mean();
    eprintln!("mean nats/token of the reference's ids: {loss}");
    assert!((loss - number(&reference, "ref_mean_nll")).abs() < 1e-4, "{loss}");
    Ok(())
}

#[test]
fn smollm2_gives_the_measured_losses_on_three_texts() -> Result<()> {
    let Some((folder, data)) = smollm2("smollm2_gives_the_measured_losses_on_three_texts") else { return Ok(()) };
    let reference = read_json(&data.join("models/smollm2-135m-instruct/reference.json"))?;
    let mut model = Model::open(&folder)?;
    let near = |what: &str, loss: LossSum, key: &str| {
        eprintln!("{what}: {:.4} nats/token over {} tokens", loss.mean(), loss.count);
        let difference = (loss.mean() - number(&reference, key)).abs();
        assert!(difference < 5e-3, "{what}: {} nats/token, off by {difference}", loss.mean());
    };

    let text = std::fs::read_to_string(data.join("wikitext-2/test.txt"))?;
    let tokens = model.tokenizer.encode(&text)?;
    let mut total = LossSum::default();
    for window in 0..8 {
        total += model.loss(&tokens[window * 512..window * 512 + 513], 1)?;
    }
    near("WikiText-2", total, "wikitext2_test_8x512_first_4096_tokens_nll");

    let table = std::fs::read_to_string(data.join("fineweb-edu/fineweb_edu_150_texts_with_llm_scores.csv"))?;
    let mut total = LossSum::default();
    for document in first_column(&table).skip(1).take(8) {
        let tokens = model.tokenizer.encode(&document)?;
        total += model.loss(&tokens[..tokens.len().min(513)], 1)?;
    }
    near("FineWeb-Edu", total, "fineweb_first8_docs_first512_nll");

    let problems = std::fs::read_to_string(data.join("gsm8k/test.jsonl"))?;
    let mut total = LossSum::default();
    for line in problems.lines().take(8) {
        let problem: Value = serde_json::from_str(line)?;
        let field = |name: &str| problem[name].as_str().with_context(|| format!("no {name}"));
        let mut tokens = model.tokenizer.encode(&format!("Question: {}\nAnswer: ", field("question")?))?;
        let from = tokens.len();
        tokens.extend(model.tokenizer.encode(field("answer")?)?);
        total += model.loss(&tokens, from)?;
    }
    near("GSM8K", total, "gsm8k_test_first8_answer_nll_prompt_\"Question: q\\nAnswer: \"");
    Ok(())
}

/// The first field of each record of a CSV text (RFC 4180).
fn first_column(text: &str) -> impl Iterator<Item = String> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (mut field, mut place, mut quoted) = (0, 0, false);
        let mut first = String::new();
        for character in rest.chars() {
            place += character.len_utf8();
            match character {
                // A doubled quote ends and begins a quoted part again, and stands for itself.
                '"' => {
                    if !quoted && rest[..place - 1].ends_with('"') && field == 0 {
                        first.push('"');
                    }
                    quoted = !quoted;
                }
                ',' if !quoted => field += 1,
                '\n' if !quoted => break,
                other if field == 0 => first.push(other),
                _ => {}
            }
        }
        rest = &rest[place..];
        (place > 0).then_some(first)
    })
}
