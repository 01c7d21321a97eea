//! The prompts, byte for byte as lm-evaluation-harness 0.4.13 makes them.

use crate::eval::python_random::PythonRandom;
use serde::Deserialize;

/// A question with its worked solution, whose last line is `#### NUMBER`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Problem {
    pub question: String,
    #[serde(alias = "target")]
    pub answer: String,
}

/// How a problem is put.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Style {
    /// The task `gsm8k`: `Question: {question}\nAnswer:`.
    Questions,
    /// The task `gsm8k_cot`: `Q: {question}\nA:`, solutions that end with `The answer is N.`
    ChainOfThought,
    /// The text that a fine-tuned model was trained on; `{prompt}` is the question.
    Template(String),
}

/// Where the worked examples before the question come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exemplars {
    /// Drawn anew for each problem from a split of its own, as lm-evaluation-harness does it.
    Drawn { from: Vec<Problem>, count: usize, seed: u64 },
    /// Drawn from the problems themselves, never the one that is asked.
    DrawnFromOthers { count: usize, seed: u64 },
    /// Always these.
    Fixed(Vec<Problem>),
}

/// The eight examples of `gsm8k_cot`: facts of Wei et al., "Chain-of-Thought Prompting Elicits Reasoning in Large Language
/// Models" (2022, CC BY 4.0), in the wording that lm-evaluation-harness (MIT) ships.
pub fn chain_of_thought_shots() -> Result<Vec<Problem>, serde_json::Error> {
    serde_json::from_str(include_str!("chain_of_thought.json"))
}

/// Makes the prompts of a list of problems, in its order.
pub struct Prompts<'a> {
    style: &'a Style,
    exemplars: &'a Exemplars,
    random: PythonRandom,
}

impl<'a> Prompts<'a> {
    pub fn new(style: &'a Style, exemplars: &'a Exemplars) -> Self {
        let seed = match exemplars {
            Exemplars::Drawn { seed, .. } | Exemplars::DrawnFromOthers { seed, .. } => *seed,
            Exemplars::Fixed(_) => 0,
        };
        Self { style, exemplars, random: PythonRandom::new(seed) }
    }

    /// The prompt of the next problem; `problems` is the whole list, `index` its place there. Draws depend on how many
    /// prompts came before, so ask in order.
    pub fn next(&mut self, problems: &[Problem], index: usize) -> String {
        let shots: Vec<&Problem> = match self.exemplars {
            Exemplars::Fixed(shots) => shots.iter().collect(),
            Exemplars::Drawn { from, count, .. } => {
                self.random.sample(from.len(), *count).into_iter().map(|place| &from[place]).collect()
            }
            Exemplars::DrawnFromOthers { count, .. } => {
                // One more than needed, so that the problem itself can be left out.
                let drawn = self.random.sample(problems.len(), count + 1).into_iter();
                drawn.map(|place| &problems[place]).filter(|&shot| *shot != problems[index]).take(*count).collect()
            }
        };
        let mut text = String::new();
        for shot in shots {
            text += &self.asked(&shot.question);
            if !matches!(self.style, Style::Template(_)) {
                text.push(' ');
            }
            text += &shot.answer;
            text += "\n\n";
        }
        text + &self.asked(&problems[index].question)
    }

    fn asked(&self, question: &str) -> String {
        match self.style {
            Style::Questions => format!("Question: {question}\nAnswer:"),
            Style::ChainOfThought => format!("Q: {question}\nA:"),
            Style::Template(template) => template.replace("{prompt}", question),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};

    #[derive(Deserialize)]
    struct Fixture {
        /// Questions that are asked, and the split that examples are drawn from.
        test: Vec<Problem>,
        train: Vec<Problem>,
        prompts: Vec<Expected>,
    }

    #[derive(Deserialize)]
    struct Expected {
        task: String,
        shots: usize,
        index: usize,
        sha256: String,
        /// The whole prompt, for the first of each kind.
        text: Option<String>,
    }

    /// Made by tests/fixtures/gsm8k/make.py with lm-evaluation-harness 0.4.13.
    #[test]
    fn prompts_are_those_of_lm_evaluation_harness_byte_for_byte() -> Result<(), serde_json::Error> {
        let fixture: Fixture = serde_json::from_str(include_str!("../../../tests/fixtures/gsm8k/prompts.json"))?;
        let mut checked = 0;
        for (task, shots) in [("gsm8k", 5), ("gsm8k", 0), ("gsm8k_cot", 8)] {
            let style = if task == "gsm8k" { Style::Questions } else { Style::ChainOfThought };
            let exemplars = match shots {
                5 => Exemplars::Drawn { from: fixture.train.clone(), count: 5, seed: 1234 },
                0 => Exemplars::Fixed(Vec::new()),
                _ => Exemplars::Fixed(chain_of_thought_shots()?),
            };
            let mut prompts = Prompts::new(&style, &exemplars);
            for index in 0..fixture.test.len() {
                let prompt = prompts.next(&fixture.test, index);
                let of_this = |expected: &&Expected| {
                    (expected.task.as_str(), expected.shots, expected.index) == (task, shots, index)
                };
                let Some(expected) = fixture.prompts.iter().find(of_this) else { continue };
                if let Some(text) = &expected.text {
                    assert_eq!(prompt, *text, "{task}, {shots} shots, problem {index}");
                }
                let digest: String = Sha256::digest(&prompt).iter().map(|byte| format!("{byte:02x}")).collect();
                assert_eq!(digest, expected.sha256, "{task}, {shots} shots, problem {index}: {prompt}");
                checked += 1;
            }
        }
        assert_eq!(checked, fixture.prompts.len());
        Ok(())
    }

    #[test]
    fn a_problem_is_never_its_own_example() {
        let problem = |number: usize| Problem { question: format!("q{number}"), answer: format!("#### {number}") };
        let problems: Vec<Problem> = (0..8).map(problem).collect();
        let exemplars = Exemplars::DrawnFromOthers { count: 7, seed: 1 };
        let mut prompts = Prompts::new(&Style::Questions, &exemplars);
        for index in 0..8 {
            let prompt = prompts.next(&problems, index);
            assert_eq!(prompt.matches("Question: ").count(), 8, "{prompt}");
            assert_eq!(prompt.matches(&format!("Question: q{index}\n")).count(), 1, "{prompt}");
        }
    }
}
