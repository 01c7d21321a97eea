//! `vrtrain pretrain` and `vrtrain finetune`: resolve and check everything, then make the run folder and train.

use super::adapted::{Adapted, refuse_changed_base};
use super::prepare::{Prepared, TokenizerFiles, optimizer_of, prepare};
use super::run_length::{self, Counting};
use super::setup;
use super::target::model_folder;
use super::{ConfigChoice, Ending, device, print_json, quickstart, warn};
use crate::config::{ConfigError, ExamplesConfig, RunConfig, changed_mathematics};
use crate::data::{Feed, ValidationSet};
use crate::generate::{Limits, SamplingOptions, SpecialTokens, TextStream};
use crate::model::adapter::peft;
use crate::model::{Decoder, Engine};
use crate::ops::product::Precision;
use crate::optim::Optimizer;
use crate::params::{Layout, ParameterStore};
use crate::train::checkpoint::{self, BaseRecord, Checkpoints, State};
use crate::train::{
    Events, Examiner, GIB, Hooks, Interrupt, Journal, Outcome, Peak, Phase, Progress, Run, RunFolder, Sample, Start,
    Status, StepLines, Verbosity, fresh_path, human_duration, is_run, short,
};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Which of the two commands runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Pretrain,
    Finetune,
}

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub stage: Stage,
    pub config: ConfigChoice,
    pub run_dir: Option<PathBuf>,
    pub resume: bool,
    pub quiet: bool,
    pub step_lines: StepLines,
    pub json: bool,
}

/// Trains, and says how that ended.
pub fn run(options: &Options) -> Result<Ending> {
    pretrain(options).map_err(device::explain)
}

fn pretrain(options: &Options) -> Result<Ending> {
    let verbosity = if options.quiet { Verbosity::Quiet } else { Verbosity::Normal };
    let (config, start, path) = choose(options)?;
    check_stage(options.stage, &config)?;
    if start == Start::Resume {
        // Before the rest of the config is completed: what is trained decides which files the run must have.
        refuse_changed_mathematics(&path, &config, |key| key.starts_with("lora."))?;
    }
    let resumed = if start == Start::Resume { newest_checkpoint(&path)? } else { None };
    let stored = model_folder(&path);
    let prepared =
        prepare(config, resumed.is_some().then_some(stored.as_path()), Counting::Exact { run: &path, verbosity })?;
    if start == Start::Resume {
        refuse_changed_mathematics(&path, &prepared.config, |_| true)?;
    }
    if let Some((state, _)) = &resumed
        && state.step >= prepared.steps
        && state.pending.is_none()
    {
        eprintln!("{} is finished: {} of {} steps are done", path.display(), state.step, prepared.steps);
        let checkpoints = Checkpoints::of_run(&path);
        let best = state.best.map(|best| best.step).filter(|best| checkpoints.has(*best));
        checkpoints.settle(state.step, best, prepared.config.train.keep_last)?;
        return finish(options, &path, state.step, Summary::default());
    }

    let layout = Arc::new(prepared.layout()?);
    if prepared.device.is_cpu()
        && let Ok(memory) = super::plan::memory(&prepared, &layout)
    {
        super::plan::check_fits(memory.total())?;
    }
    let base = prepared.adapted.as_ref().map(|adapted| base_of(adapted, resumed.as_ref())).transpose()?;
    let frozen = prepared.adapted.as_ref().map(|adapted| adapted.load_base(&prepared.model)).transpose()?;
    let mut store = ParameterStore::new(Arc::clone(&layout), &prepared.device)?.beside(frozen);
    let mut weights = vec![0.0; layout.len()];
    match &resumed {
        Some((_, folder)) => checkpoint::read_weights(folder, &layout, &mut weights)?,
        None => prepared.initialize(&layout, &mut weights)?,
    }
    store.set_weights(weights)?;
    // Adapters are multiplied in f32.
    if prepared.precision == Precision::Bf16 && prepared.adapted.is_none() {
        store.keep_rounded()?;
    }
    let mut optimizer = prepared.optimizer.build(&layout, &prepared.device)?;
    if let Some((state, folder)) = &resumed {
        check_state(state, &prepared, folder)?;
        optimizer.load_state(&checkpoint::read_optimizer(folder, state)?)?;
    }
    let vocabulary = prepared.model.vocab_size();
    let (tokenizer, from) = (prepared.tokenizer.as_ref(), resumed.as_ref().map(|(state, _)| &state.position));
    // Data that cannot be read are refused before a run folder is there.
    let stream = prepared.data.feed(&prepared.config, tokenizer, vocabulary, from)?;
    let validation = prepared.data.validation_set(&prepared.config, tokenizer, vocabulary)?;

    let folder = RunFolder::open(&path)?;
    folder.write_config(&prepared.config.to_toml())?;
    if let Some(pass) = &prepared.pass {
        run_length::keep(&path, pass)?;
    }
    if resumed.is_none() {
        write_model_folder(&prepared, &stored)?;
        folder.write_initial_hash(&store)?;
    }
    Status::of_this_process(Phase::Running, prepared.steps).write(&path)?;
    let state = resumed.map(|(state, _)| state);
    let peak = peak(&prepared, &layout);
    warn(&prepared.warnings);
    if verbosity == Verbosity::Normal {
        announce(&prepared, &layout, &path, validation.as_ref(), state.as_ref(), &peak);
    }
    let first = state.as_ref().map_or(0, |state| state.step);
    let mut progress = Progress::new(verbosity, options.step_lines, first, prepared.steps, peak);
    if first > 0 {
        // A crash may have torn the last line, or a hand taken the file away.
        Journal::open(&path.join("metrics.jsonl"), first)?;
        progress.recall(&crate::train::read_metrics(&path)?);
    }
    let parts = Parts { store, optimizer, stream, validation, state, base };
    let fresh = first == 0;
    let before = match &prepared.held_out {
        Some(held_out) if fresh && options.stage == Stage::Finetune => Some(parts.store.read_on_cpu(|weights| {
            quickstart::examine(held_out, &prepared, &layout, weights, verbosity, " before fine-tuning")
        })??),
        _ => None,
    };
    let look_first = fresh && options.stage == Stage::Finetune;
    let trained = train(&prepared, &folder, parts, &mut progress, look_first);
    progress.finish();
    let phase = match &trained {
        Ok((_, Outcome::Finished)) => Phase::Finished,
        Ok((_, Outcome::Interrupted)) => Phase::Interrupted,
        Err(error) => Phase::Failed { error: format!("{error:#}") },
    };
    // The error of the training itself comes first.
    let noted = Status::of_this_process(phase, prepared.steps).write(&path);
    let (trained, outcome) = trained?;
    let step = trained.step;
    noted?;
    if outcome == Outcome::Interrupted {
        eprintln!("interrupted after step {step}: saved; continue with --run-dir {} --resume", path.display());
        return Ok(Ending::Interrupted);
    }
    let report = match &prepared.held_out {
        Some(held_out) => Some(trained.store.read_on_cpu(|weights| {
            let when = if options.stage == Stage::Finetune { " after fine-tuning" } else { "" };
            quickstart::examine(held_out, &prepared, &layout, weights, verbosity, when)
        })??),
        None => None,
    };
    finish(options, &path, step, Summary { first_val_loss: trained.first_val_loss, before, report })
}

/// The newest valid checkpoint of a run, if there is one.
fn newest_checkpoint(run: &Path) -> Result<Option<(State, PathBuf)>> {
    let (newest, rejected) = Checkpoints::of_run(run).newest_valid()?;
    rejected.iter().for_each(|why| eprintln!("passing over a checkpoint that is not valid: {why}"));
    let Some(folder) = newest else {
        eprintln!("{} has no valid checkpoint yet: starting from the beginning", run.display());
        return Ok(None);
    };
    Ok(Some((checkpoint::read_state(&folder)?, folder)))
}

/// What checkpoints record of the adapters' base; a resumed run's must still be the same.
fn base_of(adapted: &Adapted, resumed: Option<&(State, PathBuf)>) -> Result<BaseRecord> {
    match resumed {
        None => adapted.record(),
        Some((state, folder)) => {
            let record = state.base.as_ref();
            let record = record.with_context(|| format!("{} names no base of its adapters", folder.display()))?;
            refuse_changed_base(adapted, record)?;
            Ok(record.clone())
        }
    }
}

/// The config, whether the run is fresh, and its folder.
fn choose(options: &Options) -> Result<(RunConfig, Start, PathBuf)> {
    let run_dir = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
    if !options.resume {
        let config = options.config.load()?;
        let path = match &options.run_dir {
            Some(path) => run_dir(path),
            None => fresh_path(&std::env::current_dir().context("there is no working directory")?, &config.name),
        };
        RunFolder::check_fresh(&path)?;
        return Ok((config, Start::Fresh, path));
    }
    let Some(path) = options.run_dir.as_ref().map(run_dir) else {
        return Err(ConfigError::flag("--resume", "give the run with --run-dir").into());
    };
    if !is_run(&path) && options.config.file.is_some() {
        RunFolder::check_fresh(&path)?;
        eprintln!("{} is no run yet: starting from the beginning", path.display());
        return Ok((options.config.load()?, Start::Fresh, path));
    }
    if !is_run(&path) {
        let message = format!("{} is not a run (it has no config.toml)", path.display());
        return Err(ConfigError::flag("--run-dir", message).into());
    }
    let stored = path.join("config.toml");
    let choice =
        ConfigChoice { file: Some(options.config.file.clone().unwrap_or(stored.clone())), ..options.config.clone() };
    let (mut config, mut first) = (choice.load()?, RunConfig::load(&stored, &[])?);
    if config.schedule.steps.is_none() {
        // The first run's horizon stands, however long this one goes on.
        config.schedule.steps = first.schedule.steps;
    }
    let first_date = first.data.examples.as_mut().and_then(ExamplesConfig::date_mut);
    if let (Some(date), Some(first_date)) =
        (config.data.examples.as_mut().and_then(ExamplesConfig::date_mut), first_date)
    {
        // And its day, whatever day it is now.
        *date = date.or(*first_date);
    }
    Ok((config, Start::Resume, path))
}

/// Refuses a config whose mathematics are not the stored one's, as far as `looked_at` chooses the keys.
fn refuse_changed_mathematics(path: &Path, config: &RunConfig, looked_at: impl Fn(&str) -> bool) -> Result<()> {
    let mut stored = RunConfig::load(&path.join("config.toml"), &[])?;
    // What its keys come to: an earlier version wrote down those without effect too.
    let settings = stored.settings.0.clone();
    optimizer_of(&mut stored.optimizer, &settings)?;
    let mut changed = changed_mathematics(&stored, config);
    changed.retain(|(key, _, _)| looked_at(key));
    if changed.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = changed.iter().map(|(key, old, new)| format!("{key}: {old} -> {new}")).collect();
    let message = format!(
        "a resumed run keeps its mathematics, but these settings differ from {}: {}; start a new run for them",
        path.join("config.toml").display(),
        list.join("; ")
    );
    Err(ConfigError::flag("--resume", message).into())
}

/// Whether the config is of this command.
fn check_stage(stage: Stage, config: &RunConfig) -> Result<()> {
    let settings = &config.settings.0;
    match stage {
        Stage::Pretrain if config.data.examples.is_some() => {
            let message = "this `data.format` is of `vrtrain finetune`; `pretrain` takes running text";
            Err(settings.error("data.format", message).into())
        }
        Stage::Finetune if config.model.init.is_none() => {
            let message = "finetune starts from a trained model: set `model.init` to a hub id, a folder or a run";
            Err(ConfigError::flag("[model]", message).into())
        }
        _ => Ok(()),
    }
}

/// Whether a checkpoint belongs to this run.
fn check_state(state: &State, prepared: &Prepared, folder: &Path) -> Result<()> {
    let optimizer = &prepared.config.optimizer.name;
    ensure!(
        state.optimizer == *optimizer,
        "the checkpoint {} is of optimizer {}, the run uses {optimizer}",
        folder.display(),
        state.optimizer
    );
    ensure!(
        state.seed == prepared.config.seed && state.schedule_steps == prepared.schedule.steps,
        "the checkpoint {} has seed {} and a schedule of {} steps, the run {} and {}",
        folder.display(),
        state.seed,
        state.schedule_steps,
        prepared.config.seed,
        prepared.schedule.steps
    );
    Ok(())
}

/// Writes what goes with the weights: the model's config and the tokenizer's files.
fn write_model_folder(prepared: &Prepared, folder: &Path) -> Result<()> {
    let write = || -> Result<()> {
        std::fs::create_dir_all(folder)?;
        let marks = prepared.tokenizer.as_ref().map(setup::text_marks);
        let config = serde_json::to_vec_pretty(&prepared.model.to_hugging_face(marks))?;
        checkpoint::replace_file(&folder.join("config.json"), &config)?;
        if let Some(adapted) = &prepared.adapted {
            let config = serde_json::to_vec_pretty(&adapted.peft_config(&prepared.model))?;
            checkpoint::replace_file(&folder.join(peft::CONFIG), &config)?;
        }
        match &prepared.tokenizer_files {
            TokenizerFiles::None => {}
            TokenizerFiles::Copy(files) => {
                for file in files {
                    let name = file.file_name().context("a tokenizer file without a name")?;
                    if file.parent() != Some(folder) {
                        checkpoint::replace_file(&folder.join(name), &std::fs::read(file)?)?;
                    }
                }
            }
            TokenizerFiles::Trained => {
                if let Some(tokenizer) = &prepared.tokenizer {
                    crate::quickstart::tokenizer::save(tokenizer.tokenizer(), folder, prepared.model.n_positions())?;
                }
            }
        }
        if let Some(template) = &prepared.plain_chat_template {
            checkpoint::replace_file(&folder.join("chat_template.jinja"), template.as_bytes())?;
        }
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", folder.display()))
}

/// Prints what will be done, on what, and why.
fn announce(
    prepared: &Prepared,
    layout: &Layout,
    path: &Path,
    validation: Option<&ValidationSet>,
    state: Option<&State>,
    peak: &Peak,
) {
    let Prepared { config, model, data, .. } = prepared;
    let train = &config.train;
    eprintln!("run        {}", path.display());
    let count = Layout::new(model.parameter_specs()).count();
    eprintln!("model      {}: {} parameters", model.describe(), short(count as f64));
    if let Some(adapted) = &prepared.adapted {
        eprintln!("adapters   {}", adapted.describe(layout.count(), model));
    }
    data.describe(validation).iter().for_each(|line| eprintln!("{line}"));
    eprintln!(
        "optimizer  {}, lr {:e}; {} of {} steps",
        config.optimizer.name,
        prepared.optimizer.lr(),
        schedule_word(config),
        prepared.schedule.steps
    );
    eprintln!(
        "steps      {}: {} tokens each = {} x {} rows of {}",
        prepared.steps,
        train.tokens_per_step,
        train.micro_batches(),
        train.micro_batch,
        train.sequence_length
    );
    prepared.reasons.iter().for_each(|line| eprintln!("{line}"));
    let (steps, end) = (prepared.steps, prepared.schedule.steps);
    if steps > end && prepared.schedule.lr(1.0, end) < 1.0 {
        let least = prepared.schedule.lr(prepared.optimizer.lr(), end);
        eprintln!("schedule   it ends after {end} of {steps} steps; from there on the rate stays at {least:e}");
    }
    // What the plan cannot tell (a base whose files have gone meanwhile) the run has found out already.
    if let Ok(memory) = super::plan::memory(prepared, layout) {
        eprintln!("memory     about {:.2} GiB", memory.total() as f64 / GIB);
    }
    let left = (prepared.steps - state.map_or(0, |state| state.step)) as f64 * train.tokens_per_step as f64;
    match super::plan::typical_tokens_per_s(peak) {
        Some(speed) => {
            let time = human_duration(left / speed);
            eprintln!("time       about {time} at {} tok/s (guessed from this machine's products)", short(speed));
        }
        None => eprintln!("time       unknown before the first steps: the speed of this device has not been measured"),
    }
    if train.sample_every > 0 && prepared.tokenizer.is_none() {
        eprintln!("samples    none: this run has no tokenizer, `train.sample_every` has no effect");
    }
    if let Some(state) = state {
        eprintln!("resumed    after step {} ({} tokens)", state.step, short(state.tokens as f64));
    }
}

fn schedule_word(config: &RunConfig) -> &'static str {
    use crate::config::ScheduleName::{Constant, Cosine, Linear, RangeTest, WarmupStableDecay};
    match config.schedule.name {
        Cosine => "cosine",
        Linear => "linear",
        Constant => "constant",
        WarmupStableDecay => "warm-up, stable, decay",
        RangeTest => "range test",
    }
}

/// What a run is made of besides its plan.
struct Parts {
    store: ParameterStore,
    optimizer: Box<dyn Optimizer>,
    stream: Feed,
    validation: Option<ValidationSet>,
    state: Option<State>,
    base: Option<BaseRecord>,
}

/// What the device's products reach, and what a token needs.
fn peak(prepared: &Prepared, layout: &Layout) -> Peak {
    Peak {
        flops_per_s: prepared.device.is_cpu().then(|| super::doctor::measured_flops_per_s(prepared.precision)),
        flops_per_token: prepared.flops_per_token(layout),
    }
}

/// What a run is when it ends.
struct Trained {
    store: ParameterStore,
    step: u64,
    first_val_loss: Option<f64>,
}

/// Runs the loop; gives back the run's end and how it came to it.
fn train(
    prepared: &Prepared,
    folder: &RunFolder,
    parts: Parts,
    progress: &mut Progress,
    look_first: bool,
) -> Result<(Trained, Outcome)> {
    let config = &prepared.config;
    let Parts { store, optimizer, stream, validation, state, base } = parts;
    let layout = Arc::clone(store.layout());
    let (recompute, precision) = (config.train.recompute, prepared.precision);
    let mut engine = Engine::new(&prepared.model, &layout, &prepared.device, recompute, precision);
    engine.set_dropout(config.model.dropout);
    let mut run = Run {
        folder,
        engine,
        store,
        optimizer,
        optimizer_name: config.optimizer.name.clone(),
        peak_lr: prepared.optimizer.lr(),
        schedule: prepared.schedule,
        seed: config.seed,
        grad_clip: config.train.grad_clip,
        stream,
        validation,
        micro_batch: config.train.micro_batch,
        micro_batches: config.train.micro_batches(),
        step: state.as_ref().map_or(0, |state| state.step),
        tokens: state.as_ref().map_or(0, |state| state.tokens),
        pending: state.as_ref().and_then(|state| state.pending.clone()),
        steps: prepared.steps,
        eval_every: config.train.eval_every,
        checkpoint_every: config.train.checkpoint_every,
        sample_every: config.train.sample_every,
        keep_last: config.train.keep_last,
        base,
        keep_best: config.train.keep_best,
        best: state.as_ref().and_then(|state| state.best),
        events: if config.train.tensorboard { Events::TensorBoard } else { Events::None },
        interrupt: Interrupt::install()?,
    };
    let interrupt = run.interrupt.clone();
    let mut examiner = prepared.exam.as_ref().zip(prepared.tokenizer.as_ref()).map(|(exam, tokenizer)| {
        let interrupt = interrupt.clone();
        move |store: &ParameterStore| exam.take(&prepared.model, tokenizer, store, &interrupt)
    });
    let mut hooks = Hooks {
        sampler: &mut |store, step| sample(prepared, store, step),
        examiner: examiner.as_mut().map(|examiner| examiner as &mut Examiner),
    };
    let first_val_loss = if look_first { run.look_first(progress, &mut hooks)? } else { None };
    let outcome = run.train(progress, &mut hooks)?;
    Ok((Trained { store: run.store, step: run.step, first_val_loss }, outcome))
}

/// How many tokens a sample during training has.
const SAMPLE_TOKENS: usize = 64;

/// A greedy sample of the model as it is.
fn sample(prepared: &Prepared, store: &ParameterStore, step: u64) -> Result<Option<Sample>> {
    let Some(tokenizer) = &prepared.tokenizer else { return Ok(None) };
    let prompt = prepared.config.train.sample_prompt.as_deref().unwrap_or("");
    let mut ids = vec![tokenizer.begin_of_text()];
    ids.extend(tokenizer.encode(prompt)?);
    let prompts = [ids];
    let mut model = Decoder::new(&prepared.model, store.layout());
    let limits =
        Limits { max_new_tokens: SAMPLE_TOKENS, end_of_text: &[tokenizer.end_of_text(), tokenizer.begin_of_text()] };
    let mut sampler = crate::generate::Sampler::new(SamplingOptions::GREEDY, prepared.model.vocab_size(), 0)?;
    let completions = store.read_on_cpu(|weights| {
        let on_token = &mut |_, _| Ok(crate::generate::Flow::Continue);
        crate::generate::complete(&mut model, weights, &prompts, limits, &mut sampler, on_token)
    })??;
    let mut stream = TextStream::after(tokenizer.tokenizer(), SpecialTokens::Show, &prompts[0])?;
    let mut text = completions[0].ids.iter().map(|&id| stream.push(id)).collect::<Result<String, _>>()?;
    text += &stream.finish()?;
    Ok(Some(Sample { step, prompt: prompt.to_owned(), text }))
}

/// What a run's end tells besides its last record.
#[derive(Default)]
struct Summary {
    /// The validation loss before the first step.
    first_val_loss: Option<f64>,
    /// The quickstart's examinations before and after.
    before: Option<quickstart::Report>,
    report: Option<quickstart::Report>,
}

/// Says where the results are.
fn finish(options: &Options, path: &Path, step: u64, summary: Summary) -> Result<Ending> {
    let last = crate::train::read_metrics(path)?.into_iter().next_back();
    if options.json {
        let mut object = json!({
            "run": path, "step": step,
            "loss": last.as_ref().map(|record| record.loss),
            "val_loss": last.as_ref().and_then(|record| record.val_loss),
        });
        if let Some(exact_match) = last.as_ref().and_then(|record| record.exact_match) {
            object["exact_match"] = json!(exact_match);
        }
        if let Some(loss) = summary.first_val_loss {
            object["first_val_loss"] = json!(loss);
        }
        if let Some(before) = &summary.before {
            object["exact_match_before"] = json!(before.exact_match());
        }
        if let Some(report) = &summary.report {
            object["exact_match"] = json!(report.exact_match());
            object["held_out_problems"] = json!(report.problems);
        }
        print_json(&object)?;
    }
    if !options.quiet {
        eprintln!("run folder: {}", path.display());
    }
    Ok(Ending::Done)
}
