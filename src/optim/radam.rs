//! RAdam (Liu et al., arXiv 1908.03265): Adam whose adaptive rate waits until its variance can be known.
//!
//! ```text
//! rho_inf = 2/(1-b2) - 1;  rho = rho_inf - 2 t b2^t / (1-b2^t)
//! rho > 5:  r = sqrt((rho-4)(rho-2) rho_inf / ((rho_inf-4)(rho_inf-2) rho))
//!           theta -= eta r (v / (1-b1^t)) sqrt(1-b2^t) / (sqrt(m) + eps)
//! else:     theta -= eta v / (1-b1^t)
//! ```
//!
//! with Adam's moving averages v and m.

use super::adam::{Decay, correction};
use super::elementwise::{At, Blend, Method, Prepared};
use super::kernel::Rule;

pub(super) struct RAdam {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub decay: Decay,
}

/// r sqrt(1-b2^t) of step t, or nothing while the variance is unknown.
pub(super) fn rectification(beta2: f64, step: u64) -> Option<f64> {
    let correction2 = correction(beta2, step);
    let rho_inf = 2.0 / (1.0 - beta2) - 1.0;
    let rho = rho_inf - 2.0 * step as f64 * (1.0 - correction2) / correction2;
    let r_sq = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho);
    (rho > 5.0).then(|| (r_sq * correction2).sqrt())
}

#[derive(Clone, Copy)]
pub(super) struct RAdamRule {
    prepared: Prepared,
    beta1: f32,
    beta2: f32,
    take1: f32,
    take2: f32,
    rate: f32,
    adaptive: bool,
    eps: f32,
}

impl Rule<2> for RAdamRule {
    #[inline(always)]
    fn apply(self, gradient: f32, weight: f32, [velocity, second_moment]: [f32; 2]) -> (f32, [f32; 2]) {
        let gradient = self.prepared.gradient(gradient, weight);
        let velocity = self.beta1 * velocity + self.take1 * gradient;
        let second_moment = self.beta2 * second_moment + self.take2 * (gradient * gradient);
        let divisor = if self.adaptive { second_moment.sqrt() + self.eps } else { 1.0 };
        (self.prepared.weight(weight, self.rate * velocity / divisor), [velocity, second_moment])
    }
}

impl Method<2> for RAdam {
    type Rule = RAdamRule;
    const STATES: [&'static str; 2] = ["velocity", "second_moment"];

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn blend(&self, at: &At) -> Option<Blend> {
        (!self.decay.enters_velocity(at)).then_some(Blend { keep: self.beta1, take: 1.0 - self.beta1 })
    }

    fn rule(&self, at: &At) -> RAdamRule {
        let rectification = rectification(self.beta2, at.step);
        RAdamRule {
            prepared: self.decay.prepare(at),
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            take1: (1.0 - self.beta1) as f32,
            take2: (1.0 - self.beta2) as f32,
            rate: (at.eta * rectification.unwrap_or(1.0) / correction(self.beta1, at.step)) as f32,
            adaptive: rectification.is_some(),
            eps: self.eps as f32,
        }
    }
}
