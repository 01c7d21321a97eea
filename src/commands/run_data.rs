//! The data of a run: files found, opened and checked; running text is read as it is trained on, examples at once.

use super::setup::{LazyHub, chosen_files, refuse_idle_column, source_files};
use crate::config::{ConfigError, DataSource, ExampleColumns, ExamplesConfig, RunConfig, ValidationConfig};
use crate::data::{
    ChatFormat, ChatTemplate, CompletionFormat, DataSet, ExampleFormat, ExampleLimits, ExampleStream, Examples, Feed,
    NamedFiles, Order, Packing, Position, SourceFile, StreamSettings, Template, TextTokenizer, TokenStream,
    ValidationSet, plain_template,
};
use crate::train::short;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

/// The opened data of a run.
pub enum RunData {
    /// Running text, or token files, and how many tokens of the validation files are scored at most.
    Text {
        training: Arc<DataSet>,
        validation: Option<(Arc<DataSet>, u64)>,
    },
    Examples {
        training: Arc<Examples>,
        validation: Option<Arc<Examples>>,
    },
}

/// Files to train on, and files to validate with.
struct FoundFiles {
    training: Vec<SourceFile>,
    validation: Option<Vec<SourceFile>>,
}

/// Finds the files of the config; those that validate are left out of training.
fn find_files(config: &RunConfig, hub: &LazyHub) -> Result<FoundFiles> {
    let data = &config.data;
    let DataSource::Files(sources) = &data.source else { bail!("the quickstart's data are generated, not opened") };
    let mut training = source_files(sources, &data.files, hub, "data.source")?;
    refuse_repeats(&training, "data.source")?;
    let Some(ValidationConfig { source, files, .. }) = &data.validation else {
        return Ok(FoundFiles { training, validation: None });
    };
    let validation = match source {
        Some(DataSource::Files(own)) => source_files(own, files, hub, "data.validation.source")?,
        Some(DataSource::Quickstart) => bail!("the quickstart's data are generated, not opened"),
        // A file that the training source names is there to be trained on: it validates only where the globs say so.
        None => chosen_files(sources, files, NamedFiles::Chosen, hub, "data.source")?,
    };
    ensure!(!validation.is_empty(), "`data.validation.files` chooses no file of the source");
    refuse_repeats(&validation, "data.validation")?;
    // Wherever both come from: what validates is not trained on.
    let names: BTreeSet<&str> = validation.iter().map(|file| file.bytes.name()).collect();
    if source.is_some() && training.iter().all(|file| names.contains(file.bytes.name())) {
        // Asked for in so many words, as for a look at how far a model can learn by heart; `describe` says it.
        return Ok(FoundFiles { training, validation: Some(validation) });
    }
    training.retain(|file| !names.contains(file.bytes.name()));
    ensure!(!training.is_empty(), "`data.validation.files` takes every file of the source: none is left to train on");
    Ok(FoundFiles { training, validation: Some(validation) })
}

/// Refuses files that several entries of a list of sources name: they would be read several times.
fn refuse_repeats(files: &[SourceFile], key: &str) -> Result<()> {
    let mut seen = BTreeSet::new();
    match files.iter().find(|file| !seen.insert(file.bytes.name())) {
        None => Ok(()),
        Some(file) => {
            let message = format!("`{key}` names {} twice: name each file once", file.bytes.name());
            Err(ConfigError::flag(key, message).into())
        }
    }
}

/// Opens and checks the training and validation files. Examples need the tokenizer, its folder (for the chat template)
/// and the size of the model's vocabulary.
pub fn run_data(
    config: &RunConfig,
    hub: &LazyHub,
    tokenizer: Option<&TextTokenizer>,
    tokenizer_folder: Option<&Path>,
    vocabulary_size: usize,
) -> Result<RunData> {
    let FoundFiles { training, validation } = find_files(config, hub)?;
    let Some(examples) = &config.data.examples else {
        let column = &config.data.text_column;
        let all: Vec<SourceFile> = training.iter().chain(validation.iter().flatten()).cloned().collect();
        refuse_idle_column(&all, column, "data.text_column")?;
        let training = Arc::new(DataSet::open(training, column).context("the training data")?);
        let tokens = config.data.validation.as_ref().map_or(0, |validation| validation.tokens);
        let validation =
            validation.map(|files| DataSet::open(files, column).context("the validation data")).transpose()?;
        return Ok(RunData::Text { training, validation: validation.map(|set| (Arc::new(set), tokens)) });
    };
    let Some(tokenizer) = tokenizer else { bail!("examples are texts: set `tokenizer.source`") };
    let format = example_format(config, examples, tokenizer, tokenizer_folder)?;
    read_examples(config, examples, &training, validation.as_deref(), &format, tokenizer, vocabulary_size)
}

/// How the records of the config are read.
pub fn example_format(
    config: &RunConfig,
    examples: &ExamplesConfig,
    tokenizer: &TextTokenizer,
    tokenizer_folder: Option<&Path>,
) -> Result<ExampleFormat> {
    Ok(match &examples.format {
        ExampleColumns::Completion { prompt_column, completion_column, template } => {
            let template = Template::parse(template).map_err(|why| {
                config.settings.0.error("data.template", format!("`data.template` = {template:?}: {why}"))
            })?;
            let (prompt_column, completion_column) = (prompt_column.clone(), completion_column.clone());
            ExampleFormat::Completion(CompletionFormat { prompt_column, completion_column, template })
        }
        ExampleColumns::Chat { messages_column, date } => {
            let own = tokenizer_folder.map(ChatTemplate::load).transpose()?.flatten();
            let template = match (own, date) {
                (Some(template), Some(date)) => template.on(*date)?,
                (Some(template), None) => template,
                (None, _) => ChatTemplate::new(plain_chat_template(tokenizer)?, Vec::new())?,
            };
            ExampleFormat::Chat(Box::new(ChatFormat { messages_column: messages_column.clone(), template }))
        }
    })
}

/// Settles the day that the chat template is told, if it asks for one: the config's, else this one.
///
/// # Errors
/// When the config gives one to a template that does not ask.
pub fn settle_date(config: &mut RunConfig, tokenizer_folder: Option<&Path>) -> Result<()> {
    let Some(date) = config.data.examples.as_mut().and_then(ExamplesConfig::date_mut) else { return Ok(()) };
    let template = tokenizer_folder.map(ChatTemplate::load).transpose()?.flatten();
    if template.is_some_and(|template| template.asks_for_the_date()) {
        date.get_or_insert_with(|| jiff::ZonedDateTime::now().date());
    } else if date.is_some() {
        let message = "`data.date` has no meaning here: the chat template writes no date; leave it out";
        return Err(config.settings.0.error("data.date", message).into());
    }
    Ok(())
}

/// The chat template of a tokenizer without one.
pub fn plain_chat_template(tokenizer: &TextTokenizer) -> Result<String> {
    let end = tokenizer.token(tokenizer.end_of_answer()).context("the tokenizer's end token has no text")?;
    Ok(plain_template(&end))
}

/// Reads and tokenises examples to train on and to hold out.
pub fn read_examples(
    config: &RunConfig,
    examples: &ExamplesConfig,
    training: &[SourceFile],
    validation: Option<&[SourceFile]>,
    format: &ExampleFormat,
    tokenizer: &TextTokenizer,
    vocabulary_size: usize,
) -> Result<RunData> {
    let (row_length, too_long) = (config.train.sequence_length, examples.too_long);
    let limits = ExampleLimits { row_length, too_long, vocabulary_size, most: usize::MAX };
    let read = |files: &[SourceFile], most: usize, what: &'static str| {
        Examples::read(files, format, tokenizer, ExampleLimits { most, ..limits }).map(Arc::new).context(what)
    };
    let most = config.data.validation.as_ref().and_then(|validation| validation.examples).unwrap_or(usize::MAX);
    let training = read(training, usize::MAX, "the training examples")?;
    let validation = validation.map(|files| read(files, most, "the validation examples")).transpose()?;
    Ok(RunData::Examples { training, validation })
}

impl RunData {
    /// Starts reading at the beginning or at `from`. Waits for the first row: what cannot be read is refused now.
    pub fn feed(
        &self,
        config: &RunConfig,
        tokenizer: Option<&TextTokenizer>,
        vocabulary_size: usize,
        from: Option<&Position>,
    ) -> Result<Feed> {
        match self {
            Self::Text { training, .. } => {
                let settings = stream_settings(config, vocabulary_size);
                let mut stream = TokenStream::open(Arc::clone(training), tokenizer, &settings, from)?;
                stream.epoch().context("cannot read the training data")?;
                Ok(Feed::Text(Box::new(stream)))
            }
            Self::Examples { training, .. } => Ok(Feed::Examples(Box::new(example_stream(config, training, from)?))),
        }
    }

    /// The validation batches of a run.
    pub fn validation_set(
        &self,
        config: &RunConfig,
        tokenizer: Option<&TextTokenizer>,
        vocabulary_size: usize,
    ) -> Result<Option<ValidationSet>> {
        let (micro_batch, row_length) = (config.train.micro_batch, config.train.sequence_length);
        match self {
            Self::Text { validation: None, .. } | Self::Examples { validation: None, .. } => Ok(None),
            Self::Text { validation: Some((set, tokens)), .. } => {
                let settings = StreamSettings { order: Order::Sequential, ..stream_settings(config, vocabulary_size) };
                let set = ValidationSet::open(Arc::clone(set), tokenizer, &settings, *tokens, micro_batch);
                Ok(Some(set.context("the validation data")?))
            }
            Self::Examples { validation: Some(examples), .. } => {
                let tokens = config.data.validation.as_ref().map_or(u64::MAX, |validation| validation.tokens);
                Ok(Some(examples.validation_set(row_length, packing(config), micro_batch, tokens)))
            }
        }
    }

    /// What is trained on, for people.
    pub fn describe(&self, validation: Option<&ValidationSet>) -> Vec<String> {
        let held_out =
            validation.map_or("no validation".into(), |set| format!("validation on {} tokens", set.tokens()));
        match self {
            Self::Text { training, validation } => {
                let itself = validation
                    .as_ref()
                    .is_some_and(|(set, _)| set.names().iter().any(|name| training.names().contains(name)));
                let held_out = if itself { held_out + " of the training data itself" } else { held_out };
                let summary = training.summary();
                let amount = match (summary.tokens, summary.documents) {
                    (Some(tokens), _) => format!("{} tokens", short(tokens as f64)),
                    (None, Some(documents)) => format!("{documents} documents, {}B", short(summary.read_bytes as f64)),
                    (None, None) => format!("{}B of text", short(summary.bytes as f64)),
                };
                let files = if summary.files == 1 { "1 file".to_owned() } else { format!("{} files", summary.files) };
                vec![format!("data       {files}, {amount}; {held_out}")]
            }
            Self::Examples { training, validation } => {
                let mut lines = vec![format!("data       {}", training.describe())];
                lines.extend(
                    validation.as_ref().map(|examples| format!("held out   {}; {held_out}", examples.describe())),
                );
                lines
            }
        }
    }

    /// Bytes that an epoch fetches; examples are fetched once.
    pub fn read_bytes(&self) -> u64 {
        match self {
            Self::Text { training, .. } => training.summary().read_bytes,
            Self::Examples { training, .. } => training.bytes(),
        }
    }
}

fn order(config: &RunConfig) -> Order {
    if config.data.shuffle { Order::Shuffled { seed: config.seed } } else { Order::Sequential }
}

fn packing(config: &RunConfig) -> Packing {
    let packed = config.data.examples.as_ref().is_some_and(|examples| examples.packing);
    if packed { Packing::Packed } else { Packing::OneExampleARow }
}

/// A stream of the examples, as the config orders and packs them.
pub fn example_stream(config: &RunConfig, examples: &Arc<Examples>, from: Option<&Position>) -> Result<ExampleStream> {
    let row_length = config.train.sequence_length;
    ExampleStream::open(Arc::clone(examples), order(config), row_length, packing(config), from)
}

/// How a stream of running text is cut and read.
pub fn stream_settings(config: &RunConfig, vocabulary_size: usize) -> StreamSettings {
    let train = &config.train;
    StreamSettings {
        sequence_length: train.sequence_length,
        order: order(config),
        vocabulary_size,
        threads: config.data.tokenizer_threads,
        // Several steps ahead, so that one slow fetch does not stop the trainer.
        queue_tokens: (4 * train.tokens_per_step).max(1 << 18),
    }
}
