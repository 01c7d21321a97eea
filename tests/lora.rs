//! Runs that train adapters, from end to end: resumed, exported for PEFT, merged, refused.

mod common;

use common::*;
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A run of adapters on a trained LLaMA of 260,000 parameters, on random tokens.
fn config(folder: &Path, lora: &str) -> PathBuf {
    let tokens: Vec<u8> = (0..4000u32).flat_map(|i| ((i * i / 7 % 512) as u16).to_le_bytes()).collect();
    std::fs::write(folder.join("tokens.bin"), tokens).expect("writable");
    let base = folder.join("base");
    if !base.exists() {
        std::fs::create_dir(&base).expect("writable");
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            std::fs::copy(fixture("stories260K").join(name), base.join(name)).expect("the fixture is there");
        }
    }
    let path = folder.join("run.toml");
    let text = format!(
        "seed = 3\nmodel = {{ init = 'base' }}\ndata = {{ source = 'tokens.bin' }}\n\
         optimizer = {{ name = 'vradam', lr = 1e-2 }}\nlora = {{ {lora} }}\n\
         train = {{ steps = 6, sequence_length = 24, micro_batch = 2, tokens_per_step = 96, checkpoint_every = 2, \
         dtype = 'f32' }}\n"
    );
    std::fs::write(&path, text).expect("writable");
    path
}

fn pretrain(config: &Path, run: &Path, more: &[&str]) -> Command {
    let mut command = vrtrain();
    command.args(["pretrain", "--quiet", "--config"]).arg(config).arg("--run-dir").arg(run).args(more);
    command
}

fn perplexity(target: &Path, folder: &Path) -> f64 {
    let mut command = vrtrain();
    command.arg("eval").arg(target).args(["--task", "perplexity", "--json", "--max-tokens", "400", "--data"]);
    let output = succeed(command.arg(folder.join("tokens.bin")));
    let object: Value = serde_json::from_str(&stdout(&output)).expect("one JSON object");
    number(&object, "nll_per_token")
}

#[test]
fn a_run_of_adapters_resumed_in_the_middle_ends_with_the_same_bits_and_holds_nothing_else() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    for (name, lora) in [
        ("plain", "rank = 4, alpha = 6, dropout = 0.2, targets = ['q_proj', 'v_proj', 'down_proj']"),
        ("four-bits", "rank = 4, alpha = 6, dropout = 0.2, quantize = 'nf4'"),
    ] {
        let config = config(folder.path(), lora);
        let (whole, parts) = (folder.path().join(format!("{name}-whole")), folder.path().join(format!("{name}-parts")));
        succeed(&mut pretrain(&config, &whole, &[]));
        succeed(&mut pretrain(&config, &parts, &["--set", "train.steps=3", "--set", "schedule.steps=6"]));
        succeed(vrtrain().args(["pretrain", "--quiet", "--resume", "--set", "train.steps=6", "--run-dir"]).arg(&parts));
        for file in ["model.safetensors", "optimizer.safetensors"] {
            assert!(checkpoint_file(&whole, file) == checkpoint_file(&parts, file), "{name}: {file} differs");
        }
        let bytes = checkpoint_file(&whole, "model.safetensors");
        let tensors = SafeTensors::deserialize(&bytes).expect("a checkpoint");
        assert!(tensors.names().iter().all(|name| name.contains(".lora_A.") || name.contains(".lora_B.")));
        assert_eq!(tensors.len(), 5 * 2 * if name == "plain" { 3 } else { 7 });
        let losses: Vec<f64> = metrics(&whole).iter().map(|record| number(record, "loss")).collect();
        assert!(losses[5] < losses[0], "{losses:?}");
        let state: Value = serde_json::from_slice(&checkpoint_file(&whole, "state.json")).expect("a state");
        let sha256 = state["base"]["sha256"]["model.safetensors"].as_str().expect("the base's sha256");
        assert_eq!(sha256.len(), 64, "{state}");
    }
}

#[test]
fn generate_eval_and_both_exports_find_the_base_and_the_merged_model_is_the_run() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    for (name, lora) in [("plain", "rank = 4"), ("four-bits", "rank = 4, quantize = 'nf4'")] {
        let config = config(folder.path(), lora);
        let path = |what: &str| folder.path().join(format!("{name}-{what}"));
        succeed(&mut pretrain(&config, &path("run"), &[]));
        succeed(vrtrain().arg("export").arg(path("run")).arg("--out").arg(path("adapter")));
        succeed(vrtrain().arg("export").arg(path("run")).arg("--merge").arg("--out").arg(path("merged")));
        let (run, merged) = (perplexity(&path("run"), folder.path()), perplexity(&path("merged"), folder.path()));
        assert!((run - merged).abs() < 1e-5, "{name}: {run}, merged {merged}");
        let base = perplexity(&folder.path().join("base"), folder.path());
        assert!(run < base - 0.1, "{name}: {run}, the base alone {base}");
        let ids = |target: PathBuf| {
            let mut command = vrtrain();
            let flags = ["--prompt-ids", "1,403,407", "--max-new-tokens", "12", "--json"];
            let output = succeed(command.arg("generate").arg(target).args(flags));
            let object: Value = serde_json::from_str(&stdout(&output)).expect("one JSON object");
            object["ids"].clone()
        };
        assert_eq!(ids(path("run")), ids(path("merged")), "{name}");
        let config: Value =
            serde_json::from_slice(&std::fs::read(path("adapter").join("adapter_config.json")).expect("PEFT's config"))
                .expect("JSON");
        assert_eq!((&config["r"], &config["lora_alpha"], &config["peft_type"]), (&4.into(), &8.into(), &"LORA".into()));
        assert!(!path("adapter").join("model.safetensors").exists());

        // The adapter begins another run, on the same base.
        let text = std::fs::read_to_string(folder.path().join("run.toml")).expect("the config");
        let again = text.replace("rank = 4", &format!("init = '{name}-adapter'"));
        std::fs::write(folder.path().join("again.toml"), again).expect("writable");
        let again = path("again");
        succeed(&mut pretrain(&folder.path().join("again.toml"), &again, &["--set", "train.steps=1"]));
        let first = number(&metrics(&again)[0], "loss");
        let fresh = number(&metrics(&path("run"))[0], "loss");
        assert!(first < fresh - 0.05, "{name}: {first}, from fresh adapters {fresh}");
    }
}

#[test]
fn a_changed_base_is_refused_on_resume_and_by_every_reader() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let (config, run) = (config(folder.path(), "rank = 2"), folder.path().join("run"));
    succeed(&mut pretrain(&config, &run, &["--set", "train.steps=2", "--set", "schedule.steps=6"]));
    let file = folder.path().join("base/model.safetensors");
    let mut bytes = std::fs::read(&file).expect("the base");
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    std::fs::write(&file, bytes).expect("writable");
    let before = checkpoint_file(&run, "model.safetensors");
    for command in [
        vrtrain().args(["pretrain", "--quiet", "--resume", "--set", "train.steps=4", "--run-dir"]).arg(&run),
        vrtrain().args(["generate", "--prompt-ids", "1"]).arg(&run),
        vrtrain().args(["export", "--merge", "--out"]).arg(folder.path().join("out")).arg(&run),
    ] {
        let output = common::run(command);
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        let message = stderr(&output);
        assert!(message.contains("has changed") && message.contains("model.safetensors"), "{message}");
    }
    assert!(checkpoint_file(&run, "model.safetensors") == before);
    assert!(!folder.path().join("out").exists());
}

#[test]
fn a_resumed_run_neither_gains_nor_loses_adapters() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let with = config(folder.path(), "rank = 4");
    let text = std::fs::read_to_string(&with).expect("the config");
    let without = folder.path().join("whole.toml");
    std::fs::write(&without, text.replace("lora = { rank = 4 }\n", "")).expect("writable");
    for (first, second, key) in
        [(&without, &with, "lora.rank: (absent) -> 4"), (&with, &without, "lora.rank: 4 -> (absent)")]
    {
        let run = folder.path().join(key.replace(' ', "-"));
        succeed(&mut pretrain(first, &run, &["--set", "train.steps=2"]));
        let output = common::run(&mut pretrain(second, &run, &["--resume"]));
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(
            stderr(&output).contains("keeps its mathematics") && stderr(&output).contains(key),
            "{}",
            stderr(&output)
        );
    }
}

#[test]
fn what_cannot_be_adapted_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    for (lora, words) in [
        ("rank = 0", vec!["lora.rank", "at least 1"]),
        ("rank = 4, targets = ['c_attn']", vec!["lora.targets", "c_attn", "q_proj"]),
        ("rank = 4, targets = []", vec!["lora.targets", "empty"]),
        ("rank = 4, quantize = 'int8'", vec!["lora.quantize", "nf4"]),
        ("rank = 4, dropout = 1.0", vec!["lora.dropout", "0.99"]),
        ("rnak = 4", vec!["lora.rnak", "lora.rank"]),
        ("init = 'nowhere'", vec!["nowhere"]),
        ("init = 'base', rank = 3", vec!["lora.rank", "conflicts", "lora.init"]),
        ("", vec!["[lora]", "empty"]),
    ] {
        let config = config(folder.path(), lora);
        let run = folder.path().join("run");
        let output = common::run(&mut pretrain(&config, &run, &[]));
        let message = stderr(&output);
        assert!(words.iter().all(|word| message.contains(word)), "{lora}: {message}");
        let code = if lora.contains("nowhere") { 1 } else { 2 };
        assert_eq!(output.status.code(), Some(code), "{lora}: {message}");
        assert!(!run.exists(), "{lora}");
    }
    let config = small_config(folder.path(), 1, 0);
    let run = folder.path().join("whole");
    succeed(vrtrain().args(["pretrain", "--quiet", "--config"]).arg(&config).arg("--run-dir").arg(&run));
    let output =
        common::run(vrtrain().arg("export").arg(&run).args(["--merge", "--out"]).arg(folder.path().join("out")));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("no adapters to merge"), "{}", stderr(&output));
}

#[test]
fn a_plan_counts_the_frozen_base_apart_and_only_adapters_have_gradients() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let plan = |lora: &str| -> Value {
        let config = config(folder.path(), lora);
        let output = succeed(vrtrain().args(["plan", "--json", "--tokens-per-s", "1", "--config"]).arg(config));
        serde_json::from_str(&stdout(&output)).expect("one JSON object")
    };
    let (plain, four) = (plan("rank = 4"), plan("rank = 4, quantize = 'nf4'"));
    let bytes = |plan: &Value, part: &str| number(&plan["memory_bytes"], part);
    // 5 layers: q and o [64, 64], k and v [32, 64], gate and up [172, 64], down [64, 172].
    let per_layer = 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 172));
    assert_eq!(number(&plain, "trainable"), f64::from(5 * per_layer));
    assert_eq!(bytes(&plain, "gradients"), bytes(&plain, "weights"));
    assert!(bytes(&four, "base") < 0.35 * bytes(&plain, "base"), "{four} {plain}");
    assert!(number(&plain, "parameters") > 250_000.0);
}

/// Runs a Python program where an interpreter with torch, transformers and peft is known.
fn python(test: &str, program: &str, arguments: &[&Path]) -> Option<Vec<f32>> {
    let Ok(python) = std::env::var("VRTRAIN_PYTHON") else {
        eprintln!("skipping {test}: VRTRAIN_PYTHON is not set");
        return None;
    };
    let out = tempfile::NamedTempFile::new().expect("a scratch file");
    let mut command = Command::new(python);
    command.arg("-c").arg(program).args(arguments).arg(out.path()).env("HF_HUB_OFFLINE", "1");
    let output = command.output().expect("the interpreter starts");
    if !output.status.success() && stderr(&output).contains("No module named 'peft'") {
        eprintln!("skipping {test}: the interpreter has no peft");
        return None;
    }
    assert!(output.status.success(), "{}", stderr(&output));
    let bytes = std::fs::read(out.path()).expect("logits");
    Some(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

/// Logits of a base with an adapter, by PEFT; of a merged folder, by transformers.
const PEFT: &str = "
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, merged, out = sys.argv[1:5]
ids = torch.tensor([[1, 403, 407, 261, 378, 5]])
load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    adapted = PeftModel.from_pretrained(load(base), adapter).eval()(ids).logits
    whole = load(merged)(ids).logits
    alone = load(base)(ids).logits
torch.cat([adapted, whole, alone]).numpy().astype('<f4').tofile(out)
";

#[test]
fn peft_loads_the_adapter_and_transformers_the_merged_model_and_they_agree() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let config = config(folder.path(), "rank = 4, alpha = 5, rslora = true");
    let path = |what: &str| folder.path().join(what);
    succeed(&mut pretrain(&config, &path("run"), &[]));
    succeed(vrtrain().arg("export").arg(path("run")).arg("--out").arg(path("adapter")));
    succeed(vrtrain().arg("export").arg(path("run")).arg("--merge").arg("--out").arg(path("merged")));
    let arguments = [&*path("base"), &*path("adapter"), &*path("merged")];
    let Some(logits) = python("peft_loads_the_adapter_...", PEFT, &arguments) else { return };
    let third = logits.len() / 3;
    let difference = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    let (adapted, whole, alone) = (&logits[..third], &logits[third..2 * third], &logits[2 * third..]);
    assert!(difference(adapted, whole) < 1e-4, "{}", difference(adapted, whole));
    assert!(difference(adapted, alone) > 0.1, "the adapter does nothing");
}
