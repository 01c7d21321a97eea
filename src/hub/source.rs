//! The bytes of one file from the network: every answer is checked, and a body that breaks off is continued.

use super::answer::Subject;
use super::hash::is_hash;
use super::http::{Answer, Failure, FileFacts, Follow, Request, Transport, show};
use super::retry::{Cause, Trouble};
use super::{HubError, RepoId, Result};
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderName};
use reqwest::{Method, StatusCode, Url};
use std::io::Read;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

const BUFFER_BYTES: usize = 128 << 10;

/// Takes the bytes as they come.
pub(super) type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

pub(super) struct Source {
    pub repo: RepoId,
    pub path: String,
    pub size: u64,
    /// Sha256 of a large file, git blob id of a small one.
    pub identity: String,
    url: Url,
    /// Where the hub redirected to (a signed URL, good for about an hour), to save a request a range.
    location: Mutex<Option<Url>>,
}

impl Source {
    pub fn new(endpoint: &Url, repo: &RepoId, path: &str, size: u64, identity: &str) -> Self {
        let url = repo.resolve_url(endpoint, path);
        let (repo, path, identity) = (repo.clone(), path.to_string(), identity.to_string());
        Self { repo, path, size, identity, url, location: Mutex::new(None) }
    }

    pub fn subject(&self) -> Subject<'_> {
        Subject::File(&self.repo, &self.path)
    }

    /// Feeds the bytes `range` to `sink`, each once and in order, over as many requests as it takes.
    pub fn fetch(&self, transport: &Transport, range: Range<u64>, sink: Sink) -> Result<()> {
        let mut attempts = transport.attempts(&self.subject());
        let mut at = range.start;
        while at < range.end {
            let before = at;
            match self.attempt(transport, &mut at, range.end, sink) {
                Ok(()) => {}
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(trouble)) => {
                    if at > before {
                        attempts.progressed();
                    }
                    attempts.wait(trouble, transport.contact())?;
                }
            }
        }
        Ok(())
    }

    /// One request for `at..end`; moves `at` past what came.
    fn attempt(&self, transport: &Transport, at: &mut u64, end: u64, sink: Sink) -> std::result::Result<(), Failure> {
        let answer = self.ask(transport, *at..end)?;
        let (skip, stop) = self.check(transport, &answer, *at..end)?;
        self.read(transport, answer, skip, at, stop, sink)
    }

    /// Asks the remembered location, or the hub where there is none or it refuses.
    fn ask(&self, transport: &Transport, range: Range<u64>) -> std::result::Result<Answer, Failure> {
        let send = |url: &Url| {
            let (method, range, subject) = (Method::GET, Some(range.clone()), self.subject());
            transport.send(&Request { method, url, range, follow: Follow::Everywhere, subject })
        };
        let remembered = self.location.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(location) = remembered {
            match send(&location) {
                Ok(answer) => return Ok(answer),
                Err(Failure::Final(error)) => return Err(error.into()),
                Err(Failure::Passing(trouble)) => {
                    self.remember(None);
                    tracing::warn!("{}: {}; asking the hub for a new address", self.subject(), trouble.text);
                }
            }
        }
        let answer = send(&self.url)?;
        if !transport.is_endpoint(&answer.url) {
            self.remember(Some(answer.url.clone()));
        }
        Ok(answer)
    }

    fn remember(&self, location: Option<Url>) {
        *self.location.lock().unwrap_or_else(PoisonError::into_inner) = location;
    }

    /// Whether the answer is what was asked for: how many bytes to skip, and where in the file it stops being of use.
    fn check(
        &self,
        transport: &Transport,
        answer: &Answer,
        wanted: Range<u64>,
    ) -> std::result::Result<(u64, u64), Failure> {
        self.unchanged(&answer.facts)?;
        let headers = answer.response.headers();
        let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
        let wrong = |problem: String| {
            self.remember(None);
            Trouble::new(Cause::WrongBody, format!("{} {problem}", show(&answer.url)))
        };
        match answer.response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let (given, size) = parse_content_range(text(CONTENT_RANGE))
                    .ok_or_else(|| wrong(format!("sends Content-Range `{}`", text(CONTENT_RANGE))))?;
                if given.start != wanted.start || size.is_some_and(|size| size != self.size) {
                    let (size, given) = (self.size, text(CONTENT_RANGE));
                    return Err(wrong(format!("sends `{given}` for bytes {wanted:?} of {size}")).into());
                }
                Ok((0, given.end.min(wanted.end)))
            }
            // Ranges are optional in HTTP: this is the whole file, if it is the file at all.
            StatusCode::OK if text(CONTENT_LENGTH).parse() == Ok(self.size) => {
                if wanted.start > 0 {
                    let host = show(&answer.url);
                    tracing::warn!("{host} ignores ranges: {} bytes are read for nothing", wanted.start);
                }
                Ok((wanted.start, wanted.end))
            }
            status => {
                let (kind, length) = (text(CONTENT_TYPE), text(CONTENT_LENGTH));
                let host = if transport.is_endpoint(&answer.url) { "the hub" } else { "the server of the bodies" };
                let expected = self.size;
                Err(wrong(format!(
                    "({host}) answers {status} with {length} bytes of {kind}, not the {expected} of the file"
                ))
                .into())
            }
        }
    }

    /// The hub names the file's hash on the way to it: the same as in the listing?
    fn unchanged(&self, facts: &FileFacts) -> Result<()> {
        let differs = |was: &str, is: &str| is_hash(is) && is_hash(was) && is != was;
        match &facts.etag {
            Some(etag) if differs(&self.identity, etag) => {
                let (was, is) = (self.identity.clone(), etag.clone());
                Err(HubError::Changed { what: self.subject().to_string(), was, is })
            }
            _ => Ok(()),
        }
    }

    fn read(
        &self,
        transport: &Transport,
        answer: Answer,
        mut skip: u64,
        at: &mut u64,
        stop: u64,
        sink: Sink,
    ) -> std::result::Result<(), Failure> {
        let Answer { mut response, url, .. } = answer;
        let mut buffer = vec![0; BUFFER_BYTES];
        while *at < stop {
            let most = (skip + (stop - *at)).min(BUFFER_BYTES as u64) as usize;
            match response.read(&mut buffer[..most]) {
                Ok(0) => {
                    let text = format!("{} ended the body at byte {at} of {stop}", show(&url));
                    return Err(Trouble::new(Cause::Network, text).into());
                }
                Ok(count) => {
                    let skipped = skip.min(count as u64);
                    skip -= skipped;
                    let bytes = &buffer[skipped as usize..count];
                    sink(bytes)?;
                    *at += bytes.len() as u64;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let mut trouble = transport.broken(&url, &error);
                    trouble.text.push_str(&format!(" (at byte {at} of {stop})"));
                    return Err(trouble.into());
                }
            }
        }
        Ok(())
    }
}

/// `bytes 0-9/100` is 0..10 of 100; the size may be `*`.
fn parse_content_range(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    let (span, size) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = span.split_once('-')?;
    let range = first.parse().ok()?..last.parse::<u64>().ok()?.checked_add(1)?;
    let size = if size == "*" { None } else { Some(size.parse().ok()?) };
    (range.start < range.end).then_some((range, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_and_nonsense_is_refused() {
        assert_eq!(parse_content_range("bytes 0-9/100"), Some((0..10, Some(100))));
        assert_eq!(parse_content_range("bytes 5-5/*"), Some((5..6, None)));
        for text in ["", "bytes */100", "bytes 9-5/100", "0-9/100", "bytes 0-18446744073709551615/1", "bytes a-b/c"] {
            assert_eq!(parse_content_range(text), None, "{text}");
        }
    }
}
