//! Chat templates: a conversation as the text that a model was trained on, rendered as transformers' apply_chat_template
//! does it.
//!
//! A template is Jinja source in chat_template.jinja or in tokenizer_config.json. It sees `messages`,
//! `add_generation_prompt`, the special tokens by their names (`bos_token`, `eos_token`, ...), `tools` and `documents`
//! (none), and the functions `raise_exception` and `strftime_now`.

use anyhow::{Context, Result, anyhow, bail};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{AutoEscape, Environment, ErrorKind};
use serde::{Deserialize, Serialize};
use serde_json::ser::Formatter;
use std::io::{self, Write};
use std::path::Path;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`, or whatever else the template knows.
    pub role: String,
    pub content: String,
}

impl Message {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// Whether the text ends with the beginning of a reply, for the model to go on from (`add_generation_prompt`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyOpening {
    Add,
    Omit,
}

/// A compiled template and the special tokens that it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and so on, in the order of the tokenizer's files.
    special_tokens: Vec<(String, String)>,
}

/// Name of the only template of an environment; an extension that would escape HTML is not in it.
const NAME: &str = "chat_template";
/// Keys of special tokens in the tokenizer's files.
const TOKENS: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// The function that tells a template the time.
const CLOCK: &str = "strftime_now";
/// What a template may cost, in instructions: a hundred times what a long conversation takes, and an end to any loop.
const FUEL: u64 = 20_000_000;

impl ChatTemplate {
    /// Reads the template of a model's folder: chat_template.jinja, else `chat_template` of tokenizer_config.json (of
    /// several the one named `default`). None where the folder has neither.
    ///
    /// # Errors
    /// When a file cannot be read, or what it holds is no template.
    pub fn load(folder: &Path) -> Result<Option<Self>> {
        let config = read_json(&folder.join("tokenizer_config.json"))?;
        let map = read_json(&folder.join("special_tokens_map.json"))?;
        let file = folder.join("chat_template.jinja");
        let (source, origin) = if file.is_file() {
            let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            (text, file)
        } else {
            let path = folder.join("tokenizer_config.json");
            match config.get("chat_template") {
                None | Some(serde_json::Value::Null) => return Ok(None),
                Some(found) => (named_default(found).with_context(|| path.display().to_string())?, path),
            }
        };
        let mut special_tokens = Vec::new();
        for name in TOKENS {
            let found = [&config, &map].into_iter().find_map(|file| token_text(file.get(name)?));
            special_tokens.extend(found.map(|text| (name.to_owned(), text)));
        }
        // Tokens under names of the model's own.
        if let Some(serde_json::Value::Object(extra)) = config.get("extra_special_tokens") {
            let named = extra.iter().filter_map(|(name, token)| Some((name.clone(), token_text(token)?)));
            special_tokens.extend(named);
        }
        let template = Self::new(source, special_tokens);
        template.map(Some).with_context(|| format!("the chat template in {}", origin.display()))
    }

    /// Compiles a template.
    ///
    /// # Errors
    /// When the source is no template.
    pub fn new(source: impl Into<String>, special_tokens: Vec<(String, String)>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| anyhow!(error))?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", python_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function(CLOCK, |format: String| written_time(&format, &jiff::ZonedDateTime::now()));
        let source = without_generation_marks(&source.into());
        environment.add_template_owned(NAME, source).map_err(|error| anyhow!("{error:#}"))?;
        Ok(Self { environment, special_tokens })
    }

    /// Whether what it writes depends on the day.
    pub fn asks_for_the_date(&self) -> bool {
        self.environment.get_template(NAME).is_ok_and(|template| template.source().contains(CLOCK))
    }

    /// The same template on a given day: to it, it is always that day's first moment.
    pub fn on(mut self, date: jiff::civil::Date) -> Result<Self> {
        let time =
            date.to_zoned_datetime(jiff::tz::TimeZone::UTC).with_context(|| format!("{date} is not a usable date"))?;
        self.environment.add_function(CLOCK, move |format: String| written_time(&format, &time));
        Ok(self)
    }

    /// The conversation as text.
    ///
    /// # Errors
    /// When the template refuses the conversation (roles that it does not know, or in an order that it does not take).
    pub fn render(&self, messages: &[Message], opening: ReplyOpening) -> Result<String> {
        let given = [
            ("messages", Value::from(Serde(messages))),
            ("add_generation_prompt", Value::from(opening == ReplyOpening::Add)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        let tokens = self.special_tokens.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str())));
        let context = Value::from_pairs(tokens.chain(given));
        let template = self.environment.get_template(NAME).map_err(|error| anyhow!(error))?;
        let rendered = template.render(context).map_err(|error| match error.detail() {
            Some(detail) => anyhow!("{detail} (line {} of the template)", error.line().unwrap_or(0)),
            None => anyhow!("{error:#}"),
        });
        rendered.context("the chat template cannot render this conversation")
    }
}

/// A time as a template asks for it.
fn written_time(format: &str, time: &jiff::ZonedDateTime) -> Result<String, minijinja::Error> {
    jiff::fmt::strtime::format(format, time)
        .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// A JSON file; null where there is none.
fn read_json(path: &Path) -> Result<serde_json::Value> {
    if !path.is_file() {
        return Ok(serde_json::Value::Null);
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))
}

/// A template, or of a list of `{name, template}` the default one.
fn named_default(value: &serde_json::Value) -> Result<String> {
    if let Some(source) = value.as_str() {
        return Ok(source.to_owned());
    }
    let entries = value.as_array().context("`chat_template` is neither a text nor a list of {name, template}")?;
    let default = entries.iter().find(|entry| entry["name"] == "default");
    match default.and_then(|entry| entry["template"].as_str()) {
        Some(source) => Ok(source.to_owned()),
        None => bail!("`chat_template` is a list without one named \"default\""),
    }
}

/// A special token: a string, or an object that describes an added token.
fn token_text(value: &serde_json::Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// Training templates mark the reply with `{% generation %} ... {% endgeneration %}`, a tag of transformers' own. It
/// writes nothing, so a block that is always there takes its place.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let tag = &rest[start..];
        let Some(end) = tag.find("%}") else { break };
        let inside = &tag[2..end];
        let word = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => word,
        };
        out.push_str(&rest[..start + 2]);
        out.push_str(&inside.replacen(word, replacement, 1));
        out.push_str("%}");
        rest = &tag[end + 2..];
    }
    out + rest
}

/// `tojson` as transformers gives it to templates: Python's json.dumps, no HTML escapes, `indent` and `separators`.
fn python_json(value: &Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    let failed =
        |error: &dyn std::fmt::Display| minijinja::Error::new(ErrorKind::InvalidOperation, format!("tojson: {error}"));
    let comma = if indent.is_some() { "," } else { ", " };
    let [item, key] = match separators {
        None => [comma.to_owned(), ": ".to_owned()],
        Some(separators) => separators.try_into().map_err(|_| failed(&"`separators` takes two strings"))?,
    };
    let mut json = Vec::new();
    let formatter = PythonJson { indent, item, key, depth: 0, empty: true };
    let mut serializer = serde_json::Serializer::with_formatter(&mut json, formatter);
    value.serialize(&mut serializer).map_err(|error| failed(&error))?;
    String::from_utf8(json).map(Value::from_safe_string).map_err(|error| failed(&error))
}

/// The spaces and line breaks of json.dumps.
struct PythonJson {
    indent: Option<usize>,
    /// Between items, and between a key and its value.
    item: String,
    key: String,
    depth: usize,
    /// The innermost list or object has no item yet.
    empty: bool,
}

impl PythonJson {
    fn begin<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.empty = true;
        writer.write_all(bracket)
    }

    fn next<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.empty = false;
        self.line(writer)
    }

    fn end<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !std::mem::replace(&mut self.empty, false) {
            self.line(writer)?;
        }
        writer.write_all(bracket)
    }

    /// A new line, where the text is indented.
    fn line<W: ?Sized + Write>(&self, writer: &mut W) -> io::Result<()> {
        match self.indent {
            Some(indent) => write!(writer, "\n{:width$}", "", width = indent * self.depth),
            None => Ok(()),
        }
    }
}

impl Formatter for PythonJson {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }
}

#[cfg(test)]
mod tests;
