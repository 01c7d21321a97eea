//! Momentum with a velocity gate on a quadratic and on Rosenbrock's function: where it is stable, bounded, or cycles.
//!
//! On a quadratic of curvature L, without a preconditioner, the state is z = (x, v):
//!
//! ```text
//! v = b1 v + (1-b1) L x
//! x = x - eta v,    eta = alpha0 / (1 + min(b3 v^2, alpha1))
//! ```
//!
//! With eta fixed, one step is a 2 x 2 matrix; it is stable exactly while eta L < B = 2 (1+b1) / (1-b1).

use crate::optim::gate;

/// The constants of the gated method.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Method {
    pub beta1: f64,
    pub beta3: f64,
    pub alpha1: f64,
}

impl Method {
    /// B: with a fixed eta a quadratic of curvature L is stable exactly while eta L is below it.
    pub fn threshold(self) -> f64 {
        2.0 * (1.0 + self.beta1) / (1.0 - self.beta1)
    }

    /// Below this eta L one quadratic Lyapunov function serves every sequence of gates.
    pub fn common_lyapunov_range(self) -> f64 {
        2.0 * (1.0 - self.beta1) / (1.0 + self.beta1)
    }
}

type Matrix = [[f64; 2]; 2];

/// One step of (x, v / L) at `eta_l` = eta L: a matrix that does not depend on L otherwise.
fn step_matrix(beta1: f64, eta_l: f64) -> Matrix {
    let take = 1.0 - beta1;
    [[1.0 - eta_l * take, -eta_l * beta1], [take, beta1]]
}

fn product(a: Matrix, b: Matrix) -> Matrix {
    let entry = |i: usize, j: usize| a[i][0] * b[0][j] + a[i][1] * b[1][j];
    [[entry(0, 0), entry(0, 1)], [entry(1, 0), entry(1, 1)]]
}

/// Modulus of the largest eigenvalue.
fn spectral_radius(m: Matrix) -> f64 {
    let (half_trace, determinant) = (0.5 * (m[0][0] + m[1][1]), m[0][0] * m[1][1] - m[0][1] * m[1][0]);
    let discriminant = half_trace * half_trace - determinant;
    if discriminant >= 0.0 { half_trace.abs() + discriminant.sqrt() } else { determinant.sqrt() }
}

/// Growth a step of the error when the steps eta L are taken in turn for ever.
pub fn growth(beta1: f64, eta_l: &[f64]) -> f64 {
    let identity = [[1.0, 0.0], [0.0, 1.0]];
    let round = eta_l.iter().fold(identity, |total, &step| product(step_matrix(beta1, step), total));
    spectral_radius(round).powf(1.0 / eta_l.len() as f64)
}

/// The largest stable eta L, found by bisection on the growth, not by the formula.
pub fn measured_threshold(beta1: f64) -> f64 {
    let (mut stable, mut unstable) = (1e-3, 1e6);
    // Near beta1 = 1 the threshold lies above any fixed bound.
    while growth(beta1, &[unstable]) < 1.0 && unstable < f64::MAX / 4.0 {
        (stable, unstable) = (unstable, 2.0 * unstable);
    }
    for _ in 0..200 {
        let middle = 0.5 * (stable + unstable);
        if growth(beta1, &[middle]) < 1.0 { stable = middle } else { unstable = middle }
    }
    0.5 * (stable + unstable)
}

/// What became of a simulated run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The error fell below 1e-9 of its start.
    Converges,
    /// It stays away from 0 and from infinity.
    Bounded,
    Diverges,
}

impl Fate {
    pub fn word(self) -> &'static str {
        match self {
            Self::Converges => "converges",
            Self::Bounded => "bounded",
            Self::Diverges => "diverges",
        }
    }
}

/// A run of the closed loop on a quadratic.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClosedLoop {
    pub fate: Fate,
    /// Largest |z| = sqrt(x^2 + v^2) over the last tenth of the steps.
    pub amplitude: f64,
}

/// Beyond this the run counts as divergent.
const INFINITE: f64 = 1e12;

/// Runs the gated method from (x0, 0); `alpha0_l` is alpha0 times the curvature.
pub fn closed_loop(method: Method, curvature: f64, alpha0_l: f64, x0: f64, steps: usize) -> ClosedLoop {
    let alpha0 = alpha0_l / curvature;
    let (mut x, mut v, mut amplitude) = (x0, 0.0f64, 0.0f64);
    for step in 0..steps {
        v = method.beta1 * v + (1.0 - method.beta1) * curvature * x;
        x -= alpha0 * gate(method.beta3, method.alpha1, v * v) * v;
        let size = x.hypot(v);
        if size.is_nan() || size > INFINITE * x0.abs().max(1.0) {
            return ClosedLoop { fate: Fate::Diverges, amplitude: f64::INFINITY };
        }
        if step >= steps - steps / 10 {
            amplitude = amplitude.max(size);
        }
    }
    let fate = if amplitude < 1e-9 * x0.abs() { Fate::Converges } else { Fate::Bounded };
    ClosedLoop { fate, amplitude }
}

/// |x| after every step from (1, 0) when the steps eta L are taken in turn.
pub fn trajectory(beta1: f64, eta_l: &[f64], steps: usize) -> Vec<f64> {
    let (mut x, mut v) = (1.0, 0.0);
    let next = |&step: &f64| {
        v = beta1 * v + (1.0 - beta1) * x;
        x -= step * v;
        f64::abs(x)
    };
    eta_l.iter().cycle().take(steps).map(next).collect()
}

/// Rosenbrock's function (1-x)^2 + 100 (y-x^2)^2: value and gradient.
fn rosenbrock([x, y]: [f64; 2]) -> (f64, [f64; 2]) {
    let valley = y - x * x;
    let value = (1.0 - x).powi(2) + 100.0 * valley * valley;
    (value, [-2.0 * (1.0 - x) - 400.0 * x * valley, 200.0 * valley])
}

/// Largest eigenvalue of its Hessian.
fn rosenbrock_sharpness([x, y]: [f64; 2]) -> f64 {
    let (a, b, c) = (2.0 - 400.0 * (y - 3.0 * x * x), -400.0 * x, 200.0);
    0.5 * (a + c) + (0.25 * (a - c).powi(2) + b * b).sqrt()
}

/// The sharpness at the minimum (1, 1).
pub fn rosenbrock_sharpness_at_minimum() -> f64 {
    rosenbrock_sharpness([1.0, 1.0])
}

/// Whether the velocity gate acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gating {
    Open,
    Velocity,
}

/// A run on Rosenbrock's function from (-1.2, 1).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RosenbrockRun {
    pub fate: Fate,
    pub final_value: f64,
    /// Mean over the last tenth of the steps of eta times the sharpness at the point; the edge is B.
    pub eta_sharpness: f64,
}

/// Runs momentum without a preconditioner, gated or not.
pub fn rosenbrock_run(method: Method, gating: Gating, alpha0: f64, steps: usize) -> RosenbrockRun {
    let (mut point, mut velocity) = ([-1.2, 1.0], [0.0f64; 2]);
    let (mut sum, mut count) = (0.0, 0.0f64);
    for step in 0..steps {
        let (_, gradient) = rosenbrock(point);
        for (v, g) in velocity.iter_mut().zip(gradient) {
            *v = method.beta1 * *v + (1.0 - method.beta1) * g;
        }
        let eta = match gating {
            Gating::Open => alpha0,
            Gating::Velocity => alpha0 * gate(method.beta3, method.alpha1, velocity.iter().map(|v| v * v).sum()),
        };
        if step >= steps - steps / 10 {
            sum += eta * rosenbrock_sharpness(point);
            count += 1.0;
        }
        point = [point[0] - eta * velocity[0], point[1] - eta * velocity[1]];
        let size = point[0].hypot(point[1]);
        if size.is_nan() || size > INFINITE {
            return RosenbrockRun { fate: Fate::Diverges, final_value: f64::INFINITY, eta_sharpness: f64::NAN };
        }
    }
    let final_value = rosenbrock(point).0;
    let fate = if final_value < 1e-12 { Fate::Converges } else { Fate::Bounded };
    RosenbrockRun { fate, final_value, eta_sharpness: sum / count.max(1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const METHOD: Method = Method { beta1: 0.9, beta3: 1.0, alpha1: 10.0 };

    #[test]
    fn the_threshold_found_by_bisection_is_the_formulas() {
        assert!((METHOD.threshold() - 38.0).abs() < 1e-12);
        for beta1 in [0.0, 0.5, 0.9, 0.95] {
            let formula = Method { beta1, ..METHOD }.threshold();
            assert!((measured_threshold(beta1) / formula - 1.0).abs() < 1e-9, "{beta1}");
        }
        // Far above the first bracket; so near to 1 rounding leaves fewer digits.
        let near = Method { beta1: 0.999_999, ..METHOD }.threshold();
        assert!((measured_threshold(0.999_999) / near - 1.0).abs() < 1e-6 && near > 3.9e6);
        assert!((METHOD.common_lyapunov_range() - 0.105).abs() < 3e-4);
    }

    #[test]
    fn alternating_two_stable_gates_doubles_the_error_every_step() {
        let b = METHOD.threshold();
        assert!(growth(0.9, &[0.9 * b]) < 1.0 && growth(0.9, &[0.9 * b / 11.0]) < 1.0);
        let alternating = growth(0.9, &[0.9 * b, 0.9 * b / 11.0]);
        assert!((alternating - 2.00).abs() < 0.005, "{alternating}");
        let path = trajectory(0.9, &[0.9 * b, 0.9 * b / 11.0], 400);
        let simulated = (path[399] / path[199]).powf(1.0 / 200.0);
        assert!((simulated - alternating).abs() < 1e-3, "{simulated}");
    }

    #[test]
    fn the_closed_loop_cycles_below_the_threshold_and_stays_bounded_up_to_the_floor() {
        let b = METHOD.threshold();
        let cycle = closed_loop(METHOD, 10.0, 0.5 * b, 3.0, 100_000);
        assert_eq!(cycle.fate, Fate::Bounded);
        assert!((cycle.amplitude - 1.4).abs() < 0.05, "{cycle:?}");
        assert_eq!(closed_loop(METHOD, 10.0, 0.5 * b, 0.01, 100_000).fate, Fate::Converges);
        assert_eq!(closed_loop(METHOD, 10.0, 10.9 * b, 3.0, 100_000).fate, Fate::Bounded);
        assert_eq!(closed_loop(METHOD, 10.0, 11.2 * b, 3.0, 100_000).fate, Fate::Diverges);
        // Plain momentum (a gate that never closes) diverges just above B.
        let plain = Method { beta3: 0.0, ..METHOD };
        assert_eq!(closed_loop(plain, 10.0, 1.1 * b, 3.0, 100_000).fate, Fate::Diverges);
        assert_eq!(closed_loop(plain, 10.0, 0.9 * b, 3.0, 100_000).fate, Fate::Converges);
    }

    #[test]
    fn the_gate_keeps_rosenbrock_bounded_where_plain_momentum_diverges() {
        // Eigenvalues of the Hessian at (1, 1): 1001.6 and 0.4.
        assert!((rosenbrock_sharpness_at_minimum() - 1_001.600_639_488_2).abs() < 1e-6);
        let edge = METHOD.threshold() / rosenbrock_sharpness_at_minimum();
        assert_eq!(rosenbrock_run(METHOD, Gating::Open, 2.0 * edge, 20_000).fate, Fate::Diverges);
        assert_ne!(rosenbrock_run(METHOD, Gating::Velocity, 2.0 * edge, 20_000).fate, Fate::Diverges);
        assert_eq!(rosenbrock_run(METHOD, Gating::Open, 0.05 * edge, 200_000).fate, Fate::Converges);
    }
}
