//! What a run leaves behind and says while it trains: JSON lines, telemetry, samples, status, TensorBoard's events.

mod common;

use common::*;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};

fn pretrain(config: &Path, run: &Path) -> Command {
    let mut command = vrtrain();
    command.args(["pretrain", "--config"]).arg(config).arg("--run-dir").arg(run);
    command
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
}

fn lines_of(run: &Path, name: &str) -> Vec<Value> {
    json_lines(&std::fs::read_to_string(run.join(name)).expect("the run has this file"))
}

fn status(run: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(run.join("status.json")).expect("the run has a status")).expect("JSON")
}

#[test]
fn json_lines_on_stdout_are_the_records_of_the_metrics_file() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let run = folder.path().join("run");
    let config = small_config(folder.path(), 9, 4);
    let output = succeed(pretrain(&config, &run).args(["--quiet", "--json-lines"]));
    assert_eq!(json_lines(&stdout(&output)), metrics(&run));
    assert_eq!(stderr(&output), "");
    let output = succeed(&mut pretrain(&config, &folder.path().join("other")));
    assert_eq!(stdout(&output), "");
    assert!(!stderr(&output).contains('\u{1b}'));
}

#[test]
fn a_run_goes_on_when_nobody_reads_its_json_lines_any_more() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let run = folder.path().join("run");
    let mut command = pretrain(&small_config(folder.path(), 9, 4), &run);
    let mut child = command.arg("--json-lines").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("ends");
    assert!(output.status.success() && stderr(&output).contains("stdout was closed"), "{}", stderr(&output));
    assert_eq!(metrics(&run).len(), 9);
}

#[test]
fn telemetry_and_status_follow_the_run_through_a_resume() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let run = folder.path().join("run");
    let config = small_config(folder.path(), 9, 4);
    succeed(pretrain(&config, &run).arg("--quiet"));
    assert_eq!(status(&run)["state"], "finished");
    // As after a crash: steps were written down that the newest checkpoint does not hold.
    std::fs::remove_dir_all(run.join("checkpoints/step-00000009")).expect("the last checkpoint is there");
    succeed(pretrain(&config, &run).args(["--quiet", "--resume"]));
    let telemetry = lines_of(&run, "telemetry.jsonl");
    let steps: Vec<_> = telemetry.iter().map(|line| line["step"].as_u64().expect("a step")).collect();
    assert_eq!(steps, (1..=9).collect::<Vec<_>>());
    let elapsed: Vec<_> = telemetry.iter().map(|line| number(line, "elapsed_s")).collect();
    assert!(elapsed.is_sorted() && elapsed[0] > 0.0, "{elapsed:?}");
    assert!(telemetry.iter().all(|line| (0.0..=1.0).contains(&number(line, "queue"))));

    let failed = folder.path().join("failed");
    let output = run_to_failure(pretrain(&config, &failed).args(["--quiet", "--set", "optimizer.lr=1e38"]));
    assert_eq!(status(&failed)["state"], "failed", "{output}");
    assert!(status(&failed)["error"].as_str().is_some_and(|error| output.contains(error)), "{output}");
}

fn run_to_failure(command: &mut Command) -> String {
    let output = run(command);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    stderr(&output)
}

#[test]
fn samples_are_kept_and_cut_back_with_the_metrics() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let run = folder.path().join("run");
    let settings = ["micro_batch=1", "tokens_per_step=128", "sample_every=2", "checkpoint_every=3", "eval_every=0"];
    let mut command = vrtrain();
    command.args(["pretrain", "--quiet", "--set", "train.steps=6", "--run-dir"]).arg(&run);
    for setting in settings {
        command.args(["--set", &format!("train.{setting}")]);
    }
    succeed(&mut command);
    let samples = lines_of(&run, "samples.jsonl");
    assert_eq!(samples.iter().map(|sample| &sample["step"]).collect::<Vec<_>>(), [2, 4, 6]);
    assert!(samples.iter().all(|sample| sample["text"].is_string()));
    std::fs::remove_dir_all(run.join("checkpoints/step-00000006")).expect("the last checkpoint is there");
    succeed(vrtrain().args(["pretrain", "--quiet", "--resume", "--run-dir"]).arg(&run));
    assert_eq!(lines_of(&run, "samples.jsonl"), samples);
}

/// Prints {tag: [[step, value], ...]} of a folder of event files, as TensorBoard reads them.
const READ_EVENTS: &str = r#"
import json, sys
try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ImportError:
    sys.exit(77)
events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})
events.Reload()
print(json.dumps({tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
"#;

#[test]
fn tensorboard_reads_the_values_of_metrics_jsonl_after_resumes_too() {
    let Some(python) = std::env::var_os("VRTRAIN_PYTHON") else {
        eprintln!("skipping: VRTRAIN_PYTHON is not set");
        return;
    };
    let folder = tempfile::tempdir().expect("a scratch folder");
    let path = folder.path().join("run");
    let config = small_config(folder.path(), 5, 4);
    // The first process writes no events, the second one the earlier steps too, the third goes on after a cut.
    succeed(pretrain(&config, &path).arg("--quiet"));
    let events = ["--quiet", "--resume", "--set", "train.tensorboard=true", "--set"];
    succeed(pretrain(&config, &path).args(events).arg("train.steps=9"));
    std::fs::remove_dir_all(path.join("checkpoints/step-00000009")).expect("the last checkpoint is there");
    succeed(pretrain(&config, &path).args(events).arg("train.steps=11"));

    let output = run(Command::new(&python).args(["-c", READ_EVENTS]).arg(path.join("tensorboard")));
    if output.status.code() == Some(77) {
        eprintln!("skipping: VRTRAIN_PYTHON has no tensorboard");
        return;
    }
    let read: Value = serde_json::from_str(&stdout(&output)).unwrap_or_else(|_| panic!("{}", stderr(&output)));
    let mut compared = 0;
    for (file, tags) in [
        ("metrics.jsonl", &["loss", "val_loss", "grad_norm", "lr", "eta", "gate", "velocity_sq", "tokens"][..]),
        ("telemetry.jsonl", &["elapsed_s", "queue"]),
    ] {
        for tag in tags {
            let lines = lines_of(&path, file);
            let own = lines.iter().filter(|line| line[tag].is_number());
            let expected: Vec<_> = own.map(|line| (line["step"].as_u64(), number(line, tag) as f32)).collect();
            let found = read[tag].as_array().unwrap_or_else(|| panic!("{tag} is missing in {read}"));
            let found = found.iter().map(|pair| (pair[0].as_u64(), pair[1].as_f64().expect("a number") as f32));
            let found: Vec<_> = found.collect();
            assert_eq!(found, expected, "{tag}");
            compared += found.len();
        }
    }
    assert!(compared > 80);
}
