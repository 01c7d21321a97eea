//! Stochastic gradient descent with heavy-ball or Nesterov momentum, as PyTorch has it (Sutskever et al., 2013).
//!
//! ```text
//! g += lambda theta
//! v = mu v + g
//! theta -= eta (g + mu v)       Nesterov;  otherwise theta -= eta v
//! ```

use super::adam::Decay;
use super::elementwise::{At, Blend, Method, Prepared};
use super::kernel::Rule;

/// How the velocity becomes a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Momentum {
    HeavyBall,
    Nesterov,
}

pub(super) struct Sgd {
    pub momentum: f64,
    pub kind: Momentum,
    pub weight_decay: f64,
}

#[derive(Clone, Copy)]
pub(super) struct SgdRule {
    prepared: Prepared,
    momentum: f32,
    gradient_rate: f32,
    velocity_rate: f32,
}

impl Rule<1> for SgdRule {
    #[inline(always)]
    fn apply(self, gradient: f32, weight: f32, [velocity]: [f32; 1]) -> (f32, [f32; 1]) {
        let gradient = self.prepared.gradient(gradient, weight);
        let velocity = self.momentum * velocity + gradient;
        let change = self.gradient_rate * gradient + self.velocity_rate * velocity;
        (self.prepared.weight(weight, change), [velocity])
    }
}

impl Method<1> for Sgd {
    type Rule = SgdRule;
    const STATES: [&'static str; 1] = ["velocity"];

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn blend(&self, at: &At) -> Option<Blend> {
        (!Decay::L2.enters_velocity(at)).then_some(Blend { keep: self.momentum, take: 1.0 })
    }

    fn rule(&self, at: &At) -> SgdRule {
        let (gradient_rate, velocity_rate) = match self.kind {
            Momentum::HeavyBall => (0.0, at.eta),
            Momentum::Nesterov => (at.eta, at.eta * self.momentum),
        };
        SgdRule {
            prepared: Prepared::l2(at),
            momentum: self.momentum as f32,
            gradient_rate: gradient_rate as f32,
            velocity_rate: velocity_rate as f32,
        }
    }
}
