//! Lion (Chen et al., "Symbolic discovery of optimization algorithms", arXiv 2302.06675).
//!
//! ```text
//! theta = theta (1 - eta lambda) - eta sign(b1 v + (1-b1) g)
//! v = b2 v + (1-b2) g
//! ```

use super::elementwise::{At, Blend, Method, Prepared};
use super::kernel::Rule;

pub(super) struct Lion {
    pub beta1: f64,
    pub beta2: f64,
    pub weight_decay: f64,
}

#[derive(Clone, Copy)]
pub(super) struct LionRule {
    prepared: Prepared,
    beta1: f32,
    beta2: f32,
    take1: f32,
    take2: f32,
    rate: f32,
}

/// -1, 0 or 1.
#[inline(always)]
pub(super) fn sign(x: f32) -> f32 {
    f32::from(u8::from(x > 0.0)) - f32::from(u8::from(x < 0.0))
}

impl Rule<1> for LionRule {
    #[inline(always)]
    fn apply(self, gradient: f32, weight: f32, [velocity]: [f32; 1]) -> (f32, [f32; 1]) {
        let gradient = self.prepared.gradient(gradient, weight);
        let direction = sign(self.beta1 * velocity + self.take1 * gradient);
        let velocity = self.beta2 * velocity + self.take2 * gradient;
        (self.prepared.weight(weight, self.rate * direction), [velocity])
    }
}

impl Method<1> for Lion {
    type Rule = LionRule;
    const STATES: [&'static str; 1] = ["velocity"];

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn blend(&self, _: &At) -> Option<Blend> {
        Some(Blend { keep: self.beta2, take: 1.0 - self.beta2 })
    }

    fn rule(&self, at: &At) -> LionRule {
        LionRule {
            prepared: Prepared::decoupled(at),
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            take1: (1.0 - self.beta1) as f32,
            take2: (1.0 - self.beta2) as f32,
            rate: at.eta as f32,
        }
    }
}
