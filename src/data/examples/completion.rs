//! A prompt and its completion, put into a template.

use super::Example;
use super::read::Encoder;
use anyhow::Result;

/// A text with the places `{prompt}` and `{completion}`; `{{` and `}}` stand for braces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    before: String,
    between: String,
    after: String,
}

impl Template {
    /// Parses `text`; the error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = vec![String::new()];
        let mut names = Vec::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            let (plain, found) = rest.split_at(at);
            let last = parts.last_mut().ok_or("an empty template")?;
            last.push_str(plain);
            if let Some(after) = found.strip_prefix("{{").or(found.strip_prefix("}}")) {
                last.push_str(&found[..1]);
                rest = after;
                continue;
            }
            let inside = found.strip_prefix('{').and_then(|inside| inside.split_once('}'));
            let Some((name, after)) = inside else {
                return Err(format!("a brace without its partner at {found:?} (a brace that is text is doubled)"));
            };
            if !["prompt", "completion"].contains(&name) {
                return Err(format!("{{{name}}} is not a place in it: the places are {{prompt}} and {{completion}}"));
            }
            names.push(name);
            parts.push(String::new());
            rest = after;
        }
        if let Some(last) = parts.last_mut() {
            last.push_str(rest);
        }
        match (&names[..], &parts[..]) {
            (["prompt", "completion"], [before, between, after]) => {
                Ok(Self { before: before.clone(), between: between.clone(), after: after.clone() })
            }
            _ => Err("it needs {prompt} once and after it {completion} once".into()),
        }
    }

    /// What the model is given.
    pub fn question(&self, prompt: &str) -> String {
        format!("{}{prompt}{}", self.before, self.between)
    }

    /// What it learns to write.
    pub fn answer(&self, completion: &str) -> String {
        format!("{completion}{}", self.after)
    }
}

/// Question and answer tokenised apart, then the end token; `None` where the completion is empty.
pub fn encode(template: &Template, prompt: &str, completion: &str, encoder: &Encoder) -> Result<Option<Example>> {
    if completion.is_empty() {
        return Ok(None);
    }
    let mut ids = encoder.text.first(&template.question(prompt))?;
    // The first token of a text is predicted from nothing.
    let start = ids.len().max(1);
    ids.extend(encoder.text.next(&template.answer(completion))?);
    ids.push(encoder.end);
    let end = ids.len();
    Ok((start < end).then(|| Example { ids, answers: std::iter::once(start..end).collect() }))
}
