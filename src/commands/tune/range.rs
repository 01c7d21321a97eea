//! `vrtrain tune lr`: the learning-rate range test (Smith, 2017): the rate climbs over one short run, the loss answers.

use super::one_run::{OneRun, interrupted, refuse_own_keys};
use super::{Subject, run_one};
use crate::commands::workers::{End, is_divergence};
use crate::commands::{Ending, print_json, warn};
use crate::config::ConfigError;
use crate::lab::plot::{Chart, Scale, Series, Stroke};
use crate::train::{Interrupt, Record, read_metrics};
use anyhow::{Result, bail};
use serde_json::json;
use std::path::PathBuf;

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct RangeOptions {
    pub subject: Subject,
    pub from: f64,
    pub to: f64,
    pub steps: u64,
    pub out: PathBuf,
    pub json: bool,
}

/// What the curve says.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Finding {
    /// Where the smoothed loss falls fastest.
    steepest: f64,
    /// Where it is least.
    least: f64,
    /// From here on it is far above its least, or the run ended in a NaN.
    diverges: Option<f64>,
}

/// What the test sets itself, and how it is told.
const OWN_KEYS: &[(&str, &str)] = &[
    ("optimizer.lr", "give the rates with --from and --to"),
    ("schedule.name", "the rate climbs from --from to --to over --steps"),
    ("schedule.warmup_steps", "the rate climbs from --from to --to over --steps"),
    ("schedule.min_lr_ratio", "give the rates with --from and --to"),
    ("schedule.decay_ratio", "the rate climbs from --from to --to over --steps"),
    ("schedule.steps", "give --steps"),
    ("train.steps", "give --steps"),
    ("train.tokens", "give --steps"),
    ("train.epochs", "give --steps"),
    ("train.eval_every", "it reads the training loss and never validates"),
    ("train.checkpoint_every", "a checkpoint is kept where the run is interrupted and at its end"),
];

/// Runs the test.
pub fn range(options: &RangeOptions) -> Result<Ending> {
    let RangeOptions { from, to, steps, .. } = *options;
    if !(from.is_finite() && from > 0.0 && to.is_finite() && to > from) {
        return Err(ConfigError::flag("--from", format!("the range {from}..{to} is empty or not above 0")).into());
    }
    if steps < 10 {
        return Err(ConfigError::flag("--steps", "a range test needs 10 steps or more").into());
    }
    refuse_own_keys(&options.subject.assignments, OWN_KEYS)?;
    let base = options.subject.base()?;
    let assignments = [
        "schedule.name=range_test".to_owned(),
        "schedule.warmup_steps=0".into(),
        format!("schedule.min_lr_ratio={:?}", from / to),
        format!("schedule.steps={steps}"),
        format!("optimizer.lr={to:?}"),
        format!("train.steps={steps}"),
        "train.eval_every=0".into(),
        "train.checkpoint_every=0".into(),
    ];
    warn(&base.check(&assignments)?.warnings);
    let interrupt = Interrupt::install()?;
    let study = OneRun::open(&options.out, "tune lr", &base, &assignments)?;
    let (out, run) = (&study.folder, &study.job.run);
    let diverged = match run_one(&study.job, &interrupt)? {
        None => return Ok(interrupted()),
        // Only divergence tells of the rate; a full disk tells nothing.
        Some(End::Failed(why)) if !is_divergence(&why) => return Err(study.failure(&why)),
        Some(End::Failed(_)) => true,
        Some(_) => false,
    };
    let records = if run.join("metrics.jsonl").exists() { read_metrics(run)? } else { Vec::new() };
    let Some(finding) = find(&records, diverged) else {
        bail!("the run ended after {} steps, too early to read a rate from: lower --from", records.len());
    };
    let curve = |value: &dyn Fn(usize, &Record) -> f64| {
        records.iter().enumerate().map(|(index, record)| (record.lr, value(index, record))).collect::<Vec<_>>()
    };
    let smooth = smoothed(&records);
    let line = |label: &str, points| Series { label: label.into(), points, stroke: Stroke::Line, band: Vec::new() };
    let chart = Chart {
        title: format!("Learning-rate range test: {}", base.optimizer().unwrap_or_default()),
        x_label: "learning rate".into(),
        y_label: "training loss".into(),
        x_scale: Scale::Log,
        y_scale: Scale::Log,
        series: vec![line("loss", curve(&|_, record| record.loss)), line("smoothed", curve(&|index, _| smooth[index]))],
    };
    let pictures = chart.write(&out.join("range"))?;
    let result = json!({
        "optimizer": base.optimizer(), "steps": records.len(), "from": from, "to": to,
        "steepest": finding.steepest, "least": finding.least, "diverges": finding.diverges, "pictures": pictures,
    });
    study.finish(&result)?;
    if options.json {
        print_json(&result)?;
        return Ok(Ending::Done);
    }
    println!("the loss falls fastest at {:.2e}, is least at {:.2e}", finding.steepest, finding.least);
    match finding.diverges {
        Some(rate) => println!("and leaves its least from {rate:.2e} on"),
        None => println!("and does not diverge up to {to:.2e}: a higher --to may show where it does"),
    }
    println!(
        "a rate to begin with: {:.2e}; a range to search: {:.0e}..{:.0e}",
        finding.steepest,
        finding.steepest / 10.0,
        { finding.least.max(finding.steepest) * 3.0 }
    );
    println!("drawn: {}", pictures[1].display());
    Ok(Ending::Done)
}

/// An exponential mean of the losses over about a tenth of the run, corrected for its start.
fn smoothed(records: &[Record]) -> Vec<f64> {
    let keep = 1.0 - (10.0 / records.len().max(1) as f64).min(0.5);
    let (mut mean, mut weight) = (0.0, 0.0);
    let next = |record: &Record| {
        mean = keep * mean + (1.0 - keep) * record.loss;
        weight = keep * weight + (1.0 - keep);
        mean / weight
    };
    records.iter().map(next).collect()
}

/// Reads the curve; `None` where it is too short.
fn find(records: &[Record], ended_in_nan: bool) -> Option<Finding> {
    let losses = smoothed(records);
    let count = losses.len();
    if count < 5 {
        return None;
    }
    let least = (0..count).min_by(|&a, &b| losses[a].total_cmp(&losses[b]))?;
    let rise = losses[0] - losses[least];
    // Above its least by half of what it had fallen, and for good.
    let high = |index: &usize| losses[*index..].iter().all(|loss| *loss > losses[least] + 0.5 * rise.max(1e-12));
    let last = records.last().map(|record| record.lr);
    let diverges =
        (least + 1..count).find(high).map(|index| records[index].lr).or(if ended_in_nan { last } else { None });
    // The slope over the logarithm of the rate, between neighbours a twentieth of the run apart.
    let apart = (count / 20).max(1);
    let slope = |index: usize| losses[index + apart] - losses[index];
    let end = least.max(apart + 1).min(count - apart);
    let steepest = (0..end).min_by(|&a, &b| slope(a).total_cmp(&slope(b)))?;
    Some(Finding { steepest: records[steepest + apart / 2].lr, least: records[least].lr, diverges })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steepest_fall_the_least_loss_and_the_divergence_are_found() {
        // The loss falls around 1e-3, is least around 1e-2 and climbs from 1e-1.
        let record = |index: u64| {
            let exponent = -5.0 + 5.0 * index as f64 / 199.0;
            let fall = 1.0 / (1.0 + (-4.0 * (exponent + 3.0)).exp());
            let climb = (3.0 * (exponent + 1.3)).exp();
            Record { step: index + 1, lr: 10f64.powf(exponent), loss: 4.0 - 2.0 * fall + climb, ..Record::default() }
        };
        let records: Vec<Record> = (0..200).map(record).collect();
        let finding = find(&records, false).expect("a long curve");
        assert!((5e-4..4e-3).contains(&finding.steepest), "{finding:?}");
        assert!((2e-3..3e-2).contains(&finding.least), "{finding:?}");
        assert!(finding.diverges.is_some_and(|rate| (2e-2..0.3).contains(&rate)), "{finding:?}");
        assert_eq!(find(&records[..3], true), None);
    }
}
