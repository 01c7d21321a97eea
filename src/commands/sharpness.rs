//! `vrtrain sharpness`: the largest eigenvalues of the Hessian at a run's checkpoints, beside the edges of stability.

use super::setup::read_model_config;
use super::{Ending, print_json, task, warn};
use crate::config::{ConfigError, RunConfig, TaskRunConfig};
use crate::data::{Batch, Feed};
use crate::lab::problem::Problem;
use crate::lab::sharpness::Loss;
use crate::lab::tracking::{Measurement, Point, Settings, chart, measure};
use crate::model::ModelShape;
use crate::optim::OptimizerConfig;
use crate::params::Layout;
use crate::train::checkpoint::{self, Checkpoints, replace_file};
use crate::train::{is_run, read_metrics, view};
use anyhow::{Context, Result, bail};
use candle_core::Tensor;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub run: PathBuf,
    /// Every checkpoint that is there, not the newest alone.
    pub all: bool,
    /// Rows or images of the loss.
    pub examples: usize,
    pub iterations: usize,
    pub count: usize,
    /// Tokens of a row; left out: the run's.
    pub sequence_length: Option<usize>,
    pub json: bool,
}

/// The loss of a run, as a function of its parameters.
struct Subject<'a> {
    layout: Arc<Layout>,
    optimizer: OptimizerConfig,
    seed: u64,
    loss: Loss<'a>,
}

/// Measures and shows.
pub fn run(options: &Options) -> Result<Ending> {
    for (flag, value) in
        [("--examples", options.examples), ("--iterations", options.iterations), ("--top", options.count)]
    {
        if value == 0 {
            return Err(ConfigError::flag(flag, "it takes a whole number from 1").into());
        }
    }
    if options.sequence_length == Some(0) {
        return Err(ConfigError::flag("--sequence-length", "it takes a whole number from 1").into());
    }
    if options.count > options.iterations {
        let message = format!(
            "{} eigenvalues take as many Lanczos iterations, and --iterations is {}: raise it or lower --top",
            options.count, options.iterations
        );
        return Err(ConfigError::flag("--top", message).into());
    }
    let (run, checkpoints) = checkpoints(&options.run, options.all)?;
    let stored = run.join("config.toml");
    let mut problem;
    let subject = if TaskRunConfig::is_task(&stored)? {
        if options.sequence_length.is_some() {
            let message =
                format!("{} is a run of a small task, which has no rows of tokens: leave it out", run.display());
            return Err(ConfigError::flag("--sequence-length", message).into());
        }
        let prepared = task::prepare(TaskRunConfig::load(&stored, &[])?)?;
        problem = Some(prepared.problem);
        let problem: &dyn Problem = match &mut problem {
            Some(problem) => &**problem,
            None => bail!("no problem"),
        };
        if let Some(why) = task::too_many_examples(problem, options.examples) {
            return Err(ConfigError::flag("--examples", why).into());
        }
        let loss = move |tensors: &[Tensor]| problem.twin(tensors, options.examples);
        let (layout, seed) = (Arc::clone(problem.layout()), prepared.config.seed);
        Subject { layout, optimizer: prepared.optimizer, seed, loss: Box::new(loss) }
    } else {
        language_model(&run, &stored, options)?
    };
    if options.count > subject.layout.count() {
        let message = format!("the model has {} parameters and no more eigenvalues", subject.layout.count());
        return Err(ConfigError::flag("--top", message).into());
    }
    let records = read_metrics(&run)?;
    let settings = Settings::new(&subject.optimizer, options.examples, options.iterations, options.count, subject.seed);
    let mut measured = Vec::new();
    for folder in checkpoints {
        let state = checkpoint::read_state(&folder)?;
        let record = records.iter().find(|record| record.step == state.step);
        let Some(record) = record else { bail!("metrics.jsonl has no record of step {}", state.step) };
        let mut weights = vec![0.0; subject.layout.len()];
        checkpoint::read_weights(&folder, &subject.layout, &mut weights)?;
        let optimizer = checkpoint::read_optimizer(&folder, &state)?;
        let point = Point { step: state.step, lr: record.lr, eta: record.eta };
        let measurement = measure(&settings, &subject.layout, &weights, &optimizer, point, &subject.loss)?;
        if !options.json {
            show(&measurement, measured.is_empty());
        }
        warn(&measurement.warnings());
        measured.push(measurement);
    }
    let mut pictures = Vec::new();
    if options.all {
        let lines: Vec<String> = measured.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
        replace_file(&run.join("sharpness-checkpoints.jsonl"), (lines.join("\n") + "\n").as_bytes())?;
        pictures.extend(
            chart("Sharpness and the edges of stability", &measured).write(&run.join("sharpness-checkpoints"))?,
        );
    }
    if options.json {
        print_json(&json!({"run": run, "examples": options.examples, "iterations": options.iterations,
                           "measurements": measured, "pictures": pictures}))?;
    }
    pictures.iter().for_each(|path| eprintln!("drawn: {}", path.display()));
    Ok(Ending::Done)
}

/// The run, and which of its checkpoints are meant.
fn checkpoints(path: &Path, all: bool) -> Result<(PathBuf, Vec<PathBuf>)> {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    if is_run(&path) {
        let (newest, rejected) = Checkpoints::of_run(&path).newest_valid()?;
        rejected.iter().for_each(|why| eprintln!("passing over a checkpoint that is not valid: {why}"));
        let newest = newest.with_context(|| format!("{} has no valid checkpoint", path.display()))?;
        if !all {
            return Ok((path, vec![newest]));
        }
        let folder = path.join("checkpoints");
        let entries = std::fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
        let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        found.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step-")));
        found.sort();
        for folder in &found {
            checkpoint::verify(folder).with_context(|| folder.display().to_string())?;
        }
        return Ok((path, found));
    }
    let run = path.parent().and_then(Path::parent).filter(|run| is_run(run) && path.join("state.json").is_file());
    let Some(run) = run else {
        let message = format!("{} is neither a run nor a run's checkpoint", path.display());
        return Err(ConfigError::flag("RUN", message).into());
    };
    if all {
        return Err(ConfigError::flag("--all", "it takes a run, not one of its checkpoints").into());
    }
    checkpoint::verify(&path).with_context(|| path.display().to_string())?;
    Ok((run.to_owned(), vec![path.clone()]))
}

/// The loss of a GPT or LLaMA run on the first rows of its training data, in their order.
fn language_model<'a>(run: &Path, stored: &Path, options: &Options) -> Result<Subject<'a>> {
    let mut config = RunConfig::load(stored, &[])?;
    let stored = super::target::model_folder(run);
    if let Some(length) = options.sequence_length {
        let positions = read_model_config(&stored.join("config.json"))?.n_positions();
        if length > positions {
            let message = format!("{length} tokens are more than the model's {positions} positions");
            return Err(ConfigError::flag("--sequence-length", message).into());
        }
        config.train.sequence_length = length;
    }
    // In the order of the files, whatever order the run drew.
    config.data.shuffle = false;
    let prepared = super::prepare::prepare(config, Some(&stored), super::run_length::Counting::Estimated)?;
    if prepared.adapted.is_some() {
        bail!("{} trains adapters: sharpness takes runs that train whole models", run.display());
    }
    let shape: ModelShape = prepared.model.clone();
    let layout = Arc::new(Layout::new(shape.parameter_specs()));
    let mut feed = prepared.data.feed(&prepared.config, prepared.tokenizer.as_ref(), shape.vocab_size(), None)?;
    let batch = first_rows(&mut feed, options.examples)?;
    let (of_loss, seed, optimizer) = (Arc::clone(&layout), prepared.config.seed, prepared.optimizer.clone());
    let loss = move |tensors: &[Tensor]| {
        let (sum, count) = shape.twin_loss(&of_loss, tensors, view(&batch))?;
        Ok((sum / count as f64)?)
    };
    Ok(Subject { layout, optimizer, seed, loss: Box::new(loss) })
}

/// The first `count` rows of the data, none of them twice.
fn first_rows(feed: &mut Feed, count: usize) -> Result<Batch> {
    let mut all: Option<Batch> = None;
    for row in 0..count {
        let epoch = match feed {
            Feed::Text(stream) => stream.epoch()?,
            Feed::Examples(stream) => stream.position().epoch,
        };
        if epoch > 0 {
            let message = format!("{count} rows are asked for, but a pass over the training data has only {row}");
            return Err(ConfigError::flag("--examples", message).into());
        }
        let next = feed.next_batch(1)?;
        match &mut all {
            None => all = Some(next),
            Some(all) => {
                all.inputs.extend(next.inputs);
                all.targets.extend(next.targets);
                all.rows += next.rows;
                all.padding += next.padding;
                if let (Some(places), Some(more)) = (&mut all.places, next.places) {
                    places.extend(more);
                }
            }
        }
    }
    all.context("no row was asked for")
}

fn show(measurement: &Measurement, first: bool) {
    let Measurement { step, eta, sharpness, residual, difference_error, .. } = measurement;
    if first {
        println!(
            "eigenvalues with the error that Lanczos' method leaves and that of the difference; the edges beside them"
        );
    }
    let list = |values: &[f64]| values.iter().map(|value| format!("{value:.6}")).collect::<Vec<_>>().join(" ");
    println!("step {step}  eta {eta:.4e}");
    println!("  H        {} (+- {residual:.1e}, {difference_error:.1e})", list(sharpness));
    if let Some(values) = &measurement.preconditioned {
        let residual = measurement.preconditioned_residual.unwrap_or(f64::NAN);
        let error = measurement.preconditioned_difference_error.unwrap_or(f64::NAN);
        println!("  P^-1 H   {} (+- {residual:.1e}, {error:.1e})", list(values));
    }
    println!(
        "  edges    2/eta {:.4}; with momentum {:.4} ungated, {:.4} gated",
        measurement.edge_descent, measurement.edge_momentum, measurement.edge_gated
    );
}
