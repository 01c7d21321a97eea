//! generate, eval and export: a real trained model, and runs of our own.

mod common;

use common::*;
use serde_json::Value;

fn json(output: &std::process::Output) -> Value {
    serde_json::from_str(stdout(output).trim()).unwrap_or_else(|error| panic!("{error}: {}", stdout(output)))
}

#[test]
fn a_trained_gpt2_sorts_every_input_that_it_was_trained_to_sort() {
    let model = fixture("gpt-nano-sort");
    // 24 of the 729 inputs here, all of them in the unit tests of the model.
    for number in (0..729u32).step_by(31) {
        let digits: Vec<u32> = (0..6).map(|place| number / 3u32.pow(place) % 3).collect();
        let mut sorted = digits.clone();
        sorted.sort_unstable();
        let prompt = digits.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let mut command = vrtrain();
        command.arg("generate").arg(&model).args(["--prompt-ids", &prompt, "--max-new-tokens", "6", "--json"]);
        let output = json(&succeed(&mut command));
        assert_eq!(output["ids"], serde_json::json!(sorted), "{digits:?}");
    }
}

#[test]
fn an_export_is_the_run_and_is_never_half_there() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let config = small_config(folder.path(), 6, 3);
    let (path, out) = (folder.path().join("run"), folder.path().join("deep/model"));
    succeed(vrtrain().args(["pretrain", "--quiet", "--config"]).arg(config).arg("--run-dir").arg(&path));
    succeed(vrtrain().arg("export").arg(&path).arg("--out").arg(&out));
    for name in ["model.safetensors", "config.json", "generation_config.json"] {
        assert!(out.join(name).is_file(), "{name}");
    }
    let data = fixture("train/vradam-accumulated/tokens.bin");
    let perplexity = |target: &std::path::Path| {
        let mut command = vrtrain();
        command
            .arg("eval")
            .arg(target)
            .args(["--task", "perplexity", "--json", "--max-tokens", "1000", "--data"])
            .arg(&data);
        json(&succeed(&mut command))
    };
    let of_run = perplexity(&path);
    assert_eq!(of_run, perplexity(&out));
    assert_eq!(of_run, perplexity(&path.join("checkpoints/step-00000006")));
    assert_eq!(of_run["tokens"], 1000);
    let again = run(vrtrain().arg("export").arg(&path).arg("--out").arg(&out));
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("not empty"));
    let siblings: Vec<_> = std::fs::read_dir(out.parent().expect("a parent")).expect("readable").flatten().collect();
    assert_eq!(siblings.len(), 1, "nothing temporary stays: {siblings:?}");
}

#[test]
fn the_validation_loss_of_training_is_the_perplexity_that_eval_finds() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let config = small_config(folder.path(), 7, 0);
    let path = folder.path().join("run");
    succeed(vrtrain().args(["pretrain", "--quiet", "--config"]).arg(config).arg("--run-dir").arg(&path));
    let last = metrics(&path).pop().expect("records");
    let data = fixture("train/vradam-accumulated/tokens.bin");
    let mut command = vrtrain();
    command.arg("eval").arg(&path).args([
        "--task",
        "perplexity",
        "--json",
        "--window",
        "32",
        "--max-tokens",
        "512",
        "--data",
    ]);
    let evaluated = json(&succeed(command.arg(data)));
    let difference = (number(&last, "val_loss") - number(&evaluated, "nll_per_token")).abs();
    assert!(difference < 1e-6, "{difference}");
}

#[test]
fn sampling_repeats_with_its_seed_and_bad_prompts_are_refused() {
    let model = fixture("gpt-nano-sort");
    let generate = |extra: &[&str]| run(vrtrain().arg("generate").arg(&model).args(extra));
    let drawn = |seed: &str| {
        let output =
            generate(&["--prompt-ids", "0", "--temperature", "3", "--max-new-tokens", "10", "--seed", seed, "--json"]);
        json(&output)["ids"].clone()
    };
    assert_eq!(drawn("1"), drawn("1"));
    assert!((2..8).any(|seed| drawn(&seed.to_string()) != drawn("1")));
    for (arguments, code, word) in [
        (&["--prompt", "text"][..], 2, "tokenizer"),
        (&["--prompt-ids", "0,7"], 1, "vocabulary"),
        (&["--prompt-ids", "0,1,2,0,1,2,0,1,2,0,1,2"], 1, "context"),
        (&["--prompt-ids", "0", "--temperature", "-1"], 2, "temperature"),
        (&["--prompt-ids", "0", "--top-p", "0"], 2, "top-p"),
    ] {
        let output = generate(arguments);
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert!(stderr(&output).contains(word), "{}", stderr(&output));
    }
    let full = generate(&["--prompt-ids", "0,1,2,0,1,2,0,1,2,0", "--json"]);
    assert_eq!(json(&full)["end"], "context");
}
