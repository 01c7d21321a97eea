//! `vrtrain lab train`: one run of a small task, with the run folder, resume and exit codes of `pretrain`.

use super::setup::{LazyHub, source_files};
use super::{Ending, print_json, warn};
use crate::config::{ConfigError, DataSource, Duration, Task, TaskRunConfig};
use crate::data::Images;
use crate::lab::grid_problem::GridProblem;
use crate::lab::gridworld::Shape;
use crate::lab::image_problem::ImageProblem;
use crate::lab::problem::Problem;
use crate::lab::statistics::short as digits;
use crate::lab::tracking::{self, Settings, Tracker};
use crate::lab::trainer::{self, TaskRun};
use crate::optim::{OptimizerConfig, Schedule};
use crate::params::ParameterStore;
use crate::train::checkpoint::Checkpoints;
use crate::train::{Interrupt, Outcome, Record, RunFolder, fresh_path, is_run, read_metrics, short};
use anyhow::{Context, Result};
use candle_core::Device;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub config: Option<PathBuf>,
    pub assignments: Vec<String>,
    pub run_dir: Option<PathBuf>,
    pub resume: bool,
    pub quiet: bool,
    pub json: bool,
}

/// A task's run, checked and opened.
pub struct Prepared {
    pub config: TaskRunConfig,
    pub problem: Box<dyn Problem>,
    pub optimizer: OptimizerConfig,
    pub schedule: Schedule,
    pub steps: u64,
    /// What the config asks for and gets nothing of.
    pub warnings: Vec<String>,
}

/// Trains, and says how that ended.
pub fn run(options: &Options) -> Result<Ending> {
    let (config, path, resume) = choose(options)?;
    let mut prepared = prepare(config)?;
    let newest = if resume { newest_checkpoint(&path, &prepared.config)? } else { None };
    let loaded = newest.map(|folder| trainer::load(&folder, &mut *prepared.problem)).transpose()?;
    let Prepared { config, problem, optimizer: settings, schedule, steps, warnings } = prepared;
    let step = loaded.as_ref().map_or(0, |loaded| loaded.state.step);
    if step >= steps {
        eprintln!("{} is finished: {step} of {steps} steps are done", path.display());
        Checkpoints::of_run(&path).settle(step, None, config.keep_last)?;
        return finish(options, &path, step);
    }
    let layout = Arc::clone(problem.layout());
    let mut store = ParameterStore::new(Arc::clone(&layout), &Device::Cpu)?;
    let mut optimizer = settings.build(&layout, &Device::Cpu)?;
    let mut weights = vec![0.0; layout.len()];
    match loaded {
        None => problem.initialize(config.seed, &mut weights),
        Some(loaded) => {
            weights = loaded.weights;
            optimizer.load_state(&loaded.optimizer)?;
        }
    }
    store.set_weights(weights)?;
    let folder = RunFolder::open(&path)?;
    folder.write_config(&config.to_toml())?;
    if step == 0 {
        folder.write_initial_hash(&store)?;
    }
    warn(&warnings);
    if !options.quiet {
        eprintln!("run        {}", path.display());
        eprintln!("task       {}: {} parameters", config.task.word(), short(layout.count() as f64));
        eprintln!("optimizer  {}, lr {:e}; {steps} steps of {} examples", settings.name(), settings.lr(), config.batch);
    }
    let tracker = config.sharpness.map(|sharpness| Tracker {
        every: sharpness.every,
        settings: Settings::new(&settings, sharpness.examples, sharpness.iterations, 3, config.seed),
    });
    let every = (steps / 10).max(1);
    let quiet = options.quiet;
    let mut show = |record: &Record| {
        if !quiet && (record.step == 1 || record.step.is_multiple_of(every) || record.val_loss.is_some()) {
            eprintln!("{}", line(record, steps));
        }
    };
    let mut run = TaskRun {
        folder: &folder,
        problem,
        store,
        optimizer,
        optimizer_name: config.optimizer.name.clone(),
        peak_lr: settings.lr(),
        schedule,
        seed: config.seed,
        grad_clip: config.grad_clip,
        step,
        steps,
        eval_every: config.eval_every,
        checkpoint_every: config.checkpoint_every,
        keep_last: config.keep_last,
        tracker,
        interrupt: Interrupt::install()?,
        show: &mut show,
        warn: &warn,
    };
    let outcome = run.train()?;
    let step = run.step;
    if outcome == Outcome::Interrupted {
        eprintln!("interrupted after step {step}: saved; continue with --run-dir {} --resume", path.display());
        return Ok(Ending::Interrupted);
    }
    finish(options, &path, step)
}

/// A record as a line.
fn line(record: &Record, steps: u64) -> String {
    let mut line = format!("step {}/{steps} | loss {}", record.step, digits(record.loss));
    for (name, value) in [("val", record.val_loss), ("accuracy", record.val_accuracy), ("L1", record.val_distance)] {
        if let Some(value) = value {
            line += &format!(" {name} {}", digits(value));
        }
    }
    line + &format!(
        " | norm {:.3e} | lr {:.3e} gate {:.3} | {:.2} ms",
        record.grad_norm, record.lr, record.gate, record.step_ms
    )
}

/// The config, the run's folder, and whether it goes on.
fn choose(options: &Options) -> Result<(TaskRunConfig, PathBuf, bool)> {
    let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
    let run_dir = options.run_dir.as_ref().map(absolute);
    if options.resume {
        let Some(path) = run_dir else {
            return Err(ConfigError::flag("--resume", "give the run with --run-dir").into());
        };
        let stored = path.join("config.toml");
        if is_run(&path) {
            let given = options.config.clone().unwrap_or_else(|| stored.clone());
            let mut config = TaskRunConfig::load(&given, &options.assignments)?;
            if config.schedule.steps.is_none() {
                config.schedule.steps = TaskRunConfig::load(&stored, &[])?.schedule.steps;
            }
            return Ok((config, path, true));
        }
        let Some(config) = &options.config else {
            let message = format!("{} is not a run (it has no config.toml)", path.display());
            return Err(ConfigError::flag("--run-dir", message).into());
        };
        RunFolder::check_fresh(&path)?;
        return Ok((TaskRunConfig::load(config, &options.assignments)?, path, false));
    }
    let Some(config) = &options.config else {
        return Err(ConfigError::flag("--config", "give a task's config, such as configs/lab/gridworld.toml").into());
    };
    let config = TaskRunConfig::load(config, &options.assignments)?;
    let path = match run_dir {
        Some(path) => path,
        None => fresh_path(&std::env::current_dir().context("there is no working directory")?, &config.name),
    };
    RunFolder::check_fresh(&path)?;
    Ok((config, path, false))
}

/// Refuses an optimizer that the task cannot serve.
pub fn refuse_unfit_optimizer(config: &TaskRunConfig, settings: &crate::config::Settings) -> Result<(), ConfigError> {
    if matches!(config.task, Task::GridWorld(_)) && config.optimizer.name == "sophiag" {
        let message = "sophiag draws labels from the model, and gridworld has none: choose another optimizer";
        return Err(settings.error("optimizer.name", message));
    }
    Ok(())
}

/// What to say where a loss is asked for of more examples than the task has.
pub fn too_many_examples(problem: &dyn Problem, asked: usize) -> Option<String> {
    let (there, what) = problem.examples();
    (asked > there).then(|| format!("{asked} are asked for, but only {there} {what}"))
}

/// Opens the data and checks everything that the config alone cannot tell.
pub fn prepare(mut config: TaskRunConfig) -> Result<Prepared> {
    let settings = config.settings.0.clone();
    let (optimizer, warnings) = super::prepare::optimizer_of(&mut config.optimizer, &settings)?;
    let (problem, epoch): (Box<dyn Problem>, Option<usize>) = match &config.task {
        Task::GridWorld(grid) => {
            refuse_unfit_optimizer(&config, &settings)?;
            let shape = Shape { side: grid.side, layers: grid.layers, width: grid.width };
            (Box::new(GridProblem::new(shape, config.batch, config.seed)), None)
        }
        Task::Images(task) => {
            let hub = LazyHub::default();
            let read = |source: &DataSource, globs: &[String], limit, key| -> Result<Images> {
                let DataSource::Files(sources) = source else { return Ok(Images::default()) };
                let files = source_files(sources, globs, &hub, key)?;
                let files: Vec<_> = files.into_iter().map(|file| file.bytes).collect();
                Images::read(&files, limit).with_context(|| format!("`{key}`"))
            };
            let training = read(&task.training, &task.training_files, task.examples, "data.source")?;
            let validation =
                read(&task.validation, &task.validation_files, task.validation_examples, "data.validation.source")?;
            for (key, asked, found) in [
                ("task.examples", task.examples, training.len()),
                ("task.validation_examples", task.validation_examples, validation.len()),
            ] {
                if let Some(asked) = asked.filter(|asked| *asked > found) {
                    return Err(settings.error(key, format!("`{key}` = {asked}, but there are {found} images")).into());
                }
            }
            if config.batch > training.len() {
                let message =
                    format!("`task.batch` = {} is more than the {} training images", config.batch, training.len());
                return Err(settings.error("task.batch", message).into());
            }
            let sets = [training, validation];
            let (network, objective) = (task.network, task.objective);
            let problem = ImageProblem::new(network, objective, task.augment, config.batch, config.seed, sets)?;
            let epoch = problem.epoch_len();
            (Box::new(problem), Some(epoch))
        }
    };
    let key = "task.sharpness_examples";
    if let Some(sharpness) = config.sharpness.as_mut().filter(|_| !settings.is_set(key)) {
        // The default is what there is of it.
        sharpness.examples = sharpness.examples.min(problem.examples().0);
    }
    if let Some(why) = config.sharpness.and_then(|sharpness| too_many_examples(&*problem, sharpness.examples)) {
        return Err(settings.error(key, format!("`{key}`: {why}")).into());
    }
    let steps = match (config.duration, epoch) {
        (Duration::Steps(steps), _) => steps,
        (Duration::Epochs(epochs), Some(images)) => {
            ((epochs * images as f64 / config.batch as f64).round() as u64).max(1)
        }
        _ => return Err(settings.error("train.steps", "give `train.steps` for this task").into()),
    };
    let horizon = config.schedule.steps.unwrap_or(steps);
    config.schedule.steps = Some(horizon);
    let schedule = super::prepare::schedule_of(&config.schedule, &settings, horizon)?;
    Ok(Prepared { config, problem, optimizer, schedule, steps, warnings })
}

fn newest_checkpoint(path: &Path, config: &TaskRunConfig) -> Result<Option<PathBuf>> {
    let mut stored = TaskRunConfig::load(&path.join("config.toml"), &[])?;
    // What its keys come to: an earlier version wrote down those without effect too.
    let settings = stored.settings.0.clone();
    super::prepare::optimizer_of(&mut stored.optimizer, &settings)?;
    let changed = stored.changed_mathematics(config);
    if !changed.is_empty() {
        let list: Vec<String> = changed.iter().map(|(key, old, new)| format!("{key}: {old} -> {new}")).collect();
        let message = format!(
            "a resumed run keeps its mathematics, but these settings differ from {}: {}; start a new run for them",
            path.join("config.toml").display(),
            list.join("; ")
        );
        return Err(ConfigError::flag("--resume", message).into());
    }
    let (newest, rejected) = Checkpoints::of_run(path).newest_valid()?;
    rejected.iter().for_each(|why| eprintln!("passing over a checkpoint that is not valid: {why}"));
    if newest.is_none() {
        eprintln!("{} has no valid checkpoint yet: starting from the beginning", path.display());
    }
    Ok(newest)
}

/// Says where the results are.
fn finish(options: &Options, path: &Path, step: u64) -> Result<Ending> {
    let measured = tracking::read(path)?;
    if !measured.is_empty() {
        let [_, png] =
            tracking::chart("Sharpness and the edges of stability", &measured).write(&path.join("sharpness"))?;
        if !options.quiet {
            eprintln!("sharpness  {}", png.display());
        }
    }
    let last = read_metrics(path)?.into_iter().next_back();
    if options.json {
        print_json(&json!({
            "run": path, "step": step,
            "loss": last.as_ref().map(|record| record.loss),
            "val_loss": last.as_ref().and_then(|record| record.val_loss),
            "val_accuracy": last.as_ref().and_then(|record| record.val_accuracy),
            "val_distance": last.as_ref().and_then(|record| record.val_distance),
        }))?;
    } else if !options.quiet {
        eprintln!("done: {}", path.display());
    }
    Ok(Ending::Done)
}
