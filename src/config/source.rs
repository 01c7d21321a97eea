//! A place that files come from: a hub repository or a path.

use super::absolute;
use std::fmt;
use std::path::{Path, PathBuf};

/// Where a model, a tokenizer or a data set lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `owner/name`, or `owner/name@revision`.
    Hub(String),
    /// A file or a folder, absolute.
    Path(PathBuf),
}

impl Source {
    /// Decides what `text` names: a path if one is there or if it looks like one, else a hub id.
    pub fn parse(text: &str, base: &Path) -> Self {
        let path = absolute(base, text);
        if path.exists() || !looks_like_hub_id(text) { Self::Path(path) } else { Self::Hub(text.to_owned()) }
    }
}

/// `name` or `owner/name`, with an optional `@revision`, of the characters that the hub allows, and not like a file.
pub fn looks_like_hub_id(text: &str) -> bool {
    let id = text.split_once('@').map_or(text, |(id, _)| id);
    let words: Vec<&str> = id.split('/').collect();
    let legal = |word: &str| {
        let first = word.chars().next().is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
        first && word.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    let file_like = [".bin", ".txt", ".json", ".jsonl", ".parquet", ".toml", ".safetensors", ".csv", ".gz", ".zst"];
    let extension = file_like.iter().any(|ending| id.to_ascii_lowercase().ends_with(ending));
    words.len() == 2 && words.iter().all(|word| legal(word)) && !extension
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hub(id) => write!(formatter, "{id}"),
            Self::Path(path) => write!(formatter, "{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_and_paths_are_told_apart() {
        assert!(looks_like_hub_id("HuggingFaceFW/fineweb-edu"));
        assert!(looks_like_hub_id("openai-community/gpt2@refs"));
        for path in ["./a/b", "/a/b", "a", "a/b/c", "data/train.bin", "../a", "a b/c", "~/a"] {
            assert!(!looks_like_hub_id(path), "{path}");
        }
        assert_eq!(Source::parse("owner/name", Path::new("/nowhere")), Source::Hub("owner/name".into()));
        assert_eq!(Source::parse("x.bin", Path::new("/nowhere")), Source::Path("/nowhere/x.bin".into()));
    }
}
