//! What the black-box tests share: the binary, scratch folders, records of a run.
#![allow(dead_code, reason = "each test binary uses a part of this")]

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The binary that users run.
pub fn vrtrain() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vrtrain"));
    // No test may depend on the machine's own Hugging Face set-up or touch it.
    for name in ["HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "VRTRAIN_LOG"] {
        command.env_remove(name);
    }
    command
}

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The folder of real data that is not part of the project, where someone has it.
pub fn shared(test: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("VRTRAIN_SHARED").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("skipping {test}: VRTRAIN_SHARED is not set");
    }
    folder
}

pub fn run(command: &mut Command) -> Output {
    command.output().expect("the binary starts")
}

/// Runs and insists on success.
pub fn succeed(command: &mut Command) -> Output {
    let output = run(command);
    assert!(output.status.success(), "{command:?}\n{}", stderr(&output));
    output
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The records of a run's metrics.jsonl.
pub fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).expect("the run has metrics");
    text.lines().map(|line| serde_json::from_str(line).expect("a record is JSON")).collect()
}

pub fn number(record: &Value, key: &str) -> f64 {
    record[key].as_f64().unwrap_or_else(|| panic!("{key} in {record}"))
}

/// The newest checkpoint's file.
pub fn checkpoint_file(run: &Path, name: &str) -> Vec<u8> {
    let latest = std::fs::read_to_string(run.join("latest")).expect("the run has a checkpoint");
    std::fs::read(run.join("checkpoints").join(latest.trim()).join(name)).expect("the checkpoint is complete")
}

/// A small GPT-2 on the fixture's tokens: `steps` steps with a checkpoint every `every`.
pub fn small_config(folder: &Path, steps: u64, every: u64) -> PathBuf {
    let tokens = fixture("train/vradam-accumulated/tokens.bin");
    let text = format!(
        r#"
seed = 5
[model]
arch = "gpt2"
n_layer = 2
n_head = 2
n_embd = 32
vocab_size = 256
n_positions = 32
[data]
source = "{}"
shuffle = true
validation = {{ source = "{}", tokens = 512 }}
[optimizer]
name = "vradam"
lr = 0.003
beta3 = 5.0
weight_decay = 0.1
[schedule]
name = "cosine"
warmup_steps = 3
min_lr_ratio = 0.1
[train]
steps = {steps}
sequence_length = 32
micro_batch = 4
tokens_per_step = 256
grad_clip = 1.0
dtype = "f32"
device = "cpu"
eval_every = 7
checkpoint_every = {every}
keep_last = 2
"#,
        tokens.display(),
        tokens.display()
    );
    let path = folder.join("small.toml");
    std::fs::write(&path, text).expect("a config can be written");
    path
}
