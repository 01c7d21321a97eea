//! The whole trainer on a CUDA device: a card, or the emulated device of tests/cuda (scripts/cuda-check.sh builds it and
//! runs this). On the emulated device candle's own CUDA backend and our launches run, only slowly and on the CPU.
//!
//! Where there is neither, the tests say that they skip; VRTRAIN_REQUIRE_CUDA=1 makes that a failure.
#![cfg(feature = "cuda")]

mod common;

use common::*;
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Whether there is a device to run on.
fn device(test: &str) -> bool {
    let found = candle_core::Device::new_cuda(0);
    assert!(found.is_ok() || std::env::var_os("VRTRAIN_REQUIRE_CUDA").is_none(), "no CUDA device: {found:?}");
    if found.is_err() {
        eprintln!("skipping {test}: no CUDA device");
    }
    found.is_ok()
}

/// Whether that is the emulated device, which takes orders from the environment.
fn emulated(test: &str) -> bool {
    let emulated = std::env::var_os("VRTRAIN_EMULATED_DEVICE").is_some();
    if !emulated {
        eprintln!("skipping {test}: it needs the emulated device");
    }
    emulated
}

/// A run of `steps` steps of 64 tokens in two micro-batches, with a schedule for six.
fn pretrain(folder: &Path, name: &str, device: &str, steps: u64, more: &[&str]) -> (Command, PathBuf) {
    let run = folder.join(name);
    let mut command = vrtrain();
    command.args(["pretrain", "--config"]).arg(small_config(folder, steps, 3)).arg("--run-dir").arg(&run);
    let device = format!("train.device={device}");
    let short = [
        "train.sequence_length=16",
        "train.micro_batch=2",
        "train.tokens_per_step=64",
        "train.eval_every=3",
        "data.validation.tokens=64",
        "schedule.steps=6",
    ];
    for setting in short.iter().chain(more).copied().chain([device.as_str()]) {
        command.args(["--set", setting]);
    }
    (command, run)
}

/// Every number of a checkpoint by tensor: the weights, and the optimizer's state.
fn tensors(run: &Path) -> BTreeMap<String, Vec<f32>> {
    let mut all = BTreeMap::new();
    for file in ["model.safetensors", "optimizer.safetensors"] {
        let bytes = checkpoint_file(run, file);
        for (name, view) in SafeTensors::deserialize(&bytes).expect("a safetensors file").tensors() {
            let numbers =
                view.data().chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]));
            all.insert(format!("{file} {name}"), numbers.collect());
        }
    }
    all
}

/// Whether the bias of the attention's keys is compared. It moves no output (the softmax is the same for scores that are
/// shifted alike), so its gradient is rounding alone, and a method that steps by signs makes full steps of that.
#[derive(Clone, Copy, PartialEq, Eq)]
enum KeysBias {
    Compared,
    RoundingAlone,
}

/// Losses and the step's scalars within 1e-6 of each other, weights and moments within 1e-6 of the tensor's largest.
fn same_run(here: &Path, there: &Path, keys_bias: KeysBias) {
    let (here_records, there_records) = (metrics(here), metrics(there));
    assert_eq!(here_records.len(), there_records.len());
    for (expected, got) in here_records.iter().zip(&there_records) {
        for key in ["loss", "val_loss", "lr", "grad_norm", "eta", "gate", "velocity_sq"] {
            let Some(expected_value) = expected[key].as_f64() else {
                assert_eq!(expected[key], got[key]);
                continue;
            };
            let off = (number(got, key) / expected_value - 1.0).abs();
            let allowed = if key.contains("loss") { 1e-6 } else { 1e-5 };
            assert!(off <= allowed, "step {}: {key} is {} and not {expected_value}", expected["step"], got[key]);
        }
    }
    let (here, there) = (tensors(here), tensors(there));
    assert!(here.keys().eq(there.keys()));
    for (name, expected) in &here {
        let largest = expected.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let keys = expected.len() / 3..2 * expected.len() / 3;
        let left_out =
            |i: usize| keys_bias == KeysBias::RoundingAlone && name.ends_with("attn.c_attn.bias") && keys.contains(&i);
        let pairs = expected.iter().zip(&there[name]).enumerate().filter(|(i, _)| !left_out(*i));
        let worst = pairs.map(|(_, (a, b))| (a - b).abs());
        let worst = worst.fold(0f32, |worst, off| if off <= worst { worst } else { off });
        // Steps by signs also divide by the square of a sampled gradient (SophiaG), which multiplies its rounding.
        let allowed = if keys_bias == KeysBias::Compared { 1e-5 } else { 5e-5 };
        assert!(worst <= allowed * largest && largest > 0.0, "{name}: off by {worst} of {largest}");
    }
}

/// With a usual epsilon Adam makes whole steps of rounding where a gradient is zero but for it (the keys' bias).
const NO_TINY_DIVISOR: &str = "optimizer.eps=1e-4";

#[test]
fn a_run_on_the_device_has_the_losses_weights_and_moments_of_the_run_on_the_cpu() {
    if !device("a_run_on_the_device") {
        return;
    }
    let folder = tempfile::tempdir().expect("a scratch folder");
    let (mut command, here) = pretrain(folder.path(), "cpu", "cpu", 6, &[NO_TINY_DIVISOR]);
    succeed(&mut command);
    let (mut command, there) = pretrain(folder.path(), "cuda", "cuda:0", 6, &[NO_TINY_DIVISOR]);
    let output = succeed(&mut command);
    assert!(stderr(&output).contains("cuda:0 (as asked)"), "{}", stderr(&output));
    same_run(&here, &there, KeysBias::Compared);
}

#[test]
fn a_llama_trains_on_the_device_as_on_the_cpu() {
    if !device("a_llama_trains_on_the_device") {
        return;
    }
    let folder = tempfile::tempdir().expect("a scratch folder");
    let settings = [NO_TINY_DIVISOR, "model.arch=llama", "model.n_kv_head=1"];
    let (mut command, here) = pretrain(folder.path(), "cpu", "cpu", 3, &settings);
    succeed(&mut command);
    let (mut command, there) = pretrain(folder.path(), "cuda", "cuda:0", 3, &settings);
    succeed(&mut command);
    same_run(&here, &there, KeysBias::Compared);
}

#[test]
fn methods_with_a_second_pass_run_on_the_device_as_on_the_cpu() {
    if !device("methods_with_a_second_pass") {
        return;
    }
    let folder = tempfile::tempdir().expect("a scratch folder");
    let sophiag = ["optimizer.name=sophiag", "optimizer.gate=true", "optimizer.hessian_every=2"];
    for (name, settings, keys_bias) in [
        ("sophiag", &sophiag[..], KeysBias::RoundingAlone),
        ("sam", &["optimizer.sam=true", NO_TINY_DIVISOR], KeysBias::Compared),
    ] {
        let (mut command, here) = pretrain(folder.path(), &format!("{name}-cpu"), "cpu", 3, settings);
        succeed(&mut command);
        let (mut command, there) = pretrain(folder.path(), &format!("{name}-cuda"), "cuda:0", 3, settings);
        succeed(&mut command);
        same_run(&here, &there, keys_bias);
    }
}

#[test]
fn a_resumed_run_on_the_device_ends_with_the_bits_of_the_uninterrupted_one_and_exports() {
    if !device("a_resumed_run_on_the_device") {
        return;
    }
    let folder = tempfile::tempdir().expect("a scratch folder");
    let (mut command, whole) = pretrain(folder.path(), "whole", "cuda:0", 6, &[]);
    succeed(&mut command);
    let (mut command, run) = pretrain(folder.path(), "run", "cuda:0", 3, &[]);
    succeed(&mut command);
    let (mut command, _) = pretrain(folder.path(), "run", "cuda:0", 6, &[]);
    succeed(command.arg("--resume"));
    for file in ["model.safetensors", "optimizer.safetensors"] {
        assert!(checkpoint_file(&whole, file) == checkpoint_file(&run, file), "{file} differs");
    }
    let losses = |run: &Path| metrics(run).iter().map(|record| record["loss"].to_string()).collect::<Vec<_>>();
    assert_eq!(losses(&whole), losses(&run));

    let out = folder.path().join("exported");
    succeed(vrtrain().arg("export").arg(&run).arg("--out").arg(&out));
    assert!(out.join("model.safetensors").is_file());
    let generated = succeed(vrtrain().arg("generate").arg(&run).args(["--prompt-ids", "1,2,3", "--json"]));
    assert!(stdout(&generated).contains("\"ids\""));
}

#[test]
fn a_driver_without_a_card_is_passed_over_by_auto_and_named_where_a_card_was_asked_for() {
    if !emulated("a_driver_without_a_card") {
        return;
    }
    let folder = tempfile::tempdir().expect("a scratch folder");
    let (mut command, _) = pretrain(folder.path(), "auto", "auto", 1, &[]);
    let output = succeed(command.env("EMULATED_NO_DEVICE", "1"));
    assert!(stderr(&output).contains("cpu (cuda:0 does not open: the driver finds no card"), "{}", stderr(&output));
    let (mut command, run_folder) = pretrain(folder.path(), "asked", "cuda:0", 1, &[]);
    let output = run(command.env("EMULATED_NO_DEVICE", "1"));
    assert_eq!(output.status.code(), Some(2));
    let told = stderr(&output);
    assert!(told.contains("train.device") && told.contains("the driver finds no card"), "{told}");
    assert!(!run_folder.exists());
    let output = run(vrtrain().arg("doctor").env("EMULATED_NO_DEVICE", "1").env("HF_HUB_OFFLINE", "1"));
    assert!(stdout(&output).contains("the driver finds no card"), "{}", stdout(&output));
}

#[test]
fn a_card_whose_memory_is_full_is_named_with_what_to_do() {
    if !emulated("a_card_whose_memory_is_full") {
        return;
    }
    let folder = tempfile::tempdir().expect("a scratch folder");
    // Enough for the weights and the moments, not for a batch; then for neither.
    for bytes in ["700000", "100000"] {
        let (mut command, _) = pretrain(folder.path(), bytes, "cuda:0", 1, &[]);
        let output = run(command.env("EMULATED_MEMORY", bytes));
        assert_eq!(output.status.code(), Some(1));
        let told = stderr(&output);
        assert!(told.contains("the card's memory is full") && told.contains("train.micro_batch"), "{told}");
    }
}
