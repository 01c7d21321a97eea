//! `vrtrain lab stability`: the closed-form studies of the gate, as a table, JSON and pictures.

use super::{Ending, print_json};
use crate::config::ConfigError;
use crate::lab::plot::{Chart, Scale, Series, Stroke};
use crate::lab::stability::{self, ClosedLoop, Fate, Gating, Method};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// What the command line asked for.
#[derive(Clone, Debug)]
pub struct StabilityOptions {
    pub beta1: f64,
    pub beta3: f64,
    pub alpha1: f64,
    /// Steps of a simulated run.
    pub steps: usize,
    /// A folder for the pictures.
    pub out: Option<PathBuf>,
    pub json: bool,
}

/// Curvature of the studied quadratic.
const CURVATURE: f64 = 10.0;
/// Start of the closed loop that cycles, and of the one that converges.
const STARTS: [f64; 2] = [3.0, 0.01];
/// alpha0 L in units of B.
const PARTS: [f64; 12] = [0.1, 0.25, 0.5, 0.9, 1.1, 2.0, 4.0, 8.0, 10.9, 11.2, 12.0, 16.0];
/// alpha0 on Rosenbrock's function, in units of B / (the sharpness at the minimum).
const ROSENBROCK_PARTS: [f64; 8] = [0.05, 0.2, 0.5, 0.9, 1.1, 2.0, 5.0, 10.0];

/// Runs the studies and prints them.
pub fn stability(options: &StabilityOptions) -> Result<Ending> {
    let method = checked(options)?;
    let (b, floor) = (method.threshold(), 1.0 + method.alpha1);
    let alternating = [0.9 * b, 0.9 * b / floor];
    let growths = [&alternating[..1], &alternating[1..], &alternating[..]].map(|s| stability::growth(method.beta1, s));
    let run = |part: f64, x0| stability::closed_loop(method, CURVATURE, part * b, x0, options.steps);
    let plain = Method { beta3: 0.0, ..method };
    let loops: Vec<(f64, [ClosedLoop; 2], ClosedLoop)> = PARTS
        .iter()
        .map(|&part| {
            let free = stability::closed_loop(plain, CURVATURE, part * b, STARTS[0], options.steps);
            (part, STARTS.map(|x0| run(part, x0)), free)
        })
        .collect();
    let edge = b / stability::rosenbrock_sharpness_at_minimum();
    let valley: Vec<_> = ROSENBROCK_PARTS
        .iter()
        .map(|&part| {
            let run = |gating| stability::rosenbrock_run(method, gating, part * edge, options.steps);
            (part, run(Gating::Open), run(Gating::Velocity))
        })
        .collect();

    let pictures = match &options.out {
        Some(folder) => draw(folder, method, &alternating, options.steps)?,
        None => Vec::new(),
    };
    if options.json {
        let quadratic: Vec<Value> = loops
            .iter()
            .map(|(part, [large, small], free)| {
                json!({"alpha0_l_over_b": part, "from": STARTS, "gated": [closed(*large), closed(*small)],
                       "momentum": closed(*free)})
            })
            .collect();
        let rosenbrock: Vec<Value> = valley
            .iter()
            .map(|(part, open, gated)| {
                let one = |run: &stability::RosenbrockRun| {
                    json!({"fate": run.fate.word(), "final": finite(run.final_value),
                           "eta_sharpness_over_b": finite(run.eta_sharpness / b)})
                };
                json!({"alpha0_over_edge": part, "momentum": one(open), "gated": one(gated)})
            })
            .collect();
        print_json(&json!({
            "beta1": method.beta1, "beta3": method.beta3, "alpha1": method.alpha1, "steps": options.steps,
            "threshold": b, "threshold_measured": stability::measured_threshold(method.beta1),
            "common_lyapunov_range": method.common_lyapunov_range(),
            "alternating": {"eta_l_over_b": alternating.map(|s| s / b), "growth_first_alone": growths[0],
                            "growth_second_alone": growths[1], "growth_in_turn": growths[2]},
            "curvature": CURVATURE, "quadratic": quadratic, "rosenbrock": rosenbrock, "pictures": pictures,
        }))?;
        return Ok(Ending::Done);
    }
    print_tables(options, method, growths, &loops, &valley);
    pictures.iter().for_each(|path| println!("drawn: {}", path.display()));
    Ok(Ending::Done)
}

fn checked(options: &StabilityOptions) -> Result<Method, ConfigError> {
    let refuse = |flag: &str, value: f64, wanted: &str| {
        Err(ConfigError::flag(flag, format!("{value} cannot be used: it takes {wanted}")))
    };
    let StabilityOptions { beta1, beta3, alpha1, steps, .. } = *options;
    if !(0.0..1.0).contains(&beta1) {
        return refuse("--beta1", beta1, "a number from 0 to below 1");
    }
    if !(beta3.is_finite() && beta3 >= 0.0) {
        return refuse("--beta3", beta3, "a number from 0");
    }
    if !(alpha1.is_finite() && alpha1 >= 0.0) {
        return refuse("--alpha1", alpha1, "a number from 0");
    }
    if !(100..=100_000_000).contains(&steps) {
        return refuse("--steps", steps as f64, "100 to 100,000,000");
    }
    Ok(Method { beta1, beta3, alpha1 })
}

/// JSON has no infinity and no NaN.
fn finite(value: f64) -> Value {
    if value.is_finite() { json!(value) } else { Value::Null }
}

fn closed(run: ClosedLoop) -> Value {
    json!({"fate": run.fate.word(), "amplitude": finite(run.amplitude)})
}

fn shown(run: ClosedLoop) -> String {
    match run.fate {
        Fate::Bounded => format!("stays at {:.3e}", run.amplitude),
        other => other.word().to_owned(),
    }
}

fn print_tables(
    options: &StabilityOptions,
    method: Method,
    growths: [f64; 3],
    loops: &[(f64, [ClosedLoop; 2], ClosedLoop)],
    valley: &[(f64, stability::RosenbrockRun, stability::RosenbrockRun)],
) {
    let b = method.threshold();
    println!("beta1 {}, beta3 {}, alpha1 {}; {} steps a run", method.beta1, method.beta3, method.alpha1, options.steps);
    println!("\nA fixed eta on a quadratic of curvature L");
    println!("  stable exactly while eta L < B = 2 (1+b1) / (1-b1) = {b:.6}; found by bisection: {:.6}", {
        stability::measured_threshold(method.beta1)
    });
    println!("  one Lyapunov function for every sequence of gates: eta L <= {:.4}", method.common_lyapunov_range());
    println!("\nTwo stable steps in turn: .9 B (gate open) and .9 B / {} (gate at its floor)", 1.0 + method.alpha1);
    println!("  growth a step: {:.4} and {:.4} alone, {:.4} in turn", growths[0], growths[1], growths[2]);
    println!("\nThe closed loop on a quadratic of curvature {CURVATURE}: what becomes of |z| = |(x, v)|");
    println!(
        "  {:>12}  {:>22}  {:>22}  {:>22}",
        "alpha0 L / B", "gated, from x = 3", "gated, from x = .01", "no gate, from x = 3"
    );
    for (part, [large, small], free) in loops {
        println!("  {part:>12}  {:>22}  {:>22}  {:>22}", shown(*large), shown(*small), shown(*free));
    }
    println!("\nRosenbrock's function from (-1.2, 1); the edge is B / {:.1}, its sharpness at the minimum", {
        stability::rosenbrock_sharpness_at_minimum()
    });
    println!(
        "  {:>13}  {:>12}  {:>10}  {:>12}  {:>10}  {:>21}",
        "alpha0 / edge", "no gate", "value", "gated", "value", "eta x sharpness / B"
    );
    for (part, open, gated) in valley {
        println!(
            "  {part:>13}  {:>12}  {:>10.2e}  {:>12}  {:>10.2e}  {:>21.3}",
            open.fate.word(),
            open.final_value,
            gated.fate.word(),
            gated.final_value,
            gated.eta_sharpness / b
        );
    }
}

/// Amplitudes below it are drawn at it.
const FLOOR: f64 = 1e-4;

/// Draws the alternating gates and the amplitudes of the closed loop.
fn draw(folder: &Path, method: Method, alternating: &[f64; 2], steps: usize) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let path = |eta_l: &[f64]| {
        let numbered = stability::trajectory(method.beta1, eta_l, 40).into_iter().enumerate();
        numbered.map(|(step, x)| ((step + 1) as f64, x.max(1e-12))).collect::<Vec<_>>()
    };
    let line = |label: &str, points| Series { label: label.into(), points, ..Series::default() };
    let turns = Chart {
        title: "Two gates, each stable alone, taken in turn".into(),
        x_label: "step".into(),
        y_label: "|x|".into(),
        x_scale: Scale::Linear,
        y_scale: Scale::Log,
        series: vec![
            line("always .9 B", path(&alternating[..1])),
            line("always .9 B / (1 + alpha1)", path(&alternating[1..])),
            line("in turn", path(alternating)),
        ],
    };
    // Denser than the table: the islands of limit cycles below B are narrow.
    let amplitude = |x0: f64| {
        let parts = (0..=120).map(|i| 0.1 * 120f64.powf(f64::from(i) / 120.0));
        let runs = parts.map(|part| {
            (part, stability::closed_loop(method, CURVATURE, part * method.threshold(), x0, steps).amplitude)
        });
        runs.map(|(part, amplitude)| (part, amplitude.max(FLOOR))).collect::<Vec<_>>()
    };
    let limit = |label: &str, x: f64| Series {
        label: label.into(),
        points: vec![(x, FLOOR), (x, 1e3)],
        stroke: Stroke::Limit,
        ..Series::default()
    };
    let cycles = Chart {
        title: "The gated loop: amplitude of |z| in the end (1e-4: converges)".into(),
        x_label: "alpha0 L / B".into(),
        y_label: "|z|".into(),
        x_scale: Scale::Log,
        y_scale: Scale::Log,
        series: vec![
            line("from x = 3", amplitude(STARTS[0])),
            line("from x = .01", amplitude(STARTS[1])),
            limit("B: momentum without a gate diverges above", 1.0),
            limit("(1 + alpha1) B: the gated loop diverges above", 1.0 + method.alpha1),
        ],
    };
    let mut written = turns.write(&folder.join("alternating"))?.to_vec();
    written.extend(cycles.write(&folder.join("closed-loop"))?);
    Ok(written)
}
