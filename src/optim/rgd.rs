//! RGD, relativistic gradient descent (Franca, Sulam, Robinson and Vidal, arXiv 1903.04100): a conformal symplectic
//! method whose speed has a limit, that of light.
//!
//! ```text
//! g += lambda theta
//! p = mu p - h g
//! theta += eta c p / sqrt((m c)^2 + |p|^2)         |p| over all parameters; h the rate before, eta after a gate
//! ```
//!
//! c is the speed of light, m the mass. The velocity of the state is p.

use super::adam::Decay;
use super::elementwise::{At, Blend, Method, Prepared};
use super::kernel::Rule;

pub(super) struct Rgd {
    pub momentum: f64,
    pub speed: f64,
    pub mass: f64,
    pub weight_decay: f64,
}

#[derive(Clone, Copy)]
pub(super) struct RgdRule {
    prepared: Prepared,
    momentum: f32,
    push: f32,
    rate: f32,
}

impl Rule<1> for RgdRule {
    #[inline(always)]
    fn apply(self, gradient: f32, weight: f32, [velocity]: [f32; 1]) -> (f32, [f32; 1]) {
        let velocity = self.momentum * velocity - self.push * self.prepared.gradient(gradient, weight);
        (self.prepared.weight(weight, self.rate * velocity), [velocity])
    }
}

impl Method<1> for Rgd {
    type Rule = RgdRule;
    const STATES: [&'static str; 1] = ["velocity"];

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn blend(&self, at: &At) -> Option<Blend> {
        (!Decay::L2.enters_velocity(at)).then_some(Blend { keep: self.momentum, take: -at.scheduled_lr })
    }

    fn rule(&self, at: &At) -> RgdRule {
        let rest = self.mass * self.speed;
        RgdRule {
            prepared: Prepared::l2(at),
            momentum: self.momentum as f32,
            push: at.scheduled_lr as f32,
            rate: (-at.eta * self.speed / (rest * rest + at.velocity_sq).sqrt()) as f32,
        }
    }

    fn needs_velocity_sq(&self) -> bool {
        true
    }
}
