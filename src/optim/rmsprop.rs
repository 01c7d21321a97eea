//! RMSProp (Tieleman and Hinton, lecture 6.5, 2012) with momentum, as PyTorch has it.
//!
//! ```text
//! g += lambda theta
//! s = alpha s + (1-alpha) g^2
//! v = mu v + g / (sqrt(s) + eps)
//! theta -= eta v
//! ```

use super::elementwise::{At, Blend, Method, Prepared};
use super::kernel::Rule;

pub(super) struct RmsProp {
    pub alpha: f64,
    pub momentum: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

#[derive(Clone, Copy)]
pub(super) struct RmsPropRule {
    prepared: Prepared,
    alpha: f32,
    take: f32,
    momentum: f32,
    rate: f32,
    eps: f32,
}

impl Rule<2> for RmsPropRule {
    #[inline(always)]
    fn apply(self, gradient: f32, weight: f32, [velocity, mean_square]: [f32; 2]) -> (f32, [f32; 2]) {
        let gradient = self.prepared.gradient(gradient, weight);
        let mean_square = self.alpha * mean_square + self.take * (gradient * gradient);
        let velocity = self.momentum * velocity + gradient / (mean_square.sqrt() + self.eps);
        (self.prepared.weight(weight, self.rate * velocity), [velocity, mean_square])
    }
}

impl Method<2> for RmsProp {
    type Rule = RmsPropRule;
    const STATES: [&'static str; 2] = ["velocity", "mean_square"];

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn blend(&self, _: &At) -> Option<Blend> {
        None
    }

    fn rule(&self, at: &At) -> RmsPropRule {
        RmsPropRule {
            prepared: Prepared::l2(at),
            alpha: self.alpha as f32,
            take: (1.0 - self.alpha) as f32,
            momentum: self.momentum as f32,
            rate: at.eta as f32,
            eps: self.eps as f32,
        }
    }
}
