//! Resumed equals never stopped: after kills at any moment, signals, and a second time.

mod common;

use common::*;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Records without what time decides.
fn timeless(run: &Path) -> Vec<serde_json::Value> {
    let mut records = metrics(run);
    for record in &mut records {
        let record = record.as_object_mut().expect("a record is an object");
        record.remove("step_ms");
        record.remove("tokens_per_s");
    }
    records
}

fn same_end(expected: &Path, run: &Path) {
    for file in ["model.safetensors", "optimizer.safetensors"] {
        assert!(checkpoint_file(expected, file) == checkpoint_file(run, file), "{file} differs");
    }
    assert_eq!(timeless(expected), timeless(run));
}

fn pretrain(config: &Path, run: &Path) -> Command {
    let mut command = vrtrain();
    command.args(["pretrain", "--quiet", "--config"]).arg(config).arg("--run-dir").arg(run);
    command
}

fn spawn(command: &mut Command) -> Child {
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary starts")
}

#[test]
fn a_run_killed_again_and_again_ends_with_the_bits_of_the_uninterrupted_one() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    // A checkpoint after every second step, so that many kills fall into the writing of one.
    let config = small_config(folder.path(), 60, 2);
    let whole = folder.path().join("whole");
    let started = Instant::now();
    succeed(&mut pretrain(&config, &whole));
    let length = started.elapsed();

    let killed = folder.path().join("killed");
    let mut kills = 0;
    for attempt in 0..200u32 {
        let mut command = pretrain(&config, &killed);
        if attempt > 0 {
            // Whatever is there: a run, a folder that never became one, or nothing.
            command.arg("--resume");
        }
        let mut child = spawn(&mut command);
        // Moments spread over the run without a pattern (multiples of the golden ratio).
        let part = 0.1 + 0.5 * (f64::from(attempt) * 0.618_034).fract();
        let patience = if kills < 20 { length.mul_f64(part) } else { Duration::from_secs(600) };
        let deadline = Instant::now() + patience;
        let status = loop {
            if let Some(status) = child.try_wait().expect("the child can be asked") {
                break Some(status);
            }
            if Instant::now() >= deadline {
                child.kill().expect("the child can be killed");
                child.wait().expect("the child ends");
                break None;
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        match status {
            Some(status) => {
                assert!(status.success(), "{status}");
                break;
            }
            None => kills += 1,
        }
    }
    assert!(kills > 0, "the run was too fast to be killed");
    same_end(&whole, &killed);
    let leftovers = std::fs::read_dir(killed.join("checkpoints")).expect("checkpoints").flatten();
    let names: Vec<String> = leftovers.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    assert!(names.iter().all(|name| name.starts_with("step-")) && names.len() == 2, "{names:?}");
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_saves_exits_3_and_goes_on_as_if_never_stopped() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let config = small_config(folder.path(), 400, 0);
    let whole = folder.path().join("whole");
    succeed(&mut pretrain(&config, &whole));

    let run = folder.path().join("run");
    let mut interruptions = 0;
    for signal in ["INT", "TERM", "INT"] {
        let mut command = pretrain(&config, &run);
        if run.join("config.toml").exists() {
            command.arg("--resume");
        }
        let before = std::fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count());
        let mut child = spawn(&mut command);
        let progressed =
            || std::fs::read_to_string(run.join("metrics.jsonl")).is_ok_and(|text| text.lines().count() > before + 5);
        while !progressed() && child.try_wait().expect("the child can be asked").is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let kill = Command::new("kill").args([format!("-{signal}"), child.id().to_string()]).status();
        kill.expect("kill is a command");
        let status = child.wait().expect("the child ends");
        if status.success() {
            break;
        }
        assert_eq!(status.code(), Some(3), "{status}");
        interruptions += 1;
    }
    assert!(interruptions > 0, "the run was too fast to be interrupted");
    succeed(pretrain(&config, &run).arg("--resume"));
    same_end(&whole, &run);
}

#[test]
fn a_longer_run_keeps_the_schedule_and_equals_one_that_was_planned_so() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let config = small_config(folder.path(), 20, 5);
    let (short, long) = (folder.path().join("short"), folder.path().join("long"));
    succeed(&mut pretrain(&config, &short));
    succeed(pretrain(&config, &short).args(["--resume", "--set", "train.steps=30"]));
    succeed(pretrain(&config, &long).args(["--set", "schedule.steps=20", "--set", "train.steps=30"]));
    let losses = |run: &Path| metrics(run).iter().map(|record| number(record, "loss")).collect::<Vec<_>>();
    assert_eq!(losses(&short), losses(&long));
    for file in ["model.safetensors", "optimizer.safetensors"] {
        assert!(checkpoint_file(&short, file) == checkpoint_file(&long, file), "{file} differs");
    }
    let resolved = std::fs::read_to_string(short.join("config.toml")).expect("the config");
    assert!(resolved.contains("steps = 20") && resolved.contains("steps = 30"), "{resolved}");
}

#[test]
fn a_finished_run_says_so_and_a_run_reads_its_own_config() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let config = small_config(folder.path(), 6, 2);
    let run_folder = folder.path().join("run");
    succeed(&mut pretrain(&config, &run_folder));
    let output = succeed(vrtrain().args(["pretrain", "--resume", "--run-dir"]).arg(&run_folder));
    assert!(stderr(&output).contains("finished"), "{}", stderr(&output));
    let checkpoints = std::fs::read_dir(run_folder.join("checkpoints")).expect("checkpoints").count();
    assert_eq!(checkpoints, 2, "keep_last = 2");
}

#[test]
fn a_run_killed_right_after_its_last_checkpoint_is_put_in_order_by_a_resume() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let config = small_config(folder.path(), 10, 2);
    let run_folder = folder.path().join("run");
    succeed(pretrain(&config, &run_folder).args(["--set", "train.keep_last=3"]));
    // As the process leaves it that dies when step 10 is there and step 6 not yet gone.
    std::fs::write(run_folder.join("latest"), "step-00000008\n").expect("a pointer that is one checkpoint old");
    let output = succeed(pretrain(&config, &run_folder).arg("--resume"));
    assert!(stderr(&output).contains("finished"), "{}", stderr(&output));
    assert_eq!(std::fs::read_to_string(run_folder.join("latest")).expect("latest"), "step-00000010\n");
    let left = |step: u32| run_folder.join(format!("checkpoints/step-{step:08}")).exists();
    assert_eq!([left(6), left(8), left(10)], [false, true, true], "keep_last = 2");
}

#[test]
fn changed_mathematics_are_refused_with_exit_code_2_and_nothing_changes() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let config = small_config(folder.path(), 6, 2);
    let path = folder.path().join("run");
    succeed(&mut pretrain(&config, &path));
    let before = std::fs::read(path.join("config.toml")).expect("the config");
    for change in ["optimizer.lr=0.1", "seed=6", "train.sequence_length=16", "schedule.steps=9", "optimizer.name=adamw"]
    {
        let output = run(pretrain(&config, &path).args(["--resume", "--set", "train.steps=9", "--set", change]));
        assert_eq!(output.status.code(), Some(2), "{change}: {}", stderr(&output));
    }
    assert_eq!(before, std::fs::read(path.join("config.toml")).expect("the config"));
    let output = run(&mut pretrain(&config, &path));
    assert!(stderr(&output).contains("--resume"), "{}", stderr(&output));
}

#[test]
fn the_newest_valid_checkpoint_is_taken_when_a_newer_one_is_torn() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let config = small_config(folder.path(), 10, 4);
    let (whole, torn) = (folder.path().join("whole"), folder.path().join("torn"));
    succeed(&mut pretrain(&config, &whole));
    succeed(&mut pretrain(&config, &torn));
    let tear = |step: u32| {
        let weights = torn.join(format!("checkpoints/step-{step:08}/model.safetensors"));
        let mut bytes = std::fs::read(&weights).expect("the weights");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&weights, bytes).expect("the weights can be changed");
    };
    tear(10);
    let output = succeed(pretrain(&config, &torn).arg("--resume"));
    assert!(stderr(&output).contains("not valid"), "{}", stderr(&output));
    same_end(&whole, &torn);
    // And where none is valid, from the beginning; the torn ones make room as their steps come.
    [8, 10].into_iter().for_each(tear);
    let output = succeed(pretrain(&config, &torn).arg("--resume"));
    assert!(stderr(&output).contains("starting from the beginning"), "{}", stderr(&output));
    same_end(&whole, &torn);
}
