//! Optimizers over the whole parameter store, learning-rate schedules, clipping and the velocity gate.
//!
//! Every optimizer is one pass that reduces (the norm for the clip, and the velocity's norm for the gate, at once) and
//! one pass that updates, over the flat storages and not tensor by tensor: a gate is one number for the whole model.
//! [`reference`] holds each rule once more as plain f64 code, the oracle of the tests.

mod adabelief;
mod adam;
pub mod config;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "no_cuda.rs"]
mod cuda;
mod elementwise;
mod gate;
mod kernel;
mod keys;
mod lion;
mod muon;
mod nadam;
mod radam;
pub mod reference;
mod rgd;
mod rmsprop;
mod sam;
pub mod schedule;
mod sgd;
mod sophia;
#[cfg(test)]
mod tests;
mod whole;

use crate::params::{Layout, ParameterStore, slice};
use candle_core::{Device, Tensor};

pub use config::{ConfigError, OptimizerConfig, Value};
pub(crate) use cuda::CardCopy;
pub use gate::{clip_factor, gate};
pub use schedule::Schedule;

/// What the training loop knows about this step.
#[derive(Clone, Copy, Debug)]
pub struct StepInput {
    /// alpha0 after the schedule; the gate multiplies it.
    pub scheduled_lr: f64,
    /// Multiplies every gradient: 1 / (tokens of the whole step). SophiaG takes its batch size as the inverse of it.
    pub gradient_scale: f64,
    /// Largest norm of the scaled gradient.
    pub grad_clip: Option<f64>,
}

impl StepInput {
    fn check(&self) -> Result<(), OptimError> {
        let refuse = |what, value| Err(OptimError::BadInput { what, value });
        if !(self.scheduled_lr.is_finite() && self.scheduled_lr >= 0.0) {
            return refuse("the scheduled learning rate", self.scheduled_lr);
        }
        if !(self.gradient_scale.is_finite() && self.gradient_scale > 0.0) {
            return refuse("the gradients' scale (1 / tokens)", self.gradient_scale);
        }
        match self.grad_clip {
            Some(limit) if limit.is_nan() || limit <= 0.0 => refuse("the clip's norm", limit),
            _ => Ok(()),
        }
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Norm of the scaled gradient, before the clip.
    pub grad_norm: f64,
    /// What the clip multiplied the gradient by, at most 1.
    pub clip_factor: f64,
    /// The learning rate after the gate. With `gate_scope = "group"`: the decayed group's.
    pub eta: f64,
    /// eta / scheduled_lr.
    pub gate: f64,
    /// Sum of the squares of the new velocity (the method's momentum), before any bias correction.
    pub velocity_sq: f64,
}

/// Whose labels a further pass over the step's batch uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Labels {
    /// The batch's own.
    Data,
    /// Drawn from the model's prediction.
    Sampled,
}

/// Runs forward and backward over the step's whole batch once more, for the methods that ask for it.
pub trait GradientSource {
    /// Leaves in `store.gradients()` the sums over the step's tokens of the gradients at `store.weights()`.
    fn recompute(&mut self, store: &mut ParameterStore, labels: Labels) -> anyhow::Result<()>;
}

/// The gradient source of a caller whose optimizer has one pass; see [`Optimizer::needs_second_pass`].
pub struct NoSecondPass;

impl GradientSource for NoSecondPass {
    fn recompute(&mut self, _: &mut ParameterStore, labels: Labels) -> anyhow::Result<()> {
        anyhow::bail!("this caller cannot run a second pass ({labels:?} labels); choose an optimizer without one")
    }
}

/// An optimizer's whole state by name, as a checkpoint stores it.
#[derive(Clone, Debug, Default)]
pub struct OptimizerState {
    /// Flat f32 tensors of `layout.len()` elements. They share the optimizer's memory: use them before its next step.
    pub tensors: Vec<(String, Tensor)>,
    /// Finite numbers that must come back bit for bit ("step" counts from 0).
    pub scalars: Vec<(String, f64)>,
}

impl OptimizerState {
    /// The scalars in the order of `own`, the state of the optimizer that loads.
    fn scalars_as(&self, own: &OptimizerState) -> Result<Vec<f64>, OptimError> {
        let names = |state: &OptimizerState| state.scalars.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        if self.scalars.len() != own.scalars.len() {
            return Err(OptimError::State(format!("it has the numbers {:?}, not {:?}", names(self), names(own))));
        }
        let find = |name: &String| {
            let Some(&(_, value)) = self.scalars.iter().find(|(other, _)| other == name) else {
                return Err(OptimError::State(format!("it has the numbers {:?}, and no {name:?}", names(self))));
            };
            if !value.is_finite() || value < 0.0 || (name == "step" && value.fract() != 0.0) {
                return Err(OptimError::State(format!("its number {name:?} is {value}")));
            }
            Ok(value)
        };
        own.scalars.iter().map(|(name, _)| find(name)).collect()
    }

    /// Copies the tensors over those of `own`, after a look at all of them.
    fn copy_tensors_into(&self, own: &OptimizerState) -> Result<(), OptimError> {
        let mut pairs = Vec::with_capacity(own.tensors.len());
        for (name, target) in &own.tensors {
            let Some((_, source)) = self.tensors.iter().find(|(other, _)| other == name) else {
                let names: Vec<_> = self.tensors.iter().map(|(name, _)| name).collect();
                return Err(OptimError::State(format!("it has the tensors {names:?}, and no {name:?}")));
            };
            if (source.dims(), source.dtype()) != (target.dims(), target.dtype()) {
                return Err(OptimError::State(format!("its tensor {name:?} is {source:?}, not {target:?}")));
            }
            // On the device already, and a copy: a state that shares this very memory may be given.
            let source = source.to_device(target.device())?.copy()?;
            // No f32 squared overflows an f64, nor does any sum of them.
            if !whole::squares(&source, &[0..0, 0..source.elem_count()])?[1].is_finite() {
                return Err(OptimError::State(format!("its tensor {name:?} holds a number that is not finite")));
            }
            pairs.push((source, target));
        }
        if self.tensors.len() != own.tensors.len() {
            let names: Vec<_> = self.tensors.iter().map(|(name, _)| name).collect();
            return Err(OptimError::State(format!("it has the tensors {names:?}, more than this optimizer has")));
        }
        for (source, target) in pairs {
            whole::copy(target, &source)?;
        }
        Ok(())
    }
}

/// One optimizer over one parameter store.
pub trait Optimizer: Send {
    /// Updates the weights from the gradients, which are sums over the step's tokens. The gradients stay as they are
    /// unless the method runs a second pass.
    ///
    /// # Errors
    /// [`OptimError::NonFinite`] where a gradient is not a number: nothing has been changed then.
    fn step(
        &mut self,
        store: &mut ParameterStore,
        input: &StepInput,
        gradients: &mut dyn GradientSource,
    ) -> Result<StepReport, OptimError>;

    fn state(&self) -> OptimizerState;

    /// Copies `state` in.
    ///
    /// # Errors
    /// When a name or a length is not this optimizer's; the old state stays then.
    fn load_state(&mut self, state: &OptimizerState) -> Result<(), OptimError>;

    /// Whether some steps call [`GradientSource::recompute`].
    fn needs_second_pass(&self) -> bool {
        false
    }
}

/// Why a step or a state was refused.
#[derive(Debug, thiserror::Error)]
pub enum OptimError {
    #[error(
        "the gradient of {parameter} is {value} at element {index}; no weight has been changed. Lower the learning \
         rate, set train.grad_clip, or look at this step's batch"
    )]
    NonFinite { parameter: String, index: usize, value: f32 },
    #[error(
        "the gradient of {parameter}, taken where SAM has moved the weights to, is {value} at element {index}; no weight has \
         been changed. Lower optimizer.sam_rho"
    )]
    NonFiniteAhead { parameter: String, index: usize, value: f32 },
    #[error("{what} is {value}, which an optimizer step cannot use")]
    BadInput { what: &'static str, value: f64 },
    #[error("the optimizer's saved state does not fit: {0}. Resume with the optimizer and the model that wrote it")]
    State(String),
    #[error("this build's optimizers have no kernels for {0}; set train.device = \"cpu\"")]
    Device(String),
    #[error("the optimizer's second pass over the batch failed")]
    SecondPass(#[source] anyhow::Error),
    #[error("the optimizer could not reach its storages")]
    Tensor(#[from] candle_core::Error),
}

impl OptimError {
    /// Whether a gradient was not finite, which says something of the step's batch.
    pub fn is_about_gradients(&self) -> bool {
        matches!(self, Self::NonFinite { .. } | Self::NonFiniteAhead { .. })
    }
}

/// Names the first gradient that is not finite, after a reduction has found that there is one.
fn non_finite(store: &ParameterStore) -> OptimError {
    let find = |numbers: &[f32]| {
        let mut parameters = store.layout().parameters().iter();
        parameters.find_map(|parameter| {
            let index = numbers[parameter.range()].iter().position(|x| !x.is_finite())?;
            Some((parameter.name.clone(), index, numbers[parameter.offset + index]))
        })
    };
    let gradients = match store.gradients().to_device(&Device::Cpu) {
        Ok(gradients) => gradients,
        Err(error) => return error.into(),
    };
    match slice(&gradients, find) {
        Ok(Some((parameter, index, value))) => OptimError::NonFinite { parameter, index, value },
        // Only a number written into the gaps between the parameters gets here.
        Ok(None) => OptimError::NonFinite { parameter: "the gap after a parameter".into(), index: 0, value: f32::NAN },
        Err(error) => error.into(),
    }
}

/// The two ranges of the flat storages that differ in decay (and in `gate_scope = "group"`): decayed, plain.
fn groups(layout: &Layout) -> [std::ops::Range<usize>; 2] {
    [0..layout.decayed_len(), layout.decayed_len()..layout.len()]
}
