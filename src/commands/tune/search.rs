//! `vrtrain tune search`: Bayesian optimisation of config keys on the validation loss, stored, resumable, side by side.

use super::Subject;
use crate::commands::study_base::{Base, absolute, take_folder};
use crate::commands::workers::{End, Finish, Job, Watch, is_divergence, run_all};
use crate::commands::{Ending, print_json, warn};
use crate::config::ConfigError;
use crate::lab::image_problem::hex;
use crate::lab::space::{Dimension, Scale};
use crate::lab::statistics::short;
use crate::lab::study::{EarlyStop, FORMAT, Header, Status, Study, Trial};
use crate::train::checkpoint::replace_file;
use crate::train::{Interrupt, Record};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct SearchOptions {
    pub subject: Subject,
    /// `KEY=LOW..HIGH[:log|:integer]`; empty: the paper's ranges of the optimizer.
    pub ranges: Vec<String>,
    pub trials: usize,
    pub seed: u64,
    pub workers: usize,
    pub early_stop: EarlyStop,
    pub out: PathBuf,
    pub json: bool,
}

/// The study's file in its folder.
const STUDY: &str = "study.jsonl";

/// Ranges that the paper searches (its widest), and the like for optimizers that it does not have.
fn default_ranges(optimizer: &str) -> Vec<String> {
    let lr = match optimizer {
        "lion" | "sophiag" => "optimizer.lr=1e-6..1e-2:log",
        "sgd" => "optimizer.lr=1e-4..3:log",
        "muon" => "optimizer.lr=1e-4..0.3:log",
        _ => "optimizer.lr=1e-5..0.1:log",
    };
    let mut ranges = vec![lr.to_owned()];
    if optimizer == "vradam" {
        ranges.extend(["optimizer.beta3=0.1..5".to_owned(), "optimizer.alpha1=3..30:integer".to_owned()]);
    }
    ranges
}

/// Makes the trials that are missing and says which was best.
pub fn search(options: &SearchOptions) -> Result<Ending> {
    let base = options.subject.base()?;
    let header = header(options, &base)?;
    let (out, interrupt) = (absolute(&options.out), Interrupt::install()?);
    let _folder = take_folder(&out, STUDY, "study")?;
    let mut study = Study::open(&out.join(STUDY), header)?;
    let runs = out.join("runs");
    std::fs::create_dir_all(&runs).with_context(|| format!("cannot create {}", runs.display()))?;
    let config = out.join("base.toml");
    base.write(&config)?;
    match study.trials.len() {
        0 => {}
        there if there > options.trials => {
            eprintln!("the study has {there} trials already: --trials {} makes no more", options.trials);
        }
        there => eprintln!("{there} of {} trials are there already", options.trials),
    }
    while study.trials.len() < options.trials {
        let begin = study.trials.len();
        // A killed study may have ended inside a round: the rest of it is made now.
        let round = study.round(begin, options.trials);
        if make_round(options, &base, &config, &runs, &mut study, round, &interrupt)? == Finish::Interrupted {
            eprintln!("interrupted: the same command goes on where the study was left");
            return Ok(Ending::Interrupted);
        }
        // Divergence is a finding, but a study of nothing else is none.
        let enough = study.header.startup.max(4);
        if study.trials.len() >= enough && study.trials.iter().all(|trial| trial.status == Status::Failed) {
            let why = study.trials[0].error.clone().unwrap_or_default();
            bail!("none of the first {} trials has a loss; the first says: {why}", study.trials.len());
        }
    }
    conclude(options, &out, &study)
}

/// Checks the space and writes down what makes this study this one.
fn header(options: &SearchOptions, base: &Base) -> Result<Header> {
    let optimizer = base.optimizer().context("the config has no optimizer")?;
    if options.trials == 0 || options.workers == 0 {
        return Err(ConfigError::flag("--trials", "trials and workers are whole numbers from 1").into());
    }
    let mut warnings = base.check(&[])?.warnings;
    let ranges = if options.ranges.is_empty() { default_ranges(&optimizer) } else { options.ranges.clone() };
    let refuse = |text: &str, why: String| anyhow::Error::from(ConfigError::flag(&format!("--range {text}"), why));
    let mut space: Vec<Dimension> = Vec::new();
    let mut values = Vec::new();
    for text in &ranges {
        let dimension = Dimension::parse(text).map_err(|why| refuse(text, why))?;
        if dimension.key == "seed" {
            let why = "a seed is not a thing to tune: compare takes several seeds with --seeds";
            return Err(refuse(text, why.to_owned()));
        }
        if space.iter().any(|other| other.key == dimension.key) {
            return Err(refuse(text, format!("{} has a range already", dimension.key)));
        }
        let value = base.number(&dimension.key).or_else(|| default_of(&optimizer, &dimension.key));
        let Some(value) = value else {
            let why =
                format!("the config gives {} no number: name a numeric key, or set it with --set first", dimension.key);
            return Err(refuse(text, why));
        };
        if !dimension.contains(value) {
            let why = format!(
                "the range leaves out the config's own {} = {value:?}, with which a search begins: widen it, or --set \
                 {}=... inside it",
                dimension.key, dimension.key
            );
            return Err(refuse(text, why));
        }
        if dimension.scale == Scale::Integer && value.fract() != 0.0 {
            return Err(refuse(text, format!("the config's own {} = {value:?} is no integer", dimension.key)));
        }
        // Both ends must be legal before the first trial begins.
        let check = |end| {
            let assignment = format!("{}={}", dimension.key, dimension.toml(end));
            base.check(std::slice::from_ref(&assignment)).map_err(|error| refuse(text, format!("{error:#}")))
        };
        let (low, high) = (check(dimension.low)?.warnings, check(dimension.high)?.warnings);
        // A range may well have an end where another key is idle; what is idle at both is searched in vain.
        if !low.is_empty() && !high.is_empty() {
            warnings.extend(low);
        }
        space.push(dimension);
        values.push(value);
    }
    ensure!(!space.is_empty(), "there is nothing to search");
    warnings.sort();
    warnings.dedup();
    warn(&warnings);
    let startup = 2 + 2 * space.len();
    Ok(Header {
        format: FORMAT,
        optimizer,
        space,
        base: values,
        config_sha256: hex(&Sha256::digest(base.text.as_bytes())),
        seed: options.seed,
        startup,
        round: options.workers,
        early_stop: options.early_stop,
    })
}

/// The default of an optimizer's key that a resolved config leaves out.
fn default_of(optimizer: &str, key: &str) -> Option<f64> {
    let own = key.strip_prefix("optimizer.")?;
    match crate::optim::OptimizerConfig::keys(optimizer)?.into_iter().find(|(name, _)| *name == own)? {
        (_, crate::optim::Value::Number(number)) => Some(number),
        _ => None,
    }
}

/// (step, validation loss) as far as a run has come.
fn course(run: &Path) -> Vec<(u64, f64)> {
    // A run that writes at this moment has a line without an end.
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let records = text.lines().filter_map(|line| serde_json::from_str::<Record>(line).ok());
    records.filter_map(|record| Some((record.step, record.val_loss?))).collect()
}

/// Makes the trials of a round side by side; appends them in order.
fn make_round(
    options: &SearchOptions,
    base: &Base,
    config: &Path,
    runs: &Path,
    study: &mut Study,
    round: std::ops::Range<usize>,
    interrupt: &Interrupt,
) -> Result<Finish> {
    let values: Vec<Vec<f64>> = round.clone().map(|trial| study.values(trial)).collect();
    let folder = |trial: usize| runs.join(format!("trial-{trial:04}"));
    let job = |(trial, values): (usize, &Vec<f64>)| -> Job {
        let pairs = study.header.space.iter().zip(values);
        let assignments: Vec<String> = pairs.map(|(d, value)| format!("{}={}", d.key, d.toml(*value))).collect();
        base.job(&format!("trial {trial}"), config, &folder(trial), &assignments)
    };
    let jobs: Vec<Job> = round.clone().zip(&values).map(job).collect();
    let mut ends: Vec<Option<End>> = vec![None; jobs.len()];
    // A killed worker gets one more chance; its run goes on from its checkpoint.
    for attempt in 0..2 {
        let missing: Vec<usize> =
            (0..jobs.len()).filter(|&index| matches!(ends[index], None | Some(End::Killed(_)))).collect();
        if missing.is_empty() {
            break;
        }
        let to_do: Vec<Job> = missing.iter().map(|&index| jobs[index].clone()).collect();
        let begin = study.round_begin(round.start);
        let mut watch = |index: usize| {
            let course = course(&folder(round.start + missing[index]));
            if study.stops_at(begin, &course).is_some() { Watch::Stop } else { Watch::Continue }
        };
        let mut ended = |index: usize, end: End| -> Result<()> {
            match (&end, attempt) {
                (End::Refused(why), _) => return Err(ConfigError::flag(&to_do[index].label, why.clone()).into()),
                // Only divergence tells of the values; a full disk in the study would mislead the search for good.
                (End::Failed(why), _) if !is_divergence(why) => bail!(
                    "{} failed: {why} (its whole output: {}); the same command goes on where the study was left",
                    to_do[index].label,
                    to_do[index].log.display()
                ),
                (End::Killed(how), 1) => bail!(
                    "{} was killed twice ({how}): perhaps memory ran out, try fewer --workers; the same command goes on \
                     where the study was left",
                    to_do[index].label
                ),
                _ => {}
            }
            ends[missing[index]] = Some(end);
            Ok(())
        };
        if run_all(&to_do, options.workers, interrupt, &mut watch, &mut ended)? == Finish::Interrupted {
            return Ok(Finish::Interrupted);
        }
    }
    let begin = study.round_begin(round.start);
    for ((trial, values), end) in round.zip(values).zip(ends) {
        let mut course = course(&folder(trial));
        // Where the rule stops a trial does not depend on how soon the process heard of it.
        let stop = study.stops_at(begin, &course);
        if let Some(stop) = stop {
            course.truncate(stop + 1);
        }
        let last = course.last().map(|(_, loss)| *loss);
        let (status, objective, error) = match end {
            _ if stop.is_some() => (Status::Stopped, last, None),
            Some(End::Failed(why)) => (Status::Failed, None, Some(why)),
            Some(End::Done) if last.is_some() => (Status::Finished, last, None),
            _ => bail!("trial {trial} gave no validation loss: set train.eval_every and data.validation"),
        };
        let done = Trial { trial, values, status, objective, course, error };
        eprintln!("{}", line(&study.header, &done));
        study.push(done)?;
    }
    Ok(Finish::All)
}

/// A trial as a line.
fn line(header: &Header, trial: &Trial) -> String {
    let pairs = header.space.iter().zip(&trial.values);
    let values: Vec<String> = pairs.map(|(d, value)| format!("{} {value:.4e}", d.key)).collect();
    let objective = match (trial.objective, trial.status) {
        (Some(loss), Status::Stopped) => {
            format!("{} when stopped at step {}", short(loss), trial.course.last().map_or(0, |c| c.0))
        }
        (Some(loss), _) => short(loss),
        (None, _) => trial.error.clone().unwrap_or_else(|| "failed".into()),
    };
    format!("trial {} | {} | {objective}", trial.trial, values.join(", "))
}

/// Writes `best.toml` for `compare --tuned`, and shows the best trial.
fn conclude(options: &SearchOptions, out: &Path, study: &Study) -> Result<Ending> {
    let best = study.best().context("no trial ran to its end with a loss")?;
    let header = &study.header;
    let pairs = || header.space.iter().zip(&best.values);
    let lines: Vec<String> = pairs().map(|(d, value)| format!("\"{}\" = {}", d.key, d.toml(*value))).collect();
    let text = format!("[{}]\n{}\n", header.optimizer, lines.join("\n"));
    replace_file(&out.join("best.toml"), text.as_bytes())?;
    let count = |status| study.trials.iter().filter(|trial| trial.status == status).count();
    if options.json {
        let values: Value =
            pairs().map(|(d, value)| (d.key.clone(), json!(value))).collect::<serde_json::Map<_, _>>().into();
        print_json(&json!({
            "optimizer": header.optimizer, "trial": best.trial, "objective": best.objective, "values": values,
            "trials": study.trials.len(), "finished": count(Status::Finished), "stopped": count(Status::Stopped),
            "failed": count(Status::Failed), "best": out.join("best.toml"),
        }))?;
        return Ok(Ending::Done);
    }
    println!(
        "{} trials of {}: {} finished, {} stopped early, {} diverged",
        study.trials.len(),
        header.optimizer,
        count(Status::Finished),
        count(Status::Stopped),
        count(Status::Failed)
    );
    println!("best: {}", line(header, best));
    println!("for compare: --tuned {}", out.join("best.toml").display());
    Ok(Ending::Done)
}
