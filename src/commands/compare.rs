//! `vrtrain compare`: several optimizers, or whole configs, from the same weights over the same batches, several seeds.

use super::study_base::{Base, absolute};
use super::workers::{End, Finish, Job, Watch, is_divergence, run_all};
use super::{Ending, print_json};
use crate::config::ConfigError;
use crate::lab::comparison::{Comparison, Outcome, RunResult};
use crate::optim::OptimizerConfig;
use crate::train::checkpoint::replace_file;
use crate::train::{Interrupt, read_metrics};
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
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

/// Runs what is missing and says what the runs say.
pub fn run(options: &Options) -> Result<Ending> {
    let entrants = entrants(options)?;
    let labels: Vec<String> = entrants.iter().map(|entrant| entrant.label.clone()).collect();
    let baseline = baseline(options, &labels)?;
    let (out, interrupt) = (absolute(&options.out), Interrupt::install()?);
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
    eprintln!("{} runs, {} of them to be made; {} side by side", jobs.len(), waiting.len(), options.workers);
    let to_do: Vec<Job> = waiting.iter().map(|(_, _, _, job)| job.clone()).collect();
    let mut ended = |index: usize, end: End| -> Result<()> {
        let (_, _, run, job) = waiting[index];
        let verdict = match end {
            End::Done => "finished".to_owned(),
            End::Failed(why) if is_divergence(&why) => format!("diverged: {why}"),
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
    run.with_extension("ended")
}

fn result(entrant: usize, seed: u64, run: &Path) -> Result<RunResult> {
    let path = marker(run);
    let verdict = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let initial_hash = std::fs::read_to_string(run.join("initial.sha256")).ok().map(|hash| hash.trim().to_owned());
    let outcome = match verdict.strip_prefix("diverged: ") {
        Some(why) => Outcome::Diverged(why.to_owned()),
        None => Outcome::Finished(read_metrics(run)?),
    };
    Ok(RunResult { entrant, seed, outcome, initial_hash })
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
        pictures.extend(comparison.differences(&title).write(&out.join("differences"))?);
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
    if options.workers == 0 {
        return Err(ConfigError::flag("--workers", "it takes a whole number from 1").into());
    }
    if options.seeds.is_empty() {
        return Err(ConfigError::flag("--seeds", "give at least one seed").into());
    }
    if let Some(seed) = options.seeds.iter().enumerate().find(|(i, s)| options.seeds[..*i].contains(s)).map(|(_, s)| s)
    {
        return Err(ConfigError::flag("--seeds", format!("the seed {seed} is given twice")).into());
    }
    let bases: Vec<Base> = match (&options.task, &options.configs[..]) {
        (Some(_), [_, ..]) => return Err(ConfigError::flag("--task", "it conflicts with --config: give one").into()),
        (Some(task), []) => vec![Base::preset(task, &options.assignments)?],
        (None, []) => return Err(ConfigError::flag("--config", "give a config, several configs, or --task").into()),
        (None, configs) => configs.iter().map(|path| Base::load(path, &options.assignments)).collect::<Result<_>>()?,
    };
    let tuned = tuned(&options.tuned)?;
    let mut entrants = Vec::new();
    match &bases[..] {
        [base] => {
            if options.optimizers.len() < 2 {
                let message = "a comparison needs two or more, e.g. --optimizers vradam,adamw (or several --config)";
                return Err(ConfigError::flag("--optimizers", message).into());
            }
            for name in &options.optimizers {
                if !OptimizerConfig::names().contains(&name.as_str()) {
                    let names = OptimizerConfig::names().join(", ");
                    return Err(ConfigError::flag(
                        "--optimizers",
                        format!("no optimizer is named {name:?}; it is one of {names}"),
                    )
                    .into());
                }
                let base = base.with_optimizer(name)?;
                let assignments = tuned.iter().filter(|(of, _)| of == name).map(|(_, set)| set.clone()).collect();
                entrants.push(Entrant { label: name.clone(), base, assignments });
            }
        }
        several => {
            if !options.optimizers.is_empty() {
                return Err(ConfigError::flag("--optimizers", "it takes one --config, and several are given").into());
            }
            entrants.extend(several.iter().map(|base| Entrant {
                label: base.name.clone(),
                base: base.clone(),
                assignments: vec![],
            }));
        }
    }
    for text in &options.own_assignments {
        let Some((label, assignment)) = text.split_once(':') else {
            return Err(
                ConfigError::flag("--set-for", format!("{text:?}: expected OPTIMIZER:SECTION.KEY=VALUE")).into()
            );
        };
        match entrants.iter_mut().find(|entrant| entrant.label == label) {
            Some(entrant) => entrant.assignments.push(assignment.to_owned()),
            None => {
                return Err(ConfigError::flag("--set-for", format!("{label:?} is not compared here")).into());
            }
        }
    }
    let repeated = entrants.iter().enumerate().find(|(i, e)| entrants[..*i].iter().any(|other| other.label == e.label));
    for entrant in &entrants {
        entrant.base.check(&entrant.assignments).with_context(|| format!("the settings of {}", entrant.label))?;
    }
    if let Some((_, entrant)) = repeated {
        return Err(ConfigError::flag("--optimizers", format!("{:?} is given twice", entrant.label)).into());
    }
    Ok(entrants)
}

/// (optimizer, assignment) of every file that `tune` wrote.
fn tuned(paths: &[PathBuf]) -> Result<Vec<(String, String)>> {
    let mut all = Vec::new();
    for path in paths {
        let refuse = |why: String| ConfigError::flag("--tuned", format!("{}: {why}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| refuse(format!("cannot read it: {error}")))?;
        let table: toml::Table = text.parse().map_err(|error| refuse(format!("not TOML: {error}")))?;
        for (optimizer, keys) in table {
            let toml::Value::Table(keys) = keys else {
                return Err(refuse(format!("{optimizer} is no section")).into());
            };
            all.extend(keys.into_iter().map(|(key, value)| (optimizer.clone(), format!("{key}={value}"))));
        }
    }
    Ok(all)
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
    let plan = Plan { format: 1, seeds: seeds.to_vec(), entrants: list };
    let path = out.join("comparison.json");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let occupied = std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some());
            if occupied {
                let message = format!("{} exists and holds no comparison: give another folder", out.display());
                return Err(ConfigError::flag("--out", message).into());
            }
            std::fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
            return replace_file(&path, &serde_json::to_vec_pretty(&plan)?);
        }
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let found: Plan = serde_json::from_str(&text).with_context(|| format!("{} is torn", path.display()))?;
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
