//! `vrtrain tune gate`: beta3 and alpha1 for a task, from the velocities of a short run.
//!
//! beta3 multiplies ||v||^2, whose size differs between tasks by orders of magnitude. The recommendation puts the typical
//! step at a gate of 1/2, where the penalty is neither idle nor all there is: beta3 = 1 / median(||v||^2) after the
//! warm-up. alpha1 lets the floor bind for the largest twentieth of the steps only: beta3 times their ||v||^2.

use super::{Subject, run_one};
use crate::commands::study_base::absolute;
use crate::commands::workers::End;
use crate::commands::{Ending, print_json};
use crate::config::ConfigError;
use crate::lab::statistics::{median, quantile};
use crate::optim::gate as gate_of;
use crate::train::{Interrupt, RunFolder, read_metrics};
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

/// Runs and recommends.
pub fn gate(options: &GateOptions) -> Result<Ending> {
    if options.steps < 10 {
        return Err(ConfigError::flag("--steps", "it needs 10 steps or more").into());
    }
    let base = options.subject.base()?;
    let (out, interrupt) = (absolute(&options.out), Interrupt::install()?);
    RunFolder::check_fresh(&out)?;
    let (config, run) = (out.join("base.toml"), out.join("run"));
    base.write(&config)?;
    let mut assignments =
        vec![format!("train.steps={}", options.steps), "train.eval_every=0".into(), "train.checkpoint_every=0".into()];
    // The short run is the beginning of the real one: its schedule stays.
    if let Some(steps) = base.number("schedule.steps").or_else(|| base.number("train.steps")) {
        assignments.push(format!("schedule.steps={steps:.0}"));
    }
    match run_one(&base.job("the short run", &config, &run, &assignments), &interrupt)? {
        None => return Ok(Ending::Interrupted),
        Some(End::Failed(why)) => bail!("the short run failed: {why}"),
        Some(_) => {}
    }
    let warmup = base.number("schedule.warmup_steps").unwrap_or(0.0) as u64;
    let records = read_metrics(&run)?;
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
    if options.json {
        print_json(&json!({
            "beta3": beta3, "alpha1": alpha1, "steps": records.len(), "skipped": skip,
            "velocity_sq": rows.iter().map(|(q, square, gate)| json!({"quantile": q, "value": square, "gate": gate})).collect::<Vec<_>>(),
        }))?;
        return Ok(Ending::Done);
    }
    println!("||v||^2 over steps {}..{} of {}:", skip + 1, records.len(), base.optimizer().unwrap_or_default());
    println!("  {:>8}  {:>12}  {:>24}", "quantile", "||v||^2", "gate as recommended");
    rows.iter().for_each(|(q, square, gate)| println!("  {q:>8}  {square:>12.4e}  {gate:>24.3}"));
    println!("recommended: optimizer.beta3 = {beta3:.4} (gate 1/2 at the median), optimizer.alpha1 = {alpha1}");
    println!("as a range to search: --range optimizer.beta3={:.3e}..{:.3e}:log", beta3 / 10.0, beta3 * 10.0);
    Ok(Ending::Done)
}
