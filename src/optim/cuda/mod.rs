//! The optimizers on a CUDA device: the kernels of kernels/vradam.cu and kernels/methods.cu over the flat storages.
//!
//! A step is a handful of launches, whatever the number of tensors (reduce, decide, [predict, finish,] update,
//! finish), and nothing of it waits for the host: the clip, the gate and eta are decided on the device. The report is
//! read back when all has been launched. Everything goes to candle's one stream, so the launches run in their order
//! and candle's operations before and after are ordered with them.

mod abi;
mod muon;
mod rules;
mod whole;

pub(super) use muon::{MatrixStep, MuonPasses, Part};
pub(super) use rules::{KernelRule, OnDevice};
pub(crate) use whole::CardCopy;
pub(super) use whole::{add_scaled, blend_square, squares};

use super::elementwise::{Blend, Done};
use super::gate::{GateScope, GateSettings, GateSource};
use super::{OptimError, StepInput};
use crate::cuda::{Module, address, device_address, launch};
use crate::params::{Layout, ParameterStore};
use abi::{Decision, Extent, Gate, Into, Scalars, Storages};
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Device, Result, Tensor, bail};

/// Elements of one block's work. A constant, because the sums' bits depend on it. Larger chunks leave the card's last
/// wave of blocks half empty, smaller ones leave more sums to the one block that adds them (measured in docs/log.md).
const CHUNK: u64 = 1 << 15;
/// Threads of a block that passes over a chunk, and of the one that decides. Constants for the same reason.
const PASS_THREADS: u32 = 512;
const DECIDE_THREADS: u32 = 512;

/// Blocks of a pass over `extent`.
fn blocks(extent: &Extent) -> Result<u32> {
    let chunks = extent.decayed.div_ceil(extent.chunk) + (extent.total - extent.decayed).div_ceil(extent.chunk);
    u32::try_from(chunks).map_err(|_| candle_core::Error::Msg(format!("{chunks} chunks are more than a grid has")))
}

/// One step's numbers from the host.
pub(super) struct Task<'a> {
    pub rule: KernelRule,
    pub input: &'a StepInput,
    pub gate: Option<GateSettings>,
    /// How the velocity moves, if it moves linearly in the gradient alone.
    pub blend: Option<Blend>,
    /// Whether the method's rule reads ||new velocity||^2.
    pub needs_velocity_sq: bool,
    /// Whether a state grows where every gradient is zero, so that the gaps must be zeroed again.
    pub grows_from_zero: bool,
}

/// The device side of one elementwise optimizer.
pub(super) struct Passes {
    device: CudaDevice,
    extent: Extent,
    blocks: u32,
    /// Sums of the chunks, two each.
    partials: CudaSlice<f64>,
    scalars: CudaSlice<Scalars>,
    /// First and past-the-last element of every gap between parameters.
    gaps: Option<(u32, CudaSlice<u64>)>,
}

impl Passes {
    /// Nothing for the CPU, which has its own passes.
    pub fn new(layout: &Layout, device: &Device) -> std::result::Result<Option<Self>, OptimError> {
        let device = match device {
            Device::Cpu => return Ok(None),
            Device::Cuda(device) => device.clone(),
            other => return Err(OptimError::Device(format!("{:?}", other.location()))),
        };
        let extent = Extent { decayed: layout.decayed_len() as u64, total: layout.len() as u64, chunk: CHUNK };
        let blocks = blocks(&extent)?;
        let parameters = layout.parameters();
        let mut gaps = Vec::new();
        for (index, parameter) in parameters.iter().enumerate() {
            let end = parameters.get(index + 1).map_or(layout.len(), |next| next.offset);
            if parameter.range().end < end {
                gaps.extend([parameter.range().end as u64, end as u64]);
            }
        }
        let gaps = if gaps.is_empty() { None } else { Some(((gaps.len() / 2) as u32, device.clone_htod(&gaps)?)) };
        Ok(Some(Self {
            extent,
            blocks,
            partials: device.alloc_zeros(2 * (blocks as usize).max(1))?,
            scalars: device.alloc_zeros(1)?,
            gaps,
            device,
        }))
    }

    /// ||velocity||^2 of both groups, which the next step begins with.
    pub fn set_velocity_sq(&mut self, velocity_sq: [f64; 2]) -> Result<()> {
        self.device.memcpy_htod(&[Scalars { velocity_sq, ..Scalars::default() }], &mut self.scalars)
    }

    /// Launches the whole step, then reads back what it decided. Nothing where a gradient is not finite: then nothing
    /// has been changed.
    pub fn step(&mut self, store: &ParameterStore, states: &[Tensor], task: &Task) -> Result<Option<Done>> {
        let at = self.storages(store, states)?;
        let plan = Plan::new(task);
        let (partials, scalars) =
            (device_address(&self.device, &self.partials), device_address(&self.device, &self.scalars));
        let (device, extent, blocks) = (&self.device, &self.extent, self.blocks);
        let (decision, rule) = (&plan.decision, &task.rule);
        let update = format!("update_{}", rule.name);
        let predict = format!("predict_{}", rule.name);
        let finish = |into: Into| -> Result<()> {
            let vradam = Module::VrAdam;
            launch!(device, vradam, "finish", 1, DECIDE_THREADS, extent, &partials, decision, &into, &scalars);
            Ok(())
        };
        let predict_velocity = |power: f64| -> Result<()> {
            let (module, rates, constants) = (Module::of(rule.name), &rule.rates, &rule.constants);
            launch!(
                device,
                module,
                &predict,
                blocks,
                PASS_THREADS,
                extent,
                &at,
                rates,
                constants,
                &scalars,
                &power,
                &partials,
            );
            Ok(())
        };

        let velocity = if decision.blends != 0 { at.velocity } else { 0 };
        if blocks > 0 {
            let vradam = Module::VrAdam;
            launch!(device, vradam, "reduce", blocks, PASS_THREADS, extent, &at.gradient, &velocity, &partials);
        }
        launch!(device, Module::VrAdam, "decide", 1, DECIDE_THREADS, extent, &partials, decision, &scalars);
        if blocks > 0 {
            if plan.predicts_velocity_sq {
                predict_velocity(2.0)?;
                finish(Into::VelocitySqAhead)?;
            }
            match plan.predicts_gate {
                None => {}
                Some(GateSettings { source: GateSource::Velocity, power, .. }) => predict_velocity(power)?,
                Some(GateSettings { source: GateSource::Gradient, power, .. }) => launch!(
                    device,
                    Module::VrAdam,
                    "predict_gradient",
                    blocks,
                    PASS_THREADS,
                    extent,
                    &at.gradient,
                    &scalars,
                    &power,
                    &partials,
                ),
            }
            if plan.predicts_gate.is_some() {
                finish(Into::GateSum)?;
            }
            let (module, rates, constants) = (Module::of(rule.name), &rule.rates, &rule.constants);
            launch!(device, module, &update, blocks, PASS_THREADS, extent, &at, rates, constants, &scalars, &partials,);
            finish(Into::VelocitySq)?;
            if let (true, Some((count, gaps))) = (task.grows_from_zero, &self.gaps) {
                let gaps = device_address(device, gaps);
                launch!(device, Module::Methods, "zero_gaps", *count, 64, &gaps, &at.second);
            }
        }

        let read = self.device.clone_dtoh(&self.scalars)?;
        let Some(read) = read.first() else { bail!("the device gave no scalars back") };
        Ok((read.finite != 0).then_some(Done {
            grad_norm: read.gradient_norm,
            clip_factor: read.clip_factor,
            gates: if blocks > 0 || task.gate.is_none() { read.gate } else { [1.0; 2] },
            velocity_sq: read.velocity_sq,
        }))
    }

    fn storages(&self, store: &ParameterStore, states: &[Tensor]) -> Result<Storages> {
        let total = self.extent.total as usize;
        let all = [store.gradients(), store.weights()].into_iter().chain(states);
        if all.clone().any(|tensor| tensor.elem_count() != total) || states.is_empty() {
            bail!("a storage is not as long as the table of parameters, {total} elements");
        }
        if total == 0 {
            return Ok(Storages { gradient: 0, weight: 0, velocity: 0, second: 0, rounded: 0 });
        }
        let at = |tensor: &Tensor| address(&self.device, tensor);
        Ok(Storages {
            gradient: at(store.gradients())?,
            weight: at(store.weights())?,
            velocity: at(&states[0])?,
            second: states.get(1).map_or(Ok(0), at)?,
            rounded: 0,
        })
    }
}

/// Which passes a step takes.
struct Plan {
    decision: Decision,
    predicts_velocity_sq: bool,
    predicts_gate: Option<GateSettings>,
}

impl Plan {
    fn new(task: &Task) -> Self {
        let reads_velocity_sq =
            matches!(task.gate, Some(GateSettings { source: GateSource::Velocity, power: 2.0, .. }));
        let wants_velocity_sq = reads_velocity_sq || task.needs_velocity_sq;
        let (gate, predicts_gate) = match task.gate {
            None => (Gate::Off, None),
            Some(GateSettings { source: GateSource::Gradient, power: 2.0, .. }) => (Gate::Gradient, None),
            Some(GateSettings { source: GateSource::Velocity, power: 2.0, .. }) if task.blend.is_some() => {
                (Gate::Velocity, None)
            }
            Some(settings) => (Gate::Predicted, Some(settings)),
        };
        let blend = task.blend.filter(|_| wants_velocity_sq);
        let decision = Decision {
            gradient_scale: task.input.gradient_scale,
            grad_clip: task.input.grad_clip.unwrap_or(f64::INFINITY),
            scheduled_lr: task.input.scheduled_lr,
            keep: blend.map_or(0.0, |blend| blend.keep),
            take: blend.map_or(0.0, |blend| blend.take),
            beta3: task.gate.map_or(0.0, |gate| gate.beta3),
            alpha1: task.gate.map_or(0.0, |gate| gate.alpha1),
            blends: u32::from(blend.is_some()),
            gate,
            by_group: u32::from(task.gate.is_some_and(|gate| gate.scope == GateScope::Group)),
        };
        Self { decision, predicts_velocity_sq: task.needs_velocity_sq && task.blend.is_none(), predicts_gate }
    }
}
