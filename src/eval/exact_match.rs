//! Exact match: problems answered greedily, and their final answers compared as lm-evaluation-harness's strict match
//! does it.

use super::gsm8k_answer::grade;
use crate::generate::{Flow, Limits, Sampler, SamplingOptions, complete};
use crate::model::Decoder;
use crate::params::Weights;
use anyhow::Result;

/// Prompts completed at a time.
const AT_ONCE: usize = 64;

/// A problem as the model gets it.
pub struct Problem {
    pub prompt: Vec<u32>,
    /// The worked solution, which ends with `#### ` and the answer.
    pub solution: String,
}

/// How answers become text, what is told of them, and whether to go on.
pub struct Examination<'a> {
    /// Ids below this may be drawn.
    pub vocabulary_size: usize,
    pub limits: Limits<'a>,
    pub decode: &'a dyn Fn(&[u32]) -> Result<String>,
    /// Sees each answer: the problem's number, the text, and whether it is right.
    pub on_answer: &'a mut dyn FnMut(usize, &str, bool),
    /// Asked before each batch.
    pub interrupted: &'a dyn Fn() -> bool,
}

/// How many problems are answered right; `None` if it was interrupted.
pub fn exact_match(
    model: &mut Decoder,
    weights: Weights,
    problems: &[Problem],
    examination: &mut Examination,
) -> Result<Option<usize>> {
    let mut sampler = Sampler::new(SamplingOptions::GREEDY, examination.vocabulary_size, 0)?;
    let mut right = 0;
    for (batch, problems) in problems.chunks(AT_ONCE).enumerate() {
        if (examination.interrupted)() {
            return Ok(None);
        }
        let prompts: Vec<Vec<u32>> = problems.iter().map(|problem| problem.prompt.clone()).collect();
        let on_token = &mut |_, _| Ok(Flow::Continue);
        let completions = complete(model, weights, &prompts, examination.limits, &mut sampler, on_token)?;
        for (place, (problem, completion)) in problems.iter().zip(completions).enumerate() {
            let answer = (examination.decode)(&completion.ids)?;
            let is_right = grade(&answer, &problem.solution)?.strict;
            right += usize::from(is_right);
            (examination.on_answer)(batch * AT_ONCE + place, &answer, is_right);
        }
    }
    Ok(Some(right))
}
