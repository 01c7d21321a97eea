//! What an answer that is not a success means: an error at once, or a failure that may pass.

use super::http::{Failure, Transport, show, unexpected};
use super::retry::{Cause, Trouble};
use super::{HubError, RepoId};
use reqwest::Url;
use reqwest::blocking::Response;
use reqwest::header::HeaderMap;
use std::fmt;
use std::io::Read;
use std::time::Duration;

/// What a request is about.
#[derive(Clone, Copy, Debug)]
pub(super) enum Subject<'a> {
    Repo(&'a RepoId),
    File(&'a RepoId, &'a str),
}

impl Subject<'_> {
    fn repo(&self) -> &RepoId {
        match self {
            Self::Repo(repo) | Self::File(repo, _) => repo,
        }
    }
}

impl fmt::Display for Subject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Repo(repo) => write!(f, "{repo}"),
            Self::File(repo, path) => write!(f, "{path} of {repo}"),
        }
    }
}

/// An answer's status and what it says about itself.
struct Refusal {
    status: u16,
    /// X-Error-Code
    code: String,
    message: String,
    asked_wait: Option<Duration>,
}

/// Judges an answer that is neither a success nor a redirect.
pub(super) fn refusal(transport: &Transport, subject: &Subject, url: &Url, response: Response) -> Failure {
    let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or("").to_string();
    let (status, code, mut message) = (response.status().as_u16(), header("x-error-code"), header("x-error-message"));
    let asked_wait = asked_wait(response.headers());
    if message.is_empty() {
        let mut body = Vec::new();
        // The text only helps to explain; the status decides.
        let _ = response.take(4096).read_to_end(&mut body);
        let text = String::from_utf8_lossy(&body);
        let json: Option<serde_json::Value> = serde_json::from_str(&text).ok();
        message = json.and_then(|v| Some(v.get("error")?.as_str()?.to_string())).unwrap_or_else(|| text.to_string());
    }
    let refusal = Refusal { status, code, message: excerpt(&message), asked_wait };
    if transport.is_endpoint(url) { of_hub(transport, subject, refusal) } else { of_other_host(url, refusal) }
}

fn of_hub(transport: &Transport, subject: &Subject, refusal: Refusal) -> Failure {
    let Refusal { status, code, message, asked_wait } = refusal;
    let (what, repo) = (subject.to_string(), subject.repo().to_string());
    let endpoint = transport.endpoint().as_str().trim_end_matches('/').to_string();
    let advice = match transport.token() {
        None => format!("no token was sent; set HF_TOKEN if it needs one (made at {endpoint}/settings/tokens)"),
        Some(token) => format!("check that the token from {} is valid and may read it", token.source),
    };
    let invalid_token = code == "InvalidToken" || message.contains("Invalid credentials");
    Failure::Final(match (status, code.as_str(), subject) {
        (408 | 425 | 429 | 500.., ..) => {
            let cause = if status == 429 { Cause::RateLimited } else { Cause::Network };
            return Failure::Passing(Trouble {
                cause,
                text: format!("the hub answers {status} {message}"),
                asked_wait,
            });
        }
        (401 | 403, "GatedRepo", _) => {
            HubError::Gated { what, page: subject.repo().page(transport.endpoint()).to_string(), advice }
        }
        (401..=404, "RepoNotFound", _) => HubError::RepoNotFound { repo, endpoint, advice },
        // Without a token the hub does not tell a private repository from one that is not there.
        (401, "", _) if !invalid_token => HubError::RepoNotFound { repo, endpoint, advice },
        (401 | 403, ..) => HubError::Unauthorized { what, message: format!("{status} {message}"), advice },
        (404, "RevisionNotFound", _) => HubError::RevisionNotFound { repo, message },
        (404, _, Subject::File(_, path)) => HubError::FileMissing { repo, path: path.to_string() },
        (404, _, Subject::Repo(_)) => HubError::RepoNotFound { repo, endpoint, advice },
        (407, ..) => unexpected(subject, "the proxy wants a name and password (http://NAME:PASSWORD@HOST:PORT)".into()),
        _ => unexpected(subject, format!("status {status} {message}")),
    })
}

/// A server of bodies: its 403 means a signed URL that has expired, so even refusals may pass with a new URL.
fn of_other_host(url: &Url, refusal: Refusal) -> Failure {
    let cause = if refusal.status == 429 { Cause::RateLimited } else { Cause::Network };
    let text = format!("{} answers {} {}", show(url), refusal.status, refusal.message);
    Failure::Passing(Trouble { cause, text, asked_wait: refusal.asked_wait })
}

/// `Retry-After` in seconds, or the time left (`t`) in the `RateLimit` header that the hub sends.
fn asked_wait(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let left = |limits: &str| limits.split([';', ',']).find_map(|part| part.trim().strip_prefix("t=")?.parse().ok());
    let seconds = text("retry-after").and_then(|s| s.trim().parse().ok()).or_else(|| left(text("ratelimit")?));
    seconds.map(Duration::from_secs)
}

/// The beginning of a text on one line.
pub(super) fn excerpt(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    let line = words.collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(160) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{RepoKind, Settings};
    use super::*;

    fn judged(token: Option<&str>, status: u16, code: &str, message: &str) -> String {
        let settings = Settings::from_variables(&|name| match name {
            "HF_HOME" => Some("/nowhere".into()),
            "HF_TOKEN" => token.map(str::to_string),
            _ => None,
        });
        let transport = settings.and_then(|s| Transport::new(&s)).expect("a transport");
        let repo = RepoId::parse(RepoKind::Model, "o/n").expect("an id");
        let refusal = Refusal { status, code: code.into(), message: message.into(), asked_wait: None };
        match of_hub(&transport, &Subject::File(&repo, "config.json"), refusal) {
            Failure::Passing(trouble) => format!("Passing {:?} {}", trouble.cause, trouble.text),
            Failure::Final(error) => format!("{error:?} {error}"),
        }
    }

    #[test]
    fn each_refusal_of_the_hub_is_its_own_error_that_says_what_to_do() {
        let token = Some("hf_secret");
        let invalid = "Invalid credentials in Authorization header";
        for (token, status, code, message, kind, hint) in [
            (None, 401, "GatedRepo", "restricted", "Gated", "settings/tokens"),
            (token, 403, "GatedRepo", "not in the authorized list", "Gated", "accept its conditions at https://"),
            (None, 401, "RepoNotFound", "Repository not found", "RepoNotFound", "settings/tokens"),
            (None, 401, "", "Invalid username or password.", "RepoNotFound", "private"),
            (token, 404, "RepoNotFound", "", "RepoNotFound", "HF_TOKEN"),
            (token, 401, "", invalid, "Unauthorized", "the token from HF_TOKEN is valid"),
            (token, 401, "InvalidToken", "no", "Unauthorized", "the token from HF_TOKEN is valid"),
            (token, 403, "", "your fine-grained token lacks", "Unauthorized", "fine-grained"),
            (None, 404, "RevisionNotFound", "Invalid rev id: x", "RevisionNotFound", "after `@`"),
            (None, 404, "EntryNotFound", "Entry not found", "FileMissing", "config.json"),
            (None, 429, "", "slow down", "Passing RateLimited", "429 slow down"),
            (None, 503, "", "", "Passing Network", "503"),
            (None, 418, "", "teapot", "Unexpected", "status 418 teapot"),
        ] {
            let text = judged(token, status, code, message);
            assert!(text.starts_with(kind) && text.contains(hint), "{status} {code}: {text}");
            assert!(!text.contains("hf_secret"), "{text}");
        }
    }

    #[test]
    fn the_wait_asked_for_is_read_from_either_header() {
        let mut headers = HeaderMap::new();
        assert_eq!(asked_wait(&headers), None);
        headers.insert("ratelimit", "\"resolvers\";r=0;t=47".parse().expect("a header"));
        assert_eq!(asked_wait(&headers), Some(Duration::from_secs(47)));
        headers.insert("retry-after", "3".parse().expect("a header"));
        assert_eq!(asked_wait(&headers), Some(Duration::from_secs(3)));
    }
}
