//! NAdam (Dozat, "Incorporating Nesterov momentum into Adam", 2016), with the momentum schedule of PyTorch.
//!
//! ```text
//! mu_t = b1 (1 - 0.96^(t psi) / 2);  P_t = mu_1 mu_2 ... mu_t
//! theta -= eta [(1-mu_t) g / (1-P_t) + mu_{t+1} v / (1-P_t mu_{t+1})] / (sqrt(m / (1-b2^t)) + eps)
//! ```
//!
//! with Adam's moving averages v and m. P_t is part of the state, and is rounded to f32 in every step, as PyTorch's is.

use super::adam::{Decay, correction};
use super::elementwise::{At, Blend, Method, Prepared};
use super::kernel::Rule;

pub(super) struct NAdam {
    pub beta1: f64,
    pub beta2: f64,
    pub psi: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub decay: Decay,
    /// P of the steps made so far; 1 at the start.
    pub product: f64,
}

/// mu_t
pub(super) fn momentum(beta1: f64, psi: f64, step: u64) -> f64 {
    beta1 * (1.0 - 0.5 * 0.96f64.powf(step as f64 * psi))
}

/// P_t from P_{t-1} and mu_t.
pub(super) fn next_product(product: f64, momentum: f64) -> f64 {
    f64::from(product as f32 * momentum as f32)
}

#[derive(Clone, Copy)]
pub(super) struct NAdamRule {
    prepared: Prepared,
    beta1: f32,
    beta2: f32,
    take1: f32,
    take2: f32,
    gradient_rate: f32,
    velocity_rate: f32,
    root_scale: f32,
    eps: f32,
}

impl Rule<2> for NAdamRule {
    #[inline(always)]
    fn apply(self, gradient: f32, weight: f32, [velocity, second_moment]: [f32; 2]) -> (f32, [f32; 2]) {
        let gradient = self.prepared.gradient(gradient, weight);
        let velocity = self.beta1 * velocity + self.take1 * gradient;
        let second_moment = self.beta2 * second_moment + self.take2 * (gradient * gradient);
        let direction = self.gradient_rate * gradient + self.velocity_rate * velocity;
        let change = direction / (second_moment.sqrt() * self.root_scale + self.eps);
        (self.prepared.weight(weight, change), [velocity, second_moment])
    }
}

impl Method<2> for NAdam {
    type Rule = NAdamRule;
    const STATES: [&'static str; 2] = ["velocity", "second_moment"];

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn blend(&self, at: &At) -> Option<Blend> {
        (!self.decay.enters_velocity(at)).then_some(Blend { keep: self.beta1, take: 1.0 - self.beta1 })
    }

    fn rule(&self, at: &At) -> NAdamRule {
        let now = momentum(self.beta1, self.psi, at.step);
        let next = momentum(self.beta1, self.psi, at.step + 1);
        let product = next_product(self.product, now);
        NAdamRule {
            prepared: self.decay.prepare(at),
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            take1: (1.0 - self.beta1) as f32,
            take2: (1.0 - self.beta2) as f32,
            gradient_rate: (at.eta * (1.0 - now) / (1.0 - product)) as f32,
            velocity_rate: (at.eta * next / (1.0 - product * next)) as f32,
            root_scale: (1.0 / correction(self.beta2, at.step).sqrt()) as f32,
            eps: self.eps as f32,
        }
    }

    fn extra(&self) -> Option<(&'static str, f64)> {
        Some(("momentum_product", self.product))
    }

    fn load_extra(&mut self, product: f64) {
        self.product = product;
    }

    fn advance(&mut self, step: u64) {
        self.product = next_product(self.product, momentum(self.beta1, self.psi, step));
    }
}
