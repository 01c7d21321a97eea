//! Sharpness along a run: measured every N steps or at checkpoints, written to `sharpness.jsonl`, drawn against the edges.

use super::plot::{Chart, Scale, Series, Stroke};
use super::problem::Problem;
use super::sharpness::{DOUBTFUL, Gradient, Hessian, Spectrum, packed, preconditioner, spectrum};
use crate::optim::{OptimizerConfig, OptimizerState, Value};
use crate::params::{Layout, ParameterStore, on_cpu};
use crate::train::Journal;
use anyhow::{Context, Result};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Where in a run a measurement is taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    pub step: u64,
    /// alpha0 after the schedule.
    pub lr: f64,
    /// After the gate.
    pub eta: f64,
}

/// One measurement, as a line of `sharpness.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    pub step: u64,
    pub lr: f64,
    pub eta: f64,
    /// Largest eigenvalues of the loss's Hessian.
    pub sharpness: Vec<f64>,
    /// Error of the first: the residual's norm, and the estimate of the difference's.
    pub residual: f64,
    pub difference_error: f64,
    /// Largest eigenvalues of P^-1 H for the methods with Adam's preconditioner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preconditioned: Option<Vec<f64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preconditioned_residual: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preconditioned_difference_error: Option<f64>,
    /// 2 / eta: the edge of plain gradient descent.
    pub edge_descent: f64,
    /// (2 + 2 b1) / ((1 - b1) lr): with momentum, at the ungated rate (38 / lr for b1 = .9).
    pub edge_momentum: f64,
    /// The same at the gated rate.
    pub edge_gated: f64,
    /// Why some of the eigenvalues are not to be trusted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub doubts: Vec<String>,
}

impl Measurement {
    /// The doubts as a person is told of them.
    pub fn warnings(&self) -> Vec<String> {
        self.doubts.iter().map(|doubt| format!("step {}: {doubt}", self.step)).collect()
    }
}

/// Why the eigenvalues of `name` are not to be trusted.
fn doubts(name: &str, spectrum: &Spectrum, iterations: usize) -> Vec<String> {
    let Spectrum { residual, difference_error, .. } = *spectrum;
    let mut doubts = Vec::new();
    let mut doubt = |error: f64, text: &dyn Fn(&str) -> String| {
        let share = spectrum.share(error);
        if share > DOUBTFUL || share.is_nan() {
            doubts.push(text(&format!("{error:.1e}, {:.0}% of the largest", 100.0 * share)));
        }
    };
    doubt(difference_error, &|error| {
        format!(
            "the eigenvalues of {name} are not to be trusted: the estimated error of the difference is {error}; the \
             gradient jumps very near these weights, as at a kink of ReLU, where the loss has no Hessian"
        )
    });
    doubt(residual, &|error| {
        format!(
            "the eigenvalues of {name} have not been found to the end: {iterations} iterations of Lanczos' method leave \
             an error of up to {error}; take more"
        )
    });
    doubts
}

/// How a run's sharpness is measured.
#[derive(Clone, Debug)]
pub struct Settings {
    pub examples: usize,
    pub iterations: usize,
    /// How many of the largest eigenvalues are kept.
    pub count: usize,
    pub seed: u64,
    pub momentum: f64,
    /// (beta2, eps) of Adam's preconditioner, where the method has it.
    pub adam: Option<(f64, f64)>,
}

impl Settings {
    pub fn new(optimizer: &OptimizerConfig, examples: usize, iterations: usize, count: usize, seed: u64) -> Self {
        let number = |key: &str| match optimizer.resolved().iter().find(|(name, _)| *name == key) {
            Some((_, Value::Number(number))) => Some(*number),
            _ => None,
        };
        let momentum = number("beta1").or(number("momentum")).unwrap_or(0.0);
        let preconditioned = matches!(optimizer.name(), "vradam" | "adamw" | "adam" | "radam" | "nadam");
        let adam = if preconditioned { number("beta2").zip(number("eps")) } else { None };
        Self { examples, iterations, count, seed, momentum, adam }
    }
}

/// The edges that sharpness is compared with: 2 / eta, and (2 + 2 b1) / ((1 - b1) eta) at both rates.
pub fn edges(momentum: f64, point: Point) -> [f64; 3] {
    let threshold = (2.0 + 2.0 * momentum) / (1.0 - momentum);
    [2.0 / point.eta, threshold / point.lr, threshold / point.eta]
}

/// Measures the loss `loss` (mean over a fixed batch, of f64 parameters in the layout's order) at `weights`.
pub fn measure(
    settings: &Settings,
    layout: &Layout,
    weights: &[f32],
    optimizer: &OptimizerState,
    point: Point,
    loss: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<Measurement> {
    let gradient = Gradient::new(layout, loss)?;
    let at = packed(layout, weights);
    let &Settings { count, iterations, seed, .. } = settings;
    let run = |preconditioner: Option<&[f64]>| {
        spectrum(&Hessian { gradient: &gradient, point: &at, preconditioner, count, iterations, seed })
    };
    let plain = run(None)?;
    let mut found = doubts("H", &plain, iterations);
    let moment = optimizer.tensors.iter().find(|(name, _)| name == "second_moment");
    let preconditioned = match (settings.adam, moment) {
        (Some((beta2, epsilon)), Some((_, moment))) => {
            let moment = on_cpu(moment, |moment| packed(layout, moment))?;
            Some(run(Some(&preconditioner(&moment, beta2, point.step, epsilon)))?)
        }
        _ => None,
    };
    if let Some(spectrum) = &preconditioned {
        found.extend(doubts("P^-1 H", spectrum, iterations));
    }
    let Spectrum { largest, residual, difference_error, .. } = plain;
    let [edge_descent, edge_momentum, edge_gated] = edges(settings.momentum, point);
    Ok(Measurement {
        step: point.step,
        lr: point.lr,
        eta: point.eta,
        sharpness: largest,
        residual,
        difference_error,
        preconditioned_residual: preconditioned.as_ref().map(|spectrum| spectrum.residual),
        preconditioned_difference_error: preconditioned.as_ref().map(|spectrum| spectrum.difference_error),
        preconditioned: preconditioned.map(|spectrum| spectrum.largest),
        edge_descent,
        edge_momentum,
        edge_gated,
        doubts: found,
    })
}

/// Measures a small task during its training.
pub struct Tracker {
    /// Steps between measurements.
    pub every: u64,
    pub settings: Settings,
}

impl Tracker {
    /// The file of a run that has done `step` steps.
    pub fn journal(run: &Path, step: u64) -> Result<Journal> {
        Journal::open(&path(run), step)
    }

    /// Measures now, appends the line and gives what there is to warn of.
    pub fn measure(
        &self,
        problem: &dyn Problem,
        store: &ParameterStore,
        optimizer: &OptimizerState,
        point: Point,
        journal: &mut Journal,
    ) -> Result<Vec<String>> {
        let (layout, settings) = (problem.layout(), &self.settings);
        let loss = |tensors: &[Tensor]| problem.twin(tensors, settings.examples);
        let measured = on_cpu(store.weights(), |weights| measure(settings, layout, weights, optimizer, point, loss))?;
        let measured = measured.with_context(|| format!("cannot measure the sharpness after step {}", point.step))?;
        journal.append(&measured)?;
        Ok(measured.warnings())
    }
}

fn path(run: &Path) -> PathBuf {
    run.join("sharpness.jsonl")
}

/// The measurements of a run; none where it has no file.
pub fn read(run: &Path) -> Result<Vec<Measurement>> {
    let path = path(run);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let read = |(number, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| format!("{}:{}: not a measurement", path.display(), number + 1))
    };
    text.lines().enumerate().map(read).collect()
}

/// Sharpness and the edges over the steps.
pub fn chart(title: &str, measurements: &[Measurement]) -> Chart {
    let series = |label: &str, stroke, value: &dyn Fn(&Measurement) -> Option<f64>| {
        let points = measurements.iter().filter_map(|m| Some((m.step as f64, value(m)?))).collect();
        Series { label: label.into(), points, stroke, ..Series::default() }
    };
    let mut all = vec![
        series("largest eigenvalue of H", Stroke::Line, &|m| m.sharpness.first().copied()),
        series("largest eigenvalue of P^-1 H", Stroke::Line, &|m| m.preconditioned.as_ref()?.first().copied()),
        series("2 / eta", Stroke::Line, &|m| Some(m.edge_descent)),
        series("(2 + 2 b1) / ((1 - b1) lr)", Stroke::Line, &|m| Some(m.edge_momentum)),
        series("the same at the gated rate", Stroke::Line, &|m| Some(m.edge_gated)),
    ];
    all.retain(|series| !series.points.is_empty());
    Chart {
        title: title.to_owned(),
        x_label: "step".into(),
        y_label: "sharpness".into(),
        x_scale: Scale::Linear,
        y_scale: Scale::Log,
        series: all,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_with_a_large_error_are_doubted_and_others_are_not() {
        let spectrum = |residual, difference_error| Spectrum {
            largest: vec![61.5, 2.0],
            residual,
            difference_error,
            iterations: 20,
        };
        assert_eq!(doubts("H", &spectrum(0.1, 1e-3), 20), [""; 0]);
        let found = doubts("H", &spectrum(4e-20, 36.0), 20);
        assert_eq!(found.len(), 1);
        assert!(found[0].contains("of H are not to be trusted") && found[0].contains("59%"), "{found:?}");
        let found = doubts("P^-1 H", &spectrum(9.0, f64::NAN), 20);
        assert_eq!(found.len(), 2);
        assert!(found[1].contains("of P^-1 H have not") && found[1].contains("15%"), "{found:?}");
    }
}
