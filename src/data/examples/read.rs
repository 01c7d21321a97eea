//! From files to tokenised examples.

use super::chat::{self, Conversation};
use super::completion::{self, Template};
use super::oasst::{self, Thread};
use super::{Example, ExampleCounts, Examples};
use crate::config::TooLong;
use crate::data::chat_template::ChatTemplate;
use crate::data::chat_tokens::ChatTokenizer;
use crate::data::files::SourceFile;
use crate::data::records::{self, Columns, Record};
use crate::data::tokenizer::{TextEncoder, TextTokenizer};
use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use serde_json::{Map, Value};

/// What a record holds.
pub enum ExampleFormat {
    Completion(CompletionFormat),
    Chat(Box<ChatFormat>),
}

/// A prompt and its completion, in two columns.
#[derive(Clone, Debug)]
pub struct CompletionFormat {
    pub prompt_column: String,
    pub completion_column: String,
    pub template: Template,
}

/// A conversation: a column of messages, or Open Assistant's exports, which are known by their columns.
pub struct ChatFormat {
    pub messages_column: String,
    pub template: ChatTemplate,
}

/// What an example must keep to.
#[derive(Clone, Copy, Debug)]
pub struct ExampleLimits {
    /// Positions of a row.
    pub row_length: usize,
    pub too_long: TooLong,
    /// Ids must be smaller than this.
    pub vocabulary_size: usize,
    /// Records used at most.
    pub most: usize,
}

/// How texts become ids.
pub struct Encoder {
    pub text: TextEncoder,
    pub chat: ChatTokenizer,
    /// Ends an answer.
    pub end: u32,
}

impl Encoder {
    fn new(tokenizer: &TextTokenizer) -> Result<Self> {
        let (text, chat) = (tokenizer.text_encoder()?, ChatTokenizer::new(tokenizer)?);
        Ok(Self { text, chat, end: tokenizer.end_of_answer() })
    }
}

/// A record's texts, and where it stands.
enum Item {
    Completion { prompt: String, completion: String, place: String },
    Chat { conversation: Conversation, place: String },
}

impl Examples {
    /// Reads and tokenises all of `files`, in their order.
    ///
    /// # Errors
    /// When a file cannot be read, a column is missing or no text, roles are out of order, an example is longer than a
    /// row and may not be cut or left out, or no example is left.
    pub fn read(
        files: &[SourceFile],
        format: &ExampleFormat,
        tokenizer: &TextTokenizer,
        limits: ExampleLimits,
    ) -> Result<Self> {
        let mut counts = ExampleCounts::default();
        let mut items = match format {
            ExampleFormat::Completion(format) => completion_items(files, format, &mut counts)?,
            ExampleFormat::Chat(format) => chat_items(files, format, &mut counts)?,
        };
        items.truncate(limits.most);
        counts.records = items.len();
        let encoder = Encoder::new(tokenizer)?;
        let encoded: Vec<Result<Option<Example>>> = items
            .par_iter()
            .map(|item| {
                let example = match (item, format) {
                    (Item::Completion { prompt, completion, .. }, ExampleFormat::Completion(format)) => {
                        completion::encode(&format.template, prompt, completion, &encoder)
                    }
                    (Item::Chat { conversation, .. }, ExampleFormat::Chat(format)) => {
                        chat::encode(&format.template, conversation, &encoder.chat)
                    }
                    _ => unreachable!("items are of their format"),
                };
                example.with_context(|| item.place().to_owned())
            })
            .collect();
        let mut list = Vec::with_capacity(items.len());
        let mut too_long = TooLongExamples::default();
        for (item, example) in items.iter().zip(encoded) {
            match example? {
                Some(example) => list.extend(limits.fit(example, item.place(), &mut counts, &mut too_long)?),
                None => counts.without_answer += 1,
            }
        }
        too_long.check(limits)?;
        counts.tokens = list.iter().map(|example| example.ids.len() as u64).sum();
        counts.answer_tokens = list.iter().map(|example| example.answer_tokens() as u64).sum();
        counts.longest = list.iter().map(|example| example.ids.len()).max().unwrap_or(0);
        let examples = Self::new(list, counts, files, encoder.end);
        ensure!(!examples.list.is_empty(), "there is no example to use: {}", examples.describe());
        Ok(examples)
    }
}

impl Item {
    fn place(&self) -> &str {
        match self {
            Self::Completion { place, .. } | Self::Chat { place, .. } => place,
        }
    }
}

/// Examples that are an error for their length.
#[derive(Default)]
struct TooLongExamples {
    count: usize,
    first: Option<(String, usize)>,
}

impl TooLongExamples {
    fn check(&self, limits: ExampleLimits) -> Result<()> {
        let Some((place, tokens)) = &self.first else { return Ok(()) };
        bail!(
            "{place} has {tokens} tokens, but a row holds {} (`train.sequence_length` + 1); {} of the examples are too \
             long: raise `train.sequence_length`, or set `data.too_long` to \"drop\" or \"truncate\"",
            limits.row_length + 1,
            self.count
        )
    }
}

impl ExampleLimits {
    /// Applies the policy for long examples.
    fn fit(
        &self,
        mut example: Example,
        place: &str,
        counts: &mut ExampleCounts,
        too_long: &mut TooLongExamples,
    ) -> Result<Option<Example>> {
        if let Some(id) = example.ids.iter().find(|&&id| id as usize >= self.vocabulary_size) {
            bail!(
                "{place} gives the id {id}, but the model's vocabulary has {}: tokenizer and model do not belong together",
                self.vocabulary_size
            );
        }
        if example.positions() <= self.row_length {
            return Ok(Some(example));
        }
        match self.too_long {
            TooLong::Error => {
                too_long.count += 1;
                too_long.first.get_or_insert_with(|| (place.to_owned(), example.ids.len()));
                Ok(None)
            }
            TooLong::Drop => {
                counts.dropped += 1;
                Ok(None)
            }
            TooLong::Truncate => {
                let end = self.row_length + 1;
                example.ids.truncate(end);
                example.answers.retain(|answer| answer.start < end);
                example.answers.iter_mut().for_each(|answer| answer.end = answer.end.min(end));
                if example.answers.is_empty() {
                    counts.without_answer += 1;
                    return Ok(None);
                }
                counts.truncated += 1;
                Ok(Some(example))
            }
        }
    }
}

/// A column's text; `None` for null.
fn text<'a>(record: &'a Map<String, Value>, column: &str) -> Result<Option<&'a str>> {
    match record.get(column) {
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Null) => Ok(None),
        Some(_) => bail!("its column `{column}` is not a text"),
        None => bail!("it has no column `{column}`; its columns are {}", columns(record)),
    }
}

fn columns(record: &Map<String, Value>) -> String {
    record.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
}

fn completion_items(files: &[SourceFile], format: &CompletionFormat, counts: &mut ExampleCounts) -> Result<Vec<Item>> {
    let CompletionFormat { prompt_column, completion_column, .. } = format;
    let mut items = Vec::new();
    for record in records::read(files, Columns::These(&[prompt_column, completion_column]))? {
        let place = record.place().to_owned();
        let column = |name: &str| text(record.fields(), name).with_context(|| place.clone());
        match (column(prompt_column)?, column(completion_column)?) {
            (Some(prompt), Some(completion)) => {
                let (prompt, completion) = (prompt.to_owned(), completion.to_owned());
                items.push(Item::Completion { prompt, completion, place });
            }
            _ => counts.nulls += 1,
        }
    }
    Ok(items)
}

fn chat_items(files: &[SourceFile], format: &ChatFormat, counts: &mut ExampleCounts) -> Result<Vec<Item>> {
    let column = &format.messages_column;
    let wanted: Vec<&str> = std::iter::once(column.as_str()).chain(oasst::COLUMNS.iter().copied()).collect();
    let records = records::read(files, Columns::These(&wanted))?;
    let first = records.first().map(Record::fields);
    if first.is_some_and(|fields| !fields.contains_key(column) && oasst::is_oasst(fields)) {
        let threads = oasst::threads(&records, counts)?;
        let item = |Thread { messages, place }| Item::Chat { conversation: Conversation::new(messages), place };
        return Ok(threads.into_iter().map(item).collect());
    }
    let mut items = Vec::new();
    for record in &records {
        let place = record.place().to_owned();
        let conversation = match record.fields().get(column) {
            Some(Value::Null) => {
                counts.nulls += 1;
                continue;
            }
            Some(value) => chat::conversation(value).with_context(|| format!("`{column}` in {place}"))?,
            None => bail!("{place} has no column `{column}` of messages; its columns are {}", columns(record.fields())),
        };
        counts.unanswered += usize::from(conversation.unanswered);
        items.push(Item::Chat { conversation, place });
    }
    Ok(items)
}
