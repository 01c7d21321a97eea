//! AdaBelief (Zhuang et al., arXiv 2010.07468), without rectification.
//!
//! ```text
//! v = b1 v + (1-b1) g
//! s = b2 s + (1-b2) (g-v)^2 + eps                     eps stays in the state
//! theta = theta (1 - eta lambda) - eta (v / (1-b1^t)) / (sqrt(s) / sqrt(1-b2^t) + eps)
//! ```

use super::adam::correction;
use super::elementwise::{At, Blend, Method, Prepared};
use super::kernel::Rule;

pub(super) struct AdaBelief {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

#[derive(Clone, Copy)]
pub(super) struct AdaBeliefRule {
    prepared: Prepared,
    beta1: f32,
    beta2: f32,
    take1: f32,
    take2: f32,
    rate: f32,
    root_scale: f32,
    eps: f32,
}

impl Rule<2> for AdaBeliefRule {
    #[inline(always)]
    fn apply(self, gradient: f32, weight: f32, [velocity, surprise]: [f32; 2]) -> (f32, [f32; 2]) {
        let gradient = self.prepared.gradient(gradient, weight);
        let velocity = self.beta1 * velocity + self.take1 * gradient;
        let residual = gradient - velocity;
        let surprise = self.beta2 * surprise + self.take2 * (residual * residual) + self.eps;
        let change = self.rate * velocity / (surprise.sqrt() * self.root_scale + self.eps);
        (self.prepared.weight(weight, change), [velocity, surprise])
    }
}

impl Method<2> for AdaBelief {
    type Rule = AdaBeliefRule;
    const STATES: [&'static str; 2] = ["velocity", "surprise"];
    const GROWS_FROM_ZERO: bool = true;

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn blend(&self, _: &At) -> Option<Blend> {
        Some(Blend { keep: self.beta1, take: 1.0 - self.beta1 })
    }

    fn rule(&self, at: &At) -> AdaBeliefRule {
        AdaBeliefRule {
            prepared: Prepared::decoupled(at),
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            take1: (1.0 - self.beta1) as f32,
            take2: (1.0 - self.beta2) as f32,
            rate: (at.eta / correction(self.beta1, at.step)) as f32,
            root_scale: (1.0 / correction(self.beta2, at.step).sqrt()) as f32,
            eps: self.eps as f32,
        }
    }
}
