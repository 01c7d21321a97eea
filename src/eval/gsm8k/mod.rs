//! GSM8K as lm-evaluation-harness asks it: the prompts, their examples and the verdicts.

mod calculator;
mod prompt;

pub use calculator::Calculator;
pub use prompt::{Exemplars, Problem, Prompts, Style, chain_of_thought_shots};

use super::gsm8k_answer::{self, GoldWithoutAnswer, Grade};

/// What lm-evaluation-harness stops a completion at, besides the end of the text.
pub const STOPS: [&str; 3] = ["Question:", "</s>", "<|im_end|>"];
pub const CHAIN_OF_THOUGHT_STOPS: [&str; 3] = ["Q:", "</s>", "<|im_end|>"];

/// What a completion's answer is, by each rule, and whether it is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub strict: Option<String>,
    pub flexible: Option<String>,
    pub openai: Option<String>,
    pub grade: Grade,
}

impl Style {
    /// Grades a completion against the data set's answer.
    ///
    /// # Errors
    /// When the reference has no final answer.
    pub fn judge(&self, completion: &str, gold: &str) -> Result<Verdict, GoldWithoutAnswer> {
        let grade = match self {
            Self::ChainOfThought => gsm8k_answer::grade_chain_of_thought(completion, gold)?,
            Self::Questions | Self::Template(_) => gsm8k_answer::grade(completion, gold)?,
        };
        let strict = match self {
            Self::ChainOfThought => gsm8k_answer::chain_of_thought_match(completion),
            Self::Questions | Self::Template(_) => gsm8k_answer::strict_match(completion),
        };
        Ok(Verdict {
            strict: strict.map(str::to_owned),
            flexible: gsm8k_answer::flexible_extract(completion).map(str::to_owned),
            openai: gsm8k_answer::openai_answer(completion),
            grade,
        })
    }

    /// The texts that end a completion.
    pub fn stops(&self) -> Vec<String> {
        let stops = if *self == Self::ChainOfThought { CHAIN_OF_THOUGHT_STOPS } else { STOPS };
        stops.map(str::to_owned).to_vec()
    }
}
