//! The place of the next row, as a value that a checkpoint holds, and what it is a place in.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// Where the next row begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    pub epoch: u64,
    /// Place of the unit in the epoch's order of units.
    pub unit: u64,
    /// Document (token files: row) in the unit, in the order of the visit.
    pub document: u64,
    /// Token in the document, its begin-of-text counted.
    pub token: u64,
    /// The data and the settings that give the numbers above their meaning.
    pub identity: Identity,
}

/// What decides the rows of a stream: two streams of equal identity give equal rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Version of this format, of the shuffle and of the cutting into units.
    pub version: u32,
    pub files: u64,
    /// SHA-256 over the names, lengths and contents of the files (of large files: parts).
    pub content: String,
    pub text_column: Option<String>,
    /// SHA-256 of the tokenizer; absent for token files.
    pub tokenizer: Option<String>,
    /// The id before each document; checkpoints of GPT-2 runs named it by its other use.
    #[serde(alias = "end_of_text")]
    pub begin_of_text: Option<u32>,
    pub sequence_length: u64,
    /// The seed if the order is shuffled.
    pub shuffle_seed: Option<u64>,
}

/// See [`Identity::version`].
pub(super) const IDENTITY_VERSION: u32 = 1;

impl Position {
    /// Refuses to go on in other data or under other settings than the position was taken in.
    pub(super) fn check(&self, now: &Identity) -> Result<()> {
        let then = &self.identity;
        let mut changes = Vec::new();
        let mut compare = |what: &str, then: String, now: String| {
            if then != now {
                changes.push(format!("{what} was {then} and is {now}"));
            }
        };
        compare("the data format's version", then.version.to_string(), now.version.to_string());
        compare("the number of data files", then.files.to_string(), now.files.to_string());
        compare("the content of the data files", short(Some(&then.content)), short(Some(&now.content)));
        compare("text_column", name(then.text_column.as_deref()), name(now.text_column.as_deref()));
        compare("the tokenizer", short(then.tokenizer.as_ref()), short(now.tokenizer.as_ref()));
        compare("the begin-of-text id", number(then.begin_of_text), number(now.begin_of_text));
        compare("sequence_length", then.sequence_length.to_string(), now.sequence_length.to_string());
        compare("the seed of the shuffle", number(then.shuffle_seed), number(now.shuffle_seed));
        if !changes.is_empty() {
            bail!(
                "the checkpoint's place in the data does not fit these data: {}. Restore the data and settings of the \
                 run, or start a new run",
                changes.join("; ")
            );
        }
        Ok(())
    }
}

fn name(value: Option<&str>) -> String {
    value.unwrap_or("none").to_string()
}

fn number<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "none".to_string(), |value| value.to_string())
}

/// The beginning of a digest: enough to tell two apart.
fn short(digest: Option<&String>) -> String {
    digest.map_or_else(|| "none".to_string(), |digest| digest.chars().take(12).collect())
}
