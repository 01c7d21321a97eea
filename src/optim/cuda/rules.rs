//! Each method's rule for its kernel: what the CPU's `Method::rule` gives, with eta left open, because the gate is
//! decided on the device.

use super::abi::{Constants, Rates};
use crate::optim::adabelief::AdaBelief;
use crate::optim::adam::{Adam, Decay, correction};
use crate::optim::elementwise::At;
use crate::optim::lion::Lion;
use crate::optim::nadam::{NAdam, momentum, next_product};
use crate::optim::radam::{RAdam, rectification};
use crate::optim::rgd::Rgd;
use crate::optim::rmsprop::RmsProp;
use crate::optim::sgd::{Momentum, Sgd};
use crate::optim::sophia::Sophia;

/// A method's kernel and its numbers in one step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KernelRule {
    /// `update_NAME` and `predict_NAME`.
    pub name: &'static str,
    pub constants: Constants,
    pub rates: Rates,
}

/// A method that has a kernel.
pub(crate) trait OnDevice {
    /// The rule of the step that `at` (of the decayed group) describes.
    fn kernel_rule(&self, at: &At) -> KernelRule;
}

/// Two rates, eta * numerator / divisor each, and the decay of the decayed group.
fn rates(rates: [(f64, f64); 2], decay: Decay, weight_decay: f64) -> Rates {
    let (outside, inside) = match decay {
        Decay::Decoupled => (weight_decay, 0.0),
        Decay::L2 => (0.0, weight_decay as f32),
    };
    Rates {
        numerator: rates.map(|(numerator, _)| numerator),
        divisor: rates.map(|(_, divisor)| divisor),
        weight_decay: outside,
        l2: inside,
    }
}

const NO_RATE: (f64, f64) = (0.0, 1.0);

/// The constants of two moving averages; the second one's bias correction after `step` steps.
fn averages(beta1: f64, beta2: f64, eps: f64, step: u64) -> Constants {
    Constants {
        beta1: beta1 as f32,
        beta2: beta2 as f32,
        take1: (1.0 - beta1) as f32,
        take2: (1.0 - beta2) as f32,
        root_scale: (1.0 / correction(beta2, step).sqrt()) as f32,
        eps: eps as f32,
        ..Constants::default()
    }
}

impl OnDevice for Adam {
    fn kernel_rule(&self, at: &At) -> KernelRule {
        let rate = (1.0, correction(self.beta1, at.step));
        KernelRule {
            name: "adam",
            constants: averages(self.beta1, self.beta2, self.eps, at.step),
            rates: rates([rate, NO_RATE], self.decay, self.weight_decay),
        }
    }
}

impl OnDevice for AdaBelief {
    fn kernel_rule(&self, at: &At) -> KernelRule {
        let rate = (1.0, correction(self.beta1, at.step));
        KernelRule {
            name: "adabelief",
            constants: averages(self.beta1, self.beta2, self.eps, at.step),
            rates: rates([rate, NO_RATE], Decay::Decoupled, self.weight_decay),
        }
    }
}

impl OnDevice for NAdam {
    fn kernel_rule(&self, at: &At) -> KernelRule {
        let [now, next] = [at.step, at.step + 1].map(|step| momentum(self.beta1, self.psi, step));
        let product = next_product(self.product, now);
        let gradient = (1.0 - now, 1.0 - product);
        let velocity = (next, 1.0 - product * next);
        KernelRule {
            name: "nadam",
            constants: averages(self.beta1, self.beta2, self.eps, at.step),
            rates: rates([gradient, velocity], self.decay, self.weight_decay),
        }
    }
}

impl OnDevice for RAdam {
    fn kernel_rule(&self, at: &At) -> KernelRule {
        let rectification = rectification(self.beta2, at.step);
        let rate = (rectification.unwrap_or(1.0), correction(self.beta1, at.step));
        let constants = averages(self.beta1, self.beta2, self.eps, at.step);
        KernelRule {
            name: "radam",
            constants: Constants { adaptive: u32::from(rectification.is_some()), ..constants },
            rates: rates([rate, NO_RATE], self.decay, self.weight_decay),
        }
    }
}

impl OnDevice for RmsProp {
    fn kernel_rule(&self, _: &At) -> KernelRule {
        KernelRule {
            name: "rmsprop",
            constants: Constants {
                beta2: self.alpha as f32,
                take2: (1.0 - self.alpha) as f32,
                momentum: self.momentum as f32,
                eps: self.eps as f32,
                ..Constants::default()
            },
            rates: rates([(1.0, 1.0), NO_RATE], Decay::L2, self.weight_decay),
        }
    }
}

impl OnDevice for Sgd {
    fn kernel_rule(&self, _: &At) -> KernelRule {
        let both = match self.kind {
            Momentum::HeavyBall => [NO_RATE, (1.0, 1.0)],
            Momentum::Nesterov => [(1.0, 1.0), (self.momentum, 1.0)],
        };
        KernelRule {
            name: "sgd",
            constants: Constants { momentum: self.momentum as f32, ..Constants::default() },
            rates: rates(both, Decay::L2, self.weight_decay),
        }
    }
}

impl OnDevice for Lion {
    fn kernel_rule(&self, _: &At) -> KernelRule {
        let constants = averages(self.beta1, self.beta2, 0.0, 1);
        KernelRule { name: "lion", constants, rates: rates([(1.0, 1.0), NO_RATE], Decay::Decoupled, self.weight_decay) }
    }
}

impl OnDevice for Rgd {
    fn kernel_rule(&self, at: &At) -> KernelRule {
        let rest = self.mass * self.speed;
        KernelRule {
            name: "rgd",
            constants: Constants {
                momentum: self.momentum as f32,
                take1: at.scheduled_lr as f32,
                rest_energy: rest * rest,
                ..Constants::default()
            },
            // The kernel divides by sqrt(rest_energy + ||velocity||^2).
            rates: rates([(-self.speed, 1.0), NO_RATE], Decay::L2, self.weight_decay),
        }
    }
}

impl OnDevice for Sophia {
    fn kernel_rule(&self, at: &At) -> KernelRule {
        let constants = averages(self.beta1, self.beta2, 0.0, 1);
        KernelRule {
            name: "sophia",
            constants: Constants { curvature_scale: (self.rho / at.gradient_scale) as f32, ..constants },
            rates: rates([(1.0, 1.0), NO_RATE], Decay::Decoupled, self.weight_decay),
        }
    }
}
