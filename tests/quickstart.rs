//! The first thing that a user runs, cut short: it must end, and its run folder must serve every other command.

mod common;

use common::*;

#[test]
fn a_short_quickstart_leaves_a_run_that_resumes_generates_and_exports() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let shorter = ["--set", "train.steps=4", "--set", "train.micro_batch=2", "--set", "train.tokens_per_step=512"];
    let mut command = vrtrain();
    command.current_dir(folder.path()).args(["pretrain", "--json"]).args(shorter);
    let output = succeed(&mut command);
    let summary: serde_json::Value = serde_json::from_str(stdout(&output).trim()).expect("one object");
    assert_eq!(summary["held_out_problems"], 500);
    assert!(summary["exact_match"].as_f64().is_some_and(|share| (0.0..=1.0).contains(&share)));
    let path = folder.path().join("runs/quickstart-1");
    assert!(stderr(&output).contains("validation"), "{}", stderr(&output));
    assert!(!stderr(&output).contains('\u{1b}'), "no terminal, no escape sequences");

    succeed(vrtrain().args(["pretrain", "--quiet", "--resume", "--set", "train.steps=6", "--run-dir"]).arg(&path));
    assert_eq!(metrics(&path).len(), 6);
    let mut generate = vrtrain();
    generate.arg("generate").arg(&path).args(["--prompt", "Question: Tom", "--max-new-tokens", "20"]);
    assert!(stdout(&succeed(&mut generate)).starts_with("Question: Tom"));
    let out = folder.path().join("model");
    succeed(vrtrain().arg("export").arg(&path).arg("--out").arg(&out));
    for name in
        ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    {
        assert!(out.join(name).is_file(), "{name}");
    }
    let mut again = vrtrain();
    again.arg("generate").arg(&out).args(["--prompt", "Question: Tom", "--max-new-tokens", "20"]);
    let mut of_run = vrtrain();
    of_run.arg("generate").arg(&path).args(["--prompt", "Question: Tom", "--max-new-tokens", "20"]);
    assert_eq!(stdout(&succeed(&mut again)), stdout(&succeed(&mut of_run)));
}

#[test]
fn doctor_and_plan_answer_in_json() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let output = run(vrtrain().env("HF_HOME", folder.path()).env("HF_HUB_OFFLINE", "1").args(["doctor", "--json"]));
    let report: serde_json::Value = serde_json::from_str(stdout(&output).trim()).expect("one object");
    assert_eq!(report["ok"], true, "{report}");
    let output = succeed(vrtrain().args(["plan", "--json", "--tokens-per-s", "1000"]));
    let plan: serde_json::Value = serde_json::from_str(stdout(&output).trim()).expect("one object");
    assert!(plan["parameters"].as_u64().is_some_and(|count| count > 100_000), "{plan}");
    let tokens = plan["tokens"].as_f64().expect("tokens");
    assert_eq!(plan["seconds"].as_f64(), Some(tokens / 1000.0));
}
