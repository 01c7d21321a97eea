//! SophiaG (Liu et al., arXiv 2305.14342): momentum clipped element by element against a diagonal of the Hessian.
//!
//! ```text
//! on steps 1, 1 + k, 1 + 2k, ...:  h = b2 h + (1-b2) ghat^2
//! v = b1 v + (1-b1) g
//! theta = theta (1 - eta lambda) - eta sign(v) min(|v| / (rho B h + 1e-15), 1)
//! ```
//!
//! ghat is the mean gradient of the same batch with labels drawn from the model (Gauss, Newton and Bartlett), B the
//! number of tokens of the step. The gate and the clip act on g, never on ghat.

use super::elementwise::{At, Blend, Elementwise, Method, Prepared};
use super::gate::GateSettings;
use super::kernel::Rule;
use super::{GradientSource, Labels, OptimError, Optimizer, OptimizerState, StepInput, StepReport};
use super::{groups, lion::sign, non_finite, whole};
use crate::params::{Layout, ParameterStore};
use candle_core::Device;
use std::sync::Arc;

pub(super) struct Sophia {
    pub beta1: f64,
    pub beta2: f64,
    pub rho: f64,
    pub weight_decay: f64,
}

#[derive(Clone, Copy)]
pub(super) struct SophiaRule {
    prepared: Prepared,
    beta1: f32,
    take1: f32,
    /// rho B
    curvature_scale: f32,
    rate: f32,
}

impl Rule<2> for SophiaRule {
    #[inline(always)]
    fn apply(self, gradient: f32, weight: f32, [velocity, hessian]: [f32; 2]) -> (f32, [f32; 2]) {
        let gradient = self.prepared.gradient(gradient, weight);
        let velocity = self.beta1 * velocity + self.take1 * gradient;
        let ratio = (velocity.abs() / (self.curvature_scale * hessian + 1e-15)).min(1.0);
        (self.prepared.weight(weight, self.rate * sign(velocity) * ratio), [velocity, hessian])
    }
}

impl Method<2> for Sophia {
    type Rule = SophiaRule;
    const STATES: [&'static str; 2] = ["velocity", "hessian"];

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn blend(&self, _: &At) -> Option<Blend> {
        Some(Blend { keep: self.beta1, take: 1.0 - self.beta1 })
    }

    fn rule(&self, at: &At) -> SophiaRule {
        SophiaRule {
            prepared: Prepared::decoupled(at),
            beta1: self.beta1 as f32,
            take1: (1.0 - self.beta1) as f32,
            curvature_scale: (self.rho / at.gradient_scale) as f32,
            rate: at.eta as f32,
        }
    }
}

/// The elementwise method and, on every k-th step, the pass that renews its Hessian.
pub(super) struct SophiaG {
    inner: Elementwise<2, Sophia>,
    beta2: f64,
    every: u64,
}

impl SophiaG {
    pub fn new(
        method: Sophia,
        every: u64,
        gate: Option<GateSettings>,
        layout: &Arc<Layout>,
        device: &Device,
    ) -> Result<Self, OptimError> {
        let beta2 = method.beta2;
        Ok(Self { inner: Elementwise::new(method, gate, layout, device)?, beta2, every })
    }

    /// Takes the sampled gradient into the Hessian and leaves the data's gradient where it was.
    fn renew_hessian(
        &self,
        store: &mut ParameterStore,
        gradient_scale: f64,
        gradients: &mut dyn GradientSource,
    ) -> Result<(), OptimError> {
        let check = |store: &ParameterStore| {
            let sums = whole::squares(store.gradients(), &groups(store.layout()))?;
            if sums.iter().all(|sum| sum.is_finite()) { Ok(()) } else { Err(non_finite(store)) }
        };
        check(store)?;
        let saved = store.gradients().copy()?;
        gradients.recompute(store, Labels::Sampled).map_err(OptimError::SecondPass)?;
        check(store)?;
        let (keep, take) = (self.beta2 as f32, (1.0 - self.beta2) as f32);
        let hessian = &self.inner.states()[1];
        whole::blend_square(hessian, keep, take, gradient_scale as f32, store.gradients())?;
        whole::copy(store.gradients(), &saved)?;
        Ok(())
    }
}

impl Optimizer for SophiaG {
    fn step(
        &mut self,
        store: &mut ParameterStore,
        input: &StepInput,
        gradients: &mut dyn GradientSource,
    ) -> Result<StepReport, OptimError> {
        input.check()?;
        if self.inner.steps().is_multiple_of(self.every) {
            self.renew_hessian(store, input.gradient_scale, gradients)?;
        }
        self.inner.step(store, input, gradients)
    }

    fn state(&self) -> OptimizerState {
        self.inner.state()
    }

    fn load_state(&mut self, state: &OptimizerState) -> Result<(), OptimError> {
        self.inner.load_state(state)
    }

    fn needs_second_pass(&self) -> bool {
        true
    }
}
