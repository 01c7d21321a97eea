//! `vrtrain compare`: several optimizers, or whole configs, from the same weights over the same batches, several seeds.

use super::study_base::{Base, absolute, beside, keys_of, refuse_seed, take_folder};
use super::workers::{End, Finish, Job, Watch, is_divergence, run_all};
use super::{Ending, print_json, warn};
use crate::config::{ConfigError, Settings};
use crate::lab::comparison::{Comparison, Outcome, RunResult, differing, is_of_data};
use crate::optim::OptimizerConfig;
use crate::train::checkpoint::{read_state, replace_file};
use crate::train::{Interrupt, read_metrics};
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub task: Option<String>,
    pub configs: Vec<PathBuf>,
    pub assignments: Vec<String>,
    pub optimizers: Vec<String>,
    /// `OPTIMIZER:KEY=VALUE`
    pub own_assignments: Vec<String>,
    /// Files that `tune` wrote.
    pub tuned: Vec<PathBuf>,
    pub seeds: Vec<u64>,
    pub baseline: Option<String>,
    pub workers: usize,
    pub out: PathBuf,
    pub json: bool,
}

/// One side of the comparison.
struct Entrant {
    label: String,
    base: Base,
    assignments: Vec<String>,
}

/// What a folder compares, so that only the same comparison goes on in it.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Plan {
    format: u32,
    seeds: Vec<u64>,
    /// Label, resolved config, assignments.
    entrants: Vec<(String, String, Vec<String>)>,
}

/// The plan's file in its folder, and the format that this version writes.
const PLAN: &str = "comparison.json";
const FORMAT: u32 = 1;

/// How a marker begins, or all of it where the run finished.
const FINISHED: &str = "finished";
const DIVERGED: &str = "diverged: ";

/// What is said of a seed among the settings.
const BY_SEEDS: &str = "seeds are given by --seeds";

/// Runs what is missing and says what the runs say.
pub fn run(options: &Options) -> Result<Ending> {
    let entrants = entrants(options)?;
    let labels: Vec<String> = entrants.iter().map(|entrant| entrant.label.clone()).collect();
    let baseline = baseline(options, &labels)?;
    let (out, interrupt) = (absolute(&options.out), Interrupt::install()?);
    let _folder = take_folder(&out, PLAN, "comparison")?;
    check_plan(&out, &entrants, &options.seeds)?;
    let mut jobs: Vec<(usize, u64, PathBuf, Job)> = Vec::new();
    for &seed in &options.seeds {
        for (index, entrant) in entrants.iter().enumerate() {
            let config = out.join("configs").join(format!("{}.toml", entrant.label));
            entrant.base.write(&config)?;
            let name = format!("{}-seed-{seed}", entrant.label);
            let run = out.join("runs").join(&name);
            let mut assignments = entrant.assignments.clone();
            assignments.push(format!("seed={seed}"));
            let job = entrant.base.job(&name, &config, &run, &assignments);
            jobs.push((index, seed, run, job));
        }
    }
    let runs = out.join("runs");
    std::fs::create_dir_all(&runs).with_context(|| format!("cannot create {}", runs.display()))?;
    let waiting: Vec<&(usize, u64, PathBuf, Job)> =
        jobs.iter().filter(|(_, _, run, _)| !marker(run).exists()).collect();
    // What is there must be whole before hours go into the rest.
    for (entrant, seed, run, _) in jobs.iter().filter(|(_, _, run, _)| marker(run).exists()) {
        result(*entrant, *seed, run)?;
    }
    eprintln!("{} runs, {} of them to be made; {} side by side", jobs.len(), waiting.len(), options.workers);
    let to_do: Vec<Job> = waiting.iter().map(|(_, _, _, job)| job.clone()).collect();
    let mut ended = |index: usize, end: End| -> Result<()> {
        let (_, _, run, job) = waiting[index];
        let verdict = match end {
            End::Done => FINISHED.to_owned(),
            End::Failed(why) if is_divergence(&why) => format!("{DIVERGED}{why}"),
            End::Failed(why) | End::Refused(why) => {
                bail!("{} failed: {why} (its whole output: {})", job.label, job.log.display())
            }
            End::Killed(how) => bail!(
                "{} was killed ({how}): perhaps memory ran out; the same command goes on where the runs were left",
                job.label
            ),
            End::Stopped => bail!("{} was stopped", job.label),
        };
        eprintln!("{}: {verdict}", job.label);
        replace_file(&marker(run), verdict.as_bytes())
    };
    match run_all(&to_do, options.workers, &interrupt, &mut |_| Watch::Continue, &mut ended)? {
        Finish::Interrupted => {
            eprintln!("interrupted: the same command goes on where the runs were left");
            return Ok(Ending::Interrupted);
        }
        Finish::All => {}
    }
    let results =
        jobs.iter().map(|(entrant, seed, run, _)| result(*entrant, *seed, run)).collect::<Result<Vec<_>>>()?;
    conclude(options, &out, Comparison::new(labels, baseline, options.seeds.clone(), results))
}

/// The file beside a run's folder that says how it ended.
fn marker(run: &Path) -> PathBuf {
    beside(run, ".ended")
}

fn result(entrant: usize, seed: u64, run: &Path) -> Result<RunResult> {
    let path = marker(run);
    let again = || format!("delete {} and {} to make the run again", path.display(), run.display());
    let verdict = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let initial_hash = std::fs::read_to_string(run.join("initial.sha256")).ok().map(|hash| hash.trim().to_owned());
    if let Some(why) = verdict.strip_prefix(DIVERGED) {
        let outcome = Outcome::Diverged(why.to_owned());
        return Ok(RunResult { entrant, seed, outcome, initial_hash, data: BTreeMap::new() });
    }
    ensure!(verdict == FINISHED, "{}: it does not say how the run ended: {}", path.display(), again());
    let records = read_metrics(run).with_context(again)?;
    let metrics = run.join("metrics.jsonl");
    let whole = records.iter().map(|record| record.step).eq(1..=records.len() as u64);
    ensure!(whole, "{}: steps are missing in it: {}", metrics.display(), again());
    let settings = settings_of(run).with_context(again)?;
    if let Some(steps) = last_step(run, &settings).with_context(again)? {
        let found = records.len() as u64;
        ensure!(found == steps, "{}: it has {found} of {steps} steps: {}", metrics.display(), again());
    }
    let validated = records.last().is_some_and(|record| record.val_loss.is_some());
    ensure!(validated, "{}: its last record has no validation loss: {}", metrics.display(), again());
    let data = settings.into_iter().filter(|(key, _)| is_of_data(key)).collect();
    Ok(RunResult { entrant, seed, outcome: Outcome::Finished(records), initial_hash, data })
}

/// The resolved config of a run.
fn settings_of(run: &Path) -> Result<BTreeMap<String, String>> {
    let path = run.join("config.toml");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    keys_of(&text).with_context(|| format!("{} is torn", path.display()))
}

/// The step that a finished run ended with: its config says it, or else its checkpoint, which may have been deleted.
fn last_step(run: &Path, settings: &BTreeMap<String, String>) -> Result<Option<u64>> {
    if let Some(steps) = settings.get("train.steps") {
        return Ok(Some(steps.parse().context("train.steps in the run's config.toml")?));
    }
    let Ok(newest) = std::fs::read_to_string(run.join("latest")) else { return Ok(None) };
    let folder = run.join("checkpoints").join(newest.trim());
    if folder.exists() { Ok(Some(read_state(&folder)?.step)) } else { Ok(None) }
}

/// Writes and shows the results.
fn conclude(options: &Options, out: &Path, comparison: Comparison) -> Result<Ending> {
    let table = comparison.table();
    let json = comparison.json();
    replace_file(&out.join("results.json"), &serde_json::to_vec_pretty(&json)?)?;
    replace_file(&out.join("table.md"), format!("{table}\n").as_bytes())?;
    let title = options
        .task
        .clone()
        .unwrap_or_else(|| out.file_name().map_or_else(String::new, |n| n.to_string_lossy().into()));
    let mut pictures = Vec::new();
    if comparison.rows.iter().any(|row| row.loss.is_some()) {
        pictures.extend(comparison.curves(&title).write(&out.join("curves"))?);
    }
    if comparison.rows.iter().any(|row| row.difference.is_some()) {
        pictures
            .extend(comparison.differences(&title).write_beside(&out.join("differences"), &comparison.curves(&title))?);
    }
    if options.json {
        print_json(&json)?;
    } else {
        println!("{table}");
    }
    pictures.iter().for_each(|path| eprintln!("drawn: {}", path.display()));
    if !comparison.unpaired.is_empty() {
        let list = comparison.unpaired.join("\n  ");
        eprintln!("these runs are no pairs, and their differences compare more than optimizers:\n  {list}");
        // Optimizers of one config must be pairs; whole configs may differ in anything.
        ensure!(options.configs.len() > 1, "the runs of one seed are not pairs");
    }
    Ok(Ending::Done)
}

/// Who is compared: optimizers of one config, or configs.
fn entrants(options: &Options) -> Result<Vec<Entrant>> {
    check_seeds(options)?;
    let bases: Vec<Base> = match (&options.task, &options.configs[..]) {
        (Some(_), [_, ..]) => return Err(ConfigError::flag("--task", "it conflicts with --config: give one").into()),
        (Some(task), []) => vec![Base::preset(task, &options.assignments)?],
        (None, []) => return Err(ConfigError::flag("--config", "give a config, several configs, or --task").into()),
        (None, configs) => configs.iter().map(|path| Base::load(path, &options.assignments)).collect::<Result<_>>()?,
    };
    let mut entrants = match &bases[..] {
        [base] => optimizers_of(options, base)?,
        several => {
            if !options.optimizers.is_empty() {
                return Err(ConfigError::flag("--optimizers", "it takes one --config, and several are given").into());
            }
            if !options.tuned.is_empty() {
                let message = "it gives keys to the optimizers of one --config, and several are given";
                return Err(ConfigError::flag("--tuned", message).into());
            }
            let whole = |base: &Base| Entrant { label: base.name.clone(), base: base.clone(), assignments: vec![] };
            several.iter().map(whole).collect()
        }
    };
    let repeated = entrants.iter().enumerate().find(|(i, e)| entrants[..*i].iter().any(|other| other.label == e.label));
    if let Some((_, entrant)) = repeated {
        let flag = if bases.len() > 1 { "--config" } else { "--optimizers" };
        return Err(ConfigError::flag(flag, format!("{:?} is given twice", entrant.label)).into());
    }
    for text in &options.own_assignments {
        let Some((label, assignment)) = text.split_once(':') else {
            return Err(
                ConfigError::flag("--set-for", format!("{text:?}: expected OPTIMIZER:SECTION.KEY=VALUE")).into()
            );
        };
        let assignment = assignment.to_owned();
        refuse_seed("--set-for", std::slice::from_ref(&assignment), BY_SEEDS)?;
        match entrants.iter_mut().find(|entrant| entrant.label == label) {
            Some(entrant) => entrant.assignments.push(assignment),
            None => {
                return Err(ConfigError::flag("--set-for", format!("{label:?} is not compared here")).into());
            }
        }
    }
    let mut resolved = Vec::new();
    for entrant in &entrants {
        let base =
            entrant.base.check(&entrant.assignments).with_context(|| format!("the settings of {}", entrant.label))?;
        warn(&base.warnings.iter().map(|warning| format!("{}: {warning}", entrant.label)).collect::<Vec<_>>());
        resolved.push((&entrant.label, base));
    }
    if bases.len() == 1 {
        check_alike(&resolved)?;
    }
    Ok(entrants)
}

fn check_seeds(options: &Options) -> Result<(), ConfigError> {
    if options.workers == 0 {
        return Err(ConfigError::flag("--workers", "it takes a whole number from 1"));
    }
    refuse_seed("--set", &options.assignments, BY_SEEDS)?;
    if options.seeds.is_empty() {
        return Err(ConfigError::flag("--seeds", "give at least one seed"));
    }
    for (index, seed) in options.seeds.iter().enumerate() {
        if options.seeds[..index].contains(seed) {
            return Err(ConfigError::flag("--seeds", format!("the seed {seed} is given twice")));
        }
        // A config's whole numbers end there, the key `seed` among them.
        if i64::try_from(*seed).is_err() {
            return Err(ConfigError::flag("--seeds", format!("the seed {seed} is too large: at most {}", i64::MAX)));
        }
    }
    Ok(())
}

/// The optimizers of one config, with what was tuned for them.
fn optimizers_of(options: &Options, base: &Base) -> Result<Vec<Entrant>> {
    if options.optimizers.len() < 2 {
        let message = "a comparison needs two or more, e.g. --optimizers vradam,adamw (or several --config)";
        return Err(ConfigError::flag("--optimizers", message).into());
    }
    for assignment in &options.assignments {
        let mut settings = Settings::default();
        settings.set(assignment)?;
        if settings.is_set("optimizer.name") {
            let message = format!("{assignment}: the optimizers are given by --optimizers");
            return Err(ConfigError::flag("--set", message).into());
        }
    }
    let mut tuned = tuned(options)?;
    let mut entrants = Vec::new();
    for name in &options.optimizers {
        if !OptimizerConfig::names().contains(&name.as_str()) {
            let names = OptimizerConfig::names().join(", ");
            let message = format!("no optimizer is named {name:?}; it is one of {names}");
            return Err(ConfigError::flag("--optimizers", message).into());
        }
        let assignments = tuned.remove(name).unwrap_or_default();
        entrants.push(Entrant { label: name.clone(), base: base.with_optimizer(name)?, assignments });
    }
    Ok(entrants)
}

/// The assignments for each optimizer that the files of `tune` give. Nothing in them may go unused.
fn tuned(options: &Options) -> Result<BTreeMap<String, Vec<String>>> {
    let mut all = BTreeMap::new();
    for path in &options.tuned {
        let refuse = |why: String| ConfigError::flag("--tuned", format!("{}: {why}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| refuse(format!("cannot read it: {error}")))?;
        let table: toml::Table = text.parse().map_err(|error| refuse(format!("not TOML: {error}")))?;
        if table.is_empty() {
            return Err(refuse("it holds nothing: expected the best.toml of a search".into()).into());
        }
        for (optimizer, keys) in table {
            let keys = match keys {
                toml::Value::Table(keys) if !keys.is_empty() => keys,
                _ => return Err(refuse(format!("{optimizer} is no section with keys")).into()),
            };
            if !options.optimizers.contains(&optimizer) {
                let compared = options.optimizers.join(", ");
                return Err(refuse(format!("[{optimizer}] is not compared here, but {compared}")).into());
            }
            let assignments: Vec<String> = keys.into_iter().map(|(key, value)| format!("{key}={value}")).collect();
            refuse_seed(&format!("--tuned {}", path.display()), &assignments, BY_SEEDS)?;
            if all.insert(optimizer.clone(), assignments).is_some() {
                return Err(refuse(format!("another file gives keys of {optimizer} already")).into());
            }
        }
    }
    Ok(all)
}

/// Refuses optimizers of one config that would be no pairs, or not what they are called.
fn check_alike(resolved: &[(&String, Base)]) -> Result<()> {
    let length = |key: &str| ["train.steps", "train.tokens", "train.epochs"].contains(&key);
    let mut first: Option<(&String, BTreeMap<String, String>)> = None;
    for (label, base) in resolved {
        if base.optimizer().as_ref() != Some(label) {
            let message = "they set another optimizer.name: the optimizers are given by --optimizers";
            return Err(ConfigError::flag(&format!("the settings of {label}"), message).into());
        }
        let keys = keys_of(&base.text)?.into_iter().filter(|(key, _)| is_of_data(key) || length(key)).collect();
        let Some((other, alike)) = &first else {
            first = Some((label, keys));
            continue;
        };
        if let Some((key, theirs, mine)) = differing(alike, &keys).next() {
            let message = format!(
                "{key} is {mine}, and {theirs} for {other}: the optimizers of one config are compared over the same \
                 steps and data; give whole configs (several --config) to compare more than optimizers"
            );
            return Err(ConfigError::flag(&format!("the settings of {label}"), message).into());
        }
    }
    Ok(())
}

fn baseline(options: &Options, labels: &[String]) -> Result<usize, ConfigError> {
    match &options.baseline {
        None => Ok(labels.iter().position(|label| label == "adamw").unwrap_or(0)),
        Some(name) => labels.iter().position(|label| label == name).ok_or_else(|| {
            ConfigError::flag(
                "--baseline",
                format!("{name:?} is not compared here; it is one of {}", labels.join(", ")),
            )
        }),
    }
}

/// Writes the plan into a new folder, or checks that the folder's is this one.
fn check_plan(out: &Path, entrants: &[Entrant], seeds: &[u64]) -> Result<()> {
    let list = entrants.iter().map(|e| (e.label.clone(), e.base.text.clone(), e.assignments.clone())).collect();
    let plan = Plan { format: FORMAT, seeds: seeds.to_vec(), entrants: list };
    let path = out.join(PLAN);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return replace_file(&path, &serde_json::to_vec_pretty(&plan)?);
        }
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let torn = || format!("{} is torn", path.display());
    let found: serde_json::Value = serde_json::from_str(&text).with_context(torn)?;
    if found["format"] != FORMAT {
        let (path, format) = (path.display(), &found["format"]);
        bail!("{path}: its format is {format}, and this vrtrain knows {FORMAT}: give another folder");
    }
    let found: Plan = serde_json::from_value(found).with_context(torn)?;
    // More seeds and more entrants may join; what is there must not change.
    for (label, config, assignments) in &found.entrants {
        let now = plan.entrants.iter().find(|(other, ..)| other == label);
        let differs = now.is_some_and(|(_, text, set)| text != config || set != assignments);
        if differs {
            let message = format!(
                "{} compares another {label}: its config or settings differ from those in {}; give another folder",
                out.display(),
                path.display()
            );
            return Err(ConfigError::flag("--out", message).into());
        }
    }
    let mut merged = plan;
    let known: Vec<String> = merged.entrants.iter().map(|(label, ..)| label.clone()).collect();
    merged.entrants.extend(found.entrants.into_iter().filter(|(label, ..)| !known.contains(label)));
    replace_file(&path, &serde_json::to_vec_pretty(&merged)?)
}
