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

#[test]
fn passes_over_hub_text_are_counted_once_and_go_on_offline_to_the_same_bits() {
    let Some(shared) = shared("passes_over_hub_text_are_counted_once_and_go_on_offline_to_the_same_bits") else {
        return;
    };
    let folder = tempfile::tempdir().expect("a scratch folder");
    let place = |name: &str| -> PathBuf { folder.path().join(name) };
    let passes = |home: &str, run: &str| {
        let mut command = vrtrain();
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/gpt2-124m.toml");
        command.env("HF_HOME", place(home)).env("NO_PROXY", "127.0.0.1").args(["pretrain", "--config"]).arg(config);
        command.arg("--run-dir").arg(place(run));
        let own = [
            "model.vocab_size=512",
            "tokenizer.source=vrtrain-test/stories260K",
            "data.source=openai/gsm8k",
            "data.files=main/test-*.parquet",
            "data.text_column=question",
            "data.validation.files=main/train-*.parquet",
            "train.micro_batch=8",
            "train.tokens_per_step=4096",
            "train.epochs=1.5",
            "train.eval_every=0",
        ];
        let smaller = SMALLER.iter().filter(|setting| {
            let key = setting.split('=').next();
            *setting != &"train.steps=6" && !own.iter().any(|other| other.split('=').next() == key)
        });
        smaller.chain(&own).for_each(|setting| {
            command.args(["--set", setting]);
        });
        command
    };
    let server = Server::start(&shared, &[]);
    let output = succeed(passes("home", "whole").env("HF_ENDPOINT", &server.endpoint));
    let (said, steps) = (stderr(&output), metrics(&place("whole")).len());
    assert!(said.contains("counting   a pass has"), "{said}");
    let pass: serde_json::Value =
        serde_json::from_slice(&std::fs::read(place("whole").join("pass.json")).expect("a count")).expect("JSON");
    let rows = (pass["tokens"].as_u64().expect("tokens") - 1) / 128;
    assert_eq!(steps as u64, rows * 3 / 2 / 32);
    drop(server);
    // Connections break while it counts; then it goes on without any.
    let server = Server::start(&shared, &["--drop-after", "100000", "--drop-every", "1"]);
    let schedule = format!("schedule.steps={steps}");
    let stopped = ["--set", &schedule, "--set", "train.epochs=0.4"];
    succeed(passes("other", "cut").args(stopped).env("HF_ENDPOINT", &server.endpoint));
    drop(server);
    let output = succeed(passes("other", "cut").arg("--resume").env("HF_HUB_OFFLINE", "1"));
    assert!(!stderr(&output).contains("counting"), "{}", stderr(&output));
    // But for the evaluation at the stop, which the uninterrupted run has no reason to make.
    let training = |run: &str| losses(&place(run)).into_iter().map(|(loss, _)| loss).collect::<Vec<_>>();
    assert_eq!(training("cut"), training("whole"));
    let weights = |run: &str| checkpoint_file(&place(run), "model.safetensors");
    assert!(weights("whole") == weights("cut"), "other bits after a resume");
}
