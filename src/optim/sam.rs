//! SAM, sharpness-aware minimization (Foret et al., arXiv 2010.01412), around any optimizer.
//!
//!     e = rho g / (||g|| + 1e-12)         over all parameters
//!     g' = the gradient at theta + e, of the same batch
//!     theta moves by the inner optimizer's step with g'
//!
//! The report (norm, clip, gate) is that of g'.

use super::kernel::{self, Level};
use super::{GradientSource, Labels, OptimError, Optimizer, OptimizerState, StepInput, StepReport};
use super::{groups, non_finite};
use crate::params::{ParameterStore, slice, slice_mut};
use rayon::prelude::*;

pub(super) struct Sam {
    rho: f64,
    inner: Box<dyn Optimizer>,
    /// theta while the second pass runs at theta + e; kept for its memory alone.
    saved: Vec<f32>,
}

impl Sam {
    pub fn new(rho: f64, inner: Box<dyn Optimizer>) -> Self {
        Self { rho, inner, saved: Vec::new() }
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
        let ranges = groups(store.layout());
        let sums = slice(store.gradients(), |g| kernel::reduce(Level::best(), &ranges, g, None))?;
        let norm = input.gradient_scale * (sums[0].gradient_sq + sums[1].gradient_sq).sqrt();
        if !norm.is_finite() {
            return Err(non_finite(store));
        }
        let scale = (self.rho * input.gradient_scale / (norm + 1e-12)) as f32;
        self.saved.resize(store.layout().len(), 0.0);
        slice(store.gradients(), |gradients| {
            slice_mut(store.weights(), |weights| {
                let saved = self.saved.par_iter_mut();
                saved.zip(weights.par_iter_mut().zip(gradients)).for_each(|(saved, (weight, gradient))| {
                    *saved = *weight;
                    *weight += scale * gradient;
                });
            })
        })??;
        // The weights come back before anything can fail.
        let pass = gradients.recompute(store, Labels::Data);
        slice_mut(store.weights(), |weights| weights.copy_from_slice(&self.saved))?;
        pass.map_err(OptimError::SecondPass)?;
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
