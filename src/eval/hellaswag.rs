//! HellaSwag: which of four endings a model finds likeliest, normalised in three ways.

use super::continuation::Score;

/// A context and its endings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    pub context: String,
    pub endings: Vec<String>,
    /// The right ending's place.
    pub label: usize,
}

/// The places of the endings that each rule chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// By the summed log-likelihood.
    pub total: usize,
    /// By the sum over the ending's characters (lm-evaluation-harness, `acc_norm`).
    pub by_characters: usize,
    /// By the sum over the ending's tokens (llm.c).
    pub by_tokens: usize,
}

impl Item {
    /// As lm-evaluation-harness writes it: the activity before the context, WikiHow's marks taken out.
    pub fn of_activity(activity: &str, context_a: &str, context_b: &str, endings: &[String], label: usize) -> Self {
        let context = format!("{activity}: {context_a} {}", capitalized(context_b));
        Self::cleaned(&context, endings, label)
    }

    /// A context that holds the activity already.
    pub fn cleaned(context: &str, endings: &[String], label: usize) -> Self {
        let endings = endings.iter().map(|ending| without_marks(ending)).collect();
        Self { context: without_marks(context), endings, label }
    }

    /// Chooses by the scores of the endings, in their order; of equal ones the first.
    pub fn choose(&self, scores: &[Score]) -> Choice {
        let best = |measure: &dyn Fn(usize) -> f64| {
            (1..scores.len()).fold(0, |best, place| if measure(place) < measure(best) { place } else { best })
        };
        Choice {
            total: best(&|place| scores[place].nll),
            by_characters: best(&|place| scores[place].nll / self.endings[place].chars().count().max(1) as f64),
            by_tokens: best(&|place| scores[place].nll / scores[place].tokens.max(1) as f64),
        }
    }
}

/// Python's `str.capitalize`.
fn capitalized(text: &str) -> String {
    let mut characters = text.chars();
    let first = characters.next().into_iter().flat_map(char::to_uppercase);
    first.chain(characters.as_str().to_lowercase().chars()).collect()
}

/// Takes out the marks in brackets: `strip`, ` [title]` -> `. `, `\[.*?\]` -> nothing, two spaces -> one.
fn without_marks(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let mut cleaned = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(start) = rest.find('[') {
        // A mark ends on its own line.
        let end = rest[start..].find([']', '\n']).filter(|&end| rest.as_bytes()[start + end] == b']');
        let after = end.map_or(start + 1, |end| start + end + 1);
        cleaned += if end.is_some() { &rest[..start] } else { &rest[..after] };
        rest = &rest[after..];
    }
    (cleaned + rest).replace("  ", " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected values from lm-evaluation-harness 0.4.13, tasks/hellaswag/utils.py.
    #[test]
    fn texts_are_cleaned_as_lm_evaluation_harness_cleans_them() {
        for (text, expected) in [
            ("  a [title] b [step] c  ", "a. b c"),
            ("[header] How to x [title] Do y. [substeps] Z", " How to x. Do y. Z"),
            ("a [open b", "a [open b"),
            ("a ] b [c] d]", "a ] b d]"),
            ("two   spaces    four", "two  spaces  four"),
            ("a [x\ny] b [z]", "a [x\ny] b "),
            ("[] é[[a]]", " é]"),
        ] {
            assert_eq!(without_marks(text), expected, "{text:?}");
        }
        let item = Item::of_activity("Doing x", "A man [step] sits.", "éTHE dog", &[" runs [title] off".into()], 0);
        assert_eq!(item.context, "Doing x: A man sits. Éthe dog");
        assert_eq!(item.endings, ["runs. off"]);
    }

    #[test]
    fn each_rule_chooses_by_its_own_measure_and_the_first_of_equals() {
        let endings = ["aaaaaaaaaa", "éé", "c", "c"].map(String::from).to_vec();
        let item = Item { context: String::new(), endings, label: 0 };
        let score = |nll, tokens| Score { nll, tokens, greedy: false };
        let scores = [score(10.0, 2), score(4.0, 1), score(3.0, 1), score(3.0, 1)];
        assert_eq!(item.choose(&scores), Choice { total: 2, by_characters: 0, by_tokens: 2 });
    }
}
