//! Grade-school word problems with worked solutions in GSM8K's format, from a seed.
//!
//! ```
//! # fn main() -> Result<(), vrtrain::quickstart::corpus::CorpusError> {
//! let corpus = vrtrain::quickstart::corpus::generate(1337, 100, 5)?;
//! let problem = &corpus.held_out[0];
//! assert!(problem.document().starts_with(&problem.prompt()));
//! assert!(problem.answer.contains("<<") && problem.answer.contains("\n#### "));
//! # Ok(())
//! # }
//! ```

use super::draw::Draw;
use super::problems::{KINDS, Kind, SECOND_KINDS};
use crate::random::{Stream, below, generator};
use std::collections::HashSet;

/// Draws in a row that may all be known already before the generator counts as exhausted.
const MOST_REPEATS: usize = 1000;

/// A word problem and its worked solution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What kind of problem it is, such as "shopping total".
    pub kind: &'static str,
    pub question: String,
    /// Steps with calculator marks such as `<<6*4=24>>`, one a line, then `#### 24`.
    pub answer: String,
}

impl Problem {
    /// What a model is asked with, up to where its answer begins.
    pub fn prompt(&self) -> String {
        format!("Question: {}\nAnswer:", self.question)
    }

    /// The text that a model is trained on: the prompt, a space and the answer.
    pub fn document(&self) -> String {
        format!("Question: {}\nAnswer: {}", self.question, self.answer)
    }
}

/// Problems to train on and problems to test with; all questions differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corpus {
    pub training: Vec<Problem>,
    pub held_out: Vec<Problem>,
}

/// More problems were asked for than there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the quickstart's generator finds only {found} distinct problems of the {asked} asked for: ask for fewer")]
pub struct CorpusError {
    pub asked: usize,
    pub found: usize,
}

/// Generates `held_out_count` test problems and then `train_count` other ones, all with different questions.
///
/// The held-out problems depend on the seed and their own number alone, so that a longer training set keeps them.
///
/// # Errors
/// When there are not as many distinct problems.
pub fn generate(seed: u64, train_count: usize, held_out_count: usize) -> Result<Corpus, CorpusError> {
    generate_from(&KINDS, seed, train_count, held_out_count)
}

/// As [`generate`], of the kinds that fine-tuning teaches.
///
/// # Errors
/// When there are not as many distinct problems.
pub fn generate_second(seed: u64, train_count: usize, held_out_count: usize) -> Result<Corpus, CorpusError> {
    generate_from(&SECOND_KINDS, seed, train_count, held_out_count)
}

fn generate_from(kinds: &[Kind], seed: u64, train_count: usize, held_out_count: usize) -> Result<Corpus, CorpusError> {
    let mut random = generator(seed, Stream::Corpus);
    let asked = train_count + held_out_count;
    let mut known = HashSet::with_capacity(asked);
    let mut next_new = || {
        for _ in 0..MOST_REPEATS {
            let kind = &kinds[below(&mut random, kinds.len() as u64) as usize];
            let draft = (kind.draft)(&mut Draw(&mut random));
            if known.insert(draft.question.clone()) {
                let answer = format!("{}\n#### {}", draft.steps.join("\n"), draft.result);
                return Ok(Problem { kind: kind.name, question: draft.question, answer });
            }
        }
        Err(CorpusError { asked, found: known.len() })
    };
    let held_out = (0..held_out_count).map(|_| next_new()).collect::<Result<_, _>>()?;
    let training = (0..train_count).map(|_| next_new()).collect::<Result<_, _>>()?;
    Ok(Corpus { training, held_out })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quickstart::problems::Draft;
    use anyhow::{Context, bail, ensure};

    /// The value of a sum of products such as `2+3*4`, left to right, worked out from its text alone.
    fn evaluate(expression: &str) -> anyhow::Result<i64> {
        let mut tokens = expression.split_inclusive(['+', '-', '*', '/']).peekable();
        let (mut sum, mut product) = (0, None::<i64>);
        let (mut sign, mut operator) = (1, '+');
        while let Some(token) = tokens.next() {
            let next = token.chars().next_back().filter(|c| !c.is_ascii_digit());
            ensure!(next.is_some() == tokens.peek().is_some(), "broken expression {expression:?}");
            let number: i64 = token.trim_end_matches(['+', '-', '*', '/']).parse()?;
            product = Some(match (operator, product) {
                ('*', Some(product)) => product * number,
                ('/', Some(product)) => {
                    ensure!(product % number == 0, "{expression:?} is no whole number");
                    product / number
                }
                (_, None) => number,
                (_, Some(product)) => {
                    sum += sign * product;
                    sign = if operator == '-' { -1 } else { 1 };
                    number
                }
            });
            operator = next.unwrap_or('+');
        }
        Ok(sum + sign * product.context("empty expression")?)
    }

    /// All whole numbers in a text.
    fn numbers(text: &str) -> Vec<i64> {
        text.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
    }

    /// Checks one problem from its text alone.
    fn check(problem: &Problem) -> anyhow::Result<()> {
        let (solution, last) = problem.answer.rsplit_once("\n#### ").context("a last line")?;
        let mut known = numbers(&problem.question);
        for (word, number) in [("half", 2), ("twice", 2), ("three times", 3)] {
            if problem.question.contains(word) {
                known.push(number);
            }
        }
        let mut value = None;
        for line in solution.split('\n') {
            let [before, mark] = line.split("<<").collect::<Vec<_>>()[..] else { bail!("one mark a line") };
            let (mark, after) = mark.split_once(">>").context("a closed mark")?;
            let (expression, result) = mark.split_once('=').context("a result")?;
            let shown = before.trim_end_matches('$');
            ensure!(shown.ends_with(&format!(" {expression}=")), "the calculation is shown before its mark");
            ensure!(numbers(after).first() == numbers(result).first(), "the result is used behind its mark");
            ensure!(evaluate(expression)?.to_string() == result, "{expression} is not {result}");
            ensure!(numbers(expression).iter().all(|operand| known.contains(operand)), "an operand from nowhere");
            known.extend(numbers(result));
            value = Some(result);
        }
        ensure!(value == Some(last), "the last step gives the answer");
        ensure!(known.iter().all(|number| (1..1000).contains(number)), "small positive numbers: {known:?}");
        Ok(())
    }

    #[test]
    fn every_calculation_is_right_and_uses_what_is_known() -> anyhow::Result<()> {
        assert_eq!((evaluate("7-2*3+8/4")?, evaluate("12")?, evaluate("9-3-2")?), (3, 12, 4));
        assert!(evaluate("7/2").is_err() && evaluate("7+").is_err());
        for problem in [generate(5, 20_000, 0)?.training, generate_second(5, 20_000, 0)?.training].concat() {
            check(&problem).with_context(|| format!("{problem:#?}"))?;
        }
        Ok(())
    }

    #[test]
    fn the_check_sees_a_wrong_solution() {
        let problem = |answer: &str| Problem { kind: "", question: "Tom has 3 and 4.".into(), answer: answer.into() };
        assert!(check(&problem("It is 3+4=<<3+4=7>>7.\n#### 7")).is_ok());
        assert!(check(&problem("It is 3+4=<<3+4=8>>8.\n#### 8")).is_err());
        assert!(check(&problem("It is 3+4=<<3+4=7>>8.\n#### 7")).is_err());
        assert!(check(&problem("It is 3+5=<<3+5=8>>8.\n#### 8")).is_err());
        assert!(check(&problem("It is 3+4=<<3+4=7>>7.\n#### 8")).is_err());
    }

    #[test]
    fn no_held_out_question_occurs_in_training() -> Result<(), CorpusError> {
        let corpus = generate(1337, 40_000, 500)?;
        assert_eq!((corpus.training.len(), corpus.held_out.len()), (40_000, 500));
        let training: Vec<String> = corpus.training.iter().map(|problem| problem.question.to_lowercase()).collect();
        let text = training.join("\n");
        let mut all: Vec<String> = corpus.held_out.iter().map(|problem| problem.question.to_lowercase()).collect();
        assert!(all.iter().all(|question| !text.contains(question)));
        all.extend(training);
        all.sort_unstable();
        assert!(all.windows(2).all(|pair| pair[0] != pair[1]));
        Ok(())
    }

    #[test]
    fn all_kinds_come_equally_often() -> Result<(), CorpusError> {
        let training = generate(2, 16_000, 0)?.training;
        for kind in &KINDS {
            let of_kind = training.iter().filter(|problem| problem.kind == kind.name).count();
            assert!((850..1150).contains(&of_kind), "{}: {of_kind}", kind.name);
        }
        Ok(())
    }

    #[test]
    fn there_are_hundreds_of_thousands_of_problems() -> Result<(), CorpusError> {
        assert_eq!(generate(3, 400_000, 0)?.training.len(), 400_000);
        Ok(())
    }

    #[test]
    fn the_seed_alone_decides_and_more_training_keeps_the_held_out_problems() -> Result<(), CorpusError> {
        let corpus = generate(1, 300, 50)?;
        assert_eq!(corpus, generate(1, 300, 50)?);
        let longer = generate(1, 600, 50)?;
        assert_eq!((&corpus.held_out, &corpus.training[..]), (&longer.held_out, &longer.training[..300]));
        assert_ne!(corpus.held_out, generate(2, 300, 50)?.held_out);
        Ok(())
    }

    #[test]
    fn asking_for_more_than_there_is_ends_with_an_error() {
        let draft = |draw: &mut Draw| Draft { question: draw.number(1, 6).to_string(), steps: vec![], result: 1 };
        let die = [Kind { name: "die", draft }];
        assert_eq!(generate_from(&die, 0, 4, 2).map(|corpus| corpus.training.len()), Ok(4));
        assert_eq!(generate_from(&die, 0, 5, 2), Err(CorpusError { asked: 7, found: 6 }));
    }
}
