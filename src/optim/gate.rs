//! The clip and the velocity gate: the two scalars that a reduction pass decides.

/// What the gate measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateSource {
    /// The velocity of this step, as the paper has it.
    Velocity,
    /// The gradient (scaled and clipped), as an older version of the authors' code.
    Gradient,
}

/// What one gate covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateScope {
    /// All parameters, as the paper has it.
    Global,
    /// Decayed and plain parameters each get their own, as in the authors' code.
    Group,
}

/// A gate that is on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateSettings {
    /// Strength of the penalty, in 1 / gradient^2.
    pub beta3: f64,
    /// The floor: gate >= 1 / (1 + alpha1).
    pub alpha1: f64,
    pub source: GateSource,
    pub scope: GateScope,
    /// The sum is over |velocity|^power; 2 is the paper's.
    pub power: f64,
}

/// 1 / (1 + min(beta3 * q, alpha1)), where q is the sum of the squares of all velocities (raw: a plain sum, before
/// bias correction). Falls from 1 to 1 / (1 + alpha1) as q grows.
pub fn gate(beta3: f64, alpha1: f64, velocity_sq: f64) -> f64 {
    1.0 / (1.0 + (beta3 * velocity_sq).min(alpha1))
}

/// What to multiply a gradient of this norm by, so that its norm is at most `limit`.
pub fn clip_factor(norm: f64, limit: Option<f64>) -> f64 {
    match limit {
        Some(limit) if norm > limit => limit / (norm + 1e-6),
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_gradient_is_cut_to_the_limit_and_a_small_one_is_left_alone() {
        assert_eq!(clip_factor(0.5, Some(1.0)), 1.0);
        assert_eq!(clip_factor(7.0, None), 1.0);
        // torch.nn.utils.clip_grad_norm_: max_norm / (total_norm + 1e-6)
        assert_eq!(clip_factor(4.0, Some(1.0)), 1.0 / (4.0 + 1e-6));
    }

    proptest! {
        #[test]
        fn the_gate_stays_between_its_floor_and_one_and_falls_as_the_velocity_grows(
            beta3 in 0.0..50.0f64, alpha1 in 0.0..40.0f64, q in 0.0..1e6f64, more in 0.0..1e6f64,
        ) {
            let here = gate(beta3, alpha1, q);
            prop_assert!((1.0 / (1.0 + alpha1)..=1.0).contains(&here));
            prop_assert!(gate(beta3, alpha1, q + more) <= here);
        }

        /// eta ||v|| <= alpha0 / (2 sqrt(beta3)) while the floor does not bind: x / (1 + b x^2) <= 1 / (2 sqrt(b)).
        #[test]
        fn the_step_is_bounded_while_the_floor_does_not_bind(beta3 in 1e-3..50.0f64, speed in 0.0..1e3f64) {
            let alpha1 = beta3 * speed * speed;
            let step = gate(beta3, alpha1, speed * speed) * speed;
            prop_assert!(step <= 0.5 / beta3.sqrt() * (1.0 + 1e-12));
        }
    }
}
