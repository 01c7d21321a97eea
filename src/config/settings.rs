//! Raw settings: a config file and `--set` overrides merged into one checked map of key -> value, each with its origin.

use super::ConfigError;
use super::schema::{self, Kind};
use jiff::civil::Date;
use std::collections::BTreeMap;
use std::path::Path;
use toml::Value;
use toml::de::{DeTable, DeValue};

/// Where a value was written, as an error message shows it: `gpt2.toml:14` or `--set optimizer.lr=1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin(pub String);

impl Origin {
    fn is_assignment(&self) -> bool {
        self.0.starts_with("--set")
    }
}

/// The settings that the user gave, by full key (`train.steps`).
#[derive(Clone, Debug, Default)]
pub struct Settings {
    values: BTreeMap<String, (Value, Origin)>,
}

/// The three ways to give a run's length, of which it takes one.
pub(super) const LENGTHS: [&str; 3] = ["train.steps", "train.tokens", "train.epochs"];

impl Settings {
    /// Reads a config file.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::flag("--config", format!("cannot read {}: {error}", path.display())))?;
        let name = path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into());
        Self::from_toml(&text, &name)
    }

    /// Reads the text of a config file; `name` stands in error messages.
    pub fn from_toml(text: &str, name: &str) -> Result<Self, ConfigError> {
        let line = |offset: usize| text[..offset.min(text.len())].matches('\n').count() + 1;
        let at = |offset: usize| Origin(format!("{name}:{}", line(offset)));
        let document = DeTable::parse(text).map_err(|error| {
            let origin = at(error.span().map_or(0, |span| span.start));
            ConfigError::new(&origin, format!("this is not valid TOML: {}", error.message()))
        })?;
        let mut settings = Self::default();
        let mut pending = vec![(String::new(), document.into_inner())];
        while let Some((path, table)) = pending.pop() {
            for (key, value) in table {
                let full =
                    if path.is_empty() { key.get_ref().to_string() } else { format!("{path}.{}", key.get_ref()) };
                let origin = at(key.span().start);
                match value.into_inner() {
                    DeValue::Table(inner) if full == "lora" && inner.is_empty() => return Err(empty_lora(&origin)),
                    DeValue::Table(inner) if schema::is_section(&full) => pending.push((full, inner)),
                    other => settings.insert(full, plain(other, &origin)?, origin)?,
                }
            }
        }
        Ok(settings)
    }

    /// Applies `--set key=value`; the value is TOML, quotes may be left out of a plain string.
    pub fn set(&mut self, assignment: &str) -> Result<(), ConfigError> {
        let origin = Origin(format!("--set {assignment}"));
        let Some((key, text)) = assignment.split_once('=') else {
            return Err(ConfigError::new(&origin, "expected section.key=value".into()));
        };
        let (key, text) = (key.trim(), text.trim());
        let value = match DeValue::parse(text) {
            Ok(value) => value.into_inner(),
            Err(_) if matches!(schema::kind_of(key), Some(Kind::Text | Kind::Texts | Kind::Date | Kind::Optimizer)) => {
                DeValue::String(text.to_owned().into())
            }
            Err(error) => {
                let message = format!("the value is not valid TOML: {}", error.message());
                return Err(ConfigError::new(&origin, message));
            }
        };
        let mut pending = vec![(key.to_owned(), value)];
        while let Some((path, value)) = pending.pop() {
            match value {
                DeValue::Table(inner) if path == "lora" && inner.is_empty() => return Err(empty_lora(&origin)),
                DeValue::Table(inner) if schema::is_section(&path) => {
                    for (key, value) in inner {
                        pending.push((format!("{path}.{}", key.get_ref()), value.into_inner()));
                    }
                }
                other => {
                    let value = plain(other, &origin)?;
                    if LENGTHS.contains(&path.as_str()) {
                        self.forget_lengths_of_the_file();
                    }
                    self.insert(path, value, origin.clone())?;
                }
            }
        }
        Ok(())
    }

    /// A length given on the command line stands in place of the config's, in whichever unit that is; two given there
    /// still conflict.
    fn forget_lengths_of_the_file(&mut self) {
        self.values.retain(|key, (_, origin)| !LENGTHS.contains(&key.as_str()) || origin.is_assignment());
    }

    fn insert(&mut self, key: String, value: Value, origin: Origin) -> Result<(), ConfigError> {
        let Some(kind) = schema::kind_of(&key) else {
            let what = if schema::is_section(&key) { "a section, not a value" } else { "not a key of vrtrain" };
            let hint = schema::nearest(&key).filter(|near| *near != key);
            let hint = hint.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
            return Err(ConfigError::new(&origin, format!("`{key}` is {what}{hint}")));
        };
        let fits = match kind {
            Kind::Whole => matches!(value, Value::Integer(number) if number >= 0),
            Kind::Number => matches!(value, Value::Integer(_) | Value::Float(_)),
            Kind::Truth => value.is_bool(),
            Kind::Text => value.is_str(),
            Kind::Texts => value.is_str() || value.as_array().is_some_and(|list| list.iter().all(Value::is_str)),
            Kind::Date => day(&value).is_some(),
            Kind::Optimizer => !matches!(value, Value::Table(_) | Value::Array(_) | Value::Datetime(_)),
        };
        if !fits {
            let message = format!("`{key}` must be {}, found {}", kind.expected(), describe(&value));
            return Err(ConfigError::new(&origin, message));
        }
        self.values.insert(key, (value, origin));
        Ok(())
    }

    /// Where `key` was given; for a key left at its default, its name.
    pub fn origin(&self, key: &str) -> Origin {
        self.values.get(key).map_or_else(|| Origin(format!("default of `{key}`")), |(_, origin)| origin.clone())
    }

    /// Every key that was given, in alphabetical order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// Whether the command line gives `key`.
    pub fn is_assigned(&self, key: &str) -> bool {
        self.values.get(key).is_some_and(|(_, origin)| origin.is_assignment())
    }

    pub fn is_set(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// An error about `key`, with the place where it was given.
    pub fn error(&self, key: &str, message: impl Into<String>) -> ConfigError {
        ConfigError::new(&self.origin(key), message.into())
    }

    pub fn whole(&self, key: &str) -> Option<u64> {
        self.values.get(key).and_then(|(value, _)| value.as_integer()).and_then(|number| u64::try_from(number).ok())
    }

    pub fn number(&self, key: &str) -> Option<f64> {
        self.values.get(key).and_then(|(value, _)| value.as_float().or(value.as_integer().map(|whole| whole as f64)))
    }

    pub fn truth(&self, key: &str) -> Option<bool> {
        self.values.get(key).and_then(|(value, _)| value.as_bool())
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.values.get(key).and_then(|(value, _)| value.as_str())
    }

    pub fn date(&self, key: &str) -> Option<Date> {
        self.values.get(key).and_then(|(value, _)| day(value))
    }

    /// One string or a list of them, as a list.
    pub fn texts(&self, key: &str) -> Option<Vec<String>> {
        let (value, _) = self.values.get(key)?;
        Some(match value {
            Value::Array(list) => list.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            other => other.as_str().map(str::to_owned).into_iter().collect(),
        })
    }

    /// The keys of `[optimizer]` without `name`, in alphabetical order.
    pub fn optimizer_keys(&self) -> Vec<(String, Value)> {
        let own = self.values.iter().filter_map(|(key, (value, _))| Some((key.strip_prefix("optimizer.")?, value)));
        own.filter(|(key, _)| *key != "name").map(|(key, value)| (key.to_owned(), value.clone())).collect()
    }

    /// Turns relative paths in the values given with `--set` into paths from the working directory.
    ///
    /// A config's own paths are relative to its folder, `base`; this is where both meet.
    pub fn base_of(&self, key: &str, base: &Path) -> std::path::PathBuf {
        match self.values.get(key) {
            Some((_, origin)) if origin.is_assignment() => std::path::PathBuf::new(),
            _ => base.to_owned(),
        }
    }
}

/// An empty section elsewhere asks for nothing; this one seems to ask for adapters.
fn empty_lora(origin: &Origin) -> ConfigError {
    let message = "`[lora]` is empty: give at least `lora.rank`, or leave the section out";
    ConfigError::new(origin, message.into())
}

/// The value without spans.
fn plain(value: DeValue<'_>, origin: &Origin) -> Result<Value, ConfigError> {
    let bad = |what: &str| ConfigError::new(origin, format!("this {what} is out of range"));
    Ok(match value {
        DeValue::String(text) => Value::String(text.into_owned()),
        DeValue::Integer(number) => {
            let digits = number.as_str().replace('_', "");
            Value::Integer(i64::from_str_radix(&digits, number.radix()).map_err(|_| bad("integer"))?)
        }
        DeValue::Float(number) => Value::Float(number.as_str().replace('_', "").parse().map_err(|_| bad("number"))?),
        DeValue::Boolean(truth) => Value::Boolean(truth),
        DeValue::Datetime(datetime) => Value::Datetime(datetime),
        DeValue::Array(items) => {
            let items = items.into_iter().map(|item| plain(item.into_inner(), origin));
            Value::Array(items.collect::<Result<_, _>>()?)
        }
        DeValue::Table(table) => {
            let entries = table.into_iter().map(|(key, value)| {
                Ok::<_, ConfigError>((key.into_inner().into_owned(), plain(value.into_inner(), origin)?))
            });
            Value::Table(entries.collect::<Result<_, _>>()?)
        }
    })
}

/// The day that a TOML date or a string names.
fn day(value: &Value) -> Option<Date> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Datetime(date) => date.to_string(),
        _ => return None,
    };
    // Parsing alone would pass over a time behind the date.
    text.parse().ok().filter(|date: &Date| date.to_string() == text)
}

fn describe(value: &Value) -> String {
    match value {
        Value::String(text) => format!("the string {text:?}"),
        Value::Integer(number) => format!("{number}"),
        Value::Float(number) => format!("{number}"),
        Value::Boolean(truth) => format!("{truth}"),
        Value::Datetime(_) => "a date".into(),
        Value::Array(_) => "a list".into(),
        Value::Table(_) => "a table".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        Settings::from_toml(text, "run.toml").expect_err("this config is wrong").to_string()
    }

    #[test]
    fn an_error_names_the_line_the_key_and_the_nearest_right_one() {
        assert_eq!(
            error("seed = 1\n[train]\nstep = 5\n"),
            "run.toml:3: `train.step` is not a key of vrtrain; did you mean `train.steps`?"
        );
        assert_eq!(
            error("[train]\n\nsteps = \"5\"\n"),
            "run.toml:3: `train.steps` must be a whole number from 0, found the string \"5\""
        );
        assert_eq!(error("[train]\nsteps = -5\n"), "run.toml:2: `train.steps` must be a whole number from 0, found -5");
        assert_eq!(error("train = 3\n"), "run.toml:1: `train` is a section, not a value");
        assert!(error("[train]\nsteps = 5\nsteps = 6\n").starts_with("run.toml:3: this is not valid TOML"));
        assert!(error("seed = \n").starts_with("run.toml:1: this is not valid TOML"));
        assert!(error("[trainer]\nsteps = 5\n").contains("did you mean `train`?"));
    }

    #[test]
    fn overrides_replace_what_the_file_says_and_may_leave_quotes_out() -> Result<(), ConfigError> {
        let mut settings = Settings::from_toml("[optimizer]\nbeta3 = 1\n[train]\nsteps = 1_000\n", "run.toml")?;
        settings.set("optimizer.beta3=20")?;
        settings.set("train.dtype = bf16")?;
        settings.set("data.date=2026-01-31")?;
        assert_eq!(settings.date("data.date"), Some(jiff::civil::date(2026, 1, 31)));
        assert!(settings.set("data.date=2026-02-30").is_err() && settings.set("data.date='31 Jan'").is_err());
        assert!(settings.set("data.date=2026-01-31T10:00:00").is_err());
        settings.set("data.validation={tokens=5, files='*.txt'}")?;
        assert_eq!(settings.number("optimizer.beta3"), Some(20.0));
        assert_eq!(settings.whole("train.steps"), Some(1000));
        assert_eq!(settings.text("train.dtype"), Some("bf16"));
        assert_eq!(settings.texts("data.validation.files"), Some(vec!["*.txt".into()]));
        assert_eq!(settings.origin("train.steps"), Origin("run.toml:4".into()));
        assert!(settings.set("train.steps").is_err() && settings.set("train.stepz=1").is_err());
        assert!(settings.set("train.steps=ten").is_err());
        Ok(())
    }
}
