//! Dropout in a run: resumed equals never stopped, threads change nothing, evaluations drop nothing.

mod common;

use common::*;
use std::path::Path;
use std::process::Command;

fn pretrain(config: &Path, run: &Path, dropout: f64) -> Command {
    let mut command = vrtrain();
    command.args(["pretrain", "--quiet", "--config"]).arg(config).arg("--run-dir").arg(run);
    command.args(["--set".to_owned(), format!("model.dropout={dropout}")]);
    command
}

#[test]
fn a_run_with_dropout_resumes_bit_for_bit_on_any_number_of_threads_and_differs_from_one_without() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    for arch in ["gpt2", "llama"] {
        let config = small_config(folder.path(), 10, 5);
        let text = std::fs::read_to_string(&config).expect("the config");
        std::fs::write(&config, text.replace("gpt2", arch)).expect("a config can be written");
        let place = |name: &str| folder.path().join(format!("{arch}-{name}"));
        let (whole, parted, without) = (place("whole"), place("parted"), place("without"));
        succeed(pretrain(&config, &whole, 0.2).env("RAYON_NUM_THREADS", "1"));
        succeed(pretrain(&config, &parted, 0.2).args(["--set", "train.steps=5", "--set", "schedule.steps=10"]));
        succeed(pretrain(&config, &parted, 0.2).args(["--resume", "--set", "schedule.steps=10"]));
        for file in ["model.safetensors", "optimizer.safetensors"] {
            assert!(checkpoint_file(&whole, file) == checkpoint_file(&parted, file), "{file} differs");
        }
        let losses = |run: &Path| metrics(run).iter().map(|record| number(record, "loss")).collect::<Vec<_>>();
        assert_eq!(losses(&whole), losses(&parted));
        succeed(&mut pretrain(&config, &without, 0.0));
        assert_ne!(losses(&whole)[0], losses(&without)[0]);
        // Another probability is another run.
        let output = common::run(pretrain(&config, &whole, 0.3).args(["--resume", "--set", "train.steps=20"]));
        assert!(output.status.code() == Some(2) && stderr(&output).contains("dropout"), "{}", stderr(&output));
    }
}
