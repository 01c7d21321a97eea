//! `[data]` of fine-tuning: what a record holds, how rows are made of it, and what becomes of long ones.

use super::resolve::choice;
use super::{ConfigError, Settings};
use jiff::civil::Date;
use toml::Value;

/// What `data.format` other than "text" asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExamplesConfig {
    pub format: ExampleColumns,
    /// Whether a row holds several examples, each of which attends to itself alone.
    pub packing: bool,
    pub too_long: TooLong,
}

/// Where a record's texts are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExampleColumns {
    /// A prompt and its completion; `template` holds `{prompt}` and `{completion}`.
    Completion { prompt_column: String, completion_column: String, template: String },
    /// A list of messages, or Open Assistant's exports; `date` is what a chat template that asks for the day is told, and
    /// `None` until it is known whether it does.
    Chat { messages_column: String, date: Option<Date> },
}

impl ExamplesConfig {
    /// The day that the chat template is told, if there may be one.
    pub fn date_mut(&mut self) -> Option<&mut Option<Date>> {
        match &mut self.format {
            ExampleColumns::Chat { date, .. } => Some(date),
            ExampleColumns::Completion { .. } => None,
        }
    }
}

/// What becomes of an example that is longer than a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TooLong {
    /// The run is refused.
    Error,
    /// It is left out.
    Drop,
    /// Its end is cut off.
    Truncate,
}

const TOO_LONG: [(&str, TooLong); 3] =
    [("error", TooLong::Error), ("drop", TooLong::Drop), ("truncate", TooLong::Truncate)];

/// Keys that one format alone takes.
const COMPLETION_KEYS: &[&str] = &["data.prompt_column", "data.completion_column", "data.template"];
const CHAT_KEYS: &[&str] = &["data.messages_column", "data.date"];
/// Keys that both of them take, and running text does not.
const EXAMPLE_KEYS: &[&str] = &[
    "data.packing",
    "data.too_long",
    "data.validation.examples",
    "train.eval_exact_match",
    "train.exact_match_tokens",
];
const TEXT_KEYS: &[&str] = &["data.text_column"];

#[derive(Clone, Copy, PartialEq)]
enum Format {
    Text,
    Completion,
    Chat,
}

/// The examples' part of the settings; `None` for running text.
pub fn resolve(settings: &Settings) -> Result<Option<ExamplesConfig>, ConfigError> {
    let words = [("text", Format::Text), ("completion", Format::Completion), ("chat", Format::Chat)];
    let format = choice(settings, "data.format", Format::Text, &words)?;
    let word = settings.text("data.format").unwrap_or("text");
    let foreign: Vec<&str> = match format {
        Format::Text => [COMPLETION_KEYS, CHAT_KEYS, EXAMPLE_KEYS].concat(),
        Format::Completion => [CHAT_KEYS, TEXT_KEYS].concat(),
        Format::Chat => [COMPLETION_KEYS, TEXT_KEYS, &["train.eval_exact_match", "train.exact_match_tokens"]].concat(),
    };
    if let Some(key) = foreign.into_iter().find(|key| settings.is_set(key)) {
        let message =
            format!("`{key}` has no meaning for `data.format` = {word:?}; leave it out, or change the format");
        return Err(settings.error(key, message));
    }
    let text = |key: &str, default: &str| settings.text(key).unwrap_or(default).to_owned();
    let format = match format {
        Format::Text => return Ok(None),
        Format::Completion => ExampleColumns::Completion {
            prompt_column: text("data.prompt_column", "prompt"),
            completion_column: text("data.completion_column", "completion"),
            template: text("data.template", "{prompt}{completion}"),
        },
        Format::Chat => ExampleColumns::Chat {
            messages_column: text("data.messages_column", "messages"),
            date: settings.date("data.date"),
        },
    };
    Ok(Some(ExamplesConfig {
        format,
        packing: settings.truth("data.packing").unwrap_or(true),
        too_long: choice(settings, "data.too_long", TooLong::Error, &TOO_LONG)?,
    }))
}

/// The keys of a resolved config.
pub fn entries(examples: &ExamplesConfig) -> Vec<(&'static str, Value)> {
    let text = |text: &str| Value::String(text.to_owned());
    let mut entries = match &examples.format {
        ExampleColumns::Completion { prompt_column, completion_column, template } => vec![
            ("data.format", text("completion")),
            ("data.prompt_column", text(prompt_column)),
            ("data.completion_column", text(completion_column)),
            ("data.template", text(template)),
        ],
        ExampleColumns::Chat { messages_column, date } => {
            let mut entries = vec![("data.format", text("chat")), ("data.messages_column", text(messages_column))];
            entries.extend(date.map(|date| ("data.date", text(&date.to_string()))));
            entries
        }
    };
    let word = TOO_LONG.iter().find(|(_, value)| *value == examples.too_long).map_or("error", |(word, _)| word);
    entries.extend([("data.packing", Value::Boolean(examples.packing)), ("data.too_long", text(word))]);
    entries
}
