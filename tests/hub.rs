//! Training from the hub's look-alike: the same batches whatever the network does, and again without it.

mod common;

use common::*;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A running look-alike; it ends with this value.
struct Server {
    process: Child,
    endpoint: String,
}

impl Server {
    fn start(shared: &Path, faults: &[&str]) -> Self {
        let root = shared.join("hub");
        let mut command = Command::new("python3");
        command.arg(root.join("hubserver.py")).arg(&root).args(["--seconds", "300"]).args(faults);
        let mut process = command.stdout(Stdio::piped()).spawn().expect("python3 starts");
        let mut line = String::new();
        let stdout = process.stdout.as_mut().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("the server says where it is");
        let ready: serde_json::Value = serde_json::from_str(&line).expect("one JSON line");
        Self { process, endpoint: ready["endpoint"].as_str().expect("an endpoint").to_owned() }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The real 124M config with the model and the shapes made small.
const SMALLER: &[&str] = &[
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=16",
    "model.n_inner=32",
    "model.n_positions=128",
    "train.steps=6",
    "train.sequence_length=128",
    "train.micro_batch=4",
    "train.tokens_per_step=1024",
    "train.eval_every=3",
    "train.checkpoint_every=3",
    "train.sample_every=0",
    "data.validation.files=sample/10BT/001_00000.parquet",
    "data.validation.tokens=1024",
];

fn pretrain(home: &Path, run: &Path) -> Command {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/gpt2-124m.toml");
    let mut command = vrtrain();
    command.env("HF_HOME", home).env("NO_PROXY", "127.0.0.1").args(["pretrain", "--quiet", "--config"]).arg(config);
    command.arg("--run-dir").arg(run);
    SMALLER.iter().for_each(|setting| {
        command.args(["--set", setting]);
    });
    command
}

fn losses(run: &Path) -> Vec<(f64, Option<f64>)> {
    metrics(run).iter().map(|record| (number(record, "loss"), record["val_loss"].as_f64())).collect()
}

#[test]
fn faults_of_the_network_change_nothing_and_the_cache_serves_offline() {
    let Some(shared) = shared("faults_of_the_network_change_nothing_and_the_cache_serves_offline") else { return };
    let folder = tempfile::tempdir().expect("a scratch folder");
    let place = |name: &str| -> PathBuf { folder.path().join(name) };
    let expected = {
        let server = Server::start(&shared, &[]);
        succeed(pretrain(&place("home"), &place("good")).env("HF_ENDPOINT", &server.endpoint));
        losses(&place("good"))
    };
    assert_eq!(expected.len(), 6);
    assert!(expected[5].1.is_some_and(|loss| loss < expected[2].1.unwrap_or(0.0)), "{expected:?}");
    let faults: [&[&str]; 4] = [
        &["--drop-after", "100000", "--drop-every", "1"],
        &["--fail-first", "3"],
        &["--cdn-fail-first", "3", "--cdn-fail-status", "403"],
        &["--cdn-fail-first", "3", "--cdn-fail-status", "429"],
    ];
    for (number, faults) in faults.iter().enumerate() {
        let server = Server::start(&shared, faults);
        let (home, run) = (place(&format!("home-{number}")), place(&format!("run-{number}")));
        succeed(pretrain(&home, &run).env("HF_ENDPOINT", &server.endpoint));
        assert_eq!(losses(&run), expected, "{faults:?}");
    }
    // No server any more: what was fetched serves again.
    succeed(pretrain(&place("home"), &place("offline")).env("HF_HUB_OFFLINE", "1"));
    assert_eq!(losses(&place("offline")), expected);
}

#[test]
fn a_gated_repository_and_a_missing_one_are_named_with_what_to_do() {
    let Some(shared) = shared("a_gated_repository_and_a_missing_one_are_named_with_what_to_do") else { return };
    let folder = tempfile::tempdir().expect("a scratch folder");
    let server = Server::start(&shared, &["--token", "secret"]);
    let (home, run_folder) = (folder.path().join("home"), folder.path().join("run"));
    let output = run(pretrain(&home, &run_folder).env("HF_ENDPOINT", &server.endpoint));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("HF_TOKEN"), "{}", stderr(&output));
    let wrong = run(pretrain(&home, &run_folder).env("HF_ENDPOINT", &server.endpoint).env("HF_TOKEN", "not-it"));
    assert!(!stderr(&wrong).contains("not-it"), "the token is printed: {}", stderr(&wrong));
    let mut command = pretrain(&home, &run_folder);
    command
        .env("HF_ENDPOINT", &server.endpoint)
        .env("HF_TOKEN", "secret")
        .args(["--set", "data.source=nobody/nothing"]);
    let output = run(&mut command);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("nobody/nothing"), "{}", stderr(&output));
    assert!(!run_folder.exists());
    succeed(pretrain(&home, &run_folder).env("HF_ENDPOINT", &server.endpoint).env("HF_TOKEN", "secret"));
}
