//! The optimizers that treat every element alike: one reduction pass, the clip and the gate, one update pass.
//!
//! With clip factor c, and a velocity that moves as v' = keep v + take c g, the norm that the gate needs is known
//! before the velocity has moved:
//!
//! ```text
//! ||v'||^2 = keep^2 ||v||^2 + 2 keep take c <v, g> + (take c)^2 ||g||^2
//! ```
//!
//! The reduction reads g and v (8 bytes an element), the update reads and writes the rest (28 for two states), and
//! sums the new ||v||^2 exactly for the next step, so nothing drifts. Where no such identity holds (weight decay
//! inside the gradient, RMSProp's momentum, another power), a further reading pass sums what the rule would give.

use super::cuda::{OnDevice, Passes, Task};
use super::gate::{GateScope, GateSettings, GateSource, clip_factor, gate};
use super::kernel::{self, Level, Measure, Rule, Sums};
use super::{GradientSource, OptimError, Optimizer, OptimizerState, StepInput, StepReport, groups, non_finite};
use crate::params::{Layout, ParameterStore, slice, slice_mut, zeros_on};
use candle_core::{Device, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// The scalars of one step for one group of parameters.
#[derive(Clone, Copy, Debug)]
pub(super) struct At {
    /// Counted from 1.
    pub step: u64,
    /// Before the gate.
    pub scheduled_lr: f64,
    /// After the gate.
    pub eta: f64,
    /// Multiplies the summed gradients: scale and clip.
    pub factor: f32,
    /// 1 / tokens.
    pub gradient_scale: f64,
    /// lambda for the decayed group, 0 for the plain one.
    pub weight_decay: f64,
    /// ||new velocity||^2 over all parameters, for the methods that ask for it; otherwise 0.
    pub velocity_sq: f64,
}

/// velocity' = keep * velocity + take * gradient (scaled and clipped).
#[derive(Clone, Copy, Debug)]
pub(super) struct Blend {
    pub keep: f64,
    pub take: f64,
}

/// One method: its constants, and the rule that they give in one step.
pub(super) trait Method<const N: usize>: OnDevice + Send {
    type Rule: Rule<N>;

    /// Names of the state tensors in a checkpoint, the velocity first.
    const STATES: [&'static str; N];

    /// Whether a state grows where every gradient is zero, so that the gaps must be zeroed again.
    const GROWS_FROM_ZERO: bool = false;

    fn weight_decay(&self) -> f64;

    /// How the velocity moves, if it moves linearly in the gradient alone.
    fn blend(&self, at: &At) -> Option<Blend>;

    fn rule(&self, at: &At) -> Self::Rule;

    /// Whether the rule reads [`At::velocity_sq`].
    fn needs_velocity_sq(&self) -> bool {
        false
    }

    /// A further number of the state, by name.
    fn extra(&self) -> Option<(&'static str, f64)> {
        None
    }

    fn load_extra(&mut self, _: f64) {}

    /// Called when step number `step` has been made.
    fn advance(&mut self, _step: u64) {}
}

/// What a step came to, on either device. Pairs are (decayed, plain).
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    pub grad_norm: f64,
    pub clip_factor: f64,
    pub gates: [f64; 2],
    pub velocity_sq: [f64; 2],
}

/// One of the elementwise methods with its state.
pub(super) struct Elementwise<const N: usize, M: Method<N>> {
    method: M,
    gate: Option<GateSettings>,
    layout: Arc<Layout>,
    states: [Tensor; N],
    /// Steps made.
    step: u64,
    /// ||velocity||^2 of the decayed and of the plain parameters after the last step.
    velocity_sq: [f64; 2],
    /// Where the state is on a CUDA device.
    passes: Option<Passes>,
}

/// The scale and decay that every rule begins with.
#[derive(Clone, Copy)]
pub(super) struct Prepared {
    factor: f32,
    l2: f32,
    decay: f32,
}

impl Prepared {
    /// Decay as theta (1 - eta lambda), outside the gradient.
    pub fn decoupled(at: &At) -> Self {
        Self { factor: at.factor, l2: 0.0, decay: (at.eta * at.weight_decay) as f32 }
    }

    /// Decay as g + lambda theta.
    pub fn l2(at: &At) -> Self {
        Self { factor: at.factor, l2: at.weight_decay as f32, decay: 0.0 }
    }

    #[inline(always)]
    pub fn gradient(self, gradient: f32, weight: f32) -> f32 {
        self.factor * gradient + self.l2 * weight
    }

    /// The weight after decay and `change`. They are added first: eta lambda is often below f32's resolution next to
    /// 1, so that theta * (1 - eta lambda) would not decay at all.
    #[inline(always)]
    pub fn weight(self, weight: f32, change: f32) -> f32 {
        weight - (self.decay * weight + change)
    }
}

impl<const N: usize, M: Method<N>> Elementwise<N, M> {
    pub fn new(
        method: M,
        gate: Option<GateSettings>,
        layout: &Arc<Layout>,
        device: &Device,
    ) -> Result<Self, OptimError> {
        let mut states = Vec::with_capacity(N);
        for _ in 0..N {
            states.push(zeros_on(layout.len(), device)?);
        }
        let Ok(states) = <[Tensor; N]>::try_from(states) else {
            return Err(OptimError::State(format!("{N} tensors were expected")));
        };
        let passes = Passes::new(layout, device)?;
        Ok(Self { method, gate, layout: layout.clone(), states, step: 0, velocity_sq: [0.0; 2], passes })
    }

    /// Steps made.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// The flat state tensors, the velocity first.
    pub fn states(&self) -> &[Tensor; N] {
        &self.states
    }

    /// The scalars of this step for the decayed and the plain group, before the gate.
    fn scalars(&self, input: &StepInput, factor: f32) -> [At; 2] {
        let decayed = At {
            step: self.step + 1,
            scheduled_lr: input.scheduled_lr,
            eta: input.scheduled_lr,
            factor,
            gradient_scale: input.gradient_scale,
            weight_decay: self.method.weight_decay(),
            velocity_sq: 0.0,
        };
        [decayed, At { weight_decay: 0.0, ..decayed }]
    }

    /// ||new velocity||^2 of both groups by the identity at the head of this file.
    fn velocity_sq_ahead(&self, at: &[At; 2], blends: &[Blend; 2], sums: &[Sums]) -> [f64; 2] {
        std::array::from_fn(|group| {
            let Blend { keep, take } = blends[group];
            let take = take * f64::from(at[group].factor);
            let old = keep * keep * self.velocity_sq[group];
            let cross = 2.0 * keep * take * sums[group].velocity_gradient;
            let sum = old + cross + take * take * sums[group].gradient_sq;
            // Below 0 by rounding alone; a NaN stays one.
            if sum < 0.0 { 0.0 } else { sum }
        })
    }

    /// The same, or another sum, by a pass that reads what the rule would give.
    fn predict(&self, store: &ParameterStore, at: &[At; 2], measure: Measure) -> Result<[f64; 2], OptimError> {
        let rules = self.rules(at);
        let sums = slice(store.gradients(), |gradient| {
            slice(store.weights(), |weight| {
                with_slices(&self.states, |states| {
                    kernel::predict(Level::best(), &rules, measure, gradient, weight, states)
                })
            })
        })???;
        Ok([sums[0], sums[1]])
    }

    fn rules(&self, at: &[At; 2]) -> [(Range<usize>, M::Rule); 2] {
        let [decayed, plain] = groups(&self.layout);
        [(decayed, self.method.rule(&at[0])), (plain, self.method.rule(&at[1]))]
    }

    /// How both groups' velocities move, if both move linearly in the gradient alone.
    fn blends(&self, at: &[At; 2]) -> Option<[Blend; 2]> {
        Some([self.method.blend(&at[0])?, self.method.blend(&at[1])?])
    }

    /// All passes of a step as kernels on the device.
    fn on_device(&mut self, store: &ParameterStore, input: &StepInput) -> Result<Done, OptimError> {
        let at = self.scalars(input, 1.0);
        let task = Task {
            rule: self.method.kernel_rule(&at[0]),
            input,
            gate: self.gate,
            // One blend for both: they differ in decay alone, which enters none.
            blend: self.blends(&at).map(|blends| blends[0]),
            needs_velocity_sq: self.method.needs_velocity_sq(),
            grows_from_zero: M::GROWS_FROM_ZERO,
        };
        let Some(passes) = &mut self.passes else { return Err(OptimError::Device("the CPU".into())) };
        passes.step(store, &self.states, &task)?.ok_or_else(|| non_finite(store))
    }

    /// All passes of a step on the CPU.
    fn on_cpu(&mut self, store: &mut ParameterStore, input: &StepInput) -> Result<Done, OptimError> {
        let ranges = groups(&self.layout);
        let blends = self.blends(&self.scalars(input, 1.0));
        let gate_reads_velocity_sq =
            matches!(self.gate, Some(GateSettings { source: GateSource::Velocity, power: 2.0, .. }));
        let wants_velocity_sq = gate_reads_velocity_sq || self.method.needs_velocity_sq();

        // The reduction pass: reads g, and v where the identity will use it.
        let sums = slice(store.gradients(), |gradient| {
            if wants_velocity_sq && blends.is_some() {
                slice(&self.states[0], |velocity| kernel::reduce(Level::best(), &ranges, gradient, Some(velocity)))
            } else {
                Ok(kernel::reduce(Level::best(), &ranges, gradient, None))
            }
        })??;
        let grad_norm = input.gradient_scale * (sums[0].gradient_sq + sums[1].gradient_sq).sqrt();
        if !grad_norm.is_finite() {
            return Err(non_finite(store));
        }
        let clip = clip_factor(grad_norm, input.grad_clip);

        // Scalars only, except where a sum has to be predicted.
        let mut at = self.scalars(input, (input.gradient_scale * clip) as f32);
        let velocity_sq = match (wants_velocity_sq, blends) {
            (false, _) => [0.0; 2],
            (true, Some(blends)) => self.velocity_sq_ahead(&at, &blends, &sums),
            (true, None) => self.predict(store, &at, Measure::Velocity { power: 2.0 })?,
        };
        let factor = f64::from(at[0].factor);
        let gates = match self.gate {
            None => [1.0; 2],
            Some(settings) => {
                let q = match (settings.source, settings.power) {
                    (GateSource::Velocity, 2.0) => velocity_sq,
                    (GateSource::Gradient, 2.0) => [0, 1].map(|group: usize| factor * factor * sums[group].gradient_sq),
                    (GateSource::Velocity, power) => self.predict(store, &at, Measure::Velocity { power })?,
                    (GateSource::Gradient, power) => {
                        self.predict(store, &at, Measure::Gradient { scale: factor, power })?
                    }
                };
                match settings.scope {
                    GateScope::Global => [gate(settings.beta3, settings.alpha1, q[0] + q[1]); 2],
                    GateScope::Group => q.map(|q| gate(settings.beta3, settings.alpha1, q)),
                }
            }
        };
        for (at, gate) in at.iter_mut().zip(gates) {
            at.eta = input.scheduled_lr * gate;
            at.velocity_sq = velocity_sq[0] + velocity_sq[1];
        }

        // The update pass.
        let rules = self.rules(&at);
        let sums = store.update(|gradient, weights| {
            with_slices_mut(&self.states, |mut states| {
                let parts = states.each_mut().map(|state| &mut **state);
                let sums = kernel::update(Level::best(), &rules, gradient, weights, parts);
                if M::GROWS_FROM_ZERO {
                    states.iter_mut().for_each(|state| zero_gaps(&self.layout, state));
                }
                sums
            })
        })??;
        Ok(Done { grad_norm, clip_factor: clip, gates, velocity_sq: [sums[0], sums[1]] })
    }
}

/// Calls `f` with the numbers of `tensors`.
fn with_slices<const N: usize, R>(tensors: &[Tensor; N], f: impl FnOnce([&[f32]; N]) -> R) -> candle_core::Result<R> {
    fn nest(tensors: &[Tensor], slices: Vec<&[f32]>, f: &mut dyn FnMut(Vec<&[f32]>)) -> candle_core::Result<()> {
        let Some((first, rest)) = tensors.split_first() else {
            f(slices);
            return Ok(());
        };
        slice(first, |numbers| {
            // Rebound, so that the vector's lifetime shrinks to that of the newest slice.
            let mut slices = slices;
            slices.push(numbers);
            nest(rest, slices, f)
        })?
    }
    let (mut f, mut result) = (Some(f), None);
    nest(tensors, Vec::with_capacity(N), &mut |slices| {
        if let (Some(f), Ok(slices)) = (f.take(), slices.try_into()) {
            result = Some(f(slices));
        }
    })?;
    result.ok_or_else(|| candle_core::Error::Msg("the state's slices were not reached".into()))
}

/// Calls `f` with the numbers of `tensors`, to be changed in place.
fn with_slices_mut<const N: usize, R>(
    tensors: &[Tensor; N],
    f: impl FnOnce([&mut [f32]; N]) -> R,
) -> candle_core::Result<R> {
    fn nest(
        tensors: &[Tensor],
        slices: Vec<&mut [f32]>,
        f: &mut dyn FnMut(Vec<&mut [f32]>),
    ) -> candle_core::Result<()> {
        let Some((first, rest)) = tensors.split_first() else {
            f(slices);
            return Ok(());
        };
        slice_mut(first, |numbers| {
            let mut slices = slices;
            slices.push(numbers);
            nest(rest, slices, f)
        })?
    }
    let (mut f, mut result) = (Some(f), None);
    nest(tensors, Vec::with_capacity(N), &mut |slices| {
        if let (Some(f), Ok(slices)) = (f.take(), slices.try_into()) {
            result = Some(f(slices));
        }
    })?;
    result.ok_or_else(|| candle_core::Error::Msg("the state's slices were not reached".into()))
}

impl<const N: usize, M: Method<N>> Optimizer for Elementwise<N, M> {
    fn step(
        &mut self,
        store: &mut ParameterStore,
        input: &StepInput,
        _: &mut dyn GradientSource,
    ) -> Result<StepReport, OptimError> {
        input.check()?;
        check_layout(store, &self.layout)?;
        let done = if self.passes.is_some() { self.on_device(store, input)? } else { self.on_cpu(store, input)? };
        self.velocity_sq = done.velocity_sq;
        self.step += 1;
        self.method.advance(self.step);
        let gate = done.gates[usize::from(self.layout.decayed_len() == 0)];
        Ok(StepReport {
            grad_norm: done.grad_norm,
            clip_factor: done.clip_factor,
            eta: input.scheduled_lr * gate,
            gate,
            velocity_sq: done.velocity_sq[0] + done.velocity_sq[1],
        })
    }

    fn state(&self) -> OptimizerState {
        let tensors = M::STATES.iter().zip(&self.states).map(|(name, tensor)| (name.to_string(), tensor.clone()));
        let mut scalars = vec![
            ("step".to_string(), self.step as f64),
            ("velocity_sq_decayed".to_string(), self.velocity_sq[0]),
            ("velocity_sq_plain".to_string(), self.velocity_sq[1]),
        ];
        scalars.extend(self.method.extra().map(|(name, value)| (name.to_string(), value)));
        OptimizerState { tensors: tensors.collect(), scalars }
    }

    fn load_state(&mut self, state: &OptimizerState) -> Result<(), OptimError> {
        let own = self.state();
        let scalars = state.scalars_as(&own)?;
        state.copy_tensors_into(&own)?;
        self.step = scalars[0] as u64;
        self.velocity_sq = [scalars[1], scalars[2]];
        if let Some(passes) = &mut self.passes {
            passes.set_velocity_sq(self.velocity_sq)?;
        }
        if let Some(&extra) = scalars.get(3) {
            self.method.load_extra(extra);
        }
        Ok(())
    }
}

/// Refuses a store of another table than the optimizer was built for.
pub(super) fn check_layout(store: &ParameterStore, layout: &Arc<Layout>) -> Result<(), OptimError> {
    if Arc::ptr_eq(store.layout(), layout) || **store.layout() == **layout {
        return Ok(());
    }
    Err(OptimError::State("the store's table of parameters is not the one that the optimizer was built for".into()))
}

/// Puts zeros between the parameters again.
fn zero_gaps(layout: &Layout, numbers: &mut [f32]) {
    let parameters = layout.parameters();
    for (index, parameter) in parameters.iter().enumerate() {
        let end = parameters.get(index + 1).map_or(layout.len(), |next| next.offset);
        numbers[parameter.range().end..end].fill(0.0);
    }
}
