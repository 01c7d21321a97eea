//! The laboratory's smaller tools from outside: the range test and the gate's constants, sharpness, stability, tokenizers.

mod common;

use common::{metrics, number, run, small_config, stderr, stdout, succeed, vrtrain};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn json(output: &Output) -> Value {
    serde_json::from_str(&stdout(output)).unwrap_or_else(|error| panic!("{error}: {}", stdout(output)))
}

/// A small grid, seconds long.
fn grid(folder: &Path) -> String {
    let text = "seed = 3\ntask = { name = \"gridworld\", batch = 16, side = 4, layers = 1, width = 16 }\n\
                optimizer = { name = \"vradam\", lr = 3e-3 }\nschedule = { name = \"constant\" }\n\
                train = { steps = 60, eval_every = 20, checkpoint_every = 20 }\n";
    let path = folder.join("grid.toml");
    std::fs::write(&path, text).expect("a config can be written");
    path.to_string_lossy().into_owned()
}

/// Insists on exit code 2 and on words of the message.
fn refused(command: &mut Command, words: &[&str]) {
    let output = run(command);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{command:?}: {said}");
    words.iter().for_each(|word| assert!(said.contains(word), "{command:?}: no {word:?} in {said}"));
}

#[test]
fn keys_that_a_tuning_run_sets_itself_and_bad_configs_are_refused_before_a_folder_is_made() {
    let folder = tempfile::tempdir().expect("a folder");
    let (config, out) = (grid(folder.path()), folder.path().join("out"));
    let tune = |what: &str, setting: &str| {
        let mut command = vrtrain();
        command.args(["tune", what, "--config", &config, "--set", setting, "--out"]).arg(&out);
        command
    };
    for (what, setting, word) in [
        ("lr", "optimizer.lr=1", "--from and --to"),
        ("lr", "optimizer={lr=1}", "--from and --to"),
        ("lr", "schedule.name=cosine", "--from"),
        ("lr", "schedule.steps=5", "--steps"),
        ("lr", "train.steps=5", "--steps"),
        ("lr", "train.epochs=5", "--steps"),
        ("lr", "train.eval_every=5", "never validates"),
        ("gate", "train.steps=5", "schedule.steps"),
        ("gate", "train.checkpoint_every=5", "a checkpoint"),
    ] {
        refused(&mut tune(what, setting), &[&format!("--set {setting}"), "sets", word]);
        assert!(!out.exists(), "{setting}");
    }
    // What the gate's recommendation does not hold for.
    for (setting, word) in
        [("gate_power=3", "gate_power"), ("gate_source=gradient", "gate_source"), ("gate_scope=group", "gate_scope")]
    {
        refused(&mut tune("gate", &format!("optimizer.{setting}")), &[word, "||v||^2"]);
        assert!(!out.exists(), "{setting}");
    }
    for what in ["lr", "gate"] {
        refused(&mut tune(what, "optimizer.beta1=2"), &["beta1"]);
        assert!(!out.exists(), "{what}");
        std::fs::create_dir(&out).expect("a folder");
        std::fs::write(out.join("thesis.txt"), "mine").expect("a file");
        refused(&mut tune(what, "seed=4"), &["--out", "not empty"]);
        std::fs::remove_dir_all(&out).expect("the folder");
    }
}

#[test]
fn the_gates_short_run_has_the_schedule_of_the_real_one_in_whichever_unit_its_length_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = small_config(folder.path(), 200, 50);
    let text = std::fs::read_to_string(&config).expect("the config");
    let rates = |length: &str| {
        std::fs::write(&config, text.replace("steps = 200\n", &format!("{length}\n"))).expect("a config");
        let out = folder.path().join(length.replace(' ', ""));
        succeed(vrtrain().args(["tune", "gate", "--steps", "12", "--config"]).arg(&config).arg("--out").arg(&out));
        metrics(&out.join("run")).iter().map(|record| number(record, "lr")).collect::<Vec<_>>()
    };
    let in_steps = rates("steps = 200");
    assert!(in_steps.len() == 12 && in_steps[11] > 0.9 * in_steps[3], "{in_steps:?}");
    // 256 tokens a step.
    assert_eq!(rates("tokens = 51200"), in_steps);
    assert_eq!(rates("tokens = 51199"), in_steps);
    std::fs::write(&config, text.replace("steps = 200\n", "epochs = 2\n")).expect("a config");
    let out = folder.path().join("epochs");
    let gate = |more: &[&str]| {
        let mut command = vrtrain();
        command.args(["tune", "gate", "--steps", "12", "--config"]).arg(&config).arg("--out").arg(&out).args(more);
        command
    };
    refused(&mut gate(&[]), &["train.epochs", "schedule.steps"]);
    assert!(!out.exists());
    succeed(&mut gate(&["--set", "schedule.steps=200"]));
    let given: Vec<f64> = metrics(&out.join("run")).iter().map(|record| number(record, "lr")).collect();
    assert_eq!(given, in_steps);
    refused(&mut gate(&["--set", "schedule.steps=200"]), &["--out", "finished `tune gate`"]);
}

#[cfg(target_os = "linux")]
mod disturbed {
    use super::*;
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    #[test]
    fn a_failure_other_than_divergence_is_no_finding_of_the_range_test() {
        let folder = tempfile::tempdir().expect("a folder");
        let (config, out) = (grid(folder.path()), folder.path().join("out"));
        // Files of a few kilobytes at most: the run's records do not fit, as on a full disk.
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\""]).arg(env!("CARGO_BIN_EXE_vrtrain"));
        command.args(["tune", "lr", "--config", &config, "--to", "0.1", "--steps", "400", "--out"]).arg(&out);
        let output = run(&mut command);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{said}{}", stdout(&output));
        assert!(
            said.contains("the run failed") && said.contains("metrics.jsonl") && stdout(&output).is_empty(),
            "{said}"
        );
        assert!(!out.join("range.png").exists() && !out.join("result.json").exists());
        // With room again the same command comes to a result; another one is not mixed with it.
        let again = |steps: &str| {
            let mut command = vrtrain();
            command.args(["tune", "lr", "--config", &config, "--to", "0.1", "--steps", steps, "--out"]).arg(&out);
            command
        };
        refused(&mut again("300"), &["--out", "unfinished run"]);
        succeed(&mut again("400"));
        assert_eq!(metrics(&out.join("run")).len(), 400);
        refused(&mut again("400"), &["--out", "finished `tune lr`"]);
    }

    #[test]
    fn an_interrupted_tuning_run_goes_on_with_the_same_command() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = grid(folder.path());
        for (what, numbers) in [("lr", ["steepest", "least"]), ("gate", ["beta3", "alpha1"])] {
            let tune = |out: &Path| {
                let mut command = vrtrain();
                command.args(["tune", what, "--config", &config, "--steps", "20000", "--json", "--out"]).arg(out);
                command
            };
            let [whole, cut] = ["whole", "cut"].map(|name| folder.path().join(format!("{what}-{name}")));
            let expected = json(&succeed(&mut tune(&whole)));
            let mut command = tune(&cut);
            let study = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
            let begun = Instant::now();
            let lines =
                || std::fs::read_to_string(cut.join("run/metrics.jsonl")).map_or(0, |text| text.lines().count());
            while lines() < 300 {
                assert!(begun.elapsed() < Duration::from_secs(60), "the run does not begin");
                std::thread::sleep(Duration::from_millis(1));
            }
            let status = Command::new("kill").args(["-INT", &study.id().to_string()]).status();
            assert!(status.expect("kill is a command").success());
            let output = study.wait_with_output().expect("the study ends");
            assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
            assert!(stderr(&output).contains("the same command goes on"), "{}", stderr(&output));
            assert!(lines() < 20_000 && !cut.join("result.json").exists());
            let resumed = json(&succeed(&mut tune(&cut)));
            numbers.iter().for_each(|key| assert_eq!(resumed[key], expected[key], "{what} {key}"));
        }
    }
}

#[test]
fn sharpness_refuses_what_it_would_ignore_or_could_not_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let [task, model] = ["task", "model"].map(|name| folder.path().join(name));
    succeed(vrtrain().args(["lab", "train", "--quiet", "--config", &grid(folder.path())]).arg("--run-dir").arg(&task));
    let config = small_config(folder.path(), 2, 1);
    succeed(vrtrain().args(["pretrain", "--quiet", "--config"]).arg(config).arg("--run-dir").arg(&model));
    let sharpness = |path: &Path, arguments: &[&str]| {
        let mut command = vrtrain();
        command.arg("sharpness").arg(path).args(arguments);
        command
    };
    refused(&mut sharpness(&task, &["--sequence-length", "3"]), &["--sequence-length", "small task"]);
    refused(&mut sharpness(&task, &["--top", "100", "--iterations", "5"]), &["--top", "--iterations"]);
    refused(&mut sharpness(&task, &["--top", "100000", "--iterations", "100000"]), &["--top", "parameters"]);
    refused(&mut sharpness(&task, &["--examples", "99999999999"]), &["--examples", "walks"]);
    refused(&mut sharpness(&model, &["--sequence-length", "0"]), &["--sequence-length"]);
    refused(&mut sharpness(&model, &["--sequence-length", "64"]), &["--sequence-length", "32 positions"]);
    refused(&mut sharpness(&model, &["--examples", "99999999999"]), &["--examples", "a pass"]);
    succeed(&mut sharpness(&model, &["--sequence-length", "8", "--examples", "2", "--iterations", "4"]));
}

#[test]
fn the_stability_picture_follows_the_steps_and_the_threshold_any_momentum() {
    let folder = tempfile::tempdir().expect("a folder");
    let picture = |steps: &str| {
        let out = folder.path().join(steps);
        succeed(vrtrain().args(["lab", "stability", "--steps", steps, "--out"]).arg(&out));
        std::fs::read_to_string(out.join("closed-loop.svg")).expect("a picture")
    };
    assert_ne!(picture("100"), picture("5000"));
    let study = json(&succeed(vrtrain().args(["lab", "stability", "--json", "--steps", "100", "--beta1", "0.999999"])));
    assert!((number(&study, "threshold_measured") / number(&study, "threshold") - 1.0).abs() < 1e-6, "{study}");
}

#[test]
fn a_tokenizer_takes_no_flag_that_its_texts_have_no_use_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let (text, out) = (folder.path().join("t.txt"), folder.path().join("out"));
    std::fs::write(&text, "the cat sat on the mat. ".repeat(50)).expect("a text");
    let train = |arguments: &[&str]| {
        let mut command = vrtrain();
        command.args(["lab", "tokenizer", "--vocabulary", "258", "--data"]).arg(&text).arg("--out").arg(&out);
        command.args(arguments);
        command
    };
    refused(&mut train(&["--files", "*.md"]), &["--files", "one file"]);
    refused(&mut train(&["--text-column", "foo"]), &["--text-column", "foo", "no columns"]);
    assert!(!out.exists());
    succeed(&mut train(&[]));
    refused(&mut train(&[]), &["--out", "not an empty folder"]);
}
