//! Names of repositories, their addresses and their folder in the cache.

use super::{HubError, Result};
use reqwest::Url;
use serde::{Deserialize, Serialize};
use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RepoKind {
    Model,
    Dataset,
}

impl RepoKind {
    fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// A repository at a revision (a branch, tag, `refs/...` or commit).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepoId {
    pub kind: RepoKind,
    /// `owner/name`; a few old models have no owner.
    pub id: String,
    pub revision: String,
}

impl RepoId {
    /// Reads `owner/name` or `owner/name@revision`; the revision is `main` unless given.
    pub fn parse(kind: RepoKind, text: &str) -> Result<Self> {
        let bad = |problem: String| HubError::BadRepo { text: text.to_string(), problem };
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        let parts: Vec<&str> = id.split('/').collect();
        if parts.len() > 2 {
            return Err(bad(format!("it has {} parts", parts.len())));
        }
        for part in parts {
            if part.is_empty() {
                return Err(bad("a part of it is empty".into()));
            }
            if let Some(other) = part.chars().find(|c| !c.is_ascii_alphanumeric() && !"-_.".contains(*c)) {
                return Err(bad(format!("{other:?} cannot occur in one")));
            }
            // "--" separates owner and name in the cache's folder names.
            if part.contains("--") || part.contains("..") || part.starts_with(['-', '.']) || part.ends_with(['-', '.'])
            {
                return Err(bad("`--`, `..` and a part that begins or ends with `-` or `.` are not allowed".into()));
            }
        }
        check_path(revision).map_err(|_| bad(format!("`{revision}` cannot be a revision")))?;
        Ok(Self { kind, id: id.to_string(), revision: revision.to_string() })
    }

    /// Whether the revision is a full commit hash, which never changes its meaning.
    pub(super) fn is_pinned(&self) -> bool {
        self.revision.len() == 40 && is_hex(&self.revision)
    }

    /// The folder's name in the cache: `datasets--owner--name`.
    pub(super) fn folder(&self) -> String {
        format!("{}--{}", self.kind.plural(), self.id.replace('/', "--"))
    }

    /// `{endpoint}/api/{models|datasets}/{id}/{verb}/{revision}`
    pub(super) fn api_url(&self, endpoint: &Url, verb: &str) -> Url {
        let id = self.id.split('/');
        join(endpoint, ["api", self.kind.plural()].into_iter().chain(id).chain([verb, &self.revision]))
    }

    /// `{endpoint}/[datasets/]{id}/resolve/{revision}/{path}`
    pub(super) fn resolve_url(&self, endpoint: &Url, path: &str) -> Url {
        let prefix = (self.kind == RepoKind::Dataset).then_some("datasets");
        let segments = prefix.into_iter().chain(self.id.split('/'));
        join(endpoint, segments.chain(["resolve", &self.revision]).chain(path.split('/')))
    }

    /// The page that a person opens.
    pub(super) fn page(&self, endpoint: &Url) -> Url {
        let prefix = (self.kind == RepoKind::Dataset).then_some("datasets");
        join(endpoint, prefix.into_iter().chain(self.id.split('/')))
    }
}

impl fmt::Display for RepoKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Model => "model",
            Self::Dataset => "dataset",
        })
    }
}

/// `dataset owner/name`, with `@revision` where that is not `main`.
impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.id)?;
        if self.revision == "main" { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

/// Appends segments, each percent-encoded as one (a `/` inside of it too: the hub wants revisions so).
fn join<'a>(endpoint: &Url, segments: impl Iterator<Item = &'a str>) -> Url {
    let mut url = endpoint.clone();
    // Settings accept http and https endpoints alone, and such a URL always has path segments.
    url.path_segments_mut().expect("an http URL").pop_if_empty().extend(segments);
    url
}

/// Refuses what could leave the repository's folder once it becomes a path in the cache.
pub(super) fn check_path(path: &str) -> Result<()> {
    let bad = |problem| Err(HubError::BadPath { path: path.to_string(), problem });
    if path.contains(['\\', '\0']) {
        return bad("a backslash or a zero byte cannot occur in one");
    }
    if path.split('/').any(|segment| matches!(segment, "" | "." | "..")) {
        return bad("it is empty, absolute, or has an empty, `.` or `..` part");
    }
    Ok(())
}

pub(super) fn is_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_with_and_without_owner_and_revision() -> Result<()> {
        let repo = RepoId::parse(RepoKind::Dataset, "openai/gsm8k@refs/convert/parquet")?;
        assert_eq!((repo.id.as_str(), repo.revision.as_str()), ("openai/gsm8k", "refs/convert/parquet"));
        assert_eq!(repo.folder(), "datasets--openai--gsm8k");
        assert_eq!(RepoId::parse(RepoKind::Model, "gpt2")?.revision, "main");
        Ok(())
    }

    #[test]
    fn what_cannot_be_an_id_is_refused_and_named() {
        for text in ["", "/", "a/", "a/b/c", "a/..", "../b", "a--b/c", "a b/c", "a/b@", "a/b@../x", "a/b@/etc", "-a/b"]
        {
            let error = RepoId::parse(RepoKind::Model, text).map_err(|e| e.to_string());
            assert!(error.as_ref().is_err_and(|e| e.contains(&format!("`{text}`"))), "{text}: {error:?}");
        }
    }

    #[test]
    fn addresses_encode_each_part_as_the_hub_expects() -> Result<()> {
        let endpoint = Url::parse("https://hub.example/prefix/").expect("a URL");
        let repo = RepoId::parse(RepoKind::Dataset, "o/n@refs/pr/1")?;
        assert_eq!(
            repo.resolve_url(&endpoint, "x y/a b#c?100%.txt").as_str(),
            "https://hub.example/prefix/datasets/o/n/resolve/refs%2Fpr%2F1/x%20y/a%20b%23c%3F100%25.txt"
        );
        assert_eq!(
            repo.api_url(&endpoint, "tree").as_str(),
            "https://hub.example/prefix/api/datasets/o/n/tree/refs%2Fpr%2F1"
        );
        Ok(())
    }
}
