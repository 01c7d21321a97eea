//! The properties of the gated method that hold, by simulation; and the claim that does not.
//!
//! On a quadratic of curvature L, without the preconditioner: v = b1 v + (1-b1) L x, x -= s v, where s = eta. With a
//! fixed s it is stable exactly while s L < B = 2 (1+b1) / (1-b1).

use super::*;
use crate::optim::gate;
use proptest::prelude::*;

const BETA1: f64 = 0.9;
const B: f64 = 2.0 * (1.0 + BETA1) / (1.0 - BETA1);

/// One step of (x, v) with s L = `step`, in units where L = 1.
fn momentum_step((x, v): (f64, f64), step: f64) -> (f64, f64) {
    let v = BETA1 * v + (1.0 - BETA1) * x;
    (x - step * v, v)
}

/// Growth a step, over many steps.
fn growth(steps: impl Iterator<Item = f64>) -> f64 {
    let (mut state, mut log, mut count) = ((1.0, 0.3), 0.0, 0);
    for step in steps {
        state = momentum_step(state, step);
        let size = f64::hypot(state.0, state.1);
        state = (state.0 / size, state.1 / size);
        log += size.ln();
        count += 1;
    }
    (log / f64::from(count)).exp()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_frozen_gate_is_stable_exactly_below_the_threshold(part in 0.01..2.0f64) {
        prop_assume!((part - 1.0).abs() > 0.01);
        let growth = growth(std::iter::repeat_n(part * B, 4000));
        prop_assert_eq!(growth < 1.0, part < 1.0, "{} {}", part, growth);
    }

    /// alpha0 L between B and (1 + alpha1) B: plain momentum diverges, the gated method does not.
    #[test]
    fn above_the_threshold_the_gate_keeps_the_iteration_bounded(part in 1.1..10.5f64, start in 0.01..5.0f64) {
        let alpha1 = 10.0;
        prop_assert!(growth(std::iter::repeat_n(part * B, 4000)) > 1.0);
        let mut state = (start, 0.0);
        for _ in 0..20_000 {
            let v = BETA1 * state.1 + (1.0 - BETA1) * state.0;
            state = momentum_step(state, part * B * gate(1.0, alpha1, v * v));
            prop_assert!(state.0.abs() < 1e4 && state.1.abs() < 1e4, "{:?}", state);
        }
    }

    #[test]
    fn a_step_of_vradam_has_its_eta_between_the_floor_and_the_scheduled_rate(
        seed in 0u64..1000, spread in 1e-4..30.0f64, beta3 in 0.0..40.0f64, alpha1 in 0.0..30.0f64,
    ) {
        let layout = odd_layout();
        let keys = [("beta3", beta3.into()), ("alpha1", alpha1.into())];
        let mut optimizer = config("vradam", &keys).build(&layout, &Device::Cpu).unwrap();
        let mut store = store(&layout, &random_flat(&layout, seed, 1.0));
        let mut last = None;
        for step in 0..3u64 {
            // The same direction, longer every step: the velocity grows, so the gate may only close.
            let length = spread * (step + 1) as f64;
            let gradients: Vec<f32> = random_flat(&layout, seed + 1, 1.0).iter().map(|g| g * length as f32).collect();
            set_gradients(&store, &gradients);
            let input = StepInput { scheduled_lr: 0.01, gradient_scale: 1.0, grad_clip: None };
            let report = optimizer.step(&mut store, &input, &mut Noise { fixed: vec![] }).unwrap();
            let slack = 1.0 + 1e-9;
            prop_assert!(report.eta <= 0.01 * slack && report.eta * slack >= 0.01 / (1.0 + alpha1));
            let expected = 0.01 * gate(beta3, alpha1, report.velocity_sq);
            prop_assert!((report.eta - expected).abs() <= 1e-5 * expected, "{} {}", report.eta, expected);
            prop_assert!(last.is_none_or(|last| report.eta <= last * slack));
            last = Some(report.eta);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// |theta_t - theta_(t-1)| = eta ||v|| <= alpha0 / (2 sqrt(beta3)), without a preconditioner and below the clip at
    /// alpha1.
    #[test]
    fn a_gated_momentum_step_is_never_longer_than_its_bound(seed in 0u64..1000, beta3 in 0.01f64..50.0, length in 0.001f64..30.0) {
        let layout = odd_layout();
        let keys = [("gate", true.into()), ("nesterov", false.into()), ("weight_decay", 0.0.into()), ("beta3", beta3.into()), ("alpha1", 1e12.into())];
        let mut optimizer = config("sgd", &keys).build(&layout, &Device::Cpu).unwrap();
        let mut store = store(&layout, &random_flat(&layout, seed, 1.0));
        for step in 0..4 {
            let gradients: Vec<f32> =
                random_flat(&layout, seed + step, 1.0).iter().map(|g| g * length as f32).collect();
            set_gradients(&store, &gradients);
            let before = slice(store.weights(), |weights| weights.to_vec()).unwrap();
            let input = StepInput { scheduled_lr: 0.5, gradient_scale: 1.0, grad_clip: None };
            optimizer.step(&mut store, &input, &mut Noise { fixed: vec![] }).unwrap();
            let after = slice(store.weights(), |weights| weights.to_vec()).unwrap();
            let moved = before.iter().zip(&after).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
            let bound = 0.5 / (2.0 * beta3.sqrt());
            prop_assert!(moved <= bound * 1.001, "{} {}", moved, bound);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn without_beta3_every_run_of_vradam_is_adamws(
        seed in 0u64..1000, spread in 1e-4..30.0f64, beta1 in 0.0..0.99f64, beta2 in 0.5..0.9999f64,
        weight_decay in 0.0..0.5f64, clip in proptest::option::of(0.01..10.0f64),
    ) {
        let layout = odd_layout();
        let shared = [("beta1", beta1.into()), ("beta2", beta2.into()), ("weight_decay", weight_decay.into())];
        let weights = |name, own: &[(&'static str, Value)]| {
            let mut optimizer = config(name, &[&shared, own].concat()).build(&layout, &Device::Cpu).unwrap();
            let mut store = store(&layout, &random_flat(&layout, seed, 1.0));
            for step in 0..4u64 {
                let gradients = random_flat(&layout, seed + step, 1.0).iter().map(|g| g * spread as f32).collect::<Vec<_>>();
                set_gradients(&store, &gradients);
                let scheduled_lr = 0.01 / (step + 1) as f64;
                let input = StepInput { scheduled_lr, gradient_scale: 1.0, grad_clip: clip };
                optimizer.step(&mut store, &input, &mut Noise { fixed: vec![] }).unwrap();
            }
            bits(store.weights())
        };
        prop_assert!(weights("vradam", &[("beta3", 0.0.into())]) == weights("adamw", &[]));
    }
}

/// "Any sequence of gates below the threshold is stable" is false: each of these two is, their alternation is not.
#[test]
fn alternating_two_stable_gates_can_double_the_error_every_step() {
    let (large, small) = (0.9 * B, 0.9 * B / 11.0);
    assert!(growth(std::iter::repeat_n(large, 4000)) < 1.0);
    assert!(growth(std::iter::repeat_n(small, 4000)) < 1.0);
    let growth = growth([large, small].into_iter().cycle().take(4000));
    assert!((growth - 2.0).abs() < 0.01, "{growth}");
}
