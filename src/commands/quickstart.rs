//! The quickstart around its training: generated data before, an examination on held-out problems after.

use super::exact_match::end_tokens;
use super::prepare::Prepared;
use super::run_data::{self, RunData};
use crate::config::{ConfigError, ExamplesConfig, RunConfig};
use crate::data::{DataSet, FileKind, MemoryFile, SourceFile, TextTokenizer};
use crate::eval::exact_match as exam;
use crate::generate::Limits;
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

/// Problems of the other kinds to fine-tune on.
const FINETUNING_PROBLEMS: usize = 6_000;

/// No worked solution is longer.
const MAX_ANSWER_TOKENS: usize = 120;

/// How many of the examined problems are shown.
const SHOWN: usize = 3;

/// The problems that training never sees.
pub struct HeldOut {
    problems: Vec<Problem>,
    /// What stands before each of them, as in training.
    beginning: Vec<u32>,
}

/// What the generator made.
pub struct Made {
    pub data: RunData,
    pub held_out: HeldOut,
}

/// JSON Lines in memory.
fn file<'a>(name: &str, problems: &'a [Problem], line: impl Fn(&'a Problem) -> serde_json::Value) -> SourceFile {
    let lines: String = problems.iter().map(|problem| format!("{}\n", line(problem))).collect();
    SourceFile { bytes: Arc::new(MemoryFile::new(name, lines.into_bytes())), kind: FileKind::Jsonl }
}

/// Generates the corpus from the run's seed and trains the tokenizer on a part of it.
pub fn prepare(config: &RunConfig) -> Result<(TextTokenizer, Made)> {
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
        let file = file(name, problems, |problem| serde_json::json!({ "text": problem.document() }));
        Ok(Arc::new(DataSet::open(vec![file], "text")?))
    };
    let tokens = config.data.validation.as_ref().map(|validation| validation.tokens);
    let validation = tokens.map(|tokens| Ok::<_, anyhow::Error>((set("held-out.jsonl", &corpus.held_out)?, tokens)));
    let data =
        RunData::Text { training: set("training.jsonl", &corpus.training)?, validation: validation.transpose()? };
    let beginning = vec![tokenizer.begin_of_text()];
    Ok((tokenizer, Made { data, held_out: HeldOut { problems: corpus.held_out, beginning } }))
}

/// Generates problems of the other kinds, as examples for fine-tuning.
pub fn prepare_examples(
    config: &RunConfig,
    examples: &ExamplesConfig,
    tokenizer: &TextTokenizer,
    vocabulary_size: usize,
) -> Result<Made> {
    let corpus = corpus::generate_second(config.seed, FINETUNING_PROBLEMS, HELD_OUT_PROBLEMS)?;
    let file = |name: &str, problems: &[Problem]| {
        // The space belongs to the answer's first word, as in the texts that the model was trained on.
        let line = |problem: &Problem| serde_json::json!({ "prompt": problem.question, "completion": format!(" {}", problem.answer) });
        vec![file(name, problems, line)]
    };
    let (training, validation) = (file("training.jsonl", &corpus.training), file("held-out.jsonl", &corpus.held_out));
    let validation = config.data.validation.is_some().then_some(&validation[..]);
    let format = run_data::example_format(config, examples, tokenizer, None)?;
    let data = run_data::read_examples(config, examples, &training, validation, &format, tokenizer, vocabulary_size)?;
    Ok(Made { data, held_out: HeldOut { problems: corpus.held_out, beginning: tokenizer.beginning()? } })
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

/// Has every held-out problem answered greedily and grades the answers; `when` stands in what is printed.
pub fn examine(
    held_out: &HeldOut,
    prepared: &Prepared,
    layout: &Arc<Layout>,
    weights: Weights,
    verbosity: Verbosity,
    when: &str,
) -> Result<Report> {
    let tokenizer = prepared.tokenizer.as_ref().context("the quickstart has a tokenizer")?;
    let problem = |problem: &Problem| -> Result<exam::Problem> {
        let mut prompt = held_out.beginning.clone();
        prompt.extend(tokenizer.encode(&problem.prompt())?);
        Ok(exam::Problem { prompt, solution: problem.answer.clone() })
    };
    let all = held_out.problems.iter().map(problem).collect::<Result<Vec<_>>>()?;
    // A question that a small context has no room for cannot be answered: it counts as wrong, and is told.
    let context = prepared.model.n_positions();
    let (places, problems): (Vec<usize>, Vec<exam::Problem>) =
        all.into_iter().enumerate().filter(|(_, problem)| problem.prompt.len() <= context).unzip();
    let ends = end_tokens(&prepared.model, tokenizer);
    let mut shown = Vec::new();
    let mut examination = exam::Examination {
        vocabulary_size: prepared.model.vocab_size(),
        limits: Limits { max_new_tokens: MAX_ANSWER_TOKENS, end_of_text: &ends },
        decode: &|ids| tokenizer.decode(ids),
        on_answer: &mut |number, answer, right| {
            if number < SHOWN {
                shown.push((number, answer.to_owned(), right));
            }
        },
        interrupted: &|| false,
    };
    let mut model = Decoder::new(&prepared.model, layout);
    let right = exam::exact_match(&mut model, weights, &problems, &mut examination)?.unwrap_or(0);
    let report = Report { problems: held_out.problems.len(), right };
    if verbosity == Verbosity::Normal {
        let left_out = report.problems - places.len();
        if left_out > 0 {
            eprintln!(
                "\n{left_out} of the {} questions do not fit the model's context of {context} tokens and count as wrong",
                report.problems
            );
        }
        for (number, answer, right) in shown {
            let verdict = if right { "right" } else { "wrong" };
            eprintln!(
                "\nQuestion: {}\nAnswer ({verdict}): {}",
                held_out.problems[places[number]].question,
                answer.trim()
            );
        }
        eprintln!(
            "\nexact match{when} on {} held-out problems: {:.1}% ({} right)",
            report.problems,
            100.0 * report.exact_match(),
            report.right
        );
    }
    Ok(report)
}
