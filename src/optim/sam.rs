//! SAM, sharpness-aware minimization (Foret et al., arXiv 2010.01412), around any optimizer.
//!
//! ```text
//! e = rho g / (||g|| + 1e-12)         over all parameters
//! g' = the gradient at theta + e, of the same batch
//! theta moves by the inner optimizer's step with g'
//! ```
//!
//! The report (norm, clip, gate) is that of g'.

use super::{GradientSource, Labels, OptimError, Optimizer, OptimizerState, StepInput, StepReport};
use super::{groups, non_finite, whole};
use crate::params::ParameterStore;
use candle_core::Tensor;

pub(super) struct Sam {
    rho: f64,
    inner: Box<dyn Optimizer>,
    /// theta while the second pass runs at theta + e; kept for its memory alone.
    saved: Option<Tensor>,
}

impl Sam {
    pub fn new(rho: f64, inner: Box<dyn Optimizer>) -> Self {
        Self { rho, inner, saved: None }
    }
}

impl Optimizer for Sam {
    fn step(
        &mut self,
        store: &mut ParameterStore,
        input: &StepInput,
        gradients: &mut dyn GradientSource,
    ) -> Result<StepReport, OptimError> {
        input.check()?;
        let sums = whole::squares(store.gradients(), &groups(store.layout()))?;
        let norm = input.gradient_scale * (sums[0] + sums[1]).sqrt();
        if !norm.is_finite() {
            return Err(non_finite(store));
        }
        let scale = (self.rho * input.gradient_scale / (norm + 1e-12)) as f32;
        let saved = match self.saved.take() {
            Some(saved) => saved,
            None => store.weights().zeros_like()?,
        };
        whole::copy(&saved, store.weights())?;
        whole::add_scaled(store.weights(), scale, store.gradients())?;
        store.round_weights()?;
        // The weights come back before anything can fail.
        let pass = gradients.recompute(store, Labels::Data);
        whole::copy(store.weights(), &saved)?;
        store.round_weights()?;
        self.saved = Some(saved);
        pass.map_err(OptimError::SecondPass)?;
        self.inner.step(store, input, gradients).map_err(|error| match error {
            OptimError::NonFinite { parameter, index, value } => OptimError::NonFiniteAhead { parameter, index, value },
            other => other,
        })
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
