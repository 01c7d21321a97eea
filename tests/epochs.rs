//! `train.epochs` over running text: the tokens of a pass are counted once, the run ends with the last pass, the schedule
//! has its length, and a resumed run neither counts again nor changes a bit.

mod common;

use common::*;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Tokens of a step and of a row.
const STEP: u64 = 256;
const ROW: u64 = 32;

/// Documents of very different lengths, and a config that goes `epochs` times over them.
fn config(folder: &Path, epochs: f64) -> PathBuf {
    let document = |i: usize| format!("Once there was a cat number {i}. ").repeat(1 + i * 7 % 11);
    let lines: String = (0..60).map(|i| serde_json::json!({ "text": document(i) }).to_string() + "\n").collect();
    std::fs::write(folder.join("texts.jsonl"), lines).expect("texts can be written");
    let text = format!(
        r#"
seed = 5
model = {{ arch = "gpt2", n_layer = 1, n_head = 2, n_embd = 16, n_positions = {ROW} }}
tokenizer.source = "{}"
data = {{ source = "texts.jsonl", shuffle = true }}
optimizer = {{ name = "vradam", lr = 0.003 }}
schedule = {{ name = "cosine", warmup_steps = 2, min_lr_ratio = 0.1 }}
[train]
epochs = {epochs:?}
sequence_length = {ROW}
micro_batch = 4
tokens_per_step = {STEP}
dtype = "f32"
device = "cpu"
checkpoint_every = 5
"#,
        fixture("stories260K").display()
    );
    let path = folder.join("epochs.toml");
    std::fs::write(&path, text).expect("a config can be written");
    path
}

fn pretrain(config: &Path, run: &Path) -> Command {
    let mut command = vrtrain();
    command.args(["pretrain", "--config"]).arg(config).arg("--run-dir").arg(run);
    command
}

/// The tokens and rows of a pass, as the run said and kept them.
fn counted(run: &Path, said: &str) -> (u64, u64) {
    let line = said.lines().find(|line| line.contains("a pass has")).unwrap_or_else(|| panic!("no count in {said}"));
    let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let text = std::fs::read_to_string(run.join("pass.json")).expect("the count is kept");
    let kept: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(kept["tokens"], numbers[0], "{line}");
    (numbers[0], numbers[1])
}

fn state(run: &Path) -> Value {
    serde_json::from_slice(&checkpoint_file(run, "state.json")).expect("JSON")
}

#[test]
fn a_run_over_text_ends_with_its_last_pass_and_a_resumed_one_counts_nothing_again() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let config = config(folder.path(), 2.5);
    let [whole, cut] = ["whole", "cut"].map(|name| folder.path().join(name));
    let output = succeed(&mut pretrain(&config, &whole));
    let (tokens, rows) = counted(&whole, &stderr(&output));
    assert_eq!(rows, (tokens - 1) / ROW);
    let records = metrics(&whole);
    let steps = records.len() as u64;
    // The last whole step inside two passes and a half.
    assert_eq!(steps, (rows * 5 / 2) / (STEP / ROW));
    assert!(steps > 12, "{steps} steps are too few to cut");
    assert_eq!(state(&whole)["position"]["epoch"], 2);
    let resolved = std::fs::read_to_string(whole.join("config.toml")).expect("the config");
    assert!(resolved.contains(&format!("steps = {steps}")), "the schedule's length is not the run's: {resolved}");
    // The cosine's last rate, one step before its end.
    let [first, last] = [&records[2], &records[records.len() - 1]].map(|record| number(record, "lr"));
    assert!(last < 0.12 * first, "{first} {last}");

    // The same run, stopped inside the first pass.
    let schedule = format!("schedule.steps={steps}");
    let output = succeed(pretrain(&config, &cut).args(["--set", "train.epochs=0.6", "--set", &schedule]));
    assert_eq!(counted(&cut, &stderr(&output)), (tokens, rows));
    assert!(metrics(&cut).len() < records.len() / 3);
    let output = succeed(pretrain(&config, &cut).arg("--resume"));
    assert!(!stderr(&output).contains("counting"), "{}", stderr(&output));
    for file in ["model.safetensors", "optimizer.safetensors"] {
        assert!(checkpoint_file(&whole, file) == checkpoint_file(&cut, file), "{file} differs");
    }
    assert_eq!(state(&whole)["position"], state(&cut)["position"]);
    let output = succeed(vrtrain().args(["pretrain", "--resume", "--run-dir"]).arg(&cut));
    assert!(stderr(&output).contains("finished") && !stderr(&output).contains("counting"), "{}", stderr(&output));

    // A count that is gone or torn is made again, and comes out the same.
    std::fs::write(cut.join("pass.json"), "{\"tokens\": 5").expect("a torn file");
    let output = succeed(pretrain(&config, &cut).args(["--resume", "--set", "train.epochs=3"]));
    assert_eq!(counted(&cut, &stderr(&output)), (tokens, rows));
}

#[test]
fn a_plan_knows_the_steps_of_small_data_exactly_and_makes_nothing() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let (config, run) = (config(folder.path(), 1.0), folder.path().join("run"));
    let plan = succeed(vrtrain().args(["plan", "--json", "--tokens-per-s", "1000", "--config"]).arg(&config));
    let plan: Value = serde_json::from_str(&stdout(&plan)).expect("one object");
    succeed(pretrain(&config, &run).arg("--quiet"));
    assert_eq!(plan["steps"], metrics(&run).len());
    assert_eq!(plan["steps_estimated"], false);
}

#[test]
fn texts_too_few_for_a_row_are_refused_and_leave_no_run() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let (config, path) = (config(folder.path(), 1.0), folder.path().join("run"));
    std::fs::write(folder.path().join("texts.jsonl"), "{\"text\": \"a cat\"}\n").expect("a text");
    let output = run(&mut pretrain(&config, &path));
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    for word in ["`train.epochs`", "texts.jsonl", "sequence_length + 1", "use more data"] {
        assert!(stderr(&output).contains(word), "{word} in {}", stderr(&output));
    }
    assert!(!path.exists());
}
