//! Recorded steps of PyTorch 2.15, of the authors' VRAdam and of the other methods' reference code.

use super::super::reference::{self, ReferenceState};
use super::*;
use serde_json::Value as Json;
use std::collections::BTreeMap;

const F64: &str = include_str!("../../../tests/fixtures/optim/golden_f64.json");
const F32: &str = include_str!("../../../tests/fixtures/optim/golden_f32.json");
const CLOSED_LOOP: &str = include_str!("../../../tests/fixtures/optim/golden_closed_loop_f64.json");

/// SophiaG's tokens a step in the recording.
const BATCH: f64 = 512.0;

/// The recorded cases and what they were recorded with.
fn cases() -> Vec<(&'static str, OptimizerConfig)> {
    let lr = |lr: f64| ("lr", Value::from(lr));
    let wd = |weight_decay: f64| ("weight_decay", Value::from(weight_decay));
    let n = |key: &'static str, number: f64| (key, Value::from(number));
    let decoupled = ("decoupled_weight_decay", Value::from(true));
    let v = |keys: &[(&str, Value)]| config("vradam", keys);
    vec![
        ("vradam_default", v(&[])),
        ("vradam_b3_0p5_a1_3_wd0p1", v(&[lr(0.01), n("beta3", 0.5), n("alpha1", 3.0), wd(0.1)])),
        ("vradam_cifar_paper", v(&[lr(0.0846), n("beta3", 1.015), n("alpha1", 29.0)])),
        ("vradam_gpt_betas", v(&[lr(6e-4), n("beta2", 0.95), wd(0.1)])),
        ("vradam_normgrad", v(&[lr(0.01), wd(0.01), ("gate_source", "gradient".into())])),
        ("vradam_clipping", v(&[lr(0.01), n("beta3", 20.0), wd(0.1)])),
        ("vradam_beta3_zero_is_adamw", v(&[lr(0.01), n("beta3", 0.0), wd(0.1)])),
        ("vradam_two_groups_per_group_gate", v(&[lr(0.01), wd(0.1), ("gate_scope", "group".into())])),
        ("adamw_default", config("adamw", &[])),
        ("adamw_lr1e-2_wd0p1", config("adamw", &[lr(0.01), wd(0.1)])),
        ("adamw_gpt", config("adamw", &[lr(6e-4), n("beta2", 0.95), wd(0.1)])),
        ("adam_default", config("adam", &[])),
        ("adam_l2_1e-2", config("adam", &[lr(0.01), wd(0.01)])),
        ("radam_default", config("radam", &[])),
        ("radam_decoupled_wd0p1", config("radam", &[lr(0.01), wd(0.1), decoupled.clone()])),
        ("nadam_default", config("nadam", &[])),
        ("nadam_decoupled_wd0p1", config("nadam", &[lr(0.01), wd(0.1), decoupled])),
        ("sgd_nesterov_m0p9", config("sgd", &[lr(0.1)])),
        ("sgd_nesterov_m0p9_wd1e-2", config("sgd", &[lr(0.1), wd(0.01)])),
        ("rmsprop_default", config("rmsprop", &[])),
        ("rmsprop_m0p9", config("rmsprop", &[lr(1e-3), n("momentum", 0.9)])),
        ("lion_default", config("lion", &[])),
        ("lion_lr1e-3_wd0p1", config("lion", &[lr(1e-3), wd(0.1)])),
        ("sophiag_lr1e-3_rho0p05_wd0p1_bs512_k10", config("sophiag", &[lr(1e-3), n("rho", 0.05)])),
        ("adabelief_default", config("adabelief", &[])),
        ("adabelief_lr1e-2_wd0p1", config("adabelief", &[lr(0.01), wd(0.1)])),
    ]
}

fn list(json: &Json) -> Vec<f64> {
    json.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// The three tensors one after the other.
fn joined(json: &Json) -> Vec<f64> {
    ["w", "b", "k"].iter().flat_map(|name| list(&json[name])).collect()
}

fn worst(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |worst, x| if x.is_nan() { f64::NAN } else { x.max(worst) })
}

/// b is the one tensor without decay in the case with two groups; all decay elsewhere.
fn bias_decays(case: &str) -> bool {
    case != "vradam_two_groups_per_group_gate"
}

#[test]
fn the_f64_references_repeat_all_26_recorded_cases_within_1e_12() {
    let golden: Json = serde_json::from_str(F64).unwrap();
    let cases = cases();
    assert_eq!((cases.len(), golden["cases"].as_object().unwrap().len()), (26, 26));
    for (case, config) in cases {
        let recorded = &golden["cases"][case];
        let mut weights = joined(&golden["init"]);
        let decays: Vec<bool> = (0..weights.len()).map(|i| !(12..17).contains(&i) || bias_decays(case)).collect();
        let mut state = ReferenceState::new(weights.len());
        for (index, gradient) in golden["grads"].as_array().unwrap().iter().enumerate() {
            let gradient = joined(gradient);
            let sampled = (config.name() == "sophiag" && index % 10 == 0).then_some(&gradient[..]);
            let (_, velocity_sq) =
                reference::step(&config, &mut state, config.lr(), &gradient, sampled, BATCH, &mut weights, &decays);
            let error = worst(&weights, &joined(&recorded["params"][index]));
            assert!(error <= 1e-12, "{case}, step {index}: {error:e}");
            if let Some(expected) = recorded["vel_sq"][index].as_f64() {
                assert!((velocity_sq - expected).abs() <= 1e-12 * expected, "{case}: {velocity_sq} {expected}");
            }
        }
    }
}

/// Spreads the three tensors over the flat storage.
fn spread(layout: &Layout, json: &Json) -> Vec<f32> {
    let mut flat = vec![0.0; layout.len()];
    for parameter in layout.parameters() {
        let values: Vec<f32> = list(&json[&parameter.name]).iter().map(|&x| x as f32).collect();
        flat[parameter.range()].copy_from_slice(&values);
    }
    flat
}

/// Gives the same gradient for sampled labels as for the data's.
struct Same;

impl GradientSource for Same {
    fn recompute(&mut self, _: &mut ParameterStore, _: Labels) -> anyhow::Result<()> {
        Ok(())
    }
}

#[test]
fn the_optimizers_repeat_all_26_recorded_cases_within_1e_6_in_f32() {
    let golden: Json = serde_json::from_str(F32).unwrap();
    let full: Json = serde_json::from_str(F64).unwrap();
    for (case, config) in cases() {
        let layout = layout(&[("w", &[3, 4], true), ("b", &[5], bias_decays(case)), ("k", &[2, 2, 2], true)]);
        let mut store = store(&layout, &spread(&layout, &golden["init"]));
        let mut optimizer = config.build(&layout, &Device::Cpu).unwrap();
        let mut checked = 0;
        for (index, gradient) in golden["grads"].as_array().unwrap().iter().enumerate() {
            let sums: Vec<f32> = spread(&layout, gradient).iter().map(|g| g * BATCH as f32).collect();
            set_gradients(&store, &sums);
            let input = StepInput { scheduled_lr: config.lr(), gradient_scale: 1.0 / BATCH, grad_clip: None };
            let report = optimizer.step(&mut store, &input, &mut Same).unwrap();
            if let Some(expected) = full["cases"][case]["vel_sq"][index].as_f64() {
                let error = (report.velocity_sq - expected).abs() / expected;
                assert!(error < 1e-6, "{case}, step {index}: ||v||^2 off by {error:e}");
            }
            let Some(expected) = golden["cases"][case]["params"].get((index + 1).to_string()) else { continue };
            let expected: Vec<f64> = spread(&layout, expected).iter().map(|&x| f64::from(x)).collect();
            let got: Vec<f64> = numbers(store.weights()).iter().map(|&x| f64::from(x)).collect();
            let error = worst(&got, &expected);
            assert!(error <= 1e-6, "{case}, step {index}: {error:e}");
            checked += 1;
        }
        assert_eq!(checked, 3, "{case}");
    }
}

/// Rosenbrock's valley, and half of the sum of h x^2 with h = (.01, .1, 1, 3, 10).
fn gradient_of(problem: &str, x: &[f64]) -> Vec<f64> {
    match problem {
        "rosenbrock" => {
            let slope = x[1] - x[0] * x[0];
            vec![-400.0 * x[0] * slope - 2.0 * (1.0 - x[0]), 200.0 * slope]
        }
        _ => x.iter().zip([0.01, 0.1, 1.0, 3.0, 10.0]).map(|(x, h)| h * x).collect(),
    }
}

fn start_of(problem: &str) -> Vec<f64> {
    if problem == "rosenbrock" { vec![-1.2, 1.0] } else { vec![1.0, -1.0, 1.0, -1.0, 1.0] }
}

/// The recorded runs: (problem, name in the file, config, rho of SAM).
fn closed_loops() -> Vec<(&'static str, String, OptimizerConfig, Option<f64>)> {
    let zero = ("weight_decay", Value::from(0.0));
    let with = |name: &str, lr: f64| config(name, &[("lr", lr.into()), zero.clone()]);
    let mut loops = Vec::new();
    for problem in ["rosenbrock", "quad5"] {
        for (method, lr) in [
            ("vradam", 0.02),
            ("adamw", 0.02),
            ("radam", 2e-4),
            ("nadam", 0.02),
            ("rmsprop", 0.001),
            ("lion", 0.001),
            ("adabelief", 0.02),
            ("sgd", 2e-4),
        ] {
            let recorded = if method == "sgd" { "sgd_nesterov" } else { method };
            loops.push((problem, format!("{problem}_{recorded}"), with(method, lr), None));
        }
    }
    loops.push((
        "quad5",
        "quad5_sam_sgd_rho0p05_lr0p05_m0p9".into(),
        config("sgd", &[("lr", 0.05.into()), ("nesterov", false.into())]),
        Some(0.05),
    ));
    loops.push(("rosenbrock", "rosenbrock_sam_adamw_rho0p05_lr0p02".into(), with("adamw", 0.02), Some(0.05)));
    loops
}

#[test]
fn the_references_repeat_recorded_runs_of_200_steps_sharpness_aware_ones_too() {
    let golden: Json = serde_json::from_str(CLOSED_LOOP).unwrap();
    let loops = closed_loops();
    assert_eq!(loops.len(), golden["traj"].as_object().unwrap().len());
    let mut failures = BTreeMap::new();
    for (problem, name, config, rho) in loops {
        let mut x = start_of(problem);
        let decays = vec![true; x.len()];
        let mut state = ReferenceState::new(x.len());
        for step in 1..=200 {
            let mut gradient = gradient_of(problem, &x);
            if let Some(rho) = rho {
                let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
                let climbed: Vec<f64> = x.iter().zip(&gradient).map(|(x, g)| x + rho * g / (norm + 1e-12)).collect();
                gradient = gradient_of(problem, &climbed);
            }
            reference::step(&config, &mut state, config.lr(), &gradient, None, 1.0, &mut x, &decays);
            if let Some(expected) = golden["traj"][&name].get(step.to_string()) {
                let error = worst(&x, &list(expected));
                if error.is_nan() || error > 1e-11 {
                    failures.entry(name.clone()).or_insert((step, error));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

/// Raw gradients of a problem at the store's weights.
struct Problem(&'static str, usize);

impl GradientSource for Problem {
    fn recompute(&mut self, store: &mut ParameterStore, _: Labels) -> anyhow::Result<()> {
        let x: Vec<f64> = numbers(store.weights())[..self.1].iter().map(|&x| f64::from(x)).collect();
        let mut flat = vec![0.0; store.layout().len()];
        flat.iter_mut().zip(gradient_of(self.0, &x)).for_each(|(flat, g)| *flat = g as f32);
        set_gradients(store, &flat);
        Ok(())
    }
}

#[test]
fn the_optimizers_follow_the_recorded_runs_in_f32() {
    let golden: Json = serde_json::from_str(CLOSED_LOOP).unwrap();
    for (problem, name, config, rho) in closed_loops() {
        let keys: Vec<_> = config.resolved().iter().map(|(key, value)| (key.to_string(), value.clone())).collect();
        let mut keys: Vec<_> = keys.into_iter().filter(|(key, _)| rho.is_none() || key != "sam").collect();
        if let Some(rho) = rho {
            keys.push(("sam".into(), true.into()));
            keys.push(("sam_rho".into(), rho.into()));
        }
        let config = OptimizerConfig::from_keys(config.name(), &keys).unwrap();
        let start = start_of(problem);
        let layout = layout(&[("x", &[start.len()], true)]);
        let mut flat = vec![0.0; layout.len()];
        flat.iter_mut().zip(&start).for_each(|(flat, &x)| *flat = x as f32);
        let mut store = store(&layout, &flat);
        let mut optimizer = config.build(&layout, &Device::Cpu).unwrap();
        let mut source = Problem(problem, start.len());
        for step in 1..=50 {
            source.recompute(&mut store, Labels::Data).unwrap();
            let input = StepInput { scheduled_lr: config.lr(), gradient_scale: 1.0, grad_clip: None };
            optimizer.step(&mut store, &input, &mut source).unwrap();
            let Some(expected) = golden["traj"][&name].get(step.to_string()) else { continue };
            let got: Vec<f64> = numbers(store.weights())[..start.len()].iter().map(|&x| f64::from(x)).collect();
            let error = worst(&got, &list(expected));
            assert!(error < 2e-4, "{name}, step {step}: {error:e}");
        }
    }
}
