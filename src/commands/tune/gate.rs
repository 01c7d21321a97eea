//! `vrtrain tune gate`: beta3 and alpha1 for a task, from the velocities of a short run.
//!
//! beta3 multiplies ||v||^2, whose size differs between tasks by orders of magnitude. The recommendation puts the typical
//! step at a gate of 1/2, where the penalty is neither idle nor all there is: beta3 = 1 / median(||v||^2) after the
//! warm-up. alpha1 lets the floor bind for the largest twentieth of the steps only: beta3 times their ||v||^2.

use super::one_run::{OneRun, interrupted, refuse_own_keys};
use super::{Subject, run_one};
use crate::commands::study_base::Base;
use crate::commands::workers::End;
use crate::commands::{Ending, print_json, warn};
use crate::config::ConfigError;
use crate::lab::statistics::{median, quantile};
use crate::optim::{OptimizerConfig, Value, gate as gate_of};
use crate::train::{Interrupt, read_metrics};
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::path::PathBuf;

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct GateOptions {
    pub subject: Subject,
    pub steps: u64,
    pub out: PathBuf,
    pub json: bool,
}

/// What the command sets itself, and how it is told.
const OWN_KEYS: &[(&str, &str)] = &[
    ("train.steps", REAL_LENGTH),
    ("train.tokens", REAL_LENGTH),
    ("train.epochs", REAL_LENGTH),
    ("train.eval_every", "it reads the velocities and never validates"),
    ("train.checkpoint_every", "a checkpoint is kept where the run is interrupted and at its end"),
];
const REAL_LENGTH: &str = "the short run's length is --steps, the real one's, over which its schedule goes, \
                           schedule.steps";

/// Runs and recommends.
pub fn gate(options: &GateOptions) -> Result<Ending> {
    if options.steps < 10 {
        return Err(ConfigError::flag("--steps", "it needs 10 steps or more").into());
    }
    refuse_own_keys(&options.subject.assignments, OWN_KEYS)?;
    let base = options.subject.base()?;
    let is_on = check_gate(&base)?;
    let mut assignments =
        vec![format!("train.steps={}", options.steps), "train.eval_every=0".into(), "train.checkpoint_every=0".into()];
    // The short run is the beginning of the real one: its schedule stays.
    if let Some(steps) = steps_of_the_schedule(&base)? {
        assignments.push(format!("schedule.steps={steps:.0}"));
    }
    warn(&base.check(&assignments)?.warnings);
    let interrupt = Interrupt::install()?;
    let study = OneRun::open(&options.out, "tune gate", &base, &assignments)?;
    match run_one(&study.job, &interrupt)? {
        None => return Ok(interrupted()),
        Some(End::Failed(why)) => return Err(study.failure(&why)),
        Some(_) => {}
    }
    let warmup = base.number("schedule.warmup_steps").unwrap_or(0.0) as u64;
    let records = read_metrics(&study.job.run)?;
    let skip = warmup.min(options.steps / 2) as usize;
    let squares: Vec<f64> = records.iter().skip(skip).map(|record| record.velocity_sq).collect();
    let typical = median(&squares).context("the run made no step")?;
    let large = quantile(&squares, 0.95).unwrap_or(typical);
    if typical <= 0.0 {
        bail!("the velocity is 0 throughout: nothing is learned in this run");
    }
    let beta3 = 1.0 / typical;
    let alpha1 = (beta3 * large).ceil().max(1.0);
    let places = [0.05, 0.25, 0.5, 0.75, 0.95];
    let rows: Vec<(f64, f64, f64)> = places
        .iter()
        .filter_map(|&q| Some((q, quantile(&squares, q)?)))
        .map(|(q, square)| (q, square, gate_of(beta3, alpha1, square)))
        .collect();
    let quantiles = rows.iter().map(|(q, square, gate)| json!({"quantile": q, "value": square, "gate": gate}));
    let result = json!({
        "beta3": beta3, "alpha1": alpha1, "steps": records.len(), "skipped": skip,
        "velocity_sq": quantiles.collect::<Vec<_>>(),
    });
    study.finish(&result)?;
    if options.json {
        print_json(&result)?;
        return Ok(Ending::Done);
    }
    println!("||v||^2 over steps {}..{} of {}:", skip + 1, records.len(), base.optimizer().unwrap_or_default());
    println!("  {:>8}  {:>12}  {:>24}", "quantile", "||v||^2", "gate as recommended");
    rows.iter().for_each(|(q, square, gate)| println!("  {q:>8}  {square:>12.4e}  {gate:>24.3}"));
    println!("recommended: optimizer.beta3 = {beta3:.4} (gate 1/2 at the median), optimizer.alpha1 = {alpha1}");
    if !is_on {
        println!("the gate was off in this run: they take effect with optimizer.gate = true, which slows the steps");
    }
    println!("as a range to search: --range optimizer.beta3={:.3e}..{:.3e}:log", beta3 / 10.0, beta3 * 10.0);
    Ok(Ending::Done)
}

/// Refuses a gate that measures something else than ||v||^2 of all parameters, which is what runs write down. Otherwise:
/// whether the gate is on.
fn check_gate(base: &Base) -> Result<bool> {
    let table: toml::Table = base.text.parse().context("the resolved config does not read back")?;
    let key = |name: &str| table.get("optimizer")?.get(name).cloned();
    let word = |name: &str| key(name).and_then(|value| value.as_str().map(str::to_owned));
    let refuse = |name: &str, given: String, sums: &str| {
        let message = format!(
            "beta3 is recommended from ||v||^2 of all parameters, and a gate with {name} = {given} sums {sums}: \
             leave the key out, or find beta3 by `tune search`"
        );
        Err(ConfigError::flag(&format!("optimizer.{name}"), message).into())
    };
    if let Some(source) = word("gate_source").filter(|word| word != "velocity") {
        return refuse("gate_source", format!("{source:?}"), "the gradient's squares");
    }
    if let Some(scope) = word("gate_scope").filter(|word| word != "global") {
        return refuse("gate_scope", format!("{scope:?}"), "each group of parameters by itself");
    }
    if let Some(power) = base.number("optimizer.gate_power").filter(|power| *power != 2.0) {
        return refuse("gate_power", power.to_string(), "|v| to that power");
    }
    let own = base.optimizer().and_then(|name| OptimizerConfig::keys(&name)).unwrap_or_default();
    let default = own.contains(&("gate", Value::Bool(true)));
    Ok(key("gate").and_then(|value| value.as_bool()).unwrap_or(default))
}

/// The steps that the real run's schedule goes over; `None` where it is constant and its length tells nothing.
fn steps_of_the_schedule(base: &Base) -> Result<Option<f64>, ConfigError> {
    if let Some(steps) = base.number("schedule.steps").or_else(|| base.number("train.steps")) {
        return Ok(Some(steps));
    }
    if let Some((tokens, step)) = base.number("train.tokens").zip(base.number("train.tokens_per_step")) {
        return Ok(Some((tokens / step).ceil()));
    }
    let schedule = base.text.parse::<toml::Table>().ok().and_then(|table| table.get("schedule")?.get("name").cloned());
    if schedule.is_some_and(|name| name.as_str() == Some("constant")) {
        return Ok(None);
    }
    let message = "the short run is the beginning of the real one and has its schedule, but how many steps \
                   `train.epochs` come to is not known before the data are read: set schedule.steps (or give the config \
                   train.steps)";
    Err(ConfigError::flag("train.epochs", message))
}
