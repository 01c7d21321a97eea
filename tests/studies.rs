//! Studies that are disturbed: workers killed, the study killed or interrupted, losses that are not finite. The same
//! command goes on, repeats nothing that is finished, and ends in the numbers of a study that nobody disturbed.
#![cfg(target_os = "linux")]

mod common;

use common::{metrics, run, stderr, stdout, succeed, vrtrain};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Steps of each run: long enough to be caught in the middle.
const STEPS: usize = 4000;

/// Records after which a run is taken to be in its middle: past its first checkpoint, far from its end.
const MIDDLE: usize = 150;

fn grid(folder: &Path) -> PathBuf {
    let text = format!(
        "seed = 3\ntask = {{ name = \"gridworld\", batch = 16, side = 4, layers = 1, width = 16 }}\n\
         optimizer = {{ name = \"vradam\", lr = 3e-3 }}\nschedule = {{ name = \"constant\" }}\n\
         train = {{ steps = {STEPS}, eval_every = 250, checkpoint_every = 100 }}\n"
    );
    let path = folder.join("grid.toml");
    std::fs::write(&path, text).expect("a config can be written");
    path
}

/// What happens to a study.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Disturbance {
    WorkerKilled,
    Interrupted,
    Killed,
}

fn start(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts")
}

fn signal(name: &str, process: u32) {
    let status = Command::new("kill").args([format!("-{name}"), process.to_string()]).status();
    assert!(status.expect("kill is a command").success(), "{name} to {process}");
}

/// The process that a study runs in the folder `run`, if there is one now.
fn worker(study: u32, run: &Path) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{study}/task/{study}/children")).ok()?;
    let children = children.split_whitespace().filter_map(|word| word.parse::<u32>().ok());
    let name = run.to_str().expect("a path in UTF-8");
    let runs = |child: &u32| {
        let arguments = std::fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
        arguments.split(|&byte| byte == 0).any(|argument| argument == name.as_bytes())
    };
    children.into_iter().find(runs)
}

fn lines(run: &Path) -> usize {
    std::fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

/// Waits until the study has a worker, another one than `not`, that has come `after` records far in `run`.
fn wait_for_worker(study: &mut Child, run: &Path, after: usize, not: Option<u32>) -> u32 {
    let begun = Instant::now();
    loop {
        if let Some(process) = worker(study.id(), run).filter(|process| Some(*process) != not)
            && lines(run) >= after
        {
            return process;
        }
        let ended = study.try_wait().expect("the study can be asked");
        assert!(ended.is_none(), "the study ended ({ended:?}) before {} was in its middle", run.display());
        assert!(begun.elapsed() < Duration::from_secs(60), "{} does not begin", run.display());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until SIGTERM lies before a process that is held still.
fn wait_for_word(process: u32) {
    let begun = Instant::now();
    let lies_there = || {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:"))?;
        u64::from_str_radix(pending.trim(), 16).ok().map(|signals| signals & 1 << 14 != 0)
    };
    while !lies_there().expect("the process is there") {
        assert!(begun.elapsed() < Duration::from_secs(60), "the study tells its run nothing");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Disturbs the study while it makes the run at `run`, and waits for its end.
fn disturb(command: &mut Command, run: &Path, how: Disturbance) -> Output {
    let mut study = start(command);
    let process = wait_for_worker(&mut study, run, MIDDLE, None);
    match how {
        Disturbance::WorkerKilled => signal("KILL", process),
        Disturbance::Interrupted => {
            // The study looks for signals now and then: the run is held still, or it might end before it is told to.
            signal("STOP", process);
            signal("INT", study.id());
            wait_for_word(process);
            signal("CONT", process);
        }
        Disturbance::Killed => signal("KILL", study.id()),
    }
    study.wait_with_output().expect("the study ends")
}

/// Nothing in a run's folder is half-written: records are whole, checkpoints complete.
fn is_whole(run: &Path) {
    let steps: Vec<u64> = metrics(run).iter().filter_map(|record| record["step"].as_u64()).collect();
    assert!(steps.iter().copied().eq(1..=steps.len() as u64), "{}: {steps:?}", run.display());
    let checkpoints = std::fs::read_dir(run.join("checkpoints")).expect("checkpoints").flatten();
    for checkpoint in checkpoints {
        assert!(checkpoint.path().join("manifest.json").is_file(), "{}", checkpoint.path().display());
    }
}

fn json(output: &Output) -> Value {
    serde_json::from_str(&stdout(output)).unwrap_or_else(|error| panic!("{error}: {}", stdout(output)))
}

/// Without what the clock decides.
fn timeless(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept = fields.iter().filter(|(key, _)| !["time", "seconds"].iter().any(|word| key.contains(word)));
            Value::Object(kept.map(|(key, value)| (key.clone(), timeless(value))).collect())
        }
        Value::Array(values) => Value::Array(values.iter().map(timeless).collect()),
        other => other.clone(),
    }
}

#[test]
fn a_comparison_disturbed_in_any_way_ends_in_the_numbers_of_an_undisturbed_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = grid(folder.path());
    let compare = |out: &Path| {
        let mut command = vrtrain();
        command.args(["compare", "--optimizers", "vradam,adamw", "--seeds", "1,2", "--workers", "2", "--json"]);
        command.arg("--config").arg(&config).arg("--out").arg(out);
        command
    };
    let expected = timeless(&json(&succeed(&mut compare(&folder.path().join("whole")))));
    assert_eq!(expected["rows"][0]["finished"], 2);
    for how in [Disturbance::WorkerKilled, Disturbance::Interrupted, Disturbance::Killed] {
        let out = folder.path().join(format!("{how:?}"));
        let runs = out.join("runs");
        // The second seed is being trained: the first one's runs are finished, or nearly.
        let output = disturb(&mut compare(&out), &runs.join("adamw-seed-2"), how);
        let said = stderr(&output);
        match how {
            Disturbance::WorkerKilled => {
                assert_eq!(output.status.code(), Some(1), "{said}");
                assert!(
                    said.contains("adamw-seed-2 was killed") && said.contains("the same command goes on"),
                    "{said}"
                );
            }
            Disturbance::Interrupted => {
                assert_eq!(output.status.code(), Some(3), "{said}");
                assert!(said.contains("interrupted: the same command goes on"), "{said}");
                is_whole(&runs.join("adamw-seed-2"));
            }
            Disturbance::Killed => assert_eq!(output.status.code(), None, "{said}"),
        }
        assert!(!out.join("results.json").exists(), "{how:?}: a table of runs that are not there");
        let names = ["vradam-seed-1", "adamw-seed-1", "vradam-seed-2", "adamw-seed-2"];
        let ended: Vec<&str> = names.into_iter().filter(|name| runs.join(format!("{name}.ended")).is_file()).collect();
        assert!(!ended.is_empty() && ended.len() < 4, "{how:?}: {ended:?}");
        let written = |name: &str| {
            let metadata = std::fs::metadata(runs.join(name).join("metrics.jsonl")).expect("metrics");
            metadata.modified().expect("a time")
        };
        let before: Vec<_> = ended.iter().map(|name| written(name)).collect();
        let again = succeed(&mut compare(&out));
        let to_make = format!("4 runs, {} of them to be made", 4 - ended.len());
        assert!(stderr(&again).contains(&to_make), "{how:?}: {}", stderr(&again));
        assert_eq!(
            before,
            ended.iter().map(|name| written(name)).collect::<Vec<_>>(),
            "{how:?}: finished runs repeated"
        );
        assert_eq!(timeless(&json(&again)), expected, "{how:?}");
        names.iter().for_each(|name| is_whole(&runs.join(name)));
    }
}

#[test]
fn a_search_disturbed_in_any_way_is_stored_to_the_byte_like_an_undisturbed_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = grid(folder.path());
    let search = |out: &Path| {
        let mut command = vrtrain();
        command.args(["tune", "search", "--optimizer", "adamw", "--trials", "3", "--workers", "2", "--json"]);
        command.args(["--range", "optimizer.lr=1e-4..1e-1:log"]);
        command.arg("--config").arg(&config).arg("--out").arg(out);
        command
    };
    let study = |out: &Path| std::fs::read_to_string(out.join("study.jsonl")).expect("a study");
    let whole = folder.path().join("whole");
    let best = json(&succeed(&mut search(&whole)));
    let expected = study(&whole);
    assert_eq!(expected.lines().count(), 4);
    for how in [Disturbance::WorkerKilled, Disturbance::Interrupted, Disturbance::Killed] {
        let out = folder.path().join(format!("{how:?}"));
        let output = disturb(&mut search(&out), &out.join("runs/trial-0001"), how);
        let said = stderr(&output);
        if how == Disturbance::WorkerKilled {
            // It gets another chance, and takes up its own checkpoint.
            assert!(output.status.success(), "{said}");
        } else {
            let code = if how == Disturbance::Interrupted { Some(3) } else { None };
            assert_eq!(output.status.code(), code, "{said}");
            // The first trial is there, the round that was disturbed is not.
            assert_eq!(study(&out), expected.split_inclusive('\n').take(2).collect::<String>());
            let again = json(&succeed(&mut search(&out)));
            assert_eq!(again["objective"], best["objective"], "{how:?}");
        }
        assert_eq!(study(&out), expected, "{how:?}");
    }
}

#[test]
fn a_trial_killed_twice_ends_the_search_with_a_reason_and_the_same_command_finishes_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let (config, out) = (grid(folder.path()), folder.path().join("study"));
    let search = || {
        let mut command = vrtrain();
        command.args(["tune", "search", "--optimizer", "adamw", "--trials", "1"]);
        command.args(["--range", "optimizer.lr=1e-4..1e-1:log"]).arg("--config").arg(&config).arg("--out").arg(&out);
        command
    };
    let mut study = start(&mut search());
    let trial = out.join("runs/trial-0000");
    let first = wait_for_worker(&mut study, &trial, MIDDLE, None);
    signal("KILL", first);
    let second = wait_for_worker(&mut study, &trial, 0, Some(first));
    signal("KILL", second);
    let output = study.wait_with_output().expect("the study ends");
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("trial 0 was killed twice") && said.contains("fewer --workers"), "{said}");
    let again = succeed(&mut search());
    assert!(stdout(&again).contains("1 finished"), "{}", stdout(&again));
    is_whole(&trial);
}

#[test]
fn losses_that_are_not_finite_are_findings_beside_others_and_torn_studies_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = grid(folder.path());
    let short = ["--set", "train.steps=40", "--set", "train.eval_every=20"];
    let compared = folder.path().join("compared");
    let mut command = vrtrain();
    command.args(["compare", "--optimizers", "adamw,sgd", "--seeds", "1,2", "--json"]).args(short);
    command.args(["--set-for", "sgd:optimizer.lr=1e30", "--config"]).arg(&config).arg("--out").arg(&compared);
    let results = json(&succeed(&mut command));
    let [adamw, sgd] = [0, 1].map(|row| results["rows"][row].clone());
    assert_eq!((&adamw["finished"], &sgd["diverged"]), (&Value::from(2), &Value::from(2)), "{results}");
    assert!(sgd["val_loss"].is_null() && sgd["difference"].is_null(), "{sgd}");
    let table = std::fs::read_to_string(compared.join("table.md")).expect("a table");
    assert!(table.lines().any(|line| line.contains("| sgd |") && line.contains("diverges")), "{table}");

    // Most of this range diverges; the config's own rate, which is tried first, does not.
    let out = folder.path().join("study");
    let search = || {
        let mut command = vrtrain();
        command.args(["tune", "search", "--optimizer", "sgd", "--trials", "6", "--json"]).args(short);
        command.args(["--range", "optimizer.lr=1e-3..1e30:log", "--config"]).arg(&config).arg("--out").arg(&out);
        command
    };
    let best = json(&succeed(&mut search()));
    assert!(best["failed"].as_u64() > Some(0) && best["objective"].as_f64().is_some_and(f64::is_finite), "{best}");
    let file = out.join("study.jsonl");
    let text = std::fs::read_to_string(&file).expect("a study");
    let failed = text.lines().find(|line| line.contains("\"failed\"")).expect("a failed trial");
    assert!(failed.contains("\"objective\":null") && failed.contains("is NaN"), "{failed}");
    for (damaged, word) in [
        ("no study\n".to_owned(), "not a study's head"),
        (text.replacen("\"trial\":2", "\"trial\":7", 1), "out of turn"),
        (text.replacen("{\"trial\":2", "{trial:2", 1), "study.jsonl:4: not a trial"),
    ] {
        std::fs::write(&file, &damaged).expect("a damaged study");
        let output = run(&mut search());
        assert_eq!(output.status.code(), Some(1), "{word}: {}", stderr(&output));
        assert!(stderr(&output).contains(word), "{word}: {}", stderr(&output));
        assert_eq!(std::fs::read_to_string(&file).expect("the study"), damaged, "a damaged study was changed");
    }
}
