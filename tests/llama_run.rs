//! A LLaMA's run from end to end: from scratch, resumed, exported, evaluated, and taken up from a folder.

mod common;

use common::*;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The small config with LLaMA's block in GPT-2's place.
fn llama_config(folder: &Path, steps: u64, every: u64) -> PathBuf {
    let path = small_config(folder, steps, every);
    let text = std::fs::read_to_string(&path).expect("the config was written");
    let text = text.replace("arch = \"gpt2\"", "arch = \"llama\"\nn_kv_head = 1\nn_inner = 70\nrope_theta = 500.0");
    std::fs::write(&path, text).expect("a config can be written");
    path
}

fn perplexity(target: &Path) -> Value {
    let data = fixture("train/vradam-accumulated/tokens.bin");
    let mut command = vrtrain();
    command
        .arg("eval")
        .arg(target)
        .args(["--task", "perplexity", "--json", "--max-tokens", "1000", "--data"])
        .arg(data);
    serde_json::from_str(&stdout(&succeed(&mut command))).expect("one JSON object")
}

#[test]
fn a_resumed_llama_ends_with_the_same_bits_and_its_export_is_the_run() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let config = llama_config(folder.path(), 8, 3);
    let (whole, parts, out) = (folder.path().join("whole"), folder.path().join("parts"), folder.path().join("model"));
    succeed(vrtrain().args(["pretrain", "--quiet", "--config"]).arg(&config).arg("--run-dir").arg(&whole));
    let mut first = vrtrain();
    first.args(["pretrain", "--quiet", "--set", "train.steps=5", "--set", "schedule.steps=8", "--config"]);
    succeed(first.arg(&config).arg("--run-dir").arg(&parts));
    let mut second = vrtrain();
    second.args(["pretrain", "--quiet", "--resume", "--set", "train.steps=8", "--run-dir"]).arg(&parts);
    succeed(&mut second);
    for name in ["model.safetensors", "optimizer.safetensors"] {
        assert!(checkpoint_file(&whole, name) == checkpoint_file(&parts, name), "{name} differs");
    }
    succeed(vrtrain().arg("export").arg(&whole).arg("--out").arg(&out));
    assert_eq!(perplexity(&whole), perplexity(&out));

    let resolved = std::fs::read_to_string(whole.join("config.toml")).expect("a resolved config");
    for line in ["arch = \"llama\"", "n_kv_head = 1", "rms_norm_epsilon = ", "tie_word_embeddings = false"] {
        assert!(resolved.contains(line), "{line} in {resolved}");
    }
}

#[test]
fn recomputing_blocks_changes_no_bit() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let config = llama_config(folder.path(), 3, 0);
    let run = |name: &str, recompute: &str| {
        let path = folder.path().join(name);
        let mut command = vrtrain();
        command.args(["pretrain", "--quiet", "--set", recompute, "--config"]).arg(&config);
        succeed(command.arg("--run-dir").arg(&path));
        checkpoint_file(&path, "model.safetensors")
    };
    assert!(run("kept", "train.recompute=none") == run("recomputed", "train.recompute=block"));
}

#[test]
fn a_folder_says_itself_which_architecture_it_is_and_a_contradiction_is_refused() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let tokens: Vec<u8> = (0..2000u32).flat_map(|i| ((i * i / 7 % 512) as u16).to_le_bytes()).collect();
    std::fs::write(folder.path().join("tokens.bin"), tokens).expect("writable");
    let config = folder.path().join("init.toml");
    let text = format!(
        "model = {{ init = '{}' }}\ndata = {{ source = 'tokens.bin', shuffle = false }}\n\
         optimizer = {{ name = 'adamw', lr = 1e-3 }}\ntrain = {{ steps = 2, sequence_length = 32, micro_batch = 2 }}\n",
        fixture("stories260K").display()
    );
    std::fs::write(&config, text).expect("writable");
    let run = folder.path().join("run");
    succeed(vrtrain().args(["pretrain", "--quiet", "--config"]).arg(&config).arg("--run-dir").arg(&run));
    let resolved = std::fs::read_to_string(run.join("config.toml")).expect("a resolved config");
    assert!(resolved.contains("arch = \"llama\""), "{resolved}");
    // What the folder's config.json says of its ids goes on.
    let stored = std::fs::read_to_string(run.join("model/config.json")).expect("the model's config");
    let stored: Value = serde_json::from_str(&stored).expect("JSON");
    assert_eq!((&stored["bos_token_id"], &stored["eos_token_id"]), (&serde_json::json!(1), &serde_json::json!(2)));

    let wrong = folder.path().join("wrong");
    let mut command = vrtrain();
    command.args(["pretrain", "--quiet", "--set", "model.arch=gpt2", "--config"]).arg(&config);
    let output = common::run(command.arg("--run-dir").arg(&wrong));
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("\"gpt2\"") && stderr(&output).contains("\"llama\""), "{}", stderr(&output));
    assert!(!wrong.exists(), "a refused run leaves no folder");
}
