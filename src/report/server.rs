//! The live page: a small read-only server on the loopback interface that sends what runs write down, as they do.
//!
//! Each open page has a thread that looks at the files of the runs twice a second and reads what was appended. Nothing is
//! shared with the trainers but their files.

use super::block::lists;
use super::describe::Description;
use super::find::{Found, find};
use super::follow::{Change, Follower};
use super::page::{self, Source};
use super::rows::Rows;
use super::{RunReport, State};
use anyhow::{Context, Result};
use axum::Router;
use axum::extract::{Request, State as Shared};
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, REFERRER_POLICY};
use axum::http::header::{HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS};
use axum::http::{StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::json;
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{Sender, channel};

/// Whose requests are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hosts {
    /// Requests to a loopback name or address alone: a page of another site that resolves its own name to this machine
    /// (DNS rebinding) is refused.
    Loopback,
    /// Whatever the request calls this machine.
    Any,
}

struct Site {
    paths: Vec<PathBuf>,
    hosts: Hosts,
    pages: AtomicUsize,
}

/// How often files are looked at.
const POLL: Duration = Duration::from_millis(500);
/// How often folders are searched for new runs, and states are found out again.
const SEARCH: Duration = Duration::from_secs(2);
/// Pages open at a time.
const MOST_PAGES: usize = 64;

/// Serves the page of the runs below `paths` until the process is told to stop; `ready` gets the address.
pub fn serve(paths: Vec<PathBuf>, address: SocketAddr, hosts: Hosts, ready: impl FnOnce(SocketAddr)) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the server")?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(address).await;
        let listener = listener.with_context(|| format!("cannot listen on {address}: give another --port"))?;
        ready(listener.local_addr().context("the server has no address")?);
        let site = Arc::new(Site { paths, hosts, pages: AtomicUsize::new(0) });
        let router = Router::new()
            .route("/", get(page))
            .route("/events", get(events))
            .fallback(|uri: Uri| async move { (StatusCode::NOT_FOUND, format!("there is no {}\n", uri.path())) })
            .layer(from_fn_with_state(Arc::clone(&site), guard))
            .with_state(site);
        tokio::select! {
            served = axum::serve(listener, router) => served.context("the server has failed"),
            stopped = tokio::signal::ctrl_c() => stopped.context("cannot wait for Ctrl-C"),
        }
    })
}

/// Refuses foreign hosts, and puts the same headers on every answer.
async fn guard(Shared(site): Shared<Arc<Site>>, request: Request, next: Next) -> Response {
    let host = request.headers().get(HOST).and_then(|host| host.to_str().ok());
    let mut response = if site.hosts == Hosts::Loopback && !host.is_some_and(is_loopback) {
        let text = "this server answers to localhost alone; start it with --host to open it to others\n";
        (StatusCode::FORBIDDEN, text).into_response()
    } else {
        next.run(request).await
    };
    let policy = format!("{}; frame-ancestors 'none'", page::policy(Source::Live));
    let policy = HeaderValue::from_str(&policy).unwrap_or(HeaderValue::from_static("default-src 'none'"));
    let headers = response.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, policy);
    for (name, value) in [
        (CACHE_CONTROL, "no-store"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "DENY"),
        (REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Whether a request's Host is this machine's own name for itself: `localhost`, 127.0.0.0/8 or `[::1]`, with any port.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(""),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

async fn page() -> Response {
    ([(CONTENT_TYPE, "text/html; charset=utf-8")], page::html(&[], Source::Live)).into_response()
}

/// All runs as they are, then what is added to them.
async fn events(Shared(site): Shared<Arc<Site>>) -> Response {
    if site.pages.fetch_add(1, Ordering::Relaxed) >= MOST_PAGES {
        site.pages.fetch_sub(1, Ordering::Relaxed);
        return (StatusCode::SERVICE_UNAVAILABLE, "too many pages are open\n").into_response();
    }
    let (sender, receiver) = channel(64);
    let watched = Arc::clone(&site);
    let thread = std::thread::Builder::new().name("watch".into()).spawn(move || {
        Watcher::new(&watched.paths, sender).run();
        watched.pages.fetch_sub(1, Ordering::Relaxed);
    });
    if thread.is_err() {
        site.pages.fetch_sub(1, Ordering::Relaxed);
        return (StatusCode::SERVICE_UNAVAILABLE, "no thread is to be had\n").into_response();
    }
    let stream = futures_util::stream::unfold(receiver, |mut receiver| async move {
        let event = receiver.recv().await?;
        Some((Ok::<_, Infallible>(event), receiver))
    });
    Sse::new(stream).keep_alive(KeepAlive::default()).into_response()
}

/// The page is closed.
struct Closed;

/// A run that a page shows.
struct Watched {
    found: Found,
    description: Description,
    follower: Follower,
}

/// What one open page has been told.
struct Watcher<'a> {
    paths: &'a [PathBuf],
    sender: Sender<Event>,
    runs: Vec<Watched>,
}

impl<'a> Watcher<'a> {
    fn new(paths: &'a [PathBuf], sender: Sender<Event>) -> Self {
        Self { paths, sender, runs: Vec::new() }
    }

    /// Goes on until the page is closed.
    fn run(mut self) {
        let mut searched: Option<Instant> = None;
        while !self.sender.is_closed() {
            if searched.is_none_or(|searched| searched.elapsed() >= SEARCH) {
                searched = Some(Instant::now());
                if self.search().is_err() {
                    return;
                }
            }
            for index in 0..self.runs.len() {
                if self.poll(index).is_err() {
                    return;
                }
            }
            std::thread::sleep(POLL);
        }
    }

    /// Takes up new runs, and tells what has changed about the known ones.
    fn search(&mut self) -> Result<(), Closed> {
        // A folder may be away for a moment; the page keeps what it has.
        let found = find(self.paths).unwrap_or_default();
        for found in found {
            let description = describe(&found);
            match self.runs.iter_mut().find(|run| run.found.path == found.path) {
                Some(run) if run.description == description => {}
                Some(run) => {
                    run.description = description;
                    run.found = found;
                    let event = json!({ "info": run.description.to_json() });
                    self.send("run", &event)?;
                }
                None => {
                    let follower = Follower::new(&found.path);
                    let run = RunReport { description, rows: Rows::default() };
                    self.send("run", &page::run_json(&run, 1))?;
                    self.runs.push(Watched { found, description: run.description, follower });
                }
            }
        }
        Ok(())
    }

    fn poll(&mut self, index: usize) -> Result<(), Closed> {
        let share = self.runs.len();
        let run = &mut self.runs[index];
        match run.follower.poll() {
            Ok(Change::None) => Ok(()),
            Ok(Change::More(rows)) => {
                let event = json!({ "id": run.description.id, "columns": lists(&rows) });
                self.send("rows", &event)
            }
            Ok(Change::All(rows)) => {
                let report = RunReport { description: run.description.clone(), rows };
                let event = page::run_json(&report, share);
                self.send("run", &event)
            }
            Err(error) => {
                let error = Some(format!("{error:#}"));
                if run.description.error == error {
                    return Ok(());
                }
                run.description.error = error;
                let event = json!({ "info": run.description.to_json() });
                self.send("run", &event)
            }
        }
    }

    fn send(&self, name: &str, value: &serde_json::Value) -> Result<(), Closed> {
        let event = Event::default().event(name).data(value.to_string());
        self.sender.blocking_send(event).map_err(|_| Closed)
    }
}

/// A run's description; one that cannot be read says why.
fn describe(found: &Found) -> Description {
    Description::read(found).unwrap_or_else(|error| Description {
        id: found.path.display().to_string(),
        name: found.name.clone(),
        state: State::Unknown,
        steps: None,
        error: Some(format!("{error:#}")),
        config: Vec::new(),
        samples: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::is_loopback;

    #[test]
    fn only_this_machines_own_names_are_loopback() {
        for host in ["localhost", "localhost:7077", "LOCALHOST:1", "127.0.0.1:7077", "127.9.9.9", "[::1]:7077", "[::1]"]
        {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:7077",
            "127.0.0.1.evil.example",
            "localhost.evil.example:80",
            "",
            ":80",
            "192.168.0.3:7077",
            "[2001:db8::1]:80",
            "0.0.0.0:7077",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
