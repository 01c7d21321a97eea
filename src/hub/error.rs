//! What can go wrong with the hub, each with what to do about it.

use std::path::PathBuf;
use std::time::Duration;

/// An error of the hub client. Texts never hold the token or a signed URL.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error(
        "{what} is not in the cache below {cache}, and HF_HUB_OFFLINE forbids to fetch it: unset HF_HUB_OFFLINE, \
             or run once with a network and copy the cache"
    )]
    Offline { what: String, cache: PathBuf },

    #[error("the hub refuses access to {what} ({message}): {advice}")]
    Unauthorized { what: String, message: String, advice: String },

    #[error("{what} is gated: accept its conditions at {page}; {advice}")]
    Gated { what: String, page: String, advice: String },

    #[error("there is no {repo} at {endpoint}, or it is private: check the spelling; {advice}")]
    RepoNotFound { repo: String, endpoint: String, advice: String },

    #[error("{repo} has no such revision ({message}): check the name after `@`")]
    RevisionNotFound { repo: String, message: String },

    #[error("{repo} has no file {path}: check the name, its case and the revision")]
    FileMissing { repo: String, path: String },

    #[error("the hub limits our requests: {what} was still refused after {} s ({message}); wait some minutes{}",
            waited.as_secs(), if *token { "" } else { ", or set HF_TOKEN, which raises the limits" })]
    RateLimited { what: String, message: String, waited: Duration, token: bool },

    #[error("gave up on {what} after {attempts} attempts in {:.1} s; the last one: {cause}. Check the network, \
             HF_ENDPOINT and the proxy variables; HF_HUB_OFFLINE=1 uses only what the cache holds", waited.as_secs_f64())]
    GivenUp { what: String, attempts: u32, waited: Duration, cause: String },

    #[error("{what} arrived wrong: {problem}. Nothing of it was kept; a proxy or a mirror may be at fault")]
    Corrupt { what: String, problem: String },

    #[error(
        "{what} has changed on the hub since it was listed ({was} then, {is} now): start again, \
             or pin a commit as OWNER/NAME@COMMIT"
    )]
    Changed { what: String, was: String, is: String },

    #[error(
        "unexpected answer for {what}: {problem}. Is HF_ENDPOINT a Hugging Face Hub, and no log-in page in between?"
    )]
    Unexpected { what: String, problem: String },

    #[error("no file of {repo} matches `{pattern}`; {near}")]
    NoMatch { repo: String, pattern: String, near: String },

    #[error("`{pattern}` is not a file pattern: {problem}")]
    BadPattern { pattern: String, problem: String },

    #[error("`{text}` is not a hub id: {problem}; expected OWNER/NAME or OWNER/NAME@REVISION")]
    BadRepo { text: String, problem: String },

    #[error("`{path}` is not a path inside a repository: {problem}")]
    BadPath { path: String, problem: &'static str },

    #[error("bytes {start}..{end} are not a range of {what}, which has {size} bytes")]
    BadRange { what: String, start: u64, end: u64, size: u64 },

    #[error("{name}: {problem}")]
    Setting { name: String, problem: String },

    #[error("cannot {action} {path}: {source}")]
    Cache { action: &'static str, path: PathBuf, source: std::io::Error },
}

impl HubError {
    /// For `map_err` on file operations.
    pub(super) fn cache(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Cache { action, path, source }
    }
}
