//! One request: redirects followed by hand, so that the token goes to the endpoint and nowhere else.

use super::answer::{self, Subject};
use super::retry::{Attempts, Cause, Contact, Trouble};
use super::settings::{Settings, Token};
use super::{HubError, Result, RetryPolicy};
use reqwest::blocking::{Client, Response};
use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderMap, LOCATION, RANGE};
use reqwest::{Method, StatusCode, Url};
use std::io::Read;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const REDIRECTS: usize = 10;
/// A page of a listing has 1,000 entries of some 300 bytes.
const JSON_BYTES: u64 = 64 << 20;

/// Why an attempt failed.
#[derive(Debug)]
pub(super) enum Failure {
    Passing(Trouble),
    Final(HubError),
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self::Final(error)
    }
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Self {
        Self::Passing(trouble)
    }
}

/// How far to follow redirects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Follow {
    Everywhere,
    /// To renamed repositories, but not to the servers of the bodies.
    EndpointOnly,
}

pub(super) struct Request<'a> {
    pub method: Method,
    pub url: &'a Url,
    pub range: Option<Range<u64>>,
    pub follow: Follow,
    pub subject: Subject<'a>,
}

/// What the hub says about a file on the way to its body.
#[derive(Debug, Default)]
pub(super) struct FileFacts {
    pub commit: Option<String>,
    /// Sha256 of a large file, git blob id of a small one, as far as the server is a hub.
    pub etag: Option<String>,
    pub size: Option<u64>,
}

pub(super) struct Answer {
    pub response: Response,
    pub facts: FileFacts,
    /// Where the redirects ended.
    pub url: Url,
}

pub(super) struct Transport {
    client: Client,
    endpoint: Url,
    token: Option<Token>,
    retry: RetryPolicy,
    stall: Duration,
    contact: AtomicBool,
}

impl Transport {
    pub fn new(settings: &Settings) -> Result<Self> {
        // The blocking client's time-out holds for the headers and then for each read: it is one for stalls.
        let client = Client::builder()
            .user_agent(concat!("vrtrain/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            // One connection a body: a stalled or broken one takes no other along.
            .http1_only()
            .connect_timeout(settings.stall)
            .timeout(settings.stall)
            .build()
            .map_err(|error| {
                let problem = format!("cannot set up HTTP connections: {}", explain(&error).1);
                HubError::Setting { name: "TLS or proxy settings".into(), problem }
            })?;
        Ok(Self {
            client,
            endpoint: settings.endpoint.clone(),
            token: settings.token.clone(),
            retry: settings.retry.clone(),
            stall: settings.stall,
            contact: AtomicBool::new(false),
        })
    }

    pub fn endpoint(&self) -> &Url {
        &self.endpoint
    }

    pub fn token(&self) -> Option<&Token> {
        self.token.as_ref()
    }

    pub fn is_endpoint(&self, url: &Url) -> bool {
        url.origin() == self.endpoint.origin()
    }

    pub fn attempts(&self, subject: &Subject) -> Attempts<'_> {
        Attempts::new(&self.retry, subject.to_string(), self.token.is_some())
    }

    pub fn contact(&self) -> Contact {
        if self.contact.load(Ordering::Relaxed) { Contact::Made } else { Contact::None }
    }

    /// Sends one request, once.
    pub fn send(&self, request: &Request) -> std::result::Result<Answer, Failure> {
        let mut url = request.url.clone();
        let mut facts = FileFacts::default();
        for _ in 0..REDIRECTS {
            let at_hub = self.is_endpoint(&url);
            // Compressed bodies would have other lengths than the file.
            let mut builder =
                self.client.request(request.method.clone(), url.clone()).header(ACCEPT_ENCODING, "identity");
            if let (true, Some(token)) = (at_hub, &self.token) {
                builder = builder.header(AUTHORIZATION, token.header.clone());
            }
            if let Some(range) = &request.range {
                builder = builder.header(RANGE, format!("bytes={}-{}", range.start, range.end - 1));
            }
            let response = builder.send().map_err(|error| self.broken(&url, &error))?;
            let status = response.status();
            if at_hub {
                facts.read(status, response.headers());
            }
            if status.is_success() {
                self.contact.store(true, Ordering::Relaxed);
                return Ok(Answer { response, facts, url });
            }
            if !status.is_redirection() {
                return Err(answer::refusal(self, &request.subject, &url, response));
            }
            let next = next_url(&url, &response, &request.subject)?;
            if request.follow == Follow::EndpointOnly && !self.is_endpoint(&next) {
                return Ok(Answer { response, facts, url });
            }
            url = next;
        }
        Err(unexpected(&request.subject, format!("more than {REDIRECTS} redirects, the last to {}", show(&url))).into())
    }

    /// Sends until an answer comes or patience ends.
    pub fn send_with_retries(&self, request: &Request) -> Result<Answer> {
        self.retrying(&request.subject, || self.send(request))
    }

    /// A JSON document of the hub, and the headers that came with it.
    pub fn json<T: serde::de::DeserializeOwned>(&self, url: &Url, subject: Subject) -> Result<(T, HeaderMap)> {
        let request = Request { method: Method::GET, url, range: None, follow: Follow::Everywhere, subject };
        self.retrying(&subject, || {
            let Answer { mut response, url, .. } = self.send(&request)?;
            let headers = std::mem::take(response.headers_mut());
            let mut body = Vec::new();
            response.take(JSON_BYTES).read_to_end(&mut body).map_err(|error| self.broken(&url, &error))?;
            let value = serde_json::from_slice(&body).map_err(|error| {
                let start = answer::excerpt(&String::from_utf8_lossy(&body));
                unexpected(&subject, format!("{} sent no JSON of the hub ({error}): {start}", show(&url)))
            })?;
            Ok((value, headers))
        })
    }

    fn retrying<T>(
        &self,
        subject: &Subject,
        mut attempt: impl FnMut() -> std::result::Result<T, Failure>,
    ) -> Result<T> {
        let mut attempts = self.attempts(subject);
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(trouble)) => attempts.wait(trouble, self.contact())?,
            }
        }
    }

    /// A connection that failed, stalled or was cut.
    pub fn broken(&self, url: &Url, error: &(dyn std::error::Error + 'static)) -> Trouble {
        let (kind, text) = explain(error);
        match kind {
            Break::Stall => {
                let text = format!("nothing came from {} for {:.1} s", show(url), self.stall.as_secs_f64());
                Trouble::new(Cause::Network, text)
            }
            Break::Connect => Trouble::new(Cause::Unreachable, format!("cannot connect to {}: {text}", show(url))),
            Break::Other => Trouble::new(Cause::Network, format!("{}: {text}", show(url))),
        }
    }
}

impl FileFacts {
    fn read(&mut self, status: StatusCode, headers: &HeaderMap) {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        if let Some(commit) = text("x-repo-commit") {
            self.commit = Some(commit.to_string());
        }
        // A redirect's own ETag is that of the pointer, not of the file.
        let direct = |name| status.is_success().then(|| text(name)).flatten();
        if let Some(etag) = text("x-linked-etag").or_else(|| direct("etag").filter(|_| self.etag.is_none())) {
            self.etag = Some(etag.trim_start_matches("W/").trim_matches('"').to_string());
        }
        let whole_length = || (status == StatusCode::OK).then(|| text("content-length")).flatten();
        let size = text("x-linked-size").or_else(|| whole_length().filter(|_| self.size.is_none()));
        self.size = size.and_then(|size| size.parse().ok()).or(self.size);
    }
}

fn next_url(url: &Url, response: &Response, subject: &Subject) -> Result<Url> {
    let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
    let bad = |problem: &str| unexpected(subject, format!("{} redirects {problem}", show(url)));
    let next = location.and_then(|text| url.join(text).ok()).ok_or_else(|| bad("to nowhere"))?;
    match (url.scheme(), next.scheme()) {
        ("http", "http") | (_, "https") => Ok(next),
        _ => Err(bad(&format!("from {} to {}", url.scheme(), next.scheme()))),
    }
}

pub(super) fn unexpected(subject: &Subject, problem: String) -> HubError {
    HubError::Unexpected { what: subject.to_string(), problem }
}

/// Host and path: the query of a signed URL is a secret.
pub(super) fn show(url: &Url) -> String {
    let host = url.host_str().unwrap_or("?");
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{host}{port}{}", url.path())
}

enum Break {
    Connect,
    Stall,
    Other,
}

/// What broke, and the texts of the causes below reqwest's own, which would name the whole URL.
fn explain(error: &(dyn std::error::Error + 'static)) -> (Break, String) {
    let (mut kind, mut texts) = (Break::Other, Vec::new());
    let mut next = Some(error);
    while let Some(error) = next {
        // A body's errors are reqwest's in the wrapping of an io::Error that repeats their text.
        let wrapped = error.downcast_ref::<std::io::Error>().and_then(|error| error.get_ref());
        let request = match wrapped {
            Some(inner) => inner.downcast_ref::<reqwest::Error>(),
            None => error.downcast_ref::<reqwest::Error>(),
        };
        match request {
            Some(request) if request.is_timeout() => kind = Break::Stall,
            Some(request) if request.is_connect() => kind = Break::Connect,
            Some(_) => {}
            None => texts.push(error.to_string()),
        }
        next = error.source();
    }
    // hyper's headline says no more than `kind`.
    texts.retain(|text| !text.starts_with("client error ("));
    texts.dedup();
    (kind, texts.join(": "))
}
