//! The client against a server that breaks bodies off, stalls, refuses and lies.

use super::test_server::{Fault, Reply, Seen, Server};
use super::*;
use std::path::Path;
use std::time::{Duration, Instant};

/// Sha256 and bytes of a file of 300,000 bytes without a pattern that a wrong offset would hide.
fn content() -> (Vec<u8>, String) {
    let bytes: Vec<u8> = (0..75_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let mut hasher = hash::Hasher::like(&"0".repeat(64), 0);
    hasher.update(&bytes);
    (bytes, hasher.finish())
}

fn settings(endpoint: &str, home: &Path) -> Settings {
    let variable = |name: &str| match name {
        "HF_ENDPOINT" => Some(endpoint.to_string()),
        "HF_HOME" => home.to_str().map(str::to_string),
        "HF_TOKEN" => Some("hf_secret".to_string()),
        _ => None,
    };
    let ms = Duration::from_millis;
    let settings = Settings::from_variables(&variable).expect("settings");
    let retry = RetryPolicy { first_wait: ms(2), longest_wait: ms(20), patience: ms(3000), ..settings.retry };
    let retry = RetryPolicy { connect_patience: ms(500), first_patience: ms(3000), ..retry };
    Settings { stall: ms(400), retry, ..settings }
}

/// A hub whose one file, `big.bin`, `handler` serves.
struct Scene {
    server: Server,
    home: tempfile::TempDir,
    hub: Hub,
    repo: RepoId,
    file: HubFile,
    bytes: Vec<u8>,
}

impl Scene {
    fn new(handler: impl Fn(&Seen, usize, &[u8]) -> Reply + Send + Sync + 'static) -> Self {
        let (bytes, sha256) = content();
        let served = bytes.clone();
        let server = Server::start(move |seen, before| handler(seen, before, &served));
        let home = tempfile::tempdir().expect("a folder");
        let hub = Hub::new(settings(&server.address, home.path())).expect("a client");
        let repo = RepoId::parse(RepoKind::Model, "o/n").expect("an id");
        let (path, size) = ("big.bin".to_string(), bytes.len() as u64);
        let file = HubFile { path, size, sha256: Some(sha256), git_oid: "0".repeat(40) };
        Self { server, home, hub, repo, file, bytes }
    }

    fn read(&self, range: std::ops::Range<usize>) -> Result<Vec<u8>> {
        self.hub.open(&self.repo, &self.file).read(range.start as u64..range.end as u64)
    }

    /// Reads bytes from the middle and compares them.
    fn assert_reads(&self) {
        assert!(self.read(1000..290_000).expect("bytes") == self.bytes[1000..290_000]);
    }

    fn download(&self) -> Result<Vec<u8>> {
        let path = self.hub.download(&self.repo, "big.bin")?;
        Ok(std::fs::read(path).expect("a file"))
    }

    /// Files in the cache that are not links, locks or parts.
    fn blobs(&self) -> Vec<String> {
        let blobs = self.home.path().join("hub/models--o--n/blobs");
        let entries = std::fs::read_dir(blobs).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }
}

/// The hub's answer for the file itself, with all that it tells about it.
fn from_hub(seen: &Seen, bytes: &[u8]) -> Reply {
    let (_, sha256) = content();
    Reply::file(seen, bytes).header("X-Repo-Commit", "c".repeat(40)).header("ETag", format!("\"{sha256}\""))
}

#[test]
fn a_body_that_breaks_off_is_continued_from_the_byte_where_it_stopped() {
    let scene = Scene::new(|seen, before, bytes| {
        let fault = if before < 5 { Fault::DropAfter(50_001) } else { Fault::None };
        from_hub(seen, bytes).fault(fault)
    });
    scene.assert_reads();
    let starts: Vec<_> = scene.server.seen().iter().filter_map(|seen| Some(seen.range()?.0)).collect();
    assert_eq!(starts, [1000, 51_001, 101_002, 151_003, 201_004, 251_005]);
}

#[test]
fn a_stalled_body_is_given_up_and_continued() {
    let scene = Scene::new(|seen, before, bytes| {
        let fault = if before == 0 { Fault::StallAfter(150_000) } else { Fault::None };
        from_hub(seen, bytes).fault(fault)
    });
    let start = Instant::now();
    scene.assert_reads();
    let took = start.elapsed();
    assert!((Duration::from_millis(400)..Duration::from_secs(4)).contains(&took), "{took:?}");
    assert_eq!(scene.server.seen()[1].range(), Some((151_000, 290_000)));
}

#[test]
fn a_server_that_stalls_for_ever_ends_in_an_error_that_says_so() {
    let scene = Scene::new(|seen, _, bytes| from_hub(seen, bytes).fault(Fault::StallAfter(0)));
    let start = Instant::now();
    let error = scene.read(0..1000).expect_err("no bytes");
    let text = error.to_string();
    assert!(matches!(error, HubError::GivenUp { .. }) && text.contains("nothing came from 127.0.0.1"), "{text}");
    assert!(start.elapsed() < Duration::from_secs(8));
}

#[test]
fn a_whole_file_in_answer_to_a_range_is_taken_from_the_right_byte() {
    let scene = Scene::new(|_, before, bytes| {
        let fault = if before == 0 { Fault::DropAfter(100_000) } else { Fault::None };
        Reply::new(200, bytes).fault(fault)
    });
    scene.assert_reads();
}

#[test]
fn an_answer_that_is_not_the_range_is_an_error_and_is_not_cached() {
    type Lie = fn(&Seen, &[u8]) -> Reply;
    let lies: [(&str, Lie); 5] = [
        ("html", |_, _| Reply::new(200, "<html>please log in</html>").header("Content-Type", "text/html")),
        ("other start", |_, bytes| Reply::new(206, &bytes[..100]).header("Content-Range", "bytes 0-99/300000")),
        ("other size", |_, bytes| Reply::new(206, &bytes[..100]).header("Content-Range", "bytes 1000-1099/999")),
        ("no range", |_, bytes| Reply::new(206, &bytes[..100])),
        ("no content", |_, _| Reply::new(204, "")),
    ];
    for (name, lie) in lies {
        let scene = Scene::new(move |seen, _, bytes| lie(seen, bytes));
        let error = scene.read(1000..1100).expect_err(name);
        assert!(matches!(error, HubError::Corrupt { .. }), "{name}: {error}");
        assert_eq!(scene.server.seen().len(), 3, "{name}");
        assert!(!scene.home.path().join("vrtrain/ranges").exists(), "{name}");
    }
}

#[test]
fn a_file_that_changed_since_it_was_listed_is_an_error() {
    let scene = Scene::new(|seen, _, bytes| Reply::file(seen, bytes).header("X-Linked-ETag", "b".repeat(64)));
    assert!(matches!(scene.read(0..10), Err(HubError::Changed { .. })));
}

#[test]
fn refusals_of_the_hub_end_at_once_and_limits_and_outages_are_waited_for() {
    let scene = Scene::new(|_, _, _| Reply::new(404, "").header("X-Error-Code", "EntryNotFound"));
    assert!(matches!(scene.read(0..10), Err(HubError::FileMissing { .. })));
    assert!(matches!(scene.download(), Err(HubError::FileMissing { .. })));
    assert_eq!(scene.server.seen().len(), 2);

    let scene = Scene::new(|seen, before, bytes| match before {
        0 => Reply::new(429, "slow down").header("Retry-After", 1),
        1 => Reply::new(503, ""),
        2 => Reply::new(500, ""),
        _ => from_hub(seen, bytes),
    });
    let start = Instant::now();
    scene.assert_reads();
    assert!(start.elapsed() >= Duration::from_secs(1), "Retry-After asks for one second");

    let scene = Scene::new(|_, _, _| Reply::new(429, "slow down").header("Retry-After", 1));
    assert!(matches!(scene.read(0..10), Err(HubError::RateLimited { .. })));
}

#[test]
fn the_token_goes_to_the_hub_alone_and_an_expired_address_is_renewed() {
    let (bytes, sha256) = content();
    // The first address expires after two requests, as signed ones do.
    let bodies = Server::start(move |seen, before| match before {
        2 => Reply::new(403, "<Error>expired</Error>"),
        _ => Reply::file(seen, &bytes),
    });
    let address = bodies.address.clone();
    let scene = Scene::new(move |_, before, _| {
        Reply::new(302, "")
            .header("Location", format!("{address}/signed?signature={before}"))
            .header("X-Linked-ETag", format!("\"{sha256}\""))
    });
    let remote = scene.hub.open(&scene.repo, &scene.file);
    for start in [0, 1000, 2000, 3000] {
        let read = remote.read(start..start + 500).expect("bytes");
        assert_eq!(read, scene.bytes[start as usize..start as usize + 500]);
    }
    let seen = bodies.seen();
    let targets: Vec<&str> = seen.iter().map(|seen| seen.target.rsplit('=').next().unwrap_or("")).collect();
    assert_eq!(targets, ["0", "0", "0", "1", "1"], "one request to the hub for each address");
    assert!(seen.iter().all(|seen| seen.header("authorization").is_none()));
    assert!(scene.server.seen().iter().all(|seen| seen.header("authorization") == Some("Bearer hf_secret")));
}

#[test]
fn ranges_are_fetched_once_and_serve_a_later_run_offline() {
    let scene = Scene::new(|seen, _, bytes| from_hub(seen, bytes));
    scene.assert_reads();
    scene.assert_reads();
    assert_eq!(scene.server.seen().len(), 1);
    let settings = Settings { mode: Mode::Offline, ..settings("http://127.0.0.1:9", scene.home.path()) };
    let offline = Hub::new(settings).expect("a client").open(&scene.repo, &scene.file);
    assert!(offline.read(1000..290_000).expect("bytes") == scene.bytes[1000..290_000]);
    assert!(matches!(offline.read(0..10), Err(HubError::Offline { .. })));
    assert!(matches!(offline.read(0..300_001), Err(HubError::BadRange { .. })));
    assert!(offline.read(7..7).expect("nothing").is_empty());
}

#[test]
fn a_download_goes_on_from_the_part_that_a_killed_run_left() {
    let scene = Scene::new(|seen, _, bytes| from_hub(seen, bytes));
    let blobs = scene.home.path().join("hub/models--o--n/blobs");
    std::fs::create_dir_all(&blobs).expect("a folder");
    let part = blobs.join(format!("{}.incomplete", scene.file.identity()));
    std::fs::write(&part, &scene.bytes[..123_456]).expect("written");
    assert!(scene.download().expect("a file") == scene.bytes);
    let seen = scene.server.seen();
    let ranges: Vec<_> = seen.iter().map(|seen| (seen.method.as_str(), seen.range())).collect();
    assert_eq!(ranges, [("HEAD", None), ("GET", Some((123_456, 300_000)))]);
    assert_eq!(scene.blobs(), [scene.file.identity()]);

    // A part of something else is found out by the hash, and the file fetched from its start.
    std::fs::remove_file(blobs.join(scene.file.identity())).expect("removed");
    std::fs::write(&part, vec![7; 1000]).expect("written");
    assert!(scene.download().expect("a file") == scene.bytes);
    assert_eq!(scene.blobs(), [scene.file.identity()]);
}

#[test]
fn a_wrong_body_never_becomes_the_file() {
    type Lie = fn(&[u8]) -> Reply;
    let lies: [(&str, Lie); 3] = [
        ("error page", |_| Reply::new(200, "{\"error\":\"Access denied\"}")),
        ("changed byte", |bytes| {
            let mut bytes = bytes.to_vec();
            bytes[200_000] ^= 1;
            Reply::new(200, bytes)
        }),
        ("cut short", |bytes| Reply::new(200, &bytes[..1000])),
    ];
    for (name, lie) in lies {
        let scene = Scene::new(move |seen, _, bytes| match seen.method.as_str() {
            "HEAD" => from_hub(seen, bytes),
            _ => lie(bytes),
        });
        let error = scene.download().map(|_| ()).expect_err(name);
        assert!(matches!(error, HubError::Corrupt { .. }), "{name}: {error}");
        assert!(scene.hub.inner.cache.find(&scene.repo, "big.bin").is_none(), "{name}");
        assert!(scene.blobs().iter().all(|blob| blob.ends_with(".incomplete")), "{name}: {:?}", scene.blobs());
    }
}

#[test]
fn eight_threads_that_want_one_file_fetch_it_once() {
    let scene = Scene::new(|seen, _, bytes| from_hub(seen, bytes));
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| scene.download().expect("a file"))).collect();
        assert!(threads.into_iter().all(|thread| thread.join().is_ok_and(|bytes| bytes == scene.bytes)));
    });
    assert_eq!(scene.server.seen().iter().filter(|seen| seen.method == "GET").count(), 1);
}

#[test]
fn a_log_in_page_instead_of_a_listing_is_named_and_paths_that_leave_the_folder_are_refused() {
    let scene = Scene::new(|_, _, _| Reply::new(200, "<html>please log in</html>"));
    let error = scene.hub.list(&scene.repo).expect_err("no listing").to_string();
    assert!(error.contains("log-in page") && error.contains("<html>please"), "{error}");
    let scene = Scene::new(|seen, _, _| match seen.target.contains("/tree/") {
        true => Reply::new(200, r#"[{"type":"file","oid":"00","size":1,"path":"../../etc/passwd"}]"#),
        false => Reply::new(200, r#"{"sha":"00"}"#),
    });
    assert!(matches!(scene.hub.list(&scene.repo), Err(HubError::BadPath { .. })));
    assert!(matches!(scene.hub.download(&scene.repo, "../x"), Err(HubError::BadPath { .. })));
}

#[test]
fn no_server_at_all_ends_in_an_error_with_the_cause_and_without_the_query() {
    let home = tempfile::tempdir().expect("a folder");
    // Port 9 (discard) refuses connections.
    let hub = Hub::new(settings("http://127.0.0.1:9", home.path())).expect("a client");
    let repo = RepoId::parse(RepoKind::Model, "o/n").expect("an id");
    let error = hub.list(&repo).expect_err("no server").to_string();
    assert!(error.contains("cannot connect") && error.contains("refused") && error.contains("HF_ENDPOINT"), "{error}");
}

/// Proxies are read from the environment, which belongs to a process: so this test runs itself in another one.
#[test]
fn proxies_of_the_environment_are_used_except_where_no_proxy_says_otherwise() {
    let serve = || Server::start(|seen, _| from_hub(seen, &content().0));
    let run = |endpoint: &str, proxy: &Server, no_proxy: &str| {
        let home = tempfile::tempdir().expect("a folder");
        let output = std::process::Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "hub::network_tests::child_behind_a_proxy", "--ignored", "--nocapture"])
            .env_clear()
            .envs([("HF_ENDPOINT", endpoint), ("HF_TOKEN", "hf_secret"), ("NO_PROXY", no_proxy)])
            .envs([("HTTP_PROXY", &proxy.address), ("HTTPS_PROXY", &proxy.address)])
            .env("HF_HOME", home.path())
            .output()
            .expect("it runs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let (proxy, hub) = (serve(), serve());
    let through = run("http://hub.invalid", &proxy, "");
    assert!(through.contains("got 10 bytes"), "{through}");
    assert_eq!(proxy.seen()[0].target, "http://hub.invalid/o/n/resolve/main/big.bin");
    let around = run(&hub.address, &proxy, "localhost,127.0.0.0/8");
    assert!(around.contains("got 10 bytes"), "{around}");
    assert_eq!((proxy.seen().len(), hub.seen().len()), (1, 1));

    // A secure hub is asked through a tunnel, into which this proxy does not let us; it never sees the token.
    let proxy = Server::start(|_, _| Reply::new(502, ""));
    let tunnel = run("https://hub.invalid", &proxy, "");
    assert!(tunnel.contains("GivenUp"), "{tunnel}");
    let asked = &proxy.seen()[0];
    assert_eq!((asked.method.as_str(), asked.target.as_str()), ("CONNECT", "hub.invalid:443"));
    assert_eq!(asked.header("authorization"), None);
}

#[test]
#[ignore = "needs a process of its own: `cargo test --release --lib proxies_of` starts it as one"]
fn child_behind_a_proxy() {
    let (bytes, sha256) = content();
    let mut settings = Settings::from_env().expect("settings");
    settings.retry.connect_patience = Duration::from_millis(500);
    let hub = Hub::new(settings).expect("a client");
    let repo = RepoId::parse(RepoKind::Model, "o/n").expect("an id");
    let (path, size) = ("big.bin".to_string(), bytes.len() as u64);
    let file = HubFile { path, size, sha256: Some(sha256), git_oid: String::new() };
    match hub.open(&repo, &file).read(0..10) {
        Ok(bytes) => println!("got {} bytes", bytes.len()),
        Err(error) => println!("{error:?}"),
    }
}
