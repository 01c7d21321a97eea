//! `report`, `watch`, `runs`, `completions` and `man`, from outside.

mod common;

use common::*;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn train(folder: &Path, name: &str, settings: &[&str]) -> PathBuf {
    let run = folder.join(name);
    let mut command = vrtrain();
    command.args(["pretrain", "--quiet", "--config"]).arg(small_config(folder, 8, 4)).arg("--run-dir").arg(&run);
    for setting in settings {
        command.args(["--set", setting]);
    }
    succeed(&mut command);
    run
}

fn report(arguments: &[&str], runs: &[&Path]) -> Command {
    let mut command = vrtrain();
    command.arg("report").args(runs).args(arguments);
    command
}

#[test]
fn a_report_is_a_page_a_picture_and_tables_of_the_same_numbers() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let a = train(folder.path(), "a", &[]);
    let b = train(folder.path(), "b", &["optimizer.lr=0.001", "seed=6"]);

    succeed(&mut report(&[], &[&a]));
    let page = std::fs::read_to_string(a.join("report.html")).expect("the page is in the run folder");
    assert!(page.contains("connect-src 'none'") && !page.contains("src=\"http") && page.len() > 60_000);

    let stem = folder.path().join("figure.x");
    let mut both = report(&["--svg", "--png", "--out"], &[&a, &b]);
    succeed(both.arg(&stem));
    let png = std::fs::read(folder.path().join("figure.png")).expect("a PNG");
    assert_eq!(png[..8], *b"\x89PNG\r\n\x1a\n");
    let svg = std::fs::read_to_string(folder.path().join("figure.svg")).expect("an SVG");
    assert!(svg.starts_with("<svg") && svg.contains("gradient norm"));

    let markdown = stdout(&succeed(&mut report(&["--markdown"], &[&a, &b])));
    let last = format!("{:.4}", number(&metrics(&a)[7], "val_loss"));
    assert!(markdown.contains("| a | finished | 8/8 |") && markdown.contains(&last), "{markdown}");
    assert!(markdown.contains("| `seed` | 5 | 6 |") && markdown.contains("| `optimizer.lr` | 0.003 | 0.001 |"));
    assert!(!markdown.contains("n_layer"), "equal settings are left out: {markdown}");

    // Every number of metrics.jsonl stands in the CSV with all of its digits.
    let csv = stdout(&succeed(&mut report(&["--csv"], &[&a, &b])));
    let mut lines = csv.lines();
    let heads: Vec<&str> = lines.next().expect("a head").split(',').collect();
    let expected: Vec<Value> = metrics(&a).into_iter().chain(metrics(&b)).collect();
    assert_eq!(lines.clone().count(), expected.len());
    for (line, record) in lines.zip(&expected) {
        let cells: Vec<&str> = line.split(',').collect();
        // The digest of the batch is no number.
        let numbers = record.as_object().expect("an object").iter().filter(|(_, value)| value.is_number());
        assert!(numbers.clone().count() >= 10);
        for (name, value) in numbers {
            let cell = cells[heads.iter().position(|head| head == name).expect("a column")];
            assert_eq!(cell.parse::<f64>().ok(), value.as_f64(), "{name}");
        }
    }
}

#[test]
fn reports_of_nothing_say_so() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    for (runs, words) in [("gone", "there is no run"), ("", "there is no run in")] {
        let output = run(&mut report(&[], &[&folder.path().join(runs)]));
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
    assert!(!folder.path().join("report.html").exists());
    let a = train(folder.path(), "a", &[]);
    std::fs::write(a.join("metrics.jsonl"), "{\"step\":1,\"loss\":3}\nnonsense\n").expect("written");
    let output = run(&mut report(&[], &[&a]));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("metrics.jsonl:2"), "{}", stderr(&output));
}

fn states(folder: &Path) -> Vec<(String, String)> {
    let listed: Value =
        serde_json::from_str(&stdout(&succeed(vrtrain().arg("runs").arg(folder).arg("--json")))).expect("JSON");
    let text = |run: &Value, key: &str| run[key].as_str().expect("text").to_owned();
    listed.as_array().expect("a list").iter().map(|run| (text(run, "name"), text(run, "state"))).collect()
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "{what} never happened");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn begin(folder: &Path, name: &str) -> Child {
    let mut command = vrtrain();
    command.args(["pretrain", "--quiet", "--set", "train.steps=1000000", "--config"]);
    command.arg(small_config(folder, 8, 100)).arg("--run-dir").arg(folder.join(name));
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starts");
    let metrics = folder.join(name).join("metrics.jsonl");
    wait_for("the first step", || std::fs::metadata(&metrics).is_ok_and(|metadata| metadata.len() > 0));
    child
}

#[test]
fn runs_tells_finished_running_killed_and_interrupted_runs_apart() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    train(folder.path(), "a", &[]);
    let mut killed = begin(folder.path(), "b");
    killed.kill().expect("killed");
    // Not waited for: a zombie is dead too.
    let mut running = begin(folder.path(), "c");
    let pair = |name: &str, state: &str| (name.to_owned(), state.to_owned());
    wait_for("death", || states(folder.path()).contains(&pair("b", "dead")));
    assert_eq!(states(folder.path()), [pair("a", "finished"), pair("b", "dead"), pair("c", "running")]);
    killed.wait().expect("ends");
    // A second trainer is kept out of a run that goes on.
    let mut second = vrtrain();
    let output = run(second.args(["pretrain", "--quiet", "--resume", "--run-dir"]).arg(folder.path().join("c")));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("in use by another vrtrain"), "{}", stderr(&output));
    assert!(states(folder.path()).contains(&pair("c", "running")));
    let stop = Command::new("kill").arg(running.id().to_string()).status().expect("kill runs");
    assert!(stop.success() && running.wait().expect("ends").code() == Some(3));
    assert!(states(folder.path()).contains(&pair("c", "interrupted")));
    let table = stdout(&succeed(vrtrain().arg("runs").arg(folder.path())));
    assert!(table.starts_with("RUN  STATE") && table.contains("b is dead"), "{table}");
}

/// The live page's server, ended with the test.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    fn start(runs: &Path) -> Self {
        let mut command = vrtrain();
        command.arg("watch").arg(runs).args(["--port", "0"]).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("an address");
        let port = line.trim().trim_end_matches('/').rsplit(':').next().and_then(|port| port.parse().ok());
        Self { child, port: port.unwrap_or_else(|| panic!("no port in {line:?}")) }
    }

    fn connect(&self, request: &str, host: &str) -> TcpStream {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("the server listens");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a time-out");
        write!(stream, "{request} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").expect("sent");
        stream
    }

    fn answer(&self, request: &str, host: &str) -> String {
        let mut text = String::new();
        self.connect(request, host).read_to_string(&mut text).expect("an answer");
        text
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads events until one satisfies `wanted`.
fn event(reader: &mut impl BufRead, wanted: impl Fn(&str, &Value) -> bool) -> Value {
    let (mut name, mut line) = (String::new(), String::new());
    loop {
        line.clear();
        assert!(reader.read_line(&mut line).expect("events come") > 0, "the events ended");
        if let Some(text) = line.strip_prefix("event:") {
            name = text.trim().to_owned();
        } else if let Some(text) = line.strip_prefix("data:") {
            let value = serde_json::from_str(text).expect("JSON");
            if wanted(&name, &value) {
                return value;
            }
        }
    }
}

#[test]
fn the_live_page_is_read_only_and_refuses_foreign_hosts() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    train(folder.path(), "a", &[]);
    let server = Server::start(folder.path());
    let page = server.answer("GET /", &format!("127.0.0.1:{}", server.port));
    assert!(page.starts_with("HTTP/1.1 200") && page.contains("text/html"), "{}", &page[..300]);
    for header in ["content-security-policy: default-src 'none'", "x-content-type-options: nosniff", "no-store"] {
        assert!(page.to_lowercase().contains(header), "{header}");
    }
    assert!(server.answer("GET /", "localhost").starts_with("HTTP/1.1 200"));
    assert!(server.answer("GET /", "evil.example").starts_with("HTTP/1.1 403"));
    assert!(server.answer("GET /events", "evil.example").starts_with("HTTP/1.1 403"));
    assert!(server.answer("POST /", "localhost").starts_with("HTTP/1.1 405"));
    assert!(server.answer("DELETE /events", "localhost").starts_with("HTTP/1.1 405"));
    assert!(server.answer("GET /../a/config.toml", "localhost").starts_with("HTTP/1.1 404"));
}

#[test]
fn the_live_page_gets_all_runs_then_new_runs_and_new_steps() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    train(folder.path(), "a", &[]);
    let server = Server::start(folder.path());
    let mut events = BufReader::new(server.connect("GET /events", "localhost"));
    let first = event(&mut events, |name, value| name == "run" && value["block"]["rows"] == 8);
    assert_eq!((&first["info"]["name"], &first["info"]["state"]), (&"a".into(), &"finished".into()));
    let mut running = begin(folder.path(), "b");
    let id = folder.path().join("b").display().to_string();
    event(&mut events, |name, value| name == "run" && value["info"]["id"] == id.as_str());
    let more = event(&mut events, |name, value| name == "rows" && value["id"] == id.as_str());
    let steps = more["columns"]["step"].as_array().expect("steps").len();
    assert_eq!(more["columns"]["loss"].as_array().expect("losses").len(), steps);
    running.kill().expect("killed");
    running.wait().expect("ends");
    event(&mut events, |_, value| value["info"]["id"] == id.as_str() && value["info"]["state"] == "dead");
}

#[test]
fn a_browser_shows_the_report_and_follows_the_live_page() {
    let variable = |name: &str| std::env::var_os(name);
    let (Some(chromium), Some(python)) = (variable("VRTRAIN_CHROMIUM"), variable("VRTRAIN_PYTHON")) else {
        eprintln!("skipping: VRTRAIN_CHROMIUM (a Chromium) or VRTRAIN_PYTHON (with playwright) is not set");
        return;
    };
    let folder = tempfile::tempdir().expect("a scratch folder");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/browser_test.py");
    let config = small_config(folder.path(), 60, 20);
    let mut command = Command::new(python);
    command.arg(script).arg(env!("CARGO_BIN_EXE_vrtrain")).arg(chromium).arg(config).arg(folder.path());
    let output = succeed(&mut command);
    assert!(stdout(&output).trim().ends_with("ok"), "{}", stdout(&output));
}

#[test]
fn completions_and_man_pages_know_every_command() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    for shell in ["bash", "zsh", "fish"] {
        let script = stdout(&succeed(vrtrain().args(["completions", shell])));
        assert!(script.contains("pretrain") && script.contains("--resume") || script.contains("-l resume"), "{shell}");
    }
    let pages = folder.path().join("man1");
    succeed(vrtrain().args(["man", "--out"]).arg(&pages));
    for name in ["vrtrain.1", "vrtrain-pretrain.1", "vrtrain-report.1", "vrtrain-watch.1", "vrtrain-runs.1"] {
        let page = std::fs::read_to_string(pages.join(name)).expect("a man page");
        assert!(page.contains(".SH NAME"), "{name}");
    }
}
