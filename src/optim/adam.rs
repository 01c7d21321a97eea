//! Adam and its two closest kin: AdamW (Loshchilov and Hutter, arXiv 1711.05101) and VRAdam (arXiv 2505.13196).
//!
//! ```text
//! v = b1 v + (1-b1) g              velocity (Adam's first moment)
//! m = b2 m + (1-b2) g^2            second moment
//! eta = s(t) lr / (1 + min(b3 ||v||^2, alpha1))        VRAdam, over all parameters; AdamW: s(t) lr
//! theta = theta (1 - eta lambda) - eta (v / (1-b1^t)) / (sqrt(m / (1-b2^t)) + eps)
//! ```
//!
//! Adam has no gate, and its decay is part of the gradient: g += lambda theta. VRAdam with b3 = 0 is AdamW, by the
//! same code and so bit for bit.

use super::elementwise::{At, Blend, Method, Prepared};
use super::kernel::Rule;

/// Where weight decay enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decay {
    /// theta (1 - eta lambda)
    Decoupled,
    /// g + lambda theta
    L2,
}

impl Decay {
    pub fn prepare(self, at: &At) -> Prepared {
        match self {
            Self::Decoupled => Prepared::decoupled(at),
            Self::L2 => Prepared::l2(at),
        }
    }

    /// Whether the velocity takes more than the gradient in.
    pub fn enters_velocity(self, at: &At) -> bool {
        self == Self::L2 && at.weight_decay != 0.0
    }
}

/// Adam, AdamW and VRAdam.
pub(super) struct Adam {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub decay: Decay,
}

#[derive(Clone, Copy)]
pub(super) struct AdamRule {
    prepared: Prepared,
    beta1: f32,
    beta2: f32,
    take1: f32,
    take2: f32,
    /// eta / (1 - b1^t)
    rate: f32,
    /// 1 / sqrt(1 - b2^t)
    root_scale: f32,
    eps: f32,
}

impl Rule<2> for AdamRule {
    #[inline(always)]
    fn apply(self, gradient: f32, weight: f32, [velocity, second_moment]: [f32; 2]) -> (f32, [f32; 2]) {
        let gradient = self.prepared.gradient(gradient, weight);
        let velocity = self.beta1 * velocity + self.take1 * gradient;
        let second_moment = self.beta2 * second_moment + self.take2 * (gradient * gradient);
        let change = self.rate * velocity / (second_moment.sqrt() * self.root_scale + self.eps);
        (self.prepared.weight(weight, change), [velocity, second_moment])
    }
}

impl Method<2> for Adam {
    type Rule = AdamRule;
    const STATES: [&'static str; 2] = ["velocity", "second_moment"];

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn blend(&self, at: &At) -> Option<Blend> {
        (!self.decay.enters_velocity(at)).then_some(Blend { keep: self.beta1, take: 1.0 - self.beta1 })
    }

    fn rule(&self, at: &At) -> AdamRule {
        AdamRule {
            prepared: self.decay.prepare(at),
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

/// 1 - beta^step, the bias correction of a moving average that began at zero.
pub(super) fn correction(beta: f64, step: u64) -> f64 {
    1.0 - beta.powf(step as f64)
}
