//! Complete runs against the losses of a plain PyTorch program (f64), step by step.

mod common;

use common::*;
use serde_json::Value;
use std::path::Path;

/// Trains `case/run.toml` and compares every step with `case/losses.json`.
fn reproduces(case: &Path) {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let run = folder.path().join("run");
    succeed(vrtrain().args(["pretrain", "--quiet", "--config"]).arg(case.join("run.toml")).arg("--run-dir").arg(&run));
    let text = std::fs::read_to_string(case.join("losses.json")).expect("losses.json");
    let golden: Value = serde_json::from_str(&text).expect("losses.json is JSON");
    let expected = golden["f64"].as_array().expect("the f64 column");
    let records = metrics(&run);
    assert_eq!(records.len(), expected.len());
    for (record, expected) in records.iter().zip(expected) {
        let step = &expected["step"];
        assert_eq!(&record["step"], step);
        let loss = (number(record, "loss") - number(expected, "loss")).abs();
        assert!(loss < 2e-5, "{} step {step}: loss off by {loss}", case.display());
        for key in ["eta", "velocity_sq", "lr", "grad_norm"] {
            let relative = (number(record, key) / number(expected, key) - 1.0).abs();
            assert!(relative < 1e-4, "{} step {step}: {key} off by {relative}", case.display());
        }
    }
}

#[test]
fn a_run_with_accumulation_reproduces_pytorchs_losses_step_by_step() {
    reproduces(&fixture("train/vradam-accumulated"));
}

#[test]
fn a_llama_reproduces_pytorchs_losses_step_by_step() {
    reproduces(&fixture("train/llama-vradam"));
}

#[test]
fn all_golden_runs_are_reproduced() {
    let Some(shared) = shared("all_golden_runs_are_reproduced") else { return };
    for name in ["adamw", "vradam", "vradam-accumulated", "vradam-strong-gate"] {
        reproduces(&shared.join("golden/train").join(name));
    }
}
