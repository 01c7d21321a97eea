//! `vrtrain finetune`: the same run as `pretrain`, from a trained model and on examples.

use super::pretrain::{self, Options, Stage};
use super::{ConfigChoice, Embedded, Ending};
use crate::config::{DataSource, RunConfig};
use crate::train::{StepLines, checkpoint, is_run};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Trains, and says how that ended.
pub fn run(mut options: Options) -> Result<Ending> {
    options.stage = Stage::Finetune;
    if options.config.file.is_none() && !options.resume {
        options.config.embedded = Embedded::Finetune;
        let chosen = options.config.assignments.iter().any(|assignment| assignment.trim().starts_with("model.init"));
        if !chosen {
            let base = match pretrained_quickstart()? {
                Some(base) => base,
                None => match pretrain_quickstart(&options)? {
                    Pretrained::Run(base) => base,
                    Pretrained::Interrupted => return Ok(Ending::Interrupted),
                },
            };
            if !options.quiet {
                eprintln!("fine-tuning the quickstart's model of {}", base.display());
            }
            // The user's own settings come after this one and win.
            let init = toml::Value::String(base.display().to_string());
            options.config.assignments.insert(0, format!("model.init={init}"));
        }
    }
    pretrain::run(&options)
}

/// What became of the pre-training that had to come first.
enum Pretrained {
    Run(PathBuf),
    Interrupted,
}

/// Runs the pre-training quickstart, which says what it does on stderr.
fn pretrain_quickstart(options: &Options) -> Result<Pretrained> {
    eprintln!("there is no finished quickstart in runs/ to fine-tune: training it first (minutes on two cores)");
    let first = Options {
        stage: Stage::Pretrain,
        config: ConfigChoice::default(),
        run_dir: None,
        resume: false,
        quiet: options.quiet,
        json: false,
        step_lines: StepLines::None,
    };
    if pretrain::run(&first)? == Ending::Interrupted {
        return Ok(Pretrained::Interrupted);
    }
    let base = pretrained_quickstart()?.context("the quickstart was trained, but its run is not in runs/")?;
    Ok(Pretrained::Run(base))
}

/// The newest finished run of the pre-training quickstart in the working directory's runs/.
fn pretrained_quickstart() -> Result<Option<PathBuf>> {
    let runs = std::env::current_dir().context("there is no working directory")?.join("runs");
    let Ok(entries) = std::fs::read_dir(&runs) else { return Ok(None) };
    let mut numbered: Vec<(u64, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix("quickstart-")?.parse().ok()?;
            Some((number, entry.path()))
        })
        .collect();
    numbered.sort_unstable();
    Ok(numbered.into_iter().rev().map(|(_, path)| path).find(|path| is_finished_quickstart(path)))
}

/// Whether `run` is of the pre-training quickstart, and has all its steps.
fn is_finished_quickstart(run: &Path) -> bool {
    if !is_run(run) {
        return false;
    }
    // A run that cannot be read is none to build on.
    let Ok(config) = RunConfig::load(&run.join("config.toml"), &[]) else { return false };
    let Ok((Some(newest), _)) = checkpoint::Checkpoints::of_run(run).newest_valid() else { return false };
    let Ok(state) = checkpoint::read_state(&newest) else { return false };
    let enough = match config.train.duration {
        crate::config::Duration::Steps(steps) => state.step >= steps,
        _ => state.step >= state.schedule_steps,
    };
    config.data.source == DataSource::Quickstart && config.data.examples.is_none() && enough
}
