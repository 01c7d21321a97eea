//! Held-out examples answered during training.

use super::run_data::RunData;
use crate::config::RunConfig;
use crate::data::TextTokenizer;
use crate::eval::exact_match::{Examination, Problem, exact_match};
use crate::eval::gsm8k_answer::openai_answer;
use crate::generate::Limits;
use crate::model::{Decoder, ModelShape};
use crate::params::ParameterStore;
use crate::train::Interrupt;
use anyhow::{Context, Result};

/// The problems of `train.eval_exact_match`.
pub struct Exam {
    problems: Vec<Problem>,
    /// Tokens of an answer at most.
    longest: usize,
}

impl Exam {
    /// Takes the first held-out examples, if the config asks for them.
    ///
    /// # Errors
    /// When there are fewer, or one of them has no final answer to compare with.
    pub fn new(config: &RunConfig, data: &RunData, tokenizer: Option<&TextTokenizer>) -> Result<Option<Self>> {
        let (RunData::Examples { validation: Some(held_out), .. }, Some(tokenizer)) = (data, tokenizer) else {
            return Ok(None);
        };
        let (asked, found) = (config.train.eval_exact_match, held_out.list().len());
        if asked > found {
            let message =
                format!("`train.eval_exact_match` = {asked}, but there are {found} held-out examples to answer");
            return Err(config.settings.0.error("train.eval_exact_match", message).into());
        }
        let problem = |(number, example): (usize, &crate::data::Example)| {
            let (question, answer) = example.question_and_answer();
            let solution = tokenizer.decode(answer)?;
            if openai_answer(&solution).is_none() {
                let message = format!(
                    "`train.eval_exact_match` compares final answers, but held-out example {} has no line `#### \
                     NUMBER` (it may have been cut off): {solution:?}",
                    number + 1
                );
                return Err(config.settings.0.error("train.eval_exact_match", message).into());
            }
            Ok(Problem { prompt: question.to_vec(), solution })
        };
        let chosen = held_out.list().iter().enumerate().take(asked);
        let problems = chosen.map(problem).collect::<Result<Vec<_>>>()?;
        Ok((!problems.is_empty()).then_some(Self { problems, longest: config.train.exact_match_tokens }))
    }

    /// The share of problems that the weights in `store` answer right; `None` if a signal came.
    pub fn take(
        &self,
        model: &ModelShape,
        tokenizer: &TextTokenizer,
        store: &ParameterStore,
        interrupt: &Interrupt,
    ) -> Result<Option<f64>> {
        let mut decoder = Decoder::new(model, store.layout());
        let ends = end_tokens(model, tokenizer);
        let mut examination = Examination {
            vocabulary_size: tokenizer.vocabulary_size().min(model.vocab_size()),
            limits: Limits { max_new_tokens: self.longest, end_of_text: &ends },
            decode: &|ids| tokenizer.decode(ids),
            on_answer: &mut |_, _, _| {},
            interrupted: &|| interrupt.requested(),
        };
        let right =
            store.read_on_cpu(|weights| exact_match(&mut decoder, weights, &self.problems, &mut examination))?;
        let right = right.context("answering held-out problems")?;
        Ok(right.map(|right| right as f64 / self.problems.len() as f64))
    }
}

/// Every id that ends a text of this model.
pub fn end_tokens(model: &ModelShape, tokenizer: &TextTokenizer) -> Vec<u32> {
    let mut ends = model.end_of_text().to_vec();
    ends.extend([tokenizer.end_of_text(), tokenizer.end_of_answer()]);
    ends
}
