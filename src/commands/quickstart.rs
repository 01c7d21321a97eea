//! The quickstart around its training: generated data before, an examination on held-out problems after.

use super::prepare::Prepared;
use super::setup::RunData;
use crate::config::{ConfigError, RunConfig};
use crate::data::{DataSet, FileKind, MemoryFile, SourceFile, TextTokenizer};
use crate::eval::gsm8k_answer::strict_match;
use crate::generate::{Flow, Limits, Sampler, SamplingOptions, complete};
use crate::model::Decoder;
use crate::params::{Layout, Weights};
use crate::quickstart::corpus::{self, Problem};
use crate::quickstart::tokenizer;
use crate::train::Verbosity;
use anyhow::{Context, Result};
use std::sync::Arc;

/// Problems to train on: more than a run of three minutes on two cores sees.
const TRAINING_PROBLEMS: usize = 60_000;

/// Problems to examine with.
const HELD_OUT_PROBLEMS: usize = 500;

/// Problems that the tokenizer is trained on.
const TOKENIZER_PROBLEMS: usize = 4_000;

/// Prompts completed at a time.
const EXAM_BATCH: usize = 125;

/// No worked solution is longer.
const MAX_ANSWER_TOKENS: usize = 120;

/// How many of the examined problems are shown.
const SHOWN: usize = 3;

/// The problems that training never sees.
pub struct HeldOut(Vec<Problem>);

/// What the generator made.
pub struct Made {
    pub tokenizer: TextTokenizer,
    pub data: RunData,
    pub held_out: HeldOut,
}

/// Generates the corpus from the run's seed and trains the tokenizer on a part of it.
pub fn prepare(config: &RunConfig) -> Result<Made> {
    if let Some(source) = &config.tokenizer {
        let message =
            format!("`tokenizer.source` = {source} conflicts with the quickstart, which trains its own; leave it out");
        return Err(ConfigError::flag("[tokenizer]", message).into());
    }
    let corpus = corpus::generate(config.seed, TRAINING_PROBLEMS, HELD_OUT_PROBLEMS)?;
    let sample: Vec<String> = corpus.training.iter().take(TOKENIZER_PROBLEMS).map(Problem::document).collect();
    let trained = tokenizer::train(sample.iter().map(String::as_str))?;
    let tokenizer = TextTokenizer::new(trained, tokenizer::END_OF_TEXT_ID)?;
    let set = |name: &str, problems: &[Problem]| -> Result<Arc<DataSet>> {
        let lines: String =
            problems.iter().map(|problem| format!("{}\n", serde_json::json!({ "text": problem.document() }))).collect();
        let bytes = Arc::new(MemoryFile::new(name, lines.into_bytes()));
        Ok(Arc::new(DataSet::open(vec![SourceFile { bytes, kind: FileKind::Jsonl }], "text")?))
    };
    let tokens = config.data.validation.as_ref().map(|validation| validation.tokens);
    let validation = tokens.map(|tokens| Ok::<_, anyhow::Error>((set("held-out.jsonl", &corpus.held_out)?, tokens)));
    let data = RunData { training: set("training.jsonl", &corpus.training)?, validation: validation.transpose()? };
    Ok(Made { tokenizer, data, held_out: HeldOut(corpus.held_out) })
}

/// The examination's result.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    pub problems: usize,
    pub right: usize,
}

impl Report {
    pub fn exact_match(&self) -> f64 {
        self.right as f64 / self.problems as f64
    }
}

/// Has every held-out problem answered greedily and grades the answers.
pub fn examine(
    held_out: &HeldOut,
    prepared: &Prepared,
    layout: &Arc<Layout>,
    weights: Weights,
    verbosity: Verbosity,
) -> Result<Report> {
    let tokenizer = prepared.tokenizer.as_ref().context("the quickstart has a tokenizer")?;
    let mut model = Decoder::new(&prepared.model, layout);
    let mut sampler = Sampler::new(SamplingOptions::GREEDY, prepared.model.vocab_size(), 0)?;
    let limits = Limits { max_new_tokens: MAX_ANSWER_TOKENS, end_of_text: &[tokenizer.end_of_text()] };
    let mut report = Report { problems: held_out.0.len(), right: 0 };
    let mut shown = Vec::new();
    for problems in held_out.0.chunks(EXAM_BATCH) {
        let prompt = |problem: &Problem| -> Result<Vec<u32>> {
            let mut ids = vec![tokenizer.begin_of_text()];
            ids.extend(tokenizer.encode(&problem.prompt())?);
            Ok(ids)
        };
        let prompts = problems.iter().map(prompt).collect::<Result<Vec<_>>>()?;
        let completions =
            complete(&mut model, weights, &prompts, limits, &mut sampler, &mut |_, _| Ok(Flow::Continue))?;
        for (problem, completion) in problems.iter().zip(&completions) {
            let answer = tokenizer.decode(&completion.ids)?;
            let right = strict_match(&answer) == strict_match(&problem.answer);
            report.right += usize::from(right);
            if shown.len() < SHOWN {
                shown.push((problem, answer, right));
            }
        }
    }
    if verbosity == Verbosity::Normal {
        for (problem, answer, right) in shown {
            let verdict = if right { "right" } else { "wrong" };
            eprintln!("\nQuestion: {}\nAnswer ({verdict}): {}", problem.question, answer.trim());
        }
        eprintln!(
            "\nexact match on {} held-out problems: {:.1}% ({} right)",
            report.problems,
            100.0 * report.exact_match(),
            report.right
        );
    }
    Ok(report)
}
