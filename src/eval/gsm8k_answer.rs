//! The final answer of a GSM8K solution, extracted and compared exactly as lm-evaluation-harness and OpenAI's grader do.
//!
//! The patterns are fixed and small, so they are matched by hand over the ASCII bytes that they are made of:
//! - strict-match: the first `#### (\-?[0-9\.\,]+)`
//! - flexible-extract: the last of the non-overlapping, leftmost matches of `(-?[$0-9.,]{2,})|(-?[0-9]+)`
//! - OpenAI: as strict-match, then the commas are removed.
//!
//! ```
//! # fn main() -> Result<(), vrtrain::eval::gsm8k_answer::GoldWithoutAnswer> {
//! let grade = vrtrain::eval::gsm8k_answer::grade("He has 70,000.\n#### 70000.", "...\n#### 70,000")?;
//! assert!(grade.strict && grade.flexible && !grade.openai);
//! # Ok(())
//! # }
//! ```

/// What stands before the final answer.
const MARKER: &str = "#### ";
const CHAIN_OF_THOUGHT_MARKER: &str = "The answer is ";

/// Whether a completion's answer counts as right, by each of the three rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grade {
    /// lm-evaluation-harness, `exact_match,strict-match`.
    pub strict: bool,
    /// lm-evaluation-harness, `exact_match,flexible-extract`.
    pub flexible: bool,
    /// OpenAI's grade-school-math, `is_correct`.
    pub openai: bool,
}

/// A reference solution that has no final answer to compare with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the reference solution has no line `#### NUMBER`: {0:?}; check the data set's answer column")]
pub struct GoldWithoutAnswer(pub String);

/// Grades a completion against the reference solution `gold` (the data set's whole `answer` text).
///
/// # Errors
/// When `gold` has no final answer.
pub fn grade(completion: &str, gold: &str) -> Result<Grade, GoldWithoutAnswer> {
    let Some(gold_answer) = openai_answer(gold) else { return Err(GoldWithoutAnswer(gold.to_owned())) };
    let reference = normalize(gold);
    let matches = |extracted: Option<&str>| extracted.is_some_and(|text| normalize(text) == reference);
    Ok(Grade {
        strict: matches(strict_match(completion)),
        flexible: matches(flexible_extract(completion)),
        openai: openai_answer(completion).is_some_and(|answer| answer == gold_answer),
    })
}

/// The number after the first marker that has one, as it is written.
pub fn strict_match(text: &str) -> Option<&str> {
    text.match_indices(MARKER).find_map(|(start, _)| {
        let rest = &text[start + MARKER.len()..];
        let sign = usize::from(rest.starts_with('-'));
        let length = run(&rest.as_bytes()[sign..], |byte| matches!(byte, b'0'..=b'9' | b'.' | b','));
        (length > 0).then(|| &rest[..sign + length])
    })
}

/// The number after the first `The answer is ` that has one, as `gsm8k_cot`'s pattern `The answer is (\-?[0-9\.\,]+).`
/// finds it: some character of the same line must follow, for which the number gives up its own last one at need.
pub fn chain_of_thought_match(text: &str) -> Option<&str> {
    text.match_indices(CHAIN_OF_THOUGHT_MARKER).find_map(|(start, _)| {
        let rest = &text[start + CHAIN_OF_THOUGHT_MARKER.len()..];
        let sign = usize::from(rest.starts_with('-'));
        let length = run(&rest.as_bytes()[sign..], |byte| matches!(byte, b'0'..=b'9' | b'.' | b','));
        let followed = rest[sign + length..].starts_with(|character| character != '\n');
        let length = if followed { length } else { length.saturating_sub(1) };
        (length > 0).then(|| &rest[..sign + length])
    })
}

/// Grades a chain of thought as `gsm8k_cot` does; OpenAI's rule is the same as ever.
///
/// # Errors
/// When `gold` has no final answer.
pub fn grade_chain_of_thought(completion: &str, gold: &str) -> Result<Grade, GoldWithoutAnswer> {
    let Some(answer) = gold.rsplit_once("####").map(|(_, answer)| normalize(answer.trim())) else {
        return Err(GoldWithoutAnswer(gold.to_owned()));
    };
    let matches = |extracted: Option<&str>| extracted.is_some_and(|text| normalize(text) == answer);
    let Grade { openai, .. } = grade(completion, gold)?;
    let strict = matches(chain_of_thought_match(completion));
    Ok(Grade { strict, flexible: matches(flexible_extract(completion)), openai })
}

/// The last thing in the text that looks like a number, as it is written.
pub fn flexible_extract(text: &str) -> Option<&str> {
    let bytes = text.as_bytes();
    let (mut start, mut last) = (0, None);
    while start < bytes.len() {
        let sign = usize::from(bytes[start] == b'-');
        let number = &bytes[start + sign..];
        let loose = run(number, |byte| matches!(byte, b'0'..=b'9' | b'$' | b'.' | b','));
        // Where the loose run is too short for the first alternative, it is one character: a digit or nothing.
        let length = if loose >= 2 { loose } else { run(number, |byte| byte.is_ascii_digit()) };
        if length == 0 {
            start += 1;
        } else {
            last = Some(&text[start..start + sign + length]);
            start += sign + length;
        }
    }
    last
}

/// The answer that OpenAI's grader compares.
pub fn openai_answer(text: &str) -> Option<String> {
    strict_match(text).map(|answer| answer.replace(',', ""))
}

/// What lm-evaluation-harness removes on both sides before it compares, in its order: `,`, `\$`, `(?s).*#### `, `\.$`;
/// then the case.
fn normalize(text: &str) -> String {
    let plain = text.replace([',', '$'], "");
    let answer = plain.rfind(MARKER).map_or(plain.as_str(), |start| &plain[start + MARKER.len()..]);
    // Python's `$` also matches before a final line break.
    let (body, line_break) = answer.strip_suffix('\n').map_or((answer, ""), |body| (body, "\n"));
    (body.strip_suffix('.').unwrap_or(body).to_owned() + line_break).to_lowercase()
}

/// How many of the first bytes are of `class`.
fn run(bytes: &[u8], class: impl Fn(&u8) -> bool) -> usize {
    bytes.iter().take_while(|byte| class(byte)).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;
    use serde::Deserialize;
    use std::path::Path;

    const NO_MATCH: &str = "[invalid]";

    #[derive(Deserialize)]
    struct Vector {
        completion: String,
        gold: String,
        strict: String,
        flex: String,
        openai: String,
        strict_ok: bool,
        flex_ok: bool,
        openai_ok: bool,
    }

    /// Extractions and scores that lm-evaluation-harness and OpenAI's code gave for each completion.
    #[test]
    fn extractions_and_scores_equal_those_of_the_original_graders() -> anyhow::Result<()> {
        let vectors: Vec<Vector> = serde_json::from_str(include_str!("../../tests/fixtures/gsm8k_vectors.json"))?;
        assert_eq!(vectors.len(), 16);
        for vector in vectors {
            let completion = vector.completion.as_str();
            assert_eq!(strict_match(completion).unwrap_or(NO_MATCH), vector.strict, "strict-match of {completion:?}");
            assert_eq!(flexible_extract(completion).unwrap_or(NO_MATCH), vector.flex, "flexible of {completion:?}");
            assert_eq!(openai_answer(completion).as_deref().unwrap_or(NO_MATCH), vector.openai, "{completion:?}");
            let expected = Grade { strict: vector.strict_ok, flexible: vector.flex_ok, openai: vector.openai_ok };
            assert_eq!(grade(completion, &vector.gold)?, expected, "{completion:?}");
        }
        Ok(())
    }

    #[derive(Deserialize)]
    struct Chains {
        completions: Vec<Chain>,
    }

    #[derive(Deserialize)]
    struct Chain {
        completion: String,
        gold: String,
        strict: ChainVerdict,
        flexible: ChainVerdict,
    }

    #[derive(Deserialize)]
    struct ChainVerdict {
        extracted: String,
        right: bool,
    }

    /// Verdicts of lm-evaluation-harness 0.4.13 (tests/fixtures/gsm8k/make.py).
    #[test]
    fn chains_of_thought_are_graded_as_lm_evaluation_harness_grades_them() -> anyhow::Result<()> {
        let chains: Chains = serde_json::from_str(include_str!("../../tests/fixtures/gsm8k/prompts.json"))?;
        assert_eq!(chains.completions.len(), 36);
        for Chain { completion, gold, strict, flexible } in chains.completions {
            assert_eq!(chain_of_thought_match(&completion).unwrap_or(NO_MATCH), strict.extracted, "{completion:?}");
            assert_eq!(flexible_extract(&completion).unwrap_or(NO_MATCH), flexible.extracted, "{completion:?}");
            let grade = grade_chain_of_thought(&completion, &gold)?;
            assert_eq!((grade.strict, grade.flexible), (strict.right, flexible.right), "{completion:?} {gold:?}");
        }
        Ok(())
    }

    /// Expected values from Python's `re.findall` with the patterns above.
    #[test]
    fn flexible_extraction_follows_the_regular_expression() {
        for (text, expected) in [
            ("5", Some("5")),
            ("-5", Some("-5")),
            ("$", None),
            ("$5", Some("$5")),
            ("-$5.", Some("-$5.")),
            ("x-.y", None),
            ("a--7b", Some("-7")),
            ("1,2 and 3.", Some("3.")),
            ("٣ 4 é", Some("4")),
            ("..", Some("..")),
            ("9-8", Some("-8")),
        ] {
            assert_eq!(flexible_extract(text), expected, "{text:?}");
        }
    }

    #[test]
    fn strict_match_skips_markers_without_a_number() {
        assert_eq!(strict_match("#### many\n#### -1,5"), Some("-1,5"));
        assert_eq!(strict_match("##### 7 apples"), Some("7"));
        assert_eq!(strict_match("####  7"), None);
        assert_eq!(strict_match("#### -"), None);
    }

    #[test]
    fn a_reference_without_an_answer_is_an_error() {
        assert_eq!(grade("#### 1", "no answer"), Err(GoldWithoutAnswer("no answer".into())));
    }

    /// The solutions that OpenAI published with their verdicts;
    /// their final line is `A: N` in place of `#### N`.
    #[test]
    fn published_solutions_are_graded_as_their_authors_graded_them() -> anyhow::Result<()> {
        let Ok(shared) = std::env::var("VRTRAIN_SHARED") else {
            println!("skipped: VRTRAIN_SHARED is not set");
            return Ok(());
        };
        let path = Path::new(&shared).join("data/gsm8k/example_model_solutions.jsonl");
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let marked = |solution: &serde_json::Value| {
            solution.as_str().map(|text| text.replace("\nA: ", "\n#### ")).context("a solution is a string")
        };
        let (mut problems, mut solutions) = (0, 0);
        for line in text.lines() {
            let problem: serde_json::Value = serde_json::from_str(line)?;
            let gold = marked(&problem["ground_truth"])?;
            for model in ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"] {
                let solution = &problem[model];
                let verdict = solution["is_correct"].as_bool().context("is_correct is true or false")?;
                let completion = marked(&solution["solution"])?;
                assert_eq!(grade(&completion, &gold)?.openai, verdict, "{model}: {completion:?}");
                solutions += 1;
            }
            problems += 1;
        }
        assert_eq!((problems, solutions), (1319, 5276));
        Ok(())
    }
}
